"""Shard sets that appear whole or not at all, in a folder or in object storage."""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from dhrd_plugin import files
from dhrd_plugin.errors import UserError, user_errors
from dhrd_plugin.streams.index import INDEX, SUMMARY, file_names
from dhrd_plugin.streams.remote import check_address, is_remote, join, read

_OWN = re.compile(r'(shard|part)\.\d{5}(\..*)?')  # what a set is made of, until an index names it


def is_whole(folder: Path) -> bool:
    """Whether the folder holds a finished shard set: the index is written last."""
    return (folder / INDEX).is_file()


def foreign(folder: Path, half: bool = False) -> str | None:
    """The name of something in a folder that its shard set does not consist of; ``None`` where there is nothing else.

    Args:
        folder: holds a set.
        half: files of a set that no index names count as its own, too. Default: ``False``.
    """
    index = folder / INDEX
    own = file_names(index.read_bytes() if index.is_file() else None)
    own |= {INDEX, SUMMARY} if own or half else set()  # an index of other things is none of ours
    own |= {str(above) for name in own for above in Path(name).parents}
    found = sorted(str(path.relative_to(folder)) for path in folder.rglob('*'))
    return next((name for name in found if name not in own and not (half and _OWN.fullmatch(name.split('/')[0]))), None)


def check_free(
    out: str | Path, overwrite: bool, key: str = '', apart: Mapping[str, str | Path | None] | None = None
) -> None:
    """Refuse a folder or an address that is taken or cannot be written.

    Args:
        out: the place of a set.
        overwrite: frees a shard set, with nothing beside it.
        key: see :func:`~dhrd_plugin.files.check_folder`, as is ``apart``.
        apart: what ``out`` must neither be nor hold, by name.
    """
    where = f'{key}: {out}' if key else str(out)
    if is_remote(out):
        check_address(str(out), key)
        index = read(str(join(out, INDEX)), attempts=1)
        whole = index is not None
        if whole and not file_names(index):
            raise UserError(f'{where}: holds an {INDEX} of something else; choose another place')
    else:
        path = Path(out)
        files.sweep(path.absolute().parent, path.name)
        whole = is_whole(path)
        if not whole and path.is_dir() and any(path.iterdir()):
            raise UserError(f'{where}: exists and is not a shard set; choose another place')
    if whole and not overwrite:
        raise UserError(f'{where}: already holds a shard set; choose another place or allow overwriting')
    if not is_remote(out):
        files.check_folder(out, key, 'the shard set there', foreign, apart)


@contextmanager
def staged(out: str | Path) -> Iterator[Path]:
    """A temporary folder to write the set for ``out`` in; it always vanishes at the end.

    It stands beside ``out``, so that :func:`publish` can rename it; for an address, in the system's
    temporary folder. An ``OSError`` meanwhile, such as a full disk, becomes a ``UserError``.
    """
    with user_errors(out, OSError), ExitStack() as stack:
        beside = out
        if is_remote(out):
            beside = stack.enter_context(files.temporary()) / 'set'
        yield stack.enter_context(files.staged(beside))


def publish(folder: Path, out: str | Path, half: bool = False) -> list[str]:
    """Put a finished set in its place, in one step at the end, and return which old shards stay there.

    A folder is replaced by renaming, so none stay. At an address the shards go first, under new names, and the
    index, which replaces an old one, goes last: those of a replaced set stay, as runs may still be reading
    them, and after a failure the old set is as it was.

    Args:
        folder: of :func:`staged`.
        out: a folder that holds nothing but a set, or an address.
        half: see :func:`foreign`.
    """
    if is_remote(out):
        return _upload(folder, str(out))
    files.replace_folder(folder, out, partial(foreign, half=half))
    return []


def _upload(folder: Path, remote: str) -> list[str]:
    from streaming.base.storage.upload import CloudUploader

    replaced = file_names(read(str(join(remote, INDEX)), attempts=1))
    shards = _rename_shards(folder)
    others = [path.name for path in folder.iterdir() if path.name not in (*shards, INDEX)]
    with user_errors(f'{remote}: cannot be written', kind=True):  # each provider has errors of its own
        uploader = CloudUploader.get((str(folder), remote), keep_local=True, exist_ok=True)
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(uploader.upload_file, shards))
        for name in (*others, INDEX):  # last: until the shards are there, an old index has its own summary
            uploader.upload_file(name)
    return sorted(replaced.difference(shards))


def _rename_shards(folder: Path) -> list[str]:
    """Name the shards after the set's content, so that none overwrites one of an older set.

    Until the new index is in place, the old one names the old shards, and they are all there.
    """
    index = json.loads((folder / INDEX).read_text('utf-8'))
    tag = hashlib.sha256((folder / INDEX).read_bytes()).hexdigest()[:8]
    names = []
    for shard in index['shards']:
        for file in filter(None, (shard['raw_data'], shard['zip_data'])):
            name, file['basename'] = file['basename'], f'{tag}.{file["basename"]}'
            if (folder / name).exists():
                os.rename(folder / name, folder / file['basename'])
                names.append(file['basename'])
    files.write_json(folder / INDEX, index)
    return names

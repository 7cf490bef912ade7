"""Sets of shards that appear whole or not at all, in a folder or in object storage (see ``remote``)."""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

from dhrd_plugin import files
from dhrd_plugin.data.index import INDEX, parse_index, stored_files
from dhrd_plugin.data.remote import fetch, is_remote, join, one_line, read
from dhrd_plugin.errors import UserError
from dhrd_plugin.files import replace_folder, write_json

__all__ = ['check_free', 'is_whole', 'os_errors', 'publish', 'staged']


def is_whole(folder: Path) -> bool:
    """Whether the folder holds a finished set of shards: the index is written last."""
    return (folder / INDEX).is_file()


def check_free(out: str | Path, overwrite: bool) -> None:
    """Raises UserError unless a set may be written to ``out``.

    Only a set of shards is ever overwritten, and only where ``overwrite`` allows it.
    """
    if is_remote(out):
        with tempfile.TemporaryDirectory() as folder:
            whole = not overwrite and fetch(str(join(out, INDEX)), Path(folder) / INDEX)
    else:
        path = Path(out)
        if not path.exists() or (path.is_dir() and not any(path.iterdir())):
            return
        whole = is_whole(path)
        if not whole:
            raise UserError(f'{out}: is there already and is no set of shards; choose another place')
    if whole and not overwrite:
        raise UserError(f'{out}: holds a set of shards already; choose another place or allow overwriting')


@contextmanager
def staged(out: str | Path) -> Iterator[Path]:
    """A temporary folder to write the set for ``out`` in; it vanishes in any case.

    It stands beside ``out``, from where ``publish`` can rename it; for an address, in the system's
    temporary folder.
    """
    with os_errors(out), ExitStack() as stack:
        beside = out
        if is_remote(out):
            beside = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix='dhrd-'))) / 'set'
        yield stack.enter_context(files.staged(beside))


@contextmanager
def os_errors(place: str | Path) -> Iterator[None]:
    """Tells a full disk or a missing permission in one line, with the file's name or else ``place``."""
    try:
        yield
    except OSError as error:
        raise UserError(f'{error.filename or place}: {error.strerror or error}') from None


def publish(folder: Path, out: str | Path) -> list[str]:
    """Puts a finished set where it belongs, in one step at the end.

    Args:
        folder (Path): of ``staged(out)``.
        out (str | Path): a folder, which is renamed into place, or an address: there the shards go
            first, under names of their own, and the index, which replaces an old one, last.

    Returns:
        list[str]: the shards of a replaced set that stay at an address: runs may still be reading them.

    Raises:
        UserError: the upload failed; what was at the address is as it was.
    """
    if is_remote(out):
        return _upload(folder, str(out))
    replace_folder(folder, out)
    return []


def _upload(folder: Path, remote: str) -> list[str]:
    from streaming.base.storage.upload import CloudUploader

    replaced = _shards_of(read(str(join(remote, INDEX)), attempts=1), remote)
    shards = _rename_shards(folder)
    others = [path.name for path in folder.iterdir() if path.name not in (*shards, INDEX)]
    try:
        uploader = CloudUploader.get((str(folder), remote), keep_local=True, exist_ok=True)
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(uploader.upload_file, [*shards, *others]))
        uploader.upload_file(INDEX)
    except Exception as error:  # of many kinds, one for each provider
        raise UserError(f'{remote}: cannot be written: {one_line(error)}') from None
    return sorted(replaced.difference(shards))


def _shards_of(index: bytes | None, where: str) -> set[str]:
    try:
        return {file['basename'] for entry in parse_index(index or b'', where) for file in stored_files(entry)}
    except UserError:  # none, or not one that says so
        return set()


def _rename_shards(folder: Path) -> list[str]:
    """Names the shards after the set's content, so that none overwrites one of an older set.

    Until the new index stands, the old one names the old shards, and they are all there.
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
    write_json(folder / INDEX, index)
    return names

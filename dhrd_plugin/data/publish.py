"""Sets of shards that appear whole or not at all, in a folder or in object storage.

Object storage is reached as Streaming reaches it: ``s3://`` (``S3_ENDPOINT_URL`` for another server
than Amazon's), ``gs://``, ``oci://``, ``azure://``, ``azure-dl://``, ``hf://``, ``dbfs:/Volumes`` and so on,
with the credentials that each provider's client finds in the environment.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from dhrd_plugin import files
from dhrd_plugin.errors import UserError
from dhrd_plugin.files import replace_folder, write_json

__all__ = ['check_free', 'fetch', 'is_remote', 'is_whole', 'join', 'os_errors', 'publish', 'staged']

INDEX = 'index.json'


def is_remote(place: str | Path) -> bool:
    """Whether ``place`` is an address such as ``s3://bucket/rte``, and no folder here."""
    return isinstance(place, str) and urlparse(place).scheme != ''


def join(place: str | Path, name: str) -> str | Path:
    """``name`` under a folder or an address."""
    return f'{place.rstrip("/")}/{name}' if isinstance(place, str) else place / name


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


def publish(folder: Path, out: str | Path) -> None:
    """Puts a finished set where it belongs, in one step at the end.

    Args:
        folder (Path): of ``staged(out)``.
        out (str | Path): a folder, which is renamed into place, or an address: there the shards go
            first, under names of their own, and the index, which replaces an old one, last.

    Raises:
        UserError: the upload failed; what was at the address is as it was.
    """
    if is_remote(out):
        _upload(folder, str(out))
        return
    replace_folder(folder, out)


def fetch(remote: str, local: Path, timeout: float = 60) -> bool:
    """Downloads one file; False where there is none.

    Raises:
        UserError: the storage cannot be reached or refuses; the error names the address.
    """
    from streaming.base.storage.download import CloudDownloader

    try:
        CloudDownloader.direct_download(remote, str(local), timeout)
    except Exception as error:  # of many kinds, one for each provider
        response: Any = getattr(error, 'response', None)
        code = response.get('Error', {}).get('Code') if isinstance(response, dict) else None
        if code in ('404', 'NoSuchKey') or 'NotFound' in type(error).__name__:
            return False
        raise UserError(f'{remote}: cannot be read: {_line(error)}') from None
    return True


def _upload(folder: Path, remote: str) -> None:
    from streaming.base.storage.upload import CloudUploader

    shards = _rename_shards(folder)
    others = [path.name for path in folder.iterdir() if path.name not in (*shards, INDEX)]
    try:
        uploader = CloudUploader.get((str(folder), remote), keep_local=True, exist_ok=True)
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(uploader.upload_file, [*shards, *others]))
        uploader.upload_file(INDEX)
    except Exception as error:  # of many kinds, one for each provider
        raise UserError(f'{remote}: cannot be written: {_line(error)}') from None


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


def _line(error: Exception) -> str:
    return f'{type(error).__name__}: {" ".join(str(error).split())[:300]}'

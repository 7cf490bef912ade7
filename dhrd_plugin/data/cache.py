"""Where shards of object storage are kept here, and what killed runs leave behind.

A cache is a folder of shards with the index of the remote set. Its ``.lock`` is held (shared) by the runs
that read it, so that nobody puts another set there meanwhile.

Streaming coordinates the ranks and workers of a node in shared memory under the name of the folder, and
refuses a folder that a dataset of another run has, even of one that was killed or that reads the same
files. So each run reaches its folders through links of its own, below a folder that it holds locked:
where that lock is free, the run is gone, and what it left in shared memory is freed.
"""

import atexit
import fcntl
import functools
import hashlib
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from dhrd_plugin import files
from dhrd_plugin.data.index import INDEX, parse_index, stored_files
from dhrd_plugin.data.publish import os_errors
from dhrd_plugin.data.shards import SUMMARY
from dhrd_plugin.errors import UserError

__all__ = ['claim', 'default_folder', 'drop_cut_files', 'link', 'machine_lock']

LOCK = '.lock'
PATIENCE = 30.0  # seconds; the workers of a killed run outlive it by a few
SHARED_MEMORY = Path('/dev/shm')  # of Linux; elsewhere what a killed run leaves stays until the next boot

_held: dict[tuple[int, Path], int] = {}  # locks on caches, by process and folder, until the process ends


# ------------------------------------------------------------------------------------------------
# Caches


def default_folder(remote: str, index: bytes, cache_dir: str | Path | None = None) -> Path:
    """A cache's folder, named by address and content: a rewritten set gets another.

    Args:
        remote (str): the set's address.
        index (bytes): its ``index.json``, with sizes and hashes of its shards.
        cache_dir (str | Path, optional): Default: ``streams`` in ``files.cache_dir()``.
    """
    key = hashlib.sha256(remote.rstrip('/').encode() + b'\0' + index).hexdigest()[:32]
    return (Path(cache_dir).expanduser() if cache_dir else files.cache_dir() / 'streams') / key


def claim(folder: Path, index: bytes, remote: str) -> None:
    """Makes ``folder`` the cache of the set with this index, for as long as this process lives.

    Files of another set, such as an older state of the same remote, are removed first.

    Args:
        folder (Path): the cache; made where it is missing.
        index (bytes): the remote's ``index.json`` as it is now.
        remote (str): the address, for messages.

    Raises:
        UserError: another run reads another set there, or the folder is a set of its own, and no cache.
    """
    folder = folder.absolute()
    key = (os.getpid(), folder)
    with os_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = _held.get(key) or os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _settle(lock, folder, index, remote)
        except BaseException:
            if key not in _held:
                os.close(lock)
            raise
        _held[key] = lock


def _settle(lock: int, folder: Path, index: bytes, remote: str) -> None:
    """Ends with a shared lock on a folder that has this index."""
    deadline = time.monotonic() + PATIENCE
    while not (_try_lock(lock, fcntl.LOCK_SH) and _index_of(folder) == index):
        if _try_lock(lock, fcntl.LOCK_EX):
            if _index_of(folder) != index:
                _renew(folder, index, remote)
        elif time.monotonic() > deadline:
            raise UserError(
                f'{folder}: is in use by a run that reads another set than {remote} is now; give another folder'
            )
        else:
            time.sleep(0.1)


def drop_cut_files(folder: Path, entries: list[dict[str, Any]]) -> None:
    """Removes cached files that have not the size that the index says: they are downloaded again."""
    for entry in entries:
        for file in stored_files(entry):
            path = folder / file['basename']
            if path.is_file() and path.stat().st_size != file['bytes']:
                path.unlink()
                print(f'{path}: has not the size that the index says; it is downloaded again', flush=True)


def _renew(folder: Path, index: bytes, remote: str) -> None:
    if (folder / SUMMARY).exists():
        raise UserError(
            f'{folder}: holds a set of its own ({SUMMARY}), and no cache of {remote}; give another folder, '
            'or leave out the remote'
        )
    old = _index_of(folder)
    names = set()
    for data in filter(None, (old, index)):
        with suppress(UserError):
            names |= {file['basename'] for entry in parse_index(data, folder) for file in stored_files(entry)}
    for name in names:
        (folder / name).unlink(missing_ok=True)
    if old is not None:
        print(f'{remote}: has been rewritten; the old shards in {folder} are dropped', flush=True)
    files.write_bytes(folder / INDEX, index)


def _index_of(folder: Path) -> bytes | None:
    path = folder / INDEX
    return path.read_bytes() if path.is_file() else None


def _try_lock(lock: int, kind: int) -> bool:
    try:
        fcntl.flock(lock, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


# ------------------------------------------------------------------------------------------------
# Runs


def link(folder: Path) -> Path:
    """A name for ``folder`` that only this run has, to give to Streaming."""
    with os_errors(_root()):
        path = _run_folder(os.getpid()) / uuid.uuid4().hex[:8]
        path.symlink_to(folder.absolute())
        return path


@contextmanager
def machine_lock() -> Iterator[None]:
    """One at a time on this machine, for a user's runs: Streaming's search for a free name in shared memory races.

    Nobody waits for more than a minute: two runs of many nodes could wait for each other.
    """
    root = _root()
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    lock, deadline = os.open(root, os.O_RDONLY), time.monotonic() + 60
    try:
        while not _try_lock(lock, fcntl.LOCK_EX) and time.monotonic() < deadline:
            time.sleep(0.02)
        yield
    finally:
        fcntl.flock(lock, fcntl.LOCK_UN)
        os.close(lock)


def _root() -> Path:
    return Path(tempfile.gettempdir()).absolute() / f'dhrd-streams-{os.getuid()}'


@functools.cache
def _run_folder(process: int) -> Path:
    with machine_lock():
        _free_what_killed_runs_left(_root())
        folder = Path(tempfile.mkdtemp(dir=_root()))
        # Never closed: it is free when this process and its workers are gone, killed or not.
        fcntl.flock(os.open(folder, os.O_RDONLY), fcntl.LOCK_EX)
    atexit.register(_remove, folder, process)
    return folder


def _remove(folder: Path, process: int) -> None:
    if os.getpid() == process:  # and no fork of it
        shutil.rmtree(folder, ignore_errors=True)


def _free_what_killed_runs_left(root: Path) -> None:
    from streaming.base.constant import BARRIER_FILELOCK, CACHE_FILELOCK, LOCALS, SHM_TO_CLEAN
    from streaming.base.shared.prefix import _unpack_locals

    for path in SHARED_MEMORY.glob(f'[0-9]*_{LOCALS}'):
        with suppress(OSError, ValueError):  # another user's, or not Streaming's
            names, _ = _unpack_locals(path.read_bytes())
            runs = {root / Path(name).relative_to(root).parts[0] for name in names}  # a ValueError: not ours
            if not runs or not all(map(_is_gone, runs)):
                continue
            prefix = path.name.removesuffix(LOCALS)
            for name in reversed(SHM_TO_CLEAN):  # the locals last: by them the next start goes on if this one is killed
                (SHARED_MEMORY / f'{prefix}{name}').unlink(missing_ok=True)
            for name in (BARRIER_FILELOCK, CACHE_FILELOCK):
                Path(tempfile.gettempdir(), f'{prefix}{name}').unlink(missing_ok=True)
    for run in root.iterdir():
        if _is_gone(run):
            shutil.rmtree(run, ignore_errors=True)


def _is_gone(run: Path) -> bool:
    try:
        lock = os.open(run, os.O_RDONLY)
    except FileNotFoundError:
        return True
    try:
        return _try_lock(lock, fcntl.LOCK_EX)
    finally:
        os.close(lock)

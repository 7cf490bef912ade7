"""Local caches of shards from object storage, and what killed runs leave behind.

A cache is a folder of shards with the index of the remote set. The runs that read it hold its ``.lock``
(shared), so that none of them finds another set there halfway.

Streaming coordinates the ranks and workers of a node in shared memory under the folder's name, and refuses
a folder that another run's dataset uses, even if that run was killed or reads the same files. So each run
reaches its folders through links of its own, in a folder that it keeps locked: where that lock is free,
the run is gone, and what it left in shared memory is freed.
"""

import atexit
import fcntl
import functools
import hashlib
import os
import shutil
import stat
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from dhrd_plugin import files
from dhrd_plugin.errors import UserError, tell, user_errors
from dhrd_plugin.streams.index import INDEX, LOCK, SUMMARY, check_inside, file_names, stored_files

UNFILLED = 2.0  # seconds; a maker fills its shared memory within a moment
PATIENCE = 30.0  # seconds; the workers of a killed run outlive it by a few
SHARED_MEMORY = Path('/dev/shm')  # on Linux; elsewhere what a killed run leaves stays until the next boot

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW

_held: dict[tuple[int, Path], int] = {}  # locks on caches, by process and folder, until the process ends


def default_folder(remote: str, index: bytes, cache_dir: str | Path | None = None) -> Path:
    """A cache's folder, named by address and content (the hashes in the index): a rewritten set gets another one."""
    key = hashlib.sha256(remote.rstrip('/').encode() + b'\0' + index).hexdigest()[:32]
    return (Path(cache_dir).expanduser() if cache_dir else files.cache_dir() / 'streams') / key


def claim(folder: Path, index: bytes, remote: str) -> None:
    """Make ``folder`` the cache of the set with this index, for as long as this process lives.

    Files of another set, such as an older state of the same remote, are removed first. Where another run
    is reading another set there, or the folder is not a cache, it is left alone.
    """
    folder = folder.absolute()
    key = (os.getpid(), folder)
    with user_errors(folder, OSError):
        _check_cache(folder, index, remote)
        folder.mkdir(parents=True, exist_ok=True)
        files.sweep(folder)
        lock = _held.get(key) or os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _settle(lock, folder, index, remote)
            _held[key] = lock
        finally:
            if key not in _held:
                os.close(lock)


def _check_cache(folder: Path, index: bytes, remote: str) -> None:
    """Refuse a folder that holds something else than a cache, or a copy of this set: files of these names would go."""
    if not folder.is_dir() or (folder / LOCK).exists() or _index_of(folder) == index:
        return
    _refuse_set(folder, remote)
    name = next((path.name for path in sorted(folder.iterdir())), None)
    if name is not None:
        raise UserError(
            f'{folder}: holds {name} and is no cache of {remote}; expected a new or an empty folder, or such a cache'
        )


def _refuse_set(folder: Path, remote: str) -> None:
    if (folder / SUMMARY).exists():
        raise UserError(
            f'{folder}: is a shard set ({SUMMARY}), not a cache of {remote}; choose another folder or leave out '
            'the remote'
        )


def _settle(lock: int, folder: Path, index: bytes, remote: str) -> None:
    """Wait for a shared lock on a folder that has this index."""
    deadline = time.monotonic() + PATIENCE
    while not (_try_lock(lock, fcntl.LOCK_SH) and _index_of(folder) == index):
        if _try_lock(lock, fcntl.LOCK_EX):
            if _index_of(folder) != index:
                _renew(folder, index, remote)
        elif time.monotonic() > deadline:
            raise UserError(
                f'{folder}: is in use by a run that reads another set than the current {remote}; choose another folder'
            )
        else:
            time.sleep(0.1)


def drop_cut_files(folder: Path, entries: list[dict[str, Any]]) -> None:
    """Remove cached files whose size differs from the index: they are downloaded again."""
    for entry in entries:
        for file in stored_files(entry):
            path = folder / file['basename']
            if path.is_file() and path.stat().st_size != file['bytes']:
                path.unlink()
                print(f'{path}: size differs from the index; downloading it again', flush=True)


def _renew(folder: Path, index: bytes, remote: str) -> None:
    _refuse_set(folder, remote)
    old = _index_of(folder)
    names = file_names(old) | file_names(index)
    check_inside(folder, names)
    for name in names:
        (folder / name).unlink(missing_ok=True)
    if old is not None:
        print(f'{remote}: was rewritten; dropping the old shards in {folder}', flush=True)
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


def link(folder: Path) -> Path:
    """A path to ``folder`` that only this run uses, for Streaming."""
    with user_errors(_root(), OSError):
        path = _run_folder(os.getpid()) / uuid.uuid4().hex[:8]
        path.symlink_to(folder.absolute())
        return path


@contextmanager
def machine_lock() -> Iterator[None]:
    """A lock among this user's runs on this machine: Streaming's search for a free shared memory name races.

    After a minute the work begins without it: two runs on several nodes could wait for each other.
    """
    root = _root()
    with suppress(FileExistsError):
        root.mkdir(mode=0o700)
    _check_root(root)
    lock, deadline = os.open(root, _FOLDER), time.monotonic() + 60
    try:
        while not _try_lock(lock, fcntl.LOCK_EX) and time.monotonic() < deadline:
            time.sleep(0.02)
        yield
    finally:
        fcntl.flock(lock, fcntl.LOCK_UN)
        os.close(lock)


def _root() -> Path:
    return Path(tempfile.gettempdir()).absolute() / f'dhrd-streams-{os.getuid()}'


def _check_root(root: Path) -> None:
    """Refuse a folder, in a place that anybody can write to, that is not this user's and this user's alone."""
    found = root.lstat()
    flaw = None
    if not stat.S_ISDIR(found.st_mode):
        flaw = 'is no folder'
    elif found.st_uid != os.getuid():
        flaw = f'belongs to user {found.st_uid}'
    elif stat.S_IMODE(found.st_mode) & 0o077:
        flaw = f'is open to others (mode {stat.S_IMODE(found.st_mode):o})'
    if flaw:
        raise UserError(
            f'{root}: {flaw}; expected a folder of user {os.getuid()} of mode 700: remove it, or set TMPDIR to a '
            'folder of your own'
        )


@functools.cache
def _run_folder(process: int) -> Path:
    with machine_lock():
        _free_what_killed_runs_left(_root())
        folder = Path(tempfile.mkdtemp(dir=_root()))
        # Never closed: the lock is free when this process and its workers are gone, killed or not.
        fcntl.flock(os.open(folder, _FOLDER), fcntl.LOCK_EX)
    atexit.register(_remove, folder, process)
    return folder


def _remove(folder: Path, process: int) -> None:
    if os.getpid() == process:  # not a fork of it
        shutil.rmtree(folder, ignore_errors=True)


def _free_what_killed_runs_left(root: Path) -> None:
    from streaming.base.constant import BARRIER_FILELOCK, CACHE_FILELOCK, LOCALS, SHM_TO_CLEAN
    from streaming.base.shared.prefix import _unpack_locals

    _free_what_was_never_filled(SHM_TO_CLEAN)
    for path in SHARED_MEMORY.glob(f'[0-9]*_{LOCALS}'):
        with suppress(OSError, ValueError):  # another user's, or not Streaming's
            if not _is_own_file(path):
                continue
            names, _ = _unpack_locals(path.read_bytes())
            runs = {root / Path(name).relative_to(root).parts[0] for name in names}  # ValueError: not ours
            if not runs or not all(map(_is_gone, runs)):
                continue
            prefix = path.name.removesuffix(LOCALS)
            for name in reversed(SHM_TO_CLEAN):  # the locals last: if this start is killed, the next needs them
                (SHARED_MEMORY / f'{prefix}{name}').unlink(missing_ok=True)
            for name in (BARRIER_FILELOCK, CACHE_FILELOCK):
                Path(tempfile.gettempdir(), f'{prefix}{name}').unlink(missing_ok=True)
    for run in root.iterdir():
        with suppress(NotADirectoryError):  # no run's
            if _is_gone(run):
                shutil.rmtree(run, ignore_errors=True)


def _free_what_was_never_filled(names: Sequence[str]) -> None:
    """Remove shared memory that a kill left without what was to be written there: nobody can open it.

    Its maker fills it in the next moment, under the lock on this machine if it is one of our runs.
    """
    for name in names:
        for path in SHARED_MEMORY.glob(f'[0-9]*_{name}'):
            with suppress(OSError):
                while (young := time.time() - path.stat().st_mtime < UNFILLED) and _is_unfilled(path, name):
                    time.sleep(0.1)
                if not young and _is_unfilled(path, name):
                    path.unlink()
                    tell(f'{path}: left empty by a run that was killed; removed')


def _is_unfilled(path: Path, name: str) -> bool:
    """Whether it is empty, or, where it tells the folders of a run, tells of none."""
    from streaming.base.constant import LOCALS

    return _is_own_file(path) and (not path.stat().st_size or (name == LOCALS and not any(path.read_bytes()[:4])))


def _is_own_file(path: Path) -> bool:
    found = path.lstat()
    return stat.S_ISREG(found.st_mode) and found.st_uid == os.getuid()


def _is_gone(run: Path) -> bool:
    """Whether the run of this folder is; ``NotADirectoryError`` where it is no folder."""
    try:
        lock = os.open(run, _FOLDER)
    except FileNotFoundError:
        return True
    try:
        return _try_lock(lock, fcntl.LOCK_EX)
    finally:
        os.close(lock)

"""Files and folders that appear whole or not at all, and the guard of every place that is written.

What is at work at a place is a hidden neighbour, ``.NAME.HEX.tmp`` (what will stand there) or ``.NAME.HEX.old`` (what
stood there), which its process keeps locked. Where the lock is free the process is gone: the next start removes the
first and puts the second back where its place is empty. File systems without locks on folders, such as NFS, keep both.
"""

import fcntl
import functools
import itertools
import json
import os
import re
import shutil
import stat
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from dhrd_plugin.errors import UserError, tell

Foreign = Callable[[Path], str | None]  # of a folder: the name of something in it that is not ours, if there is one
MOMENT = 0.2  # seconds; within it, what is made is locked
_LEFT = re.compile(r'\.(?P<name>.+)\.[0-9a-f]{8}\.(?P<kind>tmp|old)', re.DOTALL)
ADDRESS = re.compile(r'\w[\w+.-]*:/')


def cache_dir() -> Path:
    """``$DHRD_CACHE``, or ``~/.cache/dhrd_plugin``."""
    return Path(os.environ.get('DHRD_CACHE', '~/.cache/dhrd_plugin')).expanduser()


# ------------------------------------------------------------------------------------- writing


@contextmanager
def staged(out: str | Path) -> Iterator[Path]:
    """A temporary folder beside ``out``, to be renamed to it; what is still there at the end vanishes.

    What killed runs left of ``out`` is removed or put back first. Where ``out`` is a link, its target is meant.
    """
    out = _real(out)
    sweep(out.parent, out.name)
    with kept_parents(out), _scratch(out, folder=True) as (folder, _):
        yield folder


@contextmanager
def temporary() -> Iterator[Path]:
    """A temporary folder of this user alone, in the system's; what killed runs left of theirs goes with the first."""
    name = Path(tempfile.gettempdir()).absolute() / f'dhrd-{os.getuid()}'
    _sweep_once(name)
    with _scratch(name, folder=True, mode=0o700) as (folder, _):
        yield folder


@functools.cache
def _sweep_once(out: Path) -> None:
    sweep(out.parent, out.name)


def replace_folder(folder: str | Path, out: str | Path, foreign: Foreign) -> None:
    """Put a finished folder in the place of ``out``; what stood there goes at the end.

    Args:
        folder: of :func:`staged`.
        out: a folder, or where there will be one.
        foreign: looks for what is not ours in a folder that stands there.

    Raises:
        UserError: something at ``out`` is not ours; it is left as it is.
    """
    folder, out = Path(folder), _real(out)
    _check_ours(out, str(out), foreign, 'what is replaced')
    if not out.exists() or not any(out.iterdir()):
        os.rename(folder, out)
        return
    old = folder.with_suffix('.old')
    with _locked(out):
        os.rename(out, old)
        try:
            os.rename(folder, out)
        except BaseException:
            os.rename(old, out)
            raise
        os.rename(old, folder)  # half removed, nobody shall put it back
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def filling(out: str | Path) -> Iterator[Path]:
    """A temporary folder whose files stand in ``out`` at the end, beside what else is there.

    Where there is an ``out`` it stands in it: what is above may be another file system, or not ours to write.
    """
    out = _real(out)
    with staged(out / 'new' if out.exists() else out) as folder:
        yield folder
        if not out.exists():
            os.rename(folder, out)
            return
        for path in sorted(folder.iterdir()):
            os.replace(path, out / path.name)


@contextmanager
def replacing(path: str | Path) -> Iterator[BinaryIO]:
    """A new file that takes the place of ``path`` at the end, whole; after an error ``path`` is as it was.

    Where ``path`` is a link, its target is meant.
    """
    with _replacing(_real(path)) as file:
        yield file


@contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    with kept_parents(path), _scratch(path) as (scratch, descriptor):
        with open(descriptor, 'wb', closefd=False) as file:
            yield file
        os.replace(scratch, path)


def write_json(path: str | Path, data: Any) -> None:
    """Write JSON for people, indented and with Unicode as it is, in one step."""
    write_bytes(path, f'{json.dumps(data, ensure_ascii=False, indent=2)}\n'.encode())


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write a file in one step; folders that are missing are made, and a link is replaced, not followed."""
    with _replacing(Path(path)) as file:
        file.write(data)


def json_line(row: Mapping[str, Any]) -> bytes:
    """A row as a line of JSON, with Unicode as it is."""
    return f'{json.dumps(row, ensure_ascii=False)}\n'.encode()


# ------------------------------------------------------------------------- what killed runs left


def sweep(folder: Path, name: str | None = None) -> None:
    """Remove what killed runs left in a folder, and put back what one of them had moved away; says so on stderr.

    Args:
        folder: where to look.
        name: of the file or folder that was at work. Default: any.
    """
    try:
        found = [(entry, _LEFT.fullmatch(entry.name)) for entry in folder.iterdir()]
    except OSError:  # no such folder: nothing was left there
        return
    left = [(path, match) for path, match in found if match and name in (None, match['name'])]
    for path, match in sorted(left, key=lambda item: _changed(item[0]), reverse=True):  # the newest is put back
        time.sleep(min(MOMENT, max(0.0, _changed(path) + MOMENT - time.time())))
        with suppress(OSError), _locked(path, wait=False):
            out = path.with_name(match['name'])
            back = match['kind'] == 'old' and not os.path.lexists(out)
            if back:
                os.rename(path, out)
            else:
                remove(path)
            done = f'put back as {out}' if back else 'removed'
            tell(f'{path}: left by a run that was killed; {done}')


def _changed(path: Path) -> float:
    try:
        return path.lstat().st_ctime
    except OSError:
        return 0


@contextmanager
def _scratch(out: Path, folder: bool = False, mode: int = 0o777) -> Iterator[tuple[Path, int]]:
    """A new neighbour of ``out`` and its descriptor, locked; it vanishes at the end, if it is still there."""
    while True:
        path = out.with_name(f'.{out.name}.{uuid.uuid4().hex[:8]}.tmp')
        if folder:
            path.mkdir(mode)
        try:
            descriptor = os.open(path, os.O_RDONLY if folder else os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        except FileNotFoundError:
            if not folder:
                raise
            continue  # another start swept it in the moment before it was locked
        with suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if path.exists():
            break
        os.close(descriptor)  # likewise
    try:
        yield path, descriptor
    finally:
        remove(path)
        os.close(descriptor)


@contextmanager
def _locked(path: Path, wait: bool = True) -> Iterator[None]:
    """Hold the lock of a file or a folder; an ``OSError`` where it is taken and should not be waited for."""
    kind = os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_NONBLOCK  # a pipe must not keep us
    descriptor = os.open(path, kind | os.O_NOFOLLOW)
    try:
        if wait:
            with suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_EX)
        else:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a file, a link or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def kept_parents(path: Path) -> Iterator[None]:
    """Make the folders above a path; those of them that are empty at the end go again."""
    made = list(itertools.takewhile(lambda folder: not folder.exists(), path.parents))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        for folder in made:
            with suppress(OSError):  # something stands there
                folder.rmdir()


def _real(path: str | Path) -> Path:
    return Path(os.path.realpath(path))


# ------------------------------------------------------------------------------------- the guard


def check_folder(
    out: str | Path, key: str, what: str, foreign: Foreign, apart: Mapping[str, str | Path | None] | None = None
) -> None:
    """Refuse a folder that may not be replaced, or cannot be written, before any work starts.

    Args:
        out: the folder.
        key: what names it, for messages, such as ``--output``; may be empty.
        what: will stand there, for messages, such as ``an export``.
        foreign: looks for what is not ours in a folder that stands there.
        apart: what ``out`` must neither be nor hold, by what it is called: inputs, and what the same run writes
            elsewhere. Default: only the current folder.

    Raises:
        UserError: it is or holds one of these, or something that is not ours, or cannot be written.
    """
    where = _where(out, key)
    path = check_apart(out, key, {**(apart or {}), 'the current folder': _current()})
    _check_ours(path, where, foreign, what)
    _probe(path, where)


def check_apart(out: str | Path, key: str, apart: Mapping[str, str | Path | None]) -> Path:
    """Refuse a place that is, or holds, what has to stay as it is; arguments of :func:`check_folder`.

    What killed runs left of ``out`` is removed or put back.

    Returns:
        The real path of ``out``.
    """
    where = _where(out, key)
    if ADDRESS.match(str(out)):
        raise UserError(f'{where}: found an address; expected a place on this machine')
    if Path(out).parts[:1] == ('~',):
        raise UserError(f'{where}: found ~, which only a shell expands; expected {Path(out).expanduser()}')
    with _told(where):
        path = _real(out)
        for name, other in apart.items():
            real = None if other is None else _real(other)
            if path == real:
                raise UserError(f'{where}: is {name}; expected another place')
            if real is not None and path in real.parents:
                raise UserError(f'{where}: holds {name} ({other}); expected another place')
        sweep(path.parent, path.name)
    return path


def check_into(folder: str | Path, key: str) -> None:
    """Refuse a folder that files cannot be written into, before any work starts; what else is there stays.

    Args:
        folder: made if it is missing.
        key: see :func:`check_folder`.
    """
    where = _where(folder, key)
    path = check_apart(folder, key, {})
    if path.exists() and not path.is_dir():
        raise UserError(f'{where}: found a file; expected a folder')
    _probe(path / 'probe', where)


def check_file(
    out: str | Path,
    key: str,
    what: str,
    ours: Callable[[Path], bool],
    apart: Mapping[str, str | Path | None] | None = None,
) -> None:
    """Refuse a file that may not be replaced, or cannot be written, before any work starts.

    Args:
        out: the file.
        key: see :func:`check_folder`.
        what: will stand there, for messages, such as ``a report of bad rows``.
        ours: whether a file that stands there, and is not empty, is one of ours.
        apart: what ``out`` must not be, by what it is called. Default: nothing.
    """
    where = _where(out, key)
    path = check_apart(out, key, apart or {})
    with _told(where):
        kind = path.stat().st_mode if path.exists() else stat.S_IFREG
        if not stat.S_ISREG(kind):
            raise UserError(f'{where}: found {"a folder" if stat.S_ISDIR(kind) else "no plain file"}; expected a file')
        if path.exists() and path.stat().st_size and not ours(path):
            raise UserError(f'{where}: holds something else than {what}; expected a new file, or an earlier such one')
    _probe(path, where)


def begins_with(path: Path, *starts: bytes) -> bool:
    """Whether a file begins with one of ``starts``."""
    with path.open('rb') as file:
        return file.read(max(map(len, starts))).startswith(starts)


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty where there is none."""
    try:
        data = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return data if isinstance(data, dict) else {}


def has_keys(path: Path, *keys: str) -> bool:
    """Whether a file is one JSON object with all of these keys."""
    return read_object(path).keys() >= set(keys)


def _current() -> str | None:
    try:
        return os.getcwd()
    except OSError:  # it was removed
        return None


def _where(out: str | Path, key: str) -> str:
    return f'{key}: {out}' if key else str(out)


def _check_ours(path: Path, where: str, foreign: Foreign, what: str) -> None:
    with _told(where):
        if not path.exists():
            return
        if not path.is_dir():
            raise UserError(f'{where}: found a file; expected a folder')
        if path.is_mount():
            raise UserError(f'{where}: is a mount point, which nothing can take the place of; expected a folder in it')
        name = foreign(path) if any(path.iterdir()) else None
        if name is not None:
            raise UserError(
                f'{where}: holds {name}, which is no part of {what}; expected a new or an empty folder, or '
                'an earlier such one and nothing else'
            )


def _probe(path: Path, where: str) -> None:
    """Write a byte beside ``path``, and remove it."""
    with _told(where):
        above = next(folder for folder in path.parents if folder.exists())
        if not above.is_dir():
            raise UserError(f'{where}: {above} is a file; expected a folder')
        try:
            _write_a_byte(path)
        except FileNotFoundError:  # another start has just removed the folder above, which it had made to look, too
            _write_a_byte(path)


def _write_a_byte(path: Path) -> None:
    with kept_parents(path), _scratch(path) as (_, descriptor):
        os.write(descriptor, b'\n')
        os.fsync(descriptor)  # a full disk may say so only now


@contextmanager
def _told(where: str) -> Iterator[None]:
    """Tell what the operating system refuses by the key and the path that were given."""
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a character that no path may have
        raise UserError(f'{where}: cannot be written: {getattr(error, "strerror", None) or error}') from error

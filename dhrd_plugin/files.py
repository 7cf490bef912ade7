"""Files and folders that appear whole or not at all, and the place of what can be made again."""

import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


def cache_dir() -> Path:
    """``$DHRD_CACHE``, or ``~/.cache/dhrd_plugin``."""
    return Path(os.environ.get('DHRD_CACHE', '~/.cache/dhrd_plugin')).expanduser()


@contextmanager
def staged(out: str | Path) -> Iterator[Path]:
    """A temporary folder beside ``out``, to be renamed to it; what is still there at the end vanishes."""
    folder = Path(out).parent / f'.{Path(out).name}.{uuid.uuid4().hex[:8]}.tmp'
    new_parent = not folder.parent.exists()
    try:
        folder.mkdir(parents=True)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if new_parent:
            with suppress(OSError):  # something stands there
                folder.parent.rmdir()


def replace_folder(folder: str | Path, out: str | Path) -> None:
    """Put a finished folder in the place of ``out``; what stood there goes at the end."""
    folder, out = Path(folder), Path(out)
    old = folder.with_suffix('.old')
    if out.exists():
        os.rename(out, old)
    try:
        os.rename(folder, out)
    except OSError:
        if old.exists():
            os.rename(old, out)
        raise
    shutil.rmtree(old, ignore_errors=True)


def write_json(path: str | Path, data: Any) -> None:
    """Write JSON for people, indented and with Unicode as it is, in one step."""
    write_bytes(path, f'{json.dumps(data, ensure_ascii=False, indent=2)}\n'.encode())


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write a file in one step; folders that are missing are made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f'.{path.name}.{uuid.uuid4().hex[:8]}.tmp')
    try:
        scratch.write_bytes(data)
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)

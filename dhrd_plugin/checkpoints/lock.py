"""One run to an ``output_dir`` and a ``save_folder``, one comparison to an ``output_dir``."""

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from dhrd_plugin.errors import UserError
from dhrd_plugin.files import kept_parents
from dhrd_plugin.ranks import on_rank_zero
from dhrd_plugin.streams.remote import is_remote

LOCK = '.run.lock'  # not that of a cache, by whose lock its folder is known
PATIENCE = 30.0  # seconds; a rank whose launcher was killed saves a checkpoint before it ends


@contextmanager
def only_run(folder: str | None, key: str = 'save_folder') -> Iterator[None]:
    """Hold the lock of a folder that a run writes to until the end; every rank has to call it.

    The lock is a record lock (``fcntl``): it goes with the process, be it killed, forked workers do not inherit it,
    and NFS knows it, so that runs on two machines meet. Object stores have no locks: there nothing is held, and two
    runs under one address are not told apart.

    Args:
        folder: a folder, or an address; of ``None`` nothing is held.
        key: of the config that names it, for the message.

    Raises:
        UserError: on every rank, where another run still holds it after 30 s.
    """
    if folder is None or is_remote(folder):
        yield
        return
    with ExitStack() as stack:
        on_rank_zero(lambda: stack.enter_context(held(Path(folder) / LOCK, key)))
        yield


@contextmanager
def held(path: Path, key: str) -> Iterator[None]:
    """Hold a lock until the end, as one process; ``key`` is what errors call its folder."""
    with kept_parents(path):
        descriptor = _hold(path, key)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)  # before it is free: whoever opens it later makes another
            os.close(descriptor)


def _hold(path: Path, key: str) -> int:
    """The descriptor of the lock's file; nothing else may open and close it here, which would free the lock."""
    deadline, waiting = time.monotonic() + PATIENCE, False
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and os.path.samestat(path.stat(), os.fstat(descriptor)):
                os.truncate(descriptor, 0)
                os.pwrite(descriptor, f'process {os.getpid()} on {socket.gethostname()}'.encode(), 0)
                return descriptor
        except BlockingIOError:
            holder = os.pread(descriptor, 200, 0).decode(errors='replace') or 'another process'
            if time.monotonic() > deadline:
                raise UserError(
                    f'{key}: {path.parent}: is in use by another run, {holder}; expected a folder of its own'
                ) from None
            if not waiting:
                print(f'{path.parent}: in use by {holder}; waiting for it up to {PATIENCE:g} s', flush=True)
            waiting = True
        os.close(descriptor)
        time.sleep(0.1)

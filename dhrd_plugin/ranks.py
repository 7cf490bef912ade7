"""The ranks of a run, and work that one of them does for the others."""

import ctypes
import os
import signal
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Any, TypeVar

from dhrd_plugin.errors import UserError

T = TypeVar('T')
HEARTBEAT = 20.0  # seconds; far below any collective's time-out
_WORKING = 'working'
_PR_SET_PDEATHSIG = 1


def rank() -> int:
    """This process's number among all ranks, from 0, as the ``composer`` command or torchrun numbered it."""
    return int(os.environ.get('RANK', 0))


def world_size() -> int:
    """How many ranks there are; 1 without a launcher."""
    return int(os.environ.get('WORLD_SIZE', 1))


def initialize() -> None:
    """Join the group of all ranks, over gloo; nothing where there is one rank, or a group already."""
    from torch import distributed as dist

    if world_size() > 1 and not dist.is_initialized():
        dist.init_process_group('gloo')


def gather(value: T) -> list[T]:
    """Every rank's ``value``, which has to be picklable, in the order of the ranks. Every rank has to call it."""
    from torch import distributed as dist

    values: list[Any] = [value] * world_size()
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values


def attempt(work: Callable[[], Any]) -> tuple[Any, str | None]:
    """The result of ``work``, and the ``UserError`` that it raised instead, to be told to the other ranks."""
    try:
        return work(), None
    except UserError as error:
        return None, str(error)


def from_rank_zero(work: Callable[[], T]) -> T:
    """Rank 0's result of ``work``, which it alone does, or its ``UserError``, on every rank; every rank calls it."""
    told: Any = attempt(work) if rank() == 0 else None
    value, message = gather(told)[0]
    if message is not None:
        raise UserError(message)
    return value


def end_with_parent(by: int = signal.SIGTERM) -> None:
    """Send this process a signal when its parent ends, be it killed; on Linux."""
    if sys.platform == 'linux':
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(by))


def once_a_node(work: Callable[[], T]) -> T:
    """Run ``work`` on the first rank of each node; every rank has to call it.

    Where ``work`` fails on any node, every rank of all nodes raises the same: none is left waiting for one
    that has gone.

    Returns:
        The result of this node, on each of its ranks; it has to be picklable.
    """
    from streaming.base.distributed import all_gather_object, get_local_rank, get_rank, maybe_init_dist
    from torch import distributed as dist

    initialized = maybe_init_dist()
    outcomes = all_gather_object(attempt(work) if get_local_rank() == 0 else None)
    if initialized:
        dist.destroy_process_group()
    for result in outcomes:
        if result and result[1] is not None:
            raise UserError(result[1])
    value, _ = outcomes[get_rank() - get_local_rank()]  # pyright: ignore
    return value  # pyright: ignore


def on_rank_zero(work: Callable[[], T]) -> T:
    """Run ``work`` on rank 0, in a thread; every rank has to call it.

    The others are told every few seconds that rank 0 is still working, so that an upload of hours meets
    no time-out of a collective. Where ``work`` fails, every rank raises.

    Returns:
        The result, on every rank; it has to be picklable.

    Raises:
        UserError: that of ``work``, or an operating system's refusal (disk full, no permission).
        RuntimeError: any other failure of rank 0.
    """
    from composer.utils import dist

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(work) if dist.get_global_rank() == 0 else None
        outcome: Any = _WORKING
        while outcome == _WORKING:
            told = [future and _look(future)]
            dist.broadcast_object_list(told, src=0)
            outcome = told[0]
    value, message, users = outcome
    if message is None:
        return value
    raise (UserError if users else RuntimeError)(message) from (future and future.exception())


def _look(future: Future) -> Any:
    """``_WORKING``; or the result, why it failed, and whether a user can mend that."""
    try:
        return future.result(HEARTBEAT), None, False
    except FutureTimeout:
        if not future.done() or future.exception() is None:
            return _WORKING
        return None, 'rank 0 failed: a time-out', False
    except UserError as error:
        return None, str(error), True
    except OSError as error:
        where = f'{error.filename}: ' if error.filename else ''
        return None, f'{where}{error.strerror or error}', True
    except Exception as error:
        return None, f'rank 0 failed: {type(error).__name__}: {error}', False

"""Work that one rank does for others, which neither wait for one that has gone nor give up on one at work."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Any, TypeVar

from dhrd_plugin.errors import UserError

T = TypeVar('T')


def once_a_node(work: Callable[[], T]) -> T:
    """What ``work`` gives on the first rank of this node, for every rank of it.

    Every rank has to call it. Where ``work`` fails on any node, every rank of all nodes raises the same:
    none is left waiting for one that has gone.

    Args:
        work (Callable): without arguments; what it gives has to be picklable.

    Raises:
        UserError: that of ``work``.
    """
    from streaming.base.distributed import all_gather_object, get_local_rank, get_rank, maybe_init_dist
    from torch import distributed as dist

    initialized = maybe_init_dist()
    outcome: tuple[T | None, str | None] | None = None
    if get_local_rank() == 0:
        try:
            outcome = work(), None
        except UserError as error:
            outcome = None, str(error)
    outcomes = all_gather_object(outcome)
    if initialized:
        dist.destroy_process_group()
    for result in outcomes:
        if result and result[1] is not None:
            raise UserError(result[1])
    value, _ = outcomes[get_rank() - get_local_rank()]  # pyright: ignore
    return value  # pyright: ignore


HEARTBEAT = 20.0  # seconds; far below any collective's time-out
_WORKING = 'working'


def on_rank_zero(work: Callable[[], T]) -> T:
    """What ``work`` gives on rank 0, for every rank. Every rank has to call it.

    The others are told every few seconds that rank 0 is still at it, so that an upload of hours meets
    no time-out of a collective. Where ``work`` fails, every rank raises.

    Args:
        work: without arguments; runs on rank 0, in a thread; what it gives has to be picklable.

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
    """``_WORKING``, or what came of it, why it failed, and whether that is for users."""
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

"""Triplets streamed from MDS shards, for training."""

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from streaming import StreamingDataLoader, StreamingDataset
from streaming.base.batching import generate_work
from streaming.base.dataset import _Iterator, _ShardState
from streaming.base.distributed import barrier, get_local_rank, maybe_init_dist
from torch import distributed

from dhrd_plugin.errors import RankError, UserError, one_line, user_errors
from dhrd_plugin.streams.cache import machine_lock
from dhrd_plugin.streams.settings import DOWNLOADS
from dhrd_plugin.streams.stream import TripletStream

# What the readers of shards raise over bytes that are no row: without hashes any may come.
UNREADABLE = (ValueError, TypeError, LookupError, AssertionError, EOFError)


def draw_rationale(rationale: Any, row_id: str, epoch: int, seed: int) -> str | None:
    """One of several rationales, a pure function of seed, epoch and row (ours, not the paper's)."""
    if not isinstance(rationale, list):
        return rationale
    if not rationale:
        return None
    digest = hashlib.sha256(f'{seed}/{epoch}/{row_id}'.encode()).digest()
    return rationale[int.from_bytes(digest[:8], 'big') % len(rationale)]


class StreamingTripletDataset(StreamingDataset):
    """A StreamingDataset of triplets that reads no damaged or stale shard.

    An error in its threads is raised where its rows are read; Streaming would silently end the epoch there.

    Args:
        rationale_seed: seeds the draw among several rationales of a row. Default: 0.
        streams: of :class:`~dhrd_plugin.streams.stream.TripletStream`. Default: ``None``, one stream of
            ``remote`` and ``local``.
        remote: see ``TripletStream``, as for ``split``, ``download_retry``, ``download_timeout``,
            ``validate_hash`` and ``keep_zip``. Default: ``None``.
        local: see ``TripletStream``. Default: ``None``.
        **kwargs: of :class:`streaming.StreamingDataset`: ``batch_size`` (the device's), ``shuffle`` and so on.

    Raises:
        UserError: the shards lack a column of a triplet, cannot be reached, or are damaged.
    """

    def __init__(
        self,
        *,
        rationale_seed: int = 0,
        streams: Sequence[TripletStream] | None = None,
        remote: str | None = None,
        local: str | None = None,
        **kwargs: Any,
    ):
        options = {name: kwargs.pop(name) for name in ('split', *DOWNLOADS) if name in kwargs}
        self.rationale_seed = rationale_seed
        self._epoch = 0
        self._checked: set[int] = set()  # shards, in this process
        self._failure: Exception | None = None
        streams = streams or [TripletStream(remote=remote, local=local, **options)]
        for stream in streams:
            if not isinstance(stream, TripletStream):  # it would write wherever the index says
                raise UserError(f'streams: found a {type(stream).__name__}; expected a TripletStream')
        key = streams[0].key.partition('.streams.')[0]
        with user_errors(key or 'streams', ValueError, TypeError), _alone():
            super().__init__(streams=streams, **kwargs)
        self._check_batches()

    def _check_batches(self) -> None:
        """Lay out an epoch where each batch is of certain streams, as the workers will: one may be too small for it."""
        if self.batching_method == 'random':
            return
        world, where = self._parallel_rank_world, getattr(self.streams[0], 'key', '').partition('.streams.')[0]
        given = {name: getattr(self, name) for name in ('num_canonical_nodes', 'shuffle_block_size', 'shuffle')}
        try:
            self._resume(world, 0)  # sets what was not given
            self.shuffle = False  # for the time
            whole = (generate_work(self.batching_method, self, world, 0, 0) >= 0).any()
        except ValueError as error:
            number = re.search(r'[Ss]tream (?:with index )?(\d+)', str(error))
            if number is None:
                raise UserError(f'{where}: {one_line(error)}') from None
            stream: Any = self.streams[int(number[1])]
            raise UserError(
                f'{getattr(stream, "key", where)}: found {stream.choose} of {self.epoch_size} rows an epoch, too few '
                f'for batches of {self.batch_size} a rank by batching_method={self.batching_method}; expected more of '
                'them, larger batches, or batching_method=random'
            ) from None
        finally:
            vars(self).update(given)
        if not whole:
            raise UserError(f'{where}: found no whole batch by batching_method={self.batching_method}; expected one')

    def _resume_incr_epoch(self) -> tuple[int, int]:
        # The one place where every worker learns which epoch it reads.
        self._epoch, sample_in_epoch = super()._resume_incr_epoch()
        return self._epoch, sample_in_epoch

    def state_dict(self, num_samples: int, from_beginning: bool) -> dict[str, Any]:
        """The position in the stream; between two epochs, the start of the next one.

        Args:
            num_samples: read by all ranks in this epoch.
            from_beginning: whether counted from the epoch's start (as Composer does) or from the last
                resumption.
        """
        state = super().state_dict(num_samples, from_beginning)
        if from_beginning and num_samples == 0:
            # Composer has turned to the next epoch; Streaming would read the finished one again.
            state['epoch'] = max(state['epoch'], self.next_epoch)
        return state

    def get_item(self, sample_id: int, retry: int = 7) -> dict[str, Any]:
        """One triplet."""
        if self._failure is not None:
            raise self._failure
        shard_id = int(self.spanner[sample_id][0])
        self._check_once(shard_id)
        with user_errors(
            f'{self._stream_of(shard_id).place}: a row of shard {shard_id} cannot be read', *UNREADABLE, kind=True
        ):
            row = super().get_item(sample_id, retry)
        row['rationale'] = draw_rationale(row.get('rationale'), row['id'], self._epoch, self.rationale_seed)
        return row

    def _stream_of(self, shard_id: int) -> TripletStream:
        return self.streams[self.stream_per_shard[shard_id]]  # pyright: ignore[reportReturnType]

    def _check_once(self, shard_id: int) -> None:
        if shard_id not in self._checked:
            self._stream_of(shard_id).check_shard(self.shards[shard_id])
        self._checked.add(shard_id)

    def prepare_shard(self, shard_id: int, blocking: bool = True) -> None:
        """Download a shard, unless it is here."""
        try:
            super().prepare_shard(shard_id, blocking)
        except Exception:
            # The other ranks would wait for ever for a shard in preparation. This way they find no file,
            # and try for themselves.
            self._shard_states[shard_id] = _ShardState.LOCAL
            raise

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The rows of this rank and worker in one epoch."""
        try:
            yield from super().__iter__()
        except Exception as error:
            self._fail(error)
        if self._failure is not None:
            raise self._failure

    def _prepare_thread(self, it: _Iterator) -> None:
        self._guard(super()._prepare_thread, it)

    def _ready_thread(self, it: _Iterator) -> None:
        self._guard(super()._ready_thread, it)

    def _guard(self, work: Callable[[_Iterator], None], it: _Iterator) -> None:
        try:
            work(it)
        except Exception as error:
            self._fail(error)
            it.on_exit()

    def _fail(self, error: Exception) -> None:
        self._failure = self._failure or error
        if hasattr(self, '_event'):
            self._event.set()


class TripletDataLoader(StreamingDataLoader):
    """A StreamingDataLoader whose user errors are one line, those of its workers too."""

    def __iter__(self) -> Iterator[Any]:
        """Batches; see :class:`streaming.StreamingDataLoader`."""
        try:
            yield from super().__iter__()
        except UserError as error:
            line = str(error).strip().splitlines()[-1]  # a worker's error contains its traceback
            raise RankError(re.sub(r'^dhrd_plugin\.errors\.\w+: ', '', line)) from None


@contextmanager
def together(streams: Sequence[TripletStream]) -> Iterator[None]:
    """Pass a rank's ``UserError`` on to the other ranks of its node.

    They only see that a rank has left a collective, and would report that; here they raise a ``RankError``.
    All ranks of a node reach their streams through the same links.
    """
    note = Path(streams[0].local).with_suffix('.failed')
    try:
        yield
    except UserError as error:
        with suppress(OSError):
            note.write_text(str(error), 'utf-8')
        raise
    except RuntimeError:
        if not note.is_file():
            raise
        raise RankError(note.read_text('utf-8')) from None


@contextmanager
def _alone() -> Iterator[None]:
    """Alone on this machine, with all ranks: they must agree on a free name in shared memory."""
    initialized = maybe_init_dist()
    with machine_lock() if get_local_rank() == 0 else nullcontext():
        barrier()
        yield
    if initialized:
        distributed.destroy_process_group()

"""Triplets out of MDS shards: streamed for training, map-style for evaluation."""

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from streaming import Stream, StreamingDataLoader, StreamingDataset
from streaming.base.dataset import _Iterator, _ShardState
from streaming.base.distributed import barrier, get_local_rank, maybe_init_dist
from torch import distributed
from torch.utils.data import Dataset

from dhrd_plugin.data.cache import machine_lock
from dhrd_plugin.data.stream import DOWNLOADS, TripletStream, reworded
from dhrd_plugin.errors import RankError, UserError


def draw_rationale(rationale: Any, row_id: str, epoch: int, seed: int) -> str | None:
    """One of several rationales, a pure function of seed, epoch and row (ours, not the paper's)."""
    if not isinstance(rationale, list):
        return rationale
    if not rationale:
        return None
    digest = hashlib.sha256(f'{seed}/{epoch}/{row_id}'.encode()).digest()
    return rationale[int.from_bytes(digest[:8], 'big') % len(rationale)]


class StreamingTripletDataset(StreamingDataset):
    """A StreamingDataset whose rows are triplets, and which reads no shard that is damaged or stale.

    What goes wrong in its threads is raised where its rows are read; Streaming would end the epoch there.

    Args:
        rationale_seed: seeds the draw among several rationales of a row. Default: 0.
        streams: of :class:`TripletStream`. Default: None, one of ``remote`` and ``local``.
        remote: see :class:`TripletStream`, as are ``split``, ``download_retry``, ``download_timeout``,
            ``validate_hash`` and ``keep_zip``. Default: None.
        local: Default: None.
        **kwargs: of :class:`streaming.StreamingDataset`: ``batch_size`` (the device's), ``shuffle`` and so on.

    Raises:
        UserError: the shards lack a column of a triplet, cannot be reached, are damaged.
    """

    def __init__(
        self,
        *,
        rationale_seed: int = 0,
        streams: Sequence[Stream] | None = None,
        remote: str | None = None,
        local: str | None = None,
        **kwargs: Any,
    ):
        options = {name: kwargs.pop(name) for name in ('split', *DOWNLOADS) if name in kwargs}
        self.rationale_seed = rationale_seed
        self._epoch = 0
        self._checked: set[int] = set()  # shards, by this process
        self._failure: Exception | None = None
        streams = streams or [TripletStream(remote=remote, local=local, **options)]
        key = getattr(streams[0], 'key', '').partition('.streams.')[0]
        with reworded(key), _alone():
            super().__init__(streams=streams, **kwargs)

    def _resume_incr_epoch(self) -> tuple[int, int]:
        # The one place where every worker learns which epoch it reads.
        self._epoch, sample_in_epoch = super()._resume_incr_epoch()
        return self._epoch, sample_in_epoch

    def state_dict(self, num_samples: int, from_beginning: bool) -> dict[str, Any]:
        """Where the stream stands; between two epochs, at the start of the next one.

        Args:
            num_samples: read by all ranks in this epoch.
            from_beginning: counted from the epoch's start (Composer does) or from the last resumption.
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
        self._check_once(int(self.spanner[sample_id][0]))
        row = super().get_item(sample_id, retry)
        row['rationale'] = draw_rationale(row.get('rationale'), row['id'], self._epoch, self.rationale_seed)
        return row


    def _check_once(self, shard_id: int) -> None:
        stream = self.streams[self.stream_per_shard[shard_id]]
        if shard_id not in self._checked and isinstance(stream, TripletStream):
            stream.check_shard(self.shards[shard_id])
        self._checked.add(shard_id)

    def prepare_shard(self, shard_id: int, blocking: bool = True) -> None:
        """Download a shard, if it is not here."""
        try:
            super().prepare_shard(shard_id, blocking)
        except Exception:
            # Left as one in preparation, it would be waited for by the other ranks for ever. So they find
            # no file, and try for themselves.
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
    """A StreamingDataLoader that tells a user's mistake in one line, from a worker too."""

    def __iter__(self) -> Iterator[Any]:
        """Batches; see :class:`streaming.StreamingDataLoader`."""
        try:
            yield from super().__iter__()
        except UserError as error:
            line = str(error).strip().splitlines()[-1]  # a worker's error carries its traceback
            raise RankError(re.sub(r'^dhrd_plugin\.errors\.\w+: ', '', line)) from None


@contextmanager
def together(streams: Sequence[TripletStream]) -> Iterator[None]:
    """A rank that meets a user's mistake tells it to the others of its node.

    They see no more than a collective that a rank has left, and would complain of that.

    Args:
        streams: of the training rows; all ranks of a node reach them through the same links.
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
    """Alone on this machine, with all ranks: they must agree on a name in shared memory that is free."""
    initialized = maybe_init_dist()
    with machine_lock() if get_local_rank() == 0 else nullcontext():
        barrier()
        yield
    if initialized:
        distributed.destroy_process_group()


class MapTriplets(Dataset):
    """Triplets by index, each exactly once, for evaluation with a distributed sampler.

    A StreamingDataset on several ranks repeats rows to make them even; a sampler's repeats are
    known to Composer, which leaves them out of the metrics.

    Args:
        rows: anything with ``len`` and integer indices: ``streaming.LocalDataset``,
            :class:`StreamingTripletDataset`, a list.
    """

    def __init__(self, rows: Any):
        self.rows = rows

    def __len__(self) -> int:
        return getattr(self.rows, 'num_samples', None) or len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]

"""Rows by index, each exactly once, for evaluation."""

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from streaming.base.spanner import Spanner
from streaming.base.world import World
from torch.utils.data import Dataset

from dhrd_plugin.errors import user_errors
from dhrd_plugin.streams.index import INDEX
from dhrd_plugin.streams.stream import TripletStream


def fingerprint(streams: Sequence[TripletStream]) -> str:
    """SHA-256 of the streams' indexes, which hold the hashes of the shards themselves."""
    indexes = (Path(stream.local, stream.split, INDEX).read_bytes() for stream in streams)
    return hashlib.sha256(b''.join(indexes)).hexdigest()


class StreamRows(Dataset):
    """The rows of streams by index, one stream after the other, to evaluate with a distributed sampler.

    A StreamingDataset on several ranks repeats rows to make them even; a sampler's repeats are known to
    Composer, which leaves them out of the metrics. A shard is fetched when it is first read. Nothing is in
    shared memory, so any number of processes may read the same folder. The streams' weights are ignored.
    """

    def __init__(self, streams: Sequence[TripletStream]):
        world = World.detect()
        with user_errors(streams[0].key or 'streams', ValueError, TypeError):
            self.shards = [(stream, shard) for stream in streams for shard in stream.get_shards(world, False)]
        self.spanner = Spanner(np.array([len(shard) for _, shard in self.shards], np.int64))
        self._checked: set[int] = set()

    def __len__(self) -> int:
        return int(self.spanner.num_samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        number, row = self.spanner[index]
        self._prepare(int(number))
        stream, shard = self.shards[number]
        with user_errors(f'{stream.place}: row {row} of a shard cannot be read', kind=True):  # no hashes, or no row
            return shard[row]

    def fetch(self) -> None:
        """Fetch every shard now; one rank of a node does it for all."""
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(self._prepare, range(len(self.shards))))

    def _prepare(self, number: int) -> None:
        if number not in self._checked:
            stream, shard = self.shards[number]
            stream.check_shard(shard)
            stream.prepare_shard(shard)
            self._checked.add(number)

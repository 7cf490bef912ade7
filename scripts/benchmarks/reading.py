"""Ways to write rows as shards and to read them: ours, and Streaming by itself."""

import itertools
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from streaming import MDSWriter, StreamingDataLoader, StreamingDataset
from torch.utils.data import DataLoader

from dhrd_plugin.data.collator import TripletCollator
from dhrd_plugin.data.shards import HASHES, SHARD_SIZE
from dhrd_plugin.data.triplet import COLUMNS
from dhrd_plugin.streams import cache
from dhrd_plugin.streams.dataset import StreamingTripletDataset, TripletDataLoader
from dhrd_plugin.streams.stream import TripletStream

_numbers = itertools.count()


class Place(NamedTuple):
    """Where shards are.

    Attributes:
        name: in the table.
        address: a folder, or an address such as ``s3://bucket/rte``.
        caches: a folder for the caches of an address. Default: None, ``address`` is a folder.
    """

    name: str
    address: str
    caches: Path | None = None


def write_bare(rows: Iterable[Mapping[str, Any]], out: Path, size_limit: int | None = SHARD_SIZE) -> None:
    """Write the same columns and hashes by Streaming's writer, the rows unchecked."""
    writer = MDSWriter(columns=COLUMNS, out=str(out), hashes=list(HASHES), size_limit=size_limit)
    for row in rows:
        writer.write(row)  # pyright: ignore[reportArgumentType]
    writer.flush_shard()
    writer._reset_cache()
    while writer.executor._work_queue.qsize():  # else finish() sleeps for a second, and we would look fast
        time.sleep(0.0001)
    writer.finish()


def open_ours(place: Place, batch: int) -> StreamingTripletDataset:
    """Open the rows as training does."""
    if place.caches is None:
        streams = [TripletStream(local=place.address)]
    else:
        streams = [TripletStream(remote=place.address, cache_dir=str(place.caches / 'ours'))]
    return StreamingTripletDataset(streams=streams, batch_size=batch, shuffle=True)


def open_bare(place: Place, batch: int) -> StreamingDataset:
    """Open the rows by Streaming alone, each time under a name of its own."""
    if place.caches is None:
        where: dict[str, Any] = {'local': str(cache.link(Path(place.address)))}
    else:
        where = {'remote': place.address, 'local': str(place.caches / f'bare{next(_numbers)}')}
    with cache.machine_lock():
        data = StreamingDataset(batch_size=batch, shuffle=True, **where)
    for stream in data.streams:
        stream._downloader.clean_up()  # workers that inherit its connection get each other's shards
    return data


def load_ours(
    place: Place, batch: int, workers: int, collate: TripletCollator | Callable[..., Any] = list
) -> TripletDataLoader:
    """Load batches as training does; without a collator, lists of rows."""
    return TripletDataLoader(open_ours(place, batch), collate_fn=collate, **_options(batch, workers))


def load_bare(place: Place, batch: int, workers: int) -> StreamingDataLoader:
    """Load lists of rows by Streaming alone."""
    return StreamingDataLoader(open_bare(place, batch), collate_fn=list, **_options(batch, workers))


def _options(batch: int, workers: int) -> dict[str, Any]:
    return {
        'batch_size': batch,
        'num_workers': workers,
        'persistent_workers': workers > 0,
        'generator': torch.Generator() if workers else None,
        'pin_memory': torch.cuda.is_available(),
    }


def read_epoch(loader: DataLoader) -> int:
    """Read every row once, and return their number."""
    return sum(len(batch['labels'] if isinstance(batch, dict) else batch) for batch in loader)

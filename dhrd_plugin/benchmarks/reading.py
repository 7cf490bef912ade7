"""Ways to write rows as shards and to read them again: ours, and Streaming by itself."""

import itertools
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from streaming import MDSWriter, StreamingDataLoader, StreamingDataset
from torch.utils.data import DataLoader

from dhrd_plugin.data import cache
from dhrd_plugin.data.collation import TripletCollator
from dhrd_plugin.data.shards import COLUMNS, HASHES, SHARD_SIZE
from dhrd_plugin.data.stream import TripletStream
from dhrd_plugin.data.streaming import StreamingTripletDataset, TripletDataLoader

_numbers = itertools.count()


class Place(NamedTuple):
    """Where shards are.

    Attributes:
        name: for the table.
        address: a folder, or an address such as ``s3://bucket/rte``.
        caches: for an address, a folder to keep caches in. Default: None, the shards are here.
    """

    name: str
    address: str
    caches: Path | None = None


def write_bare(rows: Iterable[Mapping[str, Any]], out: Path, size_limit: int | None = SHARD_SIZE) -> None:
    """The same columns and hashes by Streaming's writer, its rows unchecked."""
    writer = MDSWriter(columns=COLUMNS, out=str(out), hashes=list(HASHES), size_limit=size_limit)
    for row in rows:
        writer.write(row)  # pyright: ignore[reportArgumentType]
    writer.flush_shard()
    writer._reset_cache()
    while writer.executor._work_queue.qsize():  # else finish() sleeps for a second, and we would look fast
        time.sleep(0.0001)
    writer.finish()


def open_ours(place: Place, batch: int) -> StreamingTripletDataset:
    """The rows as training opens them."""
    if place.caches is None:
        streams = [TripletStream(local=place.address)]
    else:
        streams = [TripletStream(remote=place.address, cache_dir=str(place.caches / 'ours'))]
    return StreamingTripletDataset(streams=streams, batch_size=batch, shuffle=True)


def open_bare(place: Place, batch: int) -> StreamingDataset:
    """The rows by Streaming alone, each time under a name of its own."""
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
    """Batches as training loads them; without a collator, lists of rows."""
    return TripletDataLoader(open_ours(place, batch), collate_fn=collate, **_options(batch, workers))


def load_bare(place: Place, batch: int, workers: int) -> StreamingDataLoader:
    """Lists of rows by Streaming alone."""
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
    """Read every row once; how many there were."""
    return sum(len(batch['labels'] if isinstance(batch, dict) else batch) for batch in loader)

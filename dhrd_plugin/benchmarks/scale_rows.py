"""Cost against the number of rows: to write a set, to open it for training, to read the first of it, to order it."""

import os
import time
import tracemalloc
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from streaming.base.batching import generate_work
from streaming.base.world import World
from transformers import PreTrainedTokenizerBase

from dhrd_plugin.benchmarks.estimate import Cluster
from dhrd_plugin.benchmarks.measure import interleave
from dhrd_plugin.benchmarks.memory import MIB
from dhrd_plugin.benchmarks.power import growth_rows
from dhrd_plugin.benchmarks.reading import Place, open_ours
from dhrd_plugin.benchmarks.table import make_row
from dhrd_plugin.data.collation import TripletCollator
from dhrd_plugin.data.shards import write_triplets
from dhrd_plugin.data.stream import TripletStream
from dhrd_plugin.data.streaming import StreamingTripletDataset, TripletDataLoader
from dhrd_plugin.data.tasks import Task
from dhrd_plugin.data.triplets import Triplet
from dhrd_plugin.errors import UserError

LINEAR, FLAT = 1.05, 0.05  # exponents, at most
PARTS = (100, 10, 1)  # of the largest set
BATCH = 8
READ = 256  # rows after the first batch
EPOCHS = (10**5, 10**6, 10**7)  # rows that are ordered


def set_rows(
    rows: Sequence[Triplet], task: Task, tokenizer: PreTrainedTokenizerBase, scratch: Path, repetitions: int
) -> tuple[list[dict[str, Any]], Path]:
    """The table of three sets: these rows, a tenth and a hundredth of them; and the folder of the largest.

    Raises:
        UserError: the hundredth is less than two batches.
    """
    sizes = [len(rows) // part for part in PARTS]
    if sizes[0] < 2 * BATCH:
        raise UserError(f'rows: found {len(rows)}; expected {2 * BATCH * PARTS[0]} or more')
    names = [f'{size:,} rows' for size in sizes]
    folders = {name: scratch / str(size) for name, size in zip(names, sizes)}
    writes = {
        name: partial(write_triplets, rows[:size], folders[name], task=task, overwrite=True)
        for name, size in zip(names, sizes)
    }
    seconds = interleave(writes, repetitions)
    disk = {name: [sum(file.stat().st_size for file in folders[name].iterdir()) / MIB] for name in names}
    count = min(READ, sizes[0] // BATCH * BATCH - BATCH)
    collate = TripletCollator(tokenizer, task.label_names)
    visits = {name: Visit(Place(name, str(folders[name])), collate, count) for name in names}
    interleave(visits, repetitions)

    def grow(
        what: str, unit: str, costs: Callable[[str], list[float]], expected: str, at_most: float | None = None
    ) -> list[dict[str, Any]]:
        found = {name: costs(name)[-repetitions:] for name in names}
        return growth_rows(what, unit, found, 'rows', sizes, expected, at_most=at_most)

    return [
        *grow('writing', 's', lambda name: seconds[name], '1, below it where a set is so small that its folder counts',
              LINEAR),
        *grow('on disk', 'MiB', lambda name: disk[name], '1', LINEAR),
        *grow('opening, to the first batch', 's', lambda name: visits[name].opened,
              'below 1: a shard is checked against its hashes as it is first read, of a large set only those of one '
              'block of the shuffle (4M rows by the number of nodes, 256 Ki at least)'),
        *grow('checking all shards', 's', lambda name: visits[name].checked, '1; once in a process', LINEAR),
        *grow(f'reading {count} rows, collated', 's', lambda name: visits[name].read,
              '0, once shards are checked', FLAT),
        *grow('resident memory, growth', 'MiB', lambda name: visits[name].grown,
              '0: no more than a shard, 16 Mi, is held, while it is checked', FLAT),
    ], folders[names[-1]]  # fmt: skip


class Visit:
    """Opens a set at each call, as training does, and reads the first of its rows.

    Attributes:
        opened: seconds to the first batch, of each call.
        checked: seconds to hold every shard against its hashes.
        read: seconds for so many rows more, collated, once that is done.
        grown: MiB of resident memory by then, a page at least.
    """

    def __init__(self, place: Place, collate: TripletCollator, count: int):
        self.place, self.collate, self.count = place, collate, count
        self.opened: list[float] = []
        self.checked: list[float] = []
        self.read: list[float] = []
        self.grown: list[float] = []

    def __call__(self) -> None:
        """Open, check, read."""
        resident, start = _resident(), time.perf_counter()
        dataset = open_ours(self.place, BATCH)
        batches = iter(TripletDataLoader(dataset, batch_size=BATCH, collate_fn=self.collate))
        next(batches)
        self.opened.append(time.perf_counter() - start)
        (stream,) = dataset.streams
        assert isinstance(stream, TripletStream)
        self.checked.append(_seconds(lambda: [stream.check_shard(shard) for shard in dataset.shards]))
        for row in dataset.sample_offset_per_shard:  # a row of each: the dataset checks it, too
            dataset.get_item(int(row))
        self.read.append(_seconds(lambda: [next(batches) for _ in range(self.count // BATCH)]))
        self.grown.append(max(_resident() - resident, os.sysconf('SC_PAGE_SIZE')) / MIB)
        dataset._iterator.exit()  # its threads would wait for the rest of the epoch


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _resident() -> int:
    return psutil.Process().memory_info().rss


# ------------------------------------------------------------------------------------------- order


def order_rows(folder: Path, cluster: Cluster, repetitions: int) -> tuple[list[dict[str, Any]], tuple[float, float]]:
    """What it costs a node to put an epoch's rows in order, as Streaming does it before the first batch.

    Args:
        folder: of a set; it is repeated (``epoch_size``) to as many rows as are ordered.
        cluster: for which they are.
        repetitions: of each measurement.

    Returns:
        The table; seconds and peak bytes a row, of the longest epoch.
    """
    works = {f'{count:,} rows': order(folder, cluster, count) for count in EPOCHS}
    seconds = interleave(works, repetitions, warmup=0)
    peaks = {name: [_traced_peak(work) / count] for (name, work), count in zip(works.items(), EPOCHS)}
    last = f'{EPOCHS[-1]:,} rows'
    a_row = float(np.median(seconds[last])) / EPOCHS[-1], peaks[last][0]
    rows = growth_rows('order of an epoch', 's', seconds, 'rows', EPOCHS,
                       f'1, and a little more: it sorts. By one process of each node, for all {cluster.ranks} ranks, '
                       'before each epoch')  # fmt: skip
    rows += [make_row(f'order of an epoch, peak memory, {name}', peak, 'bytes a row') for name, peak in peaks.items()]
    return rows, a_row


def order(folder: Path, cluster: Cluster, rows: int) -> Callable[[], np.ndarray]:
    """Streaming's own ordering of an epoch of so many rows: [nodes, ranks, workers, batches, rows] of int64."""
    dataset = StreamingTripletDataset(local=str(folder), batch_size=cluster.batch, shuffle=True, epoch_size=rows)
    world = World(cluster.nodes, cluster.ranks_per_node, 1, 0)
    dataset._resume(world, 0)  # sets what follows from the number of nodes
    return partial(generate_work, dataset.batching_method, dataset, world, 0, 0)


def _traced_peak(work: Callable[[], object]) -> int:
    """Bytes that numpy and Python hold at most, with nothing of the process besides."""
    tracemalloc.start()
    work()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak

"""Cost against the number of rows: to write a set, to open it for training, to read its first rows, to order it."""

import os
import time
import tracemalloc
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from streaming.base.batching import generate_work
from streaming.base.world import World
from transformers import PreTrainedTokenizerBase

from benchmarks.measure import MIB, Work, interleave, resident, time_once
from benchmarks.power import growth_rows
from benchmarks.reading import Place, open_ours
from benchmarks.table import Table, make_row
from dhrd_plugin.data.collator import TripletCollator
from dhrd_plugin.data.shards import write_triplets
from dhrd_plugin.data.tasks import Task
from dhrd_plugin.data.triplet import Triplet
from dhrd_plugin.errors import UserError
from dhrd_plugin.streams.dataset import StreamingTripletDataset, TripletDataLoader
from dhrd_plugin.streams.stream import TripletStream

LINEAR, FLAT = 1.05, 0.05  # exponents, at most
PARTS = (100, 10, 1)  # of the largest set
BATCH = 8
READ = 256  # rows after the first batch
EPOCHS = (10**5, 10**6, 10**7)  # rows that are ordered
CLUSTER = World(num_nodes=8, ranks_per_node=8, workers_per_rank=1, worker=0)


def set_rows(
    rows: Sequence[Triplet], task: Task, tokenizer: PreTrainedTokenizerBase, scratch: Path, repetitions: int
) -> tuple[Table, Path]:
    """Measure three sets: these rows, a tenth and a hundredth of them.

    Args:
        rows: of the largest set.
        task: of the rows.
        tokenizer: for the collator.
        scratch: an empty folder for the sets.
        repetitions: of each measurement.

    Returns:
        The table, and the folder of the largest set.

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

    def visited(cost: str) -> dict[str, list[float]]:
        return {name: visits[name].costs[cost][-repetitions:] for name in names}  # without the warm-up

    def grow(what: str, unit: str, costs: dict[str, list[float]], expected: str, at_most: float | None = None) -> Table:
        return growth_rows(what, unit, costs, 'rows', sizes, expected, at_most=at_most)

    opening = (
        'below 1: a shard is checked against its hashes when it is first read, and of a large set only the shards of '
        'one block of the shuffle are (4M rows divided by the number of nodes, at least 256 Ki)'
    )
    memory = '0: no more than a shard, 16 Mi, is held, while it is checked'
    return [
        *grow('writing', 's', seconds, '1, below it where a set is so small that its folder counts', LINEAR),
        *grow('on disk', 'MiB', disk, '1', LINEAR),
        *grow('opening, to the first batch', 's', visited('opened'), opening),
        *grow('checking all shards', 's', visited('checked'), '1; once in a process', LINEAR),
        *grow(f'reading {count} rows, collated', 's', visited('read'), '0, once shards are checked', FLAT),
        *grow('resident memory, growth', 'MiB', visited('grown'), memory, FLAT),
    ], folders[names[-1]]


class Visit:
    """Open a set at each call, as training does, and read its first rows.

    Attributes:
        costs: of each call, ``opened``: seconds to the first batch; ``checked``: seconds to check every shard against
            its hashes; ``read``: seconds for ``count`` rows more, collated; ``grown``: MiB of resident memory by then,
            at least a page.
    """

    def __init__(self, place: Place, collate: TripletCollator, count: int):
        self.place, self.collate, self.count = place, collate, count
        self.costs: dict[str, list[float]] = defaultdict(list)

    def __call__(self) -> None:
        """Open, check, read."""
        before, start = resident(), time.perf_counter()
        dataset = open_ours(self.place, BATCH)
        batches = iter(TripletDataLoader(dataset, batch_size=BATCH, collate_fn=self.collate))
        next(batches)
        self.costs['opened'].append(time.perf_counter() - start)
        (stream,) = dataset.streams
        assert isinstance(stream, TripletStream)
        self.costs['checked'].append(time_once(lambda: [stream.check_shard(shard) for shard in dataset.shards]))
        for row in dataset.sample_offset_per_shard:  # a row of each: the dataset checks it, too
            dataset.get_item(int(row))
        self.costs['read'].append(time_once(lambda: [next(batches) for _ in range(self.count // BATCH)]))
        self.costs['grown'].append(max(resident() - before, os.sysconf('SC_PAGE_SIZE')) / MIB)
        dataset._iterator.exit()  # its threads would wait for the rest of the epoch


def order_rows(folder: Path, repetitions: int) -> Table:
    """Measure what it costs a node to put an epoch's rows in order, as Streaming does before the first batch.

    Args:
        folder: of a set; it is repeated (``epoch_size``) to as many rows as are ordered.
        repetitions: of each measurement.
    """
    works = {f'{count:,} rows': order(folder, CLUSTER, BATCH, count) for count in EPOCHS}
    seconds = interleave(works, repetitions, warmup=0)
    expected = (
        f'1, and a little more: it sorts. By one process of each node, for all {CLUSTER.num_ranks} ranks, '
        'before each epoch'
    )
    rows = growth_rows('order of an epoch', 's', seconds, 'rows', EPOCHS, expected)
    for (name, work), count in zip(works.items(), EPOCHS):
        rows.append(make_row(f'order of an epoch, peak memory, {name}', [_traced_peak(work) / count], 'bytes a row'))
    return rows


def order(folder: Path, world: World, batch: int, rows: int) -> partial[np.ndarray]:
    """Make Streaming's own ordering of an epoch of so many rows.

    Args:
        folder: of a set.
        world: the nodes, ranks and workers that share the epoch.
        batch: rows of a rank in a step.
        rows: of the epoch.

    Returns:
        A function of no arguments, which returns row numbers ``[nodes, ranks, workers, batches, rows]`` in int64.
    """
    dataset = StreamingTripletDataset(local=str(folder), batch_size=batch, shuffle=True, epoch_size=rows)
    dataset._resume(world, 0)  # sets what follows from the number of nodes
    return partial(generate_work, dataset.batching_method, dataset, world, 0, 0)


def _traced_peak(work: Work) -> int:
    """The bytes that numpy and Python hold at the peak, without the rest of the process."""
    tracemalloc.start()
    work()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak

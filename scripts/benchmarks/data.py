"""How fast shards are written and read, against Streaming alone, and whether the training step waits for them."""

import itertools
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from benchmarks.fits import StepClock, describe_waits, fit, waited
from benchmarks.material import build_classifier, describe, load_backbone, load_rows, repeat
from benchmarks.measure import interleave, rates, ratios, time_once
from benchmarks.options import Options
from benchmarks.reading import Place, load_bare, load_ours, read_epoch, write_bare
from benchmarks.table import Table, make_gap, make_report, make_row
from dhrd_plugin.data.collator import TripletCollator
from dhrd_plugin.data.data_spec import triplet_data_spec
from dhrd_plugin.data.shards import write_triplets
from dhrd_plugin.data.tasks import Task
from dhrd_plugin.data.triplet import Triplet
from dhrd_plugin.models.build import build_tokenizer
from dhrd_plugin.streams.remote import join

ROWS = 4000
WRITTEN = 5  # times as many: writing is quick
REPETITIONS = 5
BATCH = 8
WORKERS = (1, 4)
WARMUP = 1  # steps; the epoch starts with the first
WINDOW = 2  # steps to a share
WINDOWS = 3
DISK, S3 = 'disk', 'S3'
SET = 'dhrd-benchmark'  # below the address that the user names


def run(options: Options) -> dict[str, Any]:
    """Measure, and return the report of ``benchmark.py data``."""
    task, rows, source = load_rows(options.rows or ROWS)
    repetitions = options.repetitions or REPETITIONS
    tokenizer = build_tokenizer(options.model)
    with tempfile.TemporaryDirectory() as scratch:
        table = writing_rows(repeat(rows, len(rows) * WRITTEN), task, Path(scratch) / 'written', repetitions)
        places = store(rows, task, Path(scratch), options.s3)
        read = read_rates(places, task, tokenizer, len(rows), repetitions)
        clocks = wait_for(places, task, options, options.repetitions or WINDOWS)
    # What the model consumes; the steps are too long to take turns with reading.
    step = statistics.median(seconds for clock in clocks.values() for seconds in clock.steps[WARMUP:])
    table += reading_rows(read, BATCH / step)
    table += waiting_rows(clocks)
    if not options.s3:
        table += [make_gap(f'{what}, {S3}', 'not measured: no --s3') for what in ('reading', 'waiting')]
    settings = describe(options, rows=f'{len(rows)} of {source}', batch=BATCH, s3=options.s3 or 'none')
    return make_report('data', settings, table)


def store(rows: Sequence[Triplet], task: Task, scratch: Path, s3: str) -> list[Place]:
    """Write the rows to the places that they are read from; the set on S3 stays there, and is overwritten next time."""
    places = [Place(DISK, str(scratch / 'set'))]
    if s3:
        places.append(Place(S3, str(join(s3, SET)), scratch / 'caches'))
    for place in places:
        write_triplets(rows, place.address, task=task, overwrite=True)
    return places


def _workers(count: int) -> str:
    return f'{count} worker{"s" * (count != 1)}'


def writing_rows(rows: Sequence[Triplet], task: Task, scratch: Path, repetitions: int) -> Table:
    """Measure rows written a second: ours, checked against the task, and a bare MDSWriter."""
    numbers = itertools.count()
    works = {
        'ours': lambda: write_triplets(rows, scratch / f'{next(numbers)}', task=task),
        'bare': lambda: write_bare(rows, scratch / f'{next(numbers)}'),
    }
    written = rates(len(rows), interleave(works, repetitions))
    ratio = ratios(written['ours'], written['bare'])
    return [
        make_row('writing, bare MDSWriter', written['bare'], 'rows/s'),
        make_row('writing, ours', written['ours'], 'rows/s', ratio, 'bare MDSWriter', at_least=0.8),
    ]


BARE = 'bare StreamingDataset'
PLAIN = 'our rows, not collated'
OURS = 'ours'
COLD = 'ours, first time'

Rates = dict[tuple[str, int, str], list[float]]  # by place, workers and way: rows a second


def read_rates(
    places: Sequence[Place], task: Task, tokenizer: PreTrainedTokenizerBase, count: int, repetitions: int
) -> Rates:
    """Measure rows read a second in each way, in epochs that take turns; their workers stay, as in training.

    Args:
        places: each holds ``count`` rows.
        task: of the rows.
        tokenizer: for ours.
        count: rows.
        repetitions: epochs of each way.
    """
    collate = TripletCollator(tokenizer, task.label_names)
    found: Rates = {}
    for place, workers in itertools.product(places, WORKERS):
        loaders = {
            BARE: load_bare(place, BATCH, workers),
            PLAIN: load_ours(place, BATCH, workers),
            OURS: load_ours(place, BATCH, workers, collate),
        }
        works = {name: partial(read_epoch, loader) for name, loader in loaders.items()}
        if place.caches and workers == WORKERS[0]:
            found[place.name, workers, COLD] = [count / time_once(works[OURS])]
        for name, values in rates(count, interleave(works, repetitions)).items():
            found[place.name, workers, name] = values
    return found


def reading_rows(found: Rates, consumed: float) -> Table:
    """Tabulate reading, against Streaming alone and against the rows a second that a training step consumes."""
    rows = [make_row('training step', [consumed], 'rows/s')]
    for (place, workers, way), values in found.items():
        what = f'reading {way}, {place}, {_workers(workers)}'
        if way in (PLAIN, OURS):
            rows.append(make_row(what, values, 'rows/s', ratios(values, found[place, workers, BARE]), BARE))
        else:
            rows.append(make_row(what, values, 'rows/s'))
        if way == OURS:
            rows.append(make_row(what, values, 'rows/s', [value / consumed for value in values], 'training step'))
    return rows


def wait_for(places: Sequence[Place], task: Task, options: Options, windows: int) -> dict[tuple[str, int], StepClock]:
    """Train for a few steps from each place with each number of workers, the caches warm.

    Returns:
        The clocks, by place and number of workers.
    """
    lm, tokenizer = load_backbone(options)
    model = build_classifier(lm, tokenizer, task)
    collate = TripletCollator(tokenizer, task.label_names)
    clocks = {}
    # 0 is the training's default; last, as tokenizers do not like to be forked once they have been used.
    for place, workers in [*itertools.product(places, WORKERS), (places[0], 0)]:
        data = triplet_data_spec(load_ours(place, BATCH, workers, collate), by_length=True)
        clocks[place.name, workers] = fit(model, data, WARMUP + windows * WINDOW, BATCH)
    return clocks


def waiting_rows(clocks: Mapping[tuple[str, int], StepClock]) -> Table:
    """Tabulate the share of the steps that was spent waiting."""
    rows = []
    for (place, workers), clock in clocks.items():
        found = describe_waits(clock, WARMUP)
        note = (
            f'{found["longest"]:.3g} ms at most, in steps of {statistics.median(clock.steps[WARMUP:]):.3g} s; '
            f'{found["first"]:.3g} ms for the first batch of an epoch, which is not counted'
        )
        what = f'step waits for data, {place}, {_workers(workers)}'
        rows.append(make_row(what, waited(clock, WARMUP, WINDOW), '%', at_most=1.0, note=note))
    return rows

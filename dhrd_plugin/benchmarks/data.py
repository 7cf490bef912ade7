"""How fast shards are written and read, against Streaming alone, and whether the training step waits for them."""

import itertools
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from dhrd_plugin.benchmarks.fits import StepClock, build_classifier, describe_waits, fit, waited
from dhrd_plugin.benchmarks.material import layers_of, load_backbone, load_rows
from dhrd_plugin.benchmarks.measure import interleave, ratios, time_once
from dhrd_plugin.benchmarks.options import Options
from dhrd_plugin.benchmarks.reading import Place, load_bare, load_ours, read_epoch, write_bare
from dhrd_plugin.benchmarks.table import make_gap, make_report, make_row
from dhrd_plugin.data.collation import TripletCollator, triplet_data_spec
from dhrd_plugin.data.remote import join
from dhrd_plugin.data.shards import write_triplets
from dhrd_plugin.data.tasks import Task
from dhrd_plugin.data.triplets import Triplet
from dhrd_plugin.models.build import build_tokenizer

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
    """Measure; the report of ``benchmark.py data``."""
    task, rows, source = load_rows(options.rows or ROWS)
    repetitions = options.repetitions or REPETITIONS
    tokenizer = build_tokenizer(options.model)
    with tempfile.TemporaryDirectory() as scratch:
        table = writing_rows(rows * WRITTEN, task, Path(scratch) / 'written', repetitions)
        places = store(rows, task, Path(scratch), options.s3)
        rates = read_rates(places, task, tokenizer, len(rows), repetitions)
        clocks = wait_for(places, task, options, options.repetitions or WINDOWS)
    # What the model consumes; the steps are too long to take turns with reading.
    step = statistics.median(seconds for clock in clocks.values() for seconds in clock.steps[WARMUP:])
    table += reading_rows(rates, BATCH / step)
    table += waiting_rows(clocks)
    if not options.s3:
        table += [make_gap(f'{what}, {S3}', 'not measured: no --s3') for what in ('reading', 'waiting')]
    settings = {
        'model': options.model, 'layers': layers_of(options), 'rows': f'{len(rows)} of {source}', 'batch': BATCH,
        's3': options.s3 or 'none',
    }  # fmt: skip
    return make_report('data', settings, table)


def store(rows: Sequence[Triplet], task: Task, scratch: Path, s3: str) -> list[Place]:
    """Write the rows to the places that they are read from; what is put to S3 stays there, to be written over."""
    places = [Place(DISK, str(scratch / 'set'))]
    if s3:
        places.append(Place(S3, str(join(s3, SET)), scratch / 'caches'))
    for place in places:
        write_triplets(rows, place.address, task=task, overwrite=True)
    return places


# ----------------------------------------------------------------------------------------- writing


def writing_rows(rows: Sequence[Triplet], task: Task, scratch: Path, repetitions: int) -> list[dict[str, Any]]:
    """Rows a second that are written, ours checked against the task, and what that is to a bare MDSWriter."""
    numbers = itertools.count()
    works = {
        'ours': lambda: write_triplets(rows, scratch / f'{next(numbers)}', task=task),
        'bare': lambda: write_bare(rows, scratch / f'{next(numbers)}'),
    }
    seconds = interleave(works, repetitions)
    rates = {name: [len(rows) / spent for spent in values] for name, values in seconds.items()}
    ratio = ratios(rates['ours'], rates['bare'])
    return [
        make_row('writing, bare MDSWriter', rates['bare'], 'rows/s'),
        make_row('writing, ours', rates['ours'], 'rows/s', ratio, 'bare MDSWriter', at_least=0.8),
    ]


# ----------------------------------------------------------------------------------------- reading

BARE = 'bare StreamingDataset'
PLAIN = 'our rows, not collated'
OURS = 'ours'
COLD = 'ours, first time'

Rates = dict[tuple[str, int, str], list[float]]  # of place, workers and way: rows a second


def read_rates(
    places: Sequence[Place], task: Task, tokenizer: PreTrainedTokenizerBase, count: int, repetitions: int
) -> Rates:
    """Rows a second of each way to read, in epochs that take turns; their workers stay, as in training."""
    collate = TripletCollator(tokenizer, task.label_names)
    rates: Rates = {}
    for place in places:
        for workers in WORKERS:
            loaders = {
                BARE: load_bare(place, BATCH, workers),
                PLAIN: load_ours(place, BATCH, workers),
                OURS: load_ours(place, BATCH, workers, collate),
            }
            works = {name: partial(read_epoch, loader) for name, loader in loaders.items()}
            if place.caches and workers == WORKERS[0]:
                rates[place.name, workers, COLD] = [count / time_once(works[OURS])]
            for name, seconds in interleave(works, repetitions).items():
                rates[place.name, workers, name] = [count / spent for spent in seconds]
    return rates


def reading_rows(rates: Rates, consumed: float) -> list[dict[str, Any]]:
    """The table of reading, against Streaming alone and against the rows a second that a training step consumes."""
    rows = [make_row('training step', [consumed], 'rows/s')]
    for (place, workers, way), values in rates.items():
        what = f'reading {way}, {place}, {workers} worker{"s" * (workers > 1)}'
        if way in (PLAIN, OURS):
            rows.append(make_row(what, values, 'rows/s', ratios(values, rates[place, workers, BARE]), BARE))
        else:
            rows.append(make_row(what, values, 'rows/s'))
        if way == OURS:
            rows.append(make_row(what, values, 'rows/s', [value / consumed for value in values], 'training step'))
    return rows


# ----------------------------------------------------------------------------------------- waiting


def wait_for(
    places: Sequence[Place], task: Task, options: Options, windows: int
) -> dict[tuple[str, int], StepClock]:
    """A short training from each place with each number of workers, the caches warm."""
    lm, tokenizer = load_backbone(options)
    model = build_classifier(lm, tokenizer, task)
    collate = TripletCollator(tokenizer, task.label_names)
    clocks = {}
    # 0 is the default of train.py; last, as tokenizers do not like to be forked once they have been used.
    for place, workers in [*itertools.product(places, WORKERS), (places[0], 0)]:
        data = triplet_data_spec(load_ours(place, BATCH, workers, collate), by_length=True)
        clocks[place.name, workers] = fit(model, data, WARMUP + windows * WINDOW, BATCH)
    return clocks


def waiting_rows(clocks: Mapping[tuple[str, int], StepClock]) -> list[dict[str, Any]]:
    """The share of the steps that was spent waiting."""
    rows = []
    for (place, workers), clock in clocks.items():
        found = describe_waits(clock, WARMUP)
        note = (
            f'{found["longest"]:.3g} ms at most, in steps of {statistics.median(clock.steps[WARMUP:]):.3g} s; '
            f'{found["first"]:.3g} ms for the first batch of an epoch, which is not counted'
        )
        what = f'step waits for data, {place}, {workers} worker{"s" * (workers != 1)}'
        rows.append(make_row(what, waited(clock, WARMUP, WINDOW), '%', at_most=1.0, note=note))
    return rows

"""How costs grow: with rows, with rationales, with the vocabulary and with ranks."""

import statistics
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import steps
from benchmarks.material import describe, load_backbone, load_rows
from benchmarks.measure import ratios
from benchmarks.options import Options
from benchmarks.rank_step import LaunchFailed, launch
from benchmarks.scale_lengths import length_rows
from benchmarks.scale_rows import order_rows, set_rows
from benchmarks.scale_vocabulary import vocabulary_rows
from benchmarks.table import Table, make_gap, make_report, make_row
from benchmarks.train import similar

ROWS = 100_000
REPETITIONS = 3
BATCH = 2  # rows of a step with longer and longer rationales
RANKS = (1, 2)
RANK_ROWS = 2
RANK_STEPS = 4  # of a launch, after one that does not count
LAUNCHES = 2
RANK_NOTE = (
    '1 would be perfect; the ranks are processes of this machine, one thread each: they share its memory bandwidth, '
    'which the all-reduce of the gradients uses too'
)


def run(options: Options) -> dict[str, Any]:
    """Measure, and return the report of ``benchmark.py scale``."""
    repetitions = options.repetitions or REPETITIONS
    task, rows, source = load_rows(options.rows or ROWS)
    pool = load_rows()[1]
    lm, tokenizer = load_backbone(options)
    bench = steps.make_bench(lm, tokenizer, task)
    alike = similar(pool, [row.input_length for row in bench.encode(pool)], BATCH)
    with tempfile.TemporaryDirectory() as scratch:
        table, largest = set_rows(rows, task, tokenizer, Path(scratch), repetitions)
        table += order_rows(largest, repetitions)
    table += length_rows(bench, alike, repetitions)
    table += vocabulary_rows(lm.config.hidden_size, bench.device, repetitions)
    with tempfile.TemporaryDirectory() as scratch:
        lm.save_pretrained(scratch)  # loads faster than its source
        tokenizer.save_pretrained(scratch)
        del bench, lm
        spec = {'model': scratch, 'layers': 0, 'task': task.name, 'rows': alike[:RANK_ROWS], 'steps': 1 + RANK_STEPS}
        table += rank_rows(spec, min(LAUNCHES, repetitions), Path(scratch))
    return make_report('scale', describe(options, rows=f'{len(rows)} of {source}', batch=BATCH), table)


def rank_rows(spec: Mapping[str, Any], launches: int, folder: Path) -> Table:
    """Measure seconds of a step on 1 and 2 ranks with the same rows each, in launches that take turns.

    Args:
        spec: see :func:`~benchmarks.rank_step.main`, without ``output``.
        launches: of each number of ranks.
        folder: for the files that are handed over.
    """
    found: dict[int, list[float]] = {ranks: [] for ranks in RANKS}
    names = {ranks: f'step, {ranks} rank{"s" * (ranks > 1)} of {len(spec["rows"])} rows' for ranks in RANKS}
    gaps: dict[int, str] = {}
    for _ in range(launches):
        for ranks in RANKS:
            try:
                seconds = launch(ranks, spec, folder)['seconds'][1:]
                found[ranks].append(statistics.median(seconds))
            except LaunchFailed as error:
                gaps[ranks] = str(error)
    if gaps:
        return [make_gap(names[ranks], gaps.get(ranks, 'not compared: another launch failed')) for ranks in RANKS]
    one, many = found.values()
    return [
        make_row(names[RANKS[0]], one, 's'),
        make_row(names[RANKS[1]], many, 's', ratios(many, one), names[RANKS[0]]),
        make_row(f'weak scaling, efficiency at {RANKS[1]} ranks', ratios(one, many), note=RANK_NOTE),
    ]

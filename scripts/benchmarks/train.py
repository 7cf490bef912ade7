"""What a training step costs: ours, what Composer adds, the common two passes, the pooled baseline, the floor."""

import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from benchmarks import steps, two_pass
from benchmarks.material import describe, layers_of, load_backbone, load_rows
from benchmarks.measure import MIB, Work, interleave, peak_memory, rates, ratios
from benchmarks.memory import reasoning_memory_rows
from benchmarks.options import Options
from benchmarks.steps import BATCH, Bench, Rows, ThroughComposer, runs_unpadded
from benchmarks.table import Table, make_report, make_row
from dhrd_plugin.data.collator import Encoded

REPETITIONS = 3
TRIALS = 1  # repetitions that choose a microbatch
MICROBATCHES = (1, 2, 8)
TWO_PASS_MICROBATCH = 1  # the paper's (E.5)
MEMORY_LAYERS = 2

OURS = 'ours'
UNPADDED = 'ours, padding_free'
TWO_PASSES = f'two passes at {two_pass.MAX_LENGTH}'
STOCK = 'AutoModel'


def run(options: Options) -> dict[str, Any]:
    """Measure, and return the report of ``benchmark.py train``."""
    task, pool, source = load_rows()
    pool = [row for row in pool if row['rationale']]
    lm, tokenizer = load_backbone(options)
    bench = steps.make_bench(lm, tokenizer, task)
    count, repetitions = options.rows or BATCH, options.repetitions or REPETITIONS
    rows = spread(pool, _lengths(bench.encode(pool)), count)
    alike = similar(pool, _lengths(bench.encode(pool, reasoning=False)), count)
    table, microbatches = choose(bench, rows, min(TRIALS, repetitions))
    found, notes = compare(bench, rows, microbatches, repetitions)
    table += found
    table += pooled_rows(bench, {'like lengths': alike, 'mixed lengths': rows}, microbatches, repetitions)
    del bench, lm
    few, _ = load_backbone(replace(options, layers=min(MEMORY_LAYERS, layers_of(options))))
    table += reasoning_memory_rows(steps.make_bench(few, tokenizer, task))
    what = f'{len(rows)} of {source}, at even steps of length'
    return make_report('train', describe(options, batch=BATCH, optimizer='AdamW', rows=what), table, notes)


def _lengths(rows: Sequence[Encoded]) -> list[int]:
    return [len(row.input_ids) for row in rows]


def spread(rows: Rows, lengths: Sequence[int], count: int) -> Rows:
    """Choose rows at even steps of length, so that few stand for all, and shuffle them.

    Args:
        rows: to choose from.
        lengths: of the rows, in tokens.
        count: how many to choose; rows are repeated where there are fewer.
    """
    order = sorted(range(len(rows)), key=lengths.__getitem__)
    chosen = [rows[order[int((step + 0.5) * len(order) / count)]] for step in range(count)]
    random.Random(0).shuffle(chosen)
    return chosen


def similar(rows: Rows, lengths: Sequence[int], count: int) -> Rows:
    """Choose rows of about the median length; arguments as of :func:`spread`."""
    median = statistics.median(lengths)
    order = sorted(range(len(rows)), key=lambda index: abs(lengths[index] - median))
    return [rows[order[step % len(order)]] for step in range(count)]


def take_turns(works: Mapping[str, Work], repetitions: int) -> dict[str, list[float]]:
    """Time ways that take turns, in seconds of each repetition; of Composer only its steps count."""
    seconds = interleave(works, repetitions)
    clocked = {name: work.seconds[-repetitions:] for name, work in works.items() if isinstance(work, ThroughComposer)}
    return seconds | clocked


def layouts(bench: Bench) -> dict[str, bool]:
    """Name our layouts, and whether each is padding-free, which not every decoder can be."""
    return {OURS: False, UNPADDED: True} if runs_unpadded(bench) else {OURS: False}


def choose(bench: Bench, rows: Rows, trials: int) -> tuple[Table, dict[str, int]]:
    """Measure rows a second with every microbatch.

    Returns:
        The table, and the fastest microbatch of each layout.
    """
    works: dict[str, Work] = {
        f'{layout}, microbatch {size}': ThroughComposer(bench, rows, size, padding_free)
        for layout, padding_free in layouts(bench).items()
        for size in MICROBATCHES
    }
    seconds = take_turns(works, trials)
    table = [make_row(name, values, 'rows/s') for name, values in rates(len(rows), seconds).items()]
    best = {
        layout: min(MICROBATCHES, key=lambda size: statistics.median(seconds[f'{layout}, microbatch {size}']))
        for layout in layouts(bench)
    }
    return table, best


def compare(bench: Bench, rows: Rows, microbatches: Mapping[str, int], repetitions: int) -> tuple[Table, list[str]]:
    """Measure ours, with each layout's best microbatch, against the other ways, in time and memory.

    Args:
        bench: what all ways share.
        rows: with their rationales.
        microbatches: of each layout.
        repetitions: epochs of each way.

    Returns:
        The table and its notes.
    """
    ours = {name: ThroughComposer(bench, rows, microbatches[name], free) for name, free in layouts(bench).items()}
    bare = {
        f'{name}, bare loop': steps.bare_loop(bench, rows, microbatches[name], free)
        for name, free in layouts(bench).items()
    }
    floors = {'floor, row by row': steps.floor_by_row(bench, rows)}
    if UNPADDED in ours:
        floors['floor, in one sequence'] = steps.floor_in_one(bench, rows)
    others = {TWO_PASSES: steps.two_passes(bench, rows, TWO_PASS_MICROBATCH), **floors}
    works: dict[str, Work] = {**ours, **bare, **others}
    seconds = take_turns(works, repetitions)
    rate = rates(len(rows), seconds)
    floor = min(floors, key=lambda name: statistics.median(seconds[name]))
    table = [make_row(name, rate[name], 'rows/s') for name in (*others, *bare)]
    for name in ours:
        what = f'{name}, microbatch {microbatches[name]}'
        table += [
            make_row(what, rate[name], 'rows/s', ratios(rate[name], rate[TWO_PASSES]), TWO_PASSES, at_least=10),
            *(
                make_row(f'{what}, time', seconds[name], 's', ratios(seconds[name], seconds[other]), other, at_most=bar)
                for other, bar in ((floor, 1.15), (f'{name}, bare loop', 1.05))
            ),
        ]
    table += memory_rows(bench, works, OURS)
    around = statistics.median(spent for work in ours.values() for spent in work.around)
    notes = [
        *describe_work(bench, rows, microbatches),
        f'time through Composer is that of its steps; what begins and ends a fit and an epoch, {1000 * around:.3g} ms '
        'here, is left out',
        'the learning rate is 0, so that every way has the same weights; it does not change what a step costs',
    ]
    return table, notes


def memory_rows(bench: Bench, works: Mapping[str, Work], against: str) -> Table:
    """Measure the peak memory of an epoch of each way, beyond weights and optimizer state, against one of them."""
    peaks = {}
    for name, work in works.items():
        bench.optimizer.zero_grad()  # gradients are each way's own
        peaks[name] = peak_memory(work)
    return [
        make_row(f'{name}, peak memory', [peak / MIB], 'MiB', [peak / max(peaks[against], 1)], against)
        for name, peak in peaks.items()
    ]


def describe_work(bench: Bench, rows: Rows, microbatches: Mapping[str, int]) -> list[str]:
    """Say how many tokens each way runs, and what that bounds."""
    batches = [bench.encode(some) for some in steps.batches(rows)]
    real = sum(sum(_lengths(batch)) for batch in batches)
    inputs = sum(row.input_length for batch in batches for row in batch)
    supervised = sum(label >= 0 for batch in batches for row in batch for label in row.labels)
    padded = {size: sum(padded_tokens(_lengths(batch), size) for batch in batches) for size in MICROBATCHES}
    ours = padded[microbatches[OURS]]
    theirs = 2 * two_pass.MAX_LENGTH * len(rows)
    head = bench.network.lm_head.weight.numel()
    embedding = bench.network.causal_lm.get_input_embeddings().weight.numel()  # pyright: ignore
    backbone = sum(weight.numel() for weight in bench.network.backbone.parameters()) - embedding
    least = real * backbone + supervised * head
    work = (theirs * backbone + theirs // 2 * head) / least
    return [
        f'{len(rows)} rows hold {real:,} real tokens, {inputs:,} of them input, {supervised:,} supervised; with '
        f'padding ours runs {", ".join(f"{count:,} at microbatch {size}" for size, count in padded.items())}',
        f'two passes run {theirs:,} tokens, {theirs / real:.3g} times the real ones, in {work:.3g} times the '
        f'multiplications of the floor (attention left out), which bounds the speed-up if all take equally long; ours, '
        f'at microbatch {microbatches[OURS]}, runs {ours / real:.3g} times the real ones',
    ]


def padded_tokens(lengths: Sequence[int], microbatch: int) -> int:
    """Count the tokens, padding included, of a batch's microbatches, cut by length."""
    return sum(len(part) * max(part) for part in steps.batches(sorted(lengths), microbatch))


def pooled_rows(bench: Bench, sets: Mapping[str, Rows], microbatches: Mapping[str, int], repetitions: int) -> Table:
    """Measure ours without the algorithm against transformers' own classifier.

    Args:
        bench: what both share.
        sets: rows by kind: ``like lengths`` and ``mixed lengths``.
        microbatches: of each layout.
        repetitions: epochs of each way.
    """
    bars = {'like lengths': 1.0, 'mixed lengths': 1.2}
    table = []
    for kind, rows in sets.items():
        make = partial(ThroughComposer, bench, rows, reasoning=False)
        works: dict[str, Work] = {
            name: make(microbatch=microbatches[name], padding_free=free) for name, free in layouts(bench).items()
        }
        works[STOCK] = steps.stock(bench, rows)
        rate = rates(len(rows), take_turns(works, repetitions))
        lengths = _lengths(bench.encode(rows, reasoning=False))
        padded = sum(padded_tokens(part, BATCH) for part in steps.batches(lengths))
        note = f'{padded:,} tokens with padding, {sum(lengths):,} real'
        table.append(make_row(f'{STOCK}, pooled, {kind}', rate[STOCK], 'rows/s', note=note))
        for name in layouts(bench):
            what = f'{name}, pooled arm, microbatch {microbatches[name]}, {kind}'
            ratio = ratios(rate[name], rate[STOCK])
            table.append(make_row(what, rate[name], 'rows/s', ratio, STOCK, at_least=bars[kind]))
        if kind == 'mixed lengths':
            table += memory_rows(bench, {f'{name}, pooled': work for name, work in works.items()}, f'{OURS}, pooled')
    return table

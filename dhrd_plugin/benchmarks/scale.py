"""How costs grow: with rows, with rationales, with the vocabulary, with ranks; and on paper to a cluster."""

import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from dhrd_plugin.benchmarks import estimate, steps
from dhrd_plugin.benchmarks.material import layers_of, load_backbone, load_rows
from dhrd_plugin.benchmarks.measure import ratios
from dhrd_plugin.benchmarks.options import Options
from dhrd_plugin.benchmarks.rank_step import LaunchFailed, launch
from dhrd_plugin.benchmarks.scale_lengths import length_rows
from dhrd_plugin.benchmarks.scale_rows import order_rows, set_rows
from dhrd_plugin.benchmarks.scale_vocabulary import vocabulary_rows
from dhrd_plugin.benchmarks.steps import Rows
from dhrd_plugin.benchmarks.table import make_gap, make_report, make_row
from dhrd_plugin.benchmarks.train import similar
from dhrd_plugin.data.collation import Encoded
from dhrd_plugin.data.index import INDEX
from dhrd_plugin.data.shards import SHARD_SIZE, read_summary
from dhrd_plugin.errors import UserError

ROWS = 100_000
REPETITIONS = 3
BATCH = 2  # rows of a step with longer and longer rationales
RANKS = (1, 2)
RANK_ROWS = 2
RANK_STEPS = 4  # of a launch, after one that does not count
LAUNCHES = 2
PAPER_ROWS = 10**9
NOTES = (
    'what is "on paper" is computed, not measured, without activations; LoRA is the paper\'s (E.4); the order\'s time '
    'and peak are those a row of the longest order above, though its time grows a little faster than the rows',
)
RANK_NOTE = (
    '1 were perfect; the ranks are processes of this machine, one thread each: they share its memory bandwidth, '
    'through which the all-reduce of the gradients goes, too'
)

Table = list[dict[str, Any]]


def run(options: Options) -> dict[str, Any]:
    """Measure; the report of ``benchmark.py scale``."""
    repetitions, cluster = options.repetitions or REPETITIONS, estimate.Cluster()
    task, rows, source = load_rows(options.rows or ROWS)
    pool = load_rows()[1]
    lm, tokenizer = load_backbone(options)
    bench = steps.make_bench(lm, tokenizer, task)
    encoded = bench.encode(pool)
    alike = similar(pool, [row.input_length for row in encoded], BATCH)
    with tempfile.TemporaryDirectory() as scratch:
        table, largest = set_rows(rows, task, tokenizer, Path(scratch), repetitions)
        ordering, order = order_rows(largest, cluster, repetitions)
        paper = describe_set(pool, encoded, largest)
    table += ordering
    table += length_rows(bench, alike, repetitions)
    table += vocabulary_rows(lm.config.hidden_size, bench.device, repetitions)
    with tempfile.TemporaryDirectory() as scratch:
        lm.save_pretrained(scratch)  # loaded more quickly than what it came from
        tokenizer.save_pretrained(scratch)
        configs = {f'{options.model} ({layers_of(options)} layers)': lm.config, 'Qwen3-8B': estimate.qwen3_8b()}
        del bench, lm
        spec = {'model': scratch, 'layers': 0, 'task': task.name, 'rows': alike[:RANK_ROWS], 'steps': 1 + RANK_STEPS}
        table += rank_rows(spec, min(LAUNCHES, repetitions), Path(scratch))
    table += estimate.stream_rows(paper, cluster, order)
    for name, config in configs.items():
        table += paper_rows(name, config, paper, cluster)
    settings = {
        'model': options.model, 'layers': layers_of(options), 'rows': f'{len(rows)} of {source}', 'batch': BATCH,
        'on paper': f'{cluster.nodes} nodes of {cluster.ranks_per_node} GPUs, {cluster.batch} rows a GPU, '
        f'{PAPER_ROWS:,} rows',
    }  # fmt: skip
    return make_report('scale', settings, table, NOTES)


def describe_set(rows: Rows, encoded: Sequence[Encoded], folder: Path) -> estimate.Rows:
    """A set of a billion rows such as these.

    Args:
        rows: each once.
        encoded: they.
        folder: of shards of them, of which bytes a row and an entry of the index are read.
    """
    summary = read_summary(folder)
    assert summary is not None
    length = statistics.fmean(len(row['input_text']) + len(row['rationale'] or '') for row in rows)
    return estimate.Rows(
        count=PAPER_ROWS,
        tokens=statistics.fmean(len(row.input_ids) for row in encoded),
        supervised=statistics.fmean(sum(label >= 0 for label in row.labels) for row in encoded),
        size=summary['bytes'] / summary['rows'],
        per_shard=SHARD_SIZE / length,
        entry=(folder / INDEX).stat().st_size / summary['shard_count'],
    )


def paper_rows(name: str, config: PretrainedConfig, rows: estimate.Rows, cluster: estimate.Cluster) -> Table:
    """The table of a model on paper."""
    try:
        return estimate.model_rows(estimate.count_parameters(name, config), rows, cluster)
    except UserError as error:
        return [make_gap(f'on paper, {name}', str(error))]


# -------------------------------------------------------------------------------------------- ranks


def rank_rows(spec: Mapping[str, Any], launches: int, folder: Path) -> Table:
    """Seconds of a step on 1 and 2 ranks with the same rows each, from launches that take turns."""
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

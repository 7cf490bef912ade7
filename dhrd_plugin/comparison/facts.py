"""What a comparison cost, how it was made, and what the paper found on the same backbone."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from dhrd_plugin.comparison import paper
from dhrd_plugin.comparison.content import NONE, Section, Table, listed
from dhrd_plugin.comparison.results import Results
from dhrd_plugin.comparison.statistics import Statistics

__all__ = ['cost', 'from_paper', 'making']


def cost(results: Results) -> Section:
    """Tokens and seconds a step of each task and arm, medians over seeds."""
    rows = []
    for evaluated in results.main_sets:
        base = [*results.cells(evaluated, results.baseline).values()]
        for arm in results.arms:
            cells = [*results.cells(evaluated, arm).values()]
            if cells:
                rows.append([evaluated[0], arm, *_cost(cells, base)])
    header = [
        'task',
        'arm',
        'steps',
        'tokens',
        'tokens a step',
        'seconds a step',
        f'seconds / {results.baseline}',
    ]
    text = 'Training alone, medians over seeds; seconds are those of the machine at the time.'
    return Section('Cost', [text], [Table('Cost of training', header, rows, 2)])


def _cost(cells: Sequence[Mapping[str, Any]], base: Sequence[Mapping[str, Any]]) -> list[str]:
    steps, tokens, seconds = (_median(cells, key) for key in ('steps', 'tokens', 'seconds_per_step'))
    other = _median(base, 'seconds_per_step') if base else 0
    return [
        f'{steps:,.0f}',
        f'{tokens:,.0f}',
        f'{tokens / steps:,.0f}' if steps else NONE,
        f'{seconds:.3g}',
        f'{seconds / other:.2f} x' if other else NONE,
    ]


def _median(cells: Iterable[Mapping[str, Any]], key: str) -> float:
    """Not the mean: a machine that was busy with something else once says nothing of an arm."""
    return float(np.median([cell[key] for cell in cells]))


def from_paper(results: Results, statistics: Statistics) -> list[Section]:
    """The paper's figures for each of its backbones that the comparison ran on; none for others."""
    models = dict.fromkeys(record['model'] for record in results.records.values())
    names = dict.fromkeys(name for model in models if (name := paper.backbone(model)))
    return [_from_paper(name, results, statistics) for name in names]


def _from_paper(name: str, results: Results, statistics: Statistics) -> Section:
    sets = [rows for rows in results.main_sets if rows[0].lower() in paper.TASKS]
    columns = [paper.TASKS.index(task.lower()) for task, _ in sets]
    theirs = [
        [f'paper: {line.name}', *(_slashed(line.values[column]) for column in columns), f'{line.average:.2f}',
         NONE if line.relative is None else _signed(line.relative)]
        for line in paper.TABLE1
        if line.backbone == name
    ]  # fmt: skip
    ours = [
        [
            f'here: {arm}',
            *(_slashed([100 * value for value in statistics.metrics.get((rows, arm), {}).values()]) for rows in sets),
            f'{100 * found.value:.2f}' if (found := statistics.averages.get(arm)) else NONE,
            _signed(100 * rel.value) if (rel := statistics.relative.get(arm)) else NONE,
        ]
        for arm in results.arms
    ]
    header = ['setting', *(task for task, _ in sets), 'average', 'relative']
    tables = [Table(f'Table 1 of the paper, {name}, and this comparison, in percent', header, [*theirs, *ours])]
    if controls := paper.CONTROLS.get(name):
        rows = [[control, _number(average), _signed(relative)] for control, (average, relative) in controls.items()]
        tables.append(
            Table(f'Table 2 of the paper, {name}: averages', ['trained on', 'average', 'relative to DHRD'], rows)
        )
    if alphas := paper.ALPHAS.get(name):
        rows = [[_weights(alpha, beta), _number(average)] for (alpha, beta), average in alphas.items()]
        tables.append(Table(f'Table 3 of the paper, {name}: averages', ['weights', 'average'], rows))
    text = (
        "The paper's averages are over its seven SuperGLUE tasks, of one run a setting, without intervals "
        f'(arXiv:2509.21487); those here are over {listed(statistics.common) if statistics.common else "no task yet"}.'
    )
    return Section(f'The paper on {name}', [text], tables)


def _weights(alpha: float, beta: float) -> str:
    return f'alpha {alpha:g}, beta {beta:g}' if beta else 'reasoning head alone, decoding a chain of thought'


def _slashed(values: Sequence[float]) -> str:
    return '/'.join(f'{value:.1f}' for value in values) or NONE


def _number(value: float | None) -> str:
    return NONE if value is None else f'{value:.2f}'


def _signed(value: float | None) -> str:
    return NONE if value is None else f'{value:+.2f} %'.replace('-', '\N{MINUS SIGN}')


def making(results: Results) -> Section:
    """Backbone, rows, seeds, steps, versions, and the comparison's YAML."""
    records = [*results.records.values()]
    cells, missing = results.planned, len(results.missing)
    sizes = {rows: len(results.example(rows)['ids']) for rows in results.sets}
    facts = [
        [
            'cells',
            f'{cells - missing} of {cells} present, {missing} missing, {len(results.extra)} extra',
        ],
        ['backbone', _distinct(records, lambda record: record['model'])],
        ['seeds', ', '.join(map(str, results.seeds))],
        ['rows evaluated on', '; '.join(f'{task} {split}: {size:,}' for (task, split), size in sizes.items())],
        ['rows seen in training', _by_task(results, 'rows')],
        ['steps', _by_task(results, 'steps')],
        ['ranks', _distinct(records, lambda record: record.get('world_size', NONE))],
        ['finished', _span([str(record['finished']) for record in records if record.get('finished')])],
        [
            'versions',
            _distinct(records, lambda r: ', '.join(f'{name} {version}' for name, version in r['versions'].items())),
        ],
    ]
    table = Table('The comparison', ['what', 'value'], [[name, value or NONE] for name, value in facts])
    code = ('comparison.yaml', results.text)
    return Section('How it was made', tables=[table], code=code)


def _distinct(records: Iterable[Mapping[str, Any]], what: Callable[[Mapping[str, Any]], Any]) -> str:
    return '; '.join(dict.fromkeys(str(what(record)) for record in records))


def _by_task(results: Results, key: str) -> str:
    """The values that a task's cells have, most often one."""
    found = {
        task: sorted({record[key] for name, record in results.records.items() if name[0] == task and key in record})
        for task, _ in results.main_sets
    }
    return '; '.join(
        f'{task}: {" or ".join(f"{value:,}" for value in values)}' for task, values in found.items() if values
    )


def _span(times: Sequence[str]) -> str:
    return '' if not times else min(times) if min(times) == max(times) else f'{min(times)} to {max(times)}'

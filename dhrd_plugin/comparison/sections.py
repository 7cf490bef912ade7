"""What a report says, section by section, as plain data that a page and a Markdown file render alike."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from dhrd_plugin.comparison import paper
from dhrd_plugin.comparison.charts import FEW, Chart, describe, draw_curves, draw_differences, draw_scores
from dhrd_plugin.comparison.results import PLAN, CellKey, Results, Rows
from dhrd_plugin.comparison.statistics import (
    POWER,
    RESAMPLES,
    Difference,
    Estimate,
    McNemar,
    Statistics,
    analyse,
    chance,
    is_constant,
)

Record = dict[str, Any]  # a line of results.jsonl
NONE = '\N{EM DASH}'
SPACE = '\N{NO-BREAK SPACE}'
SHOWN = 12  # missing cells that are named
ORDER = {
    'gain': 'a gain',
    'loss': 'a loss',
    'no difference shown': 'no difference shown',
    'no verdict': 'no verdict yet',
}


@dataclass(frozen=True)
class Table:
    """Cells of text."""

    caption: str  # what it shows
    header: Sequence[str]  # of the columns
    rows: Sequence[Sequence[str]]  # of as many cells each
    names: int = 1  # how many columns on the left name the row


@dataclass(frozen=True)
class Section:
    """A part of a report."""

    title: str  # its heading
    texts: Sequence[str] = ()  # paragraphs before the rest
    tables: Sequence[Table] = ()  # what is counted
    charts: Sequence[Chart] = ()  # what is drawn
    code: tuple[str, str] | None = None  # a text to be shown as it is, folded away; with the line to unfold it by


@dataclass(frozen=True)
class Report:
    """A whole report, in the order in which it is read."""

    name: str  # of the comparison
    answer: str  # does it help, in a sentence
    state: Sequence[str]  # what is missing or too much
    sections: Sequence[Section]  # the rest


def build_report(results: Results) -> Report:
    """Everything there is to say of results; where there are none, only how they were to be made."""
    statistics = analyse(results)
    sections = []
    if statistics.scores:
        sections.append(_scores(results, statistics))
    if statistics.differences:
        sections.append(_differences(results, statistics))
    if statistics.common:
        sections.append(Section('In one picture', charts=[draw_scores(results, statistics)]))
    if statistics.tests:
        sections.append(_tests(results, statistics))
    further = enumerate(results.further_sets.items(), 2)
    sections += [_further(results, statistics, split, sets, number) for number, (split, sets) in further]
    if statistics.scores:
        sections.append(cost(results))
    if curves := draw_curves(results):
        thin = ', and thin lines for each seed' if len(results.arms) <= FEW else ''
        text = f'Means over seeds{thin}. A point of a long series is the mean of some steps.'
        sections.append(Section('While it trained', [text], charts=curves))
    models = dict.fromkeys(record['model'] for record in results.records.values())
    backbones = dict.fromkeys(name for model in models if (name := paper.backbone(model)))
    sections += [_from_paper(name, results, statistics) for name in backbones]
    sections.append(_making(results))
    return Report(results.name, _answer(results, statistics), _state(results, statistics), sections)


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f'{", ".join(names[:-1])} and {names[-1]}'


def _text(value: float | None, form: str) -> str:
    return NONE if value is None else format(value, form).replace('-', '\N{MINUS SIGN}')


# ------------------------------------------------------------------------------- before the sections


def _answer(results: Results, statistics: Statistics) -> str:
    """One sentence from the verdicts; a difference whose interval spans zero is never more than "not shown"."""
    found = statistics.average_differences
    if not results.average and statistics.differences:
        return (
            f'Each of {_listed(statistics.common)} is compared with {results.baseline} by itself, below: they are '
            'settings, so there is no average, and no one answer.'
        )
    if not found:
        return (
            f'Nothing can be said yet: no task has results of {results.baseline} and of all the other arms that have '
            'begun, with a seed in common.'
        )
    over = statistics.common
    where = f'on average over {_listed(over)}' if len(over) > 1 else f'on {over[0]}'
    full = max(value.seeds for value in found.values())
    arms = {
        verdict: [
            f'{arm} ({describe(value)} points{_fewer(value, full, ", {}")})'
            for arm, value in found.items()
            if value.verdict == verdict
        ]
        for verdict in ORDER
    }
    parts = [f'{ORDER[verdict]} for {_listed(names)}' for verdict, names in arms.items() if names]
    return f'Compared with {results.baseline}, {where}: {"; ".join(parts)}; {_basis(found.values())}.'


def _basis(found: Iterable[Difference]) -> str:
    seeds = sorted({value.seeds for value in found})
    if seeds == [1]:
        return 'one seed, so the 95 % intervals are over rows alone'
    alone = ', of one seed over rows alone' if 1 in seeds else ''
    return f'{" to ".join(map(str, dict.fromkeys((seeds[0], seeds[-1]))))} seeds, 95 % intervals{alone}'


def _fewer(value: Estimate, full: int, form: str = f'{SPACE}({{}})') -> str:
    """How many seeds a value is of, where they are not ``full``."""
    return '' if value.seeds == full else form.format(f'{value.seeds}{SPACE}seed{"s" * (value.seeds > 1)}')


def _state(results: Results, statistics: Statistics) -> list[str]:
    """What is missing, too much or learnt nothing, a sentence for each; none where all is as it should be."""
    constant = [  # a gain over a classifier that tells no rows apart, or its loss, says little else
        (rows[0], arm, seed)
        for rows in results.main_sets
        for arm in results.arms
        for seed, record in results.cells(rows, arm).items()
        if is_constant(record)
    ]
    texts = []
    if constant:
        texts.append(f'The same label for every row, whatever it says: {_cells(constant)}.')
    unpaired = [
        f'{task} {arm}'
        for (task, split), arm in statistics.scores
        if arm != results.baseline and ((task, split), arm) not in statistics.differences
    ]
    if unpaired:
        texts.append(
            f'No seed in common with {results.baseline}, so not compared: {_listed([*dict.fromkeys(unpaired)])}.'
        )
    if results.missing:
        texts.append(f'{len(results.missing)} of {results.planned} cells missing: {_cells(results.missing)}.')
    if results.extra:
        texts.append(f'Not part of the comparison, and left out: {_cells(results.extra)}.')
    if results.repeated:
        texts.append(f'{results.repeated} results were replaced by later ones of the same cell.')
    return texts


def _cells(cells: Sequence[CellKey]) -> str:
    names = [f'{task} {arm} seed {seed}' for task, arm, seed in cells]
    return _listed(names) if len(names) <= SHOWN else f'{", ".join(names[:SHOWN])} and {len(names) - SHOWN} more'


# -------------------------------------------------------------------------------------- the scores


Column = tuple[str, dict[str, str]]  # its heading, and its text of each arm


def _by_arm(caption: str, arms: Sequence[str], columns: Sequence[Column]) -> Table:
    rows = [[arm, *(texts[arm] for _, texts in columns)] for arm in arms]
    return Table(caption, ['arm', *(heading for heading, _ in columns)], rows)


def _scores(results: Results, statistics: Statistics) -> Section:
    """Means with intervals, averages, relative differences and verdicts."""
    arms, sets, full = results.arms, results.main_sets, len(results.seeds)
    columns = list[Column]()
    if len(sets) > 1 and results.average:
        columns.append(('average', {arm: _percent(statistics.averages.get(arm), full) for arm in arms}))
    found = statistics.average_differences
    if results.average:
        columns += [
            (f'relative to {results.baseline}', {arm: _relative(statistics.relative.get(arm)) for arm in arms}),
            ('verdict', {arm: found[arm].verdict + _fewer(found[arm], full) if arm in found else NONE for arm in arms}),
        ]
    tables = [_score_table(results, statistics, sets, columns), *_constant(results, sets)]
    metrics = [(rows, name) for rows in sets for name in results.example(rows)['task_metrics']]
    if len(metrics) > len(sets):
        means = {
            key: {name: f'{100 * value:.1f}' for name, value in found.items()}
            for key, found in statistics.metrics.items()
        }
        each = [
            (f'{rows[0]} {name}', {arm: means.get((rows, arm), {}).get(name, NONE) for arm in arms})
            for rows, name in metrics
        ]
        tables.append(_by_arm('Each metric in percent, mean over seeds', arms, each))
    return Section('Scores', _how_scored(results, statistics), tables)


def _score_table(results: Results, statistics: Statistics, sets: Sequence[Rows], more: Sequence[Column] = ()) -> Table:
    """Each arm's score by evaluation set, and below them what takes no classifier."""
    arms, full = results.arms, len(results.seeds)
    columns = [(rows[0], {arm: _percent(statistics.scores.get((rows, arm)), full) for arm in arms}) for rows in sets]
    seeds = '1 seed' if full == 1 else f'{full} seeds unless said otherwise'
    table = _by_arm(f'Scores in percent: mean over {seeds}, 95 % interval', arms, [*columns, *more])
    accuracies = [_accuracies(results.example(rows)) for rows in sets]
    names = ('majority answer', 'uniform answer')
    rows = [[name, *found, *(NONE for _ in more)] for name, found in zip(names, zip(*accuracies))]
    return replace(table, rows=[*table.rows, *rows])


def _accuracies(record: Record) -> list[str]:
    """Of the most frequent label given to all rows, and of labels drawn evenly."""
    metric = '' if record['task_metrics'] == ['accuracy'] else f'{SPACE}accuracy'
    return [f'{100 * value:.1f}{metric}' for value in chance(record['labels'], len(record['label_names']))]


def _constant(results: Results, sets: Sequence[Rows]) -> list[Table]:
    """How many classifiers of each arm answer one label to every row; nothing where none does."""
    found = {
        (rows, arm): [*map(is_constant, results.cells(rows, arm).values())] for rows in sets for arm in results.arms
    }
    if not any(map(any, found.values())):
        return []
    columns = [
        (rows[0], {arm: f'{sum(found[rows, arm])} of {len(found[rows, arm])}' for arm in results.arms}) for rows in sets
    ]
    return [_by_arm('Constant classifiers, which answer one label to every row', results.arms, columns)]


def _further(results: Results, statistics: Statistics, split: str, sets: Sequence[Rows], number: int) -> Section:
    """What there is of an evaluation set that is no part of the averages, of each task that has it."""
    name = f'-{number}-{re.sub("[^a-zA-Z0-9]", "-", split)}'
    tables, charts = [_score_table(results, statistics, sets), *_constant(results, sets)], []
    if any(rows in sets for rows, _ in statistics.differences):
        tables += [*_difference_tables(results, statistics, sets), _test_table(results, statistics, sets)]
        charts = [draw_differences(results, statistics, sets, name)]
    if any(all((rows, arm) in statistics.scores for rows in sets) for arm in results.arms):
        charts.append(draw_scores(results, statistics, sets, name))
    texts = ['No part of the averages.', *_too_small(results, statistics, sets)]
    return Section(f'Evaluated on {split}', texts, tables, charts)


def _percent(value: Estimate | None, full: int) -> str:
    """A score such as ``71.2 [65.0, 77.1]``, with its seeds where they are not ``full``."""
    if value is None:
        return NONE
    return f'{100 * value.value:.1f} [{100 * value.low:.1f},{SPACE}{100 * value.high:.1f}]{_fewer(value, full)}'


def _relative(value: Estimate | None) -> str:
    if value is None:
        return NONE
    middle, low, high = (_text(100 * found, '+.2f') for found in (value.value, value.low, value.high))
    return f'{middle}{SPACE}% [{low},{SPACE}{high}]'


def _how_scored(results: Results, statistics: Statistics) -> list[str]:
    texts = []
    if several := [
        f'{rows[0]} by the mean of {_listed(names)}'
        for rows in results.main_sets
        if len(names := results.example(rows)['task_metrics']) > 1
    ]:
        several = '; '.join(several)
        texts.append(f'A task with more than one metric is scored by their mean, as in the paper: {several}.')
    left = [task for task, _ in results.main_sets if task not in statistics.common]
    if left and statistics.common and results.average:
        texts.append(
            f'Averages are over {_listed(statistics.common)}, which all arms that have begun have results of; '
            f'{_listed(left)} {"is" if len(left) == 1 else "are"} left out.'
        )
    return texts


# --------------------------------------------------------------------------------- the differences


def _differences(results: Results, statistics: Statistics) -> Section:
    """The forest plot and its numbers."""
    sets = results.main_sets
    texts = [*_how_sure(results, statistics), *_too_small(results, statistics, sets)]
    averages = statistics.average_differences if results.average else None
    tables = _difference_tables(results, statistics, sets, averages)
    return Section(f'Difference from {results.baseline}', texts, tables, [draw_differences(results, statistics)])


def _difference_tables(
    results: Results, statistics: Statistics, sets: Sequence[Rows], averages: Mapping[str, Difference] | None = None
) -> list[Table]:
    """Differences by arm and evaluation set, and the smallest that would be shown there."""
    arms = [arm for arm in results.arms if arm != results.baseline]
    found = [(rows[0], {arm: statistics.differences.get((rows, arm)) for arm in arms}) for rows in sets]
    found += [('average', dict(averages))] if averages is not None and len(sets) > 1 else []
    full = len(results.seeds)
    shown = {
        f'Difference from {results.baseline} in points, 95 % interval, verdict': lambda value: _judged(value, full),
        f'Smallest difference that would be shown in {100 * POWER:.0f} % of cases, in points': _smallest,
    }
    return [
        _by_arm(caption, arms, [(heading, {arm: show(values.get(arm)) for arm in arms}) for heading, values in found])
        for caption, show in shown.items()
    ]


def _smallest(value: Difference | None) -> str:
    return _at_least(value.detectable) if value and value.error else NONE


def _at_least(difference: float) -> str:
    return f'{100 * difference:.1f}' if difference <= 1 else 'more than 100'  # which no arm can reach


def _too_small(results: Results, statistics: Statistics, sets: Sequence[Rows]) -> list[str]:
    """The evaluation sets whose rows and seeds are too few to show a difference of the size seen."""
    texts = []
    for rows in sets:
        seen = {arm: d for arm in results.arms if (d := statistics.differences.get((rows, arm))) and d.too_small}
        if not seen:
            continue
        few = [
            f'{arm} {_text(100 * d.value, "+.1f")}, where it takes {_at_least(d.detectable)}' for arm, d in seen.items()
        ]
        count, seeds = len(results.example(rows)['ids']), max(d.seeds for d in seen.values())
        texts.append(
            f'{rows[0]}: {count:,} rows and {seeds} seed{"s" * (seeds > 1)} are too few to show a difference of the '
            f'size seen, in points: {"; ".join(few)}.'
        )
    return texts


def _judged(value: Difference | None, full: int) -> str:
    return NONE if value is None else f'{describe(value)} {value.verdict}{_fewer(value, full)}'


def _how_sure(results: Results, statistics: Statistics) -> list[str]:
    grouped = results.grouped()
    groups = f' (in {_listed(grouped)} groups of rows, such as questions)' if grouped else ''
    seeds = {value.seeds for value in statistics.differences.values()}
    two = "the error of the mean over seeds, by Student's t of as few as they are, and " if max(seeds) > 1 else ''
    texts = [
        f'Intervals of 95 % are made of {two}the error over {RESAMPLES:,} resamples of rows{groups}, whose draws are '
        'the same for all arms, so that differences are paired. A difference is a gain or a loss only where its '
        'interval excludes zero (a filled mark); elsewhere none is shown, which does not mean that there is none.',
        f'The smallest difference that would be shown in {100 * POWER:.0f} % of cases is half of such an interval and '
        f'as much again as {100 * POWER:.0f} % take: 2.8 standard errors where rows alone vary, more with few seeds.',
    ]
    if 1 in seeds:
        verdict = '; it is no verdict' if len(results.seeds) > 1 else ''
        texts.append(
            f'With one seed the interval is over rows alone, and says nothing of what another seed would give{verdict}.'
        )
    if max(seeds) > 1:
        texts.append(
            'The fewer the seeds, the wider the interval: 12.7 standard errors of their mean to either side with two, '
            '4.3 with three, 2.8 with five. It holds the truth at least as often as it says.'
        )
    if (len(results.arms) - 1) * len(results.main_sets) > 1:
        texts.append(
            'The intervals are not corrected for how many there are: of twenty differences that do not exist, '
            'one may look like a gain or a loss.'
        )
    return texts


def _tests(results: Results, statistics: Statistics) -> Section:
    """McNemar's tests, seed by seed."""
    texts = [
        f'Of the rows that just one of two classifiers has right, how many the arm has and how many {results.baseline} '
        "has, and the two-sided p of McNemar's exact test (a binomial test on those rows), for each seed by itself."
    ]
    if grouped := results.grouped():
        texts.append(f'It takes rows to be independent, which those of one group in {_listed(grouped)} are not.')
    return Section('Paired tests', texts, [_test_table(results, statistics, results.main_sets)])


def _test_table(results: Results, statistics: Statistics, sets: Sequence[Rows]) -> Table:
    found = statistics.tests
    keys = dict.fromkeys((rows, arm) for rows, arm, _ in found if rows in sets)
    rows = [[rows[0], arm, *(_test(found.get((rows, arm, seed))) for seed in results.seeds)] for rows, arm in keys]
    header = ['task', 'arm', *(f'seed {seed}' for seed in results.seeds)]
    return Table(f'Rows right for the arm alone : for {results.baseline} alone', header, rows, 2)


def _test(test: McNemar | None) -> str:
    if test is None:
        return NONE
    p = f'={SPACE}{test.p:.2g}' if test.p >= 0.001 else f'<{SPACE}0.001'
    return f'{test.arm_only}{SPACE}:{SPACE}{test.baseline_only}, p{SPACE}{p}'


# --------------------------------------------------------------------- cost, the paper, how it was made


def cost(results: Results) -> Section:
    """Tokens and seconds a step of each task and arm, medians over seeds.

    Args:
        results: see :func:`~dhrd_plugin.comparison.results.read_results`.
    """
    rows = [
        [evaluated[0], arm, *_cost([*cells.values()], [*results.cells(evaluated, results.baseline).values()])]
        for evaluated in results.main_sets
        for arm in results.arms
        if (cells := results.cells(evaluated, arm))
    ]
    header = ['task', 'arm', 'steps', 'tokens', 'tokens a step', 'seconds a step', f'seconds / {results.baseline}']
    text = 'Training alone, medians over seeds; seconds are those of the machine at the time.'
    return Section('Cost', [text], [Table('Cost of training', header, rows, 2)])


def _cost(cells: Sequence[Record], base: Sequence[Record]) -> list[str]:
    def median(records: Sequence[Record], key: str) -> float:  # not the mean: a machine may be busy once
        return float(np.median([record[key] for record in records]))

    steps, tokens, seconds = (median(cells, key) for key in ('steps', 'tokens', 'seconds_per_step'))
    other = median(base, 'seconds_per_step') if base else 0
    return [
        f'{steps:,.0f}',
        f'{tokens:,.0f}',
        f'{tokens / steps:,.0f}' if steps else NONE,
        f'{seconds:.3g}',
        f'{seconds / other:.2f} x' if other else NONE,
    ]


def _from_paper(name: str, results: Results, statistics: Statistics) -> Section:
    """The paper's figures on one of its backbones beside those of the comparison."""
    sets = [rows for rows in results.main_sets if rows[0].lower() in paper.TASKS]
    columns = [paper.TASKS.index(task.lower()) for task, _ in sets]
    rows = [
        [f'paper: {line.name}', *(_slashed(line.values[i]) for i in columns), *_average(line.average, line.relative)]
        for line in paper.TABLE1
        if line.backbone == name
    ]
    for arm in results.arms:
        scores = [[100 * value for value in statistics.metrics.get((rows, arm), {}).values()] for rows in sets]
        found = statistics.averages.get(arm), statistics.relative.get(arm)
        rows.append([f'here: {arm}', *map(_slashed, scores), *_average(*(e and 100 * e.value for e in found))])
    header = ['setting', *(task for task, _ in sets), 'average', 'relative']
    tables = [Table(f'Table 1 of the paper, {name}, and this comparison, in percent', header, rows)]
    if controls := paper.CONTROLS.get(name):
        header = ['trained on', 'average', 'relative to DHRD']
        rows = [[control, *_average(*found)] for control, found in controls.items()]
        tables.append(Table(f'Table 2 of the paper, {name}: averages', header, rows))
    if alphas := paper.ALPHAS.get(name):
        rows = [[_weights(alpha, beta), f'{average:.2f}'] for (alpha, beta), average in alphas.items()]
        tables.append(Table(f'Table 3 of the paper, {name}: averages', ['weights', 'average'], rows))
    text = (
        "The paper's averages are over its seven SuperGLUE tasks, of one run a setting, without intervals "
        f'(arXiv:2509.21487); those here are over {_listed(statistics.common) if statistics.common else "no task yet"}.'
    )
    return Section(f'The paper on {name}', [text], tables)


def _weights(alpha: float, beta: float) -> str:
    return f'alpha {alpha:g}, beta {beta:g}' if beta else 'reasoning head alone, decoding a chain of thought'


def _slashed(values: Sequence[float]) -> str:
    return '/'.join(f'{value:.1f}' for value in values) or NONE


def _average(average: float | None, relative: float | None) -> list[str]:
    return [_text(average, '.2f'), NONE if relative is None else f'{_text(relative, "+.2f")} %']


def _making(results: Results) -> Section:
    """Backbone, rows, seeds, steps, versions, and the comparison's YAML."""
    records = [*results.records.values()]
    missing, planned = len(results.missing), results.planned
    times = sorted(str(record['finished']) for record in records if record.get('finished'))

    def distinct(what: Callable[[Record], Any]) -> str:
        return '; '.join(dict.fromkeys(str(what(record)) for record in records))

    def by_task(key: str) -> str:
        """The values that a task's cells have, most often one."""
        found = {
            task: {r[key] for name, r in results.records.items() if name[0] == task and key in r}
            for task, _ in results.main_sets
        }
        return '; '.join(
            f'{task}: {" or ".join(f"{v:,}" for v in sorted(values))}' for task, values in found.items() if values
        )

    facts = {
        'cells': f'{planned - missing} of {planned} present, {missing} missing, {len(results.extra)} extra',
        'backbone': distinct(lambda record: record['model']),
        'seeds': ', '.join(map(str, results.seeds)),
        'rows evaluated on': '; '.join(
            f'{" ".join(rows)}: {len(results.example(rows)["ids"]):,}' for rows in results.sets
        ),
        'rows seen in training': by_task('rows'),
        'steps': by_task('steps'),
        'ranks': distinct(lambda record: record.get('world_size', NONE)),
        'finished': ' to '.join(dict.fromkeys(times[:1] + times[-1:])),
        'versions': distinct(lambda r: ', '.join(f'{name} {version}' for name, version in r['versions'].items())),
    }
    table = Table('The comparison', ['what', 'value'], [[name, value or NONE] for name, value in facts.items()])
    return Section('How it was made', tables=[table], code=(PLAN, results.text))

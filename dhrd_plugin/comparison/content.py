"""What a report says, as plain data that a page and a Markdown file render alike."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dhrd_plugin.comparison.charts import Chart, describe
from dhrd_plugin.comparison.results import Cell, Results, Rows
from dhrd_plugin.comparison.statistics import RESAMPLES, Difference, Estimate, McNemar, Statistics

__all__ = ['Section', 'Table', 'answer', 'scores', 'differences', 'tests', 'listed', 'state']

NONE = '\N{EM DASH}'
SPACE = '\N{NO-BREAK SPACE}'
SHOWN = 12  # missing cells that are named
ORDER = ('gain', 'loss', 'no difference shown')


@dataclass(frozen=True)
class Table:
    """Cells of text.

    Attributes:
        caption: what it shows.
        header: of the columns.
        rows: of as many cells each.
        names: how many columns on the left name the row.
    """

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    names: int = 1


@dataclass(frozen=True)
class Section:
    """A part of a report.

    Attributes:
        title: its heading.
        texts: paragraphs before the rest.
        tables: what is counted.
        charts: what is drawn.
        code: a text to be shown as it is, folded away; with the line to unfold it by.
    """

    title: str
    texts: Sequence[str] = ()
    tables: Sequence[Table] = ()
    charts: Sequence[Chart] = ()
    code: tuple[str, str] | None = None


def answer(results: Results, statistics: Statistics) -> str:
    """One sentence from the verdicts; a difference whose interval spans zero is never more than "not shown"."""
    found = statistics.average_differences
    if not found:
        return (
            f'Nothing can be said yet: no task has results of {results.baseline} and of all the other arms that have '
            'begun, with a seed in common.'
        )
    over = statistics.common
    where = f'on average over {listed(over)}' if len(over) > 1 else f'on {over[0]}'
    parts = []
    for verdict in ORDER:
        arms = [f'{arm} ({describe(value)} points)' for arm, value in found.items() if value.verdict == verdict]
        if arms:
            parts.append(f'{"no difference shown" if verdict == ORDER[2] else f"a {verdict}"} for {listed(arms)}')
    return f'Compared with {results.baseline}, {where}: {"; ".join(parts)}{_basis(found.values())}.'


def _basis(found: Iterable[Difference]) -> str:
    seeds = sorted({value.seeds for value in found})
    if seeds == [1]:
        return '; one seed, so the 95 % intervals are over rows alone'
    number = f'{seeds[0]}' if len(seeds) == 1 else f'{seeds[0]} to {seeds[-1]}'
    return f'; {number} seed{"s" if seeds[-1] > 1 else ""}, 95 % intervals'


def listed(names: Sequence[str]) -> str:
    """``a, b and c``."""
    return names[0] if len(names) == 1 else f'{", ".join(names[:-1])} and {names[-1]}'


def state(results: Results) -> list[str]:
    """What is missing, too much or learnt nothing, a sentence for each; none where all is as it should be."""
    texts = []
    if constant := _constant(results):
        texts.append(f'The same label for every row, whatever it says: {_cells(constant)}.')
    if results.missing:
        texts.append(f'{len(results.missing)} of {results.planned} cells missing: {_cells(results.missing)}.')
    if results.extra:
        texts.append(f'Not part of the comparison, and left out: {_cells(results.extra)}.')
    if results.repeated:
        texts.append(f'{results.repeated} results were replaced by later ones of the same cell.')
    return texts


def _constant(results: Results) -> list[Cell]:
    """The cells whose classifier tells no rows apart: a gain over one, or its loss, says little else."""
    return [
        (rows[0], arm, seed)
        for rows in results.main_sets
        for arm in results.arms
        for seed, record in results.cells(rows, arm).items()
        if len(set(record['predictions'])) == 1 < len(set(record['labels']))
    ]


def _cells(cells: Sequence[Cell]) -> str:
    names = [f'{task} {arm} seed {seed}' for task, arm, seed in cells]
    return listed(names) if len(names) <= SHOWN else f'{", ".join(names[:SHOWN])} and {len(names) - SHOWN} more'


def percent(value: Estimate | None, full: int) -> str:
    """A score such as ``71.2 [65.0, 77.1]``, with its seeds where they are not ``full``."""
    if value is None:
        return NONE
    seeds = '' if value.seeds == full else f' ({value.seeds}{SPACE}seed{"s" if value.seeds > 1 else ""})'
    low, high = 100 * max(0.0, value.low), 100 * min(1.0, value.high)
    return f'{100 * value.value:.1f} [{low:.1f},{SPACE}{high:.1f}]{seeds}'


def _relative(value: Estimate | None) -> str:
    if value is None:
        return NONE
    text = f'{100 * value.value:+.2f}{SPACE}% [{100 * value.low:+.2f},{SPACE}{100 * value.high:+.2f}]'
    return text.replace('-', '\N{MINUS SIGN}')


def scores(results: Results, statistics: Statistics) -> Section:
    """Means with intervals, averages, relative differences and verdicts."""
    sets, full = results.main_sets, len(results.seeds)
    rows = [
        [
            arm,
            *(percent(statistics.scores.get((rows, arm)), full) for rows in sets),
            *([percent(statistics.averages.get(arm), full)] if len(sets) > 1 else []),
            _relative(statistics.relative.get(arm)),
            found.verdict if (found := statistics.average_differences.get(arm)) else NONE,
        ]
        for arm in results.arms
    ]
    base = results.baseline
    seeds = '1 seed' if full == 1 else f'{full} seeds unless said otherwise'
    caption = f'Scores in percent: mean over {seeds}, 95 % interval'
    header = ['arm', *_columns(sets), f'relative to {base}', 'verdict']
    tables = [Table(caption, header, rows), *_metrics(results, statistics, sets), *_others(results, statistics)]
    return Section('Scores', _how_scored(results, statistics), tables)


def _columns(sets: Sequence[Rows]) -> list[str]:
    return [*(task for task, _ in sets), *(['average'] if len(sets) > 1 else [])]


def _how_scored(results: Results, statistics: Statistics) -> list[str]:
    several = [
        f'{rows[0]} by the mean of {listed(names)}'
        for rows in results.main_sets
        if len(names := results.example(rows)['task_metrics']) > 1
    ]
    texts = []
    if several:
        texts.append(
            f'A task with more than one metric is scored by their mean, as in the paper: {"; ".join(several)}.'
        )
    left = [task for task, _ in results.main_sets if task not in statistics.common]
    if left and statistics.common:
        texts.append(
            f'Averages are over {listed(statistics.common)}, which all arms that have begun have results of; '
            f'{listed(left)} {"is" if len(left) == 1 else "are"} left out.'
        )
    return texts


def _metrics(results: Results, statistics: Statistics, sets: Sequence[Rows]) -> list[Table]:
    columns = [(rows, name) for rows in sets for name in results.example(rows)['task_metrics']]
    if len(columns) == len(sets):
        return []
    header = ['arm', *(f'{rows[0]} {name}' for rows, name in columns)]
    rows = [
        [arm, *(_plain(statistics.metrics.get((rows, arm), {}).get(name)) for rows, name in columns)]
        for arm in results.arms
    ]
    return [Table('Each metric in percent, mean over seeds', header, rows)]


def _plain(value: float | None) -> str:
    return NONE if value is None else f'{100 * value:.1f}'


def _others(results: Results, statistics: Statistics) -> list[Table]:
    """The evaluation sets of a task after its first."""
    others = [rows for rows in results.sets if rows not in results.main_sets]
    if not others:
        return []
    rows = [
        [arm, *(percent(statistics.scores.get((rows, arm)), len(results.seeds)) for rows in others)]
        for arm in results.arms
    ]
    caption = 'Further evaluation sets, in percent; they are no part of the averages'
    return [Table(caption, ['arm', *(f'{task} {split}' for task, split in others)], rows)]


def differences(results: Results, statistics: Statistics, chart: Chart) -> Section:
    """The forest plot and its numbers."""
    columns = [*results.main_sets]
    arms = [arm for arm in results.arms if arm != results.baseline]
    found = statistics.differences
    rows = [[arm, *(_judged(found.get((rows, arm))) for rows in columns)] for arm in arms]
    if len(columns) > 1:
        rows = [[*row, _judged(statistics.average_differences.get(row[0]))] for row in rows]
    caption = f'Difference from {results.baseline} in points, 95 % interval, verdict'
    table = Table(caption, ['arm', *_columns(columns)], rows)
    return Section(f'Difference from {results.baseline}', _how_sure(results), [table], [chart])


def _judged(value: Difference | None) -> str:
    return NONE if value is None else f'{describe(value)} {value.verdict}'


def _how_sure(results: Results) -> list[str]:
    grouped = results.grouped()
    groups = f' (in {listed(grouped)} groups of rows, such as questions)' if grouped else ''
    drawn = f'rows{groups}' if len(results.seeds) == 1 else f'seeds and rows{groups} with replacement, crossed'
    number = len(results.arms) - 1
    texts = [
        f'Intervals hold 95 % of {RESAMPLES:,} resamples of {drawn}; the draws are the same for all arms, so that '
        'differences are paired. A difference is a gain or a loss only where its interval excludes zero (a filled '
        'mark); elsewhere none is shown, which does not mean that there is none.'
    ]
    if len(results.seeds) == 1:
        texts.append('With one seed the interval is over rows alone, and says nothing of what another seed would give.')
    else:
        texts.append(
            'A few seeds tell little of how much runs differ: where they differ by more than their rows explain, '
            'these intervals are still too narrow.'
        )
    if number * len(results.main_sets) > 1:
        texts.append(
            'The intervals are not corrected for how many there are: of twenty differences that do not exist, '
            'one may look like a gain or a loss.'
        )
    return texts


def tests(results: Results, statistics: Statistics) -> Section:
    """McNemar's tests, seed by seed."""
    base, found = results.baseline, statistics.tests
    keys = list(dict.fromkeys((rows, arm) for rows, arm, _ in found if rows in results.main_sets))
    rows = [[rows[0], arm, *(_test(found.get((rows, arm, seed))) for seed in results.seeds)] for rows, arm in keys]
    header = ['task', 'arm', *(f'seed {seed}' for seed in results.seeds)]
    texts = [
        f'Of the rows that just one of two classifiers has right, how many the arm has and how many {base} has, and '
        "the two-sided p of McNemar's exact test (a binomial test on those rows), for each seed by itself."
    ]
    grouped = results.grouped()
    if grouped:
        texts.append(f'It takes rows to be independent, which those of one group in {listed(grouped)} are not.')
    return Section('Paired tests', texts, [Table(f'Rows right for the arm alone : for {base} alone', header, rows, 2)])


def _test(test: McNemar | None) -> str:
    if test is None:
        return NONE
    p = f'= {test.p:.2g}' if test.p >= 0.001 else '< 0.001'
    return f'{test.arm_only} : {test.baseline_only}, p {p}'.replace(' ', SPACE).replace(f',{SPACE}', ', ')

"""A report as a table: what was measured, against what, and whether it is what was promised."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from dhrd_plugin.benchmarks.measure import describe_machine, quartiles

COLUMNS = ('what', 'median', 'spread', 'ratio', 'bar', 'met?')


def make_row(
    what: str,
    values: Sequence[float],
    unit: str = '',
    ratio: Sequence[float] | None = None,
    against: str = '',
    at_least: float | None = None,
    at_most: float | None = None,
    note: str = '',
) -> dict[str, Any]:
    """One row of a report, as plain data.

    Args:
        what: the thing measured.
        values: of each repetition.
        unit: of the values.
        ratio: of each repetition, to the same repetition of something else; see ``measure.ratios``.
        against: that something.
        at_least: the bar, for the median ratio, or where there is none the median value.
        at_most: likewise.
        note: printed below the table.

    Returns:
        ``what``, ``median``, ``spread`` (the quartiles), ``unit``, ``repetitions``; ``ratio``, ``ratio_spread`` and
        ``against``; ``bar``, ``met`` and, where it is not, ``missed_by``, a share of the bar; ``note``.
    """
    row: dict[str, Any] = {
        'what': what,
        'median': statistics.median(values),
        'spread': quartiles(values),
        'unit': unit,
        'repetitions': len(values),
    }
    if ratio is not None:
        row |= {'ratio': statistics.median(ratio), 'ratio_spread': quartiles(ratio), 'against': against}
    found = row['median'] if ratio is None else row['ratio']
    if at_least is not None:
        row |= {'bar': f'>= {at_least:g}', **_judge(found >= at_least, (at_least - found) / at_least)}
    if at_most is not None:
        row |= {'bar': f'<= {at_most:g}', **_judge(found <= at_most, (found - at_most) / at_most)}
    return row | ({'note': note} if note else {})


def make_gap(what: str, why: str) -> dict[str, Any]:
    """A row of what was not measured, and why."""
    return {'what': what, 'median': None, 'spread': [], 'unit': '', 'repetitions': 0, 'note': why}


def _judge(met: bool, missed_by: float) -> dict[str, Any]:
    return {'met': met} if met else {'met': met, 'missed_by': missed_by}


def make_report(
    name: str, settings: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], notes: Sequence[str] = ()
) -> dict[str, Any]:
    """A benchmark's report: name, machine, settings, rows of :func:`make_row`, and what else is to be said."""
    return {
        'benchmark': name,
        'machine': describe_machine(),
        'settings': dict(settings),
        'rows': [dict(row) for row in rows],
        'notes': list(notes),
    }


def render(report: Mapping[str, Any]) -> str:
    """The report as Markdown that a console shows well, too."""
    cells = [list(COLUMNS), *(_cells(row) for row in report['rows'])]
    widths = [max(len(row[column]) for row in cells) for column in range(len(COLUMNS))]
    lines = ['| ' + ' | '.join(text.ljust(width) for text, width in zip(row, widths)) + ' |' for row in cells]
    lines.insert(1, '|' + '|'.join('-' * (width + 2) for width in widths) + '|')
    notes = [f'- {row["what"]}: {row["note"]}' for row in report['rows'] if 'note' in row]
    notes += [f'- {note}' for note in report['notes']]
    return '\n'.join([_heading(report), '', *lines, *([''] if notes else []), *notes])


def _heading(report: Mapping[str, Any]) -> str:
    machine = report['machine']
    where = machine['gpu'] or f'{machine["processor"]}, {machine["cores"]} cores'
    versions = ', '.join(f'{name} {version}' for name, version in machine['versions'].items())
    settings = ', '.join(f'{key} {value}' for key, value in report['settings'].items())
    return (
        f'**{report["benchmark"]}** ({settings}) on {where}, {machine["threads"]} threads, '
        f'load {machine["load_average"]}; {versions}'
    )


def _cells(row: Mapping[str, Any]) -> list[str]:
    if not row['repetitions']:
        return [row['what'], '-', '', '', '', '']
    spread = ' to '.join(_number(value) for value in row['spread']) if row['repetitions'] > 1 else ''
    ratio = f'{_number(row["ratio"])} x {row["against"]}' if 'ratio' in row else ''
    met = '' if 'met' not in row else 'yes' if row['met'] else f'no, by {100 * row["missed_by"]:.3g} %'
    return [row['what'], f'{_number(row["median"])} {row["unit"]}'.strip(), spread, ratio, row.get('bar', ''), met]


def _number(value: float) -> str:
    return f'{value:,.0f}' if abs(value) >= 1000 else f'{value:.3g}'

"""A report: what was measured, against what, and whether it meets its bar; as plain data and as a Markdown table."""

import statistics
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import Any

from tabulate import tabulate

from benchmarks.measure import describe_machine, quartiles

COLUMNS = ('what', 'median', 'spread', 'ratio', 'bar', 'met?')

Table = list[dict[str, Any]]  # rows of :func:`make_row` and :func:`make_gap`


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
    """Make one row of a report, as plain data.

    Args:
        what: the thing measured.
        values: one for each repetition.
        unit: of the values.
        ratio: one for each repetition, to the same repetition of something else; see
            :func:`~benchmarks.measure.ratios`.
        against: that something.
        at_least: the bar, for the median ratio, or for the median value where there is no ratio.
        at_most: likewise.
        note: printed below the table.

    Returns:
        ``what``, ``median``, ``spread`` (the quartiles), ``unit``, ``repetitions``; ``ratio``, ``ratio_spread`` and
        ``against``; ``bar``, ``met`` and, where it is missed, ``missed_by``, a share of the bar; ``note``.
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
    """Make a row for what was not measured, with the reason as its note."""
    return {'what': what, 'median': None, 'spread': [], 'unit': '', 'repetitions': 0, 'note': why}


def _judge(met: bool, missed_by: float) -> dict[str, Any]:
    return {'met': met} if met else {'met': met, 'missed_by': missed_by}


def make_report(name: str, settings: Mapping[str, Any], rows: Table, notes: Sequence[str] = ()) -> dict[str, Any]:
    """Make a benchmark's report, as plain data.

    Args:
        name: the verb.
        settings: what the measurements depend on besides the machine.
        rows: of :func:`make_row` and :func:`make_gap`.
        notes: printed below the table.

    Returns:
        ``benchmark``, ``machine``, ``settings``, ``rows`` and ``notes``.
    """
    return {
        'benchmark': name,
        'machine': describe_machine(),
        'settings': dict(settings),
        'rows': rows,
        'notes': list(notes),
    }


def render(report: Mapping[str, Any]) -> str:
    """Render a report as Markdown that is also readable on a console."""
    cells = [_cells(row) for row in report['rows']]
    table = tabulate(cells, COLUMNS, tablefmt='github', disable_numparse=True)
    notes = [f'- {row["what"]}: {row["note"]}' for row in report['rows'] if 'note' in row]
    notes += [f'- {note}' for note in report['notes']]
    return '\n'.join([_heading(report), '', table, *([''] if notes else []), *notes])


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
    spread = ' to '.join(spell(value) for value in row['spread']) if row['repetitions'] > 1 else ''
    ratio = f'{spell(row["ratio"])} x {row["against"]}' if 'ratio' in row else ''
    met = '' if 'met' not in row else 'yes' if row['met'] else f'no, by {100 * row["missed_by"]:.3g} %'
    return [row['what'], f'{spell(row["median"])} {row["unit"]}'.strip(), spread, ratio, row.get('bar', ''), met]


def spell(value: Any) -> str:
    """A cell: a number of three digits, from a thousand on with commas and whole; what is no number as it is."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return '' if value is None else str(value)
    return f'{value:,.0f}' if abs(float(value)) >= 1000 or isinstance(value, Integral) else f'{value:.3g}'

"""Triplets: reading rows, and joining rationales to them.

Everything here streams: a file of any size passes through in constant memory. A row that does not fit is a
:class:`~dhrd_plugin.data.triplet.BadRow`, which names file, line and field; it is raised, or handed to
``on_bad``, and then left out.
"""

import itertools
import json
import re
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

from dhrd_plugin.data.fields import identify, look_up
from dhrd_plugin.data.rows import (
    MAX_ROW_BYTES,
    OnBad,
    Row,
    catching_bad,
    kind_of,
    raise_bad,
    read_hub,
    read_rows,
    source_file,
)
from dhrd_plugin.data.tasks import Task
from dhrd_plugin.data.triplet import (
    BadRow,
    Triplet,
    check_probabilities,
    check_rationale,
    check_target,
    check_weight,
    fingerprint,
    spell,
)
from dhrd_plugin.errors import UserError


def read_triplets(
    source: str | Path,
    task: Task,
    rationales: str | Path | None = None,
    split: str | None = None,
    labelled: bool = True,
    *,
    on_bad: OnBad = raise_bad,
    max_row_bytes: int = MAX_ROW_BYTES,
    report: dict[str, int] | None = None,
) -> Iterator[Triplet]:
    """Read triplets from a file, a task's folder or the hub, in the order of the rows.

    Args:
        source: a JSON, JSONL, CSV or Parquet file; a folder with one such file for each
            split; or ``hub:``, ``hub:PATH`` or ``hub:PATH:CONFIG`` for a data set of the Hugging
            Face hub (``hub:`` alone takes path and config from the template).
        task: the template that the rows fit.
        rationales: a file of rows with an id and a ``rationale`` or ``probabilities``, joined by
            :func:`join_rationales`. Default: None.
        split: train, validation (or val, dev), test; for folders and the hub. Default: None.
        labelled: whether every row must have a label or probabilities. Default: True.
        on_bad: receives each bad row, which is then left out. Default: raise it.
        max_row_bytes: a longer row is a bad row. Default: 1 MiB.
        report: receives the counts of the join. Default: None.

    Raises:
        UserError: the source is missing, or not of a known kind.
        BadRow: a row does not fit; see ``on_bad``.
    """
    if rationales is None:
        return _from_rows(source, task, split, labelled, on_bad, max_row_bytes)
    if not task.id:
        _check_ids(source, task, split, rationales)
    triplets = _from_rows(source, task, split, False, on_bad, max_row_bytes)
    joined = join_rationales(triplets, rationales, task, on_bad, max_row_bytes, report)
    return _with_targets(joined, source, task, on_bad) if labelled else joined


def _check_ids(source: str | Path, task: Task, split: str | None, rationales: str | Path) -> None:
    """Refuse to join by the numbers of the rows where both files have ids that the template does not name."""
    files = open_rows(source, task, split, lambda bad: None).rows, read_rows(source_file(rationales), lambda bad: None)
    row, written = (next((row.fields for row in rows), {}) for rows in files)
    theirs, name = _first(written, 'id', 'idx'), _first(row, 'id', 'idx')
    if theirs and name and _made_for(written) is None:
        other = 'one' if name == theirs else f'a field {name}'
        raise UserError(
            f'{rationales}: field {theirs}: {source} has {other} too, which the template does not name, so that a '
            f'number of a row would be meant by it; expected id: {name} in the template'
        )


def _with_targets(triplets: Iterable[Triplet], source: str | Path, task: Task, on_bad: OnBad) -> Iterator[Triplet]:
    """The joined triplets that can be trained on, see :func:`~dhrd_plugin.data.triplet.check_target`."""
    for triplet in triplets:
        with catching_bad(on_bad, f'{source}, row {triplet["id"]}', triplet):
            check_target(triplet, task.label, task.rationale)
            yield triplet


def join_rationales(
    triplets: Iterable[Triplet],
    path: str | Path,
    task: Task | None = None,
    on_bad: OnBad = raise_bad,
    max_row_bytes: int = MAX_ROW_BYTES,
    report: dict[str, int] | None = None,
) -> Iterator[Triplet]:
    """Add the rationales and probabilities of a file to the triplets of the same id.

    A row of the file holds the id (as the template says, or under ``id`` or ``idx``), and a rationale (a text, or a
    list of several) or probabilities or both (as the template says, or under ``rationale`` and ``probabilities``),
    and perhaps a ``weight``; they become the triplet's. What the triplet already had is replaced and counted.
    ``on_bad`` receives each bad row of the file, and at the end each id that matches no triplet. Rationales of
    ``dhrd rationales`` that were written for another text or answer are counted, as ``changed``.

    Args:
        triplets: the triplets.
        path: the file.
        task: the template. Default: None; ids stand under ``idx``, and any classes have probabilities.
        on_bad: receives each bad row. Default: raise it.
        max_row_bytes: a longer row is a bad row. Default: 1 MiB.
        report: receives the counts of the join. Default: None.

    Raises:
        UserError: no rationale matches any triplet.
    """
    report = {} if report is None else report
    report.update(rationales=0, joined=0, replaced=0, changed=0, unmatched=0, rows_without=0)
    table, id_field = _Table(), task.id if task else 'idx'
    typed = kind_of(path) != '.csv'
    for row in read_rows(source_file(path), on_bad, max_row_bytes):
        with catching_bad(on_bad, row.where, row.fields):
            ident, value = _rationale(row.fields, id_field, task, typed)
            table.add(ident, row.where, (value, _made_for(row.fields)))
            report['rationales'] += 1
    ident = None
    for triplet in triplets:
        ident = triplet['id']
        found = table.take(ident)
        if found is not None:
            value, made_for = found
            report['joined'] += 1
            report['changed'] += made_for is not None and made_for[0] != fingerprint(triplet, made_for[1])
            report['replaced'] += any(triplet.get(name) is not None for name in value if name != 'weight')
            triplet = cast(Triplet, {**triplet, **value})
        report['rows_without'] += triplet['rationale'] is None
        yield triplet
    report['unmatched'] = report['rationales'] - report['joined']
    if not report['joined']:
        raise UserError(f'{path}: {_why_none(report, table, ident)}')
    of_all = f'{report["unmatched"]} of the {report["rationales"]} rationales match none'
    for ident, where in table.left():
        on_bad(BadRow(id_field or 'id', f'{ident!r} matches no row of the data; {of_all}', where))


def _why_none(report: dict[str, int], table: '_Table', ident: str | None) -> str:
    """Why no rationale was joined; ``ident`` is the id of a row."""
    if not report['rationales']:
        return 'holds no rationale'
    ids = [spell(found) for found, _ in itertools.islice(table.left(), 3)]
    rows = 'there are no rows' if ident is None else f'a row of the data has {spell(ident)}'
    return f'none of its {report["rationales"]} rationales matches a row: it has ids such as {", ".join(ids)}; {rows}'


def _rationale(fields: dict[str, Any], id_field: str, task: Task | None, typed: bool) -> tuple[str, dict[str, Any]]:
    """The id of a row of rationales and what it changes in its triplet."""
    names = ('id', 'idx') if '{' in id_field or not id_field else (id_field, 'id', 'idx')
    ident = identify(fields, _first(fields, *names) or id_field or 'id')
    value: dict[str, Any] = {}
    if name := _first(fields, task.rationale if task else 'rationale', 'rationale'):
        value['rationale'] = check_rationale(look_up(fields, name), name, typed)
    if name := _first(fields, task.probabilities if task else 'probabilities', 'probabilities'):
        names = task and task.label_names
        value['probabilities'] = check_probabilities(look_up(fields, name), name, names, typed)
    if not value:
        raise BadRow(task.rationale if task else 'rationale', 'is missing')
    if fields.get('weight') is not None:
        value['weight'] = check_weight(fields['weight'], 'weight', typed=False)
    return ident, value


def _made_for(fields: Mapping[str, Any]) -> tuple[str, int] | None:
    """The :func:`fingerprint` that ``dhrd rationales`` gave a row, and the votes that it asked for; None without."""
    made_for, asked = fields.get('input'), fields.get('asked') if fields.get('votes') else 0
    if isinstance(made_for, str) and re.fullmatch('[0-9a-f]{12}', made_for) and isinstance(asked, int):
        return made_for, asked
    return None


def _first(fields: dict[str, Any], *names: str) -> str | None:
    """The first of some fields that the row has."""
    return next((name for name in names if look_up(fields, name) is not None), None)


def _from_rows(
    source: str | Path, task: Task, split: str | None, labelled: bool, on_bad: OnBad, max_bytes: int
) -> Iterator[Triplet]:
    _, rows, task, typed = open_rows(source, task, split, on_bad, max_bytes)
    found = False
    for triplet in triplets_of(rows, task, labelled, typed, on_bad):
        found = True
        yield triplet
    if not found:
        raise UserError(f'{source}: found no rows; expected one or more')


class Opened(NamedTuple):
    """A source that can be read."""

    where: str  # for messages
    rows: Iterator[Row]
    task: Task  # as it fits the rows
    typed: bool  # whether their values have types, unlike a CSV file's cells


def open_rows(
    source: str | Path, task: Task, split: str | None, on_bad: OnBad, max_bytes: int = MAX_ROW_BYTES
) -> Opened:
    """The rows of a file, of a folder's split or of the hub; arguments of :func:`read_triplets`."""
    if str(source).startswith('hub:'):
        return Opened(str(source), read_hub(str(source), task, split), task.for_hub(), True)
    path = source_file(source, split)
    return Opened(str(path), read_rows(path, on_bad, max_bytes), task, kind_of(path) != '.csv')


def triplets_of(
    rows: Iterable[Row], task: Task, labelled: bool = True, typed: bool = True, on_bad: OnBad = raise_bad
) -> Iterator[Triplet]:
    """The triplets of rows; those of one row come together, or it is a bad row.

    Args:
        rows: of a file, or of the memory.
        task: the template that they fit.
        labelled: as for :func:`read_triplets`. Default: True.
        typed: whether values have types, unlike a CSV file's cells. Default: True.
        on_bad: receives each bad row. Default: raise it.
    """
    for _, triplets in checked_rows(rows, task, labelled, typed, on_bad):
        yield from triplets


def checked_rows(
    rows: Iterable[Row], task: Task, labelled: bool, typed: bool, on_bad: OnBad
) -> Iterator[tuple[Row, list[Triplet]]]:
    """Each good row with its triplets, whose ids differ from all before; see :func:`triplets_of`."""
    seen = _Table()
    for row in rows:
        with catching_bad(on_bad, row.where, row.fields):
            try:
                triplets = list(task.triplets(row.fields, labelled, typed, row.number))
            except BadRow as error:
                raise BadRow(error.field, error.reason + _hint(row)) from None
            for triplet in triplets:
                seen.add(triplet['id'], row.where)
            yield row, triplets


def distinct(triplets: Iterable[Triplet]) -> Iterator[Triplet]:
    """The triplets as they are; a :class:`BadRow` at the first id that an earlier one has."""
    seen = _Table()
    for number, triplet in enumerate(triplets, 1):
        try:
            seen.add(triplet['id'], f'triplet {number}')
        except BadRow as error:
            raise error.at(f'triplet {number}', dict(triplet)) from None
        yield triplet


def _hint(row: Row) -> str:
    """What to say where the first row looks like a whole file: rows under a key, or columns."""
    values = list(row.fields.values())
    rows = [isinstance(value, list) and any(isinstance(item, dict) for item in value) for value in values]
    if row.number == 1 and (any(rows) or all(isinstance(value, dict) for value in values)):
        return '; if it is one object that holds the rows, write them one a line, or as one array'
    return ''


class _Table:
    """Ids on disk: which were seen, where, and with what value. A dict would outgrow the memory."""

    def __init__(self):
        # The empty name is SQLite's own private file, in memory while it is small.
        self.db = sqlite3.connect('', isolation_level=None, check_same_thread=False)
        self.db.execute('CREATE TABLE ids (id TEXT PRIMARY KEY, place TEXT, value TEXT, taken) WITHOUT ROWID')
        self.db.execute('BEGIN')

    def add(self, ident: str, where: str, value: object = None) -> None:
        """Note an id; a BadRow where it is there already."""
        row = (ident, where, None if value is None else json.dumps(value))
        if not self.db.execute('INSERT OR IGNORE INTO ids VALUES (?, ?, ?, 0)', row).rowcount:
            (first,) = self.db.execute('SELECT place FROM ids WHERE id = ?', (ident,)).fetchone()
            raise BadRow('id', f'found {ident!r} twice, first in {first}')

    def take(self, ident: str) -> Any:
        """Take the value of an id, None where there is none."""
        found = self.db.execute('SELECT value FROM ids WHERE id = ?', (ident,)).fetchone()
        if found is None:
            return None
        self.db.execute('UPDATE ids SET taken = 1 WHERE id = ?', (ident,))
        return json.loads(found[0])

    def left(self) -> Iterator[tuple[str, str]]:
        """The ids that nobody took, with their places."""
        return self.db.execute('SELECT id, place FROM ids WHERE NOT taken')

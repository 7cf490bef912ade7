"""The labels of a task that names none: found in its training rows."""

import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from dhrd_plugin.data.fields import as_whole
from dhrd_plugin.data.rows import MAX_ROW_BYTES, OnBad, Row, catching_bad, raise_bad
from dhrd_plugin.data.tasks import Label, Task, build_labels, with_found_labels
from dhrd_plugin.data.triplet import BadRow, spell
from dhrd_plugin.data.triplets import checked_rows, open_rows
from dhrd_plugin.errors import UserError, nearest

MOST = 1000  # labels; more of them are no classes
_NUMBER = re.compile(r'[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?')
_WHOLE = re.compile(r'0|-?[1-9]\d*')
_NOWHERE = '\0'  # a field that no row has


def with_labels(
    task: Task,
    source: str | Path,
    split: str | None = None,
    on_bad: OnBad = raise_bad,
    max_row_bytes: int = MAX_ROW_BYTES,
) -> Task:
    """The task with the labels that the rows of a source have; the task itself where it names its labels.

    They stand in the order of their values, as numbers where all are numbers, and are their own names and answers. A
    row that is left out as a bad one brings none.

    Args:
        task: of :func:`~dhrd_plugin.data.tasks.load_task`.
        source: as for :func:`~dhrd_plugin.data.triplets.read_triplets`: the training rows.
        split: likewise.
        on_bad: receives each bad row. Default: raise it.
        max_row_bytes: likewise.

    Raises:
        UserError: the rows have fewer than two labels, more than ``MOST``, or numbers to predict.
    """
    if task.labels:
        return task
    where, rows, fitting, typed = open_rows(source, task, split, on_bad, max_row_bytes)
    return with_found_labels(task, task_of_rows(fitting, rows, where, typed, on_bad).labels, where)


def task_of_rows(task: Task, rows: Iterable[Row], where: str, typed: bool = True, on_bad: OnBad = raise_bad) -> Task:
    """The task with the labels of these rows; see :func:`with_labels`. ``where`` is what errors begin with."""
    where = f'{where}: field {task.label}'
    values: dict[tuple[str, Any], Any] = {}
    fields: dict[str, None] = {}
    for value, row in _values(rows, task, typed, on_bad):
        fields.update(dict.fromkeys(row.fields) if not values and len(fields) < MOST else ())
        if value is None:
            continue
        values.setdefault((type(value).__name__, value), value)
        if len(values) > MOST:
            some = ', '.join(spell(value) for value in list(values.values())[:3])
            raise UserError(f'{where}: found more than {MOST:,} labels, such as {some}; expected classes')
    if not values and task.label not in fields:
        raise UserError(f'{where}: is in no row; {nearest(task.label, fields)}')
    return with_found_labels(task, labels_of(values.values(), where, typed), where)


def labels_of(values: Iterable[Any], where: str, typed: bool = True) -> tuple[Label, ...]:
    """Labels in the order of their values, each its own name and answer.

    Args:
        values: distinct texts, whole numbers or truth values.
        where: what errors begin with.
        typed: False for cells of a CSV file, where whole numbers are told by their text. Default: True.
    """
    found = list(values)
    numbers = bool(found) and all(_is_number(value) for value in found)
    fraction = next((value for value in found if isinstance(value, float)), None)
    if numbers and not typed:
        fraction = next((value for value in found if not float(value).is_integer()), None)
        whole = [str(as_whole(value, typed)) for value in found]
        found = list(dict.fromkeys(map(int, whole))) if all(map(_WHOLE.fullmatch, whole)) else found
    if fraction is not None:
        raise UserError(
            f'{where}: found {fraction}, a number to predict; expected classes, which are texts or whole numbers '
            '(or name them in the template, under labels)'
        )
    if len(found) < 2:
        only = f'the label {spell(found[0])} alone' if found else 'no label'
        raise UserError(f'{where}: found {only}; expected two or more')
    found.sort(key=lambda value: (float(value), str(value)) if numbers else (str(value),))
    plain: dict[str, Any] = {}
    for value in found:
        other = plain.setdefault(unicodedata.normalize('NFC', str(as_whole(value, typed)).strip().casefold()), value)
        if other is not value:
            raise UserError(
                f'{where}: found {spell(other)} and {spell(value)}; expected one spelling of a label '
                '(or name both in the template, under labels)'
            )
    return build_labels(found, where)


def _is_number(value: object) -> bool:
    if isinstance(value, str):
        return _NUMBER.fullmatch(value) is not None
    return isinstance(value, int | float) and not isinstance(value, bool)


def _values(rows: Iterable[Row], task: Task, typed: bool, on_bad: OnBad) -> Iterator[tuple[Any, Row]]:
    """Each label of each row, None of a row without; a row that cannot have one goes to ``on_bad``."""
    if on_bad is not raise_bad:  # what is wrong with a row beside its label leaves it out, too
        bare = replace(task, label=_NOWHERE, probabilities=_NOWHERE)
        rows = (row for row, _ in checked_rows(rows, bare, False, typed, on_bad))
    for row in rows:
        with catching_bad(on_bad, row.where, row.fields):
            found = [value for scope in task.scopes(row.fields) for value in task.values(scope, typed) or [None]]
            yield from [(value if value is None else _checked(as_whole(value, True), task), row) for value in found]


def _checked(value: object, task: Task) -> object:
    if not isinstance(value, str | int | float):
        raise BadRow(task.label, f'found {spell(value)}; expected a text, a whole number or true/false')
    if isinstance(value, str) and not value.strip():
        raise BadRow(task.label, 'is empty')
    return value

"""Triplets: reading rows, joining rationales to them, and the paper's controls.

Everything here streams: a file of any size passes through in constant memory, the shuffling
controls aside. A row that does not fit is a ``BadRow``, which names file, line and field; it is
raised, or handed to ``on_bad``, which then stands for setting the row aside.
"""

import json
import random
import sqlite3
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypedDict, cast

from dhrd_plugin.data.rows import MAX_ROW_BYTES, OnBad, raise_bad, read_hub, read_rows, source_file
from dhrd_plugin.data.tasks import BadRow, Task, check_id, check_rationale, check_weight
from dhrd_plugin.errors import UserError

__all__ = ['CONTROLS', 'Triplet', 'apply_control', 'join_rationales', 'read_triplets']


class Triplet(TypedDict):
    """One row as the shards hold it.

    Attributes:
        id: the row's id, unique in its set.
        input_text: what the classifier reads.
        label: the class's name; '' in an unlabelled row.
        answer: the words that stand for the label after ``<ANS>``; '' in an unlabelled row.
        rationale: None (no reasoning loss for this row), a text, or several to draw from. The empty
            text is the control ``OnlyLabel``: the sequence is input, ``<ANS>``, answer.
        weight: the row's weight in the loss, 1.0 by default.
        group: rows of one group count as one for exact match (MultiRC's questions); '' by default.
    """

    id: str
    input_text: str
    label: str
    answer: str
    rationale: str | list[str] | None
    weight: float
    group: str


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
    """Reads triplets from a file, a task's folder or the hub, in the order of the rows.

    Args:
        source (str | Path): a JSON, JSONL, CSV or Parquet file; a folder with one such file for each
            split; or ``hub:``, ``hub:PATH`` or ``hub:PATH:CONFIG`` for a data set of the Hugging
            Face hub (``hub:`` alone takes path and config from the template).
        task (Task): the template that the rows fit.
        rationales (str | Path, optional): a file of rows with an id and a ``rationale``, joined by
            ``join_rationales``. Default: None.
        split (str, optional): train, validation (or val, dev), test; for folders and the hub. Default: None.
        labelled (bool): whether every row must have a label. Default: True.
        on_bad (Callable[[BadRow], None]): receives each bad row, which is then left out. Default: raise it.
        max_row_bytes (int): a longer row is a bad row. Default: 1 MiB.
        report (dict, optional): receives the counts of the join. Default: None.

    Raises:
        UserError: the source is missing, or not of a known kind.
        BadRow: a row does not fit; see ``on_bad``.
    """
    triplets = _from_rows(source, task, split, labelled, on_bad, max_row_bytes)
    if rationales is None:
        return triplets
    options: Any = {'on_bad': on_bad, 'max_row_bytes': max_row_bytes, 'report': report}
    return join_rationales(triplets, rationales, task.id, **options)


def join_rationales(
    triplets: Iterable[Triplet],
    path: str | Path,
    id_field: str = 'idx',
    *,
    on_bad: OnBad = raise_bad,
    max_row_bytes: int = MAX_ROW_BYTES,
    report: dict[str, int] | None = None,
) -> Iterator[Triplet]:
    """Adds the rationales of a file to the triplets of the same id.

    A row of the file holds the id (under ``id_field``, ``id`` or ``idx``), ``rationale`` (a text, or
    a list of several) and perhaps a ``weight``, which becomes the triplet's. A rationale that the
    triplet had already is replaced and counted.

    Args:
        triplets (Iterable[Triplet]): the triplets; they stream through in their order.
        path (str | Path): a JSON, JSONL, CSV or Parquet file.
        id_field (str): the data's id field. Default: ``idx``.
        on_bad (Callable[[BadRow], None]): receives each bad row of the file, and at the end each id that
            matches no triplet. Default: raise it.
        max_row_bytes (int): a longer row is a bad row. Default: 1 MiB.
        report (dict, optional): receives ``rationales``, ``joined``, ``replaced``, ``unmatched`` and
            ``rows_without``. Default: None.
    """
    report = {} if report is None else report
    report.update(rationales=0, joined=0, replaced=0, unmatched=0, rows_without=0)
    table = _Table()
    for row in read_rows(source_file(path), on_bad, max_row_bytes):
        try:
            ident, value = _rationale(row.fields, id_field)
            table.add(ident, row.where, value)
        except BadRow as error:
            on_bad(error.at(row.where, row.fields))
        else:
            report['rationales'] += 1
    for triplet in triplets:
        value = table.take(triplet['id'])
        if value is not None:
            report['joined'] += 1
            report['replaced'] += triplet['rationale'] is not None
            triplet = cast(Triplet, {**triplet, **value})
        report['rows_without'] += triplet['rationale'] is None
        yield triplet
    report['unmatched'] = report['rationales'] - report['joined']
    of_all = f'{report["unmatched"]} of the {report["rationales"]} rationales match none'
    for ident, where in table.left():
        on_bad(BadRow(id_field or 'id', f'{ident!r} matches no row of the data; {of_all}', where))


def _rationale(fields: dict[str, Any], id_field: str) -> tuple[str, dict[str, Any]]:
    """The id of a rationale and what it changes in its triplet."""
    name = next((name for name in (id_field, 'id', 'idx') if name in fields), id_field or 'id')
    ident = check_id(fields.get(name), name)
    rationale = check_rationale(fields.get('rationale'), 'rationale')
    if rationale is None:
        raise BadRow('rationale', 'is missing')
    value: dict[str, Any] = {'rationale': rationale}
    if fields.get('weight') is not None:
        value['weight'] = check_weight(fields['weight'], 'weight', typed=False)
    return ident, value


def _from_rows(
    source: str | Path, task: Task, split: str | None, labelled: bool, on_bad: OnBad, max_bytes: int
) -> Iterator[Triplet]:
    if str(source).startswith('hub:'):
        rows, task, typed = read_hub(str(source), task, split), task.for_hub(), True
    else:
        path = source_file(source, split)
        rows, typed = read_rows(path, on_bad, max_bytes), path.suffix != '.csv'
    seen = _Table()
    for row in rows:
        try:
            triplets = list(task.triplets(row.fields, labelled, typed, row.number))
            for triplet in triplets:
                seen.add(triplet['id'], row.where)
        except BadRow as error:
            on_bad(error.at(row.where, row.fields))
        else:
            yield from triplets


class _Table:
    """Ids on disk: which were seen, where, and with what value. A dict would outgrow the memory."""

    def __init__(self):
        # The empty name is SQLite's own private file, in memory while it is small.
        self.db = sqlite3.connect('', isolation_level=None, check_same_thread=False)
        self.db.execute('CREATE TABLE ids (id TEXT PRIMARY KEY, place TEXT, value TEXT, taken) WITHOUT ROWID')
        self.db.execute('BEGIN')

    def add(self, ident: str, where: str, value: object = None) -> None:
        """Notes an id.

        Raises:
            BadRow: it is there already.
        """
        row = (ident, where, None if value is None else json.dumps(value))
        if not self.db.execute('INSERT OR IGNORE INTO ids VALUES (?, ?, ?, 0)', row).rowcount:
            (first,) = self.db.execute('SELECT place FROM ids WHERE id = ?', (ident,)).fetchone()
            raise BadRow('id', f'{ident!r} stands twice, first in {first}')

    def take(self, ident: str) -> Any:
        """The value of an id, None where there is none; the id is then taken."""
        found = self.db.execute('SELECT value FROM ids WHERE id = ?', (ident,)).fetchone()
        if found is None:
            return None
        self.db.execute('UPDATE ids SET taken = 1 WHERE id = ?', (ident,))
        return json.loads(found[0])

    def left(self) -> Iterator[tuple[str, str]]:
        """The ids that nobody took, with their places."""
        return self.db.execute('SELECT id, place FROM ids WHERE NOT taken')


# ------------------------------------------------------------------------------------------------
# The paper's controls (Table 2)

CONTROLS = ('ConsistentReasoningLabel', 'OnlyLabel', 'ShuffleReasoning', 'ShuffleReasoningLabel')


def apply_control(triplets: Iterable[Triplet], control: str, seed: int = 17) -> Iterator[Triplet]:
    """The triplets as a control of the paper's Table 2 trains on them.

    - ``ConsistentReasoningLabel``: as they are.
    - ``OnlyLabel``: the sequence is input, ``<ANS>``, answer; the rationale becomes the empty text.
    - ``ShuffleReasoning``: another row's rationale, the row's own answer.
    - ``ShuffleReasoningLabel``: another row's rationale and that row's answer; the class, which the
      classification head learns, stays.

    A row never meets its own rationale nor one of the same text. Rows without a rationale take no
    part in the shuffling. The shuffling controls hold all rows in memory.

    Args:
        triplets (Iterable[Triplet]): the triplets.
        control (str): the control's name.
        seed (int): of the shuffling. Default: 17.

    Raises:
        UserError: an unknown control, or more than half of the rationales have the same text.
    """
    if control not in CONTROLS:
        raise UserError(f'unknown control {control!r}; known are {", ".join(CONTROLS)}')
    if control == 'ConsistentReasoningLabel':
        yield from triplets
    elif control == 'OnlyLabel':
        for triplet in triplets:
            yield {**triplet, 'rationale': ''}
    else:
        rows = list(triplets)
        donors = _donors(rows, seed)
        for index, row in enumerate(rows):
            donor = rows[donors.get(index, index)]
            answer = donor['answer'] if control == 'ShuffleReasoningLabel' else row['answer']
            yield {**row, 'rationale': donor['rationale'], 'answer': answer}


def _donors(rows: list[Triplet], seed: int) -> dict[int, int]:
    """For each row with a rationale, the row whose rationale it gets.

    In a random order with equal texts side by side, a shift by the largest group leaves every group.
    """
    groups = _groups(rows)
    order = list(groups)
    random.Random(seed).shuffle(order)
    members: dict[str, list[int]] = {}
    for index in order:
        members.setdefault(groups[index], []).append(index)
    shift = max(map(len, members.values()), default=0)
    if 2 * shift > len(order):
        raise UserError(f'cannot shuffle the rationales: {shift} of {len(order)} rows share one text, so '
                        'that not every row can get another text than its own')  # fmt: skip
    ring = [index for group in members.values() for index in group]
    return dict(zip(ring, ring[shift:] + ring[:shift], strict=True))


def _groups(rows: list[Triplet]) -> dict[int, str]:
    """A group for each row with a rationale; rows that share a text, if by way of others, share it."""
    parent: dict[str, str] = {}

    def find(text: str) -> str:
        while parent.setdefault(text, text) != text:
            text = parent[text]
        return text

    first: dict[int, str] = {}
    for index, row in enumerate(rows):
        texts = row['rationale'] or []
        for text in [texts] if isinstance(texts, str) else texts:
            parent[find(text)] = find(first.setdefault(index, text))
    return {index: find(text) for index, text in first.items()}

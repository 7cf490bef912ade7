"""Texts to classify: plain text, rows of files and shards, here or at an address, by the classifier's own template."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from dhrd_plugin.data.fields import find_id, is_there
from dhrd_plugin.data.inspect import read_shards
from dhrd_plugin.data.rows import (
    BOM,
    SUFFIXES,
    catching_bad,
    check_is_text,
    find_source,
    in_memory,
    kind_of,
    parse_object,
    raise_bad,
    read_rows,
)
from dhrd_plugin.data.tasks import Task
from dhrd_plugin.data.triplet import BadRow, check_cuttable, check_text
from dhrd_plugin.errors import UserError, user_errors
from dhrd_plugin.files import temporary, write_bytes
from dhrd_plugin.streams.index import INDEX
from dhrd_plugin.streams.remote import is_remote, read

TABLES = ('.tsv', '.tab')  # whose lines nobody means as texts, header and all; a CSV file may have tabs, too


class Text(NamedTuple):
    """A text to classify."""

    where: str  # for messages, such as "FILE, line 3"
    id: str | None  # of its row, if that has one
    text: str  # as the model reads it
    cuttable: list[int] | None = None  # [start, end], the characters that may be cut to fit


def read_texts(place: str, task: Task | None) -> Iterator[Text]:
    """Read texts, in constant memory, in the order in which they stand there.

    Args:
        place: a CSV, JSON, JSONL or Parquet file of rows; any other file, with a text or a row as JSON a line; or a
            set of shards. Here or at an address, where a file has one of these suffixes, or ``.txt``.
        task: puts rows, and plain text, into its prompt. Default: None, plain text is taken as it is.

    Raises:
        UserError: nothing is there, or it cannot be read; of a row the error has the place.
    """
    path = Path(find_source(place)).expanduser()
    if is_remote(place) and kind_of(place) in (*SUFFIXES, *TABLES, '.txt'):
        yield from _read_remote(place, task)
    elif is_remote(place) or (path / INDEX).is_file():
        yield from _read_set(place)
    elif path.is_file():
        yield from _read_file(path, task)
    else:
        why = ', a folder without index.json' if path.is_dir() else ''
        raise UserError(f'--input: no such file: {place}{why}')


def check_arguments(texts: Sequence[str], place: str | None) -> None:
    """Refuse arguments of ``dhrd predict`` that can be meant in two ways.

    Args:
        texts: to classify.
        place: of other texts, if there is one.

    Raises:
        UserError: both are given; or all texts are names of places, of which nobody wants to know the class.
    """
    if texts and place is not None:
        raise UserError(f'--input: {place}: found beside texts; expected one or the other')
    if texts and all(os.path.isfile(text) or os.path.isfile(os.path.join(text, INDEX)) for text in texts):
        raise UserError(f'{texts[0]}: found a place that holds texts; expected a text, or --input {texts[0]}')


def read_lines(lines: Iterable[bytes], task: Task | None, where: str) -> Iterator[Text]:
    """Read a text, or a row as JSON, from each line; ``where`` and the line's number name it."""
    for number, line in enumerate(lines, 1):
        line = line.removeprefix(BOM) if number == 1 else line
        place = f'{where}{number}'
        try:
            text = line.removesuffix(b'\n').removesuffix(b'\r').decode()
        except UnicodeDecodeError:
            raise UserError(f'{place}: is not valid UTF-8') from None
        with catching_bad(raise_bad, place):
            if text.lstrip().startswith('{'):
                yield from _from_row(_parse(text), task, place)
            else:
                yield Text(place, None, *_from_plain(text, task))


def texts_of(items: Any, task: Task | None) -> list[Text]:
    """The texts of a list of plain texts or of rows, or of a DataFrame, whose missing cells are missing fields."""
    if isinstance(items, str | bytes | Mapping):
        raise UserError('found one text or row; expected a list of them, or a DataFrame')
    found: list[Text] = []
    for place, item in in_memory(items, 'text'):
        with catching_bad(raise_bad, place):
            if isinstance(item, Mapping):
                found += _from_row(item, task, place)
            else:
                found.append(Text(place, None, *_from_plain(item, task)))
    return found


def as_argument(text: str, task: Task | None) -> str:
    """A text that is in its prompt already, as ``dhrd predict`` takes it: plain where it stays so, else as JSON."""
    with suppress(BadRow):
        if not text.lstrip().startswith('{') and _from_plain(text, task)[0] == text:
            return text
    return json.dumps({'input_text': text}, ensure_ascii=False)


def _read_file(path: Path, task: Task | None) -> Iterator[Text]:
    if kind_of(path) in SUFFIXES:
        for row in read_rows(path):
            with catching_bad(raise_bad, row.where):
                yield from _from_row(row.fields, task, row.where, typed=kind_of(path) != '.csv')
        return
    if kind_of(path) in TABLES:
        raise UserError(f'{path}: unknown kind of file {path.suffix!r}; expected a name that ends in .csv')
    with user_errors(f'--input: {path}', OSError):
        check_is_text(path)
        with path.open('rb') as file:
            yield from read_lines(file, task, f'{path}, line ')


def _read_remote(address: str, task: Task | None) -> Iterator[Text]:
    """The texts of one file, which is kept on this machine while it is read."""
    with temporary() as folder:
        path = folder / address.rpartition('/')[2]
        data = read(address)
        if data is None:
            raise UserError(f'--input: no such file: {address}')
        write_bytes(path, data)
        del data
        try:
            for text in _read_file(path, task):
                yield text._replace(where=text.where.replace(str(path), address))
        except UserError as error:
            raise UserError(str(error).replace(str(path), address)) from None


def _read_set(place: str) -> Iterator[Text]:
    """The texts of shards, which went through the template when they were written."""
    for _, rows in read_shards(place):
        for row in rows:
            where = f'{place}, row {row["id"]}'
            with catching_bad(raise_bad, where):
                text = check_text(row['input_text'], 'input_text')
                yield Text(where, row['id'] or None, text, check_cuttable(row.get('cuttable'), text))


def _parse(line: str) -> Mapping[str, Any]:
    line = line.strip()
    try:
        row, end = parse_object(line)
        if end < len(line):
            raise json.JSONDecodeError('Extra data', line, end)
    except json.JSONDecodeError as error:
        hint = '(a text that begins with { is written as {"input_text": "{..."})'
        raise BadRow('', f'not valid JSON: {error.msg}, column {error.colno} {hint}') from None
    return row


def _from_row(row: Mapping[str, Any], task: Task | None, where: str, typed: bool = True) -> Iterator[Text]:
    """What the template makes of a row; or its ``input_text``, unless it has a field of the prompt."""
    if 'input_text' in row and not (task and any(is_there(row, name) for name in task.fields)):
        text = check_text(row['input_text'], 'input_text')
        cuttable = check_cuttable(row.get('cuttable'), text)
        yield Text(where, find_id(row, task.id if task else ''), text, cuttable)
    elif task is None:
        raise BadRow('', f'found keys {sorted(row)}; expected input_text')
    else:
        for ident, text, cuttable in task.texts(row, typed):
            yield Text(where, ident, check_text(text, ''), cuttable)


def _from_plain(text: str, task: Task | None) -> tuple[str, list[int] | None]:
    """The input text of plain text, which is the only field of the prompt, and what of it may be cut."""
    text = check_text(text, '')
    if task is None:
        return text, None
    if len(task.fields) > 1:
        raise BadRow(
            '',
            f'found plain text; the prompt has the fields {", ".join(task.fields)}: give a row of them as JSON, or '
            'the whole prompt as {"input_text": "..."}',
        )
    return task.fill(text)

"""Rows: of JSON, JSONL, CSV and Parquet files, folders of splits, the Hugging Face hub, and of the memory.

JSONL, CSV and Parquet files of any size stream in constant memory. A row that cannot be read is a
:class:`~dhrd_plugin.data.triplet.BadRow`, which names file, line or row, and field, and is handed to ``on_bad``.
"""

import csv
import itertools
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from dhrd_plugin.data.csv_lines import CsvLines, delimiter_of, header_of
from dhrd_plugin.data.tasks import Task
from dhrd_plugin.data.triplet import BadRow, is_unicode, spell
from dhrd_plugin.errors import UserError, one_line, user_errors

MAX_ROW_BYTES = 1 << 20  # 1 MiB
SPLITS = {'train': ('train',), 'validation': ('validation', 'val', 'dev'), 'test': ('test',)}
SUFFIXES = ('.jsonl', '.json', '.csv', '.parquet')
BOM = b'\xef\xbb\xbf'
MAX_DEPTH = 200  # of values within values in a row; what walks over deeper ones would meet Python's own limit
# How files begin that people take for text, and what to do about them.
NO_TEXT = {
    b'\x1f\x8b': 'is a gzip file; unpack it',
    b'PK\x03\x04': 'is a zip file (or .xlsx); unpack it, or save it as CSV',
    b'\x28\xb5\x2f\xfd': 'is a zstd file; unpack it',
    b'BZh': 'is a bzip2 file; unpack it',
    b'\xfd7zXZ': 'is an xz file; unpack it',
    b'PAR1': 'is a Parquet file; let its name end in .parquet',
    b'\xff\xfe': 'is UTF-16 text; save it as UTF-8',
    b'\xfe\xff': 'is UTF-16 text; save it as UTF-8',
}

OnBad = Callable[[BadRow], None]


def raise_bad(bad: BadRow) -> None:
    """Raise a bad row, the default for ``on_bad``: the first one ends the reading."""
    raise bad


@contextmanager
def catching_bad(on_bad: OnBad, where: str, row: object = None) -> Iterator[None]:
    """Hand a bad row to ``on_bad``, with its place and what it holds; bytes become text."""
    try:
        yield
    except BadRow as error:
        on_bad(error.at(where, row.decode('utf-8', 'backslashreplace') if isinstance(row, bytes) else row))


class Row(NamedTuple):
    """A row of a file."""

    where: str  # for messages, such as "FILE, line 3"
    number: int  # counted from 1
    fields: dict[str, Any]


def kind_of(path: str | Path) -> str:
    """The suffix that says how a file is read, in lower case."""
    return Path(path).suffix.lower()


def find_source(source: str | Path) -> str:
    """A path, or ``sample/NAME``: a file of the triplets that the package ships."""
    path = Path(source)
    shipped = path.parts[:1] == ('sample',) and not path.exists()
    return str(Path(__file__).parent / path if shipped else source)


def source_file(source: str | Path, split: str | None = None) -> Path:
    """The file that ``source`` is, or that holds the split (by any of its names) in the folder that it is."""
    path = Path(find_source(source)).expanduser()
    if path.is_file():
        if split is not None:
            raise UserError(f'{path}: is one file; leave out the split {split!r}, or give its folder')
        return path
    if not path.is_dir():
        raise UserError(f'{path}: {"is neither a file nor a folder" if path.exists() else "no such file or folder"}')
    found = splits_in(path)
    here = ', '.join(found) or 'none'
    if split is None:
        raise UserError(f'{path}: is a folder; name a split (here: {here})')
    name = next((name for name, stems in SPLITS.items() if split in stems), None)
    if name is None:
        raise UserError(f'{path}: unknown split {split!r}; expected one of {", ".join(SPLITS)}')
    if name not in found:
        raise UserError(f'{path}: has no split {name!r} (here: {here})')
    if len(found[name]) > 1:
        raise UserError(f'{path}: split {name!r} is ambiguous: {", ".join(p.name for p in found[name])}')
    return found[name][0]


def splits_in(folder: str | Path) -> dict[str, list[Path]]:
    """The splits of a folder and their files, such as ``{'train': [folder/train.jsonl]}``."""
    files = sorted(path for path in Path(folder).expanduser().iterdir() if kind_of(path) in SUFFIXES)
    found = {name: [path for path in files if path.stem in stems] for name, stems in SPLITS.items()}
    return {name: paths for name, paths in found.items() if paths}


def read_rows(path: Path, on_bad: OnBad = raise_bad, max_bytes: int = MAX_ROW_BYTES) -> Iterator[Row]:
    """Read the rows of a JSONL, JSON (lines or one array, which is held in memory), CSV or Parquet file."""
    kind, max_bytes = kind_of(path), min(max_bytes, 1 << 40)
    if kind not in SUFFIXES:
        raise UserError(f'{path}: unknown kind of file {path.suffix!r}; expected one of {", ".join(SUFFIXES)}')
    with user_errors(path, OSError):
        if kind != '.parquet':
            check_is_text(path)
        if kind in ('.json', '.jsonl') and not _is_array(path):
            yield from _read_lines(path, on_bad, max_bytes)
            return
        read = {'.csv': partial(_read_csv, max_bytes=max_bytes), '.parquet': _read_parquet}.get(kind, _read_array)
        for row in read(path, on_bad):
            text = str(row.fields)  # near enough to its bytes
            if len(text) > max_bytes:
                on_bad(_too_long(max_bytes).at(row.where, text[:max_bytes]))
            else:
                yield row


def check_is_text(path: Path) -> None:
    """Refuse a file that is packed, or text in another encoding than UTF-8, by how it begins."""
    with path.open('rb') as file:
        start = file.read(8)
    for magic, what in NO_TEXT.items():
        if start.startswith(magic):
            raise UserError(f'{path}: {what}')


def _is_array(path: Path) -> bool:
    with path.open('rb') as file:
        return file.read(1024).removeprefix(BOM).lstrip().startswith(b'[')


def _too_long(max_bytes: int) -> BadRow:
    return BadRow('', f'the row is longer than {max_bytes:,} bytes')


# ------------------------------------------------------------------------------------------ JSON


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose keys differ: of two alike Python would take the last, in silence."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise BadRow(_twice(key for key, _ in pairs) or '', 'stands twice in one object')
    return fields


def _twice(names: Iterable[str]) -> str | None:
    """The first name that stood there before."""
    seen: set[str] = set()
    return next((name for name in names if name in seen or seen.add(name)), None)


_DECODER = json.JSONDecoder(object_pairs_hook=_distinct)
_LENIENT = json.JSONDecoder(parse_int=str)  # finds the end of an object that the other one refuses
_NOT_BLANK = re.compile(r'[^ \t\n\r]|\Z')


def parse_object(text: str, start: int = 0) -> tuple[Any, int]:
    """The JSON value that begins at ``start`` and where it ends.

    Raises:
        JSONDecodeError: it breaks JSON's grammar.
        BadRow: it does not, and cannot be a row nevertheless.
    """
    try:
        return _DECODER.raw_decode(text, start)
    except (BadRow, json.JSONDecodeError):
        raise
    except RecursionError:
        raise BadRow('', 'not valid JSON: nested too deeply') from None
    except ValueError as error:  # an integer of more than 4,300 digits
        raise BadRow('', f'not valid JSON: {one_line(error)}') from None


def _read_lines(path: Path, on_bad: OnBad, max_bytes: int) -> Iterator[Row]:
    with path.open('rb') as file:
        for number, line in enumerate(_lines(file, max_bytes), 1):
            where = f'{path}, line {number}'
            line = line.removeprefix(BOM) if number == 1 else line
            if line.strip():
                with catching_bad(on_bad, where, line[:max_bytes]):
                    yield Row(where, number, _parse_line(line, max_bytes))


def _lines(file: BinaryIO, max_bytes: int) -> Iterator[bytes]:
    """The lines; of one that is too long only the start, so that it never fills the memory."""
    limit = max_bytes + len(BOM) + len(b'\r\n')
    while line := file.readline(limit):
        rest = line
        while len(rest) == limit and not rest.endswith(b'\n'):
            rest = file.readline(limit)
        yield line


def _parse_line(line: bytes, max_bytes: int) -> dict[str, Any]:
    if len(line.rstrip(b'\r\n')) > max_bytes:
        raise _too_long(max_bytes)
    # Escaped bytes pass through the parser, so that the error can name the field they stand in.
    text = line.decode('utf-8', 'surrogateescape')
    start, end = 0 if text.startswith('{') else _skip_blank(text, 0), len(text.rstrip())
    try:
        row, at = parse_object(text, start)
        if at < end:
            raise json.JSONDecodeError('Extra data', text, _skip_blank(text, at))
    except json.JSONDecodeError as error:
        more = '' if line.endswith(b'\n') else '; the file breaks off in this row'
        if line.endswith(b'\n') and text.startswith('{', start) and error.pos >= end:
            more = '; the object goes on in the next line; expected a whole row a line, or one array of rows'
        reason = f'not valid JSON: {error.msg}, column {error.colno}{more}'
        keys = re.findall(r'"([^"\\]*)"\s*:', text[: error.pos])
        raise BadRow(keys[-1] if keys else '', reason) from None
    return _checked(row, text)


def _checked(row: Any, text: str) -> dict[str, Any]:
    """``row`` if it is a dict, not too deep, whose text was valid UTF-8."""
    if not isinstance(row, dict):
        raise BadRow('', f'found {spell(row)}; expected an object of fields')
    if _is_deep(row):
        raise BadRow('', 'not valid JSON: nested too deeply')
    if not is_unicode(text):
        spelled = {key: json.dumps([key, value], ensure_ascii=False) for key, value in row.items()}
        raise BadRow(next((key for key in row if not is_unicode(spelled[key])), ''), 'is not valid UTF-8')
    return row


def _is_deep(row: dict[str, Any]) -> bool:
    level = [item for item in row.values() if isinstance(item, (dict, list))]
    for _ in range(MAX_DEPTH):
        if not level:
            return False
        inner = [item.values() if isinstance(item, dict) else item for item in level]
        level = [item for items in inner for item in items if isinstance(item, (dict, list))]
    return True


def _read_array(path: Path, on_bad: OnBad) -> Iterator[Row]:
    """The rows of one array, parsed an item at a time: an error has its row, and the next can be read."""
    text = path.read_bytes().removeprefix(BOM).decode('utf-8', 'surrogateescape')
    try:
        at = _skip_blank(text, text.index('[') + 1)
        for number in itertools.count(1):
            if text[at : at + 1] == ']' and number == 1:
                break
            where, start = f'{path}, row {number}', at
            try:
                row, at = parse_object(text, start)
                bad = None
            except BadRow as error:
                row, bad = None, error
                at = _end_of(text, start, path)
            with catching_bad(on_bad, where, row if bad is None else text[start:at][:MAX_ROW_BYTES]):
                if bad is not None:
                    raise bad
                yield Row(where, number, _checked(row, text[start:at]))
            at = _skip_blank(text, at)
            if text[at : at + 1] == ']':
                break
            if text[at : at + 1] != ',':
                raise json.JSONDecodeError("Expecting ',' delimiter", text, at)
            at = _skip_blank(text, at + 1)
        if (rest := _skip_blank(text, at + 1)) < len(text):
            raise json.JSONDecodeError('Extra data', text, rest)
    except json.JSONDecodeError as error:
        end = '; the file breaks off there' if error.pos >= len(text.rstrip()) else ''
        raise BadRow('', f'not valid JSON: {error}{end}', str(path)) from None


def _end_of(text: str, start: int, path: Path) -> int:
    try:
        return _LENIENT.raw_decode(text, start)[1]
    except RecursionError:
        raise BadRow('', 'not valid JSON: nested too deeply', str(path)) from None


def _skip_blank(text: str, at: int) -> int:
    return _NOT_BLANK.search(text, at).start()  # pyright: ignore[reportOptionalMemberAccess]


# ------------------------------------------------------------------------------------------- CSV


def _read_csv(path: Path, on_bad: OnBad, max_bytes: int) -> Iterator[Row]:
    """The rows under a CSV file's header, whose cells stand apart by what the header has most of; an empty one is None.

    Where a quote is out of place nobody can tell the inside of a cell from a new row, so that such a row
    ends the reading, even where bad rows are set aside.
    """
    header: list[str] = []
    number = 0
    with path.open(encoding='utf-8-sig', errors='surrogateescape', newline='') as file:
        delimiter = delimiter_of(header_of(file, max_bytes))
        file.seek(0)
        lines = CsvLines(file, max_bytes, delimiter)
        try:
            for cells in lines:
                where = f'{path}, line {lines.first}'
                if not header:
                    header = _check_header(cells, where)
                    continue
                number += 1
                with catching_bad(on_bad, where, cells):
                    if cells is None:
                        raise _too_long(max_bytes)
                    if cells and len(cells) != len(header):
                        raise BadRow('', f'{len(cells)} cells where the header has {len(header)}')
                    fields = _checked(dict(zip(header, cells, strict=False)), ''.join(cells))
                    if cells:
                        yield Row(where, number, {key: cell or None for key, cell in fields.items() if key or cell})
        except csv.Error as error:
            reason = f'not valid CSV: {error}; no row after it can be told from the inside of a cell'
            raise BadRow('', reason, f'{path}, line {lines.first}') from None


def _check_header(cells: list[str] | None, where: str) -> list[str]:
    """The names of a CSV file's columns; only nameless ones may be alike, which spreadsheets add at the end."""
    if cells is None or not is_unicode(''.join(cells)):
        raise BadRow('', 'the header is no line of names in UTF-8', where)
    if name := _twice(filter(None, cells)):
        raise BadRow(name, 'stands twice in the header', where)
    return cells


# --------------------------------------------------------------------------------------- Parquet


def _read_parquet(path: Path, on_bad: OnBad) -> Iterator[Row]:
    import pyarrow as pa
    from pyarrow.parquet import ParquetFile

    with user_errors(f'{path}: not a whole Parquet file', pa.ArrowException, OSError):
        file = ParquetFile(path)
        if name := _twice(file.schema_arrow.names):
            raise BadRow(name, 'stands twice among the columns', str(path))
        batches = file.iter_batches(batch_size=1024)
        rows = (batch.slice(index, 1) for batch in batches for index in range(batch.num_rows))
        for number, row in enumerate(rows, 1):
            where = f'{path}, row {number}'
            with catching_bad(on_bad, where):
                yield Row(where, number, _fields_of(row))


def _fields_of(row: Any) -> dict[str, Any]:
    """A row of a Parquet file as Python's values, which hold less than its own: no date beyond the year 9999."""
    fields = {}
    for name, column in zip(row.schema.names, row.columns, strict=True):
        try:
            (fields[name],) = column.to_pylist()
        except UnicodeDecodeError:
            raise BadRow(name, 'is not valid UTF-8') from None
        except (ValueError, OverflowError) as error:
            raise BadRow(name, f'has no value in Python: {one_line(error)}') from None
    return fields


def read_hub(source: str, task: Task, split: str | None) -> Iterator[Row]:
    """Read the rows of a data set of the Hugging Face hub; what ``hub:PATH:CONFIG`` leaves out is the template's.

    Where the hub stores class labels as numbers, they are told by name, see :func:`name_classes`.
    """
    from datasets import load_dataset

    path, _, config = source.removeprefix('hub:').partition(':')
    path, config = path or task.hub.get('path', ''), config or task.hub.get('config')
    if not path:
        raise UserError(f'task {task.name}: names no hub data set; write hub:PATH or hub:PATH:CONFIG')
    if split is None:
        raise UserError(f'{source}: is a hub data set; name a split ({", ".join(SPLITS)})')
    split = next((name for name, stems in SPLITS.items() if split in stems), split)
    with user_errors(f'{source}: cannot load {path!r}, config {config!r}, split {split!r}'):
        data: Any = load_dataset(path, config, split=split)
    for number, fields in enumerate(name_classes(data, data.features, task.for_hub()), 1):
        yield Row(f'{source}, row {number}', number, fields)


def name_classes(rows: Iterable[dict[str, Any]], features: Any, task: Task) -> Iterator[dict[str, Any]]:
    """Rows with classes in the place of their numbers, where the label is a ``ClassLabel`` of ``datasets``, or several.

    A class is the value that the template gives the one of that name, else the name; of -1, which means unlabelled,
    there is none. Where the template names other classes, by the same numbers, these stay.

    Args:
        rows: of plain values.
        features: those of the rows' ``datasets.Dataset``, or None.
        task: the template.
    """
    feature = features.get(task.label) if isinstance(features, Mapping) else None
    feature = feature[0] if isinstance(feature, list) else getattr(feature, 'feature', feature)  # of several labels
    names = getattr(feature, 'names', None)
    if type(feature).__name__ != 'ClassLabel' or not names:
        yield from rows
        return
    known = {label.name: label.value for label in task.labels}
    values: dict[Any, Any] = {index: known.get(name, name) for index, name in enumerate(names)}
    if known.keys().isdisjoint(names) and known and all(index in known.values() for index in values):
        values = {}
    values[-1] = None
    for row in rows:
        found = row.get(task.label)
        if isinstance(found, list):
            several = [values.get(index, index) for index in found]
            yield {**row, task.label: None if several == [None] else several}
        else:
            yield {**row, task.label: values.get(found, found)}


# ---------------------------------------------------------------------------------------- memory


def in_memory(items: Any, what: str) -> Iterator[tuple[str, Any]]:
    """Each text or row of a list, a DataFrame or a ``datasets.Dataset`` as a file would give it, behind its place.

    Args:
        items: the texts or rows.
        what: what the places call an item: ``row`` gives "row 1".
    """
    if hasattr(items, 'notna') and hasattr(items, 'columns'):  # pandas'
        if name := _twice(map(str, items.columns)):
            raise BadRow(name, 'stands twice among the columns', 'DataFrame')
        items = items.to_dict('records')
    for number, item in enumerate(items, 1):
        where = f'{what} {number}'
        with catching_bad(raise_bad, where):
            try:
                yield where, plain(item)
            except RecursionError:
                raise BadRow('', 'is nested too deeply') from None


def plain(value: Any) -> Any:
    """A value as JSON has it: of Python's own types, keys are texts, and NaN, NaT and NA are None."""
    if hasattr(value, 'tolist'):  # NumPy's
        value = value.tolist()
    if isinstance(value, Mapping):
        return _distinct([(str(key), plain(item)) for key, item in value.items()])
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    missing = type(value).__name__ in ('NAType', 'NaTType') or (isinstance(value, float) and math.isnan(value))
    return None if missing else value

"""Rows: reading JSON, JSONL, CSV and Parquet files, folders of splits, and the Hugging Face hub.

Files stream: JSONL, CSV and Parquet of any size pass through in constant memory. A row that cannot be
read is a ``BadRow``, which names file, line and field and is handed to ``on_bad``.
"""

import csv
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from dhrd_plugin.data.tasks import BadRow, Task, is_unicode
from dhrd_plugin.errors import UserError

__all__ = ['MAX_ROW_BYTES', 'SPLITS', 'OnBad', 'Row', 'raise_bad', 'read_hub', 'read_rows', 'source_file', 'splits_in']

MAX_ROW_BYTES = 1 << 20  # 1 MiB
SPLITS = {'train': ('train',), 'validation': ('validation', 'val', 'dev'), 'test': ('test',)}
SUFFIXES = ('.jsonl', '.json', '.csv', '.parquet')
BOM = b'\xef\xbb\xbf'

OnBad = Callable[[BadRow], None]


def raise_bad(bad: BadRow) -> None:
    """The default for ``on_bad``: the first bad row ends the reading."""
    raise bad


class Row(NamedTuple):
    """A row of a file: its place for messages ('file, line 3'), its number from 1, its fields."""

    where: str
    number: int
    fields: dict[str, Any]


def source_file(source: str | Path, split: str | None = None) -> Path:
    """The one file that ``source`` and ``split`` name.

    Raises:
        UserError: nothing is there, the split is missing or ambiguous, or a file was given a split.
    """
    path = Path(source).expanduser()
    if path.is_file():
        if split is not None:
            raise UserError(f'{path}: is one file; leave out the split {split!r}, or give its folder')
        return path
    if not path.is_dir():
        raise UserError(f'{path}: no such file or folder')
    found = splits_in(path)
    here = ', '.join(found) or 'none'
    if split is None:
        raise UserError(f'{path}: is a folder; name a split (here: {here})')
    name = next((name for name, stems in SPLITS.items() if split in stems), None)
    if name is None:
        raise UserError(f'{path}: unknown split {split!r}; splits are {", ".join(SPLITS)}')
    if name not in found:
        raise UserError(f'{path}: has no split {name!r} (here: {here})')
    if len(found[name]) > 1:
        raise UserError(f'{path}: split {name!r} is ambiguous: {", ".join(p.name for p in found[name])}')
    return found[name][0]


def splits_in(folder: str | Path) -> dict[str, list[Path]]:
    """The splits of a folder and their files, such as ``{'train': [folder/train.jsonl]}``."""
    files = sorted(path for path in Path(folder).expanduser().iterdir() if path.suffix in SUFFIXES)
    found = {name: [path for path in files if path.stem in stems] for name, stems in SPLITS.items()}
    return {name: paths for name, paths in found.items() if paths}


def read_rows(path: Path, on_bad: OnBad = raise_bad, max_bytes: int = MAX_ROW_BYTES) -> Iterator[Row]:
    """The rows of a file.

    Args:
        path (Path): a JSONL, JSON (lines or one array, which is held in memory), CSV or Parquet file.
        on_bad (Callable[[BadRow], None]): receives each row that cannot be read. Default: raise it.
        max_bytes (int): a longer row is a bad row. Default: 1 MiB.
    """
    if path.suffix not in SUFFIXES:
        raise UserError(f'{path}: unknown kind of file {path.suffix!r}; known are {", ".join(SUFFIXES)}')
    if path.suffix in ('.json', '.jsonl') and not _is_array(path):
        yield from _read_lines(path, on_bad, max_bytes)
        return
    read = {'.csv': _read_csv, '.parquet': _read_parquet}.get(path.suffix, _read_array)
    for row in read(path, on_bad):
        text = str(row.fields)  # near enough to its bytes
        if len(text) > max_bytes:
            on_bad(_too_long(max_bytes).at(row.where, text[:max_bytes]))
        else:
            yield row


def _is_array(path: Path) -> bool:
    with path.open('rb') as file:
        return file.read(1024).removeprefix(BOM).lstrip().startswith(b'[')


def _too_long(max_bytes: int) -> BadRow:
    return BadRow('', f'the row is longer than {max_bytes:,} bytes')


def _read_lines(path: Path, on_bad: OnBad, max_bytes: int) -> Iterator[Row]:
    with path.open('rb') as file:
        for number, line in enumerate(_lines(file, max_bytes), 1):
            where = f'{path}, line {number}'
            line = line.removeprefix(BOM) if number == 1 else line
            if not line.strip():
                continue
            try:
                row = Row(where, number, _parse_line(line, max_bytes))
            except BadRow as error:
                on_bad(error.at(where, line[:max_bytes].decode('utf-8', 'backslashreplace')))
            else:
                yield row


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
    try:
        row = json.loads(text)
    except json.JSONDecodeError as error:
        end = '' if line.endswith(b'\n') else '; the file breaks off in this row'
        reason = f'not valid JSON: {error.msg}, column {error.colno}{end}'
        raise BadRow(_last_key(text[: error.pos]), reason) from None
    except RecursionError:
        raise BadRow('', 'not valid JSON: nested too deeply') from None
    return _checked(row, text)


def _last_key(text: str) -> str:
    keys = re.findall(r'"([^"\\]*)"\s*:', text)
    return keys[-1] if keys else ''


def _checked(row: Any, text: str = '') -> dict[str, Any]:
    """``row`` if it is a dict whose text was valid UTF-8."""
    if not isinstance(row, dict):
        raise BadRow('', f'{type(row).__name__} where an object of fields belongs')
    if not is_unicode(text):
        spelled = {key: json.dumps([key, value], ensure_ascii=False) for key, value in row.items()}
        raise BadRow(next((key for key in row if not is_unicode(spelled[key])), ''), 'is not valid UTF-8')
    return row


def _read_array(path: Path, on_bad: OnBad) -> Iterator[Row]:
    """The rows of one JSON array, parsed one at a time so that each has its line."""
    text = path.read_bytes().removeprefix(BOM).decode('utf-8', 'surrogateescape')
    decode, position, line, number = json.JSONDecoder().raw_decode, text.index('[') + 1, 1, 0
    while True:
        start = _skip(text, position)
        line, number = line + text.count('\n', position, start), number + 1
        where = f'{path}, line {line}'
        if text[start : start + 1] == ']' and number == 1:
            return
        try:
            row, position = decode(text, start)
        except (json.JSONDecodeError, RecursionError) as error:
            # What follows a broken item cannot be told from it: there is no next row to go on with.
            raise BadRow('', f'not valid JSON: {error}', where) from None
        try:
            fields = _checked(row, text[start:position])
        except BadRow as error:
            on_bad(error.at(where, row))
        else:
            yield Row(where, number, fields)
        line += text.count('\n', start, position)
        end = _skip(text, position)
        if text[end : end + 1] not in (',', ']'):
            raise BadRow('', 'not valid JSON: the array breaks off after this row', where)
        if text[end] == ']':
            return
        line, position = line + text.count('\n', position, end), end + 1


def _skip(text: str, position: int) -> int:
    """The next position that is no white space."""
    return re.compile(r'\s*').match(text, position).end()  # pyright: ignore[reportOptionalMemberAccess]


def _read_csv(path: Path, on_bad: OnBad) -> Iterator[Row]:
    """The rows under a CSV file's header; an empty cell is a missing field."""
    with path.open(encoding='utf-8-sig', errors='surrogateescape', newline='') as file:
        reader = csv.reader(file, strict=True)
        header, number = next(reader, []), 0
        while True:
            number, where = number + 1, f'{path}, line {reader.line_num + 1}'
            try:
                cells = next(reader, None)
                if cells is None:
                    return
                if cells and len(cells) != len(header):
                    raise BadRow('', f'{len(cells)} cells where the header has {len(header)}')
                fields = _checked(dict(zip(header, cells, strict=False)), ''.join(cells))
            except csv.Error as error:
                on_bad(BadRow('', f'not valid CSV: {error}', where))
            except BadRow as error:
                on_bad(error.at(where))
            else:
                if cells:
                    yield Row(where, number, {key: cell for key, cell in fields.items() if cell})


def _read_parquet(path: Path, on_bad: OnBad) -> Iterator[Row]:
    import pyarrow as pa
    from pyarrow.parquet import ParquetFile

    number = 0
    try:
        for batch in ParquetFile(path).iter_batches(batch_size=1024):
            for index in range(batch.num_rows):
                number += 1
                where = f'{path}, row {number}'
                try:
                    (fields,) = batch.slice(index, 1).to_pylist()
                except UnicodeDecodeError:
                    on_bad(BadRow(_broken_column(batch.slice(index, 1)), 'is not valid UTF-8', where))
                else:
                    yield Row(where, number, fields)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f'{path}: not a whole Parquet file: {str(error).splitlines()[0]}') from None


def _broken_column(row: Any) -> str:
    for name, column in zip(row.schema.names, row.columns, strict=True):
        try:
            column.to_pylist()
        except UnicodeDecodeError:
            return name
    return ''


def read_hub(source: str, task: Task, split: str | None) -> Iterator[Row]:
    """The rows of a data set of the Hugging Face hub, by ``datasets``.

    Args:
        source (str): ``hub:``, ``hub:PATH`` or ``hub:PATH:CONFIG``; what is left out is the template's.
        task (Task): the template. Where the hub stores class labels as numbers, a row gets the value
            that the template gives the class of that name, and none for -1, the hub's "unlabelled".
        split (str): train, validation or test.

    Raises:
        UserError: there is no such data set, or it cannot be reached.
    """
    from datasets import ClassLabel, load_dataset

    path, _, config = source.removeprefix('hub:').partition(':')
    path, config = path or task.hub.get('path', ''), config or task.hub.get('config')
    if not path:
        raise UserError(f'task {task.name}: names no hub data set; write hub:PATH or hub:PATH:CONFIG')
    if split is None:
        raise UserError(f'{source}: is a hub data set; name a split ({", ".join(SPLITS)})')
    split = next((name for name, stems in SPLITS.items() if split in stems), split)
    try:
        data: Any = load_dataset(path, config, split=split)
    except Exception as error:  # of many kinds, by storage, network and format
        what = f'{path!r}, config {config!r}, split {split!r}'
        raise UserError(f'{source}: cannot load {what}: {" ".join(str(error).split())[:300]}') from None
    label = task.for_hub().label
    feature = data.features.get(label)
    values = {item.name: item.value for item in task.labels}
    for number, fields in enumerate(data, 1):
        if isinstance(feature, ClassLabel):
            index = fields[label]
            name = '' if index in (None, -1) else feature.names[index]
            fields = {**fields, label: values.get(name, name or None)}
        yield Row(f'{source}, row {number}', number, fields)

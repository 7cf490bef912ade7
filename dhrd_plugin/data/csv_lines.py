"""The rows of a CSV file, cut right however long a row is."""

import csv
import re
from collections.abc import Iterator
from typing import TextIO

DELIMITERS = ',;\t|'
# Where in a row a text ends: before a cell, in a plain one, in a quoted one, after a quote in that.
_START, _PLAIN, _QUOTED, _QUOTE = range(4)


def header_of(file: TextIO, max_chars: int) -> str:
    """The first row that is not empty, as text; inside quotes it may have several lines."""
    header = ''
    while len(header) < max_chars and (line := file.readline(max_chars)):
        header += line
        if header.strip('\r\n') and header.count('"') % 2 == 0:
            break
    return header


def delimiter_of(header: str) -> str:
    """What stands between the cells of a header: a comma, or what stands there more often, outside quotes."""
    bare = re.sub(r'"[^"]*("|$)', '', header)
    return max(DELIMITERS, key=bare.count)  # of two as frequent the first


class CsvLines:
    """Yields the cells of each row; ``None`` for one of more than so many characters, which are not held in memory.

    ``csv.reader`` alone would begin the next row inside a cell of the one that it gave up.

    Args:
        file: opened with ``newline=''``.
        max_chars: of a row.
        delimiter: what stands between cells. Default: a comma.

    Raises:
        csv.Error: a quote is out of place, or the last one is missing: where the next row begins is unknown.
    """

    def __init__(self, file: TextIO, max_chars: int, delimiter: str = ','):
        self.delimiter = delimiter
        self.file, self.limit = file, max_chars + len('\r\n')
        self.first = 0  # the number of the row's first line, from 1
        self._count = self._size = 0  # of the lines so far; of the row's characters
        self._line, self._quoted = '', False

    def __iter__(self) -> Iterator[list[str] | None]:
        csv.field_size_limit(max(csv.field_size_limit(), self.limit))
        reader = csv.reader(self._lines(), delimiter=self.delimiter, strict=True)
        while True:
            self.first, self._size = self._count + 1, 0
            try:
                yield next(reader)
            except StopIteration:
                return
            except _LongRow:
                reader = csv.reader(self._lines(), delimiter=self.delimiter, strict=True)
                self._skip()
                yield None

    def _lines(self) -> Iterator[str]:
        while line := self.file.readline(self.limit + 1):
            self._line, self._quoted = line, self._size > 0  # only inside quotes does a row have another line
            self._count, self._size = self._count + 1, self._size + len(line)
            if self._size > self.limit:
                raise _LongRow
            yield line

    def _skip(self) -> None:
        """Read on to the end of the row."""
        line, state = self._line, _QUOTED if self._quoted else _START
        while line:
            state, whole = _state_after(line, state, self.delimiter), line.endswith(('\n', '\r'))
            if whole and state != _QUOTED:
                place = self.file.tell()
                if line.endswith('\r') and self.file.read(1) != '\n':  # the limit may have cut a line end in two
                    self.file.seek(place)
                return
            line = self.file.readline(self.limit)
            self._count += whole
        if state == _QUOTED:
            raise csv.Error('unexpected end of data')


class _LongRow(Exception):
    """A row is longer than it may be."""


def _state_after(text: str, state: int, delimiter: str) -> int:
    at = 0
    while at < len(text):
        if state == _QUOTED:
            at = text.find('"', at) + 1
            if not at:
                return _QUOTED
            state = _QUOTE
        elif state == _PLAIN:
            at = text.find(delimiter, at) + 1
            if not at:
                return _PLAIN
            state = _START
        elif text[at] == '"':  # the first of a cell, or the second of two that stand for one
            state, at = _QUOTED, at + 1
        elif state == _QUOTE and text[at] not in f'{delimiter}\r\n':
            raise csv.Error(f"'{delimiter}' expected after '\"'")
        else:
            state = _PLAIN
    return state

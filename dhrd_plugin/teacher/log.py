"""The JSONL files that a teacher's answers go to, which a second start continues."""

import fcntl
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dhrd_plugin import files
from dhrd_plugin.data.triplet import Triplet, fingerprint
from dhrd_plugin.errors import UserError, user_errors


class RowLog:
    """A JSONL file that is only appended to, by one process at a time, one whole line a write.

    Opening it reads its rows: ``rows`` is what ``keep`` makes of each, by ``idx``. A last line that a kill
    tore is cut off (``torn`` bytes), one that only lacks its newline is completed; any other file is refused
    untouched.
    """

    def __init__(self, path: Path, keep: Callable[[dict[str, Any]], Any]):
        self.path, self.keep = path, keep
        with user_errors(path, OSError):
            self.file = open(path, 'a+b', buffering=0)  # noqa: SIM115
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self.file.close()
            raise UserError(f'{path}: another process is writing to it; name another file') from error
        self.rows, end = read_log(path, keep)
        self.torn = os.path.getsize(path) - end
        if self.torn:
            self.file.truncate(end)
        elif end and os.pread(self.file.fileno(), 1, end - 1) != b'\n':
            self.file.write(b'\n')

    def append(self, row: dict[str, Any]) -> None:
        """Write one row and wait until it is on the disk."""
        line = files.json_line(row)
        with user_errors(self.path, OSError):
            if self.file.write(line) != len(line):
                raise UserError(f'{self.path}: cannot be written: the disk took only a part of a row')
            os.fsync(self.file.fileno())
        self.rows[row['idx']] = self.keep(row)

    def keep_only(self, wanted: Callable[[str], bool]) -> None:
        """Rewrite the file, in one step, with some of its rows, which ``keep`` kept whole. Only to be closed then."""
        with user_errors(self.path, OSError):
            files.write_bytes(
                self.path, b''.join(files.json_line(row) for idx, row in self.rows.items() if wanted(idx))
            )

    def close(self) -> None:
        """Close the file; an empty one is removed."""
        if not os.path.getsize(self.path):
            self.path.unlink()
        self.file.close()


def read_log(path: Path, keep: Callable[[dict[str, Any]], Any]) -> tuple[dict[str, Any], int]:
    """The ``rows`` of a :class:`RowLog`'s file, and where its last whole line ends, in bytes."""
    rows: dict[str, Any] = {}
    end = 0
    if not path.exists():
        return rows, end
    with open(path, 'rb') as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
                rows[str(row['idx'])] = keep(row)
            except (ValueError, TypeError, KeyError) as error:
                # A write that was cut short leaves the beginning of a line of ours, never anything else.
                if not line.endswith(b'\n') and line.startswith(b'{"idx": '[: len(line)]):
                    break
                raise UserError(f'{path}, line {number}: not a row of this program; name another file') from error
            end += len(line)
    return rows, end


def known(row: dict[str, Any]) -> str | None:
    """What to remember of a row with a rationale or votes: its ``fingerprint``; ``None`` where it has none."""
    if not (row['rationale'] or row['probabilities']):
        raise ValueError('no rationale')
    return row.get('input')


def rejected(row: dict[str, Any]) -> dict[str, Any]:
    """A row that was set aside, whole: any other is none of ours to rewrite."""
    if not {'reason', 'unanswered'} <= row.keys():
        raise ValueError('no reason')
    return row


def is_open(triplet: Triplet, done: Mapping[str, str | None], aside: Mapping[str, str | None], votes: int = 0) -> bool:
    """Whether a row has no rationale yet and was not set aside as it is now; each holds fingerprints by ``idx``.

    A rationale (``done``) for another text is another file's, and refused; a row that was set aside with
    another text may have been mended since.
    """
    ident, made = triplet['id'], (None, fingerprint(triplet, votes))
    if ident not in done:
        return ident not in aside or aside[ident] not in made
    if done[ident] not in made:
        raise UserError(
            f'idx {ident!r}: the output holds a rationale of this id for another text or answer, or other votes; '
            'other data needs another --output'
        )
    return False

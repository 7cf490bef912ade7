"""Streaming's ``index.json``, which describes a shard set, and the checks of files against it.

An index may come from anybody: no name in it is joined to a path, and no number in it is believed, before
:func:`parse_index` has seen it. All readers go through it.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from dhrd_plugin.errors import UserError, one_line, user_errors

INDEX = 'index.json'
SUMMARY = 'triplets.json'  # beside the index, only where a set was written: never in a cache
LOCK = '.lock'  # of a cache
REQUIRED_COLUMNS = ('id', 'input_text', 'label')
FILES = ('raw_data', 'zip_data', 'raw_meta', 'zip_meta')


def parse_index(data: bytes, where: str | Path) -> list[dict[str, Any]]:
    """The entries of an ``index.json``, one for each shard, with all that Streaming's readers look up there.

    An index that names a file outside its folder, or one of the folder's own files, is refused.
    """
    from streaming.base.format import reader_from_json

    problem = f'{where}: is not an index of shards'
    with user_errors(problem, kind=True):
        index = json.loads(data)
        readers = [reader_from_json('', None, entry) for entry in index['shards']]
        if index['version'] != 2 or not readers:
            raise UserError(f'{problem} of version 2')
    for reader, entry in zip(readers, index['shards'], strict=True):
        for file in (file for raw, packed in reader.file_pairs for file in (raw, packed or raw)):
            _check_file(file, problem, where)
        # A sample takes at least a byte: what says more would have Streaming plan for rows that are nowhere.
        most = sum(raw.bytes for raw, _ in reader.file_pairs)
        if not (_is_count(reader.samples) and reader.samples <= most):
            raise UserError(f'{problem}: found {reader.samples!r} samples; expected a number, at most one a byte')
        names = column_names(entry)
        if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
            raise UserError(f'{problem}: found columns {one_line(names, 80)}; expected a list of names')
    return index['shards']


def _check_file(file: Any, problem: str, where: str | Path) -> None:
    name, hashes = (getattr(file, key, None) for key in ('basename', 'hashes'))
    good = isinstance(name, str) and _is_count(getattr(file, 'bytes', None)) and isinstance(hashes, dict)
    if not (good and name and name.isprintable()):
        raise UserError(f'{problem}: found {one_line(file, 200)}; expected a file with basename, bytes and hashes')
    path = PurePosixPath(name)
    if path.is_absolute() or '..' in path.parts:
        raise UserError(f'{where}: names a file outside its folder: {name}')
    if not path.name or path.name in (INDEX, SUMMARY, LOCK):
        raise UserError(f'{where}: found {name!r} among the shards; expected the name of a file of rows')


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def column_names(entry: Mapping[str, Any]) -> Any:
    """The columns of a shard, as the index has them."""
    return entry.get('column_names') or list(entry.get('columns') or ())


def stored_files(entry: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The files of a shard, raw and compressed, as the index describes them."""
    return [entry[kind] for kind in FILES if entry.get(kind)]


def names_in(entries: Iterable[Mapping[str, Any]]) -> set[str]:
    """The names of all files of some shards."""
    return {file['basename'] for entry in entries for file in stored_files(entry)}


def file_names(data: bytes | None) -> set[str]:
    """The names of all files in an ``index.json``; empty where there is no index, or an unreadable one."""
    try:
        return names_in(parse_index(data or b'', INDEX))
    except UserError:
        return set()


def check_inside(folder: Path, names: Iterable[str]) -> None:
    """Refuse files that a symbolic link in ``folder`` takes outside it, as they are written and removed there.

    A file may be a link itself: writing and removing it reach the link alone.
    """
    root = folder.resolve()
    for parent in {PurePosixPath(name).parent for name in names}:
        if not (root / parent).resolve().is_relative_to(root):
            raise UserError(f'{folder / parent}: is a link to outside of the shard set; expected a folder')


def check_columns(entries: Sequence[Mapping[str, Any]], where: str) -> None:
    """Refuse shards that do not hold triplets."""
    for entry in entries:
        names = column_names(entry)
        for name in REQUIRED_COLUMNS:
            if name not in names:
                raise UserError(f'{where}: found columns {sorted(names)}; expected triplets, with a column {name!r}')


def check_size(size: int, file: Mapping[str, Any], where: str | Path) -> None:
    """Compare the size of a file, in bytes, with its entry in the index."""
    if size != file['bytes']:
        raise UserError(f'{where}: is damaged: {size:,} bytes where the index says {file["bytes"]:,}')


def check_bytes(data: bytes, file: Mapping[str, Any], where: str | Path) -> None:
    """Compare the bytes of a file with its entry in the index: the size and every hash."""
    from streaming.base.hashing import get_hash, is_hash

    check_size(len(data), file, where)
    for name, expected in file['hashes'].items():
        if not is_hash(name):
            raise UserError(f'{where}: the index holds an unknown hash {name!r}')
        found = get_hash(name, data)
        if found != expected:
            raise UserError(f'{where}: is damaged: its {name} is {found}, the index says {one_line(expected, 80)}')

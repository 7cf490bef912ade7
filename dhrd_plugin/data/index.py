"""Streaming's ``index.json``, which says what a set of shards is, and what is checked against it."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from dhrd_plugin.errors import UserError

__all__ = ['INDEX', 'check_bytes', 'check_columns', 'parse_index', 'stored_files']

INDEX = 'index.json'
REQUIRED_COLUMNS = ('id', 'input_text', 'label')


def parse_index(data: bytes, where: str | Path) -> list[dict[str, Any]]:
    """The entries of an ``index.json``, one for each shard.

    Raises:
        UserError: it is no index, or names a file outside of its folder.
    """
    try:
        index = json.loads(data)
        entries = index['shards']
        names = [str(file['basename']) for entry in entries for file in stored_files(entry)]
        whole = index['version'] == 2 and all(isinstance(entry['samples'], int) for entry in entries)
    except (ValueError, KeyError, TypeError):
        whole, entries, names = False, [], []
    if not whole or not entries:
        raise UserError(f'{where}: is no index of shards')
    for name in names:
        path = PurePosixPath(name)
        if path.is_absolute() or '..' in path.parts:
            raise UserError(f'{where}: names a file outside of its folder: {name}')
    return entries


def stored_files(entry: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The files of a shard, raw and compressed, as the index describes them."""
    return [entry[kind] for kind in ('raw_data', 'zip_data', 'raw_meta', 'zip_meta') if entry.get(kind)]


def check_columns(entries: Sequence[Mapping[str, Any]], where: str) -> None:
    """Refuse shards that do not hold triplets.

    Raises:
        UserError: naming the column.
    """
    for entry in entries:
        names = entry.get('column_names') or list(entry.get('columns') or ())
        for name in REQUIRED_COLUMNS:
            if name not in names:
                raise UserError(f'{where}: found columns {sorted(names)}; expected triplets, with a column {name!r}')


def check_bytes(data: bytes, file: Mapping[str, Any], where: str | Path) -> None:
    """Compares a file with its entry in an index: its size and every hash.

    Raises:
        UserError: naming the file.
    """
    from streaming.base.hashing import get_hash, is_hash

    if len(data) != file['bytes']:
        raise UserError(f'{where}: is damaged: {len(data):,} bytes where the index says {file["bytes"]:,}')
    for name, expected in file['hashes'].items():
        if not is_hash(name):
            raise UserError(f'{where}: the index holds a hash {name!r} that is not known here')
        found = get_hash(name, data)
        if found != expected:
            raise UserError(f'{where}: is damaged: its {name} is {found}, the index says {expected}')

"""What is in a set of shards, and whether it is whole: what ``scripts/inspect_data.py`` does."""

import argparse
import json
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from dhrd_plugin.cli import run
from dhrd_plugin.data.index import INDEX, check_bytes
from dhrd_plugin.data.publish import os_errors
from dhrd_plugin.data.remote import fetch, is_remote, join
from dhrd_plugin.data.report import Look, Seen, collator, merge, percentiles
from dhrd_plugin.data.shards import COLUMNS
from dhrd_plugin.data.triplets import Triplet
from dhrd_plugin.errors import UserError

__all__ = ['Contents', 'inspect_set', 'main']


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status: 0, or 2 for an error told in one line."""
    parser = argparse.ArgumentParser(prog='inspect_data.py', description='Show and check a set of shards.')
    parser.add_argument('place', help='folder, or an address such as s3://bucket/rte/train')
    parser.add_argument('--rows', type=int, default=10, help='how many rows to show; default: %(default)s')
    parser.add_argument('--tokenizer', help='count lengths in its tokens; default: in words')
    parser.add_argument('--png', type=Path, help='draw the lengths and the labels into this file')
    args = parser.parse_args(argv)
    return run(lambda: show(args))


@dataclass
class Contents:
    """What is in a set.

    Attributes:
        rows: how many.
        shards: how many.
        bytes: of the shards as they are stored.
        hashes: the hashes that every shard was checked against.
        labels: how many rows have which label.
        without_rationale: how many rows have none.
        several: how many have more than one.
        seen: lengths, and the rows whose rationale states the label.
        first: the first rows.
    """

    rows: int = 0
    shards: int = 0
    bytes: int = 0
    hashes: set[str] = field(default_factory=set)
    labels: Counter[str] = field(default_factory=Counter)
    without_rationale: int = 0
    several: int = 0
    seen: Seen = field(default_factory=Seen)
    first: list[Triplet] = field(default_factory=list)


def inspect_set(place: str | Path, rows: int = 10, tokenizer: str | None = None) -> Contents:
    """Reads a whole set, one shard at a time, and checks every shard's hashes.

    Args:
        place (str | Path): a folder, or an address such as ``s3://bucket/rte/train``.
        rows (int): how many rows to keep. Default: 10.
        tokenizer (str, optional): see ``report.Look``. Default: None.

    Raises:
        UserError: a shard is missing or damaged, which the error names, or the set holds no triplets.
    """
    place = place if is_remote(place) else Path(place).expanduser()
    look, contents = Look(tokenizer), Contents()
    for entry, triplets in read_shards(place):
        stored = entry['zip_data'] or entry['raw_data']
        contents.shards += 1
        contents.bytes += stored['bytes']
        contents.hashes |= set(stored['hashes'])
        contents.rows += len(triplets)
        contents.labels.update(row['label'] for row in triplets)
        contents.without_rationale += sum(row['rationale'] is None for row in triplets)
        contents.several += sum(isinstance(row['rationale'], list) for row in triplets)
        contents.seen = merge([contents.seen, look(triplets)])
        contents.first += triplets[: max(0, rows - len(contents.first))]
    return contents


def read_shards(place: str | Path) -> Iterator[tuple[dict[str, Any], list[Triplet]]]:
    """Each shard's entry in the index with its rows, hashes checked; a remote one is not kept."""
    with tempfile.TemporaryDirectory(prefix='dhrd-') as folder:
        index = _file(place, INDEX, Path(folder)).read_bytes()
        try:
            entries = json.loads(index)['shards']
        except (ValueError, KeyError, TypeError):
            raise UserError(f'{join(place, INDEX)}: is no index of shards') from None
        for entry in entries:
            missing = set(COLUMNS) - set(entry.get('column_names', ()))
            if missing:
                raise UserError(f'{place}: holds no triplets; columns are missing: {", ".join(sorted(missing))}')
            with tempfile.TemporaryDirectory(dir=folder) as here:
                yield entry, _read_shard(place, entry, Path(here))


def _read_shard(place: str | Path, entry: dict[str, Any], here: Path) -> list[Triplet]:
    from streaming.base.compression import decompress
    from streaming.base.format import reader_from_json

    raw, packed = entry['raw_data'], entry['zip_data']
    name = (packed or raw)['basename']
    where = str(join(place, name))
    data = _file(place, name, here).read_bytes()
    check_bytes(data, packed or raw, where)
    try:
        if packed:
            data = decompress(entry['compression'], data)
            (here / raw['basename']).write_bytes(data)
        reader = reader_from_json(str(place if isinstance(place, Path) and not packed else here), '', entry)
        reader.validate(allow_unsafe_types=False)
        rows = [reader[number] for number in range(len(reader))]
    except Exception as error:  # of many kinds: without hashes anything may come out of damaged bytes
        raise UserError(f'{where}: cannot be read: {type(error).__name__}: {error}') from None
    check_bytes(data, raw, where)
    return [cast(Triplet, {name: row[name] for name in COLUMNS} | {'weight': float(row['weight'])}) for row in rows]


def _file(place: str | Path, name: str, here: Path) -> Path:
    """A file of the set: where it is, or downloaded."""
    if isinstance(place, Path):
        path = place / name
    else:
        path = here / name
        fetch(str(join(place, name)), path)
    if not path.is_file():
        hint = ', so this is no finished set of shards' if name == INDEX else ', which the index names'
        raise UserError(f'{place}: has no {name}{hint}')
    return path


# ------------------------------------------------------------------------------------------------
# Showing


def show(args: argparse.Namespace) -> None:
    """Prints a set, and draws it where asked."""
    if args.tokenizer:
        collator(args.tokenizer)  # a name that is wrong is better known now
    with os_errors(args.place):
        contents = inspect_set(args.place, args.rows, args.tokenizer)
    unit = 'tokens' if args.tokenizer else 'words'
    print('\n'.join(describe(args.place, contents, unit)))
    if args.png:
        with os_errors(args.png):
            draw(contents, unit, args.png)
        print(f'drawn: {args.png}')


def describe(place: str | Path, contents: Contents, unit: str) -> Iterator[str]:
    """A set in lines for people."""
    checked = ', '.join(sorted(contents.hashes)) or 'none: the index holds none'
    yield f'{place}: {contents.rows:,} rows, {contents.shards:,} shards, {contents.bytes:,} bytes'
    yield f'  hashes checked: {checked}'
    yield '  labels: ' + ', '.join(f'{name or "(none)"} {count:,}' for name, count in contents.labels.items())
    yield (f'  rationales: {contents.rows - contents.without_rationale:,} rows with '
           f'({contents.several:,} with several), {contents.without_rationale:,} without')  # fmt: skip
    for part, lengths in (('input', contents.seen.input), ('sequence', contents.seen.sequence)):
        marks = ', '.join(f'{length:,} at {mark}' for mark, length in percentiles(lengths).items())
        yield f'  {unit} of the {part}: {marks}'
    if leaks := contents.seen.leaks:
        ids = ', '.join(ident for ident, _ in leaks[:10])
        yield f'  warning: the rationale states the label in {len(leaks):,} rows: {ids}'
    for row in contents.first:
        yield ''
        yield from (f'  {name:10} {_short(value)}' for name, value in row.items() if value not in ('', None))


def _short(value: object, width: int = 300) -> str:
    """The value as JSON, so that line ends and control characters are seen and not obeyed."""
    text = json.dumps(value, ensure_ascii=False)
    text = ''.join(c if c.isprintable() else f'\\u{ord(c):04x}' for c in text)
    return text if len(text) <= width else f'{text[:width]} ... ({len(text):,} characters)'


def draw(contents: Contents, unit: str, path: Path) -> None:
    """Draws histograms of the lengths and bars of the labels into a PNG file.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("--png: needs matplotlib; run pip install 'dhrd-plugin[report]'") from None
    figure = Figure(figsize=(10, 4), layout='constrained')
    lengths, labels = figure.subplots(1, 2)
    for name, counts in (('input, rationale, answer', contents.seen.sequence), ('input', contents.seen.input)):
        lengths.hist(list(counts), weights=list(counts.values()), bins=40, alpha=0.6, label=name)
    lengths.set(xlabel=unit, ylabel='rows', title='Lengths')
    lengths.legend()
    names = sorted(contents.labels)
    bars = labels.bar([name or '(none)' for name in names], [contents.labels[name] for name in names])
    labels.bar_label(bars)
    labels.set(ylabel='rows', title='Labels')
    figure.savefig(path, format='png', dpi=120)

"""What is in a shard set, and whether it is whole: ``dhrd inspect``."""

import argparse
import json
import sys
import tempfile
import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from dhrd_plugin.cli import Parser, number, run
from dhrd_plugin.data.lengths import Findings, describe, load_collator, merge, summarise, survey
from dhrd_plugin.data.rows import catching_bad, raise_bad
from dhrd_plugin.data.triplet import (
    COLUMNS,
    Triplet,
    check_cuttable,
    check_id,
    check_label,
    check_probabilities,
    check_text,
    check_weight,
    counted_as,
    rationales_of,
)
from dhrd_plugin.errors import UserError, user_errors
from dhrd_plugin.files import check_file, replacing, write_bytes
from dhrd_plugin.pictures import check_extra, drawing
from dhrd_plugin.streams.index import INDEX, check_bytes, check_columns, parse_index
from dhrd_plugin.streams.remote import is_remote, join, read

MOST_BARS = 20  # labels in the picture


def main(argv: Sequence[str] | None = None) -> int:
    """``dhrd inspect``.

    Args:
        argv: the arguments. Default: those of the command line.

    Returns:
        The exit status: 0, or 2 after a mistake told in one line.
    """
    return run(lambda: _show(_parse_args(argv)))


def _parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog='dhrd inspect', description='Show and check a shard set.')
    add = parser.add_argument
    add('place', help='folder, or an address such as s3://bucket/rte/train')
    add('--rows', type=number(int, 0), default=10, help='how many rows to show; default: %(default)s')
    add('--tokenizer', help='count lengths in its tokens; default: in words')
    add('--png', type=Path, help='draw the lengths and the labels into this file')
    return parser.parse_args(argv)


@dataclass
class Contents:
    """What is in a shard set."""

    rows: int = 0
    shard_count: int = 0
    bytes: int = 0  # of the shards as they are stored
    hashes: set[str] = field(default_factory=set)  # that every shard was checked against
    labels: Counter[str] = field(default_factory=Counter)
    without_rationale: int = 0  # rows
    with_probabilities: int = 0  # rows
    several: int = 0  # rows with more than one rationale
    findings: Findings = field(default_factory=Findings)
    first: list[Triplet] = field(default_factory=list)


def inspect_set(place: str | Path, rows: int = 10, tokenizer: str | None = None) -> Contents:
    """Read a whole set, one shard at a time, check every shard against the index, and keep the first ``rows``."""
    contents = Contents()
    for entry, triplets in read_shards(place):
        stored = entry['zip_data'] or entry['raw_data']
        contents.shard_count += 1
        contents.bytes += stored['bytes']
        hashes = set(stored['hashes'])
        contents.hashes = hashes if contents.shard_count == 1 else contents.hashes & hashes
        contents.rows += len(triplets)
        contents.labels.update(name for row in triplets for name in counted_as(row))
        contents.without_rationale += sum(row['rationale'] is None for row in triplets)
        contents.with_probabilities += sum(row['probabilities'] is not None for row in triplets)
        contents.several += sum(len(rationales_of(row)) > 1 for row in triplets)
        contents.findings = merge([contents.findings, survey(triplets, tokenizer)])
        contents.first += triplets[: max(0, rows - len(contents.first))]
    return contents


def read_shards(place: str | Path) -> Iterator[tuple[dict[str, Any], list[Triplet]]]:
    """Each shard's entry in the index and its rows, checked against the index; nothing of a remote set is kept."""
    place = place if is_remote(place) else Path(place).expanduser()
    entries = parse_index(_read(place, INDEX), str(join(place, INDEX)))
    check_columns(entries, str(place))
    for entry in entries:
        with tempfile.TemporaryDirectory(prefix='dhrd-') as here:
            rows = _read_shard(place, entry, Path(here))
        yield entry, rows


def _read_shard(place: str | Path, entry: dict[str, Any], here: Path) -> list[Triplet]:
    from streaming.base.compression import decompress
    from streaming.base.format import reader_from_json

    raw, packed = entry['raw_data'], entry['zip_data']
    stored, folder = packed or raw, place
    where = str(join(place, stored['basename']))
    data = _read(place, stored['basename'])
    check_bytes(data, stored, where)
    # Without hashes anything may come out of damaged bytes.
    with user_errors(f'{where}: cannot be read', kind=True):
        if packed:
            data = decompress(entry['compression'], data)
            check_bytes(data, raw, where)
        if packed or isinstance(place, str):
            write_bytes(here / raw['basename'], data)
            folder = here
        reader = reader_from_json(str(folder), '', entry)
        reader.validate(allow_unsafe_types=False)
        if entry['format'] == 'mds' and int.from_bytes(data[:4], sys.byteorder) != len(reader):
            raise UserError(f'{where}: holds other rows than the {len(reader):,} that the index says')
        return [_triplet(reader[number], f'{where}, row {number + 1}') for number in range(len(reader))]


def _triplet(row: dict[str, Any], where: str) -> Triplet:
    """A row of a shard, checked, as anybody may have written it; it may lack the columns that have a default."""
    full = {
        'answer': row['label'] if isinstance(row['label'], str) else '',
        'cuttable': None,
        'probabilities': None,
        'rationale': None,
        'weight': 1.0,
        'group': '',
    } | row
    with catching_bad(raise_bad, where):
        check_label(full['label'], empty=True)
        for name in ('input_text', 'answer', 'group'):
            check_text(full[name], name, empty=True)
        rationale = full['rationale']
        for text in rationale if isinstance(rationale, list) else [] if rationale is None else [rationale]:
            check_text(text, 'rationale', empty=True)
        check_probabilities(full['probabilities'], 'probabilities')
        check_cuttable(full['cuttable'], full['input_text'])
        checked = {'id': check_id(full['id'], 'id', empty=True), 'weight': check_weight(full['weight'], 'weight')}
        return cast(Triplet, {name: full[name] for name in COLUMNS} | checked)


def _read(place: str | Path, name: str) -> bytes:
    """A file of the set, from where it is."""
    path = join(place, name)
    local = path.read_bytes() if isinstance(path, Path) and path.is_file() else None
    data = read(path, attempts=1) if isinstance(path, str) else local
    if data is None:
        hint = ', so this is not a finished shard set' if name == INDEX else ', which the index names'
        raise UserError(f'{place}: has no {name}{hint}')
    return data


def _show(args: argparse.Namespace) -> None:
    if args.tokenizer:
        load_collator(args.tokenizer)  # a wrong name fails now, not after the reading
    if args.png:
        check_extra('--png', 'matplotlib')
        check_file(args.png, '--png', "matplotlib's pictures", lambda path: b'Matplotlib' in path.read_bytes()[:4096])
    with user_errors(args.place, OSError):
        contents = inspect_set(args.place, args.rows, args.tokenizer)
    summary = vars(contents) | summarise(contents.findings, args.tokenizer)
    print(*describe(args.place, summary), sep='\n')
    for row in contents.first:
        print('', *(f'  {name:10} {_short(value)}' for name, value in row.items() if value not in ('', None)), sep='\n')
    if args.png:
        with user_errors(args.png, OSError):
            _draw(contents, summary['lengths']['unit'], args.png)
        print(f'drawn: {args.png}')


def _short(value: object, width: int = 300) -> str:
    """The value as JSON, so that a terminal shows line ends and control characters and does not obey them."""
    text = json.dumps(value, ensure_ascii=False)
    text = ''.join(c if c.isprintable() else f'\\u{ord(c):04x}' for c in text)
    return text if len(text) <= width else f'{text[:width]} ... ({len(text):,} characters)'


@drawing()
def _draw(contents: Contents, unit: str, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout='constrained')
    lengths, labels = figure.subplots(1, 2)
    for name, counts in (('input, rationale, answer', contents.findings.sequence), ('input', contents.findings.input)):
        lengths.hist(list(counts), weights=list(counts.values()), bins=40, alpha=0.6, label=name)
    lengths.set(xlabel=unit, ylabel='rows', title='Lengths')
    lengths.legend()
    shown = sorted(contents.labels.most_common(MOST_BARS))
    some = f', the {MOST_BARS} most frequent of {len(contents.labels):,}' if len(contents.labels) > MOST_BARS else ''
    labels.bar_label(labels.barh(range(len(shown)), [count for _, count in shown]))
    labels.set_yticks(range(len(shown)), [textwrap.shorten(name, 40, placeholder='…') or '(none)' for name, _ in shown])
    labels.invert_yaxis()
    labels.set(xlabel='rows', title=f'Labels{some}')
    with replacing(path) as file:
        figure.savefig(file, format='png', dpi=120)

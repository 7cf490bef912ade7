"""From raw data to shards of triplets: what ``scripts/prepare_data.py`` does."""

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from dhrd_plugin.cli import run
from dhrd_plugin.data.publish import check_free, os_errors, publish, staged
from dhrd_plugin.data.remote import is_remote, join
from dhrd_plugin.data.report import Look, collator, merge, report
from dhrd_plugin.data.rows import MAX_ROW_BYTES, SPLITS, splits_in
from dhrd_plugin.data.shards import HASHES, SHARD_SIZE, write_set
from dhrd_plugin.data.tasks import BadRow, Task, load_task, task_names
from dhrd_plugin.data.triplets import CONTROLS, apply_control, read_triplets
from dhrd_plugin.errors import UserError

__all__ = ['main', 'prepare']

PLAIN = CONTROLS[0]


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status: 0, 2 for an error told in one line, 130 when stopped."""
    args = parse_args(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return run(lambda: prepare(args))
    except KeyboardInterrupt:
        print(f'stopped; at {args.output} every set is whole or as it was', file=sys.stderr)
        return 130


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog='prepare_data.py',
        description='Write a data set as MDS shards of triplets, whole or not at all.',
        epilog='A folder without --split gives a set for each of its splits, in OUTPUT/train and so on.',
    )
    add = parser.add_argument
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument('--task', help=f'one of {", ".join(task_names())}')
    which.add_argument('--template', help='a YAML template of your own')
    add('--input', required=True, help='JSON, JSONL, CSV or Parquet file, a folder of splits, '
        'or hub:[PATH[:CONFIG]] for the Hugging Face hub')  # fmt: skip
    add('--split', help='train, validation or test, of a folder or the hub')
    add('--output', required=True, help='folder, or an address such as s3://bucket/rte')
    add('--rationales', help='file of rationales to join on the id')
    add('--unlabelled', action='store_true', help='rows may lack a label, as in a test split they always may')
    add('--control', choices=CONTROLS, default=PLAIN, help="of the paper's Table 2; default: %(default)s")
    add('--seed', type=int, default=17, help="of the control's shuffling; default: %(default)s")
    add('--compression', help='such as zstd or zstd:11; default: none')
    add('--hashes', type=lambda text: text.split(','), default=list(HASHES), help='default: sha1,xxh64')
    add('--shard-size', type=_positive, default=SHARD_SIZE, help='in characters; default: %(default)s')
    add('--workers', type=_positive, default=1, help='processes that write; default: %(default)s')
    add('--tokenizer', help='count lengths in its tokens; default: in words')
    add('--max-seq-len', type=_positive, help='count what a sequence of so many tokens will cut')
    add('--max-row-bytes', type=_positive, default=MAX_ROW_BYTES, help='default: %(default)s')
    add('--skip-bad', metavar='FILE', type=Path, help='set bad rows aside in FILE (JSONL) with the reasons')
    add('--overwrite', action='store_true', help='replace the sets that are there')
    return parser.parse_args(argv)


def prepare(args: argparse.Namespace) -> None:
    """Writes the sets that the arguments ask for; nothing appears before all of them are written.

    Raises:
        UserError: a row or an argument does not fit.
    """
    if args.max_seq_len and not args.tokenizer:
        raise UserError('--max-seq-len: counts tokens; say which with --tokenizer')
    task = load_task(args.task or Path(args.template))
    targets = list(_targets(args))
    for _, out in targets:
        check_free(out, args.overwrite)
    if args.tokenizer:
        collator(args.tokenizer)  # a name that is wrong is better known now than after the reading
    import streaming  # noqa: F401  (takes seconds, which would count as the data's)

    with ExitStack() as stack, SetAside(args.skip_bad) as aside:
        written = []
        for split, out in targets:
            folder = stack.enter_context(staged(out))
            written.append((folder, out, write_split(args, task, split, folder, aside)))
        left = {out: publish(folder, out) for folder, out, _ in written}
    for _, out, summary in written:
        print('\n'.join(describe(out, summary)))
        if left[out]:
            print(f'  of the replaced set, which runs may still read: {len(left[out]):,} files, {", ".join(left[out])}')
    if aside.count:
        print(f'set aside: {aside.count:,} bad rows, in {args.skip_bad}')


def _targets(args: argparse.Namespace) -> Iterator[tuple[str | None, str | Path]]:
    """The splits to write and where to."""
    out = args.output if is_remote(args.output) else Path(args.output).expanduser()
    if args.split or not Path(args.input).expanduser().is_dir():
        yield args.split, out
        return
    if args.rationales or args.control != PLAIN:
        raise UserError(f'{args.input}: --rationales and --control belong to one split; name it with --split')
    splits = splits_in(args.input)
    if not splits:
        raise UserError(f'{args.input}: has no split, that is, no file such as train.jsonl or val.jsonl')
    for split in splits:
        yield split, join(out, split)


def write_split(
    args: argparse.Namespace, task: Task, split: str | None, folder: Path, aside: 'SetAside'
) -> dict[str, Any]:
    """Writes one set into ``folder``; returns its summary."""
    joined: dict[str, int] = {}
    start, skipped = time.monotonic(), aside.count
    labelled = not (args.unlabelled or split in SPLITS['test'])
    triplets = read_triplets(
        args.input,
        task,
        args.rationales,
        split,
        labelled=labelled,
        on_bad=aside,
        max_row_bytes=args.max_row_bytes,
        report=joined,
    )

    def more(looks: list[Any]) -> dict[str, Any]:
        return {
            'source': args.input,
            'split': split,
            'control': args.control,
            'seed': args.seed,
            'rationales': args.rationales,
            'joined': joined,
            'set_aside': aside.count - skipped,
            'seconds': round(time.monotonic() - start, 3),
            **report(merge(looks), args.tokenizer, args.max_seq_len),
        }

    return write_set(
        _progress(apply_control(triplets, args.control, args.seed), f'{split or args.input}'),
        folder,
        task,
        compression=args.compression,
        hashes=args.hashes,
        size_limit=args.shard_size,
        workers=args.workers,
        labelled=labelled,
        look=Look(args.tokenizer),
        more=more,
    )


class SetAside:
    """Receives bad rows: raises the first, or writes all to a file that appears at the end.

    Args:
        path (Path, optional): the JSONL file: ``where``, ``field``, ``reason``, ``row``. Default: None, raise.
    """

    def __init__(self, path: Path | None):
        self.path, self.count = path, 0

    def __enter__(self) -> 'SetAside':
        if self.path:
            with os_errors(self.path):
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self.file = self.path.with_name(f'{self.path.name}.{os.getpid()}.tmp').open('w', encoding='utf-8')
        return self

    def __call__(self, bad: BadRow) -> None:
        if not self.path:
            raise UserError(f'{bad} (--skip-bad FILE sets such rows aside)') from None
        self.count += 1
        row = {'where': bad.where, 'field': bad.field, 'reason': bad.reason, 'row': bad.row}
        self.file.write(json.dumps(row, default=str) + '\n')

    def __exit__(self, kind: object, *_: object) -> None:
        if self.path:
            self.file.close()
            if kind is None:
                os.replace(self.file.name, self.path)
            else:
                os.unlink(self.file.name)


def _progress(rows: Iterable[Any], what: str) -> Iterable[Any]:
    """A bar on stderr with rows a second; none where stderr is no terminal."""
    from tqdm import tqdm

    return tqdm(rows, desc=what, unit=' rows', disable=None)


def describe(out: str | Path, summary: dict[str, Any]) -> Iterator[str]:
    """The summary in lines for people."""
    rate = summary['rows'] / max(summary['seconds'], 1e-3)
    shards = f'{summary["shard_count"]:,} shard{"s" if summary["shard_count"] > 1 else ""}'
    yield f'{out}: {summary["rows"]:,} rows in {shards}, {summary["bytes"]:,} bytes, {rate:,.0f} rows/s'
    yield '  labels: ' + ', '.join(f'{name or "(none)"} {count:,}' for name, count in summary['labels'].items())
    without = summary['without_rationale']
    yield f'  rationales: {summary["rows"] - without:,} rows with, {without:,} without'
    if joined := summary['joined']:
        yield (f'  joined: {joined["joined"]:,} of {joined["rationales"]:,} rationales, '
               f'{joined["unmatched"]:,} match no row, {joined["replaced"]:,} replace one of the row')  # fmt: skip
    lengths = summary['lengths']
    for part in ('input', 'sequence'):
        marks = ', '.join(f'{length:,} at {mark}' for mark, length in lengths[part].items())
        yield f'  {lengths["unit"]} of the {part}: {marks}'
    if 'max_seq_len' in summary:
        yield (f'  at {summary["max_seq_len"]:,} tokens: {summary["cut"]:,} rationales cut, '
               f'{summary["inputs_too_long"]:,} inputs too long, which training refuses')  # fmt: skip
    if summary['set_aside']:
        yield f'  set aside: {summary["set_aside"]:,} bad rows'
    if leaks := summary['states_label']['rows']:
        ids = ', '.join(summary['states_label']['ids'][:10])
        yield f'  warning: the rationale states the label in {leaks:,} rows: {ids}{", ..." if leaks > 10 else ""}'


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f'{text} is not a whole number from 1')
    return value

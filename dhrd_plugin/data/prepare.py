"""From raw data to shards of triplets: ``dhrd prepare``."""

import argparse
import json
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from dhrd_plugin import files
from dhrd_plugin.cli import Parser, number, run
from dhrd_plugin.data.controls import CONTROLS, PLAIN, apply_control
from dhrd_plugin.data.labels import task_of_rows, with_labels
from dhrd_plugin.data.lengths import describe, load_collator, merge, summarise, survey
from dhrd_plugin.data.rows import MAX_ROW_BYTES, SPLITS, OnBad, Row, in_memory, name_classes, raise_bad, splits_in
from dhrd_plugin.data.shards import HASHES, SHARD_SIZE, check_triplet, write_set, write_triplets
from dhrd_plugin.data.tasks import Task, load_task, task_names
from dhrd_plugin.data.triplet import BadRow, spell
from dhrd_plugin.data.triplets import read_triplets, triplets_of
from dhrd_plugin.errors import UserError, tell, user_errors
from dhrd_plugin.streams.publish import check_free, publish, staged
from dhrd_plugin.streams.remote import is_remote, join


def main(argv: Sequence[str] | None = None) -> int:
    """``dhrd prepare``.

    Args:
        argv: the arguments. Default: those of the command line.

    Returns:
        The exit status: 0, 2 after a mistake told in one line, 130 when stopped.
    """
    return run(lambda: _prepare_or_stop(_parse_args(argv)))


def _prepare_or_stop(args: argparse.Namespace) -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        _prepare(args)
    except KeyboardInterrupt:
        tell(f'stopped; at {args.output} every set is whole or as it was')
        raise


def _parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog='dhrd prepare',
        description='Write a data set as MDS shards of triplets, whole or not at all.',
        epilog='A folder without --split gives a set for each of its splits, in OUTPUT/train and so on.',
    )
    add = parser.add_argument
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument('--task', help=f'one of {", ".join(task_names())}')
    which.add_argument('--template', help='a YAML template of your own')
    sources = 'JSON, JSONL, CSV or Parquet file, a folder of splits, or hub:[PATH[:CONFIG]] for the Hugging Face hub'
    add('--input', required=True, help=sources)
    add('--split', help='train, validation or test, of a folder or the hub')
    add('--output', required=True, help='folder, or an address such as s3://bucket/rte')
    add('--rationales', help='file of rationales to join on the id')
    add('--unlabelled', action='store_true', help='rows may lack a label, as in a test split they always may')
    add('--control', choices=CONTROLS, default=PLAIN, help="of the paper's Table 2, or ours; default: %(default)s")
    add('--seed', type=int, default=17, help="of the control's shuffling; default: %(default)s")
    add('--compression', help='such as zstd or zstd:11; default: none')
    add('--hashes', type=lambda text: text.split(','), default=list(HASHES), help='default: sha1,xxh64')
    add('--shard-size', type=number(int, 1), default=SHARD_SIZE, help='in characters; default: %(default)s')
    add('--workers', type=number(int, 1), default=1, help='processes that write; default: %(default)s')
    add('--tokenizer', help='count lengths in its tokens; default: in words')
    add('--max-seq-len', type=number(int, 1), help='count what a sequence of so many tokens will cut')
    add('--max-row-bytes', type=number(int, 1), default=MAX_ROW_BYTES, help='default: %(default)s')
    add('--skip-bad', metavar='FILE', type=Path, help='set bad rows aside in FILE (new JSONL) with the reasons')
    add('--overwrite', action='store_true', help='replace the sets that are there')
    return parser.parse_args(argv)


def _prepare(args: argparse.Namespace) -> None:
    """Write the sets that the arguments ask for; nothing appears before all of them are written."""
    if args.max_seq_len and not args.tokenizer:
        raise UserError('--max-seq-len: counts tokens; say which with --tokenizer')
    task = load_task(args.task or Path(args.template))
    targets = list(_targets(args))
    check_targets(args, [out for _, out in targets])
    if args.tokenizer:
        load_collator(args.tokenizer)  # a wrong name fails now, not after the reading
    task = _with_labels(args, task)
    import streaming  # noqa: F401  (seconds that would count as the data's)

    with ExitStack() as stack, _SetAside(args.skip_bad) as aside:
        written = []
        for split, out in targets:
            folder = stack.enter_context(staged(out))
            written.append((folder, out, _write_split(args, task, split, folder, aside)))
        aside.flush()  # a full disk must not be found when the sets are there
        left = {out: publish(folder, out) for folder, out, _ in written}
    for _, out, summary in written:
        print(*describe(out, summary), sep='\n')
        if left[out]:
            print(f'  of the replaced set, which runs may still read: {len(left[out]):,} files, {", ".join(left[out])}')
    if aside.count:
        print(f'set aside: {aside.count:,} bad rows, in {args.skip_bad}')


def _with_labels(args: argparse.Namespace, task: Task) -> Task:
    """The task with the labels of the training rows: those of a folder's split train, else those of the input."""
    skip: OnBad = raise_bad if args.skip_bad is None else lambda bad: None  # the reading itself sets them aside
    splits = splits_in(args.input) if Path(args.input).expanduser().is_dir() else {}
    split = 'train' if 'train' in splits else args.split or next(iter(splits), None)
    return with_labels(task, args.input, split, skip, args.max_row_bytes)


def check_targets(args: argparse.Namespace, outs: Sequence[str | Path]) -> None:
    """Refuse a place that may not or cannot be written, before a row is read."""
    read = {f'--{name}': _here(getattr(args, name)) for name in ('input', 'template', 'rationales', 'tokenizer')}
    for out in outs:
        check_free(out, args.overwrite, '--output', read)
    if args.skip_bad is None:
        return
    sets = [Path(out).resolve() for out in outs if not is_remote(out)]
    if any(out in (args.skip_bad.resolve(), *args.skip_bad.resolve().parents) for out in sets):
        raise UserError(f'--skip-bad: {args.skip_bad}: is in --output, which holds a set and nothing else')
    files.check_file(
        args.skip_bad, '--skip-bad', 'bad rows set aside', lambda path: files.begins_with(path, b'{"where": '), read
    )


def _here(place: str | None) -> Path | None:
    """The path of an input on this machine."""
    path = Path(place).expanduser() if place and not is_remote(place) else None
    return path if path is not None and path.exists() else None


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


def _write_split(
    args: argparse.Namespace, task: Task, split: str | None, folder: Path, aside: '_SetAside'
) -> dict[str, Any]:
    """Write one set; returns its summary."""
    from tqdm import tqdm

    joins: dict[str, int] = {}
    start, skipped = time.monotonic(), aside.count
    labelled = not (args.unlabelled or split in SPLITS['test'])
    triplets = read_triplets(
        args.input, task, args.rationales, split, labelled, on_bad=aside, max_row_bytes=args.max_row_bytes, report=joins
    )
    triplets = apply_control(triplets, args.control, args.seed)
    bar = tqdm(triplets, desc=split or args.input, unit=' rows', disable=None)  # no bar where stderr is no terminal
    rows = (check_triplet(row, task, labelled) for row in bar)
    find = partial(survey, tokenizer=args.tokenizer)

    def more(findings: list[Any]) -> dict[str, Any]:
        return {
            'source': args.input,
            'split': split,
            **{key: getattr(args, key) for key in ('control', 'seed', 'rationales')},
            'joined': joins,
            'set_aside': aside.count - skipped,
            'seconds': round(time.monotonic() - start, 3),
            **summarise(merge(findings), args.tokenizer, args.max_seq_len),
        }

    options = (args.compression, args.hashes, args.shard_size, args.workers, find, more)
    return write_set(rows, folder, task, *options, source=f'{args.input} {split or ""}'.rstrip())


def write_rows(
    rows: Any, out: str | Path, task: str | Path | Mapping[str, Any] | Task, *, overwrite: bool = False, **options: Any
) -> dict[str, Any]:
    """Write rows that are in memory as MDS shards, as ``dhrd prepare`` writes those of a file.

    Args:
        rows: a pandas ``DataFrame``, a ``datasets.Dataset``, or an iterable of mappings, with the task's fields.
            NaN is a missing field. A label that is a ``ClassLabel`` of the ``Dataset`` is told by its name.
        out: a folder, or an address such as ``s3://bucket/rte/train``.
        task: as for :func:`~dhrd_plugin.data.tasks.load_task`; without ``labels`` those of the rows.
        overwrite: whether a set that is there may be replaced. Default: False.
        **options: of :func:`~dhrd_plugin.data.shards.write_triplets`.

    Returns:
        The summary, as written to ``triplets.json``; its ``task`` has the labels, for the rows to evaluate on.

    Raises:
        UserError: a row does not fit the task; the error says which, and names the field.

    Example:
        >>> write_rows([{'text': 'Hi', 'label': 'a'}, {'text': 'Ho', 'label': 'b'}], 'train', {'prompt': '{text}'})
    """
    task = load_task(task)
    found = list(_rows_of(rows, task))
    if not task.labels:
        task = task_of_rows(task, found, 'rows')
    triplets = triplets_of(found, task, options.get('labelled', True))
    return write_triplets(triplets, out, task=task, overwrite=overwrite, **options)


def _rows_of(rows: Any, task: Task) -> Iterator[Row]:
    named = name_classes(_mappings(rows), getattr(rows, 'features', None), task)
    return (Row(f'row {number}', number, fields) for number, fields in enumerate(named, 1))


def _mappings(rows: Any) -> Iterator[dict[str, Any]]:
    for where, fields in in_memory(rows, 'row'):
        if not isinstance(fields, dict):
            raise UserError(f'{where}: found {spell(fields)}; expected a mapping of fields')
        yield fields


class _SetAside:
    """Receives bad rows: raises the first, or writes all to a JSONL file, which appears at the end."""

    def __init__(self, path: Path | None):
        self.path, self.count, self.stack = path, 0, ExitStack()

    def __enter__(self) -> '_SetAside':
        if self.path:
            with user_errors(self.path, OSError):
                self.file = self.stack.enter_context(files.replacing(self.path))
        return self

    def __call__(self, bad: BadRow) -> None:
        """Take in one bad row."""
        if not self.path:
            raise UserError(f'{bad} (--skip-bad FILE sets such rows aside)') from None
        self.count += 1
        row = {'where': bad.where, 'field': bad.field, 'reason': bad.reason, 'row': bad.row}
        self.file.write(f'{json.dumps(row, default=str)}\n'.encode())

    def flush(self) -> None:
        """Write what is still held back."""
        if self.path:
            with user_errors(self.path, OSError):
                self.file.flush()

    def __exit__(self, *error: Any) -> None:
        with user_errors(self.path, OSError):
            self.stack.__exit__(*error)

"""Classify texts: labels and probabilities from an export."""

import argparse
import io
import itertools
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers.utils import logging

from dhrd_plugin import files, ranks
from dhrd_plugin.cli import Parser, number, run
from dhrd_plugin.data.tasks import Task
from dhrd_plugin.data.texts import Text, check_arguments, read_lines, read_texts
from dhrd_plugin.errors import UserError, tell, user_errors
from dhrd_plugin.export.classify import PRECISIONS, logits_on_ranks
from dhrd_plugin.export.load import RUNTIMES, Classifier, load_classifier, runtime_for
from dhrd_plugin.problem_type import to_probabilities
from dhrd_plugin.streams.remote import is_remote

WINDOW = 2048  # texts that a rank holds at a time, and sorts by their length
KEYS = {'id', 'label', 'probabilities'}  # of what is written

Write = Callable[[list[dict[str, Any]]], None]


def main(argv: Sequence[str] | None = None) -> int:
    """``dhrd predict MODEL [TEXT ...]``; returns the exit status."""
    return run(lambda: _predict(_parse_args(argv)))


def _parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog='dhrd predict', description='Classify texts with a slim classifier.')
    add = parser.add_argument
    add('model', help='the folder that DropReasoningHead wrote, or anything that dhrd evaluate takes')
    add('texts', nargs='*', help='texts, or rows as JSON; without any, lines of --input or of stdin')
    add(
        '--input',
        help="a file with a text a line, or JSON, JSONL, CSV or Parquet with input_text or the task's fields, or a set "
        'of shards; here or at an address',
    )
    add(
        '--output', type=Path, help='a .jsonl or .parquet file, whole at the end; default: lines on stdout as they come'
    )
    add(
        '--abstain',
        type=number(float, 0, 1),
        metavar='P',
        help='no label where the largest probability (of several labels any yes or no) is below P; default: always',
    )
    add_speed(parser)
    return parser.parse_args(argv)


def add_speed(parser: argparse.ArgumentParser) -> None:
    """The options that change how fast texts are classified."""
    parser.add_argument('--batch-size', type=number(int, 1), help='rows at a time, at most; default: 32, on a GPU 256')
    parser.add_argument('--precision', choices=PRECISIONS, default='fp32', help='default: fp32')
    parser.add_argument(
        '--runtime', choices=RUNTIMES, help='default: onnx without a GPU where the export holds model.onnx, else torch'
    )


def _predict(args: argparse.Namespace) -> None:
    logging.set_verbosity_error()
    check_arguments(args.texts, args.input)
    ranks.initialize()
    ranks.from_rank_zero(lambda: _check_output(args))
    classifier = load_classifier(args.model, runtime_for(args.runtime, args.precision))
    texts = _read(args, classifier.template)  # which rank 0 alone goes through: stdin is one
    size = WINDOW * ranks.world_size()
    count = 0
    with _writing(args.output, classifier) as write:
        while window := ranks.from_rank_zero(lambda: list(itertools.islice(texts, size))):
            if not count and ranks.rank() == 0:
                tell(f'runs on: {classifier.runs_on}')
            write(_answers(classifier, window, args))
            count += len(window)
        if not count:
            raise UserError(f'{args.input or "stdin"}: found no text; expected one a line')
    if args.output and ranks.rank() == 0:
        tell(f'{args.output}: {count:,} rows')


def _read(args: argparse.Namespace, task: Task | None) -> Iterator[Text]:
    """The texts that the arguments give or name; those of stdin without any."""
    if args.texts:
        yield from read_lines((text.encode(errors='surrogateescape') for text in args.texts), task, 'argument ')
    elif args.input is None:
        stream = getattr(sys.stdin, 'buffer', None) or io.BytesIO(sys.stdin.read().encode())
        yield from read_lines(stream, task, 'stdin, line ')
    else:
        yield from read_texts(args.input, task)


def _answers(classifier: Classifier, texts: list[Text], args: argparse.Namespace) -> list[dict[str, Any]]:
    """What is written of each text; every rank calls it with the same texts."""
    model, tokenizer, limit = classifier.model, classifier.tokenizer, classifier.max_seq_len
    logits = logits_on_ranks(model, tokenizer, texts, args.batch_size, limit, args.precision)
    found = to_probabilities(logits, classifier.multi_label)
    names = classifier.label_names
    labels = classifier.labels_of(found, args.abstain)
    return [
        {
            **({} if text.id is None else {'id': text.id}),
            'label': label,
            'probabilities': {name: round(value, 4) for name, value in zip(names, values)},
        }
        for text, label, values in zip(texts, labels, found.tolist())
    ]


# ------------------------------------------------------------------------------------ the output


def _check_output(args: argparse.Namespace) -> None:
    """Refuse a file that may not or cannot be written, before any work starts."""
    if args.output is None:
        return
    if args.output.suffix not in ('.jsonl', '.parquet'):
        raise UserError(f'--output: {args.output}: expected a name that ends in .jsonl or .parquet')
    read = {'--input': args.input, 'the model': args.model}
    apart = {name: place for name, place in read.items() if place and not is_remote(place)}
    files.check_file(args.output, '--output', 'predictions', _is_ours, apart)


def _is_ours(path: Path) -> bool:
    """Whether a file holds what an earlier command wrote: no input has these columns alone."""
    if path.suffix == '.jsonl':
        with path.open('rb') as file:
            try:
                keys = json.loads(file.readline()).keys()
            except (ValueError, AttributeError):  # no JSON, or no object
                return False
    else:
        import pyarrow as pa
        from pyarrow.parquet import read_schema

        try:
            keys = set(read_schema(path).names)
        except (pa.ArrowException, OSError):
            return False
    return KEYS >= keys >= KEYS - {'id'}


@contextmanager
def _writing(path: Path | None, classifier: Classifier) -> Iterator[Write]:
    """What writes rows: to stdout at once, or into a file that is there at the end, whole. Rank 0 alone writes."""
    if ranks.rank() != 0:
        yield lambda rows: None
    elif path is None:
        yield _print
    else:
        with user_errors(path, OSError), files.replacing(path) as file:
            if path.suffix == '.jsonl':
                yield lambda rows: file.writelines(map(files.json_line, rows)) or None
            else:
                with _parquet(file, classifier.label_names, classifier.multi_label) as write:
                    yield write


@contextmanager
def _parquet(file: Any, names: Sequence[str], several: bool) -> Iterator[Write]:
    import pyarrow as pa
    from pyarrow.parquet import ParquetWriter

    probabilities = pa.struct([(name, pa.float64()) for name in names])
    label = pa.list_(pa.string()) if several else pa.string()
    schema = pa.schema([('id', pa.string()), ('label', label), ('probabilities', probabilities)])
    with ParquetWriter(file, schema) as writer:
        yield lambda rows: writer.write_table(pa.Table.from_pylist(rows, schema))


def _print(rows: list[dict[str, Any]]) -> None:
    sys.stdout.write(b''.join(map(files.json_line, rows)).decode())
    sys.stdout.flush()

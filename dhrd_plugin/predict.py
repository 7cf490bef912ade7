"""Classify texts: labels and probabilities from an export."""

import argparse
import io
import json
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel
from transformers.utils import logging

from dhrd_plugin.cli import Parser, number, run
from dhrd_plugin.data.rows import (
    BOM,
    SUFFIXES,
    catching_bad,
    check_is_text,
    kind_of,
    parse_object,
    raise_bad,
    read_rows,
)
from dhrd_plugin.data.tasks import Task, load_task
from dhrd_plugin.data.triplet import BadRow, check_cuttable, check_text
from dhrd_plugin.data.truncate import fit
from dhrd_plugin.errors import UserError, user_errors
from dhrd_plugin.export.load import open_classifier

# The fixed cost of a small LM's forward pass on a CPU, in tokens. A GPU waits for its launches instead.
CPU_PADDING = 64
PRECISIONS = ('fp32', 'amp_bf16')


@torch.inference_mode()
def predict(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    batch_size: int | None = None,
    places: Sequence[str] | None = None,
    precision: str = 'fp32',
) -> Tensor:
    """Compute class probabilities, in the order of the texts; batched by length, so that there is little padding.

    Args:
        model: of a :class:`~dhrd_plugin.export.load.Classifier`.
        tokenizer: likewise.
        texts: N input texts.
        batch_size: rows to a forward pass, at most; fewer on a CPU where that saves padding. Default: 32, on a GPU 256.
        places: where each text stands, for errors. Default: its number, from 1.
        precision: ``'fp32'``, that of the weights, or ``'amp_bf16'``, autocast as in training on a GPU. Default:
            ``'fp32'``.

    Returns:
        [N, K] probabilities, fp32.

    Raises:
        UserError: a text of no token, or of more than the model has positions for, before any is classified; a model
            that cannot be run on them, or whose logits are not finite.
    """
    encoded = tokenizer(list(texts), verbose=False)['input_ids']
    _check_lengths(model, [len(ids) for ids in encoded], places or [f'text {i}' for i in range(1, len(texts) + 1)])
    device = model.device.type
    size, padding = (32, CPU_PADDING) if device == 'cpu' else (256, math.inf)
    order, found = [], []
    for rows in _batches_by_length([len(ids) for ids in encoded], batch_size or size, padding):
        with user_errors('the model cannot be run on these texts', kind=True):
            batch = tokenizer.pad({'input_ids': [encoded[index] for index in rows]}, return_tensors='pt')
            # By name: GPT-2's second argument is another one.
            inputs = {name: batch[name].to(model.device) for name in ('input_ids', 'attention_mask')}
            with torch.autocast(device, torch.bfloat16, enabled=precision == 'amp_bf16'):
                logits = model(**inputs).logits
        order += rows
        found.append(logits.float().softmax(-1))  # a GPU is waited for once, at the end
    probabilities = torch.zeros(len(texts), model.config.num_labels)
    if found:
        probabilities[order] = torch.cat(found).cpu()
    if not probabilities.isfinite().all():
        raise UserError('the model gives logits that are not finite; expected the weights of a training that converged')
    return probabilities


def _check_lengths(model: Any, lengths: Sequence[int], places: Sequence[str]) -> None:
    if 0 in lengths:
        raise UserError(f'{places[lengths.index(0)]}: found no token; expected text')
    longest = max(lengths, default=0)
    if longest > (positions := _positions(model, longest)):
        raise UserError(
            f'{places[lengths.index(longest)]}: found {longest:,} tokens; expected at most {positions:,}, '
            'the positions that the model has'
        )


def _positions(model: Any, length: int) -> float:
    """How many positions a model can read: as many as its table of them holds; without a table, any number."""
    config = getattr(model.config, 'backbone', None) or model.config
    most, words = (getattr(config, name, None) for name in ('max_position_embeddings', 'vocab_size'))
    if not isinstance(most, int) or length <= most:
        return math.inf
    if not isinstance(model, nn.Module):  # ONNX
        with torch.device('meta'):
            model = AutoModel.from_config(config)
    tables = [item.num_embeddings for item in model.modules() if isinstance(item, nn.Embedding)]
    tables += [len(buffer) for buffer in model.buffers() if buffer.dim() > 1]
    spare = 8  # some tables begin with a few positions for padding
    return most if any(most <= size <= most + spare and size != words for size in tables) else math.inf


def _batches_by_length(lengths: Sequence[int], batch_size: int, padding: float) -> Iterator[list[int]]:
    """Indices of rows, sorted by ``lengths`` in tokens and cut into batches of at most ``batch_size``.

    Those of a batch take at most so much ``padding``, in tokens; more would cost more than another batch's pass.
    """
    batch: list[int] = []
    real = 0
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        longest = lengths[index]
        if batch and (len(batch) == batch_size or longest * len(batch) - real > padding):
            yield batch
            batch, real = [], 0
        batch.append(index)
        real += longest
    if batch:
        yield batch


# A text, the characters of it that may be cut, and where it stands.
Text = tuple[str, list[int] | None, str]


def _read_rows(path: Path, task: Task | None) -> Iterator[Text]:
    """The input text of each row of a file of rows: its ``input_text``, or what the template makes of it."""
    for row in read_rows(path):
        with catching_bad(raise_bad, row.where):
            yield *_text_of(row.fields, task), row.where


def _read_lines(lines: Iterable[bytes], task: Task | None, where: str) -> Iterator[Text]:
    """The input text of each line: plain text, or a row as JSON."""
    for number_, line in enumerate(lines, 1):
        line = line.removeprefix(BOM) if number_ == 1 else line
        place = f'{where}{number_}'
        try:
            text = line.removesuffix(b'\n').removesuffix(b'\r').decode()
        except UnicodeDecodeError:
            raise UserError(f'{place}: is not valid UTF-8') from None
        with catching_bad(raise_bad, place):
            yield *_parse_text(text, task), place


def _parse_text(text: str, task: Task | None) -> tuple[str, list[int] | None]:
    if not text.lstrip().startswith('{'):
        return check_text(text, ''), None
    try:
        row, end = parse_object(text.strip())
        if end < len(text.strip()):
            raise json.JSONDecodeError('Extra data', text.strip(), end)
    except json.JSONDecodeError as error:
        hint = '(a text that begins with { is written as {"input_text": "{..."})'
        raise BadRow('', f'not valid JSON: {error.msg}, column {error.colno} {hint}') from None
    return _text_of(row, task)


def _text_of(row: dict[str, Any], task: Task | None) -> tuple[str, list[int] | None]:
    if 'input_text' in row:
        text = check_text(row['input_text'], 'input_text')
        return text, check_cuttable(row.get('cuttable'), text)
    if task is None:
        raise BadRow('', f'found keys {sorted(row)}; expected input_text')
    if task.explode:
        raise BadRow('', f'a row of the task {task.name} holds several texts; expected input_text, one text a row')
    text, cuttable = task.render_cuttable(row)
    return check_text(text, ''), cuttable


def main(argv: Sequence[str] | None = None) -> int:
    """``dhrd predict MODEL [TEXT ...]``; returns the exit status."""
    return run(lambda: _predict(_parse_args(argv)))


def _parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog='dhrd predict', description='Classify texts with a slim classifier.')
    parser.add_argument('model', help='the folder that DropReasoningHead wrote, or anything that dhrd evaluate takes')
    parser.add_argument('texts', nargs='*', help='texts; without any, lines of --input or of stdin')
    parser.add_argument(
        '--input',
        type=Path,
        help="a file with a text a line, or JSON, JSONL, CSV or Parquet with input_text or the task's fields",
    )
    add_speed(parser)
    return parser.parse_args(argv)


def add_speed(parser: argparse.ArgumentParser) -> None:
    """The options that change how fast texts are classified."""
    parser.add_argument('--batch-size', type=number(int, 1), help='rows at a time, at most; default: 32, on a GPU 256')
    parser.add_argument('--precision', choices=PRECISIONS, default='fp32', help='default: fp32')


def _predict(args: argparse.Namespace) -> None:
    logging.set_verbosity_error()
    classifier = open_classifier(args.model)
    task = load_task(classifier.task) if classifier.task else None
    found = list(_read(args, task))
    if not found:
        raise UserError(f'{args.input or "stdin"}: found no text; expected one a line')
    whole, cuttable, places = zip(*found)
    texts = [fit(classifier.tokenizer, *text, classifier.max_seq_len) for text in zip(whole, cuttable)]
    names = classifier.label_names
    for row in predict(classifier.model, classifier.tokenizer, texts, args.batch_size, places, args.precision).tolist():
        best = max(range(len(row)), key=row.__getitem__)
        probabilities = {names[index]: round(value, 4) for index, value in enumerate(row)}
        print(json.dumps({'label': names[best], 'probabilities': probabilities}, ensure_ascii=False))


def _read(args: argparse.Namespace, task: Task | None) -> Iterator[Text]:
    """The texts that the arguments give or name; those of stdin without any."""
    if args.texts:
        yield from _read_lines((text.encode(errors='surrogateescape') for text in args.texts), task, 'argument ')
    elif args.input is None:
        stream = getattr(sys.stdin, 'buffer', None) or io.BytesIO(sys.stdin.read().encode())
        yield from _read_lines(stream, task, 'stdin, line ')
    else:
        if not args.input.is_file():
            raise UserError(f'--input: no such file: {args.input}')
        if kind_of(args.input) in SUFFIXES:
            yield from _read_rows(args.input, task)
            return
        with user_errors(f'--input: {args.input}', OSError):
            check_is_text(args.input)
            with args.input.open('rb') as file:
                yield from _read_lines(file, task, f'{args.input}, line ')

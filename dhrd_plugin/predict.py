"""Texts in, labels and probabilities out, with a slim classifier."""

import argparse
import json
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from dhrd_plugin.cli import run
from dhrd_plugin.data.tasks import Task, load_task
from dhrd_plugin.errors import UserError
from dhrd_plugin.models.load import load_slim

# What a forward pass of a small LM costs on a CPU whatever it holds, in tokens. A GPU waits for its launches instead.
CPU_PADDING = 64


def load_classifier(folder: str | Path) -> tuple[PreTrainedModel, Any]:
    """Load a slim classifier and its tokenizer; code in the folder is never run.

    Raises:
        UserError: it is no such folder.
    """
    if not (Path(folder) / 'config.json').is_file():
        raise UserError(f'{folder}: no config.json there; expected a folder that DropReasoningHead wrote')
    return load_slim(folder), AutoTokenizer.from_pretrained(folder)


@torch.inference_mode()
def predict(model: PreTrainedModel, tokenizer: Any, texts: Sequence[str], batch_size: int = 32) -> torch.Tensor:
    """Class probabilities, in the order of the texts; batched by length, so that little is padded.

    Args:
        model: of :func:`load_classifier`.
        tokenizer: likewise.
        texts: N input texts.
        batch_size: rows to a forward pass, at most; on a CPU fewer where they would be padded much.

    Returns:
        [N, K] probabilities, fp32.
    """
    encoded = tokenizer(list(texts), verbose=False)['input_ids']
    padding = CPU_PADDING if model.device.type == 'cpu' else math.inf
    probabilities = torch.zeros(len(texts), model.config.num_labels)
    for rows in batches_by_length([len(ids) for ids in encoded], batch_size, padding):
        batch = tokenizer.pad({'input_ids': [encoded[index] for index in rows]}, return_tensors='pt')
        logits = model(batch['input_ids'].to(model.device), batch['attention_mask'].to(model.device)).logits
        probabilities[rows] = logits.float().softmax(-1).cpu()
    return probabilities


def batches_by_length(lengths: Sequence[int], batch_size: int, padding: float) -> Iterator[list[int]]:
    """Indices of rows, sorted by length and cut into batches.

    Args:
        lengths: tokens of each row.
        batch_size: rows to a batch, at most.
        padding: pad tokens to a batch, at most; more would cost more than the pass that another batch takes.
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


def read_texts(lines: Iterable[str], task: Task | None, where: str) -> list[str]:
    """The input text of each line: plain text, or JSON with ``input_text`` or with the task's fields.

    Raises:
        UserError: naming the line.
    """
    texts = []
    for number, line in enumerate(lines, 1):
        line = line.rstrip('\n')
        if not line.lstrip().startswith('{'):
            texts.append(line)
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f'{where} line {number}: not valid JSON: {error.msg}') from None
        if 'input_text' in row:
            texts.append(row['input_text'])
        elif task is not None:
            try:
                texts.append(task.render(row))
            except UserError as error:
                raise UserError(f'{where} line {number}: {error}') from None
        else:
            raise UserError(f'{where} line {number}: found keys {sorted(row)}; expected input_text')
    return texts


def main(argv: Sequence[str] | None = None) -> int:
    """``predict.py MODEL [TEXT ...]``."""
    parser = argparse.ArgumentParser(description='Classify texts with a slim classifier.')
    parser.add_argument('model', help='the folder that DropReasoningHead wrote')
    parser.add_argument('texts', nargs='*', help='texts; without any, lines of --input or of stdin')
    parser.add_argument('--input', help="a file of texts, or JSONL with input_text or the task's fields")
    parser.add_argument('--batch-size', type=int, default=32)
    args = parser.parse_args(argv)
    return run(lambda: _predict(args))


def _predict(args: argparse.Namespace) -> None:
    logging.set_verbosity_error()
    model, tokenizer = load_classifier(args.model)
    stored = (getattr(model.config, 'dhrd', None) or {}).get('task')
    task = load_task(stored) if stored else None
    if args.texts:
        texts = read_texts(args.texts, task, 'argument')
    elif args.input:
        if not Path(args.input).is_file():
            raise UserError(f'--input: no such file: {args.input}')
        texts = read_texts(Path(args.input).read_text(encoding='utf-8').splitlines(), task, args.input)
    else:
        texts = read_texts(sys.stdin, task, 'stdin')
    if not texts or not all(text.strip() for text in texts):
        raise UserError('found an empty text; expected one text a line')
    names = model.config.id2label
    for row in predict(model, tokenizer, texts, args.batch_size).tolist():
        best = max(range(len(row)), key=row.__getitem__)
        probabilities = {names[index]: round(value, 4) for index, value in enumerate(row)}
        print(json.dumps({'label': names[best], 'probabilities': probabilities}, ensure_ascii=False))

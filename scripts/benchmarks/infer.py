"""How fast a slim export answers, against the other ways to ask the same weights, and against writing a reasoning."""

import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel, pipeline

from benchmarks.material import build_classifier, describe, load_backbone, load_rows
from benchmarks.measure import interleave, percentile, rates, ratios, time_once
from benchmarks.options import Options
from benchmarks.steps import batches
from benchmarks.table import Table, make_report, make_row
from dhrd_plugin.data.tasks import Task
from dhrd_plugin.export import int8
from dhrd_plugin.export.load import load_classifier
from dhrd_plugin.export.write import write_slim
from dhrd_plugin.models.build import load_slim

BATCH = 32
ROWS = 128
REPETITIONS = 5
LATENCIES = 32  # texts for the latency, one at a time
QUERIES = 32  # texts for chain of thought, in one batch
ALONE = 2  # of these, one at a time
SENTINEL = '[END OF REASONING]'
HEADS = ('linear', 'mlp')

Ask = Callable[[Sequence[str]], list[str]]  # texts to labels


def run(options: Options) -> dict[str, Any]:
    """Measure, and return the report of ``benchmark.py infer``."""
    task, rows, source = load_rows(options.rows or ROWS, 'validation')
    texts = [row['input_text'] for row in rows]
    lm, tokenizer = load_backbone(options)
    repetitions, table = options.repetitions or REPETITIONS, []
    with tempfile.TemporaryDirectory() as scratch:
        asks = {head: contenders(write_export(lm, tokenizer, task, head, Path(scratch) / head), head) for head in HEADS}
        for head in HEADS:
            table += throughput_rows(asks[head], texts, repetitions, f'{head} head')
        table += latency_rows(asks['linear'], texts[:LATENCIES])
        ours = asks['linear'][OURS]
        table += reasoning_rows(ours, lm.eval(), tokenizer, texts, task, options.new_tokens)
    table.append(import_row(repetitions))
    return make_report('infer', describe(options, rows=f'{len(rows)} of {source}', batch=BATCH), table)


OURS = 'dhrd predict'  # which runs model.onnx by itself
TORCH = 'dhrd predict in torch'
INT8 = 'dhrd predict in int8'
PIPELINE = 'pipeline'
STOCK = 'AutoModel, sorted batches'
FASTER = {OURS: 4.5, INT8: 7.0}  # than the pipeline, at least


def write_export(lm: PreTrainedModel, tokenizer: Any, task: Task, head: str, folder: Path) -> Path:
    """Write a slim export, with its ONNX files, of a backbone and a randomly initialised head."""
    model = build_classifier(lm, tokenizer, task, head)
    return write_slim(model.get_metadata(), model.network.state_dict(), folder, onnx='int8')


def contenders(folder: Path, head: str) -> dict[str, Ask]:
    """The ways to ask one export, by name; with a linear head one is to load it as transformers does."""
    ours = {
        OURS: load_classifier(folder),
        TORCH: load_classifier(folder, 'torch'),
        INT8: load_classifier(folder / int8.NAME),
    }
    others: dict[str, Ask] = {PIPELINE: ask_pipeline(load_slim(folder), AutoTokenizer.from_pretrained(folder))}
    if head == 'linear':
        stock = AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True).eval()
        others[STOCK] = partial(ask_sorted, stock, ours[TORCH].tokenizer)
    return {name: partial(found.predict, batch_size=BATCH) for name, found in ours.items()} | others


def ask_pipeline(model: PreTrainedModel, tokenizer: Any) -> Ask:
    """Ask as transformers' documentation does."""
    pipe: Any = pipeline('text-classification', model=model, tokenizer=tokenizer)
    return lambda texts: [found['label'] for found in pipe(list(texts), batch_size=BATCH)]


@torch.inference_mode()
def ask_sorted(model: PreTrainedModel, tokenizer: Any, texts: Sequence[str]) -> list[str]:
    """Ask as one does who knows that padding costs: sorted by length, each batch padded to its longest."""
    encoded = tokenizer(list(texts))['input_ids']
    order = sorted(range(len(texts)), key=lambda index: len(encoded[index]))
    logits = torch.zeros(len(texts), model.config.num_labels)
    for rows in batches(order, BATCH):
        logits[rows] = model(**tokenizer.pad({'input_ids': [encoded[row] for row in rows]}, return_tensors='pt')).logits
    return _labels(model.config, logits)


def _labels(config: Any, scores: torch.Tensor) -> list[str]:
    return [config.id2label[index] for index in scores.argmax(-1).tolist()]


def throughput_rows(asks: dict[str, Ask], texts: Sequence[str], repetitions: int, what: str) -> Table:
    """Measure queries a second of each way, ours in fp32 and int8 against the pipeline, and the share of equal labels.

    Args:
        asks: see :func:`contenders`.
        texts: to classify.
        repetitions: of each way.
        what: ends the name of each row.
    """
    answers: dict[str, list[str]] = {}

    def ask(name: str) -> None:
        answers[name] = asks[name](texts)

    found = rates(len(texts), interleave({name: partial(ask, name) for name in asks}, repetitions))
    rows = [make_row(f'{PIPELINE}, {what}', found[PIPELINE], 'queries/s')]
    for name in [name for name in asks if name != PIPELINE]:
        ratio = ratios(found[name], found[PIPELINE])
        rows.append(make_row(f'{name}, {what}', found[name], 'queries/s', ratio, PIPELINE, at_least=FASTER.get(name)))
    for name in [name for name in asks if name != OURS]:
        same = sum(a == b for a, b in zip(answers[OURS], answers[name])) / len(texts)
        # Of an untrained head, whose labels hang by a thread, int8 is held to nothing: the card tells of a trained one.
        bar = None if name == INT8 else 1.0
        rows.append(make_row(f'same labels, {OURS} and {name}, {what}', [same], at_least=bar))
    return rows


def latency_rows(asks: dict[str, Ask], texts: Sequence[str]) -> Table:
    """Measure the milliseconds of each way for one text alone; the ways take turns at each text."""
    spent: dict[str, list[float]] = {name: [] for name in asks}
    for text in [texts[0], *texts]:  # the first one once more, to warm up
        for name, ask in random.sample(list(asks.items()), len(asks)):
            spent[name].append(1000 * time_once(partial(ask, [text])))
    spent = {name: values[1:] for name, values in spent.items()}
    rows = []
    for name, values in spent.items():
        ratio = None if name == PIPELINE else ratios(values, spent[PIPELINE])
        bar = 0.6 if name == OURS else None
        rows.append(make_row(f'one text, {name}, p50', values, 'ms', ratio, PIPELINE, at_most=bar))
        rows.append(make_row(f'one text, {name}, p95', [percentile(values, 95)], 'ms'))
    return rows


def reasoning_rows(
    ours: Ask, lm: PreTrainedModel, tokenizer: Any, texts: Sequence[str], task: Task, new_tokens: int
) -> Table:
    """Measure queries a second of decoding with the paper's settings, and of ours: in a batch, and one by one.

    Args:
        ours: asks the slim export.
        lm: decodes.
        tokenizer: the LM's.
        texts: to classify.
        task: names the answers in the prompt.
        new_tokens: written for a text, at most.
    """
    written: dict[str, list[list[int]]] = {}

    def answer(size: int, some: Sequence[str]) -> None:
        for part in batches(some, size):
            ours(part)

    def reason(key: str, size: int, some: Sequence[str]) -> None:
        parts = batches(some, size)
        written[key] = [ids for part in parts for ids in decode(lm, tokenizer, part, task, new_tokens)]

    rows = []
    for key, size, some in (
        (f'in a batch of {min(QUERIES, len(texts))}', QUERIES, texts[:QUERIES]),
        ('one by one', 1, texts[:ALONE]),
    ):
        works = {'ours': partial(answer, size, some), 'reasoning': partial(reason, key, size, some)}
        ours(some)  # warm up; decoding is long enough to do so itself
        found = rates(len(some), interleave(works, 1, warmup=0))
        note = describe_reasoning(lm, tokenizer, some, written[key])
        rows.append(make_row(f'chain of thought, {key}', found['reasoning'], 'queries/s', note=note))
        ratio = ratios(found['ours'], found['reasoning'])
        rows.append(make_row(f'{OURS}, {key}', found['ours'], 'queries/s', ratio, 'chain of thought', at_least=142))
    return rows


@torch.inference_mode()
def decode(lm: PreTrainedModel, tokenizer: Any, texts: Sequence[str], task: Task, new_tokens: int) -> list[list[int]]:
    """Decode as the paper does (E.3).

    Returns:
        The new token ids of each text, up to its end-of-text token.
    """
    torch.manual_seed(0)
    side, tokenizer.padding_side = tokenizer.padding_side, 'left'
    batch = tokenizer([prompt(tokenizer, text, task) for text in texts], return_tensors='pt', padding=True)
    tokenizer.padding_side = side
    found: Any = lm.generate(  # pyright: ignore[reportCallIssue]
        batch['input_ids'],
        attention_mask=batch['attention_mask'],
        do_sample=True,
        temperature=0.1,
        top_p=0.7,
        max_new_tokens=new_tokens,
        pad_token_id=tokenizer.pad_token_id,
    )
    ends: Any = lm.generation_config.eos_token_id  # pyright: ignore[reportOptionalMemberAccess]
    ends = {ends} if isinstance(ends, int) else set(ends or ())
    return [_upto(row, ends) for row in found[:, batch['input_ids'].shape[1] :].tolist()]


def prompt(tokenizer: Any, text: str, task: Task) -> str:
    """The text with the request to think first; a chat turn where the tokenizer has a chat template."""
    answers = ' or '.join(task.answers.values())
    asked = f"{text}\nLet's think step by step. Then write {SENTINEL} and the answer, {answers}."
    if not tokenizer.chat_template:
        return asked
    turn = [{'role': 'user', 'content': asked}]
    return tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)


def _upto(ids: list[int], ends: set[int]) -> list[int]:
    end = next((index for index, token in enumerate(ids) if token in ends), len(ids))
    return ids[: end + 1]


def describe_reasoning(lm: PreTrainedModel, tokenizer: Any, texts: Sequence[str], written: list[list[int]]) -> str:
    """Say how much was written, in how many texts an answer follows, and how much more arithmetic than ours it took."""
    lengths = [len(ids) for ids in written]
    answered = sum(SENTINEL in tokenizer.decode(ids) for ids in written)
    read = sum(map(len, tokenizer(list(texts))['input_ids']))
    head: torch.Tensor = lm.get_output_embeddings().weight  # pyright: ignore
    embedding: torch.Tensor = lm.get_input_embeddings().weight  # pyright: ignore
    backbone = sum(weight.numel() for weight in lm.base_model.parameters()) - embedding.numel()
    work = ((read + sum(lengths)) * backbone + sum(lengths) * head.numel()) / (read * backbone)
    return (
        f'{statistics.mean(lengths):.0f} tokens written on average, {max(lengths)} at most; {answered} of {len(texts)} '
        f'wrote the sentinel; at least {work:.0f} times the multiplications of the slim export'
    )


def import_row(repetitions: int) -> dict[str, Any]:
    """Measure ``import dhrd_plugin`` against ``import composer``, each in a fresh interpreter."""
    works = {
        name: partial(subprocess.run, [sys.executable, '-c', f'import {name}'], check=True)
        for name in ('dhrd_plugin', 'composer')
    }
    seconds = interleave(works, repetitions)
    ratio = ratios(seconds['dhrd_plugin'], seconds['composer'])
    return make_row('import dhrd_plugin', seconds['dhrd_plugin'], 's', ratio, 'import composer', at_most=1.05)

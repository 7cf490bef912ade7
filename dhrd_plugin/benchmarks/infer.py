"""How fast a slim export answers, against the other ways to ask the same weights, and against writing a reasoning."""

import random
import statistics
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel, pipeline

from dhrd_plugin.benchmarks.material import layers_of, load_backbone, load_rows
from dhrd_plugin.benchmarks.measure import interleave, percentile, ratios, time_once
from dhrd_plugin.benchmarks.options import Options
from dhrd_plugin.benchmarks.startup import import_row
from dhrd_plugin.benchmarks.table import make_report, make_row
from dhrd_plugin.data.tasks import Task
from dhrd_plugin.models.composer_model import ComposerDualHeadClassifier
from dhrd_plugin.models.export import write_slim
from dhrd_plugin.models.load import load_slim
from dhrd_plugin.models.network import DualHeadNetwork
from dhrd_plugin.models.onnx import NAME, OnnxClassifier
from dhrd_plugin.predict import load_classifier, predict

BATCH = 32
ROWS = 128
REPETITIONS = 5
LATENCIES = 32  # texts that are asked one by one
QUERIES = 32  # for chain of thought, a batch of them
ALONE = 2  # of them one by one
SENTINEL = '[END OF REASONING]'
HEADS = ('linear', 'mlp')

Ask = Callable[[Sequence[str]], list[str]]  # texts to labels


def run(options: Options) -> dict[str, Any]:
    """Measure; the report of ``benchmark.py infer``."""
    task, rows, source = load_rows(options.rows or ROWS, 'validation')
    texts = [row['input_text'] for row in rows]
    lm, tokenizer = load_backbone(options)
    table: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        asks = {
            head: contenders(write_export(lm, tokenizer, task, head, Path(scratch) / head), head) for head in HEADS
        }
        for head in HEADS:
            table += throughput_rows(asks[head], texts, options.repetitions or REPETITIONS, f'{head} head')
        table += latency_rows(asks['linear'], texts[:LATENCIES])
        ours = asks['linear'][OURS]
        table += reasoning_rows(ours, lm.eval(), tokenizer, texts, task, options.new_tokens)
    table.append(import_row(options.repetitions or REPETITIONS))
    settings = {
        'model': options.model, 'layers': layers_of(options), 'rows': f'{len(rows)} of {source}', 'batch': BATCH,
    }  # fmt: skip
    return make_report('infer', settings, table)


# ------------------------------------------------------------------------------------- contenders

OURS = 'slim export'
PIPELINE = 'pipeline'
STOCK = 'AutoModel, sorted batches'
ONNX = 'ONNX Runtime'


def write_export(lm: PreTrainedModel, tokenizer: Any, task: Task, head: str, folder: Path) -> Path:
    """A slim export, with its ONNX file, of a backbone with a head that nobody has trained."""
    torch.manual_seed(0)
    network = DualHeadNetwork(lm, len(task.label_names), head)
    model = ComposerDualHeadClassifier(network, tokenizer, task.label_names)
    return write_slim(model.get_metadata(), network.state_dict(), folder, onnx=True)


def contenders(folder: Path, head: str) -> dict[str, Ask]:
    """The ways to ask one export, by name; the stock class where it is one, as it is with a linear head."""
    model, tokenizer = load_classifier(folder)
    others = {PIPELINE: ask_pipeline(load_slim(folder), AutoTokenizer.from_pretrained(folder))}
    if head == 'linear':
        stock = AutoModelForSequenceClassification.from_pretrained(folder).eval()
        others[STOCK] = partial(ask_sorted, stock, tokenizer)
    others[ONNX] = partial(ask_ours, OnnxClassifier(folder / NAME), tokenizer)
    return {OURS: partial(ask_ours, model, tokenizer), **others}


def ask_ours(model: Any, tokenizer: Any, texts: Sequence[str]) -> list[str]:
    """As ``predict.py`` does."""
    return _labels(model.config, predict(model, tokenizer, texts, BATCH))


def ask_pipeline(model: PreTrainedModel, tokenizer: Any) -> Ask:
    """As transformers' documentation does."""
    pipe: Any = pipeline('text-classification', model=model, tokenizer=tokenizer)
    return lambda texts: [found['label'] for found in pipe(list(texts), batch_size=BATCH)]


@torch.inference_mode()
def ask_sorted(model: PreTrainedModel, tokenizer: Any, texts: Sequence[str]) -> list[str]:
    """As somebody does who knows that padding costs: sorted, each batch padded to its longest."""
    encoded = tokenizer(list(texts))['input_ids']
    order = sorted(range(len(texts)), key=lambda index: len(encoded[index]))
    logits = torch.zeros(len(texts), model.config.num_labels)
    for start in range(0, len(order), BATCH):
        rows = order[start : start + BATCH]
        logits[rows] = model(**tokenizer.pad({'input_ids': [encoded[row] for row in rows]}, return_tensors='pt')).logits
    return _labels(model.config, logits)


def _labels(config: Any, scores: torch.Tensor) -> list[str]:
    return [config.id2label[index] for index in scores.argmax(-1).tolist()]


# ------------------------------------------------------------------------------------------ tables


def throughput_rows(asks: dict[str, Ask], texts: Sequence[str], repetitions: int, what: str) -> list[dict[str, Any]]:
    """Queries a second of each way, and what ours is to each; then whether the labels are the same."""
    answers: dict[str, list[str]] = {}

    def ask(name: str) -> None:
        answers[name] = asks[name](texts)

    seconds = interleave({name: partial(ask, name) for name in asks}, repetitions)
    rates = {name: [len(texts) / spent for spent in values] for name, values in seconds.items()}
    rows = [make_row(f'{name}, {what}', rates[name], 'queries/s') for name in asks if name != OURS]
    for name in [name for name in asks if name != OURS]:
        ratio = ratios(rates[OURS], rates[name])
        bar: dict[str, Any] = {'at_least': 2.0} if name == PIPELINE else {}
        rows.append(make_row(f'{OURS}, {what}', rates[OURS], 'queries/s', ratio, name, **bar))
        same = sum(a == b for a, b in zip(answers[OURS], answers[name])) / len(texts)
        rows.append(make_row(f'same labels as {name}, {what}', [same], at_least=1.0))
    return rows


def latency_rows(asks: dict[str, Ask], texts: Sequence[str]) -> list[dict[str, Any]]:
    """Milliseconds for one text alone, of each way; the ways take turns at each text."""
    spent: dict[str, list[float]] = {name: [] for name in asks}
    for text in [texts[0], *texts]:  # the first is asked twice; once to warm up
        for name, ask in random.sample(list(asks.items()), len(asks)):
            spent[name].append(1000 * time_once(partial(ask, [text])))
    spent = {name: values[1:] for name, values in spent.items()}
    rows = []
    for name, values in spent.items():
        against: dict[str, Any] = {} if name == OURS else {'ratio': ratios(values, spent[OURS]), 'against': OURS}
        rows.append(make_row(f'one text, {name}, p50', values, 'ms', **against))
        rows.append(make_row(f'one text, {name}, p95', [percentile(values, 95)], 'ms'))
    return rows


# -------------------------------------------------------------------------------- chain of thought


def reasoning_rows(
    ours: Ask, lm: PreTrainedModel, tokenizer: Any, texts: Sequence[str], task: Task, new_tokens: int
) -> list[dict[str, Any]]:
    """Queries a second of decoding with the paper's settings, and what ours is to it: in a batch, and one by one."""
    written: dict[str, list[list[int]]] = {}

    def reason(key: str, size: int, some: Sequence[str]) -> None:
        written[key] = []
        for start in range(0, len(some), size):
            written[key] += decode(lm, tokenizer, some[start : start + size], task, new_tokens)

    rows = []
    for key, size, some in (
        (f'in a batch of {min(QUERIES, len(texts))}', QUERIES, texts[:QUERIES]),
        ('one by one', 1, texts[:ALONE]),
    ):
        works = {'ours': partial(_in_batches, ours, size, some), 'reasoning': partial(reason, key, size, some)}
        ours(some)  # warm; decoding is long enough to warm itself
        seconds = interleave(works, 1, warmup=0)
        rates = {name: [len(some) / spent for spent in values] for name, values in seconds.items()}
        note = describe_reasoning(lm, tokenizer, some, written[key])
        rows.append(make_row(f'chain of thought, {key}', rates['reasoning'], 'queries/s', note=note))
        ratio = ratios(rates['ours'], rates['reasoning'])
        rows.append(make_row(f'{OURS}, {key}', rates['ours'], 'queries/s', ratio, 'chain of thought', at_least=142))
    return rows


def _in_batches(ask: Ask, size: int, texts: Sequence[str]) -> None:
    for start in range(0, len(texts), size):
        ask(texts[start : start + size])


@torch.inference_mode()
def decode(lm: PreTrainedModel, tokenizer: Any, texts: Sequence[str], task: Task, new_tokens: int) -> list[list[int]]:
    """The tokens that the LM writes for each text, with the paper's decoding (E.3)."""
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
    """A text with the request to think first; as a turn of a chat where the tokenizer knows how one looks."""
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
    """How much was written, whether an answer came of it, and how many times the arithmetic of ours that is."""
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

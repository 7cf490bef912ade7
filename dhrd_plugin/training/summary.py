"""What a training run says: before it begins, while its stages last, and when it is done."""

import importlib.metadata
import math
import os
import shlex
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any

from composer import Trainer
from composer.core import Precision
from composer.core.precision import get_precision_context
from composer.loggers import InMemoryLogger
from composer.utils import dist, format_name_with_dist, format_name_with_dist_and_time

from dhrd_plugin.algorithms.auxiliary_reasoning_loss import AuxiliaryReasoningLoss
from dhrd_plugin.callbacks.drop_reasoning_head import DropReasoningHead
from dhrd_plugin.callbacks.evaluations import Evaluations
from dhrd_plugin.callbacks.token_counter import TokenCounter
from dhrd_plugin.data.tasks import load_task
from dhrd_plugin.data.texts import as_argument
from dhrd_plugin.files import write_json
from dhrd_plugin.models.composer_model import ComposerDualHeadClassifier
from dhrd_plugin.models.network import DualHeadNetwork
from dhrd_plugin.models.padding_free import one_kernel
from dhrd_plugin.streams.rows import StreamRows
from dhrd_plugin.streams.stream import TripletStream
from dhrd_plugin.training.config import Config, used, written
from dhrd_plugin.training.display import steps_of_fit
from dhrd_plugin.training.labels import count_labels
from dhrd_plugin.training.loggers import mlflow_run

SUMMARY = 'summary.json'
LOG = '{run_name}/logs-rank{rank}.txt'  # where Composer's FileLogger writes, if it is not told
SERIES = ('loss/train/', 'dhrd/', 'metrics/')  # what a summary keeps of an InMemoryLogger


@contextmanager
def timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Note how many seconds the ``with`` block took."""
    start = time.monotonic()
    try:
        yield
    finally:
        seconds[stage] = round(time.monotonic() - start, 3)


def say(text: str) -> None:
    """Print on rank 0."""
    if dist.get_global_rank() == 0:
        print(text, flush=True)


def describe(trainer: Trainer, model: ComposerDualHeadClassifier, config: Config) -> str:
    """One line: what will be trained."""
    parameters = sum(p.numel() for p in model.parameters())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    loader = trainer.state.train_dataloader
    rows = loader.dataset.epoch_size if loader is not None else 0  # pyright: ignore
    batches = len(loader) if loader is not None else 0  # pyright: ignore
    steps = steps_of_fit(trainer.state.max_duration, batches)
    ranks = dist.get_world_size()
    reasoning = [repr(part) for part in trainer.state.algorithms if isinstance(part, AuxiliaryReasoningLoss)]
    method = ''.join(reasoning) or 'pooled baseline, no reasoning loss'
    way = way_of(model.network, trainer.state.precision) if model.network.padding_free else ''
    return (
        f'{config.run_name}: {parameters:,} parameters, {trainable:,} trained; '
        f'{rows:,} rows, {batches:,} steps an epoch, {config.max_duration}{f" = {steps:,} steps" if steps else ""}, '
        f'{ranks} rank{"s" if ranks > 1 else ""}; {method}{way and f"; padding_free, {way}"}'
    )


def way_of(network: DualHeadNetwork, precision: Precision) -> str:
    """How attention takes the rows of a batch without padding."""
    config = network.config
    size = getattr(config, 'head_dim', None) or config.hidden_size // config.num_attention_heads
    states = next(network.parameters()).new_empty(0, size)
    with get_precision_context(precision):
        return 'all rows in one kernel' if one_kernel(states, states) else 'row by row'


def finish(
    config: Config,
    trainer: Trainer,
    counter: TokenCounter,
    streams: Mapping[str, Sequence[TripletStream]],
    seconds: Mapping[str, float],
) -> None:
    """Write ``summary.json``, and print what was reached and what to type next.

    ``streams`` are the rows of each loader, by its key; ``seconds`` those of each stage.
    """
    places = {key: [_place(stream) for stream in found] for key, found in streams.items()}
    several = load_task(config.task).multi_label
    best = best_constant_f1 if several else most_frequent
    frequent = {label: best(streams[f'eval_loaders.{label}']) for label in used(config.eval_loaders)}
    summary = summarize(config, trainer, counter)
    summary |= {'most_frequent': frequent, 'data': places, 'seconds': dict(seconds)}
    path = Path(config.output_dir) / SUMMARY
    write_json(path, summary)
    if (log := log_file(config)) is not None:
        print(f'log: {log}')
    if config.save_folder is not None:
        print(f'checkpoints: {format_name_with_dist(config.save_folder, config.run_name)}')
    answer = 'labels for every row: micro F1 {:.4f}' if several else 'label for every row: {:.4f} right'
    for label, metrics in summary['metrics'].items():
        values = ', '.join(f'{name} {value:.4f}' for name, value in metrics.items())
        told = answer.format(summary['most_frequent'][label])
        print(f'{label}: {values} (the same {told})')
    print(f'summary: {path}')
    if tracked := mlflow_run(trainer.logger):
        print(f'mlflow: {tracked}')
    if best := summary['best']:
        found = f'{best["dataloader_label"]} {best["metric"]} {best["value"]:.4f}'
        print(f'exported: the weights of batch {best["batch"]}, {found}')
    if summary['export']:
        print(f'slim classifier: {summary["export"]}')
        print(f'try: {_command()} predict {summary["export"]} {shlex.quote(_example(trainer))}', flush=True)


def _place(stream: TripletStream) -> str:
    """The folder of a set of shards; the stream itself reads it through a link of this run."""
    return str(Path(stream.local, stream.split).resolve())


def log_file(config: Config) -> Path | None:
    """What this rank's FileLogger writes, if the config has one."""
    logger = used(config.loggers).get('file')
    if logger is None:
        return None
    return Path(format_name_with_dist(logger.get('filename', LOG), config.run_name))


def summarize(config: Config, trainer: Trainer, counter: TokenCounter) -> dict[str, Any]:
    """What a run did, as plain data; the series of an InMemoryLogger, if there is one, to six digits."""
    state = trainer.state
    (evaluations,) = (part for part in state.callbacks if isinstance(part, Evaluations))
    export = used(config.callbacks).get('drop_reasoning_head')
    versions = ('dhrd-plugin', 'torch', 'transformers', 'mosaicml', 'mosaicml-streaming', 'peft')
    steps = int(state.timestamp.batch)
    summary = {
        'run_name': config.run_name,
        'metrics': {
            label: {name: _number(value) for name, value in values.items()}
            for label, values in evaluations.metrics(state).items()
        },
        'rows': int(state.timestamp.sample),
        'steps': steps,
        **counter.final,
        'seconds_per_step': round(state.timestamp.total_wct.total_seconds() / max(1, steps), 3),
        'world_size': dist.get_world_size(),
        'versions': {'python': sys.version.split()[0], **{name: importlib.metadata.version(name) for name in versions}},
        'export': export and format_name_with_dist_and_time(str(export['output_dir']), state.run_name, state.timestamp),
        'best': next((part.best for part in state.callbacks if isinstance(part, DropReasoningHead)), None),
        'config': written(config),
    }
    for logger in trainer.logger.destinations:
        if isinstance(logger, InMemoryLogger):
            summary['series'] = {
                name: [[int(time.batch), float(f'{float(value):.6g}')] for time, value in values]
                for name, values in sorted(logger.data.items())
                if name.startswith(SERIES)
            }
    return summary


def most_frequent(streams: Sequence[TripletStream]) -> float:
    """The share of an evaluation set's most frequent label in its rows that have one; 0 without any."""
    counts = count_labels(streams)
    return max(counts.values(), default=0) / max(1, counts.total())


def best_constant_f1(streams: Sequence[TripletStream]) -> float:
    """The best micro F1 of an evaluation set of several labels with the same ones, the most frequent, for every row."""
    rows = len(StreamRows(streams))
    counts = [count for _, count in count_labels(streams).most_common()]
    found, total = 0.0, sum(counts)
    for size, right in enumerate(accumulate(counts), 1):
        found = max(found, 2 * right / (size * rows + total))
    return found


def _number(value: float) -> float:
    return value if math.isfinite(value) else math.nan


def _command() -> str:
    """``dhrd`` as it can be typed here: by its path where its environment is not active."""
    return 'dhrd' if shutil.which('dhrd') else os.path.relpath(Path(sys.executable).with_name('dhrd'))


def _example(trainer: Trainer) -> str:
    """An input text of the evaluation rows, else of the training rows, as ``dhrd predict`` takes it."""
    loaders = [evaluator.dataloader.dataloader for evaluator in trainer.state.evaluators]  # pyright: ignore
    rows: Any = (*loaders, trainer.state.train_dataloader)[0].dataset  # pyright: ignore
    task = getattr(trainer.state.model, 'info', {}).get('task')
    return as_argument(rows[0]['input_text'], load_task(task) if task else None)

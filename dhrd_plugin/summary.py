"""What a training run says: before it begins, while its stages last, and when it is done."""

import importlib.metadata
import math
import shlex
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from composer import Trainer
from composer.utils import dist, format_name_with_dist
from omegaconf import DictConfig

from dhrd_plugin.algorithms.auxiliary_reasoning_loss import AuxiliaryReasoningLoss
from dhrd_plugin.callbacks.display import steps_of_fit
from dhrd_plugin.callbacks.drop_reasoning_head import compute_metrics
from dhrd_plugin.callbacks.progress import TokenCounter
from dhrd_plugin.config import as_dict, part_settings, without_secrets
from dhrd_plugin.files import write_json
from dhrd_plugin.models.composer_model import ComposerDualHeadClassifier
from dhrd_plugin.tracking import mlflow_run

LOG = '{run_name}/logs-rank{rank}.txt'  # where Composer's FileLogger writes, if it is not told


class Stages:
    """Seconds spent, by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def __call__(self, name: str) -> 'Stages':
        """Time the ``with`` block that follows as ``name``."""
        self._name, self._start = name, time.monotonic()
        return self

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        self.seconds[self._name] = round(time.monotonic() - self._start, 3)


def say(text: str) -> None:
    """Print on rank 0."""
    if dist.get_global_rank() == 0:
        print(text, flush=True)


def describe(trainer: Trainer, model: ComposerDualHeadClassifier, config: DictConfig) -> str:
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
    return (
        f'{config.run_name}: {parameters:,} parameters, {trainable:,} trained; '
        f'{rows:,} rows, {batches:,} steps an epoch, {config.max_duration}{f" = {steps:,} steps" if steps else ""}, '
        f'{ranks} rank{"s" if ranks > 1 else ""}; {method}'
    )


def finish(config: DictConfig, trainer: Trainer, counter: TokenCounter, seconds: Mapping[str, float]) -> None:
    """Write ``summary.json`` and say what was reached and what to type next."""
    summary = summarize(config, trainer, counter, seconds)
    path = Path(config.output_dir) / 'summary.json'
    write_json(path, summary)
    for what, place in _places(config).items():
        print(f'{what}: {place}')
    for label, metrics in summary['metrics'].items():
        values = ', '.join(f'{name} {value:.4f}' for name, value in metrics.items())
        print(f'{label}: {values}')
    print(f'summary: {path}')
    if tracked := mlflow_run(trainer.logger):
        print(f'mlflow: {tracked}')
    if summary['export']:
        print(f'slim classifier: {summary["export"]}')
        print(f'try: python scripts/predict.py {summary["export"]} {shlex.quote(_example(trainer))}', flush=True)


def _places(config: DictConfig) -> dict[str, str]:
    """Where the log and the checkpoints are, if the run writes any."""
    places = {}
    if (log := log_file(config)) is not None:
        places['log'] = str(log)
    if config.save_folder is not None:
        places['checkpoints'] = format_name_with_dist(config.save_folder, config.run_name)
    return places


def log_file(config: DictConfig) -> Path | None:
    """What this rank's FileLogger writes, if the config has one."""
    logger = part_settings(config, 'loggers').get('file')
    if logger is None:
        return None
    return Path(format_name_with_dist(logger.get('filename', LOG), config.run_name))


def summarize(
    config: DictConfig, trainer: Trainer, counter: TokenCounter, seconds: Mapping[str, float]
) -> dict[str, Any]:
    """What a run did, as plain data."""
    state = trainer.state
    export = part_settings(config, 'callbacks').get('drop_reasoning_head')
    versions = ('torch', 'transformers', 'mosaicml', 'mosaicml-streaming', 'peft')
    return {
        'run_name': config.run_name,
        'metrics': {
            label: {name: _number(value) for name, value in values.items()}
            for label, values in compute_metrics(state).items()
        },
        'rows': int(state.timestamp.sample),
        'steps': int(state.timestamp.batch),
        **counter.final,
        'seconds': dict(seconds),
        'world_size': dist.get_world_size(),
        'versions': {
            'python': sys.version.split()[0],
            'dhrd-plugin': importlib.metadata.version('dhrd-plugin'),
            **{name: importlib.metadata.version(name) for name in versions},
        },
        'export': export and str(export['output_dir']),
        'config': without_secrets(as_dict(config)),
    }


def _number(value: float) -> float:
    return value if math.isfinite(value) else math.nan


def _example(trainer: Trainer) -> str:
    """An input text of the evaluation rows, else of the training rows."""
    for evaluator in trainer.state.evaluators:
        return evaluator.dataloader.dataloader.dataset[0]['input_text']  # pyright: ignore
    return trainer.state.train_dataloader.dataset[0]['input_text']  # pyright: ignore

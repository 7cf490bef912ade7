"""Does distillation help, and how surely: arms x tasks x seeds, each cell an ordinary training run."""

import argparse
import gc
import hashlib
import importlib.metadata
import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from composer import Trainer
from composer.loggers import InMemoryLogger
from composer.utils import dist, get_device
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch.distributed.checkpoint.state_dict import _get_fqns
from transformers.utils import logging

from dhrd_plugin.cli import run
from dhrd_plugin.comparison import write_report
from dhrd_plugin.comparison.results import PLAN, RESULTS, read_lines, read_plan
from dhrd_plugin.config import (
    as_dict,
    changed,
    load_config,
    merge,
    parse_overrides,
    part_settings,
    read_yaml,
    without_secrets,
)
from dhrd_plugin.data.tasks import load_task
from dhrd_plugin.data.triplets import Triplet
from dhrd_plugin.errors import UserError, nearest
from dhrd_plugin.evaluate import evaluate, open_classifier, predict_rows
from dhrd_plugin.files import write_bytes
from dhrd_plugin.ranks import on_rank_zero
from dhrd_plugin.summary import say
from dhrd_plugin.training import check_limits, train

# Where a run writes, and what it says meanwhile, is not what it finds.
UNSEEN = ('run_name', 'output_dir', 'loggers', 'progress_bar', 'log_to_console', 'console_log_interval')


@dataclass
class Comparison:
    """A comparison, as its YAML has it.

    Attributes:
        variables: for interpolation, such as ``${variables.data}``.
        base: a training YAML, by a path relative to this one.
        tasks: by name, what a task changes in it: the template, the data. ``null`` leaves one out.
        arms: by name, what an arm changes in it; likewise.
        baseline: the arm that the others are held against.
        seeds: each a run of every task and arm.
        keep_exports: keep each cell's slim classifier; its predictions are kept in any case.
    """

    name: str = 'comparison'
    variables: dict[str, Any] = field(default_factory=dict)
    output_dir: str = 'runs/compare/${name}'
    base: str = MISSING
    tasks: dict[str, dict[str, Any] | None] = field(default_factory=dict)
    arms: dict[str, dict[str, Any] | None] = field(default_factory=dict)
    baseline: str = 'pooled'
    seeds: list[int] = field(default_factory=lambda: [17, 18, 19])
    keep_exports: bool = False


@dataclass(frozen=True)
class Cell:
    """One run: a task, an arm, a seed, and its config."""

    task: str
    arm: str
    seed: int
    config: DictConfig

    @property
    def key(self) -> tuple[str, str, int]:
        """What tells it from the others."""
        return self.task, self.arm, self.seed

    @property
    def name(self) -> str:
        """For people."""
        return f'{self.task} {self.arm} seed {self.seed}'

    @property
    def fingerprint(self) -> str:
        """Of all that its result depends on in its config; a key at its default, new ones too, changes nothing."""
        settings = {key: value for key, value in changed(self.config).items() if key not in UNSEEN}
        settings['callbacks'] = {**settings['callbacks'], 'drop_reasoning_head': None}
        text = json.dumps(without_secrets(settings), sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


# ----------------------------------------------------------------------------------- what to run


def load_comparison(path: str | Path, overrides: Sequence[str] = ()) -> Comparison:
    """Read a comparison's YAML.

    Raises:
        UserError: an unknown or missing key, a wrong type, no arm or task, a baseline that is no arm.
    """
    given = read_yaml(path, 'yamls/compare/superglue.yaml')
    config = merge(path, Comparison, given, parse_overrides(_whole_names(overrides, given)))
    try:
        comparison: Comparison = OmegaConf.to_object(config)  # pyright: ignore[reportAssignmentType]
    except OmegaConfBaseException as error:
        raise UserError(f'{path}: {error.full_key or "config"}: {str(error).strip().splitlines()[0]}') from error
    for key in ('tasks', 'arms'):
        planned = getattr(comparison, key)
        kept = {name: changes for name, changes in planned.items() if changes is not None}
        setattr(comparison, key, kept)
        if left := [name for name in planned if name not in kept]:
            say(f'{path}: {key}: left out, being null: {", ".join(left)}')
    for key in ('tasks', 'arms', 'seeds'):
        if not getattr(comparison, key):
            raise UserError(f'{path}: {key}: found none; expected at least one')
    for key in ('tasks', 'arms'):
        for name in getattr(comparison, key):
            if not re.fullmatch(r'\w[\w.-]*', name):
                raise UserError(f'{path}: {key}: found {name!r}; expected a name of letters, digits, ".", "_", "-"')
    baseline, arms = comparison.baseline, list(comparison.arms)
    if baseline not in arms:
        raise UserError(f'{path}: baseline: found {baseline!r}; {nearest(baseline, arms)}')
    comparison.base = str(Path(path).parent / comparison.base)
    return comparison


def _whole_names(overrides: Sequence[str], given: DictConfig) -> list[str]:
    """``arms.dhrd_0.3=null`` as ``arms[dhrd_0.3]=null``: a dot in the name of a task or an arm parts no keys."""
    found = list(overrides)
    plain: Any = OmegaConf.to_container(given)
    for key in ('tasks', 'arms'):
        names = plain.get(key)
        longest_first = sorted(map(str, names), key=len, reverse=True) if isinstance(names, dict) else ()
        for name in longest_first:
            dotted = rf'^{key}\.{re.escape(name)}(?=[.=])'
            found = [re.sub(dotted, f'{key}[{name}]', override) for override in found]
    return found


def build_cells(comparison: Comparison, where: str = 'comparison') -> list[Cell]:
    """Every cell with its config, checked; one seed of everything after another, so that a part of it says something.

    Args:
        comparison: see :func:`load_comparison`.
        where: its YAML, for messages.

    Raises:
        UserError: a config that cannot be trained; names the arm or task.
    """
    return [
        _build_cell(comparison, task, arm, seed, where)
        for seed in comparison.seeds
        for task in comparison.tasks
        for arm in comparison.arms
    ]


def _build_cell(comparison: Comparison, task: str, arm: str, seed: int, where: str) -> Cell:
    folder = Path(comparison.output_dir) / 'cells' / task / arm / str(seed)
    ours = {
        'run_name': f'{task}-{arm}-{seed}',
        'output_dir': str(folder),
        'seed': seed,
        'callbacks': {'drop_reasoning_head': {'output_dir': str(folder / 'slim')}},
        'loggers': {'in_memory': {}},
    }
    layers = {
        f'{where}: tasks.{task}': comparison.tasks[task],
        f'{where}: arms.{arm}': comparison.arms[arm],
        f'{where}: {task} {arm}': ours,
    }
    config = load_config(comparison.base, layers=layers)
    if not any(config.eval_loaders.values()):
        raise UserError(f'{where}: tasks.{task}.eval_loaders: found none; expected the rows to compare on')
    check_limits(config)
    return Cell(task, arm, seed, config)


# --------------------------------------------------------------------------------------- running


def compare(comparison: Comparison, where: str = 'comparison') -> Path:
    """Run every cell that has no result yet. Every rank calls it.

    A result is added to ``results.jsonl`` when its cell has ended, so that a comparison that was killed goes
    on with the cell at which it was.

    Args:
        comparison: see :func:`load_comparison`.
        where: its YAML, for messages.

    Returns:
        ``results.jsonl``: a line for each cell and evaluation set.

    Raises:
        UserError: a config that cannot be trained; a result that was made with another config.
    """
    cells = build_cells(comparison, where)
    folder = Path(comparison.output_dir)
    results = folder / RESULTS
    dist.initialize_dist(get_device(None))
    done = _done(results, cells)
    on_rank_zero(lambda: _write_comparison(comparison, folder))
    say(f'{comparison.name}: {len(cells)} cells, {len(done)} of them in {results}')
    for number, cell in enumerate(cells, 1):
        if cell.key not in done:
            say(f'--- cell {number} of {len(cells)}: {cell.name}')
            records = run_cell(cell, comparison.keep_exports)
            on_rank_zero(lambda records=records: _append(results, records))
    return results


def _write_comparison(comparison: Comparison, folder: Path) -> None:
    settings = OmegaConf.create(without_secrets(asdict(comparison)))
    write_bytes(folder / PLAN, OmegaConf.to_yaml(settings).encode())


def _done(path: Path, cells: Sequence[Cell]) -> set[tuple[str, str, int]]:
    """The cells that have results; refuses those of another config."""
    prints = {cell.key: cell.fingerprint for cell in cells}
    done = set()
    for record in read_lines(path):
        key = record['task'], record['arm'], record['seed']
        if prints.get(key, record['fingerprint']) != record['fingerprint']:
            raise UserError(
                f'{path}: {key[0]} {key[1]} seed {key[2]} was run with other settings than it has now; '
                'expected the same, or another output_dir'
            )
        done.add(key)
    return done & set(prints)


def _append(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    lines = ''.join(f'{json.dumps(record, ensure_ascii=False)}\n' for record in records)
    write_bytes(path, (path.read_bytes() if path.exists() else b'') + lines.encode())


def run_cell(cell: Cell, keep_export: bool = False) -> list[dict[str, Any]]:
    """Train a cell and predict with what it exports. Every rank calls it.

    Args:
        cell: one of :func:`build_cells`.
        keep_export: leave the slim classifier where it is.

    Returns:
        A record for each evaluation set, see :func:`make_record`; on rank 0 alone.
    """
    folder = Path(cell.config.output_dir)
    if not cell.config.autoresume:  # what a killed run left
        on_rank_zero(lambda: shutil.rmtree(folder, ignore_errors=True))
    trainer = train(cell.config)
    rows = {evaluator.label: list(_rows(evaluator)) for evaluator in trainer.state.evaluators}
    ran = _describe_run(cell, trainer)
    del trainer  # which closes it; one that was closed before is kept, with its model, by Composer's exit hook
    _get_fqns.cache_clear()  # in which torch keeps every model whose state was gathered
    gc.collect()
    task = load_task(as_dict(cell.config)['task'])
    records = []
    with open_classifier(str(folder / 'slim')) as classifier:
        for split, found in rows.items():
            probabilities = predict_rows(classifier, found, task, cell.config.device_eval_batch_size)
            report = evaluate(probabilities, found, task)
            what = _describe_rows(probabilities.argmax(-1).tolist(), found, task, report)
            records.append({**ran, 'split': split, **what})
    dist.barrier()
    if not keep_export:
        on_rank_zero(lambda: shutil.rmtree(folder / 'slim'))
    return records


def _rows(evaluator: Any) -> Iterator[Triplet]:
    dataset = evaluator.dataloader.dataloader.dataset
    return (dataset[index] for index in range(len(dataset)))


def _describe_run(cell: Cell, trainer: Trainer) -> dict[str, Any]:
    state = trainer.state
    (log,) = (found for found in trainer.logger.destinations if isinstance(found, InMemoryLogger))
    method = part_settings(cell.config, 'algorithms').get('auxiliary_reasoning_loss')
    return {
        'task': cell.task,
        'arm': cell.arm,
        'seed': cell.seed,
        'fingerprint': cell.fingerprint,
        'model': cell.config.model.pretrained_model_name_or_path,
        'alpha': None if method is None else method.get('alpha', 1.0),
        'beta': 1.0 if method is None else method.get('beta', 1.0),
        'schedule': method and method.get('schedule'),
        'control': cell.config.train_loader.control,
        'steps': int(state.timestamp.batch),
        'rows': int(state.timestamp.sample),
        'tokens': int(state.timestamp.token),
        'seconds_per_step': round(state.timestamp.total_wct.total_seconds() / max(1, int(state.timestamp.batch)), 3),
        'world_size': dist.get_world_size(),
        'series': {
            name: [[int(time.batch), _rounded(value)] for time, value in values]
            for name, values in sorted(log.data.items())
            if name.startswith(('loss/train/', 'dhrd/', 'metrics/'))
        },
        'finished': datetime.now(timezone.utc).isoformat(timespec='seconds'),
        'versions': {
            name: importlib.metadata.version(name) for name in ('dhrd-plugin', 'torch', 'transformers', 'mosaicml')
        },
    }


def _rounded(value: Any) -> float:
    return float(f'{float(value):.6g}')


def _describe_rows(
    predictions: list[int], rows: Sequence[Triplet], task: Any, report: Mapping[str, Any]
) -> dict[str, Any]:
    names = list(task.label_names)
    return {
        'metrics': report['metrics'],
        'task_metrics': list(task.metrics),
        'label_names': names,
        'ids': [row['id'] for row in rows],
        'groups': [row['group'] or None for row in rows],
        'labels': [names.index(row['label']) for row in rows],
        'predictions': predictions,
    }


# ----------------------------------------------------------------------------------- the command


def main(argv: Sequence[str] | None = None) -> int:
    """``compare.py YAML [key=value ...]``."""
    parser = argparse.ArgumentParser(description='Train every arm on every task with every seed, and report.')
    parser.add_argument('yaml', help='a comparison, such as yamls/compare/superglue.yaml')
    parser.add_argument('overrides', nargs='*', help='key=value')
    parser.add_argument('--report', action='store_true', help='only write the report of the cells that are there')
    args = parser.parse_intermixed_args(argv)  # overrides may stand on either side of --report
    return run(lambda: _compare(args))


def _compare(args: argparse.Namespace) -> None:
    logging.set_verbosity_error()
    comparison = load_comparison(args.yaml, args.overrides)
    if args.report:
        _check_plan(comparison, args.yaml)
    else:
        compare(comparison, args.yaml)
    if dist.get_global_rank() == 0:
        for path in write_report(Path(comparison.output_dir)):
            print(f'report: {path}')


def _check_plan(comparison: Comparison, where: str) -> None:
    """A report is of the plan that was run; one that has changed since must not be left out in silence."""
    path = Path(comparison.output_dir) / PLAN
    stored, _ = read_plan(path)
    for key, wanted in {
        'tasks': list(comparison.tasks),
        'arms': list(comparison.arms),
        'baseline': comparison.baseline,
        'seeds': comparison.seeds,
    }.items():
        found = type(wanted)(stored[key])  # of tasks and arms, the names
        if found != wanted:
            raise UserError(
                f'{path}: {key}: found {found!r}, where {where} has {wanted!r} by now; '
                'run it without --report, which trains only what is missing'
            )

"""What cannot work is refused here, before data or weights are touched."""

import dataclasses
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from composer import Time, Timestamp
from composer.utils import dist

from dhrd_plugin.arguments import check_arguments
from dhrd_plugin.callbacks.gradient_comparison import NO_COMPILE, NO_FSDP
from dhrd_plugin.data.controls import PLAIN
from dhrd_plugin.data.rows import find_source
from dhrd_plugin.data.tasks import Task, load_task
from dhrd_plugin.errors import UserError, user_errors
from dhrd_plugin.metrics import ExactMatch, build_metrics
from dhrd_plugin.streams.remote import is_remote
from dhrd_plugin.streams.settings import check_settings
from dhrd_plugin.times import parse_time
from dhrd_plugin.training import registry
from dhrd_plugin.training.config import Config, LoaderConfig, loaders, used
from dhrd_plugin.training.fsdp import build_fsdp, fsdp_version


def check_limits(config: Config) -> None:
    """Refuse what cannot work on this machine, or with these files."""
    check_task(config, load_task(config.task))
    for key, loader in loaders(config).items():
        check_loader(key, loader)
    world_size = dist.get_world_size()
    if config.global_train_batch_size % world_size:
        raise UserError(
            f'global_train_batch_size: found {config.global_train_batch_size} on {world_size} ranks; '
            'expected a multiple of the number of ranks'
        )
    gpu = on_gpu(config)
    if config.device == 'gpu' and not gpu:
        raise UserError("device: found 'gpu', and there is none here; expected cpu (or leave it out)")
    if config.precision not in (None, 'fp32') and not gpu:
        raise UserError(f'precision: found {config.precision!r} on a CPU; expected fp32 (or leave it out)')
    if config.device_train_microbatch_size == 'auto' and not gpu:
        raise UserError("device_train_microbatch_size: found 'auto' on a CPU; expected a number")
    if config.fsdp_config is not None:
        check_fsdp(config, gpu)
    if 'gradient_comparison' in used(config.callbacks):
        for key, reason in {'fsdp_config': NO_FSDP, 'compile_config': NO_COMPILE}.items():
            if getattr(config, key) is not None:
                raise UserError(f'callbacks.gradient_comparison: found with {key}: {reason}')
    check_saved(config)
    check_parts(config)
    check_chosen(config, load_task(config.task))


def check_saved(config: Config) -> None:
    """Refuse checkpoints that nobody could go on from."""
    folder = config.save_folder
    if config.save_num_checkpoints_to_keep == 0 and folder and not is_remote(folder):
        raise UserError('save_num_checkpoints_to_keep: found 0, which keeps none; expected 1 or more, or -1 for all')
    if config.autoresume and folder is None:
        raise UserError(
            'autoresume: found without save_folder; expected a folder, or an address such as s3://bucket/rte'
        )
    algorithms = used(config.algorithms)
    if 'layer_freezing' in algorithms and folder:
        raise UserError(
            'algorithms.layer_freezing: found with save_folder: the optimizer of a frozen layer cannot be saved; '
            'expected save_folder=null'
        )
    resumed = config.autoresume or (config.load_path and not config.load_weights_only)
    if 'sam' in algorithms and resumed:
        key = 'autoresume' if config.autoresume else 'load_path'
        raise UserError(
            f'algorithms.sam: found with {key}: its checkpoints lack the state of the optimizer inside it; expected '
            f'{"autoresume=false" if config.autoresume else "load_weights_only=true beside it"}'
        )


def check_parts(config: Config) -> None:
    """Make the parts once, for what their constructors refuse; not the loggers, which begin runs in trackers."""
    registry.build_parts('algorithms', used(config.algorithms))
    registry.build_parts('callbacks', used(config.callbacks))
    registry.build_named('optimizer', config.optimizer, 'optimizer', [torch.nn.Parameter(torch.zeros(1))])
    if config.scheduler is not None:
        registry.build_named('scheduler', config.scheduler, 'scheduler')
    if config.compile_config is not None:
        check_arguments(torch.compile, config.compile_config, 'compile_config', given=['model'])


def check_chosen(config: Config, task: Task) -> None:
    """Refuse an export or a stopper that asks for evaluations that there are not."""
    stoppers = ('early_stopper', 'threshold_stopper')
    choosers = ('drop_reasoning_head', *stoppers)
    given = {name: kwargs for name, kwargs in used(config.callbacks).items() if name in choosers}
    if not given:
        return
    count = len(task.label_names) or 2  # of a task whose labels are yet to be found; here names alone count
    metrics = {type(metric).__name__: metric for metric in build_metrics(task.metrics, count, task.multi_label)}
    evaluated = dict.fromkeys(used(config.eval_loaders), metrics)
    trained = {name: metric for name, metric in metrics.items() if not isinstance(metric, ExactMatch)}
    never = not parse_time(config.eval_interval, 'eval_interval').value
    for name, part in zip(given, registry.build_parts('callbacks', given)):
        stops = name in stoppers
        part.check_evaluations({**evaluated, 'train': trained} if stops else evaluated)
        asked = [key for key in ('monitor', 'calibrate') if getattr(part, key, None)]
        needed = not stops or part.dataloader_label != 'train'  # the metrics of training batches are always there
        if asked and needed and never:
            raise UserError(
                f'{name}.{asked[0]}: found with eval_interval={config.eval_interval}, which never evaluates'
            )


def check_task(config: Config, task: Task) -> None:
    """Refuse what does not fit the task."""
    if config.model.head == 'verbalizer':
        check_one_label(task)
    weights, names = config.model.class_weights, task.label_names
    if isinstance(weights, list) and names and len(weights) != len(names):
        raise UserError(
            f'model.class_weights: found {len(weights)}; expected {len(names)}, one for each of {", ".join(names)}'
        )


def check_one_label(task: Task) -> None:
    """Refuse a head that begins as the LM's choice of one answer where rows have any number of classes."""
    if task.multi_label:
        raise UserError(
            'model.head: found verbalizer with several labels to a row, of which the LM would choose one; expected mlp '
            'or linear'
        )


def check_schedules(config: Config, batches: int) -> None:
    """Follow each schedule over the run, of so many batches an epoch, before it begins.

    Raises:
        UserError: a schedule cannot be followed over ``max_duration``, or makes a number that is no factor.
    """
    duration = parse_time(config.max_duration, 'max_duration')
    schedules = {'scheduler': config.scheduler}
    for name, kwargs in used(config.algorithms).items():
        schedules[f'algorithms.{name}.schedule'] = kwargs.get('schedule')
    for key, settings in used(schedules).items():
        schedule = registry.build_named('scheduler', settings, key)
        factors = []
        for share in (0, 0.5, 1):
            state: Any = SimpleNamespace(
                max_duration=duration, dataloader_len=batches, timestamp=_timestamp(duration, share, batches)
            )
            with user_errors(f'{key}: cannot be followed over max_duration={config.max_duration}', kind=True):
                factor = schedule(state)
            if isinstance(factor, complex) or not 0 <= factor < math.inf:
                raise UserError(f'{key}: makes the factor {factor} after {share:.0%}; expected a number of 0 or more')
            factors.append(factor)
        if key == 'scheduler' and not any(factors):
            raise UserError(f'{key}: makes the factor 0 throughout, which trains nothing; expected one above 0')


def _timestamp(duration: Time, share: float, batches: int) -> Timestamp:
    """Where a run stands when that share of it is done."""
    unit, value = duration.unit.value, int(duration.value * share)
    batch = {'ep': int(duration.value * share * batches), 'ba': value}.get(unit, 0)
    epoch, batch_in_epoch = divmod(batch, max(1, batches))
    return Timestamp(
        epoch=epoch,
        batch=batch,
        batch_in_epoch=batch_in_epoch,
        sample=value if unit == 'sp' else 0,
        token=value if unit == 'tok' else 0,
    )


def check_loader(key: str, loader: LoaderConfig) -> None:
    """Refuse a loader whose rows cannot be found, before they are read."""
    given = [name for name in ('source', 'local', 'remote', 'streams') if getattr(loader, name)]
    if not given:
        raise UserError(f'{key}: found no rows; expected source, local, remote or streams')
    if loader.source and len(given) > 1:
        raise UserError(f'{key}: found source and {given[1]}; expected one of them')
    check_settings(dataclasses.asdict(loader), key, training=key == 'train_loader')
    for name in ('source', 'rationales'):
        path = getattr(loader, name)
        if path and not path.startswith('hub:') and not Path(find_source(path)).expanduser().exists():
            raise UserError(f'{key}.{name}: no such file: {path}')
    if loader.rationales and not loader.source:
        raise UserError(f'{key}.rationales: found without source; shards hold their rationales already')
    if loader.control != PLAIN and not loader.source:
        raise UserError(f'{key}.control: found with shards; expected source, or shards prepared with --control')
    if loader.weights and key != 'train_loader':
        raise UserError(f'{key}.weights: found {loader.weights!r}; only train_loader has weights, evaluation none')


def check_fsdp(config: Config, gpu: bool) -> None:
    """Refuse what FSDP cannot do."""
    settings = config.fsdp_config or {}
    build_fsdp(settings)
    version = fsdp_version(settings)
    if dist.get_world_size() == 1:
        raise UserError('fsdp_config: found with one process; launch with `composer -n 2 ...` or leave it out')
    if version == 1 and not gpu:
        raise UserError('fsdp_config.version: found 1 on a CPU; expected 2 (FSDP1 needs a GPU)')
    if version == 2 and config.device_train_microbatch_size == 'auto':
        raise UserError("device_train_microbatch_size: found 'auto' with FSDP2; expected a number")
    frozen = config.model.lora is not None or config.model.freeze_backbone
    if version == 1 and settings.get('use_orig_params') is False and frozen:
        raise UserError('fsdp_config.use_orig_params: found false with frozen weights; expected true')
    # Composer's default is the reentrant kind, which gives no gradient to what stands behind frozen weights.
    reentrant = version == 1 and settings.get('activation_checkpointing_reentrant', True)
    if settings.get('activation_checkpointing') and reentrant and frozen:
        raise UserError(
            'fsdp_config.activation_checkpointing: found with frozen weights, of which most adapters would not be '
            'trained; expected activation_checkpointing_reentrant: false beside it'
        )


def on_gpu(config: Config) -> bool:
    """Whether a run of this config is on GPUs."""
    return config.device != 'cpu' and torch.cuda.is_available()

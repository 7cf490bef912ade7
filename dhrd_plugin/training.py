"""Config in, trained model out."""

import importlib.metadata
import math
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from composer import DataSpec, Evaluator, Time, Trainer
from composer.core import Callback
from composer.utils import dist, get_device, reproducibility
from omegaconf import DictConfig, OmegaConf
from streaming import LocalDataset, Stream, StreamingDataLoader
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from dhrd_plugin import registry
from dhrd_plugin.algorithms.auxiliary_reasoning_loss import AuxiliaryReasoningLoss
from dhrd_plugin.callbacks.progress import TokenCounter
from dhrd_plugin.cli import run
from dhrd_plugin.config import as_dict, load_config, named_part, part_settings
from dhrd_plugin.data.collation import Markers, TripletCollator, triplet_data_spec
from dhrd_plugin.data.shards import cached_shards
from dhrd_plugin.data.streaming import MapTriplets, StreamingTripletDataset
from dhrd_plugin.data.tasks import Task, load_task
from dhrd_plugin.errors import UserError
from dhrd_plugin.files import write_json
from dhrd_plugin.models.build import add_lora, build_causal_lm, build_tokenizer, freeze
from dhrd_plugin.models.composer_model import ComposerDualHeadClassifier
from dhrd_plugin.models.network import DualHeadNetwork

SAMPLE = 'sample/'  # sources of this prefix are the triplets that the package ships


def train(config: DictConfig) -> Trainer:
    """Run a whole training: data, model, fit, evaluation, export, summary.

    Args:
        config: of :func:`dhrd_plugin.config.load_config`.

    Returns:
        The trainer after the fit.

    Raises:
        UserError: a mistake in the config or the data, before weights are touched.
    """
    stages = Stages()
    check_limits(config)
    task = load_task(as_plain(config.task))
    device = get_device(config.device)
    dist.initialize_dist(device, config.dist_timeout)
    with stages('data'):
        # All of them before the model: a bad row of the last file must not cost a model's loading.
        folders = {key: shard_source(loader, task) for key, loader in _loaders(config).items()}
    with stages('model'):
        # The heads are drawn at random: seed before they are built, and again inside the Trainer.
        reproducibility.seed_all(config.seed)
        tokenizer = build_tokenizer_from(config)
        model = build_model(config, task, tokenizer)
    train_loader = build_train_loader(config, task, tokenizer, folders['train_loader'])
    evaluators = [
        build_evaluator(config, task, tokenizer, label, folders[f'eval_loaders.{label}'])
        for label in _eval_labels(config)
    ]
    counter = TokenCounter()
    trainer = build_trainer(config, model, train_loader, evaluators, counter)
    trainer.logger.log_hyperparameters(as_dict(config))
    say(describe(trainer, model, config))
    with stages('fit'):
        if config.eval_first and trainer.state.timestamp.batch == 0:
            trainer.eval()
        trainer.fit()
    if dist.get_global_rank() == 0:
        finish(config, trainer, counter, stages.seconds)
    return trainer


# ---------------------------------------------------------------------------------------- data


def _loaders(config: DictConfig) -> dict[str, Any]:
    return {'train_loader': config.train_loader} | {
        f'eval_loaders.{label}': config.eval_loaders[label] for label in _eval_labels(config)
    }


def _eval_labels(config: DictConfig) -> list[str]:
    return [str(label) for label, loader in config.eval_loaders.items() if loader is not None]


def find_source(source: str) -> str:
    """A path, or ``sample/NAME``: a file of the triplets that the package ships."""
    if source.startswith(SAMPLE) and not Path(source).exists():
        return str(Path(__file__).parent / 'data' / source)
    return source


def check_limits(config: DictConfig) -> None:
    """Refuse what cannot work, before data or weights are touched.

    Raises:
        UserError: naming the key and the way out.
    """
    for key, loader in _loaders(config).items():
        given = [name for name in ('source', 'local', 'remote', 'streams') if loader[name]]
        if not given:
            raise UserError(f'{key}: found no rows; expected source, local, remote or streams')
        if loader.source and len(given) > 1:
            raise UserError(f'{key}: found source and {given[1]}; expected one of them')
        for name in ('source', 'rationales'):
            path = loader[name]
            if path and not path.startswith('hub:') and not Path(find_source(path)).expanduser().exists():
                raise UserError(f'{key}.{name}: no such file: {path}')
        if loader.rationales and not loader.source:
            raise UserError(f'{key}.rationales: found without source; shards hold their rationales already')
        if loader.control != 'ConsistentReasoningLabel' and not loader.source:
            raise UserError(f'{key}.control: found with shards; expected source, or shards prepared with --control')
    world_size = dist.get_world_size()
    if config.global_train_batch_size % world_size:
        raise UserError(
            f'global_train_batch_size: found {config.global_train_batch_size} on {world_size} ranks; '
            'expected a multiple of the number of ranks'
        )
    on_gpu = _on_gpu(config)
    if config.precision not in (None, 'fp32') and not on_gpu:
        raise UserError(f'precision: found {config.precision!r} on a CPU; expected fp32 (or leave it out)')
    if config.device_train_microbatch_size == 'auto' and not on_gpu:
        raise UserError("device_train_microbatch_size: found 'auto' on a CPU; expected a number")
    if config.fsdp_config and world_size == 1:
        raise UserError('fsdp_config: found with one process; launch with `composer -n 2 ...` or leave it out')
    try:
        Time.from_timestring(config.max_duration)
    except ValueError:
        raise UserError(
            f"max_duration: found {config.max_duration!r}; expected a Composer time string such as '2ep' or '40ba'"
        ) from None


def shard_source(loader: Any, task: Task) -> Path | None:
    """The folder of shards behind ``source``; written by one rank of each node, found by the others."""
    if not loader.source:
        return None
    with dist.run_local_rank_zero_first():
        return cached_shards(
            find_source(loader.source),
            task,
            rationales=loader.rationales and find_source(loader.rationales),
            split=loader.split,
            control=loader.control,
            seed=loader.control_seed,
            cache_dir=loader.cache_dir,
        )


def build_collator(
    config: DictConfig, task: Task, tokenizer: PreTrainedTokenizerBase, reasoning: bool = True
) -> TripletCollator:
    """The collator that the config asks for; ``reasoning=False`` for evaluation."""
    return TripletCollator(
        tokenizer,
        task.label_names,
        config.max_seq_len,
        config.model.reasoning_targets,
        Markers(**as_plain(config.markers)),
        reasoning,
    )


def build_train_loader(
    config: DictConfig, task: Task, tokenizer: PreTrainedTokenizerBase, folder: Path | None
) -> DataSpec:
    """Stream the training rows; ``folder`` is that of :func:`shard_source`."""
    loader = config.train_loader
    batch_size = config.global_train_batch_size // dist.get_world_size()
    dataset = StreamingTripletDataset(
        **_where(loader, folder),
        batch_size=batch_size,
        shuffle=loader.shuffle,
        shuffle_seed=config.seed if loader.shuffle_seed is None else loader.shuffle_seed,
        rationale_seed=config.seed,
        **as_plain(loader.dataset),
    )
    uses_reasoning = 'auxiliary_reasoning_loss' in part_settings(config, 'algorithms')
    dataloader = StreamingDataLoader(
        dataset,
        batch_size=batch_size,
        collate_fn=build_collator(config, task, tokenizer, uses_reasoning),
        num_workers=loader.num_workers,
        persistent_workers=loader.num_workers > 0,
        pin_memory=torch.cuda.is_available(),
    )
    return triplet_data_spec(dataloader, by_length=True)


def open_rows(loader: Any, folder: Path | None, batch_size: int = 1) -> MapTriplets:
    """The rows of a loader by index, each exactly once; ``folder`` is that of :func:`shard_source`."""
    if folder is not None:
        return MapTriplets(LocalDataset(str(folder)))
    return MapTriplets(StreamingTripletDataset(**_where(loader, None), batch_size=batch_size))


def build_evaluator(
    config: DictConfig, task: Task, tokenizer: PreTrainedTokenizerBase, label: str, folder: Path | None
) -> Evaluator:
    """Read evaluation rows by index, each exactly once on any number of ranks."""
    loader = config.eval_loaders[label]
    dataset = open_rows(loader, folder, config.device_eval_batch_size)
    dataloader = DataLoader(
        dataset,
        batch_size=config.device_eval_batch_size,
        sampler=dist.get_sampler(dataset, shuffle=False, drop_last=False),
        collate_fn=build_collator(config, task, tokenizer, reasoning=False),
        num_workers=loader.num_workers,
        persistent_workers=loader.num_workers > 0,
    )
    return Evaluator(label=label, dataloader=triplet_data_spec(dataloader))


def _where(loader: Any, folder: Path | None) -> dict[str, Any]:
    if folder is not None:
        return {'local': str(folder)}
    if loader.streams:
        return {'streams': [Stream(**stream) for stream in as_plain(loader.streams).values()]}
    return {'local': loader.local, 'remote': loader.remote}


# --------------------------------------------------------------------------------------- model


def build_tokenizer_from(config: DictConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of the config, the markers added where they are tokens."""
    name = config.tokenizer.name or config.model.pretrained_model_name_or_path
    with dist.run_local_rank_zero_first():
        tokenizer = build_tokenizer(name, **as_plain(config.tokenizer.kwargs))
    Markers(**as_plain(config.markers)).add_to(tokenizer)
    return tokenizer


def build_model(config: DictConfig, task: Task, tokenizer: PreTrainedTokenizerBase) -> ComposerDualHeadClassifier:
    """The ComposerModel of the config. Seed before: the heads are drawn at random."""
    settings = config.model
    kwargs = {'attn_implementation': settings.attn_implementation} if settings.attn_implementation else {}
    if settings.trust_remote_code:
        kwargs['trust_remote_code'] = True
    causal_lm = build_causal_lm(
        settings.pretrained_model_name_or_path, settings.pretrained, as_plain(settings.config_overrides), **kwargs
    )
    longest = getattr(causal_lm.config, 'max_position_embeddings', None)
    if longest is not None and config.max_seq_len > longest:
        raise UserError(f'max_seq_len: found {config.max_seq_len}; expected at most the {longest} of the model')
    network = DualHeadNetwork(
        causal_lm,
        len(task.label_names),
        settings.head,
        settings.pooling,
        settings.classifier_dropout,
        settings.chunk_size,
    )
    if len(tokenizer) > causal_lm.config.vocab_size:
        network.resize_token_embeddings(len(tokenizer))
    if settings.freeze_backbone:
        freeze(network.causal_lm)
    if settings.lora is not None:
        add_lora(network, {key: value for key, value in as_plain(settings.lora).items() if value is not None})
    return ComposerDualHeadClassifier(
        network,
        tokenizer,
        task.label_names,
        class_weights=as_plain(settings.class_weights),
        label_smoothing=settings.label_smoothing,
        info={'task': task.to_dict(), 'markers': as_plain(config.markers), 'max_seq_len': config.max_seq_len},
    )


def build_trainer(
    config: DictConfig,
    model: ComposerDualHeadClassifier,
    train_loader: DataSpec,
    evaluators: Sequence[Evaluator],
    counter: Callback,
) -> Trainer:
    """Hand everything to Composer's Trainer."""
    progress_bar = config.progress_bar and sys.stderr.isatty()
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    name, kwargs = named_part(config, 'optimizer')
    optimizer = registry.build('optimizer', name, kwargs, 'optimizer', trainable)
    return Trainer(
        model=model,
        train_dataloader=train_loader,
        eval_dataloader=list(evaluators) or None,
        optimizers=optimizer,
        schedulers=None if config.scheduler is None else _schedule(as_plain(config.scheduler), 'scheduler'),
        algorithms=_parts(config, 'algorithms'),
        callbacks=[counter, *_parts(config, 'callbacks')],
        loggers=_parts(config, 'loggers'),
        max_duration=config.max_duration,
        eval_interval=config.eval_interval,
        device=config.device,
        precision=config.precision or ('amp_bf16' if _on_gpu(config) else 'fp32'),
        device_train_microbatch_size=min_microbatch(config),
        parallelism_config={'fsdp': as_plain(config.fsdp_config)} if config.fsdp_config else None,
        compile_config=as_plain(config.compile_config),
        seed=config.seed,
        run_name=config.run_name,
        progress_bar=progress_bar,
        log_to_console=not progress_bar if config.log_to_console is None else config.log_to_console,
        console_log_interval=config.console_log_interval,
        python_log_level=config.python_log_level,
        dist_timeout=config.dist_timeout,
        save_folder=config.save_folder,
        save_interval=config.save_interval,
        save_num_checkpoints_to_keep=config.save_num_checkpoints_to_keep,
        save_overwrite=config.save_overwrite,
        load_path=config.load_path,
        load_weights_only=config.load_weights_only,
        autoresume=config.autoresume,
    )


def min_microbatch(config: DictConfig) -> int | str:
    """The microbatch, no larger than what one rank gets of a batch."""
    size = config.device_train_microbatch_size
    return size if size == 'auto' else min(int(size), config.global_train_batch_size // dist.get_world_size())


def _on_gpu(config: DictConfig) -> bool:
    return config.device != 'cpu' and torch.cuda.is_available()


def _parts(config: DictConfig, section: str) -> list[Any]:
    built = []
    for name, kwargs in part_settings(config, section).items():
        key = f'{section}.{name}'
        if kwargs.get('schedule') is not None:
            kwargs = {**kwargs, 'schedule': _schedule(kwargs['schedule'], f'{key}.schedule')}
        built.append(registry.build(section, name, kwargs, key))
    return built


def _schedule(settings: Mapping[str, Any], key: str) -> Any:
    kwargs = dict(settings)
    return registry.build('scheduler', kwargs.pop('name'), kwargs, key)


def as_plain(value: Any) -> Any:
    """A section of the config as plain data."""
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


# ------------------------------------------------------------------------------ what it says


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
    rows = loader.dataset.num_samples if loader is not None else 0  # pyright: ignore
    steps = len(loader) if loader is not None else 0  # pyright: ignore
    reasoning = [repr(part) for part in trainer.state.algorithms if isinstance(part, AuxiliaryReasoningLoss)]
    method = ''.join(reasoning) or 'pooled baseline, no reasoning loss'
    return (
        f'{config.run_name}: {parameters / 1e6:.1f} M parameters, {trainable / 1e6:.1f} M trained; '
        f'{rows} rows, {steps} steps an epoch, {config.max_duration}, {dist.get_world_size()} rank(s); {method}'
    )


def finish(config: DictConfig, trainer: Trainer, counter: TokenCounter, seconds: Mapping[str, float]) -> None:
    """Write ``summary.json`` and say what was reached and what to type next."""
    summary = summarize(config, trainer, counter, seconds)
    path = Path(config.output_dir) / 'summary.json'
    write_json(path, summary)
    for label, metrics in summary['metrics'].items():
        values = ', '.join(f'{name} {value:.4f}' for name, value in metrics.items())
        print(f'{label}: {values}')
    print(f'summary: {path}')
    if summary['export']:
        print(f'slim classifier: {summary["export"]}')
        print(f'try: python scripts/predict.py {summary["export"]} {shlex.quote(_example(trainer))}', flush=True)


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
            label: {name: _number(metric.compute()) for name, metric in metrics.items()}
            for label, metrics in state.eval_metrics.items()
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
        'config': as_dict(config),
    }


def _number(value: Any) -> float:
    number = float(value)
    return number if math.isfinite(number) else float('nan')


def _example(trainer: Trainer) -> str:
    """An input text of the evaluation rows, else of the training rows."""
    for evaluator in trainer.state.evaluators:
        return evaluator.dataloader.dataloader.dataset[0]['input_text']  # pyright: ignore
    return trainer.state.train_dataloader.dataset[0]['input_text']  # pyright: ignore


def main(argv: Sequence[str] | None = None) -> int:
    """``train.py YAML [key=value ...]``."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ('-h', '--help'):
        print('usage: composer scripts/train.py YAML [key=value ...]')
        return 0 if arguments else 2
    return run(lambda: train(load_config(arguments[0], arguments[1:])))

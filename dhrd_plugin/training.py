"""Config in, trained model out."""

import itertools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from composer import DataSpec, Evaluator, Time, Trainer
from composer.core import Callback, Event
from composer.loggers import LoggerDestination
from composer.utils import dist, format_name_with_dist, get_device, parse_uri, reproducibility
from omegaconf import DictConfig, OmegaConf
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from dhrd_plugin import registry
from dhrd_plugin.callbacks.checkpointing import RestoreRNG, SafeCheckpoints, end_with_launcher
from dhrd_plugin.callbacks.display import AnnounceExport, Display
from dhrd_plugin.callbacks.gradient_comparison import NO_COMPILE, NO_FSDP
from dhrd_plugin.callbacks.progress import TokenCounter
from dhrd_plugin.checkpoints import INDEX, check_checkpoint, check_unused, list_checkpoints, newest_checkpoint
from dhrd_plugin.cli import run
from dhrd_plugin.config import as_dict, load_config, named_part, part_settings, without_secrets
from dhrd_plugin.data.collation import Markers, TripletCollator, triplet_data_spec
from dhrd_plugin.data.shards import cached_shards
from dhrd_plugin.data.stream import DOWNLOADS, StreamRows, TripletStream, build_streams, check_settings, fingerprint
from dhrd_plugin.data.streaming import MapTriplets, StreamingTripletDataset, TripletDataLoader, together
from dhrd_plugin.data.tasks import Task, load_task
from dhrd_plugin.errors import UserError
from dhrd_plugin.fsdp import average_gradients, build_fsdp, fsdp_version
from dhrd_plugin.metrics import build_metrics
from dhrd_plugin.models.build import add_lora, build_causal_lm, build_tokenizer, freeze
from dhrd_plugin.models.composer_model import ComposerDualHeadClassifier
from dhrd_plugin.models.network import DualHeadNetwork
from dhrd_plugin.ranks import once_a_node
from dhrd_plugin.summary import Stages, describe, finish, log_file, say
from dhrd_plugin.tracking import build_loggers, ends_in_mlflow, flat, without_secret_arguments

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
    checkpoint = find_checkpoint(config)
    loggers = build_loggers(config, goes_on=checkpoint is not None)
    with stages('data'):
        # All of them before the model: a bad row of the last file must not cost a model's loading.
        streams = {key: find_streams(key, loader, task) for key, loader in _loaders(config).items()}
    with stages('model'):
        # The heads are drawn at random: seed before they are built, and again inside the Trainer.
        reproducibility.seed_all(config.seed)
        tokenizer = build_tokenizer_from(config)
        model = build_model(config, task, tokenizer)
        # For checkpoints and model cards; as text, as sharded checkpoints lose what is empty.
        model.info['config'] = OmegaConf.to_yaml(OmegaConf.create(without_secrets(as_dict(config))))
        model.info['data'] = {key: fingerprint(found) for key, found in streams.items()}
    train_loader = build_train_loader(config, task, tokenizer, streams['train_loader'])
    evaluators = [
        build_evaluator(config, task, tokenizer, label, streams[f'eval_loaders.{label}'])
        for label in _eval_labels(config)
    ]
    counter = TokenCounter()
    display = Display(counter, display_mode(config), config.console_log_interval)
    trainer = build_trainer(config, model, train_loader, evaluators, counter, display, loggers, checkpoint)
    trainer.logger.log_hyperparameters(flat(without_secrets(as_dict(config))))
    say(describe(trainer, model, config))
    with ends_in_mlflow(trainer.logger), stages('fit'), together(streams['train_loader']), display:
        if config.eval_first and trainer.state.timestamp.batch == 0:
            trainer.eval()
        fit(config, trainer)
    if dist.get_global_rank() == 0:
        finish(config, trainer, counter, stages.seconds)
    return trainer


# ------------------------------------------------------------------------------- checkpoints


def find_checkpoint(config: DictConfig) -> str | None:
    """The newest whole checkpoint of ``save_folder``, if ``autoresume`` asks for it and there is one.

    Raises:
        UserError: on every rank; ``load_path`` is not whole, or ``save_folder`` holds another run.
    """
    if config.save_folder is not None:
        folder, sharded = save_folder(config), saves_shards(config)
        if config.autoresume:
            found = newest_checkpoint(folder, sharded)
            if found is not None:
                say(f'going on from {found}')
                set_log_aside(config)
                return found
        elif config.load_path is None and not config.save_overwrite:
            check_unused(folder, sharded)
    if config.load_path is not None:
        check_checkpoint(config.load_path)
    return None


def set_log_aside(config: DictConfig) -> None:
    """Rename the log of the run that ended, ``log.txt`` to ``log.1.txt``: Composer's FileLogger writes over it."""
    log = log_file(config)
    if log is None or dist.get_global_rank() != 0:
        return
    aside = (log.with_suffix(f'.{number}{log.suffix}') for number in itertools.count(1))
    if log.exists():
        log.rename(next(path for path in aside if not path.exists()))


def save_folder(config: DictConfig) -> str:
    """``save_folder`` as Composer will write it."""
    return format_name_with_dist(config.save_folder, config.run_name)


def saves_shards(config: DictConfig) -> bool:
    """Whether checkpoints are folders to which each rank writes its share."""
    return config.fsdp_config is not None and build_fsdp(as_plain(config.fsdp_config)).state_dict_type == 'sharded'


def restore(config: DictConfig, trainer: Trainer, checkpoint: str | None) -> None:
    """Give the trainer what Composer leaves out when it loads a checkpoint."""
    states = trainer._rng_state
    if states is not None and trainer.state.timestamp.batch_in_epoch > 0:
        trainer.state.callbacks.insert(0, RestoreRNG(states))
    for metrics in trainer.state.eval_metrics.values():
        for metric in metrics.values():
            if metric._computed is None:
                metric.reset()  # Composer counts it as updated, though there was no evaluation before
    if checkpoint is not None and not parse_uri(checkpoint)[0] and dist.get_global_rank() == 0:
        # Those to delete when there are more than save_num_checkpoints_to_keep; oldest first.
        earlier = list_checkpoints(save_folder(config), saves_shards(config))
        earlier = earlier[earlier.index(checkpoint) :][::-1]
        trainer.saved_checkpoints[:] = [f'{path}/{INDEX}' if saves_shards(config) else path for path in earlier]


def fit(config: DictConfig, trainer: Trainer) -> None:
    """Train; where the checkpoint is that of the last batch, do what comes after it."""
    state = trainer.state
    if state.max_duration is not None and state.timestamp < state.max_duration:
        trainer.fit()
        return
    evaluates = state.evaluators and Time.from_timestring(config.eval_interval) > 0
    trainer.engine.run_event(Event.FIT_START)
    if evaluates and saves_shards(config):
        trainer.eval()  # for the model card; other checkpoints hold what was evaluated before it was written
    trainer.engine.run_event(Event.FIT_END)
    if evaluates and not saves_shards(config):
        trainer.eval()


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
        check_loader(key, loader)
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
    if config.fsdp_config is not None:
        check_fsdp(config, on_gpu)
    if 'gradient_comparison' in part_settings(config, 'callbacks'):
        for key, reason in {'fsdp_config': NO_FSDP, 'compile_config': NO_COMPILE}.items():
            if config[key] is not None:
                raise UserError(f'callbacks.gradient_comparison: found with {key}: {reason}')
    for key in ('max_duration', 'eval_interval', 'save_interval', 'console_log_interval'):
        registry.parse_time(config[key], key)
    if config.autoresume and config.save_folder is None:
        raise UserError('autoresume: found without save_folder; expected a folder, or an address such as s3://bucket/rte')


def check_loader(key: str, loader: Any) -> None:
    """Refuse a loader whose rows cannot be found, before they are read.

    Raises:
        UserError: naming the key and the way out.
    """
    given = [name for name in ('source', 'local', 'remote', 'streams') if loader[name]]
    if not given:
        raise UserError(f'{key}: found no rows; expected source, local, remote or streams')
    if loader.source and len(given) > 1:
        raise UserError(f'{key}: found source and {given[1]}; expected one of them')
    check_settings(as_plain(loader), key, training=key == 'train_loader')
    for name in ('source', 'rationales'):
        path = loader[name]
        if path and not path.startswith('hub:') and not Path(find_source(path)).expanduser().exists():
            raise UserError(f'{key}.{name}: no such file: {path}')
    if loader.rationales and not loader.source:
        raise UserError(f'{key}.rationales: found without source; shards hold their rationales already')
    if loader.control != 'ConsistentReasoningLabel' and not loader.source:
        raise UserError(f'{key}.control: found with shards; expected source, or shards prepared with --control')
    if loader.weights and key != 'train_loader':
        raise UserError(f'{key}.weights: found {loader.weights!r}; only train_loader has weights, evaluation none')


def check_fsdp(config: DictConfig, on_gpu: bool) -> None:
    """Refuse what FSDP cannot do.

    Raises:
        UserError: naming the key and the way out.
    """
    settings = as_plain(config.fsdp_config)
    build_fsdp(settings)
    version = fsdp_version(settings)
    if dist.get_world_size() == 1:
        raise UserError('fsdp_config: found with one process; launch with `composer -n 2 ...` or leave it out')
    if version == 1 and not on_gpu:
        raise UserError('fsdp_config.version: found 1 on a CPU; expected 2 (FSDP1 needs a GPU)')
    if version == 2 and config.device_train_microbatch_size == 'auto':
        raise UserError("device_train_microbatch_size: found 'auto' with FSDP2; expected a number")
    if version == 1 and settings.get('use_orig_params') is False and (
        config.model.lora is not None or config.model.freeze_backbone
    ):
        raise UserError('fsdp_config.use_orig_params: found false with frozen weights; expected true')


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


def find_streams(key: str, loader: Any, task: Task) -> list[TripletStream]:
    """Where the rows of a loader are: here, or in object storage and ready to be read. Every rank asks.

    Evaluation reads every row, so what it reads is fetched at once, by one rank of each node.
    """
    folder = shard_source(loader, task)
    streams = build_streams(as_plain(loader), key) if folder is None else [TripletStream(local=str(folder), key=key)]
    if key != 'train_loader':
        once_a_node(StreamRows(streams).fetch)
    return streams


def build_collator(
    config: DictConfig,
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    reasoning: bool = True,
    groups: bool = False,
    weights: str | None = None,
) -> TripletCollator:
    """The collator that the config asks for; ``reasoning=False`` for evaluation, ``groups`` for exact match."""
    return TripletCollator(
        tokenizer,
        task.label_names,
        config.max_seq_len,
        config.model.reasoning_targets,
        Markers(**as_plain(config.markers)),
        reasoning,
        groups=groups,
        weights=weights,
    )


def build_train_loader(
    config: DictConfig, task: Task, tokenizer: PreTrainedTokenizerBase, streams: Sequence[TripletStream]
) -> DataSpec:
    """Stream the training rows; ``streams`` are those of :func:`find_streams`."""
    loader = config.train_loader
    batch_size = config.global_train_batch_size // dist.get_world_size()
    dataset = StreamingTripletDataset(
        streams=streams,
        batch_size=batch_size,
        shuffle=loader.shuffle,
        shuffle_seed=config.seed if loader.shuffle_seed is None else loader.shuffle_seed,
        rationale_seed=config.seed,
        **{name: value for name, value in as_plain(loader.dataset).items() if name not in DOWNLOADS},
    )
    uses_reasoning = 'auxiliary_reasoning_loss' in part_settings(config, 'algorithms')
    dataloader = TripletDataLoader(
        dataset,
        batch_size=batch_size,
        collate_fn=build_collator(config, task, tokenizer, uses_reasoning, weights=loader.weights),
        num_workers=loader.num_workers,
        persistent_workers=loader.num_workers > 0,
        # Workers that persist draw their seed from the generator once, in a resumed run as in a straight
        # one; drawn from the global state it would shift dropout.
        generator=torch.Generator() if loader.num_workers > 0 else None,
        pin_memory=torch.cuda.is_available(),
    )
    return triplet_data_spec(dataloader, by_length=True)


def open_rows(streams: Sequence[TripletStream]) -> MapTriplets:
    """The rows of :func:`find_streams` by index, each exactly once."""
    return MapTriplets(StreamRows(streams))


def build_evaluator(
    config: DictConfig, task: Task, tokenizer: PreTrainedTokenizerBase, label: str, streams: Sequence[TripletStream]
) -> Evaluator:
    """Read evaluation rows by index, each exactly once on any number of ranks."""
    loader = config.eval_loaders[label]
    dataset = open_rows(streams)
    dataloader = DataLoader(
        dataset,
        batch_size=config.device_eval_batch_size,
        sampler=dist.get_sampler(dataset, shuffle=False, drop_last=False),
        collate_fn=build_collator(config, task, tokenizer, reasoning=False, groups='em' in task.metrics),
        num_workers=loader.num_workers,
        persistent_workers=loader.num_workers > 0,
    )
    return Evaluator(label=label, dataloader=triplet_data_spec(dataloader))


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
        settings.padding_free,
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
        build_metrics(task.metrics, len(task.label_names)),
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
    display: Display,
    loggers: Sequence[LoggerDestination] = (),
    checkpoint: str | None = None,
) -> Trainer:
    """Hand everything to Composer's Trainer; ``checkpoint`` is that of :func:`find_checkpoint`."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    name, kwargs = named_part(config, 'optimizer')
    optimizer = registry.build('optimizer', name, kwargs, 'optimizer', trainable)
    fsdp = None if config.fsdp_config is None else build_fsdp(as_plain(config.fsdp_config))
    exports = 'drop_reasoning_head' in part_settings(config, 'callbacks')
    announce = [AnnounceExport(display)] if exports else []
    trainer = Trainer(
        model=model,
        train_dataloader=train_loader,
        eval_dataloader=list(evaluators) or None,
        optimizers=optimizer,
        schedulers=None if config.scheduler is None else _schedule(as_plain(config.scheduler), 'scheduler'),
        algorithms=build_parts(config, 'algorithms'),
        callbacks=[counter, *announce, *build_parts(config, 'callbacks'), SafeCheckpoints()],
        loggers=[*loggers, display],
        max_duration=config.max_duration,
        eval_interval=config.eval_interval,
        device=config.device,
        precision=config.precision or ('amp_bf16' if _on_gpu(config) else 'fp32'),
        device_train_microbatch_size=min_microbatch(config),
        parallelism_config=fsdp and {'fsdp': fsdp},
        compile_config=as_plain(config.compile_config),
        seed=config.seed,
        run_name=config.run_name,
        progress_bar=False,  # ours is the display
        log_to_console=config.log_to_console is True,
        console_log_interval=config.console_log_interval,
        python_log_level=config.python_log_level,
        dist_timeout=config.dist_timeout,
        save_folder=config.save_folder,
        save_interval=config.save_interval,
        save_num_checkpoints_to_keep=config.save_num_checkpoints_to_keep,
        # What was passed over is written again when its batch comes.
        save_overwrite=config.save_overwrite or config.autoresume,
        # Out of shards torch reads no metric of a run that has not computed it yet.
        save_metrics=not saves_shards(config),
        load_path=checkpoint or config.load_path,
        load_weights_only=config.load_weights_only and checkpoint is None,
    )
    restore(config, trainer, checkpoint)
    average_gradients(trainer.state.model)
    return trainer


def display_mode(config: DictConfig) -> str | None:
    """Bars on a terminal, lines elsewhere; nothing of ours where ``log_to_console`` asks for Composer's own lines."""
    if config.log_to_console:
        return None
    if config.progress_bar and sys.stderr.isatty():
        return 'bars'
    return None if config.log_to_console is False else 'lines'


def min_microbatch(config: DictConfig) -> int | str:
    """The microbatch, no larger than what one rank gets of a batch."""
    size = config.device_train_microbatch_size
    return size if size == 'auto' else min(int(size), config.global_train_batch_size // dist.get_world_size())


def _on_gpu(config: DictConfig) -> bool:
    return config.device != 'cpu' and torch.cuda.is_available()


def build_parts(config: DictConfig, section: str) -> list[Any]:
    """The parts that a section of the config names."""
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


def main(argv: Sequence[str] | None = None) -> int:
    """``train.py YAML [key=value ...]``."""
    end_with_launcher()
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ('-h', '--help'):
        print('usage: composer scripts/train.py YAML [key=value ...]')
        return 0 if arguments else 2
    sys.argv[1:] = without_secret_arguments(sys.argv[1:])
    return run(lambda: train(load_config(arguments[0], arguments[1:])))

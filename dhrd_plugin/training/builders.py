"""The parts of a run, each made from the section of the config that describes it."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from composer import DataSpec, Evaluator, Trainer
from composer.core import Callback, Event, State
from composer.loggers import LoggerDestination
from composer.utils import create_interval_scheduler, dist, format_name_with_dist
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dhrd_plugin.callbacks.evaluations import Evaluations
from dhrd_plugin.checkpoints.resume import restore
from dhrd_plugin.checkpoints.saver import SafeCheckpoints
from dhrd_plugin.data.collator import TripletCollator
from dhrd_plugin.data.data_spec import triplet_data_spec
from dhrd_plugin.data.shards import cached_shards
from dhrd_plugin.data.tasks import Task
from dhrd_plugin.errors import UserError, user_errors
from dhrd_plugin.metrics import build_metrics
from dhrd_plugin.models.build import add_lora, build_causal_lm, build_tokenizer
from dhrd_plugin.models.composer_model import ComposerDualHeadClassifier
from dhrd_plugin.models.network import DualHeadNetwork
from dhrd_plugin.models.probe import check_rope
from dhrd_plugin.ranks import once_a_node
from dhrd_plugin.streams.dataset import StreamingTripletDataset, TripletDataLoader
from dhrd_plugin.streams.rows import StreamRows
from dhrd_plugin.streams.settings import DOWNLOADS, build_streams
from dhrd_plugin.streams.stream import TripletStream
from dhrd_plugin.training import registry
from dhrd_plugin.training.checks import check_one_label, on_gpu
from dhrd_plugin.training.config import Config, LoaderConfig, LoraConfig, used
from dhrd_plugin.training.display import AnnounceExport, Display
from dhrd_plugin.training.fsdp import average_gradients, build_fsdp
from dhrd_plugin.training.labels import check_labels

# ---------------------------------------------------------------------------------------- data


def find_streams(key: str, loader: LoaderConfig, task: Task) -> list[TripletStream]:
    """Where the rows of a loader are: here, or in object storage and ready to be read. Every rank asks.

    The shards of a ``source`` are written by one rank of each node and found by the others. Evaluation reads
    every row, so what it reads is fetched at once, by one rank of each node.
    """
    if not loader.source:
        streams = build_streams(dataclasses.asdict(loader), key)
    else:
        options: Any = {'control': loader.control, 'seed': loader.control_seed, 'cache_dir': loader.cache_dir}
        with dist.run_local_rank_zero_first():
            folder = cached_shards(loader.source, task, loader.rationales, loader.split, **options)
        streams = [TripletStream(local=str(folder), key=key)]
    if key != 'train_loader':
        once_a_node(StreamRows(streams).fetch)
    once_a_node(lambda: check_labels(streams, task, whole=key != 'train_loader'))
    return streams


def reasons(config: Config) -> bool:
    """Whether the rationales are read; the pooled baseline's are not."""
    return 'auxiliary_reasoning_loss' in used(config.algorithms)


def build_collator(config: Config, task: Task, tokenizer: PreTrainedTokenizerBase, **options: Any) -> TripletCollator:
    """The collator that the config asks for, with ``options`` of a :class:`~dhrd_plugin.TripletCollator`."""
    targets, longest, loader = config.model.reasoning_targets, config.max_seq_len, config.train_loader
    options = {'layout': loader.layout, 'rationale_max_tokens': loader.rationale_max_tokens, **options}
    options['multi_label'] = task.multi_label
    return TripletCollator(tokenizer, task.label_names, longest, targets, config.markers, **options)


def build_train_loader(
    config: Config, task: Task, tokenizer: PreTrainedTokenizerBase, streams: Sequence[TripletStream]
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
        **{name: value for name, value in loader.dataset.items() if name not in DOWNLOADS},
    )
    dataloader = TripletDataLoader(
        dataset,
        batch_size=batch_size,
        collate_fn=build_collator(config, task, tokenizer, reasoning=reasons(config), weights=loader.weights),
        num_workers=loader.num_workers,
        persistent_workers=loader.num_workers > 0,
        # Workers that persist draw their seed from the generator once, in a resumed run as in a straight
        # one; drawn from the global state it would shift dropout.
        generator=torch.Generator() if loader.num_workers > 0 else None,
        pin_memory=on_gpu(config),
    )
    return triplet_data_spec(dataloader, by_length=True)


def build_evaluator(
    config: Config, task: Task, tokenizer: PreTrainedTokenizerBase, label: str, streams: Sequence[TripletStream]
) -> Evaluator:
    """Read evaluation rows by index, each exactly once on any number of ranks."""
    loader = config.eval_loaders[label]
    workers = 0 if loader is None else loader.num_workers
    rows = StreamRows(streams)
    dataloader = DataLoader(
        rows,
        batch_size=config.device_eval_batch_size,
        sampler=dist.get_sampler(rows, shuffle=False, drop_last=False),
        collate_fn=build_collator(config, task, tokenizer, reasoning=False, groups='em' in task.metrics),
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=on_gpu(config),
    )
    return Evaluator(
        label=label, dataloader=triplet_data_spec(dataloader), eval_interval=evaluation_schedule(config.eval_interval)
    )


def evaluation_schedule(interval: str) -> Callable[[State, Event], bool]:
    """Composer's, but that the last evaluation comes before the fit's end, at which the export tells its metrics."""
    ends = {Event.BATCH_END, Event.EPOCH_END}
    due = create_interval_scheduler(interval, checkpoint_events=False, final_events=ends)
    evaluated = -1  # the last batch may end an epoch as well

    def is_due(state: State, event: Event) -> bool:
        nonlocal evaluated
        batch = int(state.timestamp.batch)
        if batch == evaluated or not due(state, event):
            return False
        evaluated = batch
        return True

    return is_due


# --------------------------------------------------------------------------------------- model


def build_tokenizer_from(config: Config) -> PreTrainedTokenizerBase:
    """The tokenizer of the config, the markers added where they are tokens."""
    name = config.tokenizer.name or config.model.pretrained_model_name_or_path
    with dist.run_local_rank_zero_first():
        tokenizer = build_tokenizer(name, **config.tokenizer.kwargs)
    config.markers.add_to(tokenizer)
    return tokenizer


def build_model(config: Config, task: Task, tokenizer: PreTrainedTokenizerBase) -> ComposerDualHeadClassifier:
    """The ComposerModel of the config. Seed before: the heads are drawn at random."""
    settings = config.model
    if settings.class_weights == 'balanced':  # a trainer that is not ours
        raise UserError("model.class_weights: found 'balanced', which is for dhrd train; expected a list of numbers")
    kwargs: dict[str, Any] = {}
    if settings.attn_implementation:
        kwargs['attn_implementation'] = settings.attn_implementation
    if settings.trust_remote_code:
        kwargs['trust_remote_code'] = True
    name = settings.pretrained_model_name_or_path
    with user_errors('model', kind=True):  # what transformers and the model's own class make of overrides and options
        causal_lm = build_causal_lm(name, settings.pretrained, settings.config_overrides, **kwargs)
    longest = getattr(causal_lm.config, 'max_position_embeddings', None)
    if longest is not None and config.max_seq_len > longest:
        raise UserError(f'max_seq_len: found {config.max_seq_len}; expected at most the {longest} of the model')
    if reasons(config):
        check_rope(causal_lm.config.get_text_config(), config.max_seq_len, 'max_seq_len')
    network = DualHeadNetwork(
        causal_lm,
        len(task.label_names),
        'linear' if settings.head == 'verbalizer' else settings.head,
        settings.pooling,
        settings.classifier_dropout,
        settings.chunk_size,
        settings.padding_free,
        norm=settings.classifier_norm,
    )
    if tokenizer.vocab_size > causal_lm.config.vocab_size:  # without the tokens that were added to it
        raise UserError(
            f'tokenizer: has {tokenizer.vocab_size} tokens; expected that of the model, which has '
            f'{causal_lm.config.vocab_size}'
        )
    if len(tokenizer) > causal_lm.config.vocab_size:
        network.resize_token_embeddings(len(tokenizer))
    if settings.head == 'verbalizer':
        check_one_label(task)
        network.begin_as_answers(tokenizer, list(task.answers.values()), 'model.head: verbalizer')
    if settings.freeze_backbone:
        network.causal_lm.requires_grad_(False)
    if settings.lora is not None:
        check_layers(settings.lora, causal_lm)
        add_lora(network, used(dataclasses.asdict(settings.lora)))
    return ComposerDualHeadClassifier(
        network,
        tokenizer,
        task.label_names,
        build_metrics(task.metrics, len(task.label_names), task.multi_label),
        class_weights=settings.class_weights,
        label_smoothing=settings.label_smoothing,
        soft_label_weight=settings.soft_label_weight,
        multi_label=task.multi_label,
        info={'task': task.to_dict(), 'markers': dataclasses.asdict(config.markers), 'max_seq_len': config.max_seq_len},
    )


def check_layers(lora: LoraConfig, causal_lm: PreTrainedModel) -> None:
    """Refuse layers that the backbone does not have: peft leaves them out."""
    count = causal_lm.config.get_text_config().num_hidden_layers
    for layer in lora.layers_to_transform or ():
        if layer >= count:
            raise UserError(f'model.lora.layers_to_transform: found {layer}; expected a number from 0 to {count - 1}')


# ------------------------------------------------------------------------------------- trainer


def build_trainer(
    config: Config,
    model: ComposerDualHeadClassifier,
    train_loader: DataSpec,
    evaluators: Sequence[Evaluator],
    counter: Callback,
    display: Display,
    loggers: Sequence[LoggerDestination] = (),
    checkpoint: str | None = None,
) -> Trainer:
    """Hand everything to Composer's Trainer; ``checkpoint`` is that of ``find_checkpoint``."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    fsdp = None if config.fsdp_config is None else build_fsdp(config.fsdp_config)
    if config.compile_config is not None:
        model.network.compile_blocks(**config.compile_config)
    announce = [AnnounceExport(display)] if 'drop_reasoning_head' in used(config.callbacks) else []
    callbacks = [counter, Evaluations(), *announce, *registry.build_parts('callbacks', used(config.callbacks))]
    trainer = Trainer(
        model=model,
        train_dataloader=train_loader,
        eval_dataloader=list(evaluators) or None,
        optimizers=registry.build_named('optimizer', config.optimizer, 'optimizer', trainable),
        schedulers=None
        if config.scheduler is None
        else registry.build_named('scheduler', config.scheduler, 'scheduler'),
        algorithms=registry.build_parts('algorithms', used(config.algorithms)),
        callbacks=[*callbacks, SafeCheckpoints()],
        loggers=[*loggers, display],
        max_duration=config.max_duration,
        eval_interval=config.eval_interval,
        device=config.device,
        precision=config.precision or ('amp_bf16' if on_gpu(config) else 'fp32'),
        device_train_microbatch_size=min_microbatch(config),
        parallelism_config=fsdp and {'fsdp': fsdp},
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
    restore(trainer, checkpoint, save_folder(config), saves_shards(config))
    average_gradients(trainer.state.model)
    return trainer


def optimizer_name(config: Config) -> str:
    """The name of the optimizer's class, under which a checkpoint holds its state."""
    return registry.parts('optimizer')[config.optimizer['name']].__qualname__


def min_microbatch(config: Config) -> int | str:
    """The microbatch, no larger than what one rank gets of a batch."""
    size = config.device_train_microbatch_size
    return size if size == 'auto' else min(int(size), config.global_train_batch_size // dist.get_world_size())


def save_folder(config: Config) -> str | None:
    """``save_folder`` as Composer will write it."""
    return config.save_folder and format_name_with_dist(config.save_folder, config.run_name)


def saves_shards(config: Config) -> bool:
    """Whether checkpoints are folders to which each rank writes its share."""
    return config.fsdp_config is not None and build_fsdp(config.fsdp_config).state_dict_type == 'sharded'

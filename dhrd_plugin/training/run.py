"""Config in, trained model out."""

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from composer import DataSpec, Time, Trainer
from composer.core import Event
from composer.utils import dist, get_device, reproducibility
from omegaconf import OmegaConf
from transformers.utils import flatten_dict

from dhrd_plugin.callbacks.token_counter import TokenCounter
from dhrd_plugin.checkpoints.lock import only_run
from dhrd_plugin.checkpoints.resume import find_checkpoint, set_log_aside
from dhrd_plugin.checkpoints.same import check_configuration
from dhrd_plugin.cli import is_interrupt, run
from dhrd_plugin.data.tasks import Task, load_task
from dhrd_plugin.errors import UserError
from dhrd_plugin.ranks import end_with_parent, on_rank_zero, world_size
from dhrd_plugin.streams.dataset import together
from dhrd_plugin.streams.remote import is_remote
from dhrd_plugin.streams.rows import fingerprint
from dhrd_plugin.training.builders import (
    build_evaluator,
    build_model,
    build_tokenizer_from,
    build_train_loader,
    build_trainer,
    find_streams,
    optimizer_name,
    save_folder,
    saves_shards,
)
from dhrd_plugin.training.checks import check_limits, check_schedules, check_task
from dhrd_plugin.training.config import Config, load_config, loaders, used, written
from dhrd_plugin.training.display import Display, display_mode
from dhrd_plugin.training.first_look import first_look
from dhrd_plugin.training.labels import find_labels, settled
from dhrd_plugin.training.loggers import build_loggers, check_taken, ends_in_mlflow, without_secret_arguments
from dhrd_plugin.training.summary import describe, finish, log_file, say, timed
from dhrd_plugin.training.targets import check_targets

MOMENT = 2.0  # seconds in which Ctrl-C reaches every rank


def train(config: Config) -> Trainer:
    """Run a whole training: data, model, fit, evaluation, export, summary.

    Args:
        config: of :func:`~dhrd_plugin.load_config`.

    Returns:
        The trainer after the fit.

    Raises:
        UserError: a mistake in the config or the data, before weights are touched; a place that may not or cannot be
            written, or another run in ``output_dir`` or ``save_folder``, before anything is read.
    """
    check_limits(config)
    task = load_task(config.task)
    dist.initialize_dist(get_device(config.device), config.dist_timeout)
    on_rank_zero(lambda: check_targets(config))
    with only_run(config.output_dir, 'output_dir'), only_run(save_folder(config)):
        return _train(config, task)


def _train(config: Config, task: Task) -> Trainer:
    seconds: dict[str, float] = {}
    checkpoint = _find_checkpoint(config)
    loggers = build_loggers(config, goes_on=checkpoint is not None)
    with timed(seconds, 'data'):
        task = find_labels(config, task)
        check_task(config, task)
        # All of them before the model: a bad row of the last file must not cost a model's loading.
        streams = {key: find_streams(key, loader, task) for key, loader in loaders(config).items()}
        config = settled(config, task, streams['train_loader'])
        tokenizer = build_tokenizer_from(config)
        for line in on_rank_zero(lambda: first_look(config, task, tokenizer, streams)):
            say(line)
        train_loader = build_train_loader(config, task, tokenizer, streams['train_loader'])
        evaluators = [
            build_evaluator(config, task, tokenizer, label, streams[f'eval_loaders.{label}'])
            for label in used(config.eval_loaders)
        ]
        check_schedules(config, count_steps(train_loader))
    plain = written(config)
    with timed(seconds, 'model'):
        # The heads are drawn at random: seed before they are built, and again inside the Trainer.
        reproducibility.seed_all(config.seed)
        model = build_model(config, task, tokenizer)
        # For checkpoints and model cards; as text, as sharded checkpoints lose what is empty.
        model.info['config'] = OmegaConf.to_yaml(OmegaConf.create(plain))
        model.info['data'] = {key: fingerprint(found) for key, found in streams.items()}
    if source := checkpoint or config.load_path:
        key, weights_only = ('autoresume', False) if checkpoint else ('load_path', config.load_weights_only)
        check_configuration(source, key, model, optimizer_name(config), weights_only)
        set_log_aside(log_file(config))
    counter = TokenCounter()
    display = Display(counter, display_mode(config), config.console_log_interval)
    trainer = build_trainer(config, model, train_loader, evaluators, counter, display, loggers, checkpoint)
    with ends_in_mlflow(trainer.logger):
        trainer.logger.log_hyperparameters(flatten_dict(plain))
        check_taken(trainer.logger)
        say(describe(trainer, model, config))
        with timed(seconds, 'fit'), together(streams['train_loader']), display.closing():
            if config.eval_first and trainer.state.timestamp.batch == 0:
                trainer.eval()
            fit(config, trainer)
    if dist.get_global_rank() == 0:
        finish(config, trainer, counter, streams, seconds)
    return trainer


def count_steps(loader: DataSpec) -> int:
    """The steps of an epoch, of which there have to be some."""
    steps = len(loader.dataloader)  # pyright: ignore[reportArgumentType]
    if not steps:
        raise UserError('train_loader: found no batch of rows in an epoch; expected one or more')
    return steps


def _find_checkpoint(config: Config) -> str | None:
    found = find_checkpoint(
        save_folder(config),
        saves_shards(config),
        config.autoresume,
        config.load_path,
        config.save_overwrite,
        config.load_weights_only,
    )
    if found is not None:
        say(f'going on from {found}')
    return found


def fit(config: Config, trainer: Trainer) -> None:
    """Train; where the checkpoint is that of the last batch, do what comes after it."""
    state = trainer.state
    if state.max_duration is not None and state.timestamp < state.max_duration:
        trainer.fit()
        return
    trainer.engine.run_event(Event.FIT_START)
    if state.evaluators and Time.from_timestring(config.eval_interval) > 0:
        trainer.eval()  # of the weights that are exported, for the model card and the summary
    trainer.engine.run_event(Event.FIT_END)


def way_on(config: Config) -> str:
    """How to go on with a run that was stopped; empty where it has left no checkpoint here."""
    folder = save_folder(config)
    if not folder or is_remote(folder) or not any(Path(folder).glob('*')):
        return ''
    start = 'start it again' if config.autoresume else 'start it again with autoresume=true'
    return f'{start} to go on from the last checkpoint in {folder}'


def main(argv: Sequence[str] | None = None) -> int:
    """``dhrd train YAML [key=value ...]``."""
    if 'LOCAL_RANK' in os.environ:
        end_with_parent()  # the composer command passes a SIGTERM on; one that is killed cannot
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ('-h', '--help'):
        print('usage: dhrd train YAML [key=value ...], on several ranks: composer -n 2 -c dhrd train YAML ...')
        return 0 if arguments else 2
    sys.argv[1:] = without_secret_arguments(sys.argv[1:])

    def work() -> None:
        config = load_config(arguments[0], arguments[1:])
        try:
            try:
                train(config)
            except RuntimeError:  # such as that another rank has gone, which may have heard of Ctrl-C before this one
                time.sleep(MOMENT if world_size() > 1 else 0)
                raise
        except (KeyboardInterrupt, SystemExit) as error:
            if is_interrupt(error):
                raise KeyboardInterrupt(way_on(config)) from None
            raise

    return run(work)

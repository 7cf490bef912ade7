"""How a run goes on from a checkpoint to the very end that it would have come to."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from composer import Trainer
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist, parse_uri, reproducibility

from dhrd_plugin.checkpoints.whole import (
    INDEX,
    check_checkpoint,
    check_kind,
    check_unused,
    list_checkpoints,
    newest_checkpoint,
)


def find_checkpoint(
    save_folder: str | None,
    sharded: bool = False,
    autoresume: bool = False,
    load_path: str | None = None,
    save_overwrite: bool = False,
    load_weights_only: bool = False,
) -> str | None:
    """The newest whole checkpoint of ``save_folder``, if ``autoresume`` asks for it and there is one.

    Every rank must call it. What the trainer would load or write otherwise is checked.

    Args:
        save_folder: a folder, or an address such as ``s3://bucket/rte``. Default: none is written.
        sharded: whether checkpoints are folders of shards.
        autoresume: go on from the newest.
        load_path: the checkpoint that is loaded where there is none to go on from.
        save_overwrite: allow a folder that holds checkpoints.
        load_weights_only: whether the run begins at the first step with the weights of ``load_path``.
    """
    if save_folder is not None and autoresume:
        found = newest_checkpoint(save_folder, sharded)
        if found is not None:
            return found
    if load_path is not None:
        check_checkpoint(load_path)
    if save_folder is not None and not save_overwrite:
        if autoresume:
            check_kind(save_folder, sharded)
        else:
            check_unused(save_folder, sharded, None if load_weights_only else load_path)
    return None


def set_log_aside(log: Path | None) -> None:
    """Rename the log of the run that ended, ``log.txt`` to ``log.1.txt``: Composer's FileLogger writes over it.

    Every rank must call it, with its own log; of those with the same one, the first renames.
    """
    logs = dist.all_gather_object(log)
    if log is None or logs.index(log) != dist.get_global_rank():
        return
    aside = (log.with_suffix(f'.{number}{log.suffix}') for number in itertools.count(1))
    if log.exists():
        log.rename(next(path for path in aside if not path.exists()))


def restore(trainer: Trainer, checkpoint: str | None, save_folder: str | None, sharded: bool = False) -> None:
    """Give the trainer what Composer leaves out when it loads a checkpoint; arguments of :func:`find_checkpoint`."""
    states = trainer._rng_state
    if states is not None and trainer.state.timestamp.batch_in_epoch > 0:
        trainer.state.callbacks.insert(0, RestoreRNG(states))
    for metrics in trainer.state.eval_metrics.values():
        for metric in metrics.values():
            if metric._computed is None:
                metric.reset()  # Composer counts it as updated, though there was no evaluation before
    if trainer.state.timestamp.batch > 0:
        _set_hyperparameters(trainer.state)
    if checkpoint is not None and not parse_uri(checkpoint)[0] and dist.get_global_rank() == 0:
        # Those to delete when there are more than save_num_checkpoints_to_keep; oldest first.
        earlier = list_checkpoints(str(save_folder), sharded)
        earlier = earlier[earlier.index(checkpoint) :][::-1]
        trainer.saved_checkpoints[:] = [f'{path}/{INDEX}' if sharded else path for path in earlier]


def _set_hyperparameters(state: State) -> None:
    """Give optimizers and schedulers the run's own arguments; those of the checkpoint came with their state.

    Where the learning rate is as it was, the next step has the very one that the checkpoint holds.
    """
    for optimizer in state.optimizers:
        own = getattr(optimizer, 'base_optimizer', optimizer).defaults  # of Composer's SAM
        own = {**own, 'initial_lr': own['lr']}
        for group in optimizer.param_groups:
            group.update({name: value for name, value in own.items() if name in group})
        schedulers: list[Any] = list(state.schedulers)  # LambdaLR, which Composer makes of its own kind
        for scheduler in schedulers:
            rates = [own['lr']] * len(optimizer.param_groups)
            if scheduler.base_lrs != rates or not scheduler.last_epoch:  # another one, or none before
                scheduler.base_lrs = rates
                scheduler._last_lr = [rate * factor(0) for rate, factor in zip(rates, scheduler.lr_lambdas)]
            for group, rate in zip(optimizer.param_groups, scheduler._last_lr):
                group['lr'] = rate


class RestoreRNG(Callback):
    """Restores every rank's random state before the first batch after a resumption.

    Composer does so by itself between two epochs. Within one it does so only where it spins the data
    loader forward itself; where the loader finds its own place, as Streaming's does, dropout would
    go on from the seed instead (mosaicml 0.32.1, ``Trainer._train_loop``).

    Args:
        states: of :func:`composer.utils.reproducibility.get_rng_state`, one for each rank.
    """

    def __init__(self, states: Sequence[dict[str, Any]]):
        self.states: list[dict[str, Any]] | None = list(states)

    def after_dataloader(self, state: State, logger: Logger) -> None:
        """Restore: the loader has drawn what it draws at its start."""
        self._restore()

    def epoch_end(self, state: State, logger: Logger) -> None:
        """Restore here where the epoch's last batch was the last one saved."""
        self._restore()

    def _restore(self) -> None:
        if self.states is not None:
            reproducibility.load_rng_state(self.states)
            self.states = None

"""Composer's early and threshold stoppers, for runs that are stopped and go on."""

from collections.abc import Mapping
from typing import Any

import composer.callbacks
import torch
from composer.core import State, Timestamp, TimeUnit
from composer.loggers import Logger

from dhrd_plugin.errors import UserError, nearest


class EarlyStopper(composer.callbacks.EarlyStopper):
    """Composer's, with its memory in the checkpoint: a run that goes on stops where it would have stopped.

    One that had stopped ends at once, with the weights that it has, unless ``patience`` is longer now. Arguments are
    Composer's.
    """

    _last = Timestamp()  # of the evaluation that was compared last

    def check_evaluations(self, metrics: Mapping[str, Mapping[str, Any]]) -> None:
        """Refuse an evaluation set, a metric or a unit that there is not, which Composer does later or never.

        Args:
            metrics: those of the run, by evaluation set and name; under ``train`` those of its training batches.
        """
        if self.patience.unit not in (TimeUnit.EPOCH, TimeUnit.BATCH) or self.patience.value < 0:
            found = self.patience.to_timestring()
            raise UserError(f'early_stopper.patience: found {found}; expected epochs (ep) or batches (ba), 0 or more')
        _check_monitored(self, 'early_stopper', metrics)

    def _update_stopper_state(self, state: State) -> None:
        self._last = state.timestamp
        super()._update_stopper_state(state)

    def after_load(self, state: State, logger: Logger) -> None:
        """Stop where the checkpoint's run had."""
        del logger
        if self.best_occurred is None:
            return
        unit = TimeUnit.BATCH if self.patience.unit == TimeUnit.BATCH else TimeUnit.EPOCH
        if self._last.get(unit) - self.best_occurred.get(unit) > self.patience:
            state.stop_training()

    def state_dict(self) -> dict[str, Any]:
        """The best value and when it was, and when the last was; of what it is."""
        best = torch.tensor(torch.nan) if self.best is None else self.best.detach().cpu()
        times = {'best_occurred': self.best_occurred or Timestamp(), 'last': self._last}
        return {**_monitored(self), 'best': best, **{name: _plain(time) for name, time in times.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Remember, if it is of the same metric."""
        if state.items() >= _monitored(self).items() and not state['best'].isnan():
            self.best = state['best']
            self.best_occurred, self._last = (Timestamp(**state[name]) for name in ('best_occurred', 'last'))


class ThresholdStopper(composer.callbacks.ThresholdStopper):
    """Composer's, with the last value in the checkpoint: a run that it ended stays ended, unless the threshold differs.

    Arguments are Composer's.
    """

    _last = torch.tensor(torch.nan)  # none yet

    def check_evaluations(self, metrics: Mapping[str, Mapping[str, Any]]) -> None:
        """Refuse an evaluation set or a metric that there is not; see :meth:`EarlyStopper.check_evaluations`."""
        _check_monitored(self, 'threshold_stopper', metrics)

    def _compare_metric_and_update_state(self, state: State) -> None:
        self._last = torch.as_tensor(self._get_monitored_metric(state)).detach().cpu()
        self._stop_if_reached(state)

    def _stop_if_reached(self, state: State) -> None:
        if not self._last.isnan() and self.comp_func(self._last, self.threshold):
            state.stop_training()

    def after_load(self, state: State, logger: Logger) -> None:
        """Stop where the checkpoint's run had."""
        del logger
        self._stop_if_reached(state)

    def state_dict(self) -> dict[str, Any]:
        """The value that was compared last, and of what it is."""
        return {**_monitored(self), 'last': self._last.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Remember, if it is of the same metric."""
        if state.items() >= _monitored(self).items():
            self._last = state['last']


def _monitored(stopper: Any) -> dict[str, str]:
    """What a stopper looks at. Shards are read by the keys that a run has, so its memory has always the same ones."""
    return {'monitor': stopper.monitor, 'dataloader_label': stopper.dataloader_label}


def _check_monitored(stopper: Any, key: str, metrics: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse an evaluation set or a metric of it that there is not."""
    label, monitor = stopper.dataloader_label, stopper.monitor
    if label not in metrics:
        raise UserError(f'{key}.dataloader_label: found {label!r}; {nearest(label, metrics)}')
    if monitor not in metrics[label]:
        raise UserError(f'{key}.monitor: found {monitor!r}; {nearest(monitor, metrics[label])}')


def _plain(timestamp: Timestamp) -> dict[str, int]:
    return {'epoch': int(timestamp.epoch), 'batch': int(timestamp.batch)}

"""A real training by Composer's Trainer, step by step, and how long its loop waits for the loader."""

import time
from collections.abc import Sequence
from typing import Any

import torch
from composer import Algorithm, DataSpec, Trainer
from composer.core import Callback, State
from composer.loggers import Logger

from dhrd_plugin.algorithms.auxiliary_reasoning_loss import AuxiliaryReasoningLoss
from dhrd_plugin.models.composer_model import ComposerDualHeadClassifier


class StepClock(Callback):
    """Time each step, from the loop's request for a batch to the end of its work on it.

    Attributes:
        steps: seconds of each step.
        waits: seconds of these until the loop had the batch.
    """

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.waits: list[float] = []

    def before_dataloader(self, state: State, logger: Logger) -> None:
        """The loop asks."""
        self._asked = time.perf_counter()

    def after_dataloader(self, state: State, logger: Logger) -> None:
        """The loop has its batch."""
        self.waits.append(time.perf_counter() - self._asked)

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        """The loop is about to ask again."""
        self.steps.append(time.perf_counter() - self._asked)


def make_trainer(
    model: ComposerDualHeadClassifier,
    data: DataSpec,
    optimizer: torch.optim.Optimizer,
    microbatch: int,
    callbacks: Sequence[Callback],
    algorithms: Sequence[Algorithm] | None = None,
    max_duration: str | None = None,
) -> Trainer:
    """Make a Trainer that prints nothing, with Composer's default precision for the device.

    Args:
        model: trained in place.
        data: see :func:`~dhrd_plugin.data.data_spec.triplet_data_spec`.
        optimizer: of the model's weights.
        microbatch: rows.
        callbacks: the clock, and others.
        algorithms: Default: ``AuxiliaryReasoningLoss``, with its defaults.
        max_duration: Default: given to ``fit``.
    """
    return Trainer(
        model=model,
        train_dataloader=data,
        optimizers=optimizer,
        algorithms=[AuxiliaryReasoningLoss()] if algorithms is None else algorithms,
        callbacks=callbacks,
        max_duration=max_duration,
        device_train_microbatch_size=microbatch,
        precision='amp_bf16' if torch.cuda.is_available() else 'fp32',
        progress_bar=False,
        log_to_console=False,
    )


def fit(
    model: ComposerDualHeadClassifier, data: DataSpec, steps: int, microbatch: int, callbacks: Sequence[Callback] = ()
) -> StepClock:
    """Train both heads for so many steps of one batch each.

    Args:
        model: trained in place.
        data: see :func:`~dhrd_plugin.data.data_spec.triplet_data_spec`.
        steps: of one batch each.
        microbatch: rows.
        callbacks: besides the clock.

    Returns:
        The clock, which has timed every step.
    """
    clock, optimizer = StepClock(), torch.optim.AdamW(model.parameters(), 1e-5)
    trainer = make_trainer(model, data, optimizer, microbatch, [clock, *callbacks], max_duration=f'{steps}ba')
    trainer.fit()
    trainer.close()
    return clock


def waited(clock: StepClock, warmup: int, window: int) -> list[float]:
    """The share of each window of steps that was spent waiting, in %: of a window's sum, so that no stall is lost.

    Args:
        clock: after the fit.
        warmup: first steps that do not count; the first one starts an epoch.
        window: steps to a share.
    """
    starts = range(warmup, len(clock.steps) - window + 1, window)
    return [100 * sum(clock.waits[i : i + window]) / sum(clock.steps[i : i + window]) for i in starts]


def describe_waits(clock: StepClock, warmup: int) -> dict[str, Any]:
    """The longest wait of the steps that count, and that for an epoch's first batch, in milliseconds."""
    return {'longest': 1000 * max(clock.waits[warmup:]), 'first': 1000 * clock.waits[0]}

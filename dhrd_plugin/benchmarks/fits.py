"""A real training by Composer's Trainer, step by step, and how long its loop waits for the loader."""

import time
from collections.abc import Sequence
from typing import Any

import torch
from composer import DataSpec, Trainer
from composer.core import Callback, State
from composer.loggers import Logger
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dhrd_plugin.algorithms.auxiliary_reasoning_loss import AuxiliaryReasoningLoss
from dhrd_plugin.data.tasks import Task
from dhrd_plugin.models.composer_model import ComposerDualHeadClassifier
from dhrd_plugin.models.network import DualHeadNetwork


class StepClock(Callback):
    """Seconds of each step, from the loop's asking for a batch to the end of its work on it.

    Attributes:
        steps: of all of it.
        waits: of that, until the loop had the batch.
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


def build_classifier(lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task) -> ComposerDualHeadClassifier:
    """The model that is trained, with a classification head that nobody has trained."""
    torch.manual_seed(0)
    network = DualHeadNetwork(lm, len(task.label_names))
    return ComposerDualHeadClassifier(network, tokenizer, task.label_names)


def fit(
    model: ComposerDualHeadClassifier, data: DataSpec, steps: int, microbatch: int, callbacks: Sequence[Callback] = ()
) -> StepClock:
    """So many steps of both heads' training, as ``train.py`` runs them.

    Args:
        model: trained in place.
        data: see :func:`~dhrd_plugin.data.collation.triplet_data_spec`.
        steps: of one batch each.
        microbatch: rows.
        callbacks: besides the clock.
    """
    clock = StepClock()
    trainer = Trainer(
        model=model,
        train_dataloader=data,
        optimizers=torch.optim.AdamW(model.parameters(), 1e-5),
        algorithms=[AuxiliaryReasoningLoss()],
        callbacks=[clock, *callbacks],
        max_duration=f'{steps}ba',
        device_train_microbatch_size=microbatch,
        precision='amp_bf16' if torch.cuda.is_available() else 'fp32',
        progress_bar=False,
        log_to_console=False,
    )
    trainer.fit()
    trainer.close()
    return clock


def waited(clock: StepClock, warmup: int, window: int) -> list[float]:
    """Of each window of steps the share that was waited, in %: a window's sum, so that no stall is lost.

    Args:
        clock: after the fit.
        warmup: first steps that do not count: with the first one an epoch starts.
        window: steps to a share.
    """
    starts = range(warmup, len(clock.steps) - window + 1, window)
    return [100 * sum(clock.waits[i : i + window]) / sum(clock.steps[i : i + window]) for i in starts]


def describe_waits(clock: StepClock, warmup: int) -> dict[str, Any]:
    """The longest wait of the steps that count, and that for an epoch's first batch, in milliseconds."""
    return {'longest': 1000 * max(clock.waits[warmup:]), 'first': 1000 * clock.waits[0]}

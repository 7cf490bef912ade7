"""Adds the reasoning head's loss to a classifier's training (arXiv:2509.21487, Eq. 4)."""

import math
import warnings

from composer.core import Algorithm, Event, State
from composer.loggers import Logger
from composer.optim import ComposerScheduler

from dhrd_plugin.errors import UserError
from dhrd_plugin.losses import combine_losses
from dhrd_plugin.models.composer_model import RETURN_REASONING_LOSS, ComposerDualHeadClassifier

NO_RATIONALES = (
    'auxiliary_reasoning_loss: the first batch carries no rationale, so it trains the classification head alone; '
    'give the rows a `rationale` and collate them with dhrd_plugin.TripletCollator'
)


def scheduled_alpha(alpha: float, schedule: ComposerScheduler | None, state: State) -> float:
    """``alpha`` times the schedule at ``state.timestamp``.

    Raises:
        UserError: the schedule returned a negative number or NaN.
    """
    factor = 1.0 if schedule is None else float(schedule(state))
    if not factor >= 0 or math.isinf(factor):
        raise UserError(
            f'auxiliary_reasoning_loss.schedule: {type(schedule).__name__} returned {factor} at '
            f'{state.timestamp.batch}; expected a finite number >= 0'
        )
    return alpha * factor


class AuxiliaryReasoningLoss(Algorithm):
    """Total loss = ``beta`` * classification + ``alpha`` * ``schedule(state)`` * reasoning.

    Runs on :attr:`.Event.BEFORE_FORWARD`, to ask the network for the reasoning loss, and on
    :attr:`.Event.AFTER_LOSS`, to add it. It keeps no state: alpha is a function of the timestamp,
    so resumption, OOM retries and closures see the same value. Where alpha is 0 the rationale is
    neither run nor paid for. Logs ``loss/train/classification``, ``loss/train/reasoning``,
    ``loss/train/total``, ``dhrd/alpha`` and ``dhrd/beta``.

    Args:
        alpha: weight of the reasoning loss. Default: 1, the paper's; small backbones want less (Table 3).
        beta: weight of the classification loss. Default: 1.
        schedule: any :class:`.ComposerScheduler`; multiplies alpha. Default: none, alpha is constant
            (a schedule is ours; the paper names it as future work).

    Raises:
        UserError: a weight is negative or not finite, or both are 0.

    Example:
        >>> Trainer(model=model, algorithms=[AuxiliaryReasoningLoss(alpha=0.5)], ...)
    """

    def __init__(self, alpha: float = 1.0, beta: float = 1.0, schedule: ComposerScheduler | None = None):
        for name, weight in (('alpha', alpha), ('beta', beta)):
            if not 0 <= weight < math.inf:
                raise UserError(f'auxiliary_reasoning_loss.{name}: found {weight}; expected a finite number >= 0')
        if alpha == beta == 0:
            raise UserError('auxiliary_reasoning_loss: alpha and beta are both 0; nothing would be trained')
        self.alpha = alpha
        self.beta = beta
        self.schedule = schedule

    def __repr__(self) -> str:
        schedule = type(self.schedule).__name__ if self.schedule is not None else None
        return f'{type(self).__name__}(alpha={self.alpha}, beta={self.beta}, schedule={schedule})'

    def match(self, event: Event, state: State) -> bool:
        """Run at the fit's start and around each forward pass."""
        del state
        return event in (Event.FIT_START, Event.BATCH_START, Event.BEFORE_FORWARD, Event.AFTER_LOSS)

    def apply(self, event: Event, state: State, logger: Logger) -> int | None:
        """Ask for the reasoning loss, then add it."""
        if event == Event.FIT_START:
            return self._check(state)
        alpha = scheduled_alpha(self.alpha, self.schedule, state)
        if event == Event.BATCH_START:
            logger.log_metrics({'dhrd/alpha': alpha, 'dhrd/beta': self.beta})
        elif event == Event.BEFORE_FORWARD:
            if alpha > 0 and state.timestamp.batch == 0 and 'reasoning_labels' not in state.batch:
                warnings.warn(NO_RATIONALES, stacklevel=2)
            # A new dict, not a new key: the trainer may split this batch again after an OOM.
            state.batch = {**state.batch, RETURN_REASONING_LOSS: alpha > 0}
        else:
            self._add_reasoning_loss(state, alpha)

    def _add_reasoning_loss(self, state: State, alpha: float) -> None:
        classification = state.loss
        if alpha == 0:
            state.loss = {'total': self.beta * classification, 'classification': classification}  # pyright: ignore
            return
        reasoning = state.outputs['reasoning_loss']  # pyright: ignore
        state.loss = {
            'total': combine_losses(classification, reasoning, alpha, self.beta),  # pyright: ignore
            'classification': classification,
            'reasoning': reasoning.mean(),
        }

    def _check(self, state: State) -> None:
        model = getattr(state.model, 'module', state.model)
        if not isinstance(model, ComposerDualHeadClassifier):
            raise UserError(
                f'auxiliary_reasoning_loss: found a model of type {type(model).__name__}; '
                'expected a ComposerDualHeadClassifier'
            )
        if sum(isinstance(algorithm, AuxiliaryReasoningLoss) for algorithm in state.algorithms) > 1:
            raise UserError('auxiliary_reasoning_loss: found two instances; one trainer takes one')

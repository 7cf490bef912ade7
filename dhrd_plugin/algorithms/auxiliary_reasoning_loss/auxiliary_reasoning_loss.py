"""Add the reasoning head's loss to a classifier's training (arXiv:2509.21487, Eq. 4)."""

import inspect
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from composer.algorithms import LabelSmoothing, SeqLengthWarmup
from composer.core import Algorithm, Event, State
from composer.loggers import Logger
from composer.optim import ComposerScheduler
from composer.utils import ensure_tuple
from torch import Tensor

from dhrd_plugin.errors import UserError
from dhrd_plugin.losses import combine_losses, weighted_mean
from dhrd_plugin.models.composer_model import RETURN_REASONING_LOSS, ComposerDualHeadClassifier
from dhrd_plugin.models.reasoning_head import apply_reasoning_head

NO_RATIONALES = (
    'auxiliary_reasoning_loss: the first batch carries no rationale, so it trains the classification head alone; '
    'give the rows a `rationale` and collate them with dhrd_plugin.TripletCollator, or with '
    'dhrd_plugin.RationaleCollator around the collator that you have'
)

# Composer's algorithms that cannot do their work beside this one, and what to do instead.
REFUSED = {
    SeqLengthWarmup: 'it would cut the pooled token or the rationale; limit the length by max_seq_len of the collator',
    LabelSmoothing: 'it reads a model output that is one tensor, and this model returns two losses besides; '
    'smooth with ComposerDualHeadClassifier(label_smoothing=...), the same formula',
}


def scheduled_alpha(alpha: float, schedule: ComposerScheduler | None, state: State) -> float:
    """Compute ``alpha`` times the schedule at ``state.timestamp``, stretched as the learning rate's are.

    Args:
        alpha: weight of the reasoning loss.
        schedule: its factor over time; ``None`` is 1 throughout.
        state: Composer's.

    Returns:
        The weight of the reasoning loss in this step.

    Raises:
        UserError: the schedule returned a negative number or NaN, or cannot be stretched.
    """
    factor = 1.0 if schedule is None else float(_follow(schedule, state))
    if not factor >= 0 or math.isinf(factor):
        raise UserError(
            f'auxiliary_reasoning_loss.schedule: {type(schedule).__name__} returned {factor} at '
            f'{state.timestamp.batch}; expected a finite number >= 0'
        )
    return alpha * factor


def _follow(schedule: ComposerScheduler, state: State) -> float:
    ratio = schedule_ratio(state)
    if ratio == 1:  # a schedule may take nothing but the state
        return schedule(state)
    if len(inspect.signature(schedule).parameters) == 1:
        raise UserError(
            f'auxiliary_reasoning_loss.schedule: found {type(schedule).__name__}, which takes no ratio, with '
            f'scale_schedule_ratio={ratio}; expected a schedule of (state, ssr)'
        )
    return schedule(state, ratio)


def schedule_ratio(state: State) -> float:
    """The trainer's ``scale_schedule_ratio``, by which it stretches Composer's schedules; 1 where it has none.

    Composer keeps it only in the functions that it makes of the learning rate's schedules, without which it takes
    no ratio.
    """
    for scheduler in state.schedulers:
        for function in getattr(scheduler, 'lr_lambdas', ()):
            names = getattr(getattr(function, '__code__', None), 'co_freevars', ())
            if 'ssr' in names:
                return function.__closure__[names.index('ssr')].cell_contents
    return 1.0


def check_neighbours(algorithms: Sequence[Algorithm]) -> None:
    """Refuse what cannot run beside :class:`AuxiliaryReasoningLoss`.

    Args:
        algorithms: all of the trainer's.

    Raises:
        UserError: a second instance, or an algorithm of Composer's, with the reason.
    """
    if sum(isinstance(algorithm, AuxiliaryReasoningLoss) for algorithm in algorithms) > 1:
        raise UserError('auxiliary_reasoning_loss: found two instances; one trainer takes one')
    for algorithm in algorithms:
        for refused, reason in REFUSED.items():
            if isinstance(algorithm, refused):
                raise UserError(f'auxiliary_reasoning_loss: found {refused.__name__} beside it: {reason}')


def _check_classes(state: State, model: Any) -> None:
    """Refuse a collator with another number or order of classes than the model has; it may have other words for them.

    Labels would be those of other classes, and the reasoning would end in a wrong name.
    """
    names = list(getattr(getattr(state.dataloader, 'collate_fn', None), 'class_index', None) or ())
    if isinstance(model, ComposerDualHeadClassifier):
        known = list(model.label_names)
    else:
        known = list((getattr(getattr(model, 'config', None), 'id2label', None) or {}).values())
    if not names or not known:
        return
    if len(names) != len(known):
        raise UserError(f'label_names: found {names} in the collator; expected a name for each of {len(known)} classes')
    if names != known and set(names) == set(known):
        raise UserError(f'label_names: found {names} in the collator; expected them as the model has them, {known}')


def _total(loss: Any) -> Any:
    """The one loss of a model, summed as Composer does where there are several."""
    if isinstance(loss, Tensor):
        return loss
    if isinstance(loss, Mapping) and 'total' in loss:
        return loss['total']
    return sum(part.mean() for part in ensure_tuple(loss))  # pyright: ignore[reportAttributeAccessIssue]


def _check_own_loss(batch: Any, model: Any) -> None:
    """Refuse what a model whose classification loss is its own would leave out."""
    if isinstance(model, ComposerDualHeadClassifier):
        return
    for key, found, expected in (
        ('classification_weight', "weights: found 'both'", "'reasoning'"),
        ('label_probabilities', 'probabilities: found', 'rows without'),
    ):
        if key in batch:
            kind = type(model).__name__
            raise UserError(
                f'{found} with a model of type {kind}, whose own classification loss takes none; expected {expected}'
            )


class AuxiliaryReasoningLoss(Algorithm):
    """Total loss = ``beta`` * classification + ``alpha`` * ``schedule(state)`` * reasoning.

    Runs on :attr:`.Event.INIT`, to give the model a reasoning head where it has none
    (:func:`~dhrd_plugin.apply_reasoning_head`), on :attr:`.Event.BATCH_START`, to log alpha and beta, on
    :attr:`.Event.BEFORE_FORWARD`, to ask for the reasoning loss, and on :attr:`.Event.AFTER_LOSS`, to add
    it. It keeps no state: alpha is a function of the timestamp, so resumption, OOM retries and closures see
    the same value. Where alpha is 0 the rationale is neither run nor paid for. Logs ``loss/train/classification``,
    ``loss/train/reasoning``, ``loss/train/total``, ``dhrd/alpha`` and ``dhrd/beta``.

    Args:
        alpha: weight of the reasoning loss. Default: 1, the paper's; small backbones want less (Table 3).
        beta: weight of the classification loss. Default: 1.
        schedule: any :class:`.ComposerScheduler`; multiplies alpha. Default: none, alpha is constant
            (a schedule is ours; the paper names it as future work). The trainer's ``scale_schedule_ratio``
            stretches it as it does those of the learning rate.
        pretrained_model_name_or_path: the checkpoint whose LM head becomes the reasoning head of a
            ``HuggingFaceModel`` around a ``...ForSequenceClassification``. Default: its input
            embedding, where its config says that the two are tied.
        label_names: the K class names, in the order of the labels; only for a ``HuggingFaceModel``
            around a ``...ForCausalLM``, which becomes a :class:`ComposerDualHeadClassifier`.

    Raises:
        UserError: a weight is negative or not finite, or both are 0; at the trainer's construction,
            a model without a decoder-only network, a second instance, or an algorithm of Composer's
            that cannot run beside it.

    Example:
        >>> Trainer(model=model, algorithms=[AuxiliaryReasoningLoss(alpha=0.5)], ...)
    """

    def __init__(
        self,
        alpha: float = 1.0,
        beta: float = 1.0,
        schedule: ComposerScheduler | None = None,
        pretrained_model_name_or_path: str | None = None,
        label_names: Sequence[str] | None = None,
    ):
        for name, weight in (('alpha', alpha), ('beta', beta)):
            if not 0 <= weight < math.inf:
                raise UserError(f'auxiliary_reasoning_loss.{name}: found {weight}; expected a finite number >= 0')
        if alpha == beta == 0:
            raise UserError('auxiliary_reasoning_loss: alpha and beta are both 0; nothing would be trained')
        self.alpha = alpha
        self.beta = beta
        self.schedule = schedule
        self.pretrained_model_name_or_path = pretrained_model_name_or_path
        self.label_names = label_names

    def __repr__(self) -> str:
        schedule = type(self.schedule).__name__ if self.schedule is not None else None
        return f'{type(self).__name__}(alpha={self.alpha}, beta={self.beta}, schedule={schedule})'

    def match(self, event: Event, state: State) -> bool:
        """Run at the trainer's construction and around each forward pass."""
        del state
        return event in (Event.INIT, Event.BATCH_START, Event.BEFORE_FORWARD, Event.AFTER_LOSS)

    def apply(self, event: Event, state: State, logger: Logger) -> int | None:
        """Fit the model with its reasoning head; ask for the reasoning loss, then add it."""
        if event == Event.INIT:
            check_neighbours(state.algorithms)
            apply_reasoning_head(state.model, self.pretrained_model_name_or_path, state.optimizers, self.label_names)
            return
        alpha = scheduled_alpha(self.alpha, self.schedule, state)
        if event == Event.BATCH_START:
            logger.log_metrics({'dhrd/alpha': alpha, 'dhrd/beta': self.beta})
        elif event == Event.BEFORE_FORWARD:
            if alpha > 0 and state.timestamp.batch == 0 and 'reasoning_labels' not in state.batch:
                warnings.warn(NO_RATIONALES, stacklevel=2)
            model = getattr(state.model, 'module', state.model)
            if state.timestamp.batch == 0:
                _check_classes(state, model)
            _check_own_loss(state.batch, model)
            # A new dict, not a new key: the trainer may split this batch again after an OOM.
            state.batch = {**state.batch, RETURN_REASONING_LOSS: alpha > 0}
        else:
            self._add_reasoning_loss(state, alpha)

    def _add_reasoning_loss(self, state: State, alpha: float) -> None:
        parts = state.loss if isinstance(state.loss, Mapping) else {}
        classification = _total(state.loss)
        if alpha == 0:
            state.loss = {**parts, 'total': self.beta * classification, 'classification': classification}
            return
        if 'reasoning_loss' not in state.outputs:
            raise UserError(
                f'auxiliary_reasoning_loss: found no reasoning_loss in the output of {type(state.model).__name__}; '
                'its forward must hand pool_index, reasoning_labels and return_reasoning_loss on to the network'
            )
        reasoning = weighted_mean(state.outputs['reasoning_loss'], state.batch.get('reasoning_weight'))  # pyright: ignore
        state.loss = {
            **parts,
            'total': combine_losses(classification, reasoning, alpha, self.beta),
            'classification': classification,
            'reasoning': reasoning,
        }

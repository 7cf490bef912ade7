"""Compare the gradients of the two losses, in norm and direction, while both are trained."""

from collections.abc import Sequence
from typing import Any

import torch
from composer.algorithms import GradientClipping
from composer.core import Callback, State, Time, TimeUnit
from composer.loggers import Logger
from composer.models.huggingface import maybe_get_underlying_model
from composer.utils import dist
from torch import Tensor, nn

from dhrd_plugin.algorithms.auxiliary_reasoning_loss import AuxiliaryReasoningLoss, scheduled_alpha
from dhrd_plugin.errors import UserError
from dhrd_plugin.models.composer_model import ComposerDualHeadClassifier
from dhrd_plugin.times import parse_time

NO_FSDP = 'FSDP shards the gradients of the total loss alone; leave one of the two out (DDP works)'
NO_COMPILE = 'a compiled model keeps no graph for a second backward pass; leave one of the two out'
_CLIPPING_EPSILON = 1e-6  # of torch.nn.utils.clip_grad_norm_


def _loss_gradients(loss: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    """The gradient of a scalar for each parameter; the graph is kept for the backward pass, ``.grad`` left alone."""
    if not loss.requires_grad:
        return [torch.zeros_like(parameter) for parameter in parameters]
    found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(p) if gradient is None else gradient for p, gradient in zip(parameters, found)]


def compare_gradients(
    classification: Sequence[Tensor],
    reasoning: Sequence[Tensor],
    shared: Sequence[bool],
    alpha: float = 1.0,
    beta: float = 1.0,
    clipping_threshold: float | None = None,
) -> dict[str, float]:
    """Compute norms, cosine and clipping of the two gradients of Eq. 4 (ours, issue 7; not the paper's).

    Args:
        classification: of the classification loss, one tensor for each parameter.
        reasoning: of the reasoning loss, likewise.
        shared: for each parameter, whether both losses reach it: those of the backbone, not of a head.
        alpha: weight of the reasoning loss. Default: 1.
        beta: weight of the classification loss. Default: 1.
        clipping_threshold: largest norm over all parameters. Default: no clipping.

    Returns:
        Over the shared parameters: ``classification_norm`` and ``reasoning_norm`` as they enter the total,
        times ``beta`` and ``alpha``; the same ``..._unweighted``; ``cosine`` between the two, absent where
        either is 0. Of the whole gradient: ``clipped_share``, the part of the classification gradient's
        length that clipping leaves, and ``clipped_share_alone``, what it would leave without the
        reasoning loss; both absent without clipping.
    """
    both = [index for index, is_shared in enumerate(shared) if is_shared]
    c, r = _norm([classification[i] for i in both]), _norm([reasoning[i] for i in both])
    found = {
        'classification_norm': beta * c,
        'reasoning_norm': alpha * r,
        'classification_norm_unweighted': c,
        'reasoning_norm_unweighted': r,
    }
    if alpha * beta * c * r > 0:
        products = [torch.dot(classification[i].flatten(), reasoning[i].flatten()) for i in both]
        found['cosine'] = float(torch.stack(products).double().sum()) / (c * r)
    if clipping_threshold is not None:
        total = [beta * one + alpha * other for one, other in zip(classification, reasoning)]
        found['clipped_share'] = _left(_norm(total), clipping_threshold)
        found['clipped_share_alone'] = _left(beta * _norm(classification), clipping_threshold)
    return found


def _norm(tensors: Sequence[Tensor]) -> float:
    squares = [torch.linalg.vector_norm(tensor).double() ** 2 for tensor in tensors]
    return float(torch.stack(squares).sum().sqrt()) if squares else 0.0


def _left(norm: float, threshold: float) -> float:
    return min(1.0, threshold / (norm + _CLIPPING_EPSILON))


def _backbone(model: nn.Module) -> nn.Module:
    """The part of a model that both heads share: the decoder and its embedding, also if the LM head is tied to it."""
    model = getattr(model, 'module', model)
    if isinstance(model, ComposerDualHeadClassifier):
        return model.network.backbone
    return maybe_get_underlying_model(model.model).base_model  # pyright: ignore


class GradientComparison(Callback):
    """Logs how the gradients of both losses compare, at the chosen steps, as ``dhrd/grad/...``.

    ``classification_norm``, ``reasoning_norm``, ``cosine`` and the rest are those of
    :func:`compare_gradients`, for the whole batch over all microbatches and ranks. They are of the
    step at which they are logged, before clipping, and do not change the training. Each chosen step
    costs two more backward passes and the memory of two gradients. Where alpha is 0, or no row has a
    rationale, there is no cosine; without :class:`~dhrd_plugin.AuxiliaryReasoningLoss` the reasoning
    norm is 0. Under ``amp_fp16`` small gradients may vanish: the losses are not scaled here.

    Args:
        interval: compare at the first batch and then every so many batches (``'10ba'``) or epochs
            (``'1ep'``). Default: ``'10ba'``.

    Raises:
        UserError: another interval; before training, FSDP or a compiled model.

    Example:
        >>> Trainer(model=model, algorithms=[AuxiliaryReasoningLoss()], callbacks=[GradientComparison('10ba')], ...)
    """

    def __init__(self, interval: str = '10ba'):
        self.interval: Time = parse_time(interval, 'gradient_comparison.interval')
        if self.interval.unit not in (TimeUnit.BATCH, TimeUnit.EPOCH) or self.interval.value < 1:
            raise UserError(f"gradient_comparison.interval: found {interval!r}; expected batches or epochs, as '10ba'")
        self._sums: list[list[Tensor]] = []
        self._samples = 0
        self._reasons = False

    def init(self, state: State, logger: Logger) -> None:
        """Refuse FSDP."""
        del logger
        if state.fsdp_config is not None:
            raise UserError(f'gradient_comparison: found with FSDP: {NO_FSDP}')

    def fit_start(self, state: State, logger: Logger) -> None:
        """Refuse a compiled model; the trainer compiles it after :meth:`init`."""
        del logger
        if hasattr(state.model.forward, '_torchdynamo_orig_callable'):
            raise UserError(f'gradient_comparison: found with torch.compile: {NO_COMPILE}')

    def before_train_batch(self, state: State, logger: Logger) -> None:
        """Start again, also where a batch is retried."""
        del state, logger
        self._sums, self._samples, self._reasons = [], 0, False

    def after_loss(self, state: State, logger: Logger) -> None:
        """Add a microbatch, weighed by its samples as Composer weighs it."""
        del logger
        if not self._due(state):
            return
        parameters = _trained(state)
        if not self._sums:
            self._sums = [[torch.zeros_like(parameter) for parameter in parameters] for _ in range(2)]
        losses: Any = state.loss if isinstance(state.loss, dict) else {'classification': state.loss}
        samples = len(state.batch['labels'])
        self._samples += samples
        self._reasons = 'reasoning' in losses  # the same on every rank: alpha is a function of the time
        for sums, name in zip(self._sums, ('classification', 'reasoning')):
            if name in losses:
                for total, gradient in zip(sums, _loss_gradients(losses[name], parameters)):
                    total.add_(gradient, alpha=samples)

    def after_train_batch(self, state: State, logger: Logger) -> None:
        """Average over samples and ranks, and log."""
        if not self._due(state):
            return
        samples = state.device.tensor_to_device(torch.tensor(self._samples))
        dist.all_reduce(samples)
        for gradient in self._sums[0] + (self._sums[1] if self._reasons else []):
            dist.all_reduce(gradient)
            gradient.div_(samples)
        shared = {id(parameter) for parameter in _backbone(state.model).parameters()}
        found = compare_gradients(
            self._sums[0],
            self._sums[1],
            [id(parameter) in shared for parameter in _trained(state)],
            *_weights(state),
            _clipping_threshold(state),
        )
        self._sums = []
        logger.log_metrics({f'dhrd/grad/{name}': value for name, value in found.items()})

    def _due(self, state: State) -> bool:
        time = state.timestamp
        if self.interval.unit == TimeUnit.BATCH:
            return time.batch.value % self.interval.value == 0
        return time.batch_in_epoch.value == 0 and time.epoch.value % self.interval.value == 0


def _trained(state: State) -> list[Tensor]:
    return [parameter for parameter in state.model.parameters() if parameter.requires_grad]


def _weights(state: State) -> tuple[float, float]:
    """``alpha`` and ``beta`` of this step."""
    for algorithm in state.algorithms:
        if isinstance(algorithm, AuxiliaryReasoningLoss):
            return scheduled_alpha(algorithm.alpha, algorithm.schedule, state), algorithm.beta
    return 0.0, 1.0


def _clipping_threshold(state: State) -> float | None:
    for algorithm in state.algorithms:
        if isinstance(algorithm, GradientClipping) and algorithm.clipping_type == 'norm':
            return algorithm.clipping_threshold
    return None

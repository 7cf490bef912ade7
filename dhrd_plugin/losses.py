"""The two terms of the method (arXiv:2509.21487, Eq. 1 to 4) as pure functions.

Nothing here knows of models or of Composer.
"""


import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORE_INDEX = -100


def _upcast(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


class _LinearCrossEntropy(torch.autograd.Function):
    """Cross-entropy of ``linear(hidden)`` in chunks; never more than one chunk of logits is alive.

    The gradient for ``hidden`` is known, up to the factor of each token, as soon as the chunk's
    logits are, so the forward pass keeps it: a frozen LM head (LoRA) recomputes nothing. Only a
    trainable head computes its logits a second time, in the backward pass.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, chunk_size):  # pyright: ignore
        losses = hidden.new_empty(targets.shape, dtype=torch.promote_types(hidden.dtype, torch.float32))
        normalizers = torch.empty_like(losses)
        unit_grad = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, len(targets), chunk_size):
            rows = slice(start, start + chunk_size)
            logits = _upcast(F.linear(hidden[rows], weight, bias))
            normalizers[rows] = logits.logsumexp(-1)
            losses[rows] = normalizers[rows] - logits.gather(1, targets[rows, None]).squeeze(1)
            if unit_grad is not None:
                unit_grad[rows] = _logits_grad(logits, normalizers[rows], targets[rows]).to(weight.dtype) @ weight
        ctx.chunk_size = chunk_size
        ctx.save_for_backward(hidden, weight, bias, targets, normalizers, unit_grad)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_losses):  # pyright: ignore
        hidden, weight, bias, targets, normalizers, unit_grad = ctx.saved_tensors
        _, weight_needs_grad, bias_needs_grad, *_ = ctx.needs_input_grad
        grad_hidden = None if unit_grad is None else (unit_grad * grad_losses[:, None]).to(hidden.dtype)
        grad_weight = torch.zeros_like(weight) if weight_needs_grad else None
        grad_bias = torch.zeros_like(bias) if bias_needs_grad else None
        if weight_needs_grad or bias_needs_grad:
            for start in range(0, len(targets), ctx.chunk_size):
                rows = slice(start, start + ctx.chunk_size)
                logits = _upcast(F.linear(hidden[rows], weight, bias))
                grad_logits = _logits_grad(logits, normalizers[rows], targets[rows])
                grad_logits = grad_logits.mul_(grad_losses[rows, None]).to(weight.dtype)
                if grad_weight is not None:
                    grad_weight.addmm_(grad_logits.T, hidden[rows])
                if grad_bias is not None:
                    grad_bias += grad_logits.sum(0)
        return grad_hidden, grad_weight, grad_bias, None, None


def _logits_grad(logits: Tensor, normalizers: Tensor, targets: Tensor) -> Tensor:
    """Softmax less one-hot, written over ``logits``."""
    grad = logits.sub_(normalizers[:, None]).exp_()
    grad[torch.arange(len(targets), device=targets.device), targets] -= 1
    return grad


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    chunk_size: int = 1024,
) -> Tensor:
    """``cross_entropy(hidden @ weight.T + bias, targets, reduction='none')`` without the full logits.

    At most ``chunk_size * V`` logits are alive at a time, forward and backward. Under autocast
    the product runs in autocast's dtype, as ``F.linear`` would; the softmax runs in fp32.

    Args:
        hidden: [N, H] hidden states.
        weight: [V, H] weight of the LM head.
        bias: [V] or ``None``.
        targets: [N] token ids, all in [0, V).
        chunk_size: rows to a chunk.

    Returns:
        [N] losses in nats; fp32, or fp64 for fp64 input.
    """
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    with torch.autocast(device, enabled=False):
        return _LinearCrossEntropy.apply(hidden, weight, bias, targets, chunk_size)  # pyright: ignore


def chunked_lm_loss(
    hidden: Tensor,
    labels: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    chunk_size: int = 1024,
) -> Tensor:
    """Next-token loss of each sequence, a mean over its supervised tokens (Eq. 1 and 3).

    The mean is taken for each sequence, not over the batch, so that a gradient does not depend on
    how a batch is cut into microbatches or ranks: Composer weighs those by their samples. With
    one sequence to a microbatch, as in the paper (E.5), the two means are one.

    Args:
        hidden: [B, S, H] last hidden states of the backbone.
        labels: [B, S] token ids aligned with the input, -100 where nothing is supervised. The
            state at position t predicts the label at t + 1, so column 0 is never a target.
        weight: [V, H] weight of the LM head.
        bias: [V] or ``None``.
        chunk_size: supervised tokens whose logits are computed at a time.

    Returns:
        [B] losses in nats a token; 0 where a sequence has no target, still attached to the graph.
    """
    targets = labels[:, 1:]
    rows, columns = (targets != IGNORE_INDEX).nonzero(as_tuple=True)
    losses = linear_cross_entropy(hidden[rows, columns], weight, bias, targets[rows, columns], chunk_size)
    counts = torch.bincount(rows, minlength=len(labels)).clamp(min=1)
    return losses.new_zeros(len(labels)).index_add(0, rows, losses) / counts


def combine_losses(classification: Tensor, reasoning: Tensor, alpha: float = 1.0, beta: float = 1.0) -> Tensor:
    """Eq. 4: ``beta * classification + alpha * reasoning``.

    Args:
        classification: scalar, the mean cross-entropy over the batch (Eq. 2).
        reasoning: [B], one mean per sequence (see :func:`chunked_lm_loss`), or a scalar.
        alpha: weight of the reasoning term, >= 0.
        beta: weight of the classification term, >= 0.

    Returns:
        The scalar to back-propagate.
    """
    return beta * classification + alpha * reasoning.mean()

"""The two terms of the method (arXiv:2509.21487, Eq. 1 to 4) as pure functions.

Nothing here knows of models or of Composer.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORE_INDEX = -100


def _upcast(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


class _LinearCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of ``linear(hidden)`` for each row of a batch; one chunk of logits is alive at a time.

    Both gradients are known, up to the factor of each row, as soon as a chunk's logits are, so the forward
    pass keeps them and no logits are computed twice. For weight and bias that takes rows of one factor, as a
    mean over the batch gives them; where rows are weighed, the backward pass computes their logits again.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, rows, counts, chunk_size):  # pyright: ignore
        losses = hidden.new_empty(targets.shape, dtype=torch.promote_types(hidden.dtype, torch.float32))
        shares = counts.to(losses.dtype).reciprocal()[rows]  # of each token in the mean of its row
        gradients = _Gradients(hidden, weight, bias, *ctx.needs_input_grad[:3])
        for chunk, logits in _chunks(hidden, weight, bias, chunk_size):
            losses[chunk] = _cross_entropy_(logits, targets[chunk])
            gradients.add(chunk, logits, shares[chunk])
        ctx.chunk_size = chunk_size
        ctx.gradients = gradients  # for one backward pass, which writes over them
        ctx.save_for_backward(hidden, weight, bias, targets, rows, shares)
        return losses.new_zeros(counts.shape).index_add(0, rows, losses * shares)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_losses):  # pyright: ignore
        hidden, weight, bias, targets, rows, shares = ctx.saved_tensors
        kept, ctx.gradients = ctx.gradients, None

        def add_again(factors: Tensor) -> None:
            for chunk, logits in _chunks(hidden, weight, bias, ctx.chunk_size):
                _cross_entropy_(logits, targets[chunk])
                kept.add(chunk, logits, factors[chunk])

        if kept is None:  # a second pass over a retained graph: as the forward pass did it, to the same bits
            kept = _Gradients(hidden, weight, bias, *ctx.needs_input_grad[:3])
            add_again(shares)
        if not kept.scale(grad_losses, rows):
            add_again(shares * grad_losses[rows])
        return *kept.values, None, None, None, None


class _Gradients:
    """For hidden states, weight and bias, as far as each is asked for, chunk by chunk."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, *needed: bool):
        self.hidden, self.weight = hidden, weight
        self.values = [
            torch.zeros_like(tensor) if wanted and tensor is not None else None
            for tensor, wanted in zip((hidden, weight, bias), needed)
        ]

    def scale(self, factors: Tensor, rows: Tensor) -> bool:
        """Give each token the factor of its row; ``False`` where weight and bias must be added up anew."""
        grad_hidden, grad_weight, grad_bias = self.values
        first = factors[:1].sum()
        whole = (grad_weight is None and grad_bias is None) or bool((factors == first).all())
        if grad_hidden is not None and whole:
            grad_hidden.mul_(factors[rows, None].to(grad_hidden.dtype))
        for grad in (grad_weight, grad_bias):
            if grad is not None:
                grad.mul_(first) if whole else grad.zero_()
        return whole

    def add(self, chunk: slice, logits_grad: Tensor, factors: Tensor) -> None:
        """Of the tokens ``chunk``, each by its factor [n]; ``logits_grad`` [n, V] is without it."""
        grad_hidden, grad_weight, grad_bias = self.values
        logits_grad, factors = logits_grad.to(self.weight.dtype), factors.to(self.hidden.dtype)[:, None]
        if grad_hidden is not None:
            grad_hidden[chunk] = (logits_grad @ self.weight) * factors
        if grad_weight is not None:  # the narrower of the two takes the factor
            grad_weight.addmm_(logits_grad.T, self.hidden[chunk] * factors)
        if grad_bias is not None:
            grad_bias.addmv_(logits_grad.T, factors[:, 0])


def _chunks(hidden: Tensor, weight: Tensor, bias: Tensor | None, size: int) -> Iterator[tuple[slice, Tensor]]:
    """Logits of so many tokens at a time, in at least fp32, in one buffer: fresh memory costs as much as a pass."""
    buffer = hidden.new_empty(min(size, len(hidden)), len(weight))
    for start in range(0, len(hidden), size):
        chunk = slice(start, min(start + size, len(hidden)))
        logits = buffer[: chunk.stop - start]
        if bias is None:
            torch.mm(hidden[chunk], weight.T, out=logits)
        else:
            torch.addmm(bias, hidden[chunk], weight.T, out=logits)
        yield chunk, _upcast(logits)


def _cross_entropy_(logits: Tensor, targets: Tensor) -> Tensor:
    """Losses [n]; over ``logits`` [n, V] their gradient is written, softmax less one-hot."""
    largest, wanted = logits.amax(-1), logits.gather(1, targets[:, None]).squeeze(1)
    torch.softmax(logits, -1, out=logits)
    losses = largest - logits.amax(-1).log() - wanted  # the largest probability is at least 1/V: its log is exact
    logits[torch.arange(len(targets), device=targets.device), targets] -= 1
    return losses


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    chunk_size: int = 256,
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
    tokens = torch.arange(len(targets), device=targets.device)
    return _row_losses(hidden, weight, bias, targets, tokens, torch.ones_like(tokens), chunk_size)


def _row_losses(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    rows: Tensor,
    counts: Tensor,
    chunk_size: int,
) -> Tensor:
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    with torch.autocast(device, enabled=False):
        return _LinearCrossEntropy.apply(hidden, weight, bias, targets, rows, counts, chunk_size)  # pyright: ignore


def chunked_lm_loss(
    hidden: Tensor,
    labels: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    chunk_size: int = 256,
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
    counts = torch.bincount(rows, minlength=len(labels)).clamp(min=1)
    return _row_losses(hidden[rows, columns], weight, bias, targets[rows, columns], rows, counts, chunk_size)


def weighted_mean(losses: Tensor, weights: Tensor | None = None) -> Tensor:
    """``sum(weights * losses) / B``: the mean over the rows, each with its weight (ours, not the paper's).

    Divided by the number of rows, not by the sum of their weights: Composer averages microbatches
    and ranks by their rows, so the gradient does not depend on how a batch is cut. Weights whose
    mean is not 1 therefore scale the loss.

    Args:
        losses: [B], one for each row.
        weights: [B], >= 0. Default: 1 for each row.

    Returns:
        A scalar.
    """
    return losses.mean() if weights is None else (weights * losses).mean()


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

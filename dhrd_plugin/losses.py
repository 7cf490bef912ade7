"""The two terms of the method (arXiv:2509.21487, Eq. 1 to 4) as pure functions.

Nothing here knows of models or of Composer.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE_INDEX = -100


def _upcast(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


class _LinearCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of ``linear(hidden)`` for each row of a batch; one chunk of logits is alive at a time.

    Both gradients are known, up to the factor of each row, as soon as a chunk's logits are, so the forward
    pass keeps them and no logits are computed twice. For weight and bias that takes rows of one factor, as
    :func:`weighted_mean` gives them; where rows are weighed, the backward pass computes their logits again. So it
    does in fp16, where a gradient without the scaler's factor would be too small to be kept.

    In half precision the sum over several chunks is one in fp32, [V, H] for the weight, and rounded once at its
    end. Rounded chunk by chunk, 128 chunks are six times as far off.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, rows, counts, chunk_size):  # pyright: ignore
        losses = hidden.new_empty(targets.shape, dtype=torch.promote_types(hidden.dtype, torch.float32))
        shares = counts.to(losses.dtype).reciprocal()[rows]  # of each token in the mean of its row
        gradients = None
        if hidden.dtype != torch.float16:
            gradients = _Gradients(hidden, weight, bias, chunk_size, *ctx.needs_input_grad[:3])
        for chunk, logits in _chunks(hidden, weight, bias, chunk_size):
            losses[chunk] = _cross_entropy_(logits, targets[chunk])
            if gradients is not None:
                gradients.add(chunk, logits, shares[chunk])
        ctx.chunk_size = chunk_size
        ctx.gradients = gradients  # for one backward pass, which writes over them
        ctx.save_for_backward(hidden, weight, bias, targets, rows, shares)
        return losses.new_zeros(counts.shape).index_add(0, rows, losses * shares)

    @staticmethod
    def backward(ctx, grad_losses):  # pyright: ignore
        hidden, weight, bias, targets, rows, shares = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph: to be differentiated again, as torch can do it with all logits
            inputs = [value for value, wanted in zip((hidden, weight, bias), ctx.needs_input_grad) if wanted]
            losses = F.cross_entropy(_upcast(F.linear(hidden, weight, bias)), targets, reduction='none')
            found = iter(torch.autograd.grad(losses, inputs, grad_losses[rows] * shares, create_graph=True))
            return *(next(found) if wanted else None for wanted in ctx.needs_input_grad[:3]), None, None, None, None
        kept, ctx.gradients = ctx.gradients, None

        def add_again(factors: Tensor) -> None:
            for chunk, logits in _chunks(hidden, weight, bias, ctx.chunk_size):
                _cross_entropy_(logits, targets[chunk])
                kept.add(chunk, logits, factors[chunk])

        if kept is None:
            kept = _Gradients(hidden, weight, bias, ctx.chunk_size, *ctx.needs_input_grad[:3])
            if hidden.dtype == torch.float16:
                add_again(shares * grad_losses[rows])
                return *kept.rounded(), None, None, None, None
            add_again(shares)  # a second pass over a retained graph: as the forward pass did it, to the same bits
        if not kept.scale(grad_losses, rows):
            add_again(shares * grad_losses[rows])
        return *kept.rounded(), None, None, None, None


class _Gradients:
    """For hidden states, weight and bias, as far as each is asked for, chunk by chunk."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, chunk_size: int, *needed: bool):
        self.hidden, self.weight = hidden, weight
        self.half = hidden.dtype in (torch.bfloat16, torch.float16)
        dtype = torch.float32 if self.half and len(hidden) > chunk_size else hidden.dtype  # of what is summed
        self.values = [
            torch.zeros_like(tensor, dtype=kind) if wanted and tensor is not None else None
            for tensor, kind, wanted in zip((hidden, weight, bias), (hidden.dtype, dtype, dtype), needed)
        ]

    def scale(self, factors: Tensor, rows: Tensor) -> bool:
        """Give each token the factor of its row; ``False`` where weight and bias must be added up anew."""
        grad_hidden, grad_weight, grad_bias = self.values
        first = factors[:1].sum()
        alike = len(factors) == 1 or factors.stride(0) == 0  # one number, expanded: nothing to wait for
        whole = alike or (grad_weight is None and grad_bias is None)
        if grad_hidden is not None and whole:
            grad_hidden.mul_(factors[rows, None])
        for grad in (grad_weight, grad_bias):
            if grad is not None:
                grad.mul_(first) if whole else grad.zero_()
        return whole

    def add(self, chunk: slice, logits_grad: Tensor, factors: Tensor) -> None:
        """Of the tokens ``chunk``, each by its factor [n]; ``logits_grad`` [n, V] is without it."""
        grad_hidden, grad_weight, grad_bias = self.values
        factors = factors[:, None]
        if self.half:  # the factor before the rounding, as torch has it
            logits_grad = logits_grad.mul_(factors)
            rounded = logits_grad.to(self.weight.dtype)
            if grad_hidden is not None:
                grad_hidden[chunk] = rounded @ self.weight
            if grad_weight is not None:  # a GPU takes TF32 for fp32, which holds the states as they are
                wide = grad_weight.dtype != rounded.dtype
                grad_weight.addmm_((logits_grad if wide else rounded).T, self.hidden[chunk].to(grad_weight.dtype))
            if grad_bias is not None:
                grad_bias.add_(logits_grad.sum(0))
            return
        if grad_hidden is not None:
            grad_hidden[chunk] = (logits_grad @ self.weight) * factors
        if grad_weight is not None:  # the narrower of the two takes the factor
            grad_weight.addmm_(logits_grad.T, self.hidden[chunk] * factors)
        if grad_bias is not None:
            grad_bias.addmv_(logits_grad.T, factors[:, 0])

    def rounded(self) -> list[Tensor | None]:
        """The sums, in the precision of hidden states and weights."""
        return [None if value is None else value.to(self.hidden.dtype) for value in self.values]


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


def default_chunk_size(weight: Tensor) -> int:
    """Tokens to a chunk: 256; on a GPU, which small products leave idle, as many as have 2^27 logits (512 MiB in fp32).

    Measured on an H100 with 128,000 words and a frozen head: chunks of 256 took 92 ms, of 1,024 80, all at once 82.

    Args:
        weight: [V, H] of the LM head.
    """
    return 256 if weight.device.type == 'cpu' else max(256, 2**27 // len(weight))


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, chunk_size: int | None = None
) -> Tensor:
    """``cross_entropy(hidden @ weight.T + bias, targets, reduction='none')`` without the full logits.

    At most ``chunk_size * V`` logits are alive at a time, forward and backward. Under autocast
    the product runs in autocast's dtype, as ``F.linear`` would; the softmax runs in fp32.

    Args:
        hidden: [N, H] hidden states.
        weight: [V, H] weight of the LM head.
        bias: [V] or ``None``.
        targets: [N] token ids, all in [0, V).
        chunk_size: rows to a chunk. Default: see :func:`default_chunk_size`.

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
    chunk_size: int | None,
) -> Tensor:
    device = hidden.device.type
    chunk_size = chunk_size or default_chunk_size(weight)
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
    chunk_size: int | None = None,
    num_targets: int | None = None,
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
        chunk_size: supervised tokens whose logits are computed at a time. Default: see :func:`default_chunk_size`.
        num_targets: how many labels are supervised, where the host knows it. Default: read from ``labels``, for
            which it waits for a GPU.

    Returns:
        [B] losses in nats a token; 0 where a sequence has no target, still attached to the graph.
    """
    targets = labels[:, 1:]
    supervised = targets != IGNORE_INDEX
    counts = supervised.sum(1)
    size = int(counts.sum()) if num_targets is None else num_targets
    flat = torch.nonzero_static(supervised.flatten(), size=size).squeeze(1)
    rows = flat // max(targets.shape[1], 1)
    states = hidden.flatten(0, 1).index_select(0, flat + rows)  # a row has one state more than targets
    targets = targets.flatten().index_select(0, flat)
    return _row_losses(states, weight, bias, targets, rows, counts.clamp(min=1), chunk_size)


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
    return _mean(losses if weights is None else weights * losses)


def _mean(losses: Tensor) -> Tensor:
    # Unlike that of `mean` its gradient is one number, expanded: the chunked loss sees that the rows count alike.
    return losses.sum() / losses.numel()


def soft_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    probabilities: Tensor | None = None,
    soft_label_weight: float = 0.5,
    class_weights: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """``(1 - w) * cross_entropy(label) + w * cross_entropy(probabilities)`` of each row (ours, not the paper's).

    Hinton et al. (arXiv:1503.02531), with a teacher's votes for its softmax. A row without probabilities has the first
    term alone, to the bit; one without a label the second alone. Every row counts as one in a mean over the rows, so
    the gradient does not depend on how a batch is cut. The weight of a class counts in both terms, each class by its
    probability; smoothing, which stands for a doubt that nobody measured, only in the label's.

    Args:
        logits: [B, K].
        labels: [B] class indices, -100 for a row without a label.
        probabilities: [B, K], each row's sum 1, or 0 for a row without any. Default: none.
        soft_label_weight: w, from 0 to 1. Default: 0.5.
        class_weights: [K]. Default: 1 for each class.
        label_smoothing: from 0 to 1. Default: 0.

    Returns:
        [B] losses in nats.
    """
    hard = F.cross_entropy(logits, labels, class_weights, reduction='none', label_smoothing=label_smoothing)
    if probabilities is None:
        return hard
    soft = F.cross_entropy(logits, probabilities.to(logits.dtype), class_weights, reduction='none')
    share = torch.full_like(hard, soft_label_weight).masked_fill(labels == IGNORE_INDEX, 1) * probabilities.any(-1)
    return (1 - share) * hard + share * soft


def binary_cross_entropy(
    logits: Tensor, labels: Tensor, pos_weight: Tensor | None = None, label_smoothing: float = 0.0
) -> Tensor:
    """Cross-entropy of each class for itself, a mean over the classes: rows of any number of classes (ours).

    Args:
        logits: [B, K].
        labels: [B, K] zeros and ones.
        pos_weight: [K], that of the rows that have the class, as of ``torch.nn.BCEWithLogitsLoss``. Default: 1.
        label_smoothing: from 0 to 1; so far towards one half. Default: 0.

    Returns:
        [B] losses in nats.
    """
    targets = labels.to(logits.dtype) * (1 - label_smoothing) + label_smoothing / 2
    losses = F.binary_cross_entropy_with_logits(logits, targets, pos_weight=pos_weight, reduction='none')
    return losses.mean(-1)


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
    return beta * classification + alpha * _mean(reasoning)

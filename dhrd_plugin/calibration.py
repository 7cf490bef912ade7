"""How far the probabilities of a classifier can be trusted, and the temperature that mends them."""

from typing import Any

import torch
from torch import Tensor

from dhrd_plugin.problem_type import each_by_itself

BINS = 15  # of the calibration error and the reliability curve
THRESHOLDS = (0.0, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99)  # of the confidence, for coverage and error
BOUNDS = (0.1, 100.0)  # of the temperature: rows that are all right would have it go to 0
_HALVINGS = 50


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """Fit one temperature T by the log loss of ``logits / T`` (Guo et al., 2017).

    The loss is convex in 1/T, so its slope is halved to 0.

    Args:
        logits: [N, K].
        labels: [N] class indices.

    Returns:
        T, between 0.1 and 100.
    """
    logits = logits.double()
    right = logits.gather(1, labels[:, None])[:, 0].mean()
    low, high = 1 / BOUNDS[1], 1 / BOUNDS[0]
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        slope = ((logits * middle).softmax(-1) * logits).sum(-1).mean() - right
        low, high = (low, middle) if slope > 0 else (middle, high)
    return 2 / (low + high)


def calibrate(logits: Tensor, labels: Tensor) -> dict[str, Any]:
    """Fit a temperature, and tell what it does.

    Args:
        logits: [N, K].
        labels: [N] class indices; of several labels [N, K] zeros and ones, each class of each row a row of its own.

    Returns:
        ``temperature``, ``rows`` N, and the expected calibration error ``ece_before`` and ``ece_after``, on these rows.
    """
    rows = len(labels)
    if labels.ndim > 1:  # sigmoid(z) is the softmax of 0 and z
        logits, labels = each_by_itself(torch.zeros_like(logits), logits, labels)
    temperature = fit_temperature(logits, labels)
    return {
        'temperature': temperature,
        'rows': rows,
        'ece_before': calibration_error(logits.softmax(-1), labels),
        'ece_after': calibration_error((logits / temperature).softmax(-1), labels),
    }


def at_temperature(probabilities: Tensor, temperature: float) -> Tensor:
    """[N, K] probabilities as those of the logits divided by ``temperature``."""
    smallest = torch.finfo(probabilities.dtype).tiny
    return (probabilities.clamp(min=smallest).log() / temperature).softmax(-1)


def calibration_error(probabilities: Tensor, labels: Tensor) -> float:
    """The expected calibration error, over the bins of :func:`reliability`, whose arguments it has."""
    bins = reliability(probabilities, labels)
    return sum(row['rows'] * abs(row['confidence'] - row['accuracy']) for row in bins) / len(labels)


def reliability(probabilities: Tensor, labels: Tensor) -> list[dict[str, float]]:
    """Mean ``confidence``, ``accuracy`` and ``rows`` of each of 15 bins of the confidence that has rows.

    Args:
        probabilities: [N, K].
        labels: [N] class indices.
    """
    confidence, right = _confidence(probabilities, labels)
    bin_of = (confidence * BINS).ceil().clamp(1, BINS).long() - 1
    return [
        {
            'confidence': float(confidence[inside].mean()),
            'accuracy': float(right[inside].mean()),
            'rows': int(inside.sum()),
        }
        for inside in (bin_of == index for index in range(BINS))
        if inside.any()
    ]


def coverage(probabilities: Tensor, labels: Tensor) -> list[dict[str, float | None]]:
    """What is left, and how much of it is wrong, where answers of less confidence are kept back.

    Args:
        probabilities: [N, K].
        labels: [N] class indices.

    Returns:
        For each threshold: ``confidence``, which is reached or passed; ``rows`` that do; their ``share`` of all; and
        their ``error``, the share of them that is wrong, ``None`` where there are none.
    """
    confidence, right = _confidence(probabilities, labels)
    found = []
    for threshold in THRESHOLDS:
        kept = right[confidence >= threshold]
        error = float(1 - kept.mean()) if len(kept) else None
        share = len(kept) / len(right)
        found.append({'confidence': threshold, 'rows': len(kept), 'share': share, 'error': error})
    return found


def _confidence(probabilities: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """[N] largest probabilities, and 1 where it is that of the label, else 0."""
    confidence, guess = probabilities.max(-1)
    return confidence, (guess == labels).float()

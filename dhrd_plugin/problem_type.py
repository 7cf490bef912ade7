"""One class to a row, or any number of them: from logits to probabilities, and from these to an answer.

The two kinds have transformers' names, which an exported config carries, so that any loader answers alike.
"""

from typing import Any

import torch
from torch import Tensor

SINGLE_LABEL = 'single_label_classification'
MULTI_LABEL = 'multi_label_classification'
PROBLEM_TYPES = (SINGLE_LABEL, MULTI_LABEL)
THRESHOLD = 0.5  # of the probability of a class, where a row has any number of them


def is_multi_label(config: Any) -> bool:
    """Whether a classifier, by its config, gives a row any number of classes."""
    return getattr(config, 'problem_type', None) == MULTI_LABEL


def to_probabilities(logits: Tensor, multi_label: bool) -> Tensor:
    """[N, K] logits as fp32 probabilities: of one class to a row, or of each class for itself."""
    return logits.float().sigmoid() if multi_label else logits.float().softmax(-1)


def decide(probabilities: Tensor, multi_label: bool) -> Tensor:
    """The answers to [N, K] probabilities: [N], the most probable class, or [N, K], each class's yes or no."""
    return probabilities >= THRESHOLD if multi_label else probabilities.argmax(-1)


def confidence(probabilities: Tensor, multi_label: bool) -> Tensor:
    """[N] how sure each answer is: the largest of [N, K] probabilities, or that of the class it is least sure of."""
    return torch.maximum(probabilities, 1 - probabilities).amin(-1) if multi_label else probabilities.amax(-1)


def is_known(labels: Tensor, ignored: int) -> Tensor:
    """[N] whether a row has a label, of [N] class indices or of [N, K] zeros and ones, ``ignored`` where unknown."""
    known = labels != ignored
    return known.all(-1) if labels.ndim > 1 else known


def each_by_itself(no: Tensor, yes: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Every class of every row as a row of two classes, no and yes.

    Args:
        no: [N, K] probabilities or logits of a class that is not there.
        yes: [N, K], likewise, of one that is.
        labels: [N, K] zeros and ones.

    Returns:
        [N * K, 2] probabilities or logits, and [N * K] class indices.
    """
    return torch.stack([no.flatten(), yes.flatten()], -1), labels.flatten().long()

"""Metrics on resamples of an evaluation set's rows, all cells at once."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ['cluster', 'count', 'measure', 'resample']

BLOCK = 2**22  # numbers drawn at once
Floats = NDArray[np.float64]


def cluster(groups: Sequence[Any]) -> NDArray[np.int64]:
    """[N] the number of each row's cluster: its group, or itself where rows have none."""
    if None in groups:
        return np.arange(len(groups))
    number = {group: index for index, group in enumerate(dict.fromkeys(groups))}
    return np.array([number[group] for group in groups])


def count(labels: Sequence[int], predictions: Sequence[int], clusters: NDArray[np.int64], classes: int) -> Floats:
    """What the metrics are made of, by cluster.

    Returns:
        [G, 3 K + 2]: for each of K classes the rows of it that are right, are predicted so, are labelled so;
        then whether every row is right, and 1 for the cluster itself.
    """
    truth, guess = np.asarray(labels), np.asarray(predictions)
    right, size = truth == guess, int(clusters.max()) + 1
    counts = np.zeros((size, 3 * classes + 2))
    np.add.at(counts, (clusters[right], truth[right]), 1)
    np.add.at(counts, (clusters, classes + guess), 1)
    np.add.at(counts, (clusters, 2 * classes + truth), 1)
    counts[:, -2] = np.bincount(clusters, ~right, size) == 0
    counts[:, -1] = 1
    return counts


def measure(name: str, counts: Floats) -> Floats:
    """A metric of :mod:`dhrd_plugin.metrics` from sums of counts [..., 3 K + 2], or of resamples of them.

    A class that is neither predicted nor present does not count in the macro-F1, as with torchmetrics and
    scikit-learn; one that is never predicted counts as 0.
    """
    right, guessed, present = np.split(counts[..., :-2], 3, axis=-1)
    seen = guessed + present
    f1 = np.divide(2 * right, seen, out=np.zeros_like(seen), where=seen > 0)
    if name == 'accuracy':
        return right.sum(-1) / present.sum(-1)
    if name == 'macro_f1':
        return f1.sum(-1) / (seen > 0).sum(-1)
    if name == 'f1a':
        return f1[..., 1]
    return counts[..., -2] / counts[..., -1]  # em


def resample(counts: Floats, resamples: int, rng: np.random.Generator) -> Floats:
    """Sum counts [G, C] over G clusters drawn with replacement, so many times: [B, C]."""
    size = len(counts)
    step = max(1, BLOCK // size)
    return np.concatenate(
        [_draw(size, min(step, resamples - start), rng) @ counts for start in range(0, resamples, step)]
    )


def _draw(size: int, resamples: int, rng: np.random.Generator) -> Floats:
    """[B, G] how often each cluster is in each resample."""
    drawn = rng.integers(size, size=(resamples, size)) + size * np.arange(resamples)[:, None]
    return np.bincount(drawn.ravel(), minlength=resamples * size).reshape(resamples, size).astype(np.float64)

"""How sure a comparison is: scores, 95 % intervals over seeds and rows, and paired tests.

Two things vary: the seeds, and the rows of an evaluation set. What the seeds add is the variance of the values that
they give; what the rows add is that over resamples of the rows (of their groups where they have them, such as
MultiRC's questions), seeds being as they are. The draws are the same for all arms, so that a difference is paired, and
for all tasks that have the same rows. Seeds are too few to be resampled: of two to five that differ much, a bootstrap
finds a difference in up to a quarter of the cases where there is none. :func:`reach` makes an interval of both.
"""

import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dhrd_plugin.comparison.results import Results, Rows
from dhrd_plugin.errors import UserError

RESAMPLES = 10_000
SEED = 17
BLOCK = 2**22  # numbers drawn at once
POWER = 0.8  # the chance that a detectable difference is shown
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A value and its 95 % interval; see :func:`reach`."""

    value: float  # on all seeds and rows
    low: float  # of the interval
    high: float  # likewise
    seeds: int  # behind it; with one the interval is over rows alone


@dataclass(frozen=True)
class Difference(Estimate):
    """An arm minus the baseline, on the seeds that both have."""

    by_rows: float = 0.0  # the standard error that rows alone make
    by_seeds: float = 0.0  # that of the mean over seeds
    lone: bool = False  # of one seed where more are planned: no verdict yet

    @property
    def error(self) -> float:
        """The standard error."""
        return (self.by_rows**2 + self.by_seeds**2) ** 0.5

    @property
    def detectable(self) -> float:
        """The smallest true difference that such a comparison, of as many rows and seeds, shows in 80 % of cases.

        Half of the interval, and as much again as 80 % take: 2.8 standard errors where rows alone vary. See Bloom,
        "Minimum Detectable Effects" (Evaluation Review 19(5), 1995), for a two-sided test at 5 %. Rows are paired, so
        the more of them both arms have right or wrong together, the smaller it is. For an accuracy and one seed the
        standard error is McNemar's, ``sqrt((b + c - (b - c)^2 / n)) / n``, with b and c of :class:`McNemar`, n rows.
        """
        return sum(float(reach(share, self.by_rows, self.by_seeds, self.seeds)) for share in (0.975, POWER))

    @property
    def too_small(self) -> bool:
        """Whether rows and seeds are too few to show a difference of the size seen, and none is shown."""
        return self.verdict == 'no difference shown' and 0 < abs(self.value) < self.detectable

    @property
    def verdict(self) -> str:
        """``gain`` or ``loss`` only where the interval excludes zero, else ``no difference shown``.

        ``no verdict`` of one seed where more are planned: its interval says nothing of the others.
        """
        if self.lone:
            return 'no verdict'
        if self.low > 0:
            return 'gain'
        return 'loss' if self.high < 0 else 'no difference shown'


@dataclass(frozen=True)
class McNemar:
    """Exact McNemar test of one seed: of the rows that one of two arms has right, how many either has."""

    baseline_only: int  # rows that the baseline alone has right
    arm_only: int  # rows that the arm alone has right
    p: float  # two-sided


@dataclass(frozen=True)
class Statistics:
    """Everything that the report says of the scores, between 0 and 1. Keys are missing where cells are."""

    # of each evaluation set and arm, the mean of the task's metrics over seeds
    scores: dict[tuple[Rows, str], Estimate]
    metrics: dict[tuple[Rows, str], dict[str, float]]  # the mean over seeds of each of these metrics
    differences: dict[tuple[Rows, str], Difference]  # of each evaluation set and arm, to the baseline
    tests: dict[tuple[Rows, str, int], McNemar]  # of each evaluation set, arm and seed
    common: list[str]  # the tasks that all arms with results have; averages are over these
    averages: dict[str, Estimate]  # of each arm, the mean of the scores of the common tasks; none where unwanted
    average_differences: dict[str, Difference]  # of each arm, to the baseline
    relative: dict[str, Estimate]  # of each arm, average(arm) / average(baseline) - 1, as the paper's "rel."


def chance(labels: Sequence[int], classes: int) -> tuple[float, float]:
    """The accuracy of one answer to all N rows, that of most of them, and of an answer drawn evenly from K classes."""
    return max(np.bincount(labels)) / len(labels), 1 / classes


def is_constant(record: Mapping[str, Any]) -> bool:
    """Whether a cell answered one label to every row of several."""
    return len(set(record['predictions'])) == 1 < len(set(record['labels']))


# ------------------------------------------------------------------------- metrics of resampled rows


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
    size, sums = len(counts), []
    step = max(1, BLOCK // size)
    for block in (min(step, resamples - start) for start in range(0, resamples, step)):
        drawn = rng.integers(size, size=(block, size)) + size * np.arange(block)[:, None]
        times = np.bincount(drawn.ravel(), minlength=block * size).reshape(block, size)  # each cluster is drawn
        sums.append(times.astype(np.float64) @ counts)
    return np.concatenate(sums)


# ------------------------------------------------------------------------------- how sure a mean is


def reach(share: float, by_rows: float, by_seeds: float | Floats, seeds: int) -> float | Floats:
    """How far below a mean over seeds the truth lies in no more than this share of cases, and as far above it.

    ``sqrt((z * by_rows)^2 + (t * by_seeds)^2)``, with the normal quantile and Student's of S - 1 degrees: Banerjee,
    "Approximate confidence interval for linear functions of means of k populations when the population variances
    are not equal" (Sankhya 22, 1960). It holds at least as often as it says. One quantile of Welch's and
    Satterthwaite's degrees would not: where two seeds happen to be alike, it takes them for many. The seeds' own noise
    by rows is in both errors, which errs on the safe side too.

    Args:
        share: 0.975 for a two-sided interval of 95 %.
        by_rows: the standard deviation of the mean over resamples of the rows, seeds being as they are.
        by_seeds: the standard deviation of the S values over the root of S; [...] of them; 0 of one seed.
        seeds: S.
    """
    from scipy.stats import norm, t

    return np.hypot(norm.ppf(share) * by_rows, t.ppf(share, max(1, seeds - 1)) * by_seeds)


@dataclass(frozen=True)
class Sampled:
    """The scores of an evaluation set, on all rows and on each resample of them."""

    full: dict[str, dict[int, float]]  # of each arm, the score on all rows by seed
    drawn: dict[str, dict[int, Floats]]  # of each arm, [B] scores on the resampled rows by seed


def sample(results: Results, rows: Rows, resamples: int = RESAMPLES) -> Sampled:
    """Score every cell of an evaluation set on the same resamples of its rows."""
    cells = {(arm, seed): record for arm in results.arms for seed, record in results.cells(rows, arm).items()}
    example = next(iter(cells.values()))
    same_rows = zlib.crc32(json.dumps(example['ids']).encode())  # tasks of the same rows, which vary together
    rng = np.random.default_rng([SEED, same_rows])
    clusters, classes, names = cluster(example['groups']), len(example['label_names']), example['task_metrics']
    counts = [count(record['labels'], record['predictions'], clusters, classes) for record in cells.values()]
    sums = resample(np.concatenate(counts, axis=1), resamples, rng).reshape(resamples, len(cells), -1)
    full: dict[str, dict[int, float]] = {}
    drawn: dict[str, dict[int, Floats]] = {}
    for index, ((arm, seed), record) in enumerate(cells.items()):
        values = {name: float(measure(name, counts[index].sum(0))) for name in names}
        _check(record, values)
        full.setdefault(arm, {})[seed] = float(np.mean([*values.values()]))
        drawn.setdefault(arm, {})[seed] = np.mean([measure(name, sums[:, index]) for name in names], axis=0)
    return Sampled(full, drawn)


def _check(record: Mapping[str, Any], values: Mapping[str, float]) -> None:
    for name, value in values.items():
        stored = record['metrics'].get(name)
        if not isinstance(stored, int | float) or not abs(stored - value) < 1e-4:
            raise UserError(
                f'results.jsonl: {record["task"]} {record["split"]} {record["arm"]} seed {record["seed"]}: '
                f'metrics.{name}: found {stored!r}; its labels and predictions make it {value:.6g}'
            )


# --------------------------------------------------------------------------------- all of it


def analyse(results: Results, resamples: int = RESAMPLES) -> Statistics:
    """All statistics of a comparison.

    Args:
        results: see :func:`~dhrd_plugin.comparison.results.read_results`.
        resamples: of the rows. The draws are seeded: the same results give the same intervals. Default: 10,000.
    """
    sets = {rows: sample(results, rows, resamples) for rows in results.sets}
    base, mains = results.baseline, results.main_sets
    started = [arm for arm in results.arms if any(arm in sets[rows].full for rows in mains)]
    common = [rows for rows in mains if all(arm in sets[rows].full for arm in started)]
    tasks = [sets[rows] for rows in common] if results.average else []
    scores = {(r, arm): found for r, one in sets.items() for arm in one.full if (found := _score([one], arm))}
    several = len(results.seeds) > 1
    average = {arm: found for arm in started if (found := _compared(tasks, arm, base, several))}
    return Statistics(
        scores=scores,
        metrics={key: _means(results.cells(*key)) for key in scores},
        differences={key: found[0] for key in scores if (found := _compared([sets[key[0]]], key[1], base, several))},
        tests={key: test for rows, arm in scores for key, test in _tests(results, rows, arm).items()},
        common=[task for task, _ in common],
        averages={arm: found for arm in started if (found := _score(tasks, arm))},
        average_differences={arm: difference for arm, (difference, _) in average.items()},
        relative={arm: relative for arm, (_, relative) in average.items() if relative},
    )


def _score(tasks: Sequence[Sampled], arm: str) -> Estimate | None:
    if not (seeds := _shared(tasks, arm)):
        return None
    by_seed, drawn = _over(tasks, arm, seeds)
    value, low, high, *_ = _interval(by_seed.mean(), by_seed, drawn)
    return Estimate(value, max(0.0, low), min(1.0, high), len(seeds))


def _compared(
    tasks: Sequence[Sampled], arm: str, base: str, several: bool
) -> tuple[Difference, Estimate | None] | None:
    """An arm minus the baseline, and relative to it where that is above zero in every resample.

    ``several``: more than one seed is planned.
    """
    if arm == base or not (seeds := _shared(tasks, arm, base)):
        return None
    (ours, drawn), (theirs, drawn_base) = _over(tasks, arm, seeds), _over(tasks, base, seeds)
    mean = theirs.mean()
    value, low, high, count, *errors = _interval((ours - theirs).mean(), ours - theirs, drawn - drawn_base)
    difference = Difference(value, max(-1.0, low), min(1.0, high), count, *errors, lone=several and count == 1)
    if mean <= 0 or (drawn_base <= 0).any():
        return difference, None
    ratio = ours.mean() / mean  # it varies as its linear part does
    found = _interval(ratio - 1, (ours - ratio * theirs) / mean, (drawn - ratio * drawn_base) / mean)
    return difference, Estimate(*found[:4])


def _interval(value: float, by_seed: Floats, drawn: Floats) -> tuple[float, float, float, int, float, float]:
    """The value, the ends of its interval, how many seeds it is of, and what rows and seeds make of its error."""
    seeds = len(by_seed)
    by_rows, by_seeds = float(drawn.std()), float(by_seed.std(ddof=1) / seeds**0.5) if seeds > 1 else 0.0
    half = float(reach(0.975, by_rows, by_seeds, seeds))
    return float(value), float(value) - half, float(value) + half, seeds, by_rows, by_seeds


def _means(cells: Mapping[int, Mapping[str, Any]]) -> dict[str, float]:
    records = [*cells.values()]
    names = records[0]['task_metrics']
    return {name: float(np.mean([record['metrics'][name] for record in records])) for name in names}


def _shared(tasks: Sequence[Sampled], *arms: str) -> list[int]:
    """The seeds that each of these tasks has of each of these arms."""
    found = [task.full.get(arm, {}) for task in tasks for arm in arms]
    return [seed for seed in found[0] if all(seed in seeds for seeds in found)] if found else []


def _over(tasks: Sequence[Sampled], arm: str, seeds: Sequence[int]) -> tuple[Floats, Floats]:
    """[S] the mean of the tasks by seed, and [B] the mean of tasks and seeds by resample of the rows."""
    by_seed = np.mean([[task.full[arm][seed] for seed in seeds] for task in tasks], axis=0)
    return by_seed, np.mean([task.drawn[arm][seed] for task in tasks for seed in seeds], axis=0)


def _tests(results: Results, rows: Rows, arm: str) -> dict[tuple[Rows, str, int], McNemar]:
    base = {} if arm == results.baseline else results.cells(rows, results.baseline)
    return {
        (rows, arm, seed): mcnemar(record['labels'], base[seed]['predictions'], record['predictions'])
        for seed, record in results.cells(rows, arm).items()
        if seed in base
    }


def mcnemar(labels: Sequence[int], baseline: Sequence[int], arm: Sequence[int]) -> McNemar:
    """Exact McNemar test on N shared rows: ``scipy.stats.binomtest`` on those where just one of two is right."""
    from scipy.stats import binomtest

    truth = np.asarray(labels)
    right, right_base = np.asarray(arm) == truth, np.asarray(baseline) == truth
    b, c = int((right_base & ~right).sum()), int((right & ~right_base).sum())
    return McNemar(b, c, float(binomtest(b, b + c).pvalue) if b + c else 1.0)

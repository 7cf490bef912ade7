"""How sure a comparison is: scores, 95 % bootstrap intervals over seeds and rows, and paired tests.

A resample draws the seeds and, crossed with them, the rows of an evaluation set (its groups where it has
them, such as MultiRC's questions). The draws are the same for all arms, so that a difference is paired.

Drawn from S seeds, their mean varies by (S - 1) / S of what it should, which matters with as few as are usual;
so what the draw of seeds adds is scaled by sqrt(S / (S - 1)) (Hesterberg, "What Teachers Should Know About the
Bootstrap", 2015, on narrowness bias). That is no cure where seeds differ by much more than rows would make them.
"""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dhrd_plugin.comparison.resampling import Floats, cluster, count, measure, resample
from dhrd_plugin.comparison.results import Results, Rows
from dhrd_plugin.errors import UserError

__all__ = ['Difference', 'Estimate', 'McNemar', 'Statistics', 'analyse', 'mcnemar', 'verdict']

RESAMPLES = 10_000
SEED = 17


@dataclass(frozen=True)
class Estimate:
    """A value and its 95 % percentile interval.

    Attributes:
        value: on all seeds and rows.
        low: the 2.5th percentile of the resamples.
        high: the 97.5th.
        seeds: the fewest seeds behind it; with one the interval is over rows alone.
    """

    value: float
    low: float
    high: float
    seeds: int


@dataclass(frozen=True)
class Difference(Estimate):
    """An arm minus the baseline, on the seeds that both have."""

    @property
    def verdict(self) -> str:
        """``gain`` or ``loss`` only where the interval excludes zero, else ``no difference shown``."""
        return verdict(self.low, self.high)


@dataclass(frozen=True)
class McNemar:
    """Exact McNemar test of one seed: of the rows that one of two arms has right, how many either has.

    Attributes:
        baseline_only: rows that the baseline alone has right.
        arm_only: rows that the arm alone has right.
        p: two-sided.
    """

    baseline_only: int
    arm_only: int
    p: float


@dataclass(frozen=True)
class Statistics:
    """Everything that the report says of the scores, between 0 and 1. Keys are missing where cells are.

    Attributes:
        scores: of each evaluation set and arm, the mean of the task's metrics over seeds.
        metrics: the mean over seeds of each of these metrics.
        differences: of each evaluation set and arm, to the baseline.
        tests: of each evaluation set, arm and seed.
        common: the tasks that all arms with results have; averages are over these.
        averages: of each arm, the mean of the scores of the common tasks.
        average_differences: of each arm, to the baseline.
        relative: of each arm, average(arm) / average(baseline) - 1, as the paper's "rel.".
    """

    scores: dict[tuple[Rows, str], Estimate]
    metrics: dict[tuple[Rows, str], dict[str, float]]
    differences: dict[tuple[Rows, str], Difference]
    tests: dict[tuple[Rows, str, int], McNemar]
    common: list[str]
    averages: dict[str, Estimate]
    average_differences: dict[str, Difference]
    relative: dict[str, Estimate]


def verdict(low: float, high: float) -> str:
    """What an interval of a difference says."""
    if low > 0:
        return 'gain'
    return 'loss' if high < 0 else 'no difference shown'


# ------------------------------------------------------------------------------- scores of resamples


@dataclass(frozen=True)
class Sampled:
    """The scores of an evaluation set, on all rows and on each resample of them.

    Attributes:
        full: of each arm, the score on all rows by seed.
        drawn: of each arm, [B] scores on the resampled rows by seed.
        picks: [B, S] numbers in [0, 1) that choose the seeds of a resample, for all arms alike.
    """

    full: dict[str, dict[int, float]]
    drawn: dict[str, dict[int, Floats]]
    picks: Floats

    def mean(self, arm: str, seeds: Sequence[int]) -> tuple[float, Floats]:
        """An arm's mean over S seeds, and [B] means over S seeds drawn from them."""
        count = len(seeds)
        chosen = (self.picks[:, :count] * count).astype(int)
        scores = np.stack([self.drawn[arm][seed] for seed in seeds], axis=1)
        centre, drawn = scores.mean(1), np.take_along_axis(scores, chosen, 1).mean(1)
        widened = centre + (count / max(1, count - 1)) ** 0.5 * (drawn - centre)
        return float(np.mean([self.full[arm][seed] for seed in seeds])), widened

    def shared(self, arm: str, other: str) -> list[int]:
        """The seeds that both arms have."""
        return [seed for seed in self.full.get(arm, {}) if seed in self.full.get(other, {})]


def sample(results: Results, rows: Rows, resamples: int = RESAMPLES) -> Sampled:
    """Score every cell of an evaluation set on the same resamples of its rows."""
    rng = np.random.default_rng([SEED, zlib.crc32('/'.join(rows).encode())])
    cells = {(arm, seed): record for arm in results.arms for seed, record in results.cells(rows, arm).items()}
    example = next(iter(cells.values()))
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
    return Sampled(full, drawn, rng.random((resamples, len(results.seeds))))


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
        results: see :func:`dhrd_plugin.comparison.results.read_results`.
        resamples: of the bootstrap. The draws are seeded: the same results give the same intervals.

    Raises:
        UserError: a recorded metric is not that of the recorded predictions.
    """
    sets = {rows: sample(results, rows, resamples) for rows in results.sets}
    base = results.baseline
    scores: dict[tuple[Rows, str], Estimate] = {}
    differences: dict[tuple[Rows, str], Difference] = {}
    for rows, sampled in sets.items():
        for arm, full in sampled.full.items():
            scores[rows, arm] = Estimate(*_interval(*sampled.mean(arm, [*full])), len(full))
            if arm != base and (seeds := sampled.shared(arm, base)):
                (value, drawn), (other, drawn_base) = sampled.mean(arm, seeds), sampled.mean(base, seeds)
                differences[rows, arm] = Difference(*_interval(value - other, drawn - drawn_base), len(seeds))
    mains = [sets[rows] for rows in results.main_sets]
    started = [arm for arm in results.arms if any(arm in sampled.full for sampled in mains)]
    common = {rows: sets[rows] for rows in results.main_sets if all(sets[rows].full.get(arm) for arm in started)}
    averages, average_differences, relative = _average([*common.values()], started, base)
    return Statistics(
        scores=scores,
        metrics={key: _means(results.cells(*key)) for key in scores},
        differences=differences,
        tests=_tests(results, [*scores]),
        common=[task for task, _ in common],
        averages=averages,
        average_differences=average_differences,
        relative=relative,
    )


def _interval(value: float, drawn: Floats) -> tuple[float, float, float]:
    low, high = np.percentile(drawn, [2.5, 97.5])
    return value, float(low), float(high)


def _means(cells: Mapping[int, Mapping[str, Any]]) -> dict[str, float]:
    records = [*cells.values()]
    names = records[0]['task_metrics']
    return {name: float(np.mean([record['metrics'][name] for record in records])) for name in names}


def _average(
    tasks: Sequence[Sampled], arms: Sequence[str], base: str
) -> tuple[dict[str, Estimate], dict[str, Difference], dict[str, Estimate]]:
    averages: dict[str, Estimate] = {}
    differences: dict[str, Difference] = {}
    relative: dict[str, Estimate] = {}
    for arm in arms if tasks else ():
        own = [[*task.full[arm]] for task in tasks]
        averages[arm] = Estimate(*_interval(*_over(tasks, arm, own)), min(map(len, own)))
        seeds = [task.shared(arm, base) for task in tasks]
        if arm != base and all(seeds):
            (value, drawn), (other, drawn_base) = _over(tasks, arm, seeds), _over(tasks, base, seeds)
            fewest = min(map(len, seeds))
            differences[arm] = Difference(*_interval(value - other, drawn - drawn_base), fewest)
            if other > 0 and (drawn_base > 0).all():
                relative[arm] = Estimate(*_interval(value / other - 1, drawn / drawn_base - 1), fewest)
    return averages, differences, relative


def _over(tasks: Sequence[Sampled], arm: str, seeds: Sequence[Sequence[int]]) -> tuple[float, Floats]:
    means = [task.mean(arm, found) for task, found in zip(tasks, seeds)]
    return float(np.mean([value for value, _ in means])), np.mean([drawn for _, drawn in means], axis=0)


def _tests(results: Results, keys: Sequence[tuple[Rows, str]]) -> dict[tuple[Rows, str, int], McNemar]:
    found: dict[tuple[Rows, str, int], McNemar] = {}
    for rows, arm in keys:
        base = results.cells(rows, results.baseline)
        for seed, record in results.cells(rows, arm).items():
            if arm != results.baseline and seed in base:
                other = base[seed]['predictions']
                found[rows, arm, seed] = mcnemar(record['labels'], other, record['predictions'])
    return found


def mcnemar(labels: Sequence[int], baseline: Sequence[int], arm: Sequence[int]) -> McNemar:
    """Exact McNemar test on N shared rows: ``scipy.stats.binomtest`` on those where just one of two is right."""
    from scipy.stats import binomtest

    truth = np.asarray(labels)
    right, right_base = np.asarray(arm) == truth, np.asarray(baseline) == truth
    b, c = int((right_base & ~right).sum()), int((right & ~right_base).sum())
    return McNemar(b, c, float(binomtest(b, b + c).pvalue) if b + c else 1.0)

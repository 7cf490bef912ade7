"""The statistics of a comparison against scikit-learn, scipy, the package's own metrics and cases made by hand."""

import time

import numpy as np
import pytest
import torch
from made import SKILL, TASKS, line, make, scores, write
from scipy.stats import bootstrap, power, ttest_1samp
from sklearn.metrics import accuracy_score, f1_score

from dhrd_plugin.comparison.results import read_results
from dhrd_plugin.comparison.statistics import (
    Difference,
    Sampled,
    _compared,
    analyse,
    chance,
    cluster,
    count,
    is_constant,
    mcnemar,
    measure,
    reach,
    resample,
)
from dhrd_plugin.errors import UserError
from dhrd_plugin.metrics import build_metrics

SAME = dict.fromkeys(SKILL, 0.8)


def rows_of(seed, rows=60, classes=3, groups=None, never=None):
    """Labels, predictions and groups; a class that is never predicted, if one is asked for."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(classes, size=rows)
    predictions = np.where(rng.random(rows) < 0.6, labels, rng.integers(classes, size=rows))
    predictions = np.where(predictions == never, (predictions + 1) % classes, predictions)
    return labels, predictions, [f'q{i // groups}' for i in range(rows)] if groups else [None] * rows


def measured(names, labels, predictions, groups, classes):
    counts = count(labels, predictions, cluster(groups), classes).sum(0)
    return {name: float(measure(name, counts)) for name in names}


@pytest.mark.parametrize(
    ('names', 'case'),
    [
        (['accuracy', 'macro_f1'], {'seed': 0}),
        (['accuracy', 'macro_f1'], {'seed': 1, 'never': 2}),
        (['accuracy', 'macro_f1', 'f1a', 'em'], {'seed': 2, 'classes': 2, 'groups': 4}),
        (['f1a'], {'seed': 3, 'classes': 2, 'never': 1}),
        (['macro_f1'], {'seed': 4, 'rows': 3, 'classes': 5}),
    ],
)
def test_a_metric_of_all_rows_is_the_packages_own_and_scikit_learns(names, case):
    labels, predictions, groups = rows_of(**case)
    classes = case.get('classes', 3)
    found = measured(names, labels, predictions, groups, classes)
    expected = scores(names, labels, predictions, groups)
    assert found == pytest.approx({name: expected[name] for name in names})
    for name, metric in zip(names, build_metrics(names, classes)):
        logits = torch.nn.functional.one_hot(torch.tensor(predictions), classes).float()
        more = (torch.tensor(cluster(groups)),) if name == 'em' else ()
        metric.update(logits, torch.tensor(labels), *more)
        assert found[name] == pytest.approx(float(metric.compute()), abs=1e-6)


@pytest.mark.parametrize('groups', [None, 4])
def test_a_resample_scores_as_the_rows_that_it_drew(groups):
    labels, predictions, names = rows_of(5, classes=2, groups=groups)
    clusters = cluster(names)
    counts = count(labels, predictions, clusters, 2)
    sums = resample(counts, 50, np.random.default_rng(3))
    size = len(counts)
    drawn = np.random.default_rng(3).integers(size, size=(50, size))
    for row, picks in zip(sums, drawn):
        rows = np.concatenate([np.flatnonzero(clusters == pick) for pick in picks])
        assert measure('accuracy', row) == pytest.approx(accuracy_score(labels[rows], predictions[rows]))
        assert measure('f1a', row) == pytest.approx(f1_score(labels[rows], predictions[rows], zero_division=0))
        expected = f1_score(labels[rows], predictions[rows], average='macro', zero_division=0)
        assert measure('macro_f1', row) == pytest.approx(expected)
        whole = [(labels == predictions)[clusters == pick].all() for pick in picks]
        assert measure('em', row) == pytest.approx(np.mean(whole))


def test_resamples_come_in_blocks_without_a_seam(monkeypatch):
    counts = np.random.default_rng(0).integers(9, size=(40, 3)).astype(float)
    whole = resample(counts, 100, np.random.default_rng(1))
    monkeypatch.setattr('dhrd_plugin.comparison.statistics.BLOCK', 7 * 40)
    assert np.array_equal(resample(counts, 100, np.random.default_rng(1)), whole)


def test_intervals_over_rows_are_those_of_scipy(tmp_path):
    labels, base, _ = rows_of(6, rows=200, classes=2)
    _, other, _ = rows_of(7, rows=200, classes=2)
    arm = np.where(np.arange(200) < 120, base, other)
    lines = [line('a', name, 1, labels.tolist(), p.tolist()) for name, p in (('pooled', base), ('arm', arm))]
    found = analyse(read_results(write(tmp_path, lines)))
    difference = found.average_differences['arm']
    right, right_base = labels == arm, labels == base
    assert difference.value == pytest.approx(right.mean() - right_base.mean())
    data = ((right * 1.0 - right_base,), {'n_resamples': 20000, 'method': 'percentile', 'rng': 0})
    expected = bootstrap(data[0], np.mean, **data[1]).confidence_interval
    assert (difference.low, difference.high) == pytest.approx(expected, abs=0.008)  # one or two rows in 200
    assert difference.seeds == 1


def test_an_interval_over_seeds_alone_is_students(tmp_path):
    """Every row alike within a run: nothing varies but the seeds."""
    values = {1: 1, 2: 0, 3: 1, 4: 1, 5: 0, 6: 1}
    lines = [line('a', 'pooled', seed, [0] * 5, [1 - value] * 5) for seed, value in values.items()]
    lines += [line('a', 'arm', seed, [0] * 5, [0] * 5) for seed in values]
    found = analyse(read_results(write(tmp_path, lines)))
    expected = ttest_1samp([1 - value for value in values.values()], 0).confidence_interval()
    difference = found.average_differences['arm']
    assert (difference.low, difference.high) == pytest.approx((expected.low, expected.high))
    assert difference.detectable == pytest.approx((2.5706 + 0.9195) * difference.error, rel=1e-4)
    score = found.averages['pooled']
    assert (score.low, score.high) == pytest.approx((1 - expected.high, 1.0)) and expected.low < 0  # no score is more


def test_the_interval_of_one_seed_is_that_of_rows_alone():
    rows = np.random.default_rng(0).normal(0.7, 0.01, 5000)
    difference, _ = _compared(
        [Sampled({'a': {1: 0.7}, 'b': {1: 0.6}}, {'a': {1: rows}, 'b': {1: rows * 0 + 0.6}})], 'a', 'b', False
    )
    assert (difference.low, difference.high) == pytest.approx((0.1 - 0.0196, 0.1 + 0.0196), abs=5e-4)
    assert difference.by_seeds == 0 and difference.detectable == pytest.approx(0.0280, abs=5e-4)


@pytest.mark.parametrize('sd', [0.02, 0.05])
@pytest.mark.parametrize('count', [2, 3, 5])
def test_a_false_gain_or_loss_is_as_rare_as_it_says(count, sd):
    """Two arms alike, whose seeds differ by ``sd``, on 2,000 rows; the bootstrap gave up to 25 % of them a verdict."""
    rng, noise = np.random.default_rng(count), 0.2 / 2000  # by rows: of 20 % of them one arm alone is right
    by_seed = rng.normal(0, (2 * sd**2 + noise) ** 0.5, (20_000, count))
    half = reach(0.975, (noise / count) ** 0.5, by_seed.std(1, ddof=1) / count**0.5, count)
    assert 0.03 <= np.mean(abs(by_seed.mean(1)) > half) <= 0.07


@pytest.mark.parametrize('count', [2, 3])
def test_so_it_is_of_resamples(count):
    """The same through all of it: seeds that differ by five points, of which the bootstrap took up to 25 % for more."""
    rng, wrong = np.random.default_rng(0), 0
    for _ in range(400):
        full = {arm: dict(enumerate(0.7 + rng.normal(0, 0.05, count))) for arm in ('pooled', 'arm')}
        drawn = {arm: {s: v + rng.normal(0, 0.007, 100) for s, v in seeds.items()} for arm, seeds in full.items()}
        difference, relative = _compared([Sampled(full, drawn)], 'arm', 'pooled', True)
        wrong += difference.verdict != 'no difference shown'
        assert relative.value == pytest.approx(difference.value / np.mean([*full['pooled'].values()]))
    assert wrong <= 0.07 * 400


def test_tasks_of_the_same_rows_vary_together(tmp_path):
    """Settings as tasks: their average is as unsure as each, not surer by the root of their number."""
    labels, guesses, _ = rows_of(8, rows=200, classes=2)
    tasks = [line(task, 'pooled', 1, labels.tolist(), guesses.tolist()) for task in ('lr_1', 'lr_2')]
    found = analyse(read_results(write(tmp_path, tasks)))
    one, two = found.scores.values()
    assert (one.low, one.high) == (two.low, two.high) == (found.averages['pooled'].low, found.averages['pooled'].high)


def test_one_seed_of_several_is_no_verdict(tmp_path):
    lines = [line('a', 'pooled', seed, [0, 1] * 50, [0, 0] * 50) for seed in (1, 2)]
    lines += [line('a', 'arm', 1, [0, 1] * 50, [0, 1] * 50), line('a', 'other', 3, [0, 1] * 50, [0, 1] * 50)]
    found = analyse(read_results(write(tmp_path, lines))).average_differences
    assert {arm: (value.verdict, value.seeds) for arm, value in found.items()} == {'arm': ('no verdict', 1)}
    assert found['arm'].low > 0 and not found['arm'].too_small


def test_a_real_gain_and_a_loss_are_found_and_no_more(tmp_path):
    found = analyse(read_results(make(tmp_path)))
    verdicts = {arm: value.verdict for arm, value in found.average_differences.items()}
    assert verdicts == {
        'dhrd_0.3': 'gain',
        'dhrd_1': 'no difference shown',
        'dhrd_1_to_0': 'no difference shown',
        'shuffled_0.3': 'loss',
    }
    for arm, value in found.average_differences.items():
        assert value.value == pytest.approx(found.averages[arm].value - found.averages['pooled'].value)
        expected = found.averages[arm].value / found.averages['pooled'].value - 1
        assert found.relative[arm].value == pytest.approx(expected)
        assert found.relative[arm].low < expected < found.relative[arm].high
        assert (found.relative[arm].low > 0) == (value.verdict == 'gain')
    assert analyse(read_results(tmp_path)) == found  # seeded


def test_an_arm_that_predicts_alike_differs_by_nothing(tmp_path):
    """Both arms see the same draws of rows and seeds, so not one resample differs."""
    lines = []
    for task, groups in (('a', 4), ('b', None)):
        for seed in (1, 2, 3):
            labels, _, names = rows_of(0, classes=2, groups=groups)
            _, found, _ = rows_of(seed, classes=2)
            more = {'groups': names, 'metrics': ['f1a', 'em'] if groups else ['accuracy']}
            lines += [line(task, arm, seed, labels.tolist(), found.tolist(), **more) for arm in ('pooled', 'arm')]
    found = analyse(read_results(write(tmp_path, lines)))
    assert len(found.differences) == 2
    for value in (*found.differences.values(), found.average_differences['arm'], found.relative['arm']):
        assert (value.value, value.low, value.high, value.seeds) == (0, 0, 0, 3)
    assert found.averages['arm'].high - found.averages['arm'].low > 0.1
    assert all((test.baseline_only, test.arm_only, test.p) == (0, 0, 1) for test in found.tests.values())


def test_no_effect_is_seldom_taken_for_one(tmp_path):
    """40 comparisons of five equal arms, whose seeds differ as little as the rows make them: few of 160 may err."""
    task = {'rte': TASKS['rte']}
    found = []
    for number in range(40):
        seeds = (3 * number, 3 * number + 1, 3 * number + 2)
        results = read_results(make(tmp_path, skill=SAME, tasks=task, seeds=seeds, curves=False))
        found += [value.verdict for value in analyse(results, 500).average_differences.values()]
    assert len(found) == 160
    wrong = sum(verdict != 'no difference shown' for verdict in found)
    assert wrong <= 0.1 * len(found)


LOSS, ROWS = 0.1, 300  # the share of rows that the baseline alone has right, and how many rows there are


def detectable(rows=ROWS, loss=LOSS):
    """The difference that is 2.80 of its own standard errors, by steps."""
    difference = 0.0
    for _ in range(100):
        difference = 2.8016 * ((2 * loss + difference - difference**2) / rows) ** 0.5
    return difference


def differing(rng, rows=ROWS, loss=LOSS):
    """[N] 1 where the arm alone is right, -1 where the baseline alone is; the mean is the detectable difference."""
    gain = loss + detectable(rows, loss)
    return rng.choice([1, -1, 0], size=rows, p=[gain, loss, 1 - gain - loss])


def compared(folder, seeds):
    """The difference of an arm that has so many of the rows right; a row that differs is wrong for the other."""
    lines = []
    for seed, signs in enumerate(seeds):
        for arm, wrong in (('pooled', signs > 0), ('arm', signs < 0)):
            lines.append(line('a', arm, seed, [0, 1] * (len(signs) // 2), (np.arange(len(signs)) % 2 ^ wrong).tolist()))
    return analyse(read_results(write(folder, lines)), 400).average_differences['arm']


def test_the_detectable_difference_is_shown_as_often_as_it_says(tmp_path):
    """By simulation, with one seed; and by scipy's own power of a paired test."""
    rng = np.random.default_rng(0)
    found = [compared(tmp_path, [differing(rng)]) for _ in range(150)]
    assert np.mean([value.verdict == 'gain' for value in found]) == pytest.approx(0.8, abs=0.08)
    assert np.mean([value.detectable for value in found]) == pytest.approx(detectable(), rel=0.03)
    assert np.mean([value.value for value in found]) == pytest.approx(detectable(), rel=0.05)

    def rvs(size):
        return np.stack([differing(rng) for _ in range(size[0])])

    test = lambda x, axis: ttest_1samp(x, 0, axis=axis).pvalue  # noqa: E731
    assert power(test, rvs, ROWS, significance=0.05, n_resamples=2000).power == pytest.approx(0.8, abs=0.04)


def test_with_several_seeds_it_is_shown_at_least_as_often(tmp_path):
    """Seeds and rows that vary: the crossed resamples make the standard error no smaller than it is."""
    rng, found = np.random.default_rng(1), []
    for _ in range(60):
        found.append(compared(tmp_path, [differing(rng) for _ in range(4)]))
    largest = np.mean([value.detectable for value in found])
    assert np.std([value.value for value in found]) * 2.8016 < largest < detectable()


def test_the_detectable_difference_of_one_seed_is_mcnemars(tmp_path):
    signs = differing(np.random.default_rng(2), 1000)
    b, c, n = (signs < 0).sum(), (signs > 0).sum(), len(signs)
    value = compared(tmp_path, [signs])
    assert value.error == pytest.approx((b + c - (b - c) ** 2 / n) ** 0.5 / n, rel=0.1)
    assert value.detectable == pytest.approx(2.8016 * value.error, rel=1e-4)


@pytest.mark.parametrize(
    ('value', 'low', 'error', 'expected'),
    [(0.05, -0.02, 0.03, True), (0.08, 0.01, 0.03, False), (0.0, -0.1, 0.03, False), (0.0, 0.0, 0.0, False)],
)
def test_only_a_difference_that_is_seen_and_not_shown_wants_more_rows(value, low, error, expected):
    assert Difference(value, low, 0.2, 1, error).too_small == expected


def test_what_takes_no_classifier():
    assert chance([0, 2, 2, 1, 2], 4) == (0.6, 0.25)
    cells = [([1, 1, 1], [0, 1, 1]), ([1, 1, 1], [1, 1, 1]), ([0, 1, 1], [0, 1, 1])]
    assert [is_constant({'predictions': p, 'labels': truth}) for p, truth in cells] == [True, False, False]


@pytest.mark.parametrize(
    ('low', 'high', 'expected'),
    [
        (0.001, 0.2, 'gain'),
        (-0.2, -0.001, 'loss'),
        (-0.1, 0.3, 'no difference shown'),
        (0.0, 0.3, 'no difference shown'),
        (-0.3, 0.0, 'no difference shown'),
        (0.0, 0.0, 'no difference shown'),
        (float('nan'), float('nan'), 'no difference shown'),
    ],
)
def test_a_verdict_wants_an_interval_without_zero(low, high, expected):
    assert Difference(0.0, low, high, 1).verdict == expected


def test_questions_are_drawn_whole(tmp_path):
    """Eight answers to a question stand or fall together: the interval is as wide as that of so many questions."""
    rng = np.random.default_rng(0)
    right, widths = np.repeat(rng.random(40) < 0.6, 8), []
    labels = [i % 2 for i in range(320)]
    predictions = [label if ok else 1 - label for label, ok in zip(labels, right)]
    for groups in ([f'q{i // 8}' for i in range(320)], None):
        lines = [line('a', 'pooled', 1, labels, predictions, groups=groups)]
        (score,) = analyse(read_results(write(tmp_path, lines))).scores.values()
        widths.append(score.high - score.low)
    assert widths[0] / widths[1] == pytest.approx(8**0.5, rel=0.1)


@pytest.mark.parametrize(
    ('baseline', 'arm', 'expected'),
    [
        ([1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1], (0, 0, 1.0)),
        ([0, 0, 0, 0, 0, 1], [1, 1, 1, 1, 1, 0], (1, 5, 2 * 7 / 64)),  # 2 (C(6, 0) + C(6, 1)) / 2^6
        ([1, 1, 1, 1, 1, 0], [0, 0, 0, 0, 0, 0], (5, 0, 2 / 32)),
    ],
)
def test_mcnemar_by_hand(baseline, arm, expected):
    found = mcnemar([1] * 6, baseline, arm)
    assert (found.baseline_only, found.arm_only, found.p) == pytest.approx(expected)


def test_a_partial_comparison_averages_what_all_arms_have(tmp_path):
    gone = [('rte', 'dhrd_1', seed) for seed in (17, 18, 19)] + [('cb', 'pooled', 17)]
    results = read_results(make(tmp_path, leave_out=gone))
    found = analyse(results)
    assert sorted(results.missing) == sorted(gone) and not results.extra
    assert found.common == ['cb', 'multirc']
    cb = ('cb', 'validation')
    assert found.scores[cb, 'pooled'].seeds == found.differences[cb, 'dhrd_1'].seeds == 2
    assert found.scores[cb, 'dhrd_1'].seeds == 3
    assert found.average_differences['dhrd_0.3'].seeds == 2
    assert (cb, 'dhrd_1', 17) not in found.tests and (cb, 'dhrd_1', 18) in found.tests
    assert (('rte', 'validation'), 'dhrd_1') not in found.scores
    # the difference is of the seeds that both have
    cells = {arm: results.cells(cb, arm) for arm in ('pooled', 'dhrd_1')}
    means = [
        np.mean([np.mean([cells[arm][seed]['metrics'][m] for m in ('macro_f1', 'accuracy')]) for seed in (18, 19)])
        for arm in ('dhrd_1', 'pooled')
    ]
    assert found.differences[cb, 'dhrd_1'].value == pytest.approx(means[0] - means[1])


def test_a_metric_that_its_predictions_do_not_have_is_refused(tmp_path):
    lines = [line('a', 'pooled', 1, [0, 1, 1, 0], [0, 1, 0, 0])]
    lines[0]['metrics']['accuracy'] = 0.8
    with pytest.raises(UserError, match=r'a validation pooled seed 1: metrics.accuracy: found 0.8; .* make it 0.75'):
        analyse(read_results(write(tmp_path, lines)))


def test_ten_thousand_resamples_take_seconds(tmp_path):
    results = read_results(make(tmp_path))
    start = time.process_time()
    analyse(results, 10_000)
    assert time.process_time() - start < 10

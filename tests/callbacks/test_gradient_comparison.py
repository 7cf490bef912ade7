"""The gradients of both losses, compared: against the reference, on any cut of the batch, and nothing else changes."""

import math

import pytest
import reference
import torch
from composer.algorithms import GradientClipping
from composer.optim import LinearScheduler
from composer.utils.parallelism import FSDP2Config
from forks import run_ranks
from gradient_runs import CASES, compared, lopsided, run_case
from gradients import fit, weighted_triplets
from stock import collator, stock_classifier, tokenised
from stock import fit as fit_stock
from tiny import LABELS, VOCAB, exact, tiny_classifier, triplet

from dhrd_plugin import AuxiliaryReasoningLoss, GradientComparison
from dhrd_plugin.callbacks.gradient_comparison import compare_gradients
from dhrd_plugin.errors import UserError

pytestmark = pytest.mark.usefixtures('one_thread')


def expected_of(case, rows=None):
    """Norms and cosine of the reference's gradients, all in one flat vector of the backbone's parameters."""
    options, weights = CASES[case]
    network = exact(tiny_classifier(**options)).network
    rows = rows or weighted_triplets()
    pooling = options.get('pooling', 'last')
    vectors = []
    for index in (0, 1):
        losses = [reference.row_losses(network, row, VOCAB, LABELS, pooling=pooling) for row in rows]
        gradients = reference.gradients(sum(loss[index] for loss in losses) / len(rows), network)
        shared = [name for name in gradients if 'lm_head' not in name and 'classifier' not in name]
        vectors.append(torch.cat([gradients[name].flatten() for name in shared]))
    c, r = vectors
    alpha, beta = weights.get('alpha', 1.0), weights.get('beta', 1.0)
    return {
        'classification_norm': float((beta * c).norm()),
        'reasoning_norm': float((alpha * r).norm()),
        'classification_norm_unweighted': float(c.norm()),
        'reasoning_norm_unweighted': float(r.norm()),
        'cosine': float(c @ r / (c.norm() * r.norm())),
    }


def only_step(found):
    return {name: steps[0] for name, steps in found.items() if set(steps) == {0}}


@pytest.fixture(scope='module')
def two_ranks(root, tmp_path_factory):
    out = tmp_path_factory.mktemp('ranks')
    run_ranks(2, 'tests/gradient_runs.py', out, cwd=root)
    return torch.load(out / 'rank0.pt', weights_only=True)


@pytest.mark.parametrize('case', CASES)
@pytest.mark.parametrize('microbatch', [8, 4, 3])
def test_norms_and_cosine_are_the_references_on_any_microbatch(case, microbatch):
    found = only_step(run_case(case, microbatch)[0])
    assert found == pytest.approx(expected_of(case), rel=1e-9)
    assert -1 < found['cosine'] < 1


@pytest.mark.parametrize('case', CASES)
def test_two_ranks_see_the_same(case, two_ranks):
    assert only_step(two_ranks[case]) == pytest.approx(expected_of(case), rel=1e-9)


def test_one_rank_without_a_rationale_is_averaged_in(two_ranks):
    assert only_step(two_ranks['lopsided']) == pytest.approx(expected_of('untied', lopsided()), rel=1e-9)


@pytest.mark.parametrize('case', CASES)
def test_it_changes_no_weight(case):
    runs = [run_case(case, 4, interval, double=False, batches=5, dropout=0.2, seed=7) for interval in ('2ba', None)]
    (found, watched, _), (nothing, alone, _) = runs
    assert sorted(found['cosine']) == [0, 2, 4] and not nothing
    assert watched.keys() == alone.keys()
    assert all(torch.equal(watched[name], value) for name, value in alone.items())


def test_it_changes_no_weight_on_two_ranks(two_ranks):
    watched, alone = two_ranks['weights']
    assert all(torch.equal(watched[name], value) for name, value in alone.items())


def test_without_alpha_there_is_no_cosine():
    schedule = LinearScheduler(1.0, 0.0, t_max='2ba')
    found = run_case('tied', batches=4, weights={'schedule': schedule})[0]
    assert sorted(found['cosine']) == [0, 1]
    assert found['reasoning_norm'][1] == pytest.approx(0.25 * found['reasoning_norm_unweighted'][1])
    assert [found['reasoning_norm'][step] for step in (2, 3)] == [0, 0]
    assert all(found['classification_norm'][step] > 0 for step in range(4))


@pytest.mark.parametrize('case', ['tied', 'untied'])
def test_without_a_rationale_there_is_no_cosine(case):
    found = run_case(case, rows=[triplet(i, 2 + i % 3, None) for i in range(8)])[0]
    assert 'cosine' not in found and found['reasoning_norm'] == {0: 0}
    assert found['classification_norm'][0] > 0


def test_the_pooled_baseline_has_one_norm():
    _, log, _ = fit(tiny_classifier(), [], callbacks=[GradientComparison('1ba')], batches=1)
    found = compared(log)
    assert 'cosine' not in found and found['reasoning_norm'] == {0: 0} and found['classification_norm'][0] > 0


@pytest.mark.parametrize('threshold', [0.5, 100.0])
def test_clipping_leaves_the_share_that_is_logged(threshold):
    clipping = GradientClipping('norm', threshold)
    (found, _, clipped), (_, _, whole) = (
        run_case('untied', 4, algorithms=algorithms) for algorithms in ([clipping], [])
    )
    ratios = [float(clipped[0][name].norm() / value.norm()) for name, value in whole[0].items()]
    assert max(ratios) == pytest.approx(min(ratios), rel=1e-6)
    assert found['clipped_share'][0] == pytest.approx(ratios[0], rel=1e-6)
    assert (found['clipped_share'][0] < 1) == (threshold < 1)
    alone = run_case('untied', 4, weights={'alpha': 0.0}, algorithms=[clipping])[0]
    assert found['clipped_share_alone'][0] == pytest.approx(alone['clipped_share'][0], rel=1e-9)


def test_two_vectors_by_hand():
    c, r = [torch.tensor([3.0, 4.0]), torch.tensor([1.0])], [torch.tensor([0.0, 2.0]), torch.tensor([9.0])]
    found = compare_gradients(c, r, [True, False], alpha=0.5, beta=2.0, clipping_threshold=1.0)
    assert found['classification_norm'] == 10 and found['reasoning_norm'] == 1
    assert found['cosine'] == pytest.approx(0.8)
    assert found['clipped_share'] == pytest.approx(1 / math.hypot(6, 9, 6.5), rel=1e-5)
    assert found['clipped_share_alone'] == pytest.approx(1 / math.hypot(6, 8, 2), rel=1e-5)


def test_a_stock_classifier_with_the_reasoning_head_added():
    model = stock_classifier()
    callbacks = [GradientComparison('1ba')]
    _, log, _ = fit_stock(model, [AuxiliaryReasoningLoss()], tokenised(), collator(), 1, callbacks=callbacks)
    found = only_step(compared(log))
    assert -1 < found['cosine'] < 1 and found['classification_norm'] > 0 and found['reasoning_norm'] > 0


def test_an_interval_of_epochs_means_their_first_batch():
    found = run_case('tied', interval='2ep', batches=5, double=False)[0]  # an epoch is one batch
    assert sorted(found['cosine']) == [0, 2, 4]


@pytest.mark.parametrize('interval', ['10', '0ba', '1dur', '5tok'])
def test_other_intervals_are_refused(interval):
    with pytest.raises(UserError) as error:
        GradientComparison(interval)
    assert f"gradient_comparison.interval: found '{interval}'" in str(error.value) and '\n' not in str(error.value)


@pytest.mark.parametrize(
    ('options', 'expected'),
    [
        ({'compile_config': {'backend': 'eager'}}, 'gradient_comparison: found with torch.compile: a compiled model'),
        ({'parallelism_config': {'fsdp': FSDP2Config()}}, 'gradient_comparison: found with FSDP: FSDP shards'),
    ],
)
def test_what_cannot_work_is_refused(options, expected, monkeypatch):
    with pytest.raises(UserError) as error:
        run_case('tied', double=False, **options)
    assert expected in str(error.value)


@pytest.mark.parametrize('key', ['fsdp_config={version: 2}', 'compile_config={}'])
def test_the_yaml_is_refused_before_the_data(root, tmp_path, monkeypatch, key):
    from dhrd_plugin import load_config, train

    monkeypatch.setattr('dhrd_plugin.training.checks.check_fsdp', lambda config, on_gpu: None)
    monkeypatch.setattr('dhrd_plugin.training.run.find_streams', None)  # not called
    overrides = ['callbacks.gradient_comparison={interval: 1ba}', key, f'output_dir={tmp_path}']
    with pytest.raises(UserError) as error:
        train(load_config(root / 'yamls' / 'rte.yaml', overrides))
    name = key.split('=')[0]
    assert str(error.value).startswith(f'callbacks.gradient_comparison: found with {name}: ')

"""The algorithm in Composer: its events, its log, and gradients that no cut of the batch changes."""

import re
from types import SimpleNamespace

import pytest
import reference
import torch
from composer.core import Callback, Event
from composer.loggers import Logger
from composer.models import HuggingFaceModel
from composer.optim import (
    ConstantWithWarmupScheduler,
    CosineAnnealingScheduler,
    LinearScheduler,
    MultiStepScheduler,
    StepScheduler,
)
from forks import run_ranks
from gradients import CASES, WEIGHTED, case_gradients, fit, rows_of
from stock import fit as fit_stock
from stock import stock_classifier, tokenised
from tiny import LABELS, VOCAB, exact, relative_error, tiny_classifier, tiny_tokenizer, triplet, triplets

from dhrd_plugin import AuxiliaryReasoningLoss, RationaleCollator, TripletCollator
from dhrd_plugin.errors import UserError

pytestmark = pytest.mark.usefixtures('one_thread')

SERIES = ('loss/train/classification', 'loss/train/reasoning', 'loss/train/total', 'dhrd/alpha', 'dhrd/beta')


def tolerance(case):
    return 1e-10 if 'fp64' in case else 1e-5


def series(log, name):
    return [float(value) for _, value in log.data[name]]


@pytest.fixture(scope='module')
def one_process():
    return {case: case_gradients(case, 8) for case in CASES}


@pytest.fixture(scope='module')
def two_ranks(root, tmp_path_factory):
    """Gradients of both ranks, of all cases, from one launch."""
    out = tmp_path_factory.mktemp('ranks')
    run_ranks(2, 'tests/gradients.py', out, cwd=root)
    return [torch.load(out / f'rank{rank}.pt', weights_only=True) for rank in (0, 1)]


def assert_same_steps(found, expected, limit):
    assert len(found) == len(expected) == 2
    for one, other in zip(found, expected):
        assert relative_error(one, other) <= limit


@pytest.mark.parametrize('case', CASES)
def test_the_gradients_are_the_references(case, one_process):
    options, weights, _ = CASES[case]
    model = tiny_classifier(**options)
    if 'fp64' in case:
        exact(model)
    pooling = options.get('pooling', 'last')
    weights = {**weights, 'pooling': pooling, 'weighted': WEIGHTED.get(case)}
    loss = reference.total_loss(model.network, rows_of(case), VOCAB, LABELS, **weights)
    expected = {f'model.{name}': grad for name, grad in reference.gradients(loss, model.network).items()}
    assert relative_error(one_process[case][0], expected) <= tolerance(case)


@pytest.mark.parametrize('case', CASES)
@pytest.mark.parametrize(('microbatch', 'by_length'), [(4, False), (2, False), (1, False), (3, True)])
def test_microbatches_change_no_gradient(case, microbatch, by_length, one_process):
    # A batch of 8 in microbatches of 3 ends on one of 2 rows.
    assert_same_steps(case_gradients(case, microbatch, by_length), one_process[case], tolerance(case))


@pytest.mark.parametrize('case', CASES)
def test_two_ranks_change_no_gradient(case, one_process, two_ranks):
    """Among them alpha 0: the LM head is read on no rank, and DDP does not hang."""
    for rank in two_ranks:
        assert_same_steps(rank[case], one_process[case], tolerance(case))


def test_token_weighted_accumulation_changes_no_gradient(one_process):
    """llm-foundry's default."""
    model = tiny_classifier(**CASES['tied fp32'][0])
    found = fit(model, [AuxiliaryReasoningLoss()], microbatch=2, accumulate_train_batch_on_tokens=True)[2]
    assert_same_steps(found, one_process['tied fp32'], 1e-5)


def test_all_series_are_logged_and_add_up():
    _, log, _ = fit(tiny_classifier(), [AuxiliaryReasoningLoss(alpha=0.5, beta=2.0)], microbatch=4, batches=3)
    classification, reasoning, total, alpha, beta = (series(log, name) for name in SERIES)
    assert alpha == [0.5] * 3 and beta == [2.0] * 3
    expected = [2 * c + 0.5 * r for c, r in zip(classification, reasoning)]
    assert total == pytest.approx(expected, rel=1e-6)
    rows = triplets(8)
    losses = [reference.row_losses(tiny_classifier().network, row, VOCAB, LABELS) for row in rows]
    first = [float(sum(loss[i] for loss in losses)) / 8 for i in (0, 1)]
    assert [classification[0], reasoning[0]] == pytest.approx(first, rel=1e-5)


@pytest.mark.parametrize(
    ('schedule', 'expected'),
    [
        (LinearScheduler(1.0, 0.0, t_max='4ba'), [1, 0.75, 0.5, 0.25, 0]),
        (LinearScheduler(0.0, 1.0), [0, 0.2, 0.4, 0.6, 0.8]),
        (CosineAnnealingScheduler('4ba'), [1, 0.8535533906, 0.5, 0.1464466094, 0]),
        (ConstantWithWarmupScheduler('2ba'), [0, 0.5, 1, 1, 1]),
        (StepScheduler('2ba', gamma=0.5), [1, 1, 0.5, 0.5, 0.25]),
        (MultiStepScheduler(['3ba'], gamma=0.0), [1, 1, 1, 0, 0]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_schedule_is_followed_exactly(schedule, expected):
    lengths = []
    model = tiny_classifier()
    model.network.backbone.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs['input_ids'].shape[1]), with_kwargs=True
    )
    algorithm = AuxiliaryReasoningLoss(alpha=2.0, schedule=schedule)
    _, log, _ = fit(model, [algorithm], batches=5)
    assert series(log, 'dhrd/alpha') == pytest.approx([2 * value for value in expected], abs=1e-9)
    # Where alpha is 0 the rationale is not run, from that step on.
    longest = max(len(row['input_text'].split()) for row in triplets(8))
    assert [length > longest for length in lengths] == [value > 0 for value in expected]
    assert len(series(log, 'loss/train/reasoning')) == sum(value > 0 for value in expected)
    assert len(series(log, 'loss/train/total')) == 5


@pytest.mark.parametrize(
    ('schedule', 'expected'),
    [
        (LinearScheduler(1.0, 0.0, t_max='4ba'), [1, 0.875, 0.75, 0.625, 0.5, 0.375]),  # half as steep
        (LinearScheduler(1.0, 0.0), [1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]),  # of the duration, which is stretched
        (StepScheduler('2ba', gamma=0.5), [1, 1, 1, 1, 0.5, 0.5]),
    ],
    ids=['batches', 'duration', 'steps'],
)
def test_the_trainers_ratio_stretches_the_schedule_with_that_of_the_learning_rate(schedule, expected):
    options = {'schedulers': schedule, 'scale_schedule_ratio': 2.0, 'batches': 3, 'callbacks': [rates := Rates()]}
    _, log, _ = fit(tiny_classifier(), [AuxiliaryReasoningLoss(schedule=schedule)], **options)
    assert series(log, 'dhrd/alpha') == pytest.approx(expected)
    late = [expected[0], *expected[:-1]]  # Composer sets the rate before it counts the batch
    assert rates.seen == pytest.approx([0.01 * factor for factor in late])


def test_a_schedule_that_takes_no_ratio_is_refused_with_one():
    options = {'schedulers': LinearScheduler(), 'scale_schedule_ratio': 2.0}
    fit(tiny_classifier(), [AuxiliaryReasoningLoss(schedule=lambda state: 0.5)])
    with pytest.raises(UserError, match=r'takes no ratio, with scale_schedule_ratio=2.0; expected a schedule of'):
        fit(tiny_classifier(), [AuxiliaryReasoningLoss(schedule=lambda state: 0.5)], **options)


class Rates(Callback):
    """The learning rate of each step."""

    def __init__(self):
        self.seen = []

    def batch_start(self, state, logger):
        self.seen.append(state.optimizers[0].param_groups[0]['lr'])


@pytest.mark.parametrize(('weighted', 'both'), [('reasoning', False), ('both', True)])
def test_a_row_of_weight_2_counts_twice_and_one_of_weight_0_not_at_all(weighted, both):
    rows = [{**row, 'weight': weight} for row, weight in zip(triplets(4), (2.0, 1.0, 1.0, 0.0))]
    _, log, _ = fit(tiny_classifier(), [AuxiliaryReasoningLoss()], rows, batches=1, weights=weighted)
    losses = [reference.row_losses(tiny_classifier().network, row, VOCAB, LABELS) for row in rows]
    classification, reasoning = ([float(loss[i]) for loss in losses] for i in (0, 1))
    twice = [0, 0, 1, 2]
    expected = sum(classification[i] for i in (twice if both else range(4))) / 4
    assert series(log, 'loss/train/classification') == pytest.approx([expected], rel=1e-5)
    assert series(log, 'loss/train/reasoning') == pytest.approx([sum(reasoning[i] for i in twice) / 4], rel=1e-5)
    total = series(log, 'loss/train/classification')[0] + series(log, 'loss/train/reasoning')[0]
    assert series(log, 'loss/train/total') == pytest.approx([total], rel=1e-6)


def test_one_microbatch_by_hand():
    """BEFORE_FORWARD asks, AFTER_LOSS adds; the caller's batch is left as it was."""
    model = tiny_classifier()
    batch = TripletCollator(tiny_tokenizer(), LABELS)(triplets(4))
    state, timestamp = SimpleNamespace(batch=batch, model=model, dataloader=None), SimpleNamespace(batch=0)
    state.timestamp = timestamp
    algorithm, logger = AuxiliaryReasoningLoss(alpha=0.5, beta=3.0), Logger(state)  # pyright: ignore
    keys = set(batch)
    algorithm.apply(Event.BEFORE_FORWARD, state, logger)
    assert set(batch) == keys
    state.outputs = model(state.batch)
    state.loss = classification = model.loss(state.outputs, state.batch)
    algorithm.apply(Event.AFTER_LOSS, state, logger)
    reasoning = state.outputs['reasoning_loss'].mean()
    assert float(state.loss['total']) == pytest.approx(float(3 * classification + 0.5 * reasoning))
    assert float(state.loss['classification']) == float(classification)
    assert float(state.loss['reasoning']) == float(reasoning)


def test_without_the_algorithm_it_is_the_pooled_baseline_bit_for_bit():
    runs = [fit(tiny_classifier(), [], batches=4, reasoning=reasoning, microbatch=4) for reasoning in (True, False)]
    losses = [series(log, 'loss/train/total') for _, log, _ in runs]
    assert losses[0] == losses[1] and len(set(losses[0])) == 4
    weights = [trainer.state.model.state_dict() for trainer, *_ in runs]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_batches_without_any_rationale_train_the_classifier_alone():
    rows = [triplet(i, 2 + i % 3, None) for i in range(8)]
    _, log, steps = fit(tiny_classifier(), [AuxiliaryReasoningLoss()], rows)
    assert series(log, 'loss/train/reasoning') == [0, 0]
    assert series(log, 'loss/train/total') == series(log, 'loss/train/classification')
    assert not steps[0]['model.causal_lm.lm_head.weight'].any()


@pytest.mark.parametrize(
    ('weights', 'reason'),
    [
        ({'alpha': -1.0}, 'auxiliary_reasoning_loss.alpha: found -1.0'),
        ({'beta': float('nan')}, 'auxiliary_reasoning_loss.beta: found nan'),
        ({'alpha': float('inf')}, 'auxiliary_reasoning_loss.alpha: found inf'),
        ({'alpha': 0, 'beta': 0}, 'alpha and beta are both 0'),
    ],
)
def test_weights_that_make_no_sense_are_refused(weights, reason):
    with pytest.raises(UserError) as error:
        AuxiliaryReasoningLoss(**weights)
    assert reason in str(error.value) and '\n' not in str(error.value)


@pytest.mark.parametrize('factor', [-0.1, float('nan'), float('inf')])
def test_a_schedule_that_makes_no_sense_is_refused(factor):
    with pytest.raises(UserError, match=f'schedule: function returned {factor} at 0'):
        fit(tiny_classifier(), [AuxiliaryReasoningLoss(schedule=lambda state, ssr=1.0: factor)])


def test_a_collator_that_names_other_classes_is_refused():
    collate = RationaleCollator(tiny_tokenizer(), [*LABELS, 'more'])
    with pytest.raises(
        UserError, match=r"label_names: found \['yes', .*, 'more'\] in the collator; .* each of 3 classes"
    ):
        fit_stock(stock_classifier(), [AuxiliaryReasoningLoss()], tokenised(), collate)


@pytest.mark.parametrize('stock', [False, True])
def test_a_collator_with_the_classes_in_another_order_is_refused(stock):
    turned = LABELS[::-1]
    message = f'label_names: found {turned} in the collator; expected them as the model has them, {LABELS}'
    with pytest.raises(UserError, match=re.escape(message)):
        if stock:
            collate = RationaleCollator(tiny_tokenizer(), turned)
            fit_stock(stock_classifier(), [AuxiliaryReasoningLoss()], tokenised(), collate)
        else:
            collate = TripletCollator(tiny_tokenizer(), turned)
            fit_stock(tiny_classifier(), [AuxiliaryReasoningLoss()], triplets(8), collate)


class SeveralLosses(HuggingFaceModel):
    """A user's own, with what Composer takes as losses."""

    kind = dict

    def loss(self, outputs, batch):
        logits = outputs['logits']
        parts = {'ce': torch.nn.functional.cross_entropy(logits, batch['labels']), 'l2': logits.pow(2).mean(-1)}
        return parts if self.kind is dict else tuple(parts.values())


@pytest.mark.parametrize('kind', [dict, tuple])
@pytest.mark.parametrize('alpha', [0.5, 0.0])
def test_a_model_of_several_losses_trains_on_their_sum(kind, alpha):
    model = SeveralLosses(stock_classifier().model, tiny_tokenizer())
    model.kind = kind
    collate = RationaleCollator(tiny_tokenizer(), LABELS)
    _, log, _ = fit_stock(model, [AuxiliaryReasoningLoss(alpha=alpha)], tokenised(), collate, microbatch=4)
    classification, total = series(log, 'loss/train/classification'), series(log, 'loss/train/total')
    reasoning = series(log, 'loss/train/reasoning') if alpha else [0.0] * len(total)
    assert total == pytest.approx([c + alpha * r for c, r in zip(classification, reasoning)], rel=1e-6)
    if kind is dict:
        parts = zip(series(log, 'loss/train/ce'), series(log, 'loss/train/l2'))
        assert classification == pytest.approx([ce + l2 for ce, l2 in parts], rel=1e-6)
    bare = SeveralLosses(stock_classifier().model, tiny_tokenizer())
    bare.kind = kind
    alone = fit_stock(bare, [], tokenised(rationales=False), microbatch=4)[1]
    assert classification[0] == pytest.approx(series(alone, 'loss/train/total')[0], rel=1e-6)


def test_weights_and_probabilities_of_a_classification_loss_that_takes_none_are_refused():
    options = {'rows': triplets(8), 'batches': 1}
    _, log, _ = fit(stock_classifier(), [AuxiliaryReasoningLoss()], weights='reasoning', **options)
    assert len(series(log, 'loss/train/reasoning')) == 1
    with pytest.raises(UserError, match=r"weights: found 'both' with a model of type HuggingFaceModel.*'reasoning'$"):
        fit(stock_classifier(), [AuxiliaryReasoningLoss()], weights='both', **options)
    options['rows'] = rows_of('soft')
    with pytest.raises(UserError, match=r'probabilities: found with a model of type HuggingFaceModel.* rows without$'):
        fit(stock_classifier(), [AuxiliaryReasoningLoss()], **options)

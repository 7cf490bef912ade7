"""Composer's own algorithms beside the reasoning loss: each does its work, or says why it cannot."""

import math

import pytest
import torch
from composer.algorithms import EMA, SAM, SWA, GradientClipping, LabelSmoothing, LayerFreezing, SeqLengthWarmup
from composer.core import Callback
from composer.models import HuggingFaceModel
from safetensors.torch import load_file
from stock import build, collator, stock_classifier, tokenised
from tiny import LABELS, relative_error, tiny_lm, tiny_network, tiny_tokenizer
from torch.utils.data import DataLoader

from dhrd_plugin import AuxiliaryReasoningLoss, ComposerDualHeadClassifier, DropReasoningHead
from dhrd_plugin.errors import UserError

pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture(scope='module')
def lm(tmp_path_factory):
    folder = tmp_path_factory.mktemp('lm')
    tiny_lm().save_pretrained(folder)
    return str(folder)


def our_model(**options):
    return ComposerDualHeadClassifier(tiny_network(tied=True), tiny_tokenizer(), LABELS, **options)


MODELS = {
    'ours': (our_model, lambda lm: {}),
    'surgery, tied': (stock_classifier, lambda lm: {}),
    'surgery, untied': (stock_classifier, lambda lm: {'pretrained_model_name_or_path': lm}),
}


class Weights(Callback):
    """Copies of the trainable weights and of their gradients, at the end of each batch, and of the weights before.

    ``shift`` is added to the weights, by their names, before the first.
    """

    def __init__(self, shift=None):
        self.weights, self.grads, self.shift = [], [], shift or {}

    def fit_start(self, state, logger):
        named = dict(state.model.named_parameters())
        with torch.no_grad():
            for name, value in self.shift.items():
                named[name].add_(value)
        self.begun = {name: p.detach().clone() for name, p in named.items()}

    def batch_end(self, state, logger):
        named = dict(state.model.named_parameters())
        self.weights.append({name: p.detach().clone() for name, p in named.items()})
        self.grads.append({name: p.grad.clone() for name, p in named.items() if p.grad is not None})


def run(kind, lm, *neighbours, first=False, shift=None, **options):
    """Train the model beside its neighbours, on either side of them in the list."""
    make, arguments = MODELS[kind]
    ours = [AuxiliaryReasoningLoss(alpha=0.5, **arguments(lm))]
    algorithms = [*neighbours, *ours] if first else [*ours, *neighbours]
    watch = Weights(shift)
    options = {'batches': 3, 'microbatch': 4, 'callbacks': [watch], **options}
    trainer, log, _ = build(make(), algorithms, tokenised(), collator(), **options)
    trainer.fit()
    assert all(float(loss) > 0 for _, loss in log.data['loss/train/reasoning'])
    return trainer, log, watch


def norm(grads):
    return math.sqrt(sum(float(grad.double().square().sum()) for grad in grads.values()))


def unit_norm(value):
    """The norm of each output's weights (Brock et al., 2021)."""
    return value.norm() if value.ndim < 2 else value.norm(dim=1, keepdim=True)


both_orders = pytest.mark.parametrize('first', [True, False])
every_model = pytest.mark.parametrize('kind', MODELS)


@every_model
@both_orders
@pytest.mark.parametrize(('clipping', 'threshold'), [('norm', 0.1), ('value', 0.01), ('adaptive', 0.05)])
def test_gradient_clipping(kind, lm, first, clipping, threshold):
    _, _, plain = run(kind, lm, batches=1)
    neighbour = GradientClipping(clipping_type=clipping, clipping_threshold=threshold)
    _, _, clipped = run(kind, lm, neighbour, first=first, batches=1)
    before, after = plain.grads[0], clipped.grads[0]
    if clipping == 'norm':  # of both heads' gradients together
        assert norm(before) > 1 and norm(after) == pytest.approx(threshold, rel=1e-4)
        scale = threshold / norm(before)
        assert all(torch.allclose(after[name], before[name] * scale, rtol=1e-3, atol=1e-7) for name in before)
    elif clipping == 'value':
        assert all(torch.equal(after[name], before[name].clamp(-threshold, threshold)) for name in before)
    else:
        for name, grad in before.items():
            share = threshold * unit_norm(plain.begun[name]) / unit_norm(grad)
            expected = grad * share.nan_to_num(nan=1.0).clamp(max=1.0)
            torch.testing.assert_close(after[name], expected, atol=1e-7, rtol=1e-4)
    assert any(not torch.equal(after[name], before[name]) for name in before)


@every_model
@both_orders
def test_ema(kind, lm, first):
    neighbour = EMA(half_life='1ba', update_interval='1ba')
    trainer, _, watch = run(kind, lm, neighbour, first=first)
    _, _, plain = run(kind, lm)
    assert all(torch.equal(value, plain.weights[-1][name]) for name, value in watch.weights[-1].items())
    # It starts on the weights after the first batch and then halves the way to each later one's.
    expected = watch.weights[0]
    for later in watch.weights:
        expected = {name: (value + later[name]) / 2 for name, value in expected.items()}
    averaged = neighbour.ema_model.named_parameters_dict
    assert averaged.keys() == expected.keys()
    assert all(torch.allclose(averaged[name], value, atol=1e-6) for name, value in expected.items())
    # It evaluates the averaged weights.
    seen = []
    trainer.state.callbacks.append(Seen(seen))
    trainer.eval(DataLoader(tokenised(), 8, collate_fn=collator()))
    assert all(torch.allclose(seen[0][name], value, atol=1e-6) for name, value in expected.items())


@pytest.mark.parametrize('saves', [True, False])
def test_the_export_holds_the_averaged_weights_of_ema(tmp_path, saves):
    """Whether or not a checkpoint, which swaps them in, was saved just before."""
    neighbour = EMA(half_life='1ba', update_interval='1ba')
    options = {'save_folder': str(tmp_path / 'saved'), 'save_interval': '1ba'} if saves else {}
    watch, callback = Weights(), DropReasoningHead(str(tmp_path / 'slim'))
    build(
        stock_classifier(),
        [AuxiliaryReasoningLoss(), neighbour],
        tokenised(),
        collator(),
        batches=3,
        callbacks=[watch, callback],
        **options,
    )[0].fit()
    expected = watch.weights[0]['model.score.weight']
    for later in watch.weights:
        expected = (expected + later['model.score.weight']) / 2
    exported = load_file(tmp_path / 'slim' / 'model.safetensors')['score.weight']
    torch.testing.assert_close(exported, expected, atol=1e-6, rtol=0)
    assert not torch.allclose(exported, watch.weights[-1]['model.score.weight'], atol=1e-4)
    assert neighbour.ema_weights_active == saves


class Seen(Callback):
    """The weights as a batch of the evaluation finds them."""

    def __init__(self, seen):
        self.seen = seen

    def eval_batch_start(self, state, logger):
        self.seen.append({name: p.detach().clone() for name, p in state.model.named_parameters()})


@every_model
@both_orders
def test_layer_freezing(kind, lm, first):
    neighbour = LayerFreezing(freeze_start=0.0, freeze_level=1.0)
    trainer, log, watch = run(kind, lm, neighbour, first=first, max_duration='4ep')
    frozen = [int(count) for _, count in log.data['layer_freezing/layers_frozen']]
    assert frozen == sorted(frozen) and frozen[0] > 0
    moved = [
        {name for name in after if not torch.equal(before[name], after[name])}
        for before, after in zip(watch.weights, watch.weights[1:])
    ]
    assert moved[0] > moved[1] > moved[2]  # fewer layers train in each epoch
    assert any('embed_tokens' in name for name in set(watch.weights[0]) - moved[0])
    last = list(watch.weights[0])[-1]
    assert ('score' in last or 'classifier.out_proj' in last) and last in moved[-1]
    assert trainer.state.timestamp.batch == 4


@every_model
@both_orders
def test_sam(kind, lm, first):
    """It runs each microbatch twice, the second time on weights moved uphill, by both losses."""
    _, log, watch = run(kind, lm, SAM(rho=0.05), first=first)
    _, _, plain = run(kind, lm, batches=1)
    assert [len(log.data[name]) for name in ('loss/train/total', 'loss/train/reasoning', 'dhrd/alpha')] == [3] * 3
    shift = {name: 0.05 / norm(plain.grads[0]) * grad for name, grad in plain.grads[0].items()}
    _, _, uphill = run(kind, lm, shift=shift, batches=1)
    assert (
        relative_error(watch.grads[0], uphill.grads[0]) < 1e-4 < 1e-2 < relative_error(plain.grads[0], uphill.grads[0])
    )


@every_model
@both_orders
def test_swa(kind, lm, first):
    """It averages copies of the model."""
    neighbour = SWA(swa_start='1ep', swa_end='3ep', update_interval='1ep')
    _, _, watch = run(kind, lm, neighbour, first=first, max_duration='4ep')
    averaged = dict(neighbour.swa_model.module.named_parameters())
    assert neighbour.swa_completed and averaged.keys() == watch.weights[0].keys()
    for name, value in averaged.items():
        expected = sum(weights[name] for weights in watch.weights[:3]) / 3
        torch.testing.assert_close(value.detach(), expected, atol=1e-6, rtol=1e-5)


@every_model
@both_orders
def test_seq_length_warmup_is_refused(kind, lm, first):
    neighbour = SeqLengthWarmup(duration=0.5, min_seq_length=4, max_seq_length=8, step_size=2)
    with pytest.raises(UserError) as error:
        run(kind, lm, neighbour, first=first)
    assert 'found SeqLengthWarmup beside it: it would cut the pooled token or the rationale' in str(error.value)
    assert 'max_seq_len' in str(error.value) and '\n' not in str(error.value)


@every_model
@both_orders
def test_label_smoothing_is_refused_and_the_models_own_named(kind, lm, first):
    with pytest.raises(UserError) as error:
        run(kind, lm, LabelSmoothing(0.1, target_key='labels'), first=first)
    assert 'found LabelSmoothing beside it' in str(error.value) and '\n' not in str(error.value)
    assert 'ComposerDualHeadClassifier(label_smoothing=...)' in str(error.value)


def test_without_us_composer_does_not_smooth_this_pipeline_either():
    """Nothing is taken away: it fails on any HuggingFaceModel."""
    trainer, *_ = build(stock_classifier(), [LabelSmoothing(0.1, target_key='labels')])
    assert isinstance(trainer.state.model, HuggingFaceModel)
    with pytest.raises(AssertionError, match='Multiple tensors not supported yet'):
        trainer.fit()


def test_the_models_own_label_smoothing_is_composers_formula():
    """Targets are (1 - s) * one-hot + s / K; the reasoning loss is left as it is."""
    make = {flag: our_model(label_smoothing=0.2 if flag else 0.0) for flag in (True, False)}
    logs = {}
    for flag, model in make.items():
        batch = collator()(tokenised())
        logits = model({**batch, 'return_reasoning_loss': True}).logits.detach()
        trainer, log, _ = build(model, [AuxiliaryReasoningLoss()], tokenised(), collator(), batches=1)
        trainer.fit()
        logs[flag] = {name: float(log.data[f'loss/train/{name}'][0][1]) for name in ('classification', 'reasoning')}
    targets = torch.full((8, 3), 0.2 / 3)
    targets[torch.arange(8), batch['labels']] += 0.8
    expected = -(targets * logits.log_softmax(-1)).sum(-1).mean()
    assert logs[True]['classification'] == pytest.approx(float(expected), rel=1e-5)
    assert abs(logs[True]['classification'] - logs[False]['classification']) > 1e-3
    assert logs[True]['reasoning'] == logs[False]['reasoning']

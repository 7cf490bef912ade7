"""The losses against torch's, and against the plain per-row reference."""

from functools import partial

import pytest
import reference
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import KINDS, LABELS, VOCAB, exact, relative_error, tiny_network, tiny_tokenizer, triplet
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dhrd_plugin.data.collator import TripletCollator
from dhrd_plugin.losses import chunked_lm_loss, combine_losses, linear_cross_entropy, soft_cross_entropy

pytestmark = pytest.mark.usefixtures('one_thread')

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


def tensors(rows=7, hidden=6, vocab=11, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    state, weight, bias = (
        torch.randn(shape, dtype=dtype, generator=generator).requires_grad_()
        for shape in ((rows, hidden), (vocab, hidden), (vocab,))
    )
    targets = torch.randint(vocab, (rows,), generator=generator)
    return state, weight, bias, targets


def grads(losses, upstream, *inputs):
    return torch.autograd.grad(losses, inputs, upstream)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('with_bias', [True, False])
@pytest.mark.parametrize('rows', [0, 1, 7])
@pytest.mark.parametrize('chunk_size', [1, 3, 100])
def test_linear_cross_entropy_is_torchs(dtype, with_bias, rows, chunk_size):
    state, weight, bias, targets = tensors(rows, dtype=dtype)
    inputs = (state, weight, bias) if with_bias else (state, weight)
    bias = bias if with_bias else None
    upstream = torch.linspace(-1, 2, rows, dtype=dtype)  # not uniform, and negative
    found = linear_cross_entropy(state, weight, bias, targets, chunk_size)
    expected = F.cross_entropy(F.linear(state, weight, bias), targets, reduction='none')
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(grads(found, upstream, *inputs), grads(expected, upstream, *inputs))


@pytest.mark.parametrize('trained', ['hidden', 'weight', 'bias'])
def test_gradcheck_with_the_rest_frozen(trained):
    state, weight, bias, targets = tensors(rows=4, hidden=3, vocab=5)
    for name, value in (('hidden', state), ('weight', weight), ('bias', bias)):
        value.requires_grad_(name == trained)
    torch.autograd.gradcheck(lambda *a: linear_cross_entropy(*a, targets, 3), (state, weight, bias))


class Widest(TorchDispatchMode):
    """Counts the operations that made a tensor of so many columns."""

    def __init__(self, columns):
        super().__init__()
        self.columns, self.count = columns, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.count += any(isinstance(x, torch.Tensor) and x.shape[-1:] == (self.columns,) for x in tree_leaves(out))
        return out


@pytest.mark.parametrize('frozen', [True, False])
@pytest.mark.parametrize('factors', ['of one size', 'of all sizes'])
def test_logits_are_computed_once(frozen, factors):
    """Where a trained head's rows are weighed, twice; a second backward pass does as the first."""
    state, weight, _, _ = tensors(24, vocab=53)
    labels = torch.randint(53, (3, 8))
    weight.requires_grad_(not frozen)
    inputs = (state,) if frozen else (state, weight)
    upstream = (
        torch.tensor(0.25).double().expand(3) if factors == 'of one size' else torch.tensor([1.0, -2.0, 0.0]).double()
    )
    loss = chunked_lm_loss(state.view(3, 8, -1), labels, weight, chunk_size=5)
    logits = F.linear(state, weight).view(3, 8, -1)[:, :-1].transpose(1, 2)
    expected = grads(F.cross_entropy(logits, labels[:, 1:], reduction='none').mean(1), upstream, *inputs)
    for again in (False, True):
        with Widest(53) as widest:
            found = torch.autograd.grad(loss, inputs, upstream, retain_graph=True)
        assert (widest.count == 0) == (not again and (frozen or factors == 'of one size'))
        torch.testing.assert_close(found, expected)


def test_without_a_gradient_nothing_is_kept():
    with torch.no_grad():
        assert linear_cross_entropy(*tensors()).grad_fn is None


def test_autocast_multiplies_in_bf16_and_sums_in_fp32():
    state, weight, bias, targets = tensors(dtype=torch.float32)
    with torch.autocast('cpu', torch.bfloat16):
        found = linear_cross_entropy(state, weight, bias, targets, 3)
        logits = F.linear(state, weight, bias)
    assert found.dtype == torch.float32 and logits.dtype == torch.bfloat16
    expected = F.cross_entropy(logits.float(), targets, reduction='none')
    torch.testing.assert_close(found, expected)
    for one, other in zip(*(grads(x.sum(), None, state, weight, bias) for x in (found, expected))):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, other, atol=0.02, rtol=0.02)


def of_plain_and_chunked(dtype, autocast, chunks, scale=1.0, rows=1024):
    """Relative error of the gradients of states and weight, by torch's own two functions, then by the chunked loss."""
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(512, (rows,), generator=generator)
    inputs = [torch.randn(size, generator=generator).to(dtype) for size in ((rows, 64), (512, 64))]
    inputs[1] *= 0.25

    def errors(loss, kind, autocast):
        leaves = [value.to(kind).requires_grad_() for value in inputs]
        with torch.autocast('cpu', dtype, enabled=autocast):
            total = loss(*leaves)
        return torch.autograd.grad(total * scale, leaves)

    def plain(state, weight):
        return F.cross_entropy(F.linear(state, weight), targets)

    exact, kind = errors(plain, torch.float64, False), torch.float32 if autocast else dtype
    found = [errors(plain, kind, autocast)]
    for count in chunks:
        chunked = partial(linear_cross_entropy, bias=None, targets=targets, chunk_size=rows // count)
        found.append(errors(lambda *leaves, of=chunked: of(*leaves).mean(), kind, autocast))
    return [
        [float((value.double() - right).norm() / right.norm()) for value, right in zip(grads, exact)] for grads in found
    ]


@pytest.mark.parametrize('autocast', [True, False])
def test_in_bf16_the_gradients_are_as_exact_as_torchs(autocast):
    (state, weight), *found = of_plain_and_chunked(torch.bfloat16, autocast, (1, 4, 16, 64, 128))
    assert 1e-3 < weight < 1e-2  # there is something to be lost
    for of_state, of_weight in found:
        assert of_state <= 1.1 * state and of_weight <= 1.1 * weight


def test_in_fp16_with_the_scale_that_training_begins_with():
    (state, weight), *found = of_plain_and_chunked(torch.float16, True, (1, 4, 16), scale=2.0**16)
    for of_state, of_weight in found:
        assert of_state <= 1.1 * state and of_weight <= 1.1 * weight


@pytest.mark.parametrize('weighed', [False, True])
def test_in_fp16_nothing_overflows_that_is_not_too_large(weighed):
    """The factor of a row is, which is 65536 at first; a share of it for each token is not."""
    state, weight, _, _ = tensors(32, dtype=torch.float32)
    labels = torch.randint(11, (2 if weighed else 1, 32 // (2 if weighed else 1)))
    factors = torch.tensor([2.0**16, 2.0**15] if weighed else [2.0**16])
    with torch.autocast('cpu', torch.float16):
        loss = chunked_lm_loss(state.view(*labels.shape, -1), labels, weight, chunk_size=5)
    found = grads(loss, factors, state, weight)
    logits = F.linear(state, weight).view(*labels.shape, -1)[:, :-1].transpose(1, 2)
    expected = grads(F.cross_entropy(logits, labels[:, 1:], reduction='none').mean(1), factors, state, weight)
    for one, other in zip(found, expected):
        assert one.isfinite().all() and float((one - other).norm() / other.norm()) < 1e-2


@pytest.mark.parametrize('with_bias', [True, False])
def test_it_can_be_differentiated_again(with_bias):
    state, weight, bias, targets = tensors(rows=4, hidden=3, vocab=5)
    inputs = (state, weight, bias) if with_bias else (state, weight)

    def total(state, weight, bias=None):
        return linear_cross_entropy(state, weight, bias, targets, 3)

    torch.autograd.gradgradcheck(total, inputs)
    # Where nothing but the losses themselves needs a gradient, as in a penalty on the norm of theirs.
    penalty = sum(g.square().sum() for g in torch.autograd.grad(total(*inputs).sum(), inputs, create_graph=True))
    losses = F.cross_entropy(F.linear(state, weight, bias if with_bias else None), targets, reduction='sum')
    wanted = sum(g.square().sum() for g in torch.autograd.grad(losses, inputs, create_graph=True))
    torch.testing.assert_close(torch.autograd.grad(penalty, inputs), torch.autograd.grad(wanted, inputs))


class Largest(TorchDispatchMode):
    """Remembers the size of the largest tensor that any operation made."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.size = max([self.size, *(x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor))])
        return out


@pytest.mark.parametrize('frozen', [True, False])
def test_no_full_logits_ever_exist(frozen):
    batch, length, hidden, vocab, chunk_size = 4, 32, 8, 512, 16
    state = torch.randn(batch, length, hidden, requires_grad=True)
    weight = torch.randn(vocab, hidden, requires_grad=not frozen)
    labels = torch.randint(vocab, (batch, length))
    with Largest() as largest:
        chunked_lm_loss(state, labels, weight, chunk_size=chunk_size).sum().backward()
    assert largest.size <= chunk_size * vocab
    with Largest() as largest:
        F.cross_entropy(F.linear(state, weight).flatten(0, 1), labels.flatten())
    assert largest.size == batch * length * vocab  # the tool sees what it looks for


def test_rows_without_targets_are_zero_and_keep_the_graph():
    state, weight, *_ = tensors(12)
    labels = torch.full((2, 6), -100)
    labels[:, 0] = 1  # nothing predicts the first token
    loss = chunked_lm_loss(state.view(2, 6, -1), labels, weight)
    assert loss.tolist() == [0, 0]
    assert all(float(g.abs().sum()) == 0 for g in grads(loss.sum(), None, state, weight))


def test_combine_losses_is_equation_4():
    reasoning = torch.tensor([1.0, 3.0])
    assert float(combine_losses(torch.tensor(5.0), reasoning, alpha=0.5, beta=2.0)) == 11.0
    assert float(combine_losses(torch.tensor(5.0), reasoning.mean())) == 7.0


TOLD = torch.tensor([[0.2, 0.5, 0.3], [0, 0, 0], [0, 1, 0], [0.6, 0.4, 0], [0, 0, 0]])
TRUTH = torch.tensor([1, 2, -100, 0, 1])


def plain_soft_loss(logits, weight, class_weights=None, label_smoothing=0.0):
    """Row by row, class by class."""
    class_weights = [1.0] * 3 if class_weights is None else class_weights.tolist()
    losses = []
    for row, told, label in zip(logits, TOLD.tolist(), TRUTH.tolist()):
        terms = [-class_weights[k] * (row[k] - row.exp().sum().log()) for k in range(3)]
        hard = sum(((1 - label_smoothing) * (k == label) + label_smoothing / 3) * terms[k] for k in range(3))
        soft = sum(told[k] * terms[k] for k in range(3))
        losses.append(soft if label == -100 else (1 - weight) * hard + weight * soft if sum(told) else hard)
    return torch.stack(losses)


@pytest.mark.parametrize('weight', [0.0, 0.3, 1.0])
@pytest.mark.parametrize('class_weights', [None, torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)])
@pytest.mark.parametrize('label_smoothing', [0.0, 0.2])
def test_soft_labels_are_a_plain_sum(weight, class_weights, label_smoothing):
    """Class weights count in both terms, smoothing in that of the label."""
    logits = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    found = soft_cross_entropy(logits, TRUTH, TOLD, weight, class_weights, label_smoothing)
    expected = plain_soft_loss(logits, weight, class_weights, label_smoothing)
    upstream = torch.arange(1.0, 6.0, dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)  # the probabilities are fp32
    torch.testing.assert_close(grads(found, upstream, logits), grads(expected, upstream, logits), rtol=1e-6, atol=1e-9)


def test_beside_soft_labels_the_other_rows_train_as_without_to_the_bit():
    logits = torch.randn(5, 3, generator=torch.Generator().manual_seed(2)).requires_grad_()
    found, alone = soft_cross_entropy(logits, TRUTH, TOLD), soft_cross_entropy(logits, TRUTH)
    assert torch.equal(alone, F.cross_entropy(logits, TRUTH, reduction='none'))
    upstream, bare = torch.full((5,), 0.2), TOLD.sum(1) == 0
    (one,), (other,) = grads(found, upstream, logits), grads(alone, upstream, logits)
    assert torch.equal(found[bare], alone[bare]) and torch.equal(one[bare], other[bare])
    assert not torch.equal(found[0], alone[0]) and not torch.equal(one[0], other[0])


ROWS = st.lists(
    st.tuples(st.integers(1, 9), st.none() | st.integers(0, 8), st.sampled_from(LABELS)), min_size=1, max_size=5
)


@settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    rows=ROWS,
    kind=st.sampled_from(KINDS),
    head=st.sampled_from(['mlp', 'mlp norm', 'linear']),
    layout=st.sampled_from(['reason_first', 'label_first']),
    pooling=st.sampled_from(['last', 'mean']),
    targets=st.sampled_from(['sequence', 'rationale']),
    side=st.sampled_from(['right', 'left']),
    tied=st.booleans(),
    lora=st.booleans(),
    chunk_size=st.integers(1, 40),
    alpha=st.sampled_from([0.0, 0.5, 1.0, 3.0]),
    beta=st.sampled_from([0.0, 1.0, 0.7]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 999),
)
def test_loss_and_every_gradient_are_the_references(
    rows, kind, head, layout, pooling, targets, side, tied, lora, chunk_size, alpha, beta, dtype, seed
):
    rows = [triplet(seed + i, *row) for i, row in enumerate(rows)]
    network = tiny_network(kind, head[:6].split()[0], pooling, tied, lora, seed, chunk_size, norm='norm' in head)
    if dtype == torch.float64:
        exact(network)
    options = {'reasoning_targets': targets, 'padding_side': side, 'layout': layout}
    batch = TripletCollator(tiny_tokenizer(), LABELS, **options)(rows)
    labels = batch.pop('labels')
    out = network(**batch, return_reasoning_loss=alpha > 0)
    reasoning = out.reasoning_loss if alpha > 0 else torch.zeros(())
    loss = combine_losses(F.cross_entropy(out.logits, labels), reasoning, alpha, beta)
    expected = reference.total_loss(network, rows, VOCAB, LABELS, alpha, beta, targets, pooling, layout=layout)

    tolerance = TOLERANCE[dtype]
    assert abs(float(loss - expected)) <= tolerance * max(float(expected), 1)
    found, wanted = (reference.gradients(x, network) for x in (loss, expected))
    assert relative_error(found, wanted) <= tolerance

"""A step asks no tensor what it holds: on a GPU the host would wait for each answer."""

import collections
import copy

import pytest
import torch
import torch.nn.functional as F
from tiny import LABELS, relative_error, tiny_lm, tiny_tokenizer, triplets
from torch.utils._python_dispatch import TorchDispatchMode

from dhrd_plugin import ComposerDualHeadClassifier, DualHeadNetwork, TripletCollator
from dhrd_plugin.losses import combine_losses
from dhrd_plugin.models import padding_free
from dhrd_plugin.models.heads import last_hidden_state

WAITING = {'_local_scalar_dense', 'nonzero', 'bincount', 'is_nonzero', 'unique', '_unique2', 'masked_select', 'equal'}


class Waits(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.counts = collections.Counter()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        name = operator.overloadpacket.__name__
        masked = name in ('index', 'index_put_') and any(i is not None and i.dtype == torch.bool for i in args[1])
        if name in WAITING or masked:
            self.counts[name] += 1
        return operator(*args, **(kwargs or {}))

    def __enter__(self):
        original = self.original = torch.Tensor.tolist

        def tolist(tensor):
            self.counts['tolist'] += 1
            return original(tensor)

        torch.Tensor.tolist = tolist
        return super().__enter__()

    def __exit__(self, *error):
        torch.Tensor.tolist = self.original
        return super().__exit__(*error)


def packed(query, key, value, offsets, longest, dropout, scaling, window):
    """Flash attention's answer, by a mask over all rows."""
    row = torch.bucketize(torch.arange(query.shape[2]), offsets[1:], right=True)
    mask = (row[:, None] == row[None]) & torch.ones(len(row), len(row)).tril().bool()
    out = F.scaled_dot_product_attention(query, key, value, mask, dropout, scale=scaling, enable_gqa=True)
    return out.transpose(1, 2)


@pytest.fixture(params=['padded', 'all rows in one kernel'])
def network(request, monkeypatch):
    free = request.param != 'padded'
    torch.manual_seed(0)
    made = DualHeadNetwork(tiny_lm(), len(LABELS), chunk_size=5, padding_free=free)
    if free:
        monkeypatch.setattr(padding_free, 'one_kernel', lambda *_: True)
        monkeypatch.setattr(padding_free, '_flash', packed)
    return made


def step(network, batch, reason):
    model = ComposerDualHeadClassifier(network, label_names=LABELS)
    outputs = model({**batch, 'return_reasoning_loss': reason})
    loss = model.loss(outputs, batch)
    if reason:
        loss = combine_losses(loss, outputs.reasoning_loss, 0.3)
    network.zero_grad()
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}


@pytest.mark.parametrize('reason', [True, False])
def test_a_step_waits_for_nothing(network, reason):
    batch = TripletCollator(tiny_tokenizer(), LABELS)(triplets())
    with Waits() as waits:
        step(network, batch, reason)
    with Waits() as of_transformers:  # which asks whether a mask has any padding
        if not network.padding_free:
            last_hidden_state(network.backbone, batch['input_ids'], batch['attention_mask'])
    assert waits.counts == of_transformers.counts


@pytest.mark.parametrize('reason', [True, False])
@pytest.mark.parametrize('side', ['right', 'left'])
def test_what_the_host_knows_is_what_the_tensors_say(network, reason, side):
    batch = TripletCollator(tiny_tokenizer(), LABELS, padding_side=side)(triplets())
    loss, gradients = step(network, batch, reason)
    with Waits() as waits:
        other, others = step(network, {key: value for key, value in batch.items() if key != 'spans'}, reason)
    assert waits.counts
    assert torch.equal(loss, other) and all(torch.equal(gradients[name], others[name]) for name in others)


def test_all_rows_in_one_call_are_the_rows_alone(network):
    if not network.padding_free:
        pytest.skip('padded')
    batch = TripletCollator(tiny_tokenizer(), LABELS)(triplets())
    found, gradients = step(network, batch, True)
    network.padding_free = False
    expected, wanted = step(network, batch, True)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert relative_error(gradients, wanted) < 1e-5


def test_compiled_blocks_are_one_graph_for_all_lengths(network):
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    compiled = copy.deepcopy(network)
    compiled.compile_blocks(backend='aot_eager')
    collate, rows = TripletCollator(tiny_tokenizer(), LABELS), triplets(40)
    for start in range(0, 40, 8):
        batch = collate(rows[start : start + 8])
        (found, gradients), (expected, wanted) = step(compiled, batch, True), step(network, batch, True)
        torch.testing.assert_close(found, expected)
        assert relative_error(gradients, wanted) < 1e-6
    assert not counters['graph_break']
    assert counters['stats']['unique_graphs'] == 2  # for the first length, then for any


def test_compiled_blocks_run_row_by_row():
    """The way of a CPU: no graph can know the lengths, so the graphs stop before attention and go on behind it."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    network = DualHeadNetwork(tiny_lm(), len(LABELS), chunk_size=5, padding_free=True)
    compiled = copy.deepcopy(network)
    compiled.compile_blocks(backend='aot_eager')
    collate, rows, graphs = TripletCollator(tiny_tokenizer(), LABELS), triplets(40), []
    for start in range(0, 40, 8):
        batch = collate(rows[start : start + 8])
        (found, gradients), (expected, wanted) = step(compiled, batch, True), step(network, batch, True)
        torch.testing.assert_close(found, expected)
        assert relative_error(gradients, wanted) < 1e-6
        graphs.append(torch._dynamo.utils.counters['stats']['unique_graphs'])
    assert graphs[1:] == graphs[1:2] * 4  # those for the first length, then those for any

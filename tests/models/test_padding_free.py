"""Without padding the network has the losses and gradients that it has with it."""

import copy

import pytest
import torch
from tiny import KINDS, LABELS, relative_error, tiny_lm, tiny_network, tiny_tokenizer, triplets

from dhrd_plugin.data.collation import TripletCollator
from dhrd_plugin.errors import UserError
from dhrd_plugin.models.padding_free import use_padding_free

pytestmark = pytest.mark.usefixtures('one_thread')


def step(network, batch):
    output = network(**batch, return_reasoning_loss=True)
    loss = output.logits.logsumexp(-1).mean() + output.reasoning_loss.mean()
    named = {name: weight for name, weight in network.named_parameters() if weight.requires_grad}
    grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return output, {name: grad for name, grad in zip(named, grads) if grad is not None}


@pytest.mark.parametrize('kind', [*KINDS])
@pytest.mark.parametrize('pooling', ['last', 'mean'])
@pytest.mark.parametrize('side', ['left', 'right'])
@pytest.mark.parametrize('lora', [False, True])
def test_losses_and_gradients_are_the_same(kind, pooling, side, lora):
    network = tiny_network(kind, pooling=pooling, lora=lora)
    network.causal_lm.config._attn_implementation = 'sdpa'
    batch = TripletCollator(tiny_tokenizer(), LABELS, padding_side=side)(triplets())
    batch.pop('labels')
    expected, expected_grads = step(network, batch)
    other = copy.deepcopy(network)
    other.padding_free = use_padding_free(other.causal_lm, True)
    found, grads = step(other, batch)
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.reasoning_loss, expected.reasoning_loss, rtol=1e-5, atol=1e-5)
    assert relative_error(grads, expected_grads) < 1e-4


def test_it_is_refused_where_it_cannot_be():
    lm = tiny_lm('llama')
    lm.config._attn_implementation = 'eager'
    assert not use_padding_free(lm)
    with pytest.raises(UserError, match=r'model\.padding_free: found true, but its attn_implementation is eager'):
        use_padding_free(lm, True)

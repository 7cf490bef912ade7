"""The dual-head network: no leak, no padding effect, nothing run that is not asked for."""

from typing import get_args

import pytest
import torch
from composer.models import HuggingFaceModel
from stock import stock_classifier
from tiny import KINDS, LABELS, WORDS, tiny_lm, tiny_network, tiny_tokenizer, triplet, triplets
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertLMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)

from dhrd_plugin import apply_reasoning_head
from dhrd_plugin.data.collator import Layout, Markers, TripletCollator
from dhrd_plugin.errors import UserError
from dhrd_plugin.models.network import DualHeadNetwork

pytestmark = pytest.mark.usefixtures('one_thread')

HEADS = [('mlp', 'last'), ('verbalizer', 'last'), ('mlp', 'mean')]


def collate(rows, **options):
    batch = TripletCollator(tiny_tokenizer(), LABELS, **options)(rows)
    batch.pop('labels')
    return batch


def sequence_lengths(network):
    """Fills with the sequence length of every later forward pass of the backbone."""
    lengths = []
    network.backbone.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs['input_ids'].shape[1]), with_kwargs=True
    )
    return lengths


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize(('head', 'pooling'), HEADS)
@pytest.mark.parametrize('side', ['right', 'left'])
@pytest.mark.parametrize('layout', get_args(Layout))
def test_no_rationale_or_answer_token_reaches_the_class_logits(kind, head, pooling, side, layout):
    network = tiny_network(kind, head, pooling).eval()
    batch = collate(triplets(), padding_side=side, layout=layout)
    columns = torch.arange(batch['input_ids'].shape[1])
    after = (columns > batch['pool_index'][:, None]) & batch['attention_mask'].bool()
    assert after.any(1).sum() == 6
    expected = network(**batch, return_reasoning_loss=True)
    for seed in range(3):
        torch.manual_seed(seed)
        noise = torch.randint(len(WORDS), batch['input_ids'].shape)
        changed = network(
            **{**batch, 'input_ids': torch.where(after, noise, batch['input_ids'])}, return_reasoning_loss=True
        )
        assert torch.equal(changed.logits, expected.logits)
        assert not torch.equal(changed.reasoning_loss, expected.reasoning_loss)
    # The gradient says the same: the logits do not depend on those states.
    embedded = network.backbone.get_input_embeddings().weight
    (grad,) = torch.autograd.grad(network(**batch, return_reasoning_loss=True).logits.sum(), embedded)
    span = batch['attention_mask'].bool() & ~after
    unseen = set(batch['input_ids'][after].tolist()) - set(batch['input_ids'][span].tolist())
    assert unseen and not grad[sorted(unseen)].any()


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize(('head', 'pooling'), HEADS)
@pytest.mark.parametrize('reasoning', [True, False])
def test_the_padding_side_does_not_matter(kind, head, pooling, reasoning):
    network = tiny_network(kind, head, pooling).eval()
    left, right = (
        network(**collate(triplets(), padding_side=side), return_reasoning_loss=reasoning) for side in ('left', 'right')
    )
    torch.testing.assert_close(left.logits, right.logits, atol=1e-5, rtol=1e-5)
    if reasoning:
        torch.testing.assert_close(left.reasoning_loss, right.reasoning_loss, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize('kind', KINDS)
def test_reasoning_off_runs_no_rationale_token(kind):
    network = tiny_network(kind).eval()
    lengths = sequence_lengths(network)
    rows = triplets()
    longest = max(len(row['input_text'].split()) for row in rows)
    batch = collate(rows)
    plain = network(**batch)
    bare = network(**collate(rows, reasoning=False))
    assert lengths == [longest, longest]
    assert torch.equal(plain.logits, bare.logits)
    assert plain.reasoning_loss is None
    both = network(**batch, return_reasoning_loss=True)
    assert lengths[2] == batch['input_ids'].shape[1] > longest
    torch.testing.assert_close(both.logits, plain.logits, atol=1e-5, rtol=1e-5)
    network(**collate(rows, padding_side='left'))
    assert lengths[3] < batch['input_ids'].shape[1] + longest  # columns that are all padding do not run


@pytest.mark.parametrize('rows', [[triplet(0, 3, None), triplet(1, 5, None)], triplets()], ids=['none', 'some'])
def test_rows_without_a_target_give_zero(rows):
    network = tiny_network()
    loss = network(**collate(rows), return_reasoning_loss=True).reasoning_loss
    loss.mean().backward()
    assert [float(x) == 0 for x in loss] == [row['rationale'] is None for row in rows]
    assert all(bool(p.grad.isfinite().all()) for p in network.parameters() if p.grad is not None)


@pytest.mark.parametrize('reasoning', [True, False])
@pytest.mark.parametrize('bias', [True, False])
def test_every_parameter_has_a_gradient_even_where_reasoning_is_off(reasoning, bias):
    """DDP waits for all of them."""
    network = tiny_network()
    if bias:  # Phi's LM head has one
        network.lm_head.bias = torch.nn.Parameter(torch.zeros(network.lm_head.out_features))
    out = network(**collate([triplet(0, 4, None)]), return_reasoning_loss=reasoning)
    out.logits.sum().backward() if not reasoning else (out.logits.sum() + out.reasoning_loss.mean()).backward()
    assert [name for name, p in network.named_parameters() if p.grad is None] == []
    assert not network.lm_head.weight.grad.any()


def test_the_default_pool_index_is_the_last_real_token():
    network = tiny_network().eval()
    for side in ('left', 'right'):
        batch = collate(triplets(), reasoning=False, padding_side=side)
        expected = network(**batch).logits
        del batch['pool_index']
        assert torch.equal(network(**batch).logits, expected)


@pytest.mark.parametrize('stock', [False, True])
def test_a_rationale_without_a_pool_index_is_refused(stock):
    network = apply_reasoning_head(stock_classifier()).model if stock else tiny_network()
    batch = {key: value for key, value in collate(triplets()).items() if key not in ('pool_index', 'labels')}
    with pytest.raises(UserError, match=r'^pool_index: missing beside reasoning_labels; expected \[B\]'):
        network(**batch, return_reasoning_loss=True)


def test_mean_pooling_does_not_see_a_broken_state_behind_the_input():
    from dhrd_plugin.models.heads import pool

    hidden = torch.ones(1, 3, 2)
    hidden[0, 2] = float('inf')
    assert pool(hidden, torch.ones(1, 3), torch.tensor([1]), 'mean').tolist() == [[1, 1]]


def small(config):
    return config(vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)


@pytest.mark.parametrize(
    ('model', 'reason'),
    [
        (lambda: BertLMHeadModel(small(BertConfig)), 'an encoder reads the rationale'),
        (
            lambda: T5ForConditionalGeneration(T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=1)),
            'expected a decoder-only causal LM',
        ),
        (lambda: tiny_lm().model, 'expected a decoder-only causal LM'),
    ],
)
def test_what_is_no_decoder_is_refused_in_one_line(model, reason):
    with pytest.raises(UserError) as error:
        DualHeadNetwork(model(), 2)
    assert reason in str(error.value) and '\n' not in str(error.value)


@pytest.mark.parametrize('options', [{'head': 'conv'}, {'pooling': 'max'}, {'norm': True, 'head': 'linear'}])
def test_an_unknown_head_or_pooling_is_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        DualHeadNetwork(tiny_lm(), 2, **options)


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('tied', [True, False])
def test_markers_as_tokens_grow_the_vocabulary(kind, tied):
    tokenizer, network = tiny_tokenizer(), tiny_network(kind, tied=tied)
    markers = Markers('<why>', '<so>', as_tokens=True)
    markers.add_to(tokenizer)
    before = [network.backbone.get_input_embeddings().weight.detach().clone(), network.lm_head.weight.detach().clone()]
    network.resize_token_embeddings(len(tokenizer))
    assert network.lm_head.weight.shape[0] == len(tokenizer)
    for old, layer in zip(before, (network.backbone.get_input_embeddings(), network.lm_head)):
        assert torch.equal(layer.weight[:-2], old)
        assert torch.equal(layer.weight[-2:], old.mean(0).expand(2, -1))
    assert (network.lm_head.weight is network.backbone.get_input_embeddings().weight) == tied
    batch = TripletCollator(tokenizer, LABELS, markers=markers)(triplets())
    assert int(batch.pop('labels').numel()) and int(batch['input_ids'].max()) == len(tokenizer) - 1
    out = network(**batch, return_reasoning_loss=True)
    (out.logits.sum() + out.reasoning_loss.sum()).backward()
    assert network.lm_head.weight.grad[-2:].any()


ROPES = {
    'llama': {'max_position_embeddings': 16, 'rope_scaling': {'rope_type': 'dynamic', 'factor': 4.0}},
    'phi3': {
        'max_position_embeddings': 64,
        'original_max_position_embeddings': 16,
        'rope_scaling': {'type': 'longrope', 'short_factor': [1.0] * 4, 'long_factor': [4.0, 3.0, 2.0, 1.5]},
    },
}


@pytest.mark.parametrize('stock', [False, True])
@pytest.mark.parametrize('kind', ROPES)
def test_a_rationale_that_would_turn_the_positions_of_its_input_is_refused(kind, stock):
    shape = {**tiny_lm(tied=True).config.to_dict(), **ROPES[kind]}
    config = AutoConfig.for_model(
        kind, **{k: v for k, v in shape.items() if k not in ('model_type', 'rope_parameters')}
    )
    torch.manual_seed(0)
    if stock:
        config.update({'id2label': dict(enumerate(LABELS))})
        model = HuggingFaceModel(AutoModelForSequenceClassification.from_config(config), tiny_tokenizer())
        network = apply_reasoning_head(model).model.eval()
    else:
        network = DualHeadNetwork(AutoModelForCausalLM.from_config(config), len(LABELS)).eval()
    torch.nn.init.normal_(network.score.weight if stock else network.classifier.out_proj.weight, std=0.3)
    short, long = (collate([triplet(1, words=6, reason=words)]) for words in (3, 30))
    torch.testing.assert_close(network(**short, return_reasoning_loss=True).logits, network(**short).logits)
    with pytest.raises(UserError, match=f'beyond 16 the RoPE of this {kind} .* expected max_seq_len: 16, or less'):
        network(**long, return_reasoning_loss=True)
    torch.testing.assert_close(network(**long).logits, network(**short).logits)

"""Every kind of decoder that transformers has, tiny and random: it is right, or refused by the probe in one line."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from backbones import EXPERTS, KINDS, LEFT_MOVES, REFUSED, RIGHT, UNPADDED, tiny_backbone, tiny_config
from tiny import LABELS, VOCAB, tiny_tokenizer, triplets
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from dhrd_plugin.data.collator import TripletCollator
from dhrd_plugin.errors import UserError
from dhrd_plugin.export.write import network_state, write_slim
from dhrd_plugin.models.build import build_causal_lm, load_slim
from dhrd_plugin.models.composer_model import ComposerDualHeadClassifier
from dhrd_plugin.models.network import DualHeadNetwork
from dhrd_plugin.models.padding_free import use_padding_free
from dhrd_plugin.models.probe import check_classifier, check_decoder, decoder_of

pytestmark = pytest.mark.usefixtures('one_thread')


def batch_of(side='right'):
    batch = TripletCollator(tiny_tokenizer(), LABELS, padding_side=side)(triplets(4))
    return batch, batch.pop('labels')


@pytest.mark.parametrize('name', KINDS)
def test_a_backbone_is_right(name, tmp_path):
    kind, more = KINDS[name]
    model = tiny_backbone(kind, more)
    network = DualHeadNetwork(model, len(LABELS))
    causal_lm, (batch, labels) = network.causal_lm, batch_of()

    network.train()
    out = network(**batch, return_reasoning_loss=True)
    (F.cross_entropy(out.logits, labels) + out.reasoning_loss.mean()).backward()
    assert out.reasoning_loss.isfinite().all() and (out.reasoning_loss > 0).sum() == 3
    for part in (network.classifier.dense, network.lm_head, network.backbone.get_input_embeddings()):
        assert part.weight.grad.isfinite().all() and part.weight.grad.any()

    network.eval()
    with torch.no_grad():
        out = network(**batch, return_reasoning_loss=True)
        check_loss(causal_lm, batch, out)
        check_leak(network, batch, out, 1e-6 if name in EXPERTS else 0.0)
        check_left(network, out, name)
        check_unpadded(network, batch, out, name)
        check_export(network, tmp_path)


def check_loss(causal_lm, batch, out):
    """The chunked loss is the cross-entropy of the model's own logits."""
    own = causal_lm(input_ids=batch['input_ids'], attention_mask=batch['attention_mask']).logits[:, :-1]
    targets = batch['reasoning_labels'][:, 1:]
    losses = F.cross_entropy(own.transpose(1, 2).float(), targets, reduction='none')
    wanted = losses.sum(1) / (targets != -100).sum(1).clamp(min=1)
    torch.testing.assert_close(out.reasoning_loss, wanted, atol=1e-5, rtol=1e-5)


def check_leak(network, batch, out, tolerance):
    """No token after the input moves the class logits."""
    columns = torch.arange(batch['input_ids'].shape[1])
    after = (columns > batch['pool_index'][:, None]) & batch['attention_mask'].bool()
    ids = torch.where(after, (batch['input_ids'] + 7) % len(VOCAB), batch['input_ids'])
    changed = network(**{**batch, 'input_ids': ids}, return_reasoning_loss=True)
    assert float((changed.logits - out.logits).abs().max()) <= tolerance
    assert not torch.equal(changed.reasoning_loss, out.reasoning_loss)


def check_left(network, out, name):
    batch, _ = batch_of('left')
    assert network.pads_left == (name not in LEFT_MOVES)
    if not network.pads_left:
        with pytest.raises(UserError, match='padding_side: found padding on the left, which changes what'):
            network(**batch, return_reasoning_loss=True)
        return
    left = network(**batch, return_reasoning_loss=True)
    torch.testing.assert_close(left.logits, out.logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(left.reasoning_loss, out.reasoning_loss, atol=1e-4, rtol=1e-4)


def check_unpadded(network, batch, out, name):
    """Rows that run together are what they are alone, or that is refused."""
    other = copy.deepcopy(network)
    try:
        other.padding_free, other.longest_unpadded = True, use_padding_free(other.causal_lm)
    except UserError as error:
        assert name not in UNPADDED and 'model.padding_free: found true, but ' in str(error)
        return
    found = other(**batch, return_reasoning_loss=True)
    torch.testing.assert_close(found.logits, out.logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.reasoning_loss, out.reasoning_loss, atol=1e-4, rtol=1e-4)


def check_export(network, folder):
    tokenizer = tiny_tokenizer()
    model = ComposerDualHeadClassifier(network, tokenizer, LABELS)
    write_slim(model.get_metadata(), network_state(model.state_dict()), folder / 'slim')
    texts = [row['input_text'] for row in triplets(4)]
    inputs = tokenizer(texts, padding=True, return_tensors='pt')
    wanted, found = network(**inputs).logits, load_slim(folder / 'slim')(**inputs).logits
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    assert wanted.std(0).min() > 1e-4  # not one answer for all


@pytest.mark.parametrize('name', REFUSED)
def test_a_backbone_that_would_be_wrong_is_refused(name):
    more, words = REFUSED[name]
    model = tiny_backbone(name.split(' ')[0], more)
    with pytest.raises(UserError) as error:
        DualHeadNetwork(model, 2)
    assert words in str(error.value) and '\n' not in str(error.value)
    assert type(model).__name__ in str(error.value)


def test_a_soft_cap_is_found_at_the_start_of_training():
    """Where logits are too small to meet it."""
    model = AutoModelForCausalLM.from_config(tiny_config('gemma2', {'initializer_range': 0.002}))
    with pytest.raises(UserError, match='final_logit_softcapping'):
        check_decoder(model)
    model.config.final_logit_softcapping = None
    assert check_decoder(model)


def test_a_key_that_does_nothing_is_not_refused():
    model = tiny_backbone('llama', {})
    model.config.final_logit_softcapping = 30.0
    assert check_decoder(model)


def test_the_probe_leaves_everything_as_it_was():
    model = tiny_backbone('gpt2', {})
    model.train()
    model.transformer.h[0].eval()
    modes = [module.training for module in model.modules()]
    state, before = torch.get_rng_state(), {name: value.clone() for name, value in model.state_dict().items()}
    check_decoder(model)
    assert torch.equal(state, torch.get_rng_state())
    assert modes == [module.training for module in model.modules()]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(weight.grad is None for weight in model.parameters())
    assert not [module for module in model.modules() if module._forward_pre_hooks or module._forward_hooks]


def test_a_model_without_weights_is_not_run():
    with torch.device('meta'):
        model = AutoModelForCausalLM.from_config(tiny_config('gemma2', {}))
    assert check_decoder(model)


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_weights_that_are_no_numbers_are_refused(value):
    model = tiny_backbone('llama', {})
    model.model.norm.weight.data[0] = value
    with pytest.raises(UserError, match='LlamaForCausalLM: its states of 8 tokens are not finite'):
        check_decoder(model)


def test_of_a_model_with_images_the_text_part_is_built(tmp_path):
    """Its export is the text part's as well."""
    model = tiny_backbone('gemma3', RIGHT['gemma3'])
    model.save_pretrained(tmp_path)
    ids = torch.arange(6, 14)[None]
    for found in (build_causal_lm(str(tmp_path)), DualHeadNetwork(model, 2).causal_lm):
        assert type(found).__name__ == 'Gemma3ForCausalLM' and found.config.model_type == 'gemma3_text'
        assert type(decoder_of(found)).__name__ == 'Gemma3TextModel'
        torch.testing.assert_close(found(input_ids=ids).logits, model(input_ids=ids).logits)
    drawn = build_causal_lm(str(tmp_path), pretrained=False, config_overrides={'num_hidden_layers': 1})
    assert len(decoder_of(drawn).layers) == 1  # of the text part


@pytest.mark.parametrize(
    ('kind', 'more', 'words'),
    [
        ('gemma2', {}, 'its config sets final_logit_softcapping 30.0'),
        ('bert', {}, 'an encoder reads the rationale'),
        ('bert', {'is_decoder': True}, 'its causal LM is not a decoder and an LM head alone'),
        ('xlnet', {'d_inner': 24}, 'an encoder reads the rationale'),
        ('bart', {}, 'an encoder reads the rationale'),
    ],
)
def test_a_classifier_that_would_be_wrong_is_refused(kind, more, words):
    model = AutoModelForSequenceClassification.from_config(tiny_config(kind, more))
    with pytest.raises(UserError) as error:
        check_classifier(model)
    assert words in str(error.value) and '\n' not in str(error.value)


STOCK = ['biogpt', 'bloom', 'ctrl', 'falcon', 'gemma', 'gpt2', 'gpt_neo', 'gpt_neox', 'gptj', 'jetmoe', 'llama']
STOCK += ['mistral', 'mixtral', 'mpt', 'openai-gpt', 'opt', 'opt-350m', 'phi', 'qwen2', 'qwen3', 'starcoder2']


@pytest.mark.parametrize('name', STOCK)
def test_a_classifier_that_is_right_is_not(name):
    kind, more = KINDS[name]
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        check_classifier(AutoModelForSequenceClassification.from_config(tiny_config(kind, more)))

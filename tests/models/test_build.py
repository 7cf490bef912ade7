"""What is loaded before a run: the tokenizer's pad token, the backbone, its adapters."""

import pytest
import torch
from tiny import byte_tokenizer, tiny_lm, tiny_network

from dhrd_plugin.errors import UserError
from dhrd_plugin.models.build import add_lora, build_causal_lm, build_tokenizer

pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.mark.parametrize(('pad', 'expected'), [(-1, '<end>'), (None, '<end>'), (10**6, '<end>'), (65, None)])
def test_a_tokenizer_without_a_pad_token_pads_with_the_models_or_with_its_end(tmp_path, pad, expected):
    tokenizer = byte_tokenizer()
    expected = expected or tokenizer.convert_ids_to_tokens(pad)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    model = tiny_lm()
    model.config.pad_token_id = pad
    model.config.save_pretrained(tmp_path)
    assert build_tokenizer(str(tmp_path)).pad_token == expected


def test_a_checkpoint_without_some_weights_is_refused(tmp_path):
    """They would be drawn at random."""
    tiny_lm().save_pretrained(tmp_path)
    build_causal_lm(str(tmp_path))
    tiny_lm().model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r'lacks 1 of the weights of a LlamaForCausalLM, such as lm_head\.weight'):
        build_causal_lm(str(tmp_path))
    tiny_lm(tied=True).model.save_pretrained(tmp_path)  # a base model is whole where the two are tied
    build_causal_lm(str(tmp_path))


@pytest.mark.parametrize(
    'lora', [{'modules_to_save': ['lm_head']}, {'modules_to_save': ['norm']}, {'trainable_token_indices': [3]}]
)
def test_what_lora_would_train_beside_its_adapters_is_refused(lora):
    """It cannot be merged, and was found out by the export."""
    with pytest.raises(UserError, match=f'model.lora.{next(iter(lora))}: found .* expected adapters alone'):
        add_lora(tiny_network(), lora)


@pytest.mark.parametrize('lora', [{'target_modules': ['q_proj', 'lm_head']}, {'target_modules': '.*head'}])
def test_adapters_of_the_lm_head_are_refused(lora):
    """The chunked loss reads its weight alone, so they would never be trained."""
    with pytest.raises(UserError, match=r'model\.lora\.target_modules: found an adapter on the LM head'):
        add_lora(tiny_network(), lora)


def test_all_linear_layers_are_those_of_the_decoder():
    network = tiny_network()
    add_lora(network, {'target_modules': 'all-linear', 'r': 2})
    assert type(network.lm_head) is torch.nn.Linear
    assert not [name for name, _ in network.classifier.named_parameters() if 'lora' in name]

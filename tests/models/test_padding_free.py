"""Without padding the network has the losses and gradients that it has with it."""

import copy
from types import SimpleNamespace
from typing import get_args

import pytest
import torch
from backbones import RIGHT, tiny_config
from runs import losses, write_run
from safetensors.torch import load_file
from tiny import KINDS, LABELS, relative_error, tiny_lm, tiny_network, tiny_tokenizer, triplets
from transformers import AutoModelForCausalLM

from dhrd_plugin import load_config, train
from dhrd_plugin.data.collator import Layout, TripletCollator
from dhrd_plugin.errors import UserError
from dhrd_plugin.models import padding_free
from dhrd_plugin.models.extent import Extent
from dhrd_plugin.models.network import DualHeadNetwork
from dhrd_plugin.models.padding_free import one_kernel, use_padding_free

pytestmark = pytest.mark.usefixtures('one_thread')

# Dropout draws by shape, and the shapes differ.
QUIET = [
    'max_duration=8ba',
    'eval_interval=8ba',
    'save_folder=null',
    'autoresume=false',
    'model.classifier_dropout=0',
    'model.lora.lora_dropout=0',
]


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
@pytest.mark.parametrize('layout', get_args(Layout))
def test_losses_and_gradients_are_the_same(kind, pooling, side, lora, layout):
    network = tiny_network(kind, pooling=pooling, lora=lora)
    network.causal_lm.config._attn_implementation = 'sdpa'
    batch = TripletCollator(tiny_tokenizer(), LABELS, padding_side=side, layout=layout)(triplets())
    batch.pop('labels')
    expected, expected_grads = step(network, batch)
    other = copy.deepcopy(network)
    other.padding_free = True
    use_padding_free(other.causal_lm)
    found, grads = step(other, batch)
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.reasoning_loss, expected.reasoning_loss, rtol=1e-5, atol=1e-5)
    assert relative_error(grads, expected_grads) < 1e-4


@pytest.mark.parametrize(
    ('major', 'size', 'dtype', 'found'),
    [
        (8, 64, torch.bfloat16, True),
        (7, 64, torch.bfloat16, False),
        (9, 264, torch.bfloat16, False),
        (9, 64, torch.float32, False),
    ],
)
def test_one_kernel_takes_all_rows_on_ampere_and_later(monkeypatch, major, size, dtype, found):
    states = SimpleNamespace(is_cuda=True, device='cuda', dtype=dtype, shape=(1, 2, 8, size))
    monkeypatch.setattr(torch.cuda, 'get_device_properties', lambda device: SimpleNamespace(major=major))
    monkeypatch.setattr(padding_free, '_precision', lambda states: states.dtype)
    assert one_kernel(states, states) is found


def test_it_is_refused_where_it_cannot_be():
    lm = tiny_lm('llama')
    lm.config._attn_implementation = 'eager'
    with pytest.raises(UserError, match=r'model\.padding_free: found true, but its attn_implementation is eager'):
        use_padding_free(lm)


@pytest.mark.parametrize('kind', ['mistral', 'gemma3_text', 'llama4_text'])
def test_rows_longer_than_a_window(kind):
    """Attention keeps the window of each row; where a layer does not tell it, rows that long run padded."""
    window = {'llama4_text': {'attention_chunk_size': 8}}.get(kind, {'sliding_window': 8})
    config = tiny_config(kind, {**RIGHT.get(kind, {}), **window, 'attn_implementation': 'sdpa'})
    torch.manual_seed(0)
    network = DualHeadNetwork(AutoModelForCausalLM.from_config(config), len(LABELS)).eval()
    batch = TripletCollator(tiny_tokenizer(), LABELS)(triplets())
    batch.pop('labels')
    assert batch['attention_mask'].sum(1).max() > 8 and not batch['attention_mask'].all()
    expected, expected_grads = step(network, batch)
    other = copy.deepcopy(network)
    other.padding_free, other.longest_unpadded = True, use_padding_free(other.causal_lm)
    assert other.longest_unpadded == (8 if kind == 'llama4_text' else None)
    assert other.runs_unpadded(Extent.read(batch['attention_mask'])) == (kind != 'llama4_text')
    found, grads = step(other, batch)
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.reasoning_loss, expected.reasoning_loss, rtol=1e-5, atol=1e-5)
    assert relative_error(grads, expected_grads) < 1e-4


@pytest.fixture(scope='module')
def losses_and_export(tmp_path_factory):
    """By layout, the losses of a short run from the YAML, and its export."""
    folder = tmp_path_factory.mktemp('layouts')
    yaml, found = write_run(folder), {}
    for free in (False, True):
        overrides = [f'output_dir={folder}/{free}', f'model.padding_free={free}', *QUIET]
        train(load_config(yaml, overrides)).close()
        series = [float(loss) for _, loss in sorted(losses(folder / str(free)).items())]
        found[free] = series, folder / str(free) / 'slim'
    return found


def test_it_is_a_key_of_the_yaml_and_changes_no_loss(losses_and_export):
    (padded, _), (free, _) = losses_and_export[False], losses_and_export[True]
    assert len(free) == 8 and free == pytest.approx(padded, rel=1e-4)  # logged with four digits


def test_the_export_knows_nothing_of_it(losses_and_export):
    padded, free = (losses_and_export[key][1] for key in (False, True))
    assert (free / 'config.json').read_text() == (padded / 'config.json').read_text()
    weights, expected = (load_file(folder / 'model.safetensors') for folder in (free, padded))
    assert weights.keys() == expected.keys()
    for name, value in weights.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-4)

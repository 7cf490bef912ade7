"""No export is published that answers otherwise than the model it was made from."""

import json

import pytest
import torch
from composer.models import HuggingFaceModel
from stock import collator as stock_collator
from stock import fit, stock_classifier, tokenised
from tiny import LABELS, tiny_classifier, tiny_network, tiny_tokenizer, triplet
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, CTRLConfig, LlamaForSequenceClassification
from transformers.modeling_outputs import SequenceClassifierOutput

from dhrd_plugin import AuxiliaryReasoningLoss, ComposerDualHeadClassifier, DropReasoningHead, TripletCollator
from dhrd_plugin.errors import UserError
from dhrd_plugin.export.probe import ask, find_difference, probe_rows
from dhrd_plugin.export.write import write_slim
from dhrd_plugin.models.build import load_slim
from dhrd_plugin.models.network import DualHeadNetwork

pytestmark = pytest.mark.usefixtures('one_thread')

TEXTS = ['w1 w2 w3', 'w4', 'w5 w6 w7 w8 w9 <pad>', 'w1 w2<pad>', 'w3 w4 unheard', '<pad>', 'w7 w8 <s>']


def pads_with(token, **options):
    tokenizer = tiny_tokenizer(**options)
    tokenizer.pad_token = token
    return tokenizer


# Whether none of its inputs can end in its pad token.
TOKENIZERS = {
    'a pad token of its own, which a text may name': (lambda: tiny_tokenizer(), False),
    'eos, which it appends': (lambda: pads_with('<s>', eos=True), False),
    'eos, which it appends, and no text names': (lambda: pads_with('<s>', eos=True, apart=True), False),
    'unk': (lambda: pads_with('<unk>'), False),
    'unk, and no text names a special token': (lambda: pads_with('<unk>', apart=True), False),
    'a pad token that no text names': (lambda: tiny_tokenizer(apart=True), True),
}


@pytest.mark.parametrize('name', TOKENIZERS)
def test_training_and_export_pool_the_same_token(tmp_path, name):
    make, stock = TOKENIZERS[name]
    tokenizer = make()
    model = ComposerDualHeadClassifier(tiny_network(head='linear'), tokenizer, LABELS).eval()
    write_slim(model.get_metadata(), model.network.state_dict(), tmp_path / 'slim')
    rows = [{**triplet(i, reason=None), 'input_text': text} for i, text in enumerate(TEXTS)]
    exported = load_slim(tmp_path / 'slim')
    assert type(exported).__name__ == ('LlamaForSequenceClassification' if stock else 'SlimClassifier')
    encoded = AutoTokenizer.from_pretrained(tmp_path / 'slim')(TEXTS, padding=True, return_tensors='pt')
    with torch.no_grad():
        expected = model.eval_forward(TripletCollator(tokenizer, LABELS)(rows))
        torch.testing.assert_close(exported(**encoded).logits, expected, atol=1e-5, rtol=0)


def test_a_stock_classifier_is_trained_with_the_pooling_that_it_is_exported_with(tmp_path):
    tokenizer = pads_with('<s>', eos=True)
    inner = stock_classifier(pad_token_id=tokenizer.pad_token_id).model
    rows = [{**tokenizer(text), 'label': i % 3, 'rationale': 'w1 w2'} for i, text in enumerate(TEXTS + ['w9 w9'])]
    collate = stock_collator()
    collate.tokenizer = tokenizer
    trainer, *_ = fit(
        HuggingFaceModel(inner, tokenizer),
        [AuxiliaryReasoningLoss()],
        rows,
        collate,
        callbacks=[DropReasoningHead(str(tmp_path / 'slim'))],
    )
    exported = load_slim(tmp_path / 'slim')
    encoded = AutoTokenizer.from_pretrained(tmp_path / 'slim')(TEXTS, padding=True, return_tensors='pt')
    batch = collate(rows[: len(TEXTS)])
    with torch.no_grad():
        expected = trainer.state.model.eval()(batch).logits
        torch.testing.assert_close(exported(**encoded).logits, expected, atol=1e-5, rtol=0)


SHAPE = {'vocab_size': 68, 'pad_token_id': 0}
# Hugging Face's classifier for CTRL names its head otherwise, that for BERT has a head with a layer more.
OTHERS = {
    'ctrl': lambda: CTRLConfig(**SHAPE, n_embd=16, n_layer=2, n_head=2, dff=24, n_positions=64),
    'bert': lambda: BertConfig(
        **SHAPE, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, is_decoder=True
    ),
}


@pytest.mark.parametrize('kind', OTHERS)
def test_a_stock_class_that_would_load_a_random_head_is_not_used(tmp_path, kind):
    torch.manual_seed(0)
    try:
        network = DualHeadNetwork(AutoModelForCausalLM.from_config(OTHERS[kind]()), len(LABELS), 'linear')
    except UserError:
        pytest.skip('which is not trained at all')
    model = ComposerDualHeadClassifier(network, tiny_tokenizer(apart=True), LABELS).eval()
    write_slim(model.get_metadata(), network.state_dict(), tmp_path / 'slim')
    batch = TripletCollator(model.tokenizer, LABELS)([triplet(i, 2 + i, None) for i in range(5)])
    exported = load_slim(tmp_path / 'slim')
    assert type(exported).__name__ == 'SlimClassifier'
    with torch.no_grad():
        found = exported(batch['input_ids'], batch['attention_mask']).logits
        torch.testing.assert_close(found, model.eval_forward(batch), atol=1e-5, rtol=0)


class MeanPooled(LlamaForSequenceClassification):
    """A user's own forward pass, which no stock class has."""

    def forward(self, input_ids=None, attention_mask=None, labels=None):
        hidden = self.model(input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask[..., None]
        logits = self.score((hidden * mask).sum(1) / mask.sum(1))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss, logits)  # pyright: ignore


def test_what_differs_from_the_live_model_is_not_published(tmp_path):
    inner = stock_classifier().model
    inner.__class__ = MeanPooled
    out = tmp_path / 'slim'
    out.mkdir()
    with pytest.raises(UserError, match=rf'{out}: not written, .*: its logits differ by \d.* from those of the model'):
        fit(
            HuggingFaceModel(inner, tiny_tokenizer()),
            [AuxiliaryReasoningLoss()],
            tokenised(),
            stock_collator(),
            callbacks=[DropReasoningHead(str(out))],
        )
    assert [*tmp_path.rglob('*')] == [out]


@pytest.mark.parametrize('several', [False, True])
def test_a_folder_that_makes_other_probabilities_of_the_logits_differs(tmp_path, several):
    model = tiny_classifier(multi_label=several)
    out = write_slim(model.get_metadata(), model.network.state_dict(), tmp_path / 'slim')
    inputs = probe_rows(None, 68, 0, True)
    known = {'inputs': inputs, 'expected': ask(model.network, inputs), 'multi_label': several}
    assert find_difference(out, [], model.network, **known) is None
    config = json.loads((out / 'config.json').read_text())
    other = 'single_label_classification' if several else 'multi_label_classification'
    (out / 'config.json').write_text(json.dumps({**config, 'problem_type': other}))
    assert find_difference(out, [], model.network, **known) == f'its config has problem_type {other}'


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_weights_that_are_not_finite_take_no_exports_place(tmp_path, value):
    model = tiny_classifier()
    state = model.network.state_dict()
    write_slim(model.get_metadata(), state, tmp_path / 'slim')
    before = {path.name: path.read_bytes() for path in (tmp_path / 'slim').iterdir()}
    state['classifier.out_proj.bias'] = torch.tensor([0.0, value, 0.0])
    with pytest.raises(UserError, match=r'classifier\.out_proj\.bias: found weights that are not finite'):
        write_slim(model.get_metadata(), state, tmp_path / 'slim')
    assert {path.name: path.read_bytes() for path in (tmp_path / 'slim').iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ['slim']


def test_weights_that_fp16_cannot_hold_are_refused(tmp_path):
    model = tiny_classifier()
    state = model.network.state_dict() | {'classifier.out_proj.bias': torch.tensor([0.0, 1e6, 0.0])}
    with pytest.raises(UserError, match=r'classifier\.out_proj\.bias: found weights that are not finite'):
        write_slim(model.get_metadata(), state, tmp_path / 'slim', torch.float16)
    write_slim(model.get_metadata(), state, tmp_path / 'slim', torch.bfloat16)


@pytest.mark.parametrize('head', ['mlp', 'linear'])
def test_several_chat_templates_travel_with_it(tmp_path, head):
    tokenizer = tiny_tokenizer(apart=True)
    tokenizer.chat_template = {'default': '{{ messages }}', 'tools': '{{ tools }}{{ messages }}'}
    model = ComposerDualHeadClassifier(tiny_network(head=head), tokenizer, LABELS)
    write_slim(model.get_metadata(), model.network.state_dict(), tmp_path / 'slim')
    assert AutoTokenizer.from_pretrained(tmp_path / 'slim').chat_template == tokenizer.chat_template
    assert not any(path.is_dir() for path in (tmp_path / 'slim').iterdir())  # of which an upload would know nothing


def test_neither_random_state_nor_modes_are_changed(tmp_path):
    model = tiny_classifier().train()
    model.network.causal_lm.eval()
    state, modes = torch.get_rng_state(), [module.training for module in model.modules()]
    write_slim(model.get_metadata(), model.network.state_dict(), tmp_path / 'slim', live=model.network)
    assert torch.equal(state, torch.get_rng_state())
    assert modes == [module.training for module in model.modules()]

"""The slim classifier: what is in the folder, and that it needs nothing of this package."""

import json
from functools import partial

import pytest
import torch
import transformers
from composer import Trainer
from composer.models import HuggingFaceModel
from elsewhere import load_elsewhere
from safetensors import safe_open
from stock import stock_classifier
from tiny import LABELS, exact, of_several, tiny_classifier, tiny_lm, tiny_network, tiny_tokenizer, triplet, triplets
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BloomConfig,
    LlamaConfig,
    MptConfig,
    PreTrainedModel,
)

from dhrd_plugin import AuxiliaryReasoningLoss, ComposerDualHeadClassifier, DropReasoningHead, TripletCollator
from dhrd_plugin.data.collator import Markers
from dhrd_plugin.data.data_spec import triplet_data_spec
from dhrd_plugin.errors import UserError
from dhrd_plugin.export.write import network_state, write_slim
from dhrd_plugin.models.build import add_lora, build_causal_lm, load_slim, merged_state
from dhrd_plugin.models.composer_model import describe
from dhrd_plugin.models.network import DualHeadNetwork
from dhrd_plugin.models.slim import SlimClassifier, SlimClassifierConfig
from dhrd_plugin.models.versions import DTYPE
from dhrd_plugin.problem_type import is_multi_label

pytestmark = pytest.mark.usefixtures('one_thread')

MODELS = {
    'llama-linear-tied': {'kind': 'llama', 'head': 'linear', 'tied': True},
    'gpt2-linear-untied': {'kind': 'gpt2', 'head': 'linear'},
    'qwen3-linear-lora': {'kind': 'qwen3', 'head': 'linear', 'lora': True, 'tied': True},
    'qwen2-mlp-untied': {'kind': 'qwen2', 'head': 'mlp'},
    'gpt2-mlp-lora': {'kind': 'gpt2', 'head': 'mlp', 'lora': True, 'tied': True},
    'llama-mlp-mean': {'kind': 'llama', 'head': 'mlp', 'pooling': 'mean', 'tied': True},
    'llama-linear-mean': {'kind': 'llama', 'head': 'linear', 'pooling': 'mean'},
    'qwen2-linear-verbalizer-lora': {'kind': 'qwen2', 'head': 'verbalizer', 'lora': True},
    'qwen3-mlp-norm': {'kind': 'qwen3', 'head': 'mlp', 'norm': True},
    'llama-linear-several': {'kind': 'llama', 'head': 'linear', 'multi_label': True},
    'gpt2-mlp-several-lora': {'kind': 'gpt2', 'head': 'mlp', 'lora': True, 'multi_label': True},
}
STOCK = {name: name.split('-')[1] == 'linear' and 'mean' not in name for name in MODELS}
# transformers 5 takes the tokenizer of every qwen2 for Qwen's own, which the tiny one is not.
STOCK['qwen2-linear-verbalizer-lora'] = False
ROWS = [triplet(i, 1 + i % 7, None) for i in range(12)]


def batch_of(model, rows):
    """The rows as the model is trained on them."""
    rows = of_several(rows) if model.multi_label else rows
    return TripletCollator(model.tokenizer, LABELS, multi_label=model.multi_label)(rows)


def train_and_export(options, out):
    """Three steps of both heads, then the callback."""
    model = tiny_classifier(tiny_tokenizer(bos=True, apart=True), **options)
    loader = DataLoader(triplets(8), 4, collate_fn=partial(batch_of, model))
    trainer = Trainer(
        model=model,
        train_dataloader=triplet_data_spec(loader),
        optimizers=torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01),
        max_duration='3ba',
        device='cpu',
        algorithms=[AuxiliaryReasoningLoss()],
        callbacks=[DropReasoningHead(str(out))],
        progress_bar=False,
    )
    trainer.fit()
    return model.eval()


@pytest.fixture(scope='module')
def exports(tmp_path_factory):
    """The trained models' logits, and what a process without the package makes of the folders."""
    root = tmp_path_factory.mktemp('exports')
    expected, labels = {}, {}
    for name, options in MODELS.items():
        model = train_and_export(options, root / name / 'slim')
        batch = batch_of(model, ROWS)
        labels[name] = batch['labels']
        with torch.no_grad():
            expected[name] = {'logits': model.eval_forward(batch), 'loss': model.loss(model(batch), batch)}
    return root, expected, load_elsewhere(root, [row['input_text'] for row in ROWS], labels)


@pytest.mark.parametrize('name', MODELS)
def test_the_logits_are_the_training_models(exports, name):
    _, expected, found = exports
    # Stock GPT-2 counts pads as positions; the exported tokenizer pads on the right.
    for key in ('logits',) if name == 'gpt2-linear-untied' else ('logits', 'left'):
        torch.testing.assert_close(found[name][key], expected[name]['logits'], atol=1e-5, rtol=0)
    torch.testing.assert_close(found[name]['loss'], expected[name]['loss'], atol=1e-5, rtol=0)
    assert expected[name]['logits'].std(0).min() > 1e-3  # not one answer for all


@pytest.mark.parametrize('name', MODELS)
def test_a_linear_head_is_a_stock_classifier(exports, name):
    root, _, found = exports
    stock = {'llama': 'LlamaFor', 'gpt2': 'GPT2For', 'qwen2': 'Qwen2For', 'qwen3': 'Qwen3For'}[name.split('-')[0]]
    assert found[name]['class'] == (f'{stock}SequenceClassification' if STOCK[name] else 'SlimClassifier')
    assert not any(found[name]['info'][key] for key in ('missing_keys', 'unexpected_keys', 'mismatched_keys'))
    code = {path.name for path in (root / name / 'slim').glob('*.py')}
    assert code == (set() if STOCK[name] else {'slim.py', 'heads.py'})


def test_the_config_tells_the_type_of_what_is_written(tmp_path):
    """A checkpoint in bf16 that was trained in fp32: whoever loads by its config would round the weights."""
    inner = stock_classifier().model.bfloat16()
    inner.save_pretrained(tmp_path / 'half')
    trained = AutoModelForSequenceClassification.from_pretrained(tmp_path / 'half', torch_dtype='auto')
    assert trained.dtype == torch.bfloat16
    model = HuggingFaceModel(trained.float(), tiny_tokenizer())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1e-3)
    slim = write_slim(describe(model), network_state(model.state_dict()), tmp_path / 'slim')
    found = AutoModelForSequenceClassification.from_pretrained(slim, torch_dtype='auto')
    assert {parameter.dtype for parameter in found.parameters()} == {torch.float32}
    assert all(torch.equal(value, trained.state_dict()[name]) for name, value in found.state_dict().items())


@pytest.mark.parametrize('name', MODELS)
def test_the_folder_holds_no_lm_head_no_adapters_and_no_pickle(exports, name):
    root, *_ = exports
    folder = root / name / 'slim'
    with safe_open(folder / 'model.safetensors', 'pt') as file:
        keys = list(file.keys())
    assert not [key for key in keys if 'lm_head' in key or 'lora' in key or 'base_layer' in key]
    assert {path.suffix for path in folder.iterdir()} <= {'.json', '.safetensors', '.py', '.txt', '.jinja', '.md'}
    assert not any(path.is_dir() for path in folder.iterdir())
    assert [path.name for path in folder.parent.iterdir()] == ['slim']  # no temporary folder beside it
    assert folder.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize('name', MODELS)
def test_labels_and_tokenizer_travel_with_it(exports, name):
    root, _, found = exports
    assert found[name]['id2label'] == dict(enumerate(LABELS))
    assert found[name]['label2id'] == {label: i for i, label in enumerate(LABELS)}
    assert found[name]['pad'] == [0, 0] and found[name]['padding_side'] == 'right'
    texts = [row['input_text'] for row in ROWS]
    assert found[name]['ids'] == tiny_tokenizer(bos=True, apart=True)(texts)['input_ids']
    assert str(root) not in (root / name / 'slim' / 'config.json').read_text()


@pytest.mark.parametrize('name', MODELS)
def test_a_pipeline_classifies_with_it(exports, name):
    _, expected, found = exports
    for answers, logits in zip(found[name]['pipeline'], expected[name]['logits'], strict=True):
        scores = {answer['label']: answer['score'] for answer in answers}
        probabilities = logits.sigmoid() if 'several' in name else logits.softmax(-1)
        torch.testing.assert_close(torch.tensor([scores[label] for label in LABELS]), probabilities, atol=1e-5, rtol=0)


@pytest.mark.parametrize('kind', ['llama', 'gpt2', 'dora'])
def test_merging_leaves_the_network_as_it_is(kind):
    network = tiny_network('llama' if kind == 'dora' else kind, lora=kind != 'dora')
    if kind == 'dora':
        add_lora(network, {'r': 2, 'lora_dropout': 0.0, 'use_dora': True, 'init_lora_weights': False})
        kind = 'llama'
    network = exact(network)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    merged = merged_state(network)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    bare = exact(tiny_network(kind))
    assert merged.keys() == bare.backbone.state_dict().keys()
    bare.backbone.load_state_dict(merged)
    batch = {'input_ids': torch.arange(12).view(2, 6) + 8, 'attention_mask': torch.ones(2, 6, dtype=torch.long)}
    found, expected = (net.backbone(**batch).last_hidden_state for net in (bare, network))
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('head', ['linear', 'mlp'])
def test_the_weights_dtype_can_be_chosen(tmp_path, dtype, head):
    model = tiny_classifier(head=head)
    write_slim(model.get_metadata(), model.network.state_dict(), tmp_path / 'slim', dtype)
    with safe_open(tmp_path / 'slim' / 'model.safetensors', 'pt') as file:
        assert {file.get_tensor(key).dtype for key in file.keys()} == {dtype}  # noqa: SIM118
    assert json.loads((tmp_path / 'slim' / 'config.json').read_text())[DTYPE] == str(dtype)[6:]


def test_added_markers_and_what_prediction_needs_travel_in_the_config(tmp_path):
    tokenizer, network = tiny_tokenizer(), tiny_network(head='linear')
    Markers('<why>', '<so>', as_tokens=True).add_to(tokenizer)
    network.resize_token_embeddings(len(tokenizer))
    info = {'markers': {'reason': '<why>', 'answer': '<so>', 'as_tokens': True}, 'max_seq_len': 40}
    model = ComposerDualHeadClassifier(network, tokenizer, LABELS, info=info)
    write_slim(model.get_metadata(), network.state_dict(), tmp_path / 'slim')
    config = json.loads((tmp_path / 'slim' / 'config.json').read_text())
    assert config['dhrd'] == {**info, 'task': None} and config['backbone']['vocab_size'] == len(tokenizer)


def test_what_is_from_before_the_norm_answers_as_it_did(tmp_path):
    """A checkpoint's metadata and an export's config that do not know of it."""
    model = tiny_classifier().eval()
    metadata = model.get_metadata()
    assert metadata['dhrd'].pop('norm') is False
    write_slim(metadata, model.network.state_dict(), tmp_path / 'slim')
    path = tmp_path / 'slim' / 'config.json'
    config = json.loads(path.read_text())
    assert config.pop('classifier_norm') is False
    path.write_text(json.dumps(config))
    batch = TripletCollator(model.tokenizer, LABELS)(ROWS)
    logits = load_slim(tmp_path / 'slim')(batch['input_ids'], batch['attention_mask']).logits
    assert torch.equal(logits, model.eval_forward(batch))


@pytest.mark.parametrize('head', ['linear', 'mlp'])
@pytest.mark.parametrize('several', [False, True], ids=['one label', 'several'])
def test_an_export_tells_nothing_of_the_export_that_it_was_trained_from(tmp_path, several, head):
    """A stock classifier of the other kind, calibrated, as the backbone."""
    first = tiny_classifier(tiny_tokenizer(apart=True), multi_label=not several, head='linear', tied=True)
    calibration = {'temperature': 2.0, 'rows': 5, 'ece_before': 0.1, 'ece_after': 0.0}
    best = {'metric': 'MulticlassAccuracy', 'dataloader_label': 'eval', 'value': 0.9, 'batch': 7, 'epoch': 1}
    state = first.network.state_dict()
    write_slim(first.get_metadata(), state, tmp_path / 'first', best=best, calibration=calibration)
    assert is_multi_label(load_slim(tmp_path / 'first').config) is not several

    network = DualHeadNetwork(build_causal_lm(str(tmp_path / 'first')), 2, head=head)
    model = ComposerDualHeadClassifier(network, first.tokenizer, ['no', 'yes'], multi_label=several)
    write_slim(model.get_metadata(), network.state_dict(), tmp_path / 'slim')
    config = load_slim(tmp_path / 'slim').config
    assert is_multi_label(config) is several and config.num_labels == 2
    assert config.dhrd == {'task': None, 'markers': None, 'max_seq_len': None}


def test_it_ends_its_construction_as_transformers_5_asks(monkeypatch):
    built = []
    monkeypatch.setattr(PreTrainedModel, 'post_init', lambda self: built.append(type(self).__name__))
    SlimClassifier(SlimClassifierConfig(backbone=tiny_lm().config))
    assert built[-1] == 'SlimClassifier'


# Whose ONNX file cannot be made, or would answer otherwise.
def llama_with(**rope):
    """Whose frequencies change with the length, beyond that of every row that an ONNX file is held against."""
    shape = {'vocab_size': 68, 'hidden_size': 16, 'intermediate_size': 24, 'num_hidden_layers': 2}
    rope |= {'factor': 4.0}
    return LlamaConfig(**shape, num_attention_heads=2, max_position_embeddings=16, rope_scaling=rope)


NO_ONNX = {
    'bloom': lambda: BloomConfig(hidden_size=16, n_layer=2, n_head=2, vocab_size=68),
    'dynamic': lambda: llama_with(rope_type='dynamic'),
    'longrope': lambda: llama_with(
        rope_type='longrope', original_max_position_embeddings=16, short_factor=[1.0] * 4, long_factor=[4.0] * 4
    ),
}
if transformers.__version__ < '5':
    NO_ONNX['mpt'] = lambda: MptConfig(d_model=16, n_heads=2, n_layers=2, max_seq_len=64, vocab_size=68)


@pytest.mark.parametrize('kind', NO_ONNX)
def test_what_onnx_cannot_say_alike_is_exported_without_it(tmp_path, kind):
    pytest.importorskip('onnxruntime')
    torch.manual_seed(0)
    network = DualHeadNetwork(AutoModelForCausalLM.from_config(NO_ONNX[kind]()), len(LABELS))
    model = ComposerDualHeadClassifier(network, tiny_tokenizer(), LABELS)
    out = tmp_path / 'slim'
    with pytest.raises(UserError, match=rf'onnx: .*; the export in {out} is whole without model.onnx') as error:
        write_slim(model.get_metadata(), network.state_dict(), out, onnx=True)
    assert '\n' not in str(error.value)
    assert sorted(path.name for path in out.glob('model*')) == ['model.safetensors']
    assert [path.name for path in tmp_path.iterdir()] == ['slim']
    load_slim(out)


@pytest.mark.parametrize('name', MODELS)
def test_onnx_runtime_gives_the_logits(tmp_path, name):
    """Of any batch and length, padded or not."""
    session_of = pytest.importorskip('onnxruntime').InferenceSession
    model = tiny_classifier(tiny_tokenizer(bos=True, apart=True), **MODELS[name]).eval()
    write_slim(model.get_metadata(), model.network.state_dict(), tmp_path / 'slim', onnx=True)
    session = session_of(str(tmp_path / 'slim' / 'model.onnx'))
    for rows in (ROWS, ROWS[:1], ROWS[5:8]):
        batch = TripletCollator(model.tokenizer, LABELS)(rows)
        inputs = {key: batch[key].numpy() for key in ('input_ids', 'attention_mask')}
        with torch.no_grad():
            expected = model.eval_forward(batch)
        torch.testing.assert_close(torch.from_numpy(session.run(None, inputs)[0]), expected, atol=1e-4, rtol=0)

"""What an export may replace: an earlier one, with nothing beside it."""

import json

import pytest
import torch
from test_write import MODELS
from tiny import LABELS, tiny_classifier, tiny_lm, tiny_tokenizer
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from dhrd_plugin.errors import UserError
from dhrd_plugin.export import from_checkpoint
from dhrd_plugin.export.place import check_place, foreign
from dhrd_plugin.export.write import network_state, write_slim

pytestmark = pytest.mark.usefixtures('one_thread')


def export(out, name='llama-linear-tied', **options):
    model = tiny_classifier(tiny_tokenizer(apart=True), **MODELS[name])
    return write_slim(model.get_metadata(), network_state(model.state_dict()), out, **options)


@pytest.mark.parametrize('name', ['llama-linear-tied', 'qwen2-mlp-untied'])
def test_an_earlier_export_is_replaced(tmp_path, name):
    out = export(tmp_path / 'slim', name)
    assert foreign(out) is None
    export(out, dtype=torch.bfloat16)  # of another kind: other files
    assert AutoModelForSequenceClassification.from_pretrained(out, torch_dtype='auto').dtype == torch.bfloat16
    assert [path.name for path in tmp_path.iterdir()] == ['slim']


def test_one_of_surgery_is_known_by_its_card(tmp_path):
    """A stock classifier's config has no key of ours."""
    out = export(tmp_path / 'slim')
    config = json.loads((out / 'config.json').read_text())
    del config['dhrd']
    (out / 'config.json').write_text(json.dumps(config))
    assert foreign(out) is None
    (out / 'README.md').write_text('# My model\n')
    assert foreign(out) == 'a model of other making'


@pytest.mark.parametrize('name', ['vocab.json', 'merges.txt', 'spiece.model'])
def test_the_tokenizers_own_files_belong_to_it(tmp_path, name):
    """By its class, whatever its files are called."""
    out = export(tmp_path / 'slim')
    kind = 'T5TokenizerFast' if name == 'spiece.model' else 'GPT2TokenizerFast'
    (out / name).touch()
    assert foreign(out) == name
    config = json.loads((out / 'tokenizer_config.json').read_text())
    (out / 'tokenizer_config.json').write_text(json.dumps({**config, 'tokenizer_class': kind}))
    assert foreign(out) is None


@pytest.mark.parametrize(
    'name', ['notes.txt', 'train.py', '.git', 'data.json', 'pytorch_model.bin', 'model.safetensors.bak']
)
def test_a_file_beside_it_means_no(tmp_path, name):
    out = export(tmp_path / 'slim')
    (out / name).touch()
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(UserError, match=f'slim: holds {name}, which is no part of an export'):
        export(out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_a_folder_in_place_of_a_file_means_no(tmp_path):
    out = export(tmp_path / 'slim')
    (out / 'merges.txt').mkdir()
    (out / 'vocab.json').mkdir()
    assert foreign(out) == 'merges.txt'


def test_the_backbones_own_folder_is_no_export(tmp_path):
    tiny_lm().save_pretrained(tmp_path / 'model')
    tiny_tokenizer().save_pretrained(tmp_path / 'model')
    with pytest.raises(UserError, match='model: holds a model of other making'):
        check_place(tmp_path / 'model')
    AutoTokenizer.from_pretrained(tmp_path / 'model')


def test_exporting_a_checkpoint_over_somebodys_files_leaves_them(tmp_path, monkeypatch, capsys):
    """The files are there afterwards; in a new place the same command exports."""
    model = tiny_classifier(tiny_tokenizer())
    state = {'model': model.state_dict(), 'integrations': {'huggingface': model.get_metadata()}}
    torch.save({'state': state}, tmp_path / 'ck.pt')
    monkeypatch.chdir(tmp_path)
    mine = {'docs/thesis.tex': 'years of work', 'docs/chapters/one.tex': 'more', 'plain': 'a file'}
    for name, text in mine.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    for target in ('docs', 'plain', '.'):
        assert from_checkpoint.main(['ck.pt', target]) == 2
        assert capsys.readouterr().err.startswith(f'error: {target}: ')
    assert {name: (tmp_path / name).read_text() for name in mine} == mine
    (tmp_path / 'empty').mkdir()
    for target in ('new', 'empty', 'new'):
        assert from_checkpoint.main(['ck.pt', target]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ['ck.pt', 'docs', 'empty', 'new', 'plain']
    assert len(LABELS) == AutoModelForSequenceClassification.from_pretrained('new', trust_remote_code=True).num_labels

"""Model folders that hold what they should not, or not what they should."""

import json
import shutil

import pytest
import torch
from configs import TASK
from damages import Hostile, cut, edit, weights
from tiny import tiny_classifier, tiny_lm, tiny_tokenizer, triplet

from dhrd_plugin.data.tasks import load_task
from dhrd_plugin.export.write import write_slim

pytestmark = pytest.mark.usefixtures('one_thread')

CODE = 'from pathlib import Path\nPath({proof!r}).touch()\nraise SystemExit(0)\n'


@pytest.fixture(scope='module')
def exports(tmp_path_factory):
    """A stock export, one with code of ours, and rows for them."""
    root = tmp_path_factory.mktemp('exports')
    for name, options in {'stock': {'head': 'linear'}, 'slim': {'head': 'mlp'}}.items():
        model = tiny_classifier(tiny_tokenizer(apart=True), **options)
        model.info['task'] = load_task(TASK).to_dict()
        write_slim(model.get_metadata(), model.network.state_dict(), root / name)
    return root


@pytest.fixture
def folder(exports, tmp_path):
    """Copies of both exports, and a file of rows."""
    for name in ('stock', 'slim'):
        shutil.copytree(exports / name, tmp_path / name)
    (tmp_path / 'rows.jsonl').write_text(json.dumps(triplet(1, reason=None)) + '\n')
    return tmp_path


def put(name, content):
    def damage(folder):
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)

    return damage


def gone(name):
    return lambda folder: (folder / name).unlink()


def config(**values):
    return edit('config.json', **values)


def backbone(**values):
    def damage(folder):
        content = json.loads((folder / 'config.json').read_text())
        content['backbone'] |= values
        (folder / 'config.json').write_text(json.dumps(content))

    return damage


def without(name):
    return weights(lambda found: found.pop(name))


def of(name, value):
    return weights(lambda found: found.update({name: value}))


def huge_ids(folder):
    """The tokenizer of a model with a larger vocabulary."""
    content = json.loads((folder / 'tokenizer.json').read_text())
    content['model']['vocab'] = {word: i + 500 * (i > 7) for word, i in content['model']['vocab'].items()}
    (folder / 'tokenizer.json').write_text(json.dumps(content))


def base_model(folder):
    """A language model, which has no classification head."""
    shutil.rmtree(folder)
    tiny_lm().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


DAMAGES = {
    'config.json: cut short': ('stock', cut('config.json'), ['stock: cannot be loaded']),
    'config.json: empty': ('stock', put('config.json', ''), ['stock: cannot be loaded']),
    'config.json: a list': ('stock', put('config.json', '[]'), ['stock: cannot be loaded']),
    'config.json: not UTF-8': ('stock', put('config.json', b'\xff\xfe{}'), ['stock: cannot be loaded']),
    'config.json: no model type': ('stock', put('config.json', '{}'), ['stock: cannot be loaded', 'model_type']),
    'config.json: unknown type': ('stock', config(model_type='lama'), ['stock: cannot be loaded', 'lama']),
    'config.json: an encoder of another kind': ('stock', config(model_type='vit'), ['stock: cannot be loaded']),
    'config.json: more classes': ('stock', config(id2label={i: str(i) for i in range(4)}), ['cannot be loaded']),
    'config.json: another width': ('slim', backbone(hidden_size=32), ['slim: cannot be loaded']),
    'config.json: no backbone': ('slim', config(backbone=None), ['slim: cannot be loaded']),
    'config.json: unknown backbone': ('slim', backbone(model_type='lama'), ['slim: cannot be loaded', 'lama']),
    'config.json: unknown head': ('slim', config(head='mpl'), ["head: found 'mpl'"]),
    'config.json: unknown pooling': ('slim', config(pooling='first'), ["pooling: found 'first'"]),
    'config.json: a class is missing': ('slim', config(id2label={0: 'a', 1: 'b', 3: 'c'}), ['id2label: found', '3']),
    'config.json: two of one name': ('slim', config(id2label={0: 'a', 1: 'b', 2: 'a'}), ['id2label: found']),
    'config.json: names are numbers': ('slim', config(id2label={0: 5, 1: 6, 2: 7}), ['id2label: found']),
    'config.json: names of no class': ('slim', config(id2label={'x': 'a'}), ['slim: cannot be loaded']),
    'config.json: no names': ('slim', config(id2label=5), ['slim: cannot be loaded']),
    'config.json: a task that is none': (
        'slim',
        config(dhrd={'task': {'prompt': 5}}),
        ['slim: config.json: task: prompt: found 5; expected a text'],
    ),
    'config.json: dhrd is a text': ('slim', config(dhrd='rte'), ['slim: cannot be loaded']),
    'weights: none': ('stock', gone('model.safetensors'), ['stock: cannot be loaded']),
    'weights: empty': ('stock', put('model.safetensors', ''), ['stock: cannot be loaded']),
    'weights: cut short': ('stock', cut('model.safetensors', 2000), ['stock: cannot be loaded']),
    'weights: no safetensors': ('slim', put('model.safetensors', 'x' * 99), ['slim: cannot be loaded']),
    'weights: no head': ('stock', without('score.weight'), ['found no weight named score.weight']),
    'weights: no layer': (
        'slim',
        without('backbone.layers.0.mlp.up_proj.weight'),
        ['found no weight named backbone.layers.0.mlp.up_proj.weight'],
    ),
    'weights: another shape': ('slim', of('classifier.dense.bias', torch.zeros(3)), ['slim: cannot be loaded']),
    'weights: not finite': ('slim', of('classifier.dense.bias', torch.full([16], torch.nan)), ['not finite']),
    'weights: infinite': ('slim', of('classifier.out_proj.bias', torch.tensor([0, torch.inf, 0])), ['not finite']),
    'weights: a language model': ('stock', base_model, ['found no weight named score.weight']),
    'tokenizer: cut short': ('slim', cut('tokenizer.json'), ['slim: cannot be loaded']),
    'tokenizer: none': ('slim', gone('tokenizer.json'), ['slim: cannot be loaded']),
    'tokenizer: config cut short': ('slim', cut('tokenizer_config.json'), ['slim: cannot be loaded']),
    'tokenizer: of another model': ('slim', huge_ids, ['the model cannot be run on these texts', 'index out of range']),
    'onnx: no ONNX file': ('slim/model.onnx', put('model.onnx', 'text'), ['model.onnx: cannot be loaded']),
    'onnx: empty': ('slim/model.onnx', put('model.onnx', ''), ['model.onnx: cannot be loaded']),
}


@pytest.mark.parametrize('verb', ['predict', 'evaluate'])
@pytest.mark.parametrize('name', DAMAGES)
def test_it_is_refused_in_one_line(refused, folder, name, verb):
    place, damage, words = DAMAGES[name]
    damage(folder / place.split('/')[0])
    line = refused(verb, folder / place, 'w1 w2' if verb == 'predict' else folder / 'rows.jsonl')
    for word in words:
        assert word in line


def test_an_onnx_file_of_another_classifier(refused, folder):
    pytest.importorskip('onnxruntime')
    from dhrd_plugin.export.write import add_onnx

    add_onnx(folder / 'slim')
    config(id2label={0: 'yes', 1: 'no'})(folder / 'slim')
    line = refused('predict', folder / 'slim' / 'model.onnx', 'w1')
    assert 'and an output of' in line and 'the 2 classes of the config.json beside it' in line
    (folder / 'slim' / 'config.json').unlink()
    assert 'no config.json beside' in refused('predict', folder / 'slim' / 'model.onnx', 'w1')


def pickled(folder):
    (folder / 'model.safetensors').unlink()
    torch.save({'score.weight': Hostile(folder.parent / 'proof')}, folder / 'pytorch_model.bin')


def coded(folder):
    (folder / 'code.py').write_text(CODE.format(proof=str(folder.parent / 'proof')))
    config(
        model_type='of_its_own',
        auto_map={'AutoConfig': 'code.Config', 'AutoModelForSequenceClassification': 'code.Model'},
    )(folder)


def coded_tokenizer(folder):
    (folder / 'code.py').write_text(CODE.format(proof=str(folder.parent / 'proof')))
    content = json.loads((folder / 'tokenizer_config.json').read_text())
    content |= {'tokenizer_class': 'Own', 'auto_map': {'AutoTokenizer': [None, 'code.Own']}}
    (folder / 'tokenizer_config.json').write_text(json.dumps(content))


@pytest.mark.parametrize('verb', ['predict', 'evaluate'])
@pytest.mark.parametrize('make', [pickled, coded, coded_tokenizer])
def test_nothing_in_it_is_run(refused, folder, make, verb):
    make(folder / 'stock')
    line = refused(verb, folder / 'stock', 'w1 w2' if verb == 'predict' else folder / 'rows.jsonl')
    assert 'stock: cannot be loaded' in line
    assert not (folder / 'proof').exists()

"""What opens a classifier: without Composer, and without running anything that lies beside it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from composer import Trainer
from configs import TASK
from damages import CODE
from forks import Popen
from huggingface_hub.utils import filter_repo_objects
from tiny import LABELS, tiny_classifier, tiny_tokenizer, triplet
from torch.distributed import checkpoint as dcp

from dhrd_plugin.data.tasks import load_task
from dhrd_plugin.errors import UserError
from dhrd_plugin.export.from_checkpoint import export_checkpoint
from dhrd_plugin.export.load import load_classifier
from dhrd_plugin.export.write import write_slim

pytestmark = pytest.mark.usefixtures('one_thread')

ROOT = Path(__file__).parents[2]
ROWS = [triplet(i, 2 + i % 6, None) for i in range(5)]
# As JSON has it; torch's sharded checkpoints leave empty mappings out.
STORED = {key: value for key, value in json.loads(json.dumps(load_task(TASK).to_dict())).items() if value != {}}
COMMANDS = {
    'predict': ('predict', ['slim', 'w1 w2 w3']),
    'evaluate': ('evaluate', ['slim', 'rows.jsonl']),
    'export': ('export.from_checkpoint', ['full.pt', 'exported']),
    'export shards': ('export.from_checkpoint', ['sharded', 'exported too']),
}
RUN = """
import importlib, json, sys
for name, (module, arguments) in json.loads(sys.argv[1]).items():
    status = importlib.import_module(f'dhrd_plugin.{module}').main(arguments)
    loaded = sorted(name for name in sys.modules if name in ('composer', 'dhrd_plugin.training'))
    print(json.dumps([name, status, loaded]), flush=True)
"""


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    """One model as an export and as a checkpoint, full and sharded, and rows for it."""
    root = tmp_path_factory.mktemp('load')
    model = tiny_classifier(tiny_tokenizer(apart=True), head='linear')
    model.info['task'] = STORED
    metadata = model.get_metadata()
    write_slim(metadata, model.network.state_dict(), root / 'slim')
    Trainer(model=model, device='cpu', progress_bar=False).save_checkpoint(str(root / 'full.pt'))
    state = {'state': {'model': model.state_dict(), 'integrations': {'huggingface': metadata}}}
    dcp.save(state, checkpoint_id=root / 'sharded', no_dist=True)
    (root / 'rows.jsonl').write_text('\n'.join(json.dumps(row) for row in ROWS))
    return root


@pytest.fixture(scope='module')
def alone(root, tmp_path_factory):
    """The folder in which a new process ran all of ``COMMANDS``, and by name what it had loaded after each."""
    folder = shutil.copytree(root, tmp_path_factory.mktemp('alone'), dirs_exist_ok=True)
    command, env = [sys.executable, '-c', RUN, json.dumps(COMMANDS)], {**os.environ, 'OMP_NUM_THREADS': '1'}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    said = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('["')]
    return folder, {name: (status, loaded) for name, status, loaded in said}


@pytest.mark.parametrize('name', COMMANDS)
def test_what_is_here_is_used_without_composer(root, alone, name):
    folder, ran = alone
    assert ran[name] == (0, [])
    if name.startswith('export'):
        found, expected = (
            {path.name: path.read_bytes() for path in place.iterdir()}
            for place in (folder / COMMANDS[name][1][-1], root / 'slim')
        )
        assert found == expected


def test_a_checkpoint_is_opened_as_its_export_is(root):
    first, second = load_classifier(root / 'slim'), load_classifier(root / 'full.pt')
    assert first.label_names == second.label_names == LABELS
    assert first.task == second.task == STORED
    assert first.model.state_dict().keys() == second.model.state_dict().keys()
    for name, value in first.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name])


@pytest.mark.parametrize('name', ['../vocab.txt', '/tmp/vocab.txt', 'a/vocab.txt', '..', 'authorized_keys', 'a.sh'])
def test_a_checkpoint_names_no_file_outside_the_scratch_folder(root, tmp_path, name):
    checkpoint = torch.load(root / 'full.pt', weights_only=False)
    files = checkpoint['state']['integrations']['huggingface']['tokenizer']
    files[name] = {'file_extension': Path(name).suffix, 'content': ['a word']}
    torch.save(checkpoint, tmp_path / 'full.pt')
    with pytest.raises(UserError, match=r'tokenizer: found a file named .*; expected a plain name') as error:
        export_checkpoint(str(tmp_path / 'full.pt'), tmp_path / 'slim')
    assert name in str(error.value) and len(str(error.value).splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ['full.pt']


@pytest.mark.parametrize('kind', ['llama', 'of_its_own'])
def test_code_in_a_folder_is_never_run(root, tmp_path, kind):
    """Also where stdin, which gives predict its texts, says yes."""
    proof = tmp_path / 'proof'
    folder = shutil.copytree(root / 'slim', tmp_path / 'slim')
    (folder / 'code.py').write_text(CODE.format(proof=proof, kind=kind, model='LlamaForSequenceClassification'))
    for name, update in {
        'config.json': {
            'model_type': kind,
            'auto_map': {'AutoConfig': 'code.Config', 'AutoModelForSequenceClassification': 'code.Model'},
        },
        'tokenizer_config.json': {
            'tokenizer_class': 'Tokenizer',
            'auto_map': {'AutoTokenizer': [None, 'code.Tokenizer']},
        },
    }.items():
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(content | update))
    pipes = dict.fromkeys(('stdin', 'stdout', 'stderr'), subprocess.PIPE)
    process = Popen([sys.executable, ROOT / 'scripts' / 'predict.py', folder], text=True, **pipes)
    _, errors = process.communicate('yes\ny\n', timeout=300)
    assert not proof.exists()
    assert process.returncode == 2 and len(errors.splitlines()) == 1, errors
    assert f'{folder}: cannot be loaded' in errors


def test_an_onnx_file_with_weights_beside_it_is_replaced_and_loaded_from_anywhere(tmp_path, monkeypatch):
    """Above 2 GB torch writes a file for each weight, of any name."""
    onnx, made = pytest.importorskip('onnx'), torch.onnx.export
    pytest.importorskip('onnxruntime')

    def large(model, inputs, path, **options):
        made(model, inputs, path, **options)
        onnx.save_model(onnx.load(path), path, save_as_external_data=True, all_tensors_to_one_file=False)
        assert len([*Path(path).parent.iterdir()]) > 2

    def download(repo, allow_patterns):  # links to what lies elsewhere, as the hub's client keeps it
        (tmp_path / 'hub').mkdir()
        for name in filter_repo_objects([path.name for path in slim.iterdir()], allow_patterns=allow_patterns):
            (tmp_path / 'hub' / name).symlink_to(slim / name)
        return tmp_path / 'hub'

    monkeypatch.setattr('torch.onnx.export', large)
    monkeypatch.setattr('huggingface_hub.snapshot_download', download)
    model, slim = tiny_classifier(), tmp_path / 'slim'
    for _ in range(2):  # the second in the place of the first
        write_slim(model.get_metadata(), model.network.state_dict(), slim, onnx='int8')
    assert {path.name for path in slim.glob('*onnx*')} == {'model.onnx', 'model.onnx.data', 'model-int8.onnx'}
    texts = [{'input_text': row['input_text']} for row in ROWS]
    expected = load_classifier(slim, 'torch').predict_proba(texts)
    for place in (slim, 'hub:org/rte'):
        found = load_classifier(place, 'onnx').predict_proba(texts)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize('damage', ['config.json', 'model.safetensors', 'tokenizer.json'])
def test_a_damaged_folder_is_told_in_one_line(root, tmp_path, damage):
    folder = shutil.copytree(root / 'slim', tmp_path / 'slim')
    (folder / damage).write_bytes((folder / damage).read_bytes()[:20])
    with pytest.raises(UserError, match=f'{folder}: cannot be loaded') as error:
        load_classifier(folder)
    assert len(str(error.value).splitlines()) == 1

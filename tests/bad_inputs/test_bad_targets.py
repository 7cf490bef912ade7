"""Places that no verb may write to: inputs, what is somebody else's, and what cannot be written."""

import json
import os
import subprocess

import pytest
from omegaconf import OmegaConf
from tiny import LABELS

from dhrd_plugin.data.shards import write_triplets
from dhrd_plugin.export.card import DROPPED

TASK = {'name': 'tiny', 'prompt': '{text}', 'id': 'idx', 'labels': [{'value': label} for label in LABELS]}
ROWS = [{'idx': i, 'text': f't{i}', 'label': LABELS[i % 3], 'rationale': 'why'} for i in range(6)]
RUN = {
    'output_dir': 'out',
    'task': TASK,
    'model': {'pretrained_model_name_or_path': 'slim'},
    'train_loader': {'source': 'data/train.jsonl'},
    'eval_loaders': {'val': {'source': 'data/train.jsonl'}},
    'optimizer': {'name': 'adamw', 'lr': 1e-3},
    'callbacks': {'drop_reasoning_head': {'output_dir': '${output_dir}/slim'}},
    'max_duration': '1ba',
    'global_train_batch_size': 2,
    'device': 'cpu',
}
COMPARISON = {'base': 'run.yaml', 'output_dir': 'compared', 'tasks': {'tiny': {}}, 'arms': {'pooled': {}}, 'seeds': [1]}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder in which somebody works, as the current one."""

    def put(path, text):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)

    lines = ''.join(f'{json.dumps(row)}\n' for row in ROWS)
    for path in ('docs/notes.txt', 'docs/rows/a.txt', 'notes.txt', 'ck.pt', 'docs/ck.pt', 'shards/.metadata'):
        put(path, 'mine')
    for path in ('data/train.jsonl', 'rows.jsonl', 'set and rows/rows.jsonl'):
        put(path, lines)
    put('mine/predictions.jsonl', lines.replace('rationale', 'why'))
    for folder in ('slim', 'slim and notes'):
        put(f'{folder}/README.md', f'# Slim classifier\n\n{DROPPED}\n')
        put(f'{folder}/config.json', '{}')
        put(f'{folder}/model.safetensors', 'weights')
    for path in ('slim and notes/notes.txt', 'set and notes/notes.txt', 'results/report.md', 'plan/notes.txt'):
        put(path, 'mine')
    put('another/config.json', '{"model_type": "llama"}')
    put('reports/report.json', '{"quarter": 3}')
    put('reports/summary.json', '{"quarter": 3}')
    put('broken set/index.json', '{')
    put('plan/comparison.yaml', 'of: prices')
    put('own/comparison.yaml', OmegaConf.to_yaml({**COMPARISON, 'base': '../run.yaml'}))
    put('rationales.jsonl', '{"idx": 0, "rationale": "why"}\n')
    put('folder.jsonl/x', 'mine')
    put('prompt.jsonl', '{input_text} {answer} [END OF REASONING]')
    put('task.yaml', OmegaConf.to_yaml(TASK))
    put('run.yaml', OmegaConf.to_yaml(RUN))
    for folder in ('set', 'set and notes', 'set and rows'):
        write_triplets([{'id': '0', 'input_text': 'x', 'label': 'yes'}], tmp_path / 'new')
        for path in (tmp_path / 'new').iterdir():
            put(f'{folder}/{path.name}', '')
            os.replace(path, tmp_path / folder / path.name)
        (tmp_path / 'new').rmdir()
    (tmp_path / 'link').symlink_to('docs')
    (tmp_path / 'null.jsonl').symlink_to('/dev/null')
    os.mkfifo(tmp_path / 'pipe')
    monkeypatch.chdir(tmp_path)
    return tmp_path


EXPORT = ['export', 'ck.pt']  # which is none: the target is looked at first
EXPORTS = [
    ('docs', 'docs: holds ck.pt, which is no part of an export; expected a new or an empty folder, or an earlier'),
    ('link', 'link: holds ck.pt, which is no part of an export'),
    ('slim and notes', 'slim and notes: holds notes.txt'),
    ('another', 'another: holds a model of other making'),
    ('set', 'set: holds index.json'),
    ('notes.txt', 'notes.txt: found a file; expected a folder'),
    ('notes.txt/slim', 'notes.txt is a file; expected a folder'),
    ('/proc/none/slim', '/proc/none/slim: cannot be written: No such file or directory'),
    ('s3://bucket/slim', 's3://bucket/slim: found an address; expected a place on this machine'),
    ('x' * 250, 'cannot be written: File name too long'),
]
PREPARE = ['prepare', '--template', 'task.yaml', '--input', 'rows.jsonl']
PREPARED = [
    (['--output', 'docs'], '--output: docs: exists and is not a shard set'),
    (['--output', 'docs', '--overwrite'], '--output: docs: exists and is not a shard set'),
    (['--output', 'set'], '--output: set: already holds a shard set'),
    (['--output', 'set and notes', '--overwrite'], 'set and notes: holds notes.txt, which is no part of the shard set'),
    (['--output', 'broken set', '--overwrite'], 'broken set: holds index.json, which is no part'),
    (['--output', 'notes.txt'], '--output: notes.txt: found a file; expected a folder'),
    (['--output', 'notes.txt/set'], 'notes.txt is a file; expected a folder'),
    (['--output', '.'], 'exists and is not a shard set'),
    (['--output', 's3://bucket/exp#1/train'], "s3://bucket/exp#1/train: found '#', which cuts an address off"),
    (['--output', 's3://bucket/exp?1', '--overwrite'], "s3://bucket/exp?1: found '?', which cuts an address off"),
    (['--output', 's3://bucket/a\nb'], "found '\\n', which cuts an address off"),
    (['--output', 's3://[bucket/a'], 'Invalid IPv6 URL'),
    (['--output', 'new', '--skip-bad', 'rows.jsonl'], '--skip-bad: rows.jsonl: is --input'),
    (['--output', 'new', '--skip-bad', './data/../rows.jsonl'], '--skip-bad: data/../rows.jsonl: is --input'),
    (['--output', 'new', '--skip-bad', 'task.yaml'], '--skip-bad: task.yaml: is --template'),
    (['--output', 'new', '--skip-bad', 'notes.txt'], 'notes.txt: holds something else than bad rows set aside'),
    (['--output', 'new', '--skip-bad', 'data/train.jsonl'], 'train.jsonl: holds something else than bad rows'),
    (['--output', 'new', '--skip-bad', 'docs'], '--skip-bad: docs: found a folder; expected a file'),
    (['--output', 'new', '--skip-bad', 'pipe'], '--skip-bad: pipe: found no plain file; expected a file'),
    (['--output', 'new', '--skip-bad', '/dev/null'], '--skip-bad: /dev/null: found no plain file'),
    (['--output', 'new', '--skip-bad', 'new/bad.jsonl'], 'new/bad.jsonl: is in --output'),
    (['--output', 'new', '--skip-bad', 'notes.txt/bad'], 'notes.txt is a file; expected a folder'),
]
EVALUATE = ['evaluate', 'slim', 'rows.jsonl', '--output']
EVALUATED = [
    ('reports', '--output: reports/report.json: holds something else than a report of ours'),
    ('mine', '--output: mine/predictions.jsonl: holds something else than a report of ours'),
    ('notes.txt', '--output: notes.txt: found a file; expected a folder'),
    ('notes.txt/report', 'notes.txt is a file; expected a folder'),
    ('s3://bucket/report', 'found an address; expected a place on this machine'),
    ('/proc/none/x', 'cannot be written: No such file or directory'),
]
ASK = [
    'rationales',
    '--task',
    'task.yaml',
    '--input',
    'rows.jsonl',
    '--model',
    'm',
    '--base-url',
    'http://localhost:9/v1',
]
ASKED = [
    (['--output', 'rows.jsonl'], '--output: rows.jsonl: is --input'),
    (['--output', 'new.jsonl', '--rejects', 'rows.jsonl'], '--rejects: rows.jsonl: is --input'),
    (['--output', 'new.jsonl', '--rejects', 'new.jsonl'], '--rejects: new.jsonl: is --output'),
    (['--output', 'new.jsonl', '--rejects', 'rationales.jsonl'], 'rationales.jsonl, line 1: not a row of this program'),
    (['--output', 'new.jsonl', '--rejects', 'task.yaml'], '--rejects: task.yaml: is --task'),
    (['--output', 'new.jsonl', '--rejects', 'notes.txt'], 'notes.txt, line 1: not a row of this program'),
    (['--output', 'mine/predictions.jsonl'], 'predictions.jsonl, line 1: not a row of this program'),
    (['--output', 'folder.jsonl'], '--output: folder.jsonl: found a folder; expected a file'),
    (['--output', 'null.jsonl'], '--output: null.jsonl: found no plain file'),
    (['--output', 'notes.txt/new.jsonl'], 'notes.txt is a file; expected a folder'),
    (['--output', 'prompt.jsonl', '--prompt', 'prompt.jsonl'], '--output: prompt.jsonl: is --prompt'),
]
OTHERS = [
    (['export', 'docs/ck.pt', 'docs'], 'docs: holds the checkpoint (docs/ck.pt)'),
    (['export', 'shards', 'shards'], 'shards: is the checkpoint'),
    (['export', 's3://bucket/ck.pt', '.'], '.: is the current folder'),
    (['export', 's3://bucket/ck.pt', '..'], '..: holds the current folder'),
    (['export', 's3://bucket/exp#1/ck.pt', 'new'], "s3://bucket/exp#1/ck.pt: found '#'"),
    (['evaluate', 's3://bucket/ck.pt?versionId=3', 'rows.jsonl'], "found '?'"),
    (['evaluate', 'slim', 'mine/predictions.jsonl', '--output', 'mine'], 'is the data mine/predictions.jsonl'),
    (['predict', 's3://bucket/exp#1/ck.pt', 'a text'], "s3://bucket/exp#1/ck.pt: found '#'"),
    (['predict', 's3://[bucket/ck.pt', 'a text'], 'Invalid IPv6 URL'),
    (['inspect', 's3://bucket/exp#1'], "s3://bucket/exp#1/index.json: found '#'"),
    (['inspect', 'set', '--png', 'rows.jsonl'], "--png: rows.jsonl: holds something else than matplotlib's pictures"),
    (['inspect', 'set', '--png', 'docs'], '--png: docs: found a folder; expected a file'),
    (
        [
            'prepare',
            '--template',
            'task.yaml',
            '--input',
            'set and rows/rows.jsonl',
            '--output',
            'set and rows',
            '--overwrite',
        ],
        '--output: set and rows: holds --input',
    ),
]
HEAD = 'callbacks.drop_reasoning_head.output_dir'
WRITTEN = ('output_dir', 'save_folder', HEAD, 'loggers.file.filename')
TRAINED = [
    ([f'{HEAD}=out'], f'{HEAD}: out: is output_dir'),
    ([f'{HEAD}=work', 'output_dir=work/out'], f'{HEAD}: work: holds output_dir (work/out)'),
    ([f'{HEAD}=checkpoints', 'save_folder=checkpoints'], f'{HEAD}: checkpoints: is save_folder'),
    ([f'{HEAD}=work', 'save_folder=work/{run_name}'], f'{HEAD}: work: holds save_folder (work/dhrd)'),
    ([f'{HEAD}=logs', 'loggers.file.filename=logs/log.txt'], f'{HEAD}: logs: holds loggers.file.filename'),
    ([f'{HEAD}=out/summary.json'], 'out/summary.json: is the summary'),
    ([f'{HEAD}=slim'], f'{HEAD}: slim: is model.pretrained_model_name_or_path'),
    ([f'{HEAD}=slim', 'model.pretrained_model_name_or_path=another', 'tokenizer.name=slim'], 'slim: is tokenizer.name'),
    ([f'{HEAD}=data'], f'{HEAD}: data: holds train_loader.source (data/train.jsonl)'),
    ([f'{HEAD}=docs'], f'{HEAD}: docs: holds ck.pt, which is no part of an export'),
    ([f'{HEAD}=docs/{{run_name}}', 'run_name=rows'], f'{HEAD}: docs/rows: holds a.txt'),
    ([f'{HEAD}=notes.txt'], f'{HEAD}: notes.txt: found a file; expected a folder'),
    ([f'{HEAD}=notes.txt/slim'], 'notes.txt is a file; expected a folder'),
    ([f'{HEAD}=caches'], f'{HEAD}: caches: is the cache'),
    ([f'{HEAD}=work', 'train_loader.cache_dir=work/cache'], 'work: holds train_loader.cache_dir'),
    ([f'{HEAD}=.'], f'{HEAD}: .: holds'),
    ([f'{HEAD}=s3://bucket/slim'], f'{HEAD}: s3://bucket/slim: found an address'),
    (
        ['callbacks.drop_reasoning_head.remote=s3://bucket/exp#1'],
        "drop_reasoning_head.remote: s3://bucket/exp#1: found '#'",
    ),
    (['output_dir=notes.txt'], 'output_dir: notes.txt: found a file; expected a folder'),
    (['output_dir=notes.txt/run'], 'notes.txt is a file; expected a folder'),
    (['output_dir=reports'], 'output_dir: reports/summary.json: holds something else than a summary'),
    (['output_dir=s3://bucket/run'], 'output_dir: s3://bucket/run: found an address'),
    (['output_dir=/proc/none/run'], 'output_dir: /proc/none/run: cannot be written: No such file or directory'),
    (['save_folder=notes.txt'], 'save_folder: notes.txt: found a file; expected a folder'),
    (['save_folder=exp#1'], "save_folder: exp#1: found '#'"),
    (['save_folder=s3://bucket/{run_name}', 'run_name=exp#1'], "save_folder: s3://bucket/exp#1: found '#'"),
    (['load_path=s3://bucket/exp#1/ck.pt'], "load_path: s3://bucket/exp#1/ck.pt: found '#'"),
    (
        ['train_loader.source=null', 'train_loader.remote=s3://bucket/exp#1'],
        "train_loader.remote: s3://bucket/exp#1/index.json: found '#'",
    ),
    (
        ['train_loader.source=null', 'train_loader.remote=set', 'train_loader.local=docs'],
        'docs: holds ck.pt and is no cache of set',
    ),
    (['loggers.file.filename=data/train.jsonl'], 'loggers.file.filename: data/train.jsonl: is train_loader.source'),
    (['loggers.file.filename=notes.txt'], 'loggers.file.filename: notes.txt: holds something else than a log'),
    *(([f'{key}=~/x'], f'{key}: ~/x: found ~, which only a shell expands; expected /') for key in WRITTEN),
    (['loggers.file.filename=docs'], 'loggers.file.filename: docs: found a folder; expected a file'),
]
COMPARED = [
    ('compare.yaml', 'output_dir=notes.txt', 'output_dir: notes.txt: found a file; expected a folder'),
    ('compare.yaml', 'output_dir=results', 'output_dir: results: holds report.md and no comparison.yaml'),
    ('compare.yaml', 'output_dir=plan', 'plan/comparison.yaml: tasks: found None'),
    ('own/comparison.yaml', 'output_dir=own', 'own/comparison.yaml: is the YAML of the comparison'),
    ('compare.yaml', 'output_dir=s3://bucket/compared', 'found an address'),
    ('compare.yaml', 'output_dir=~/compared', 'output_dir: ~/compared: found ~, which only a shell expands'),
    ('compare.yaml', 'arms.pooled={output_dir: notes.txt}', "arms.pooled.output_dir: found 'notes.txt'; expected none"),
]


@pytest.mark.parametrize(
    ('arguments', 'words'),
    [
        *(([*EXPORT, out], words) for out, words in EXPORTS),
        *(([*PREPARE, *more], words) for more, words in PREPARED),
        *(([*EVALUATE, out, '--task', 'task.yaml'], words) for out, words in EVALUATED),
        *(([*ASK, *more], words) for more, words in ASKED),
        *OTHERS,
        *((['train', 'run.yaml', *more], words) for more, words in TRAINED),
        *((['compare', yaml, override], words) for yaml, override, words in COMPARED),
    ],
    ids=lambda value: ' '.join(value)[:80] if isinstance(value, list) else '',
)
def test_it_is_refused_before_anything_is_read(here, refused, arguments, words):
    (here / 'compare.yaml').write_text(OmegaConf.to_yaml(COMPARISON))
    assert words in refused(*arguments)


@pytest.mark.parametrize('state', ['full', 'read-only'])
@pytest.mark.parametrize(
    ('arguments', 'key'),
    [
        ([*EXPORT, 'disk/slim'], 'disk/slim'),
        ([*PREPARE, '--output', 'disk/set'], '--output: disk/set'),
        ([*PREPARE, '--output', 'new', '--skip-bad', 'disk/bad'], '--skip-bad: disk/bad'),
        ([*EVALUATE, 'disk/report', '--task', 'task.yaml'], '--output: disk/report'),
        ([*ASK, '--output', 'disk/new.jsonl'], '--output: disk/new.jsonl'),
        (['inspect', 'set', '--png', 'disk/x.png'], '--png: disk/x.png'),
        (['train', 'run.yaml', 'output_dir=disk/out'], 'output_dir: disk/out'),
        (['train', 'run.yaml', 'save_folder=disk/checkpoints'], 'save_folder: disk/checkpoints'),
        (['train', 'run.yaml', f'{HEAD}=disk/slim'], f'{HEAD}: disk/slim'),
        (['train', 'run.yaml', 'loggers.file.filename=disk/log.txt'], 'loggers.file.filename: disk/log.txt'),
        (['compare', 'compare.yaml', 'output_dir=disk/compared'], 'output_dir: disk/compared'),
    ],
    ids=lambda value: ' '.join(value)[:60] if isinstance(value, list) else '',
)
def test_a_disk_that_takes_nothing_is_told_first(here, refused, tmpfs, arguments, key, state):
    (here / 'compare.yaml').write_text(OmegaConf.to_yaml(COMPARISON))
    disk = tmpfs(here / 'disk', '64k')
    if state == 'read-only':
        subprocess.run(['mount', '-o', 'remount,ro', disk], check=True)
    else:
        with (disk / 'full').open('wb', buffering=0) as file, pytest.raises(OSError, match='No space left'):
            while True:
                file.write(bytes(4096))
    why = {'full': 'No space left on device', 'read-only': 'Read-only file system'}[state]
    assert f'{key}: cannot be written: {why}' in refused(*arguments)


def test_a_mount_point_is_no_place_for_an_export(here, refused, tmpfs):
    tmpfs(here / 'disk', '64k')
    assert 'disk: is a mount point, which nothing can take the place of' in refused(*EXPORT, 'disk')

"""Checkpoints that hold what they should not, or are of another run."""

import json
import pickle
import shutil
import tarfile

import pytest
import torch
from composer import Trainer
from damages import Hostile
from omegaconf import OmegaConf
from runs import write_run
from tiny import tiny_classifier, tiny_lm, tiny_tokenizer, triplet
from torch.distributed import checkpoint as dcp

from dhrd_plugin import load_config, train
from dhrd_plugin.checkpoints.same import _compare, _of_the_run
from dhrd_plugin.training.config import Config

pytestmark = pytest.mark.usefixtures('one_thread')


# ------------------------------------------------------------------------------ what export, evaluate and predict read


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    """A checkpoint, as one file and as shards."""
    root = tmp_path_factory.mktemp('made')
    model = tiny_classifier()
    Trainer(model=model, device='cpu', progress_bar=False).save_checkpoint(str(root / 'full.pt'))
    state = {'state': {'model': model.state_dict(), 'integrations': {'huggingface': model.get_metadata()}}}
    dcp.save(state, checkpoint_id=root / 'sharded', no_dist=True)
    return root


@pytest.fixture
def place(made, tmp_path):
    """Copies of both, and a file of rows."""
    shutil.copy(made / 'full.pt', tmp_path / 'full.pt')
    shutil.copytree(made / 'sharded', tmp_path / 'sharded')
    (tmp_path / 'rows.jsonl').write_text(json.dumps(triplet(1, reason=None)) + '\n')
    return tmp_path


def changed(change):
    """Change what is in the file; ``change`` gets the state and the folder."""

    def damage(folder):
        stored = torch.load(folder / 'full.pt', weights_only=False)
        change(stored['state'], folder)
        torch.save(stored, folder / 'full.pt')

    return damage


def metadata_of(state):
    return state['integrations']['huggingface']


def tokenizer_file(name, content='text'):
    suffix = f'.{name.rsplit(".", 1)[-1]}'

    def change(state, folder):
        metadata_of(state)['tokenizer'][name] = {'file_extension': suffix, 'content': content}

    return changed(change)


def written(data):
    return lambda folder: (folder / 'full.pt').write_bytes(data)


def saved(data):
    return lambda folder: torch.save(data, folder / 'full.pt')


def half(folder):
    data = (folder / 'full.pt').read_bytes()
    (folder / 'full.pt').write_bytes(data[: len(data) // 2])


def a_folder(folder):
    (folder / 'full.pt').unlink()
    (folder / 'full.pt').mkdir()


def set_weight(name, value):
    return changed(lambda state, folder: state['model'].update({name: value}))


def no_index(folder):
    (folder / 'sharded' / '.metadata').unlink()


def hostile_index(folder):
    (folder / 'sharded' / '.metadata').write_bytes(pickle.dumps(Hostile(folder / 'proof')))


def hostile_shard(folder):
    state = torch.load(folder / 'full.pt', weights_only=False)['state']
    metadata = {**metadata_of(state), 'more': Hostile(folder / 'proof')}
    shutil.rmtree(folder / 'sharded')
    content = {'model': state['model'], 'integrations': {'huggingface': metadata}}
    dcp.save({'state': content}, checkpoint_id=folder / 'sharded', no_dist=True)


def elsewhere(folder):
    """An index whose shards lie outside its folder."""
    with (folder / 'sharded' / '.metadata').open('rb') as file:
        index = pickle.load(file)
    for piece in index.storage_data.values():
        piece.relative_path = f'../{piece.relative_path}'
    for shard in (folder / 'sharded').glob('*.distcp'):
        shard.rename(folder / shard.name)
    (folder / 'sharded' / '.metadata').write_bytes(pickle.dumps(index))


def hostile(state, folder):
    state['callbacks'] = {'Own': Hostile(folder / 'proof')}


def hostile_metadata(state, folder):
    metadata_of(state)['dhrd']['task'] = Hostile(folder / 'proof')


WEIGHT = 'model.classifier.dense.bias'
DAMAGES = {
    'a text': ('full.pt', written(b'text'), ['full.pt: damaged', 'expected a whole checkpoint']),
    'nothing': ('full.pt', written(b''), ['full.pt: damaged']),
    'half of it': ('full.pt', half, ['full.pt: damaged']),
    'a folder of nothing': ('full.pt', a_folder, ['full.pt: ', '.metadata is missing']),
    'a pickle of old': ('full.pt', written(pickle.dumps({'state': {}})), ['full.pt: damaged']),
    'another dict': ('full.pt', saved({'a': 1}), ['full.pt: it holds no state; expected a checkpoint of Composer']),
    'a list': ('full.pt', saved([1, 2]), ['full.pt: it holds no state']),
    'a state without a model': ('full.pt', changed(lambda state, folder: state.pop('model')), ['it holds no model']),
    'no integrations': ('full.pt', changed(lambda state, folder: state.pop('integrations')), ['holds no integrations']),
    'another ComposerModel': (
        'full.pt',
        changed(lambda state, folder: state['integrations'].clear()),
        ['it describes no model; expected the checkpoint of a HuggingFaceModel'],
    ),
    'a pickle that runs': ('full.pt', changed(hostile), ['full.pt: cannot be read: it names', 'was not run']),
    'metadata that runs': ('full.pt', changed(hostile_metadata), ['cannot be read: it names', 'was not run']),
    'an index that runs': ('sharded', hostile_index, ['sharded: damaged', 'has no place in the index']),
    'a shard that runs': ('sharded', hostile_shard, ['sharded: cannot be read: it names', 'was not run']),
    'shards elsewhere': ('sharded', elsewhere, ['sharded: damaged', '../', 'the plain name of a file']),
    'an unknown model': (
        'full.pt',
        changed(lambda state, folder: metadata_of(state)['model']['config']['content'].update(model_type='lama')),
        ['full.pt: cannot be exported', 'lama'],
    ),
    'no model type': (
        'full.pt',
        changed(lambda state, folder: metadata_of(state)['model']['config']['content'].pop('model_type')),
        ['full.pt: cannot be exported', 'model_type'],
    ),
    'no label names': (
        'full.pt',
        changed(lambda state, folder: metadata_of(state)['dhrd'].pop('label_names')),
        ['full.pt: cannot be exported', 'label_names'],
    ),
    'an unknown head': (
        'full.pt',
        changed(lambda state, folder: metadata_of(state)['dhrd'].update(head='mpl')),
        ["head: found 'mpl'"],
    ),
    'a missing weight': (
        'full.pt',
        changed(lambda state, folder: state['model'].pop(WEIGHT)),
        ['full.pt: ', 'the weights do not fit', 'classifier.dense.bias'],
    ),
    'a weight of another shape': ('full.pt', set_weight(WEIGHT, torch.zeros(3)), ['do not fit', 'classifier.dense']),
    'a weight too many': ('full.pt', set_weight('model.more', torch.zeros(3)), ['do not fit', 'more']),
    'a NaN': ('full.pt', set_weight(WEIGHT, torch.full([16], torch.nan)), ['classifier.dense.bias', 'not finite']),
    'a tokenizer of text': ('full.pt', tokenizer_file('tokenizer.json', 'text'), ['tokenizer: cannot be restored']),
    'a file above': ('full.pt', tokenizer_file('../vocab.txt'), ["found a file named '../vocab.txt'"]),
    'a file in a folder': ('full.pt', tokenizer_file('a/vocab.txt'), ["found a file named 'a/vocab.txt'"]),
    'a file at the root': ('full.pt', tokenizer_file('/tmp/vocab.txt'), ["found a file named '/tmp/vocab.txt'"]),
    'a program': ('full.pt', tokenizer_file('run.sh'), ["found a file named 'run.sh'"]),
}


@pytest.mark.parametrize('name', DAMAGES)
def test_it_is_refused_in_one_line(refused, place, name):
    path, damage, words = DAMAGES[name]
    damage(place)
    for arguments in (['export', place / path, place / 'out'], ['evaluate', place / path, place / 'rows.jsonl']):
        line = refused(*arguments)
        for word in words:
            assert word in line
    assert not (place / 'proof').exists()


def test_shards_without_an_index(refused, place):
    no_index(place)
    assert 'sharded: ' in refused('export', place / 'sharded', place / 'out')


# ------------------------------------------------------------------------------------------- what train goes on from


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """A run's YAML, and its checkpoint."""
    folder = tmp_path_factory.mktemp('run')
    yaml = write_run(folder / 'material')
    config = OmegaConf.load(yaml)
    config.output_dir = str(folder / 'out')
    config.max_duration, config.save_interval, config.eval_interval = '2ba', '2ba', '0ep'
    config.callbacks.drop_reasoning_head.output_dir = '${output_dir}/slim'
    OmegaConf.save(config, yaml)
    train(load_config(yaml))
    return folder


@pytest.fixture
def here(run, tmp_path):
    """A copy of it, which more steps are asked of."""
    shutil.copytree(run / 'out', tmp_path / 'out')
    return tmp_path


def swapped(folder):
    """The model's folder, two words of its vocabulary in each other's place."""
    tiny_lm().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    content = json.loads((folder / 'tokenizer.json').read_text())
    vocab = content['model']['vocab']
    vocab['w1'], vocab['w2'] = vocab['w2'], vocab['w1']
    (folder / 'tokenizer.json').write_text(json.dumps(content))
    return f'tokenizer.name={folder}'


def wider(folder):
    tiny_lm(hidden=32).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return f'model.pretrained_model_name_or_path={folder}'


def other_rows(folder):
    folder.mkdir()
    rows = [{'idx': i, 'text': f'w{i} w1', 'label': 'yes', 'rationale': 'w2'} for i in range(8)]
    (folder / 'rows.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    return f'train_loader.source={folder / "rows.jsonl"}'


YES, NO, MAYBE = (f'{{value: {name}, answer: {name}}}' for name in ('"yes"', '"no"', 'maybe'))
LABELS = f'task.labels=[{MAYBE},{NO},{YES}]'
OTHER = {
    'label names': (LABELS, "label_names: found ['yes', 'no', 'maybe']; this run has ['maybe', 'no', 'yes']"),
    'head': ('model.head=linear', 'head: found mlp; this run has linear'),
    'pooling': ('model.pooling=mean', 'pooling: found last; this run has mean'),
    'rank of the adapters': ('model.lora.r=2', 'lora.r: found 4; this run has 2'),
    'no adapters': ('model.lora=null', "lora: found {'r': 4"),
    'markers': ('markers.reason=<why>', 'markers.reason: found <REASON>; this run has <why>'),
    'backbone': ('model.config_overrides={rms_norm_eps: 0.5}', 'model.rms_norm_eps: found 1e-06; this run has 0.5'),
    'its width': (wider, 'model.head_dim: found 8; this run has 16'),
    'tokenizer': (swapped, 'tokenizer.tokenizer.json: found'),
}
OTHER_STATE = {
    'dropout': ('model.classifier_dropout=0.5', 'model.classifier_dropout: found 0.2; this run has 0.5'),
    'optimizer': ('optimizer.name=adam', 'optimizer: found AdamW; this run has Adam'),
    'rows': (other_rows, 'train_loader (SHA-256 of its rows): found'),
    'seed': ('seed=18', 'seed: found 17; this run has 18'),
    'arm': (
        'algorithms.auxiliary_reasoning_loss=null',
        "algorithms: found ['auxiliary_reasoning_loss']; this run has []",
    ),
    'loss': ('model.label_smoothing=0.1', 'model.label_smoothing: found 0.0; this run has 0.1'),
    'layout': ('train_loader.layout=label_first', 'train_loader.layout: found reason_first; this run has label_first'),
}


@pytest.mark.parametrize('way', ['autoresume', 'load_path', 'load_weights_only'])
@pytest.mark.parametrize('name', OTHER | OTHER_STATE)
def test_a_checkpoint_of_another_configuration(refused, run, here, name, way):
    override, words = (OTHER | OTHER_STATE)[name]
    override = override if isinstance(override, str) else override(here / 'other')
    checkpoint = here / 'out' / 'checkpoints' / 'ep0-ba2-rank0.pt'
    overrides = [f'output_dir={here / "out"}', 'max_duration=4ba', override]
    if way != 'autoresume':
        overrides += ['autoresume=false', f'load_path={checkpoint}', 'save_folder=null']
    if way == 'load_weights_only':
        if name in OTHER_STATE:
            pytest.skip('which is not loaded')
        overrides += ['load_weights_only=true']
    line = refused('train', run / 'material' / 'tiny.yaml', *overrides)
    assert line.startswith(f'error: {"autoresume" if way == "autoresume" else "load_path"}: {checkpoint}: {words}')


def config_of(*overrides, streams=None):
    """What a checkpoint and its run would have to agree on, of their YAMLs."""
    config = OmegaConf.structured(Config(task='rte', optimizer={'name': 'adamw'}, max_duration='1ep'))
    config = OmegaConf.merge(config, OmegaConf.from_dotlist(list(overrides)))
    if streams:
        config.train_loader.streams = streams
    return _of_the_run(OmegaConf.to_yaml(config))


BOTH = ['algorithms.auxiliary_reasoning_loss={beta: 0.5}', 'train_loader.source=rows.jsonl']


@pytest.mark.parametrize(
    ('override', 'line'),
    [
        (
            'algorithms.auxiliary_reasoning_loss.beta=1',
            'algorithms.auxiliary_reasoning_loss.beta: found 0.5; this run has 1',
        ),
        (
            'algorithms.auxiliary_reasoning_loss.alpha=2',
            'algorithms.auxiliary_reasoning_loss.alpha: found 1.0; this run has 2',
        ),
        ('model.class_weights=[1,2]', 'model.class_weights: found None; this run has [1, 2]'),
        ('model.soft_label_weight=1', 'model.soft_label_weight: found 0.5; this run has 1.0'),
        ('model.reasoning_targets=rationale', 'model.reasoning_targets: found sequence; this run has rationale'),
        ('max_seq_len=8', 'max_seq_len: found 512; this run has 8'),
        ('global_train_batch_size=8', 'global_train_batch_size: found ???; this run has 8'),
        ('train_loader.weights=both', 'train_loader.weights: found None; this run has both'),
        ('train_loader.rationale_max_tokens=4', 'train_loader.rationale_max_tokens: found None; this run has 4'),
        (
            'train_loader.control=OnlyLabel',
            'train_loader.control: found ConsistentReasoningLabel; this run has OnlyLabel',
        ),
        (
            'algorithms.alibi={max_sequence_length: 9}',
            "algorithms: found ['auxiliary_reasoning_loss']; this run has ['al",
        ),
        ('algorithms.gradient_clipping={clipping_type: norm}', None),
        ('algorithms.auxiliary_reasoning_loss.schedule={name: linear}', None),
        ('optimizer.lr=1', None),
        ('max_duration=2ep', None),
        ('train_loader.num_workers=2', None),
        ('train_loader.dataset={predownload: 9}', None),
        ('train_loader.dataset={epoch_size: 60}', 'train_loader.dataset.epoch_size: found None; this run has 60'),
        ('eval_loaders.more={source: rows.jsonl}', None),
    ],
)
def test_what_a_run_that_goes_on_may_change_and_what_not(override, line):
    found = [*_compare(config_of(*BOTH), config_of(*BOTH, override))]
    assert not found if line is None else len(found) == 1 and found[0].startswith(line)


def test_the_mixture_of_streams_may_not_change():
    found, run = (config_of(streams={'a': {'local': 'a', 'repeat': repeat}}) for repeat in (4, 1))
    assert [*_compare(found, run)] == ['train_loader.streams.a.repeat: found 4; this run has 1']
    assert [*_compare(_of_the_run(None), run)] == []  # of an older version


def none_fit(state, folder):
    state['model'] = {f'other.{name}': value for name, value in state['model'].items()}


TRAIN = {
    'a pickle that runs': (changed(hostile), 'cannot be read: it names'),
    'metadata that runs': (changed(hostile_metadata), 'cannot be read: it names'),
    'weights that fit none': (changed(none_fit), 'weights: found none for'),
    'a missing weight': (
        changed(lambda state, folder: state['model'].pop(WEIGHT)),
        f'weights: found none for 1 of 53, such as {WEIGHT}',
    ),
    'a weight of another shape': (
        set_weight(WEIGHT, torch.zeros(3)),
        f'weights: {WEIGHT}: found [3]; this run has [16]',
    ),
    'another ComposerModel': (changed(lambda state, folder: state['integrations'].clear()), 'it describes no model'),
    'half of it': (half, 'damaged'),
}


@pytest.mark.parametrize('name', TRAIN)
def test_train_loads_no_such_checkpoint(refused, run, tmp_path, name):
    damage, words = TRAIN[name]
    shutil.copy(run / 'out' / 'checkpoints' / 'ep0-ba2-rank0.pt', tmp_path / 'full.pt')
    damage(tmp_path)
    overrides = [f'output_dir={tmp_path / "out"}', 'autoresume=false', f'load_path={tmp_path / "full.pt"}']
    line = refused('train', run / 'material' / 'tiny.yaml', *overrides, 'save_folder=null', 'max_duration=4ba')
    assert line.startswith(f'error: load_path: {tmp_path / "full.pt"}: ') and words in line
    assert not (tmp_path / 'proof').exists()


def test_train_resumes_from_no_checkpoint_that_runs(refused, run, here):
    checkpoint = here / 'out' / 'checkpoints' / 'ep0-ba2-rank0.pt'
    shutil.copy(checkpoint, here / 'full.pt')
    changed(hostile)(here)
    shutil.copy(here / 'full.pt', checkpoint)
    line = refused('train', run / 'material' / 'tiny.yaml', f'output_dir={here / "out"}', 'max_duration=4ba')
    assert line.startswith(f'error: autoresume: {checkpoint}: cannot be read: it names')
    assert not (here / 'proof').exists()


def test_train_unpacks_no_archive(refused, run, tmp_path):
    with tarfile.open(tmp_path / 'full.pt.tar', 'w') as archive:
        archive.add(run / 'out' / 'checkpoints' / 'ep0-ba2-rank0.pt', '../escaped.pt')
    overrides = [f'output_dir={tmp_path / "out"}', 'autoresume=false', f'load_path={tmp_path / "full.pt.tar"}']
    line = refused('train', run / 'material' / 'tiny.yaml', *overrides, 'save_folder=null', 'max_duration=4ba')
    assert 'full.pt.tar: it is a tar archive; expected the .pt file in it' in line

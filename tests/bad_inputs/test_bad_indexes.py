"""Shard sets that somebody else wrote: no verb writes where an index says, or believes what it cannot."""

import json
import shutil

import pytest
from configs import export_of, write_readable_run
from streaming import MDSWriter
from tiny import LABELS, triplet

from dhrd_plugin import write_triplets
from dhrd_plugin.errors import UserError
from dhrd_plugin.streams.dataset import StreamingTripletDataset
from dhrd_plugin.streams.rows import StreamRows
from dhrd_plugin.streams.stream import TripletStream

pytestmark = pytest.mark.usefixtures('one_thread')

TASK = {'name': 'tiny', 'prompt': '{input_text}', 'id': 'id', 'labels': LABELS}
VERBS = ('inspect', 'evaluate', 'show-batch')


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    """A set, plain and compressed; an export; a config of a run."""
    root = tmp_path_factory.mktemp('indexes')
    for name, compression in (('plain', None), ('packed', 'zstd')):
        write_triplets([triplet(i) for i in range(5)], root / name, compression=compression)
    export_of(TASK, root / 'slim')
    write_readable_run(root, TASK, {})
    return root


@pytest.fixture
def read(refused, made):
    """Has a verb refuse a set, here or at an address, and returns the line."""

    def run(verb, place):
        arguments = {
            'inspect': [place],
            'evaluate': [made / 'slim', place],
            'show-batch': [made / 'run.yaml', f'train_loader.{"remote" if "://" in str(place) else "local"}={place}'],
        }
        return refused(verb, *arguments[verb])

    return run


def copy(made, tmp_path, kind='plain', change=None, **entry):
    """A copy of a set whose index is changed."""
    folder = shutil.copytree(made / kind, tmp_path / 'set')
    index = json.loads((folder / 'index.json').read_text())
    index['shards'][0].update(entry)
    (change or (lambda index: None))(index)
    (folder / 'index.json').write_text(json.dumps(index))
    return folder


def rename(name, form='raw'):
    def change(index):
        index['shards'][0][f'{form}_data']['basename'] = name

    return change


@pytest.mark.parametrize('verb', VERBS)
@pytest.mark.parametrize('kind', ['plain', 'packed'])
@pytest.mark.parametrize('name', ['../proof', 'a/../../proof', '{folder}/proof'])
def test_a_name_outside_the_folder(read, made, tmp_path, verb, kind, name):
    folder = copy(made, tmp_path, kind, rename(name.format(folder=tmp_path)))
    assert 'index.json: names a file outside its folder: ' in read(verb, folder)
    assert not (tmp_path / 'proof').exists()


@pytest.mark.parametrize('verb', VERBS)
@pytest.mark.parametrize('form', ['raw', 'zip'])
def test_a_name_outside_the_folder_from_object_storage(read, made, tmp_path, s3, verb, form):
    proof = tmp_path / 'proof'
    folder = copy(made, tmp_path, 'packed', rename(str(proof), form))
    key = f'hostile/{verb}-{form}'
    for path in folder.iterdir():
        s3.put(f'{key}/{path.name}', path.read_bytes())
    assert f'{key}/index.json: names a file outside its folder: {proof}' in read(verb, f'{s3.bucket}/{key}')
    assert not proof.exists()


@pytest.mark.parametrize('entry', ['data', 'parent'])
def test_a_link_in_the_folder_leads_nowhere(made, tmp_path, caches, entry):
    """Unpacked in place, a shard would be written through the link."""
    (tmp_path / 'theirs').mkdir()
    folder = copy(made, tmp_path, 'packed', rename(f'{entry}/proof'))
    (folder / entry).symlink_to(tmp_path / 'theirs')
    for read in (
        lambda: list(StreamRows([TripletStream(local=str(folder))])),
        lambda: list(StreamingTripletDataset(local=str(folder), batch_size=1)),
    ):
        with pytest.raises(UserError, match=f'set/{entry}: is a link to outside of the shard set'):
            read()
    assert not list((tmp_path / 'theirs').iterdir())


def test_a_link_in_a_cache_removes_nothing(made, tmp_path, caches):
    folder = copy(made, tmp_path, 'packed', rename('data/proof'))
    (tmp_path / 'theirs').mkdir()
    (tmp_path / 'theirs' / 'proof').write_text('theirs')
    (tmp_path / 'cache').mkdir()
    (tmp_path / 'cache' / 'data').symlink_to(tmp_path / 'theirs')
    with pytest.raises(UserError, match='cache/data: is a link to outside of the shard set'):
        TripletStream(remote=str(folder), local=str(tmp_path / 'cache'))
    assert (tmp_path / 'theirs' / 'proof').read_text() == 'theirs'


def test_links_to_shards_are_read(made, tmp_path, caches):
    """As the hub's caches hold them."""
    folder = tmp_path / 'set'
    folder.mkdir()
    for path in (made / 'plain').iterdir():
        (folder / path.name).symlink_to(path)
    assert len(list(StreamRows([TripletStream(local=str(folder))]))) == 5


def test_an_index_that_changes_after_it_was_checked(made, tmp_path, caches):
    folder = copy(made, tmp_path, 'packed')
    stream = TripletStream(local=str(folder))
    shutil.rmtree(folder)
    copy(made, tmp_path, 'packed', rename('../proof'))
    with pytest.raises(UserError, match='names a file outside its folder'):
        StreamRows([stream])


def test_streams_of_streamings_own_are_refused(made):
    from streaming import Stream

    with pytest.raises(UserError, match='streams: found a Stream; expected a TripletStream'):
        StreamingTripletDataset(streams=[Stream(local=str(made / 'plain'))], batch_size=1)


FILE = {'basename': 'shard.00000.mds', 'bytes': 3, 'hashes': {}}
ENTRIES = {
    'no data': ({'raw_data': None}, 'found None; expected a file with basename, bytes and hashes'),
    'data a text': ({'raw_data': 'shard.00000.mds'}, 'is not an index of shards'),
    'a name that is none': ({'raw_data': {**FILE, 'basename': 5}}, 'expected a file with basename, bytes and hashes'),
    'an empty name': ({'raw_data': {**FILE, 'basename': ''}}, 'expected a file with basename, bytes and hashes'),
    'a zero byte': ({'raw_data': {**FILE, 'basename': 'a\0b'}}, 'expected a file with basename, bytes and hashes'),
    'the folder': ({'raw_data': {**FILE, 'basename': '.'}}, "found '.' among the shards"),
    'the index': ({'raw_data': {**FILE, 'basename': 'index.json'}}, "found 'index.json' among the shards"),
    'the summary': ({'raw_data': {**FILE, 'basename': './triplets.json'}}, "found './triplets.json' among the shards"),
    'the lock': ({'raw_data': {**FILE, 'basename': 'a/.lock'}}, "found 'a/.lock' among the shards"),
    'bytes below 0': ({'raw_data': {**FILE, 'bytes': -3}}, 'expected a file with basename, bytes and hashes'),
    'bytes true': ({'raw_data': {**FILE, 'bytes': True}}, 'expected a file with basename, bytes and hashes'),
    'no hashes': ({'raw_data': {'basename': 'a', 'bytes': 3}}, 'is not an index of shards: TypeError'),
    'hashes a list': ({'raw_data': {**FILE, 'hashes': []}}, 'expected a file with basename, bytes and hashes'),
    'more keys': ({'raw_data': {**FILE, 'more': 1}}, 'is not an index of shards: TypeError'),
    'samples a text': ({'samples': '5'}, "found '5' samples; expected a number"),
    'samples below 0': ({'samples': -1}, 'found -1 samples; expected a number'),
    'samples true': ({'samples': True}, 'found True samples; expected a number'),
    'samples without end': ({'samples': 10**15}, 'samples; expected a number, at most one a byte'),
    'another format': ({'format': 'parquet'}, "is not an index of shards: KeyError: 'parquet'"),
    'another version': ({'version': 1}, 'is not an index of shards: '),
    'columns a number': ({'column_names': 5}, 'found columns 5; expected a list of names'),
    'columns of numbers': ({'column_names': ['id', 5]}, "found columns ['id', 5]; expected a list of names"),
    'other columns': ({'column_names': ['text']}, "found columns ['text']; expected triplets, with a column 'id'"),
    'an unknown key': ({'more': 1}, 'is not an index of shards: TypeError'),
}  # fmt: skip
INDEXES = {
    'empty': b'',
    'no JSON': b'{',
    'a list': b'[]',
    'null': b'null',
    'a number': b'5',
    'no shards': b'{"version": 2}',
    'none': b'{"version": 2, "shards": []}',
    'shards a number': b'{"version": 2, "shards": 5}',
    'shards of numbers': b'{"version": 2, "shards": [5]}',
    'an object of shards': b'{"version": 2, "shards": {"a": {}}}',
    'digits': b'{"version": ' + b'9' * 5000 + b'}',
    'nested': b'[' * 100_000,
    'Latin-1': b'{"version": "\xe4"}',
}


@pytest.mark.parametrize('name', ENTRIES)
def test_an_entry_that_is_none(read, made, tmp_path, name):
    entry, words = ENTRIES[name]
    folder = copy(made, tmp_path, **entry)
    for verb in VERBS:
        line = read(verb, folder)
        assert words in line and str(folder) in line, verb


@pytest.mark.parametrize('name', INDEXES)
def test_an_index_that_is_none(read, made, tmp_path, name):
    folder = copy(made, tmp_path)
    (folder / 'index.json').write_bytes(INDEXES[name])
    for verb in VERBS:
        assert f'{folder}/index.json: is not an index of shards' in read(verb, folder), verb


def test_a_set_that_is_not_there(read, tmp_path):
    (tmp_path / 'rows.jsonl').write_text('{}')
    (tmp_path / 'empty').mkdir()
    for place in ('nowhere', 'empty', 'rows.jsonl'):
        assert f'{tmp_path / place}: has no index.json' in read('inspect', tmp_path / place)
    assert f'{tmp_path}/empty: has no index.json' in read('show-batch', tmp_path / 'empty')


def test_a_shard_of_another_size(read, made, tmp_path):
    folder = copy(made, tmp_path)
    (folder / 'shard.00000.mds').write_bytes(b'short')
    for verb in VERBS:
        assert 'shard.00000.mds: is damaged: 5 bytes where the index says' in read(verb, folder)


@pytest.mark.parametrize('count', [4, 6])
def test_rows_that_are_left_out_or_made_up(read, made, tmp_path, count):
    folder = copy(made, tmp_path, samples=count)
    for verb in VERBS[:2]:
        assert f'shard.00000.mds: holds other rows than the {count} that the index says' in read(verb, folder)


ROWS = {
    'a label that is a number': ({'label': 'int'}, {'label': 1}, 'row 1, field label: found 1; expected text'),
    'a label that is an object': ({'label': 'json'}, {'label': {}}, 'row 1, field label: found {}; expected text'),
    'labels that are numbers': ({'label': 'json'}, {'label': ['no', 5]}, 'row 1, field label: found 5; expected text'),
    'a label twice': ({'label': 'json'}, {'label': ['no', 'no']}, 'found ["no", "no"]; expected each class once'),
    'a text that is an object': ({'input_text': 'json'}, {'input_text': {}}, 'field input_text: found {}; expected'),
    'a rationale of numbers': ({'rationale': 'json'}, {'rationale': ['r', 5]}, 'field rationale: found 5; expected'),
    'a lone surrogate': ({'rationale': 'json'}, {'rationale': '\ud800'}, 'field rationale: is not valid Unicode'),
    'a weight of NaN': ({'weight': 'float64'}, {'weight': float('nan')}, 'field weight: found nan; expected a finite'),
    'an id of fractions': ({'id': 'float64'}, {'id': 0.5}, 'field id: found 0.5; expected text'),
    'a pickle': ({'group': 'pkl'}, {'group': 'g'}, 'Column group contains an unsafe type: pkl'),
}  # fmt: skip


@pytest.mark.parametrize('name', ROWS)
def test_rows_of_the_wrong_kind(read, tmp_path, name):
    columns, change, words = ROWS[name]
    columns = {**dict.fromkeys(('id', 'input_text', 'label'), 'str'), **columns}
    with MDSWriter(out=str(tmp_path / 'set'), columns=columns) as writer:
        writer.write({'id': '0', 'input_text': 'w1', 'label': 'no', **change})
    for verb in VERBS[:2]:
        line = read(verb, tmp_path / 'set')
        assert words in line and 'set/shard.00000.mds' in line, verb


def test_labels_that_the_classifier_does_not_know(read, tmp_path):
    write_triplets([{**triplet(0), 'label': 'perhaps'}], tmp_path / 'set')
    words = f"{tmp_path}/set, row 0: label: found 'perhaps'; expected one of yes, no, maybe"
    assert words in read('evaluate', tmp_path / 'set')


@pytest.mark.parametrize(
    'content', [b'', b'[]', b'5', b'{"shards": ["../proof"], "task": {"name": "../../x"}}', b'[' * 9999]
)
def test_the_summary_beside_the_index_is_not_believed(made, tmp_path, caches, content):
    from dhrd_plugin.cli import main

    folder = copy(made, tmp_path)
    (folder / 'triplets.json').write_bytes(content)
    assert main(['inspect', str(folder)]) == 0
    assert main(['evaluate', str(made / 'slim'), str(folder)]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ['set']


def test_sets_that_streaming_merged(read, made, tmp_path):
    """``merge_index`` puts the folder's name before each shard's, as they stand in an index that it read."""
    from streaming.base.util import merge_index

    for part in ('0', '1'):
        shutil.copytree(made / 'plain', tmp_path / 'set' / part)
    index = json.loads((tmp_path / 'set' / '1' / 'index.json').read_text())
    index['shards'][0]['raw_data']['basename'] = '../../proof'
    (tmp_path / 'set' / '1' / 'index.json').write_text(json.dumps(index))
    merge_index(str(tmp_path / 'set'))
    for verb in VERBS:
        assert 'names a file outside its folder: 1/../../proof' in read(verb, tmp_path / 'set')

"""What dhrd inspect says of a set, and what it refuses."""

import json

import pytest
from matplotlib.figure import Figure
from streaming import MDSWriter

from dhrd_plugin.data.inspect import inspect_set, main
from dhrd_plugin.data.shards import check_triplet, write_triplets
from dhrd_plugin.errors import UserError

ROWS = [
    {
        'id': str(i),
        'input_text': f'one two {i}',
        'label': 'yes' if i % 3 else 'no',
        'answer': 'Yes' if i % 3 else 'No',
        'rationale': [None, 'a reason' if i % 2 else ['a reason'], ['a', 'b']][i % 3],
    }
    for i in range(30)
]


def flip(path, position=-20):
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize('compression', [None, 'zstd'])
def test_counts(tmp_path, compression):
    write_triplets(ROWS, tmp_path / 'set', size_limit=60, compression=compression)
    contents = inspect_set(tmp_path / 'set', rows=3)
    assert (contents.rows, contents.without_rationale, contents.several) == (30, 10, 10)
    assert contents.labels == {'yes': 20, 'no': 10}
    assert contents.shard_count > 3 and contents.hashes == {'sha1', 'xxh64'}
    assert contents.findings.input == {3: 30} and contents.findings.sequence == {3: 10, 6: 10, 5: 10}
    assert [row['id'] for row in contents.first] == ['0', '1', '2']
    stored = sum(path.stat().st_size for path in (tmp_path / 'set').glob('shard.*'))
    assert contents.bytes == stored


def test_printed_and_drawn(tmp_path, capsys):
    rows = [*ROWS, {'id': 'leak', 'input_text': 'x\x1b[2J\n', 'label': 'yes', 'rationale': 'The answer is yes.'}]
    rows[-1]['probabilities'] = {'no': 0.25, 'yes': 0.75}
    write_triplets(rows, tmp_path / 'set')
    assert main([str(tmp_path / 'set'), '--rows', '40', '--png', str(tmp_path / 'a.png')]) == 0
    printed = capsys.readouterr().out
    assert (
        '31 rows' in printed
        and 'labels: no 10 (32%), yes 21 (68%)' in printed
        and 'hashes checked: sha1, xxh64' in printed
    )
    assert 'states the label in 1 rows: leak' in printed
    assert 'probabilities: 1 rows' in printed and '{"no": 0.25, "yes": 0.75}' in printed
    assert '"x\\u001b[2J\\n"' in printed  # a row cannot write to the terminal
    assert (tmp_path / 'a.png').read_bytes().startswith(b'\x89PNG')


def test_of_many_labels_the_most_frequent_are_drawn(tmp_path, monkeypatch):
    rows = [{'id': f'{i}-{j}', 'input_text': 'x', 'label': f'l{i}'} for i in range(300) for j in range(1 + (i < 20))]
    write_triplets(rows, tmp_path / 'set')
    drawn = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, 'savefig', lambda figure, *args, **how: drawn.append(figure) or save(figure, *args, **how)
    )
    assert main([str(tmp_path / 'set'), '--png', str(tmp_path / 'a.png')]) == 0
    labels = drawn[0].axes[1]
    assert {tick.get_text() for tick in labels.get_yticklabels()} == {f'l{i}' for i in range(20)}
    assert labels.get_title() == 'Labels, the 20 most frequent of 300'


def test_a_hash_is_checked_where_every_shard_has_it(tmp_path, capsys):
    write_triplets(ROWS[:2], tmp_path / 'set', size_limit=1)
    path = tmp_path / 'set' / 'index.json'
    for left, words in ((['sha1'], 'sha1'), ([], 'none')):
        index = json.loads(path.read_text())
        hashes = index['shards'][1]['raw_data']['hashes']
        index['shards'][1]['raw_data']['hashes'] = {name: hashes[name] for name in left}
        path.write_text(json.dumps(index))
        assert inspect_set(tmp_path / 'set').hashes == set(left)
        assert main([str(tmp_path / 'set')]) == 0
        assert f'hashes checked: {words}' in capsys.readouterr().out.replace('\n', ':')


def test_a_class_of_any_name_is_drawn(tmp_path):
    labels = ['$0-$50', '$50_$100', '(none)']
    rows = [{'id': f'r{name}', 'input_text': 'x', 'label': name} for name in ['', *labels]]
    write_triplets(rows, tmp_path / 'set', labelled=False)
    assert main([str(tmp_path / 'set'), '--png', str(tmp_path / 'a.png')]) == 0


def test_columns_with_a_default_may_be_missing(tmp_path):
    columns = dict.fromkeys(('id', 'input_text', 'label'), 'str')
    with MDSWriter(columns={**columns, 'source': 'str'}, out=str(tmp_path / 'set')) as writer:
        writer.write({'id': '7', 'input_text': 'x', 'label': 'yes', 'source': 'web'})
    (row,) = inspect_set(tmp_path / 'set').first
    assert row == check_triplet({'id': '7', 'input_text': 'x', 'label': 'yes'})


@pytest.mark.parametrize('compression', [None, 'zstd'])
@pytest.mark.parametrize('name', ['../outside', 'a/../../outside', '{folder}/outside'])
def test_an_index_that_names_files_outside_is_refused(tmp_path, compression, name):
    write_triplets(ROWS, tmp_path / 'set', compression=compression)
    index = json.loads((tmp_path / 'set' / 'index.json').read_text())
    name = name.format(folder=tmp_path)
    index['shards'][0]['raw_data']['basename'] = name
    (tmp_path / 'set' / 'index.json').write_text(json.dumps(index))
    with pytest.raises(UserError, match=f'index.json: names a file outside .*: {name}$'):
        inspect_set(tmp_path / 'set')
    assert not (tmp_path / 'outside').exists()


@pytest.mark.parametrize('compression', [None, 'zstd'])
def test_a_flipped_byte_is_refused_by_name(tmp_path, capsys, compression):
    write_triplets(ROWS, tmp_path / 'set', size_limit=60, compression=compression)
    name = 'shard.00002.mds' + ('.zstd' if compression else '')
    flip(tmp_path / 'set' / name)
    assert main([str(tmp_path / 'set')]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f'error: {tmp_path}/set/{name}: is damaged: its sha1 is ') and error.count('\n') == 1


def test_sets_that_are_not_whole(tmp_path):
    folder = tmp_path / 'set'
    with pytest.raises(UserError, match=r'has no index.json'):
        inspect_set(folder)
    write_triplets(ROWS, folder, size_limit=60)
    shard = folder / 'shard.00001.mds'
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(UserError, match=r'shard.00001.mds: is damaged: .* bytes where the index says'):
        inspect_set(folder)
    shard.unlink()
    with pytest.raises(UserError, match=r'has no shard.00001.mds, which the index names'):
        inspect_set(folder)
    (folder / 'index.json').write_text('{}')
    with pytest.raises(UserError, match=r'index.json: is not an index'):
        inspect_set(folder)


def test_damage_without_hashes_is_still_one_line(tmp_path):
    write_triplets(ROWS, tmp_path / 'set', hashes=[], compression='zstd')
    flip(tmp_path / 'set' / 'shard.00000.mds.zstd', 8)
    with pytest.raises(UserError, match=r'shard.00000.mds.zstd: cannot be read'):
        inspect_set(tmp_path / 'set')


def test_other_shards_are_told_apart(tmp_path):
    with MDSWriter(columns={'text': 'str'}, out=str(tmp_path / 'other')) as writer:
        writer.write({'text': 'x'})
    with pytest.raises(UserError, match=r"other: found columns \['text'\]; expected triplets, with a column 'id'"):
        inspect_set(tmp_path / 'other')
    columns = {
        'id': 'str',
        'input_text': 'str',
        'label': 'str',
        'answer': 'str',
        'rationale': 'pkl',
        'weight': 'float64',
        'group': 'str',
    }
    row = dict.fromkeys(columns, '') | {'weight': 1.0}
    with MDSWriter(columns=columns, out=str(tmp_path / 'pickled')) as writer:
        writer.write(row)
    with pytest.raises(UserError, match=r'cannot be read: .*unsafe type: pkl'):
        inspect_set(tmp_path / 'pickled')


def test_from_s3(s3, capsys):
    remote = f'{s3.bucket}/inspected'
    write_triplets(ROWS, remote, size_limit=60)
    assert main([remote, '--rows', '1']) == 0
    assert capsys.readouterr().out.startswith(f'{remote}: 30 rows')
    (shard, *_) = sorted((s3.folder / 'inspected').glob('*.00003.mds'))
    flip(shard)
    assert main([remote]) == 2
    assert f'{remote}/{shard.name}: is damaged' in capsys.readouterr().err
    assert main([f'{s3.bucket}/nothing']) == 2
    assert f'error: {s3.bucket}/nothing: has no index.json' in capsys.readouterr().err


@pytest.mark.parametrize('compression', [None, 'zstd'])
def test_the_index_is_read_as_streaming_merges_it(tmp_path, compression):
    from streaming.base.util import merge_index

    for part in ('0', '1'):
        write_triplets(ROWS[:3], tmp_path / 'set' / part, compression=compression)
    merge_index(str(tmp_path / 'set'))
    assert json.loads((tmp_path / 'set' / 'index.json').read_text())['shards'][1]['raw_data']['basename'][0] in '01'
    assert inspect_set(tmp_path / 'set').rows == 6

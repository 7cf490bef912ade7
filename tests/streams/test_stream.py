"""Streams of a loader: weights, settings that are refused, other providers, indexes that cannot be trusted."""

import json
import logging
import os
import shutil
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import pytest
from streaming import MDSWriter
from streaming.base.constant import LOCALS, SHM_TO_CLEAN
from streaming.base.shared.prefix import _pack_locals
from streaming.base.storage import download
from tiny import LABELS, triplet
from torch.utils.data import DataLoader

from dhrd_plugin import write_triplets
from dhrd_plugin.data.prepare import main as prepare
from dhrd_plugin.errors import UserError, one_line
from dhrd_plugin.streams import cache, remote
from dhrd_plugin.streams.dataset import StreamingTripletDataset
from dhrd_plugin.streams.rows import StreamRows
from dhrd_plugin.streams.settings import build_streams, check_settings
from dhrd_plugin.streams.stream import TripletStream
from dhrd_plugin.training.config import LoaderConfig

pytestmark = pytest.mark.usefixtures('caches')


@pytest.fixture(scope='module')
def sets(s3):
    """Three sets on the server, of 8, 16 and 32 rows, told apart by their ids."""
    for name, count in (('a', 8), ('b', 16), ('c', 32)):
        rows = [{**triplet(i, 3, 4), 'id': f'{name}{i}'} for i in range(count)]
        write_triplets(rows, f'{s3.bucket}/weights/{name}', size_limit=100)
    return f'{s3.bucket}/weights'


def loader(**settings):
    """A loader's settings, as the YAML gives them."""
    return asdict(LoaderConfig()) | settings


def epoch(streams, **dataset) -> list[str]:
    """The ids of one epoch."""
    settings = loader(streams=streams, dataset=dataset)
    check_settings(settings, 'train_loader')
    data = StreamingTripletDataset(streams=build_streams(settings, 'train_loader'), batch_size=4, **dataset)
    return [row['id'] for row in DataLoader(data, batch_size=None)]


@pytest.mark.parametrize(
    ('weights', 'dataset', 'counts'),
    [
        ({'a': {}, 'b': {}}, {}, {'a': 8, 'b': 16}),
        ({'a': {'repeat': 2}, 'b': {}}, {}, {'a': 16, 'b': 16}),
        ({'a': {'repeat': 0.5}, 'b': {'repeat': 1.5}}, {}, {'a': 4, 'b': 24}),
        ({'a': {'choose': 12}, 'b': {'choose': 4}}, {}, {'a': 12, 'b': 4}),
        ({'a': {'choose': 4}, 'b': {'repeat': 2}, 'c': {}}, {}, {'a': 4, 'b': 32, 'c': 32}),
        ({'a': {'proportion': 0.75}, 'b': {'proportion': 0.25}}, {}, {'a': 18, 'b': 6}),
        ({'a': {'proportion': 3}, 'c': {'proportion': 1}}, {'epoch_size': 20}, {'a': 15, 'c': 5}),
    ],
)
def test_weights_give_streams_their_share(sets, weights, dataset, counts):
    found = epoch({name: {'remote': f'{sets}/{name}', **weight} for name, weight in weights.items()}, **dataset)
    assert Counter(row[0] for row in found) == counts
    repeats = Counter(found)
    for name, count in counts.items():
        available = {'a': 8, 'b': 16, 'c': 32}[name]
        share = [times for row, times in repeats.items() if row[0] == name]
        assert len(share) == min(count, available) and max(share) - min(share) <= 1  # evenly


STREAM = {'remote': 's3://bucket/a'}


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        ({'streams': {'a': {**STREAM, 'propotion': 1}}}, "streams.a.propotion: unknown key; did you mean 'proport"),
        ({'streams': {'a': {'proportion': 1}}}, 'streams.a: found neither remote nor local'),
        ({'streams': {'a': 's3://bucket/a'}}, "streams.a: found 's3://bucket/a'; expected a mapping with remote or"),
        (
            {'streams': {'a': {**STREAM, 'repeat': 2, 'choose': 3}}},
            'streams.a: found repeat and choose; expected at most one of proportion, repeat, choose',
        ),
        (
            {'streams': {'a': {**STREAM, 'proportion': 1}, 'b': {**STREAM, 'repeat': 2}}},
            'streams: found proportion in a and repeat in b; expected proportion in all of them or in none',
        ),
        (
            {'streams': {'a': {**STREAM, 'proportion': 1}, 'b': STREAM}},
            'streams: found proportion in a and no weight in b',
        ),
        ({'streams': {'a': {**STREAM, 'proportion': -1}}}, 'streams.a.proportion: found -1; expected a number of 0'),
        ({'streams': {'a': {**STREAM, 'repeat': 'twice'}}}, "streams.a.repeat: found 'twice'; expected a number"),
        ({'streams': {'a': {**STREAM, 'choose': 1.5}}}, 'streams.a.choose: found 1.5; expected a whole number'),
        (
            {'streams': {'a': {**STREAM, 'repeat': True}}},
            'streams.a.repeat: found True; expected a number of 0 or more',
        ),
        ({'streams': {'a': {**STREAM, 'split': 3}}}, 'streams.a.split: found 3; expected Optional[str]'),
        ({'streams': {'a': {**STREAM, 'repeat': 0}}}, 'streams: found only weights of 0; expected one above'),
        (
            {'streams': {'a': {**STREAM, 'download_retry': 0}}},
            'streams.a.download_retry: found 0; expected a whole num',
        ),
        ({'remote': 's3://a', 'streams': {'a': STREAM}}, ': found remote and streams; expected one of them'),
        (
            {'streams': {'a': {**STREAM, 'repeat': 2}}, 'dataset': {'epoch_size': 9}},
            'dataset.epoch_size: found with repeat or choose',
        ),
        (
            {'local': 'x', 'dataset': {'cache_limit': '1gb'}},
            'dataset.cache_limit: found without a remote; it would del',
        ),
        ({'remote': 's3://a', 'dataset': {'download_retries': 2}}, "did you mean 'download_retry'?"),
        ({'remote': 's3://a', 'dataset': {'download_timeout': 0}}, 'dataset.download_timeout: found 0; expected a num'),
        (
            {'remote': 's3://a', 'dataset': {'predownload': 'all'}},
            "dataset.predownload: found 'all'; expected Optional",
        ),
        (
            {'remote': 's3://a', 'dataset': {'keep_zip': 'odd'}},
            "dataset.keep_zip: found 'odd'; expected Optional[bool]",
        ),
        ({'remote': 's3://a', 'dataset': {'shuffle': True}}, 'dataset.shuffle: belongs to the loader'),
        ({'remote': 's3://a', 'dataset': {'batch_size': 2}}, 'dataset.batch_size: follows from global_train_batch'),
        ({'remote': 's3://a', 'dataset': {'shuffle_algo': 'py1'}}, "dataset.shuffle_algo: found 'py1'; did you mean"),
    ],
)
def test_wrong_settings_are_told_by_their_key(settings, message):
    with pytest.raises(UserError) as error:
        check_settings(loader(**settings), 'train_loader')
    assert message in str(error.value) and str(error.value).startswith('train_loader')
    assert '\n' not in str(error.value)


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        ({'streams': {'a': {**STREAM, 'repeat': 2}}}, 'eval_loaders.x.streams.a.repeat: found in evaluation'),
        ({'remote': 's3://a', 'dataset': {'epoch_size': 9}}, 'eval_loaders.x.dataset.epoch_size: found in evaluation'),
    ],
)
def test_what_evaluation_would_ignore_is_refused(settings, message):
    check_settings(loader(remote='s3://a', dataset={'download_retry': 9}), 'eval_loaders.x', training=False)
    with pytest.raises(UserError, match=message):
        check_settings(loader(**settings), 'eval_loaders.x', training=False)


@pytest.mark.parametrize(
    ('dataset', 'message'),
    [
        ({'batching_method': 'odd'}, "train_loader.dataset.batching_method: found 'odd'; expected one of"),
        ({'cache_limit': '1kb'}, 'train_loader: Minimum cache usage'),
        ({'epoch_size': 'many'}, "train_loader.dataset.epoch_size: found 'many': Unsupported value/suffix many"),
    ],
)
def test_streamings_own_complaints_name_the_loader(sets, dataset, message):
    with pytest.raises(UserError) as error:
        epoch({'a': {'remote': f'{sets}/a'}}, **dataset)
    assert str(error.value).startswith(message) and '\n' not in str(error.value)


def test_evaluation_reads_streams_by_index_once_fetched(sets, s3, caches, monkeypatch):
    streams = build_streams(loader(streams={name: {'remote': f'{sets}/{name}'} for name in 'ab'}), 'eval_loaders.x')
    rows = StreamRows(streams)
    assert len(rows) == 24 and not list(caches.rglob('*.mds'))
    assert rows[9]['id'] == 'b1'
    assert len(list(caches.rglob('*.mds'))) == 1  # a look at one row fetches one shard
    StreamRows(streams).fetch()
    monkeypatch.setenv('S3_ENDPOINT_URL', 'http://127.0.0.1:9')
    assert [rows[i]['id'] for i in range(24)] == [f'a{i}' for i in range(8)] + [f'b{i}' for i in range(16)]


def test_a_cache_limit_evicts_and_fetches_again(s3, caches):
    write_triplets([triplet(i, 40, 4) for i in range(64)], f'{s3.bucket}/large', size_limit=800)
    data = StreamingTripletDataset(remote=f'{s3.bucket}/large', batch_size=4, cache_limit=20_000, predownload=4)
    for _ in range(2):
        assert sorted(int(row['id']) for row in data) == list(range(64))
        kept = sum(path.stat().st_size for path in caches.rglob('*.mds'))
        assert 0 < kept < 20_000 < 1.5 * sum(path.stat().st_size for path in (s3.folder / 'large').glob('*.mds'))


# ------------------------------------------------------------------------------------------------
# Providers


@pytest.mark.parametrize(
    'address',
    [
        'gs://bucket/a',
        'oci://bucket@namespace/a',
        'azure://account/a',
        'azure-dl://account/a',
        'dbfs:/Volumes/catalog/schema/volume/a',
        'dbfs:/a',
        'hf://datasets/org/repo/a',
    ],
)
def test_other_addresses_reach_streamings_own_downloaders(address, tmp_path, monkeypatch):
    folder = tmp_path / 'a'
    write_triplets([triplet(i) for i in range(3)], folder)
    asked = []

    class StandIn(download.LocalDownloader):
        def _validate_remote_path(self, remote):
            assert remote.startswith(address)

        def _download_file_impl(self, remote, local, timeout):
            asked.append(remote)
            shutil.copy(folder / remote.removeprefix(f'{address}/'), local)

    scheme = 'dbfs-uc' if address.startswith('dbfs:/Volumes') else address.partition(':')[0]
    assert scheme in download.DOWNLOADER_MAPPINGS
    monkeypatch.setitem(download.DOWNLOADER_MAPPINGS, scheme, StandIn)
    data = StreamingTripletDataset(remote=address, batch_size=1)
    assert [row['id'] for row in data] == ['0', '1', '2']
    assert asked == [f'{address}/index.json', f'{address}/shard.00000.mds']


@pytest.mark.parametrize(
    ('address', 'message'),
    [
        ('gs://bucket/a', 'GCS_KEY'),
        ('azure://account.blob.core.windows.net/a/b', 'check AZURE_ACCOUNT_NAME'),
        ('oci://bucket@namespace/a', 'check ~/.oci/config'),
        ('dbfs:/Volumes/a/b/c/d', 'check DATABRICKS_HOST and DATABRICKS_TOKEN'),
    ],
)
def test_missing_credentials_are_told_with_the_way_out(address, message, tmp_path, monkeypatch):
    for name in list(os.environ):
        if name.startswith(('GOOGLE', 'GCS', 'AZURE', 'OCI', 'DATABRICKS')):
            monkeypatch.delenv(name)
    monkeypatch.setenv('HOME', str(tmp_path))
    with pytest.raises(UserError) as error:
        TripletStream(remote=address, key='train_loader', download_retry=1, download_timeout=4)
    assert str(error.value).startswith(f'train_loader.remote: {address}/index.json: cannot be read: ')
    assert message in str(error.value) and '\n' not in str(error.value)


def test_secrets_of_an_address_are_not_told():
    error = ValueError('http://me:secret@host/a?X-Amz-Signature=abc and https://b.net/c?sig=xyz failed')
    expected = 'ValueError: http://***@host/a?X-Amz-Signature=*** and https://b.net/c?sig=*** failed'
    assert one_line(error, kind=True) == expected


def test_a_slow_answer_is_given_up_in_time():
    import time

    start = time.monotonic()
    with pytest.raises(TimeoutError, match=r'not here after 0.2 s \(download_timeout\)'):
        remote.within(0.2, lambda: time.sleep(5))
    assert time.monotonic() - start < 2
    with pytest.raises(KeyError):
        remote.within(5, lambda: {}['a'])
    assert remote.within(5, lambda: 3) == 3


# ------------------------------------------------------------------------------------------------
# Indexes


@pytest.mark.parametrize('name', ['../outside.mds', '/tmp/outside.mds', 'a/../../outside.mds'])
def test_an_index_names_no_file_outside_of_its_folder(tmp_path, name):
    write_triplets([triplet(0)], tmp_path / 'set')
    index = json.loads((tmp_path / 'set' / 'index.json').read_text())
    index['shards'][0]['raw_data']['basename'] = name
    (tmp_path / 'set' / 'index.json').write_text(json.dumps(index))
    with pytest.raises(UserError, match=r'index.json: names a file outside its folder'):
        TripletStream(remote=str(tmp_path / 'set'))


@pytest.mark.parametrize('text', ['', '{}', '[]', '{"version": 2, "shards": []}', '{"version": 2, "shards": [{}]}'])
def test_what_is_no_index_is_refused(tmp_path, text):
    (tmp_path / 'index.json').write_text(text)
    with pytest.raises(UserError, match=r'index.json: is not an index of shards'):
        TripletStream(remote=str(tmp_path))


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'raw_data': None}, ': found None; expected a file with basename, bytes and hashes'),
        ({'raw_data': {'basename': 'a.mds', 'bytes': 'many', 'hashes': {}}}, ": found FileInfo(basename='a.mds', byt"),
        ({'raw_data': {'basename': 'a.mds', 'bytes': 3}}, ': TypeError: FileInfo.__init__() missing 1 required'),
        ({'samples': '9'}, ": found '9' samples; expected a number"),
        ({'format': 'parquet'}, ": KeyError: 'parquet'"),
        ('zip_data', ": KeyError: 'zip_data'"),
        ('raw_data', ": KeyError: 'raw_data'"),
    ],
)
def test_an_index_without_what_readers_need_is_refused(tmp_path, change, message):
    write_triplets([triplet(0)], tmp_path)
    index = json.loads((tmp_path / 'index.json').read_text())
    if isinstance(change, str):
        del index['shards'][0][change]
    else:
        index['shards'][0].update(change)
    (tmp_path / 'index.json').write_text(json.dumps(index))
    with pytest.raises(UserError) as error:
        TripletStream(remote=str(tmp_path))
    assert str(error.value).startswith(f'{tmp_path}/index.json: is not an index of shards{message}')


def test_pickles_are_refused(tmp_path):
    columns = {'id': 'str', 'input_text': 'str', 'label': 'pkl'}
    with MDSWriter(out=str(tmp_path / 'set'), columns=columns) as writer:
        writer.write({'id': '0', 'input_text': 'w1', 'label': 'yes'})
    with pytest.raises(UserError, match=r'train_loader: .*unsafe type: pkl'):
        StreamRows([TripletStream(local=str(tmp_path / 'set'), key='train_loader')])
    with pytest.raises(UserError, match='unsafe type: pkl'):
        StreamingTripletDataset(local=str(tmp_path / 'set'), batch_size=1)


def test_hashes_that_are_asked_for_or_missing(tmp_path):
    write_triplets([triplet(0)], tmp_path / 'hashed')
    with pytest.raises(UserError) as error:
        StreamingTripletDataset(remote=str(tmp_path / 'hashed'), validate_hash='sha2', batch_size=1)
    assert str(error.value).endswith("index.json: holds no hash 'sha2' (validate_hash); did you mean 'sha1'?")
    assert len(list(StreamingTripletDataset(remote=str(tmp_path / 'hashed'), validate_hash='xxh64', batch_size=1))) == 1
    write_triplets([triplet(0)], tmp_path / 'bare', hashes=[])
    with pytest.warns(UserWarning, match='holds no hashes, so damaged shards go unseen'):
        StreamingTripletDataset(remote=str(tmp_path / 'bare'), batch_size=1)


def test_a_shard_that_is_missing_here_is_told_before_a_row_is_read(tmp_path):
    write_triplets([triplet(i) for i in range(9)], tmp_path / 'set', size_limit=20)
    (tmp_path / 'set' / 'shard.00002.mds').unlink()
    with pytest.raises(UserError) as error:
        TripletStream(local=str(tmp_path / 'set'), key='train_loader')
    message = f'train_loader.local: {tmp_path}/set: has no shard.00002.mds, which the index names'
    assert str(error.value) == message


# ------------------------------------------------------------------------------------------------
# What is left


def test_shards_of_a_replaced_set_are_named(s3, tmp_path, capsys):
    data = tmp_path / 'train.jsonl'
    out = f'{s3.bucket}/replaced'
    for turn in ('old', 'new'):
        rows = [{'idx': i, 'premise': turn, 'hypothesis': 'h', 'label': 'entailment'} for i in range(3)]
        data.write_text(''.join(json.dumps(row) + '\n' for row in rows))
        assert prepare(['--task', 'rte', '--input', str(data), '--output', out, '--overwrite']) == 0
    (left,) = [line for line in capsys.readouterr().out.splitlines() if 'replaced set' in line]
    index = json.loads((s3.folder / 'replaced' / 'index.json').read_text())
    present = {path.name for path in (s3.folder / 'replaced').glob('*.mds')}
    (old,) = present - {shard['raw_data']['basename'] for shard in index['shards']}
    assert left == f'  of the replaced set, which runs may still read: 1 files, {old}'


def test_a_failing_attempt_is_logged(monkeypatch, caplog):
    monkeypatch.setenv('S3_ENDPOINT_URL', 'http://127.0.0.1:9')
    with caplog.at_level(logging.WARNING), pytest.raises(UserError):
        remote.read('s3://bucket/x', attempts=2)
    assert 's3://bucket/x: attempt 1 of 2 failed: EndpointConnectionError: ' in caplog.text


def test_memory_of_a_run_that_lives_is_not_freed(tmp_path):
    """As another run's start does it, with this one at work."""
    write_triplets([triplet(i) for i in range(9)], tmp_path / 'set')
    data = StreamingTripletDataset(local=str(tmp_path / 'set'), batch_size=1)
    segments = {path.name for path in Path('/dev/shm').glob(f'{data._shm_prefix_int:06}_*')}
    with cache.machine_lock():
        cache._free_what_killed_runs_left(cache._root())
    assert segments and segments <= {path.name for path in Path('/dev/shm').iterdir()}
    assert sorted(row['label'] for row in data) == sorted(3 * LABELS)


def test_a_start_that_is_killed_while_it_frees_leaves_the_rest_to_the_next(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, 'SHARED_MEMORY', tmp_path)
    for name in SHM_TO_CLEAN:
        (tmp_path / f'999983_{name}').touch()
    (tmp_path / f'999983_{LOCALS}').write_bytes(_pack_locals([f'{cache._root()}/gone/set'], 999983))
    remove = Path.unlink

    def killed_at_the_third(path, missing_ok=False):
        if len(list(tmp_path.iterdir())) == len(SHM_TO_CLEAN) - 2:
            raise KeyboardInterrupt
        remove(path, missing_ok)

    with cache.machine_lock(), monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, 'unlink', killed_at_the_third)
        cache._free_what_killed_runs_left(cache._root())
    with cache.machine_lock():
        cache._free_what_killed_runs_left(cache._root())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ('place', 'expected'),
    [('s3://b/x', True), ('dbfs:/Volumes/x', True), ('hub:glue:rte', False), ('a:b.jsonl', False), ('x/y', False)],
)
def test_what_is_an_address(place, expected):
    assert remote.is_remote(place) == expected

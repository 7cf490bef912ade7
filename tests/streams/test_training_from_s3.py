"""Training from a real S3 server: the rows, the failures, the caches, one and two ranks, killed runs."""

import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import time
from collections import Counter
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace

import pytest
from faulty_proxy import FaultyProxy, dies_after, flaky
from fork_server import use_forks
from forks import Popen, run_ranks
from remote_runs import ROWS, SHARD_SIZE, config_of, ids_written, read_ids, run_alone, write_inputs
from tiny import triplet

from dhrd_plugin import train, write_triplets
from dhrd_plugin.errors import UserError
from dhrd_plugin.streams import cache

pytestmark = pytest.mark.usefixtures('one_thread', 'caches')

IDS = sorted(row['id'] for row in ROWS)
SHORT = 'train_loader.dataset={download_retry: 2, download_timeout: 2}'
LIMIT = 2 * 2 + 1  # seconds: two attempts of two, and the pause between them
WORK = 60  # seconds that the run itself may take besides, on a machine that does other things; a hang takes for ever


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    """A folder with the inputs of every run."""
    folder = tmp_path_factory.mktemp('runs')
    write_inputs(folder)
    write_triplets(ROWS, folder / 'train', size_limit=SHARD_SIZE)
    return folder


@pytest.fixture(scope='module')
def remote(s3):
    """The same rows, on the server."""
    write_triplets(ROWS, f'{s3.bucket}/train', size_limit=SHARD_SIZE)
    return f'{s3.bucket}/train'


@pytest.fixture(scope='module')
def on_disk(root):
    """The run that all others are held against."""
    return run(root, root / 'disk', f'train_loader.local={root}/train')


@pytest.fixture
def proxy(s3, monkeypatch):
    """Starts a faulty server in front of the real one, and has runs ask it."""
    proxies = []

    def start(fault):
        proxies.append(FaultyProxy(s3.endpoint, fault))
        monkeypatch.setenv('S3_ENDPOINT_URL', proxies[-1].endpoint)
        return proxies[-1]

    yield start
    for started in proxies:
        started.close()


def run(root: Path, out: Path, *overrides: str) -> SimpleNamespace:
    """One training in this process: the ids it read, in their order, and the weights it exported."""
    config = config_of(root, out, *overrides)
    with ids_written(out / 'ids0'):
        train(config).close()
    return SimpleNamespace(ids=read_ids(out), weights=(out / 'slim' / 'model.safetensors').read_bytes())


def failure(root: Path, out: Path, *overrides: str) -> tuple[str, float]:
    """What a run says that ends with an error, and the seconds it takes to."""
    start = time.monotonic()
    with pytest.raises(UserError) as error:
        run(root, out, *overrides)
    assert '\n' not in str(error.value)
    return str(error.value), time.monotonic() - start


def rows(count: int, first: int) -> list[dict]:
    return [triplet(i, 3, 4) for i in range(first, first + count)]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-20] ^= 1
    path.write_bytes(data)


# ------------------------------------------------------------------------------------------------
# The same rows, the same weights


@pytest.mark.parametrize('workers', [0, 2])
def test_the_rows_and_the_weights_are_those_from_disk(root, on_disk, remote, tmp_path, caches, workers):
    found = run(root, tmp_path, f'train_loader.remote={remote}', f'train_loader.num_workers={workers}')
    assert sorted(on_disk.ids[:64]) == sorted(on_disk.ids[64:]) == IDS
    if workers == 0:
        assert found.ids == on_disk.ids  # in their order
        assert found.weights == on_disk.weights
    assert Counter(found.ids) == Counter(2 * IDS)
    (folder,) = caches.iterdir()
    assert len(list(folder.glob('*.mds'))) > 10


def test_one_request_in_five_fails_and_nothing_changes(root, on_disk, remote, tmp_path, proxy):
    server = proxy(flaky(seed=1))
    found = run(root, tmp_path, f'train_loader.remote={remote}')
    faults = Counter(fault for _, fault in server.asked)
    assert sum(faults.values()) - faults[None] > 7 and len(faults) > 3
    assert found.ids == on_disk.ids and found.weights == on_disk.weights


def test_compressed_shards_and_a_split(root, on_disk, s3, tmp_path, caches):
    for name in ('train', 'val'):
        write_triplets(ROWS, f'{s3.bucket}/packed/{name}', size_limit=SHARD_SIZE, compression='zstd')
    found = run(
        root,
        tmp_path,
        f'train_loader.remote={s3.bucket}/packed',
        'train_loader.split=train',
        f'eval_loaders.val.remote={s3.bucket}/packed/val',
    )
    assert found.ids == on_disk.ids and found.weights == on_disk.weights
    assert not list(caches.rglob('*.zstd')) and list(caches.rglob('train/*.mds'))


# ------------------------------------------------------------------------------------------------
# Two ranks, by Composer's launcher


@pytest.fixture(scope='module')
def two_ranks(root, s3, remote, tmp_path_factory):
    """One launch of four runs on two ranks, the last of which cannot be finished."""
    folder, caches = root / 'two', tmp_path_factory.mktemp('caches')
    write_triplets(rows(31, 100), f'{s3.bucket}/odd', size_limit=SHARD_SIZE)
    servers = [FaultyProxy(s3.endpoint, fault) for fault in (flaky(2), dies_after(7, how='stall'))]
    streamed, evaluated = f'train_loader.remote={remote}', f'eval_loaders.odd.remote={s3.bucket}/odd'
    again = [streamed, SHORT, f'train_loader.cache_dir={caches}/empty', 'train_loader.dataset.predownload=8']
    runs = {
        'disk': (s3.endpoint, [f'train_loader.local={root}/train']),
        'flaky': (servers[0].endpoint, [streamed, evaluated]),
        'gone': ('http://127.0.0.1:9', [streamed, SHORT]),
        'dies': (servers[1].endpoint, again),
    }
    cases = [
        {'name': name, 'env': {'S3_ENDPOINT_URL': server}, 'overrides': overrides, 'fails': name == 'gone'}
        for name, (server, overrides) in runs.items()
    ]
    folder.mkdir()
    (folder / 'model').symlink_to(root / 'model')
    (folder / 'cases.json').write_text(json.dumps(cases))
    script, env = Path(__file__).parents[1] / 'remote_runs.py', {**os.environ, 'DHRD_CACHE': str(caches)}
    done = run_ranks(2, script, folder, folder / 'cases.json', status=None, env=env)
    ended = time.time()
    for server in servers:
        server.close()
    return SimpleNamespace(folder=folder, done=done, ended=ended, flaky=servers[0])


def test_two_ranks_read_each_row_once_through_a_failing_server(two_ranks):
    runs = {name: read_ids(two_ranks.folder / name) for name in ('disk', 'flaky')}
    assert Counter(runs['disk']) == Counter(runs['flaky']) == Counter(2 * IDS), two_ranks.done.stderr[-3000:]
    for rank in (0, 1):
        files = [two_ranks.folder / name / f'ids{rank}' for name in runs]
        assert files[0].read_text() == files[1].read_text()
    weights = [(two_ranks.folder / name / 'slim' / 'model.safetensors').read_bytes() for name in runs]
    assert weights[0] == weights[1]
    assert sum(fault is not None for _, fault in two_ranks.flaky.asked) > 5


def test_two_ranks_evaluate_each_row_once(two_ranks):
    summary = json.loads((two_ranks.folder / 'flaky' / 'summary.json').read_text())
    (accuracy,) = [value for name, value in summary['metrics']['odd'].items() if 'ccuracy' in name]
    assert summary['world_size'] == 2
    assert abs(accuracy * 31 - round(accuracy * 31)) < 1e-4 and 0 < accuracy < 1


def test_two_ranks_are_told_alike_that_the_server_is_gone(two_ranks):
    errors = [(two_ranks.folder / 'gone' / f'error{rank}').read_text() for rank in (0, 1)]
    assert errors[0] == errors[1]
    assert errors[0].startswith('train_loader.remote: s3://bucket/train/index.json: cannot be read: ')
    assert 'http://127.0.0.1:9' in errors[0] and 'S3_ENDPOINT_URL' in errors[0]


def test_a_server_that_dies_meanwhile_ends_two_ranks(two_ranks):
    done, folder = two_ranks.done, two_ranks.folder / 'dies'
    assert done.returncode != 0
    assert 0 < len(read_ids(folder)) < 64
    lines = {line for line in (done.stdout + done.stderr).splitlines() if line.startswith('error: ')}
    assert lines and all(line.startswith('error: train_loader.remote: s3://bucket/train/') for line in lines)
    assert all('.mds: cannot be read: TimeoutError: not here after 2 s' in line for line in lines)
    assert not re.search(r'File ".*dhrd_plugin/', done.stdout + done.stderr)  # a traceback of the rank left alone
    last = max(path.stat().st_mtime for path in folder.glob('ids*'))
    assert two_ranks.ended - last < LIMIT + 60  # the launcher waits for the other rank to end, up to 30 s


# ------------------------------------------------------------------------------------------------
# Servers that are gone, one rank


@pytest.mark.parametrize('how', ['refused', 'stall', '503'])
def test_a_server_that_is_gone_is_told_before_the_model_is_built(root, remote, tmp_path, proxy, monkeypatch, how):
    if how == 'refused':
        monkeypatch.setenv('S3_ENDPOINT_URL', 'http://127.0.0.1:9')
    else:
        proxy(lambda path: how)
    no_model = 'model.pretrained_model_name_or_path=/no/model'
    message, seconds = failure(root, tmp_path, f'train_loader.remote={remote}', SHORT, no_model)
    assert message.startswith(f'train_loader.remote: {remote}/index.json: cannot be read: ')
    address = os.environ['S3_ENDPOINT_URL']
    way_out = f'check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and S3_ENDPOINT_URL, which is {address}'
    assert message.endswith(f'(2 attempts); {way_out}')
    assert seconds < LIMIT + WORK


def test_what_another_attempt_cannot_mend_is_told_at_once(root, s3, remote, tmp_path, monkeypatch):
    message, _ = failure(root, tmp_path, f'train_loader.remote={s3.bucket}/nothing')
    assert message == f'train_loader.remote: {s3.bucket}/nothing: has no index.json, so it is not a finished shard set'
    message, _ = failure(root, tmp_path, 'train_loader.remote=s3x://bucket/train')
    assert message.startswith('train_loader.remote: s3x://bucket/train/index.json: cannot be read: ValueError: Unsupp')
    streams = f'train_loader.streams={{a: {{remote: {remote}}}, b: {{remote: {s3.bucket}/nothing}}}}'
    assert failure(root, tmp_path, streams)[0].startswith('train_loader.streams.b.remote: ')
    both = f'train_loader.remote={remote}', f'eval_loaders.val.remote={s3.bucket}/nothing'
    assert failure(root, tmp_path, *both)[0].startswith('eval_loaders.val.remote: ')
    monkeypatch.setenv('AWS_SECRET_ACCESS_KEY', 'wrong')
    message, seconds = failure(root, tmp_path, f'train_loader.remote={remote}')
    assert 'ClientError 403: ' in message and 'AWS_SECRET_ACCESS_KEY' in message and 'wrong' not in message
    assert seconds < WORK


@pytest.mark.parametrize(('how', 'workers'), [('stall', 0), ('reset', 1)])
def test_a_server_that_dies_meanwhile_ends_the_run_by_the_shards_name(root, remote, tmp_path, proxy, how, workers):
    proxy(dies_after(5, how=how))
    ahead, fetched = 'train_loader.dataset.predownload=8', f'train_loader.num_workers={workers}'
    message, seconds = failure(root, tmp_path, f'train_loader.remote={remote}', SHORT, ahead, fetched)
    assert message.startswith(f'train_loader.remote: {remote}/') and '.mds: cannot be read: ' in message
    assert 0 < len(read_ids(tmp_path)) < 64
    assert not (tmp_path / 'slim').exists()  # the epoch has not just ended early
    assert seconds < LIMIT + WORK


# ------------------------------------------------------------------------------------------------
# Damage


@pytest.mark.parametrize('compression', [None, 'zstd'])
def test_a_flipped_byte_on_the_server_is_refused_by_name(root, s3, tmp_path, caches, compression):
    write_triplets(ROWS, f'{s3.bucket}/flipped', size_limit=SHARD_SIZE, overwrite=True, compression=compression)
    index = json.loads((s3.folder / 'flipped' / 'index.json').read_text())
    name = (index['shards'][5]['zip_data'] or index['shards'][5]['raw_data'])['basename']
    flip(s3.folder / 'flipped' / name)
    for _ in range(2):  # nothing damaged has stayed in the cache
        message, _ = failure(root, tmp_path, f'train_loader.remote={s3.bucket}/flipped')
        assert message.startswith(f'train_loader.remote: {s3.bucket}/flipped/{name}: is damaged: its sha1 is ')
    assert not list(caches.rglob(name.removesuffix('.zstd')))
    message, _ = failure(
        root, tmp_path, f'train_loader.local={root}/train', f'eval_loaders.val.remote={s3.bucket}/flipped'
    )
    assert message.startswith(f'eval_loaders.val.remote: {s3.bucket}/flipped/{name}: is damaged')


def test_a_flipped_byte_here_is_refused_too(root, on_disk, remote, tmp_path, caches):
    shutil.copytree(root / 'train', tmp_path / 'mine')
    flip(tmp_path / 'mine' / 'shard.00003.mds')
    message, _ = failure(root, tmp_path, f'train_loader.local={tmp_path}/mine')
    assert message.startswith(f'train_loader.local: {tmp_path}/mine/shard.00003.mds: is damaged: its sha1 is ')

    run(root, tmp_path / 'a', f'train_loader.remote={remote}')
    cached, cut = sorted(caches.rglob('*.mds'))[3:5]
    flip(cached)
    cut.write_bytes(cut.read_bytes()[:-1])
    message, _ = failure(root, tmp_path / 'b', f'train_loader.remote={remote}')
    assert message.startswith(f'train_loader.local: {cached}: is damaged') and message.endswith('start again')
    assert run(root, tmp_path / 'c', f'train_loader.remote={remote}').weights == on_disk.weights


# ------------------------------------------------------------------------------------------------
# Caches


def test_a_stale_cache_is_refetched(root, s3, tmp_path, capsys):
    remote, local = f'{s3.bucket}/changing', tmp_path / 'local'
    where = [f'train_loader.remote={remote}', f'train_loader.local={local}', 'max_duration=1ep']
    for turn in range(3):
        new = rows(16, 100 * turn)
        write_triplets(new, remote, size_limit=SHARD_SIZE, overwrite=True)
        found = run(root, tmp_path / str(turn), *where)
        assert sorted(found.ids) == sorted(row['id'] for row in new)
        told = capsys.readouterr().out.count(f'{remote}: was rewritten; dropping the old shards in {local}')
        assert told == (1 if turn else 0)
        shards = json.loads((local / 'index.json').read_text())['shards']
        assert {path.name for path in local.glob('*.mds')} == {shard['raw_data']['basename'] for shard in shards}


def test_shards_of_the_same_names_do_not_mix(root, tmp_path):
    """As MDSWriter names them; and the cache is half full. What is no cache of ours may be somebody's only copy."""
    sets = {first: tmp_path / str(first) for first in (0, 100)}
    for first, folder in sets.items():
        write_triplets(rows(16, first), folder, size_limit=SHARD_SIZE)
    names = [{path.name for path in folder.glob('*.mds')} for folder in sets.values()]
    assert len(names[0] & names[1]) > 5
    local = tmp_path / 'local'
    local.mkdir()
    for name in ('index.json', 'shard.00000.mds', 'shard.00001.mds'):
        shutil.copy(sets[0] / name, local)
    overrides = [f'train_loader.remote={sets[100]}', f'train_loader.local={local}', 'max_duration=1ep']
    with pytest.raises(UserError, match=f'{local}: holds index.json and is no cache of {sets[100]}'):
        run(root, tmp_path, *overrides)
    (local / '.lock').touch()
    found = run(root, tmp_path, *overrides)
    assert set(found.ids) == {row['id'] for row in rows(16, 100)}


def test_streams_are_cached_each_by_its_content(root, s3, tmp_path, caches, capsys):
    for name, first in (('a', 0), ('b', 100)):
        write_triplets(rows(16, first), f'{s3.bucket}/mixed/{name}', size_limit=SHARD_SIZE)
    parts = [f'{name}: {{remote: {s3.bucket}/mixed/{name}}}' for name in 'ab']
    streams = f'train_loader.streams={{{", ".join(parts)}}}'
    first = run(root, tmp_path / '1', streams, 'max_duration=1ep')
    write_triplets(rows(16, 200), f'{s3.bucket}/mixed/b', size_limit=SHARD_SIZE, overwrite=True)
    second = run(root, tmp_path / '2', streams, 'max_duration=1ep')
    assert sorted(first.ids) == sorted(row['id'] for row in (*rows(16, 0), *rows(16, 100)))
    assert sorted(second.ids) == sorted(row['id'] for row in (*rows(16, 0), *rows(16, 200)))
    assert len(list(caches.iterdir())) == 3


def test_a_set_of_its_own_is_not_taken_for_a_cache(root, remote, tmp_path):
    write_triplets(rows(8, 0), tmp_path / 'mine')
    message, _ = failure(root, tmp_path, f'train_loader.remote={remote}', f'train_loader.local={tmp_path}/mine')
    assert message.startswith(
        f'train_loader.local: {tmp_path}/mine: is a shard set (triplets.json), not a cache of {remote}'
    )
    assert len(list((tmp_path / 'mine').glob('*.mds'))) == 1


# ------------------------------------------------------------------------------------------------
# Other runs


@pytest.fixture(scope='module')
def start(root, s3):
    """Starts a run in a process of its own: forked from one that has the imports behind it, and no more."""
    with pytest.MonkeyPatch.context() as patch:
        here = Path(__file__).parents[1]
        patch.setenv('PYTHONPATH', os.pathsep.join([str(here), *sys.path]))
        use_forks(patch.setattr, Popen)
        context = multiprocessing.get_context('forkserver')
        ready = context.Process(target=os.getpid)
        ready.start()
        ready.join()

        def start(out: Path, *overrides: str):
            names = ('S3_ENDPOINT_URL', 'DHRD_CACHE')
            case = {'name': str(out), 'overrides': overrides, 'env': {name: os.environ[name] for name in names}}
            process = context.Process(target=run_alone, args=(root, case))
            process.start()
            return process

        yield start


def wait_for(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def shared_memory(names: str = '*') -> set[tuple[str, int]]:
    """Names and inodes in shared memory: a name that was freed soon belongs to another test's dataset."""
    with os.scandir('/dev/shm') as segments:
        return {(segment.name, segment.inode()) for segment in segments if fnmatch(segment.name, names)}


def memory_of(folder: Path) -> set[tuple[str, int]]:
    """What is in shared memory of datasets that read ``folder``, by whatever links."""
    found = set()
    for segment in Path('/dev/shm').glob('[0-9]*_locals'):
        with suppress(FileNotFoundError):  # another test's, which has ended
            names = map(os.fsdecode, segment.read_bytes()[4:].split(b'\0'))
            if any(os.path.realpath(name) == str(folder) for name in names):
                found |= shared_memory(f'{segment.name[:6]}_*')
    return found


@pytest.mark.skipif(not Path('/dev/shm').is_dir(), reason='shared memory is looked at as Linux shows it')
def test_a_killed_run_is_in_nobodys_way(on_disk, remote, tmp_path, start):
    local = tmp_path / 'local'
    where = [f'train_loader.remote={remote}', f'train_loader.local={local}', 'train_loader.num_workers=1']
    killed = start(tmp_path / 'killed', *where, 'max_duration=1000ep')
    wait_for(lambda: len(read_ids(tmp_path / 'killed')) > 200)
    left = memory_of(local)
    assert left
    os.killpg(killed.pid, signal.SIGKILL)
    killed.join()
    for name in {name[:6] for name, _ in left}:  # with them Streaming would not look; a cleaner of /tmp takes them
        for lock in Path('/tmp').glob(f'{name}_*_filelock'):
            lock.unlink()
    assert shared_memory() >= left

    where[-1] = 'train_loader.num_workers=0'
    again = start(tmp_path / 'again', *where)
    again.join(120)
    assert again.exitcode == 0
    assert (tmp_path / 'again' / 'slim' / 'model.safetensors').read_bytes() == on_disk.weights
    cache._run_folder(-1)  # what the start of any run frees, the second one having ended without its exit handlers
    assert not shared_memory() & left


def test_runs_side_by_side_read_one_cache(on_disk, remote, tmp_path, start):
    where = [f'train_loader.remote={remote}', f'eval_loaders.val.remote={remote}']
    runs = [start(tmp_path / name, *where) for name in 'abc']
    for process in runs:
        process.join(120)
        assert process.exitcode == 0
    for name in 'abc':
        assert read_ids(tmp_path / name) == on_disk.ids
        assert (tmp_path / name / 'slim' / 'model.safetensors').read_bytes() == on_disk.weights


def test_a_cache_is_not_rewritten_under_a_run_that_reads_it(root, s3, tmp_path, monkeypatch, start):
    remote, local = f'{s3.bucket}/held', tmp_path / 'local'
    where = [f'train_loader.remote={remote}', f'train_loader.local={local}']
    write_triplets(rows(16, 0), remote, size_limit=SHARD_SIZE)
    reading = start(tmp_path / 'reading', *where, 'max_duration=1000ep')
    wait_for(lambda: len(read_ids(tmp_path / 'reading')) > 32)
    before = {path: path.stat().st_mtime_ns for path in local.glob('*.mds')}
    write_triplets(rows(16, 100), remote, size_limit=SHARD_SIZE, overwrite=True)
    monkeypatch.setattr(cache, 'PATIENCE', 0.5)
    message, _ = failure(root, tmp_path / 'b', *where)
    assert message.startswith(
        f'train_loader.local: {local}: is in use by a run that reads another set than the current {remote}'
    )
    assert {path: path.stat().st_mtime_ns for path in local.glob('*.mds')} == before
    os.killpg(reading.pid, signal.SIGKILL)
    reading.join()
    found = run(root, tmp_path / 'c', *where, 'max_duration=1ep')
    assert set(found.ids) == {row['id'] for row in rows(16, 100)}

"""What stands where the caches and links of streams go: another user's, other things, what a kill left."""

import os
import re
import subprocess
import sys
import tempfile
import time

import pytest
from streaming.base.constant import LOCALS, SHM_TO_CLEAN
from streaming.base.shared.prefix import _pack_locals
from tiny import triplet

from dhrd_plugin import write_triplets
from dhrd_plugin.errors import UserError
from dhrd_plugin.streams import cache
from dhrd_plugin.streams.stream import TripletStream

pytestmark = pytest.mark.usefixtures('caches')


@pytest.fixture
def root(tmp_path, monkeypatch):
    """Where the links of runs will be, in a system of its own."""
    monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path))
    monkeypatch.setattr(cache, '_run_folder', cache._run_folder.__wrapped__)
    monkeypatch.setattr(cache, 'SHARED_MEMORY', tmp_path / 'memory')
    monkeypatch.setattr(cache, 'UNFILLED', 0.2)
    (tmp_path / 'memory').mkdir()
    return tmp_path / f'dhrd-streams-{os.getuid()}'


@pytest.mark.parametrize(
    ('make', 'flaw'),
    [
        (lambda root: root.mkdir(mode=0o755), 'is open to others (mode 755)'),
        (lambda root: (root.mkdir(mode=0o700), os.chown(root, 65534, -1)), 'belongs to user 65534'),
        (lambda root: (root.with_name('x').mkdir(mode=0o700), root.symlink_to('x')), 'is no folder'),
        (lambda root: root.touch(mode=0o600), 'is no folder'),
    ],
    ids=['mode', 'owner', 'link', 'file'],
)
def test_a_folder_that_is_not_this_users_alone_is_refused(root, make, flaw):
    """In /tmp anybody may have made it, and what lies there would be followed and removed."""
    if 'belongs' in flaw and os.getuid() != 0:
        pytest.skip('only root can give a folder away')
    make(root)
    message = f'{root}: {flaw}; expected a folder of user {os.getuid()} of mode 700: remove it, or set TMPDIR'
    with pytest.raises(UserError, match=re.escape(message)):
        cache.link(root.parent)
    with pytest.raises(UserError, match=re.escape(message)), cache.machine_lock():
        pass


def test_pipes_and_files_keep_nobody(root):
    root.mkdir(mode=0o700)
    (root / 'file').touch()
    os.mkfifo(root / 'pipe')
    os.mkfifo(cache.SHARED_MEMORY / f'000000_{LOCALS}')
    (cache.SHARED_MEMORY / f'000001_{LOCALS}').write_bytes(_pack_locals([f'{root}/pipe/set'], 1))
    start = time.monotonic()
    assert cache.link(root.parent).is_dir()
    assert time.monotonic() - start < 5
    assert {'file', 'pipe'} < set(os.listdir(root))


def test_memory_that_a_kill_left_unfilled_is_freed(root, capsys):
    filled = cache.SHARED_MEMORY / f'000003_{LOCALS}'
    filled.write_bytes(_pack_locals(['/somebody/elses/set'], 3))
    for number, name in enumerate(SHM_TO_CLEAN):
        (cache.SHARED_MEMORY / f'{number:06}_{name}').touch()
    (cache.SHARED_MEMORY / f'000009_{LOCALS}').write_bytes(bytes(40))  # its size was set, and no more
    (cache.SHARED_MEMORY / 'of_another_program').touch()
    filled.write_bytes(_pack_locals(['/somebody/elses/set'], 3))
    cache.link(root.parent)
    assert sorted(os.listdir(cache.SHARED_MEMORY)) == [f'000003_{LOCALS}', 'of_another_program']
    assert capsys.readouterr().err.count('left empty by a run that was killed; removed') == len(SHM_TO_CLEAN) + 1


def test_memory_that_is_filled_in_time_stays(root, monkeypatch):
    path = cache.SHARED_MEMORY / f'000000_{LOCALS}'
    path.touch()
    monkeypatch.setattr(cache.time, 'sleep', lambda _: path.write_bytes(_pack_locals(['/somebody/elses/set'], 0)))
    cache.link(root.parent)
    assert path.exists()


def test_a_run_begins_beside_empty_shared_memory(tmp_path):
    """Streaming's own search for a free name ends in a traceback there; in a system of its own, as root."""
    write_triplets([triplet(i) for i in range(9)], tmp_path / 'set')
    code = (
        'from dhrd_plugin.streams.dataset import StreamingTripletDataset as Data\n'
        f'print(len(list(Data(local={str(tmp_path / "set")!r}, batch_size=1))))'
    )
    alone = 'mount -t tmpfs tmpfs /dev/shm && touch -d "1 hour ago" /dev/shm/000000_locals && exec "$0" -c "$1"'
    if subprocess.run(['unshare', '-m', 'mount', '-t', 'tmpfs', 'tmpfs', '/dev/shm'], capture_output=True).returncode:
        pytest.skip('may not mount')
    done = subprocess.run(
        ['unshare', '-m', 'sh', '-c', alone, sys.executable, code],
        env={**os.environ, 'TMPDIR': str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == '9\n' and '/dev/shm/000000_locals: left empty by a run that was killed' in done.stderr


# ------------------------------------------------------------------------------------------------
# Which folder may be a cache


@pytest.fixture
def remote(tmp_path):
    """A set that streams are to be made of, as if it were elsewhere."""
    write_triplets([triplet(i) for i in range(9)], tmp_path / 'remote')
    return tmp_path / 'remote'


def test_a_folder_of_somebodys_files_is_no_cache(tmp_path, remote):
    """Though they are called as files of the set: those whose size differs would have gone."""
    (tmp_path / 'docs').mkdir()
    (tmp_path / 'docs' / 'shard.00000.mds').write_text('mine')
    with pytest.raises(UserError, match=r'local: .*docs: holds shard.00000.mds and is no cache of .*remote'):
        TripletStream(remote=str(remote), local=str(tmp_path / 'docs'), key='train_loader')
    assert os.listdir(tmp_path / 'docs') == ['shard.00000.mds']


def test_another_set_that_is_no_cache_stays(tmp_path, remote):
    write_triplets([triplet(i) for i in range(3)], tmp_path / 'other')
    (tmp_path / 'other' / 'triplets.json').unlink()  # of another program's making
    before = {path.name: path.read_bytes() for path in (tmp_path / 'other').iterdir()}
    with pytest.raises(UserError, match=r'other: holds index.json and is no cache of'):
        TripletStream(remote=str(remote), local=str(tmp_path / 'other'))
    assert {path.name: path.read_bytes() for path in (tmp_path / 'other').iterdir()} == before


def test_a_copy_of_the_set_and_an_earlier_cache_are_taken(tmp_path, remote):
    (tmp_path / 'copy').mkdir()
    (tmp_path / 'copy' / 'index.json').write_bytes((remote / 'index.json').read_bytes())
    for folder in ('copy', 'empty/deep'):
        TripletStream(remote=str(remote), local=str(tmp_path / folder))
    write_triplets([triplet(i) for i in range(3)], remote, overwrite=True)
    (tmp_path / 'copy' / '.index.json.0123abcd.tmp').touch()
    TripletStream(remote=str(remote), local=str(tmp_path / 'copy'))
    assert sorted(os.listdir(tmp_path / 'copy')) == ['.lock', 'index.json']

"""Nothing is lost on the way: what is replaced, what a kill leaves, and who is at work."""

import fcntl
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from dhrd_plugin import files
from dhrd_plugin.errors import UserError

KILLED = """
import os, signal, sys
from pathlib import Path
from dhrd_plugin import files
step, out = sys.argv[1], Path(sys.argv[2])
def end(*_): os.kill(os.getpid(), signal.SIGKILL)
with files.staged(out) as folder:
    (folder / 'new').touch()
    if step == 'written': end()
    real, left = os.rename, {'moved away': 1, 'replaced': 2, 'half removed': 3}[step]
    def rename(old, new):
        global left
        real(old, new)
        left -= 1
        if left == 0: end()
    os.rename = rename
    files.replace_folder(folder, out, lambda folder: None)
"""


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob('*'))


def nothing_foreign(folder: Path) -> None:
    return None


@pytest.fixture
def out(tmp_path):
    """A folder that stands there and will be replaced."""
    (tmp_path / 'out').mkdir()
    (tmp_path / 'out' / 'old').touch()
    return tmp_path / 'out'


@pytest.mark.parametrize(
    ('step', 'left', 'then'),
    [
        ('written', {('tmp', 'new'), ('out', 'old')}, 'old'),
        ('moved away', {('tmp', 'new'), ('old', 'old')}, 'old'),
        ('replaced', {('out', 'new'), ('old', 'old')}, 'new'),
        ('half removed', {('out', 'new'), ('tmp', 'old')}, 'new'),
    ],
)
def test_what_a_kill_leaves_is_removed_or_put_back(out, capsys, step, left, then):
    done = subprocess.run([sys.executable, '-c', KILLED, step, out], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert {(path.parent.name.split('.')[-1], path.name) for path in out.parent.glob('*/*')} == left
    files.sweep(out.parent, 'out')
    assert names(out.parent) == ['out', f'out/{then}']
    told = capsys.readouterr().err
    assert told.count('left by a run that was killed; ') == told.count('\n') == (2 if step == 'moved away' else 1)
    assert ('.old: left by a run that was killed; put back as' in told) == (step == 'moved away')


@pytest.mark.parametrize('kind', ['folder', 'file'])
def test_what_a_run_is_at_work_on_stays(tmp_path, capsys, kind):
    at_work = files.staged if kind == 'folder' else files.replacing
    with at_work(tmp_path / 'out'):
        (name,) = names(tmp_path)
        files.sweep(tmp_path)
        assert names(tmp_path) == [name] and capsys.readouterr().err == ''
    left = tmp_path / name
    left.mkdir(exist_ok=True) if kind == 'folder' else left.touch()
    files.sweep(tmp_path, 'other')
    assert left.exists()
    files.sweep(tmp_path, 'out')
    assert not left.exists() and 'removed' in capsys.readouterr().err


def test_what_another_start_swept_before_it_was_locked_is_made_again(tmp_path, monkeypatch):
    lock, swept = fcntl.flock, []

    def late(descriptor, operation):
        if not swept:
            swept.append(True)
            (path,) = tmp_path.iterdir()
            path.rmdir()
        lock(descriptor, operation)

    monkeypatch.setattr(fcntl, 'flock', late)
    with files.staged(tmp_path / 'out') as folder:
        assert swept and folder.is_dir()


def test_what_a_kill_left_in_the_systems_temporary_folder_goes_with_the_next(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path))
    code = 'import os; from dhrd_plugin import files\nwith files.temporary(): os.kill(os.getpid(), 9)'
    for _ in range(2):
        subprocess.run([sys.executable, '-c', code], env={**os.environ, 'TMPDIR': str(tmp_path)})
        (left,) = tmp_path.iterdir()  # the second removed what the first had left
        assert left.stat().st_mode & 0o077 == 0
    with files.temporary() as folder:
        assert list(tmp_path.iterdir()) == [folder]
    assert not list(tmp_path.iterdir()) and 'removed' in capsys.readouterr().err


def test_a_file_system_without_locks_keeps_everything(tmp_path, monkeypatch):
    def none(*_):
        raise OSError(9, 'Bad file descriptor')

    monkeypatch.setattr(fcntl, 'flock', none)
    (tmp_path / '.out.0123abcd.tmp').mkdir()
    with files.staged(tmp_path / 'out') as folder:
        os.rename(folder, tmp_path / 'out')
    assert names(tmp_path) == ['.out.0123abcd.tmp', 'out']


def test_a_link_is_followed_and_stays(out):
    link = out.with_name('link')
    link.symlink_to('out')
    with files.staged(link) as folder:
        (folder / 'new').touch()
        files.replace_folder(folder, link, nothing_foreign)
    assert os.readlink(link) == 'out' and names(out) == ['new']
    assert sorted(path.name for path in out.parent.iterdir()) == ['link', 'out']


def test_a_file_that_is_replaced_may_be_a_link(out):
    link = out.with_name('link')
    for target, made in (('out/old', ['link', 'out', 'out/old']), ('out/new', ['link', 'out', 'out/new', 'out/old'])):
        link.symlink_to(target)
        with files.replacing(link) as file:
            file.write(target.encode())
        assert os.readlink(link) == target and (out.parent / target).read_text() == target
        assert names(out.parent) == made
        link.unlink()
    link.symlink_to('outside')  # what comes out of an index or a cache may not be written through one
    files.write_bytes(link, b'x')
    assert not link.is_symlink() and not (out.parent / 'outside').exists()


@pytest.mark.parametrize('there', [True, False])
def test_a_folder_is_filled_beside_what_else_is_there(out, there):
    if not there:
        (out / 'old').unlink()
        out.rmdir()
    before = names(out.parent)
    with pytest.raises(KeyError), files.filling(out) as folder:
        (folder / 'new').touch()
        raise KeyError
    assert names(out.parent) == before
    with files.filling(out) as folder:
        assert folder.parent == (out if there else out.parent)  # what is above a folder may be no place to write
        (folder / 'new').touch()
    assert names(out) == ['new', 'old'][: 1 + there] and names(out.parent)[0] == 'out'
    (out / '.new.0123abcd.tmp').mkdir()  # left by a kill
    with files.filling(out):
        pass
    assert names(out) == ['new', 'old'][: 1 + there]


@pytest.mark.parametrize('stop', [OSError, KeyboardInterrupt])
def test_what_could_not_be_replaced_is_as_it_was(out, monkeypatch, stop):
    real, calls = os.rename, []

    def second_fails(*paths):
        calls.append(paths)
        if len(calls) == 2:
            raise stop
        real(*paths)

    monkeypatch.setattr(os, 'rename', second_fails)
    with pytest.raises(stop), files.staged(out) as folder:
        files.replace_folder(folder, out, nothing_foreign)
    assert names(out.parent) == ['out', 'out/old']


def test_what_is_not_ours_is_refused_at_the_end_too(out):
    with pytest.raises(UserError, match='out: holds old, which is no part of'), files.staged(out) as folder:
        files.replace_folder(folder, out, lambda folder: 'old')
    assert names(out.parent) == ['out', 'out/old']


def test_a_look_leaves_nothing(tmp_path):
    files.check_folder(tmp_path / 'a' / 'b' / 'slim', '--output', 'an export', nothing_foreign)
    files.check_into(tmp_path / 'c' / 'd', '--output')
    files.check_file(tmp_path / 'e' / 'f', '--output', 'a report', lambda path: False)
    assert names(tmp_path) == []


def test_a_write_that_fails_leaves_the_file_and_no_folder(tmp_path):
    for path in (tmp_path / 'file', tmp_path / 'new' / 'folder' / 'file'):
        with pytest.raises(KeyError), files.replacing(path) as file:
            file.write(b'half')
            raise KeyError
    assert names(tmp_path) == []
    files.write_json(tmp_path / 'a' / 'b', {'x': 1})
    assert (tmp_path / 'a' / 'b').read_text() == '{\n  "x": 1\n}\n' and names(tmp_path) == ['a', 'a/b']


def test_processes_that_replace_one_folder_leave_one_of_them_whole(tmp_path):
    code = """
import sys
from pathlib import Path
from dhrd_plugin import files
for turn in range(60):
    with files.staged(sys.argv[1]) as folder:
        for name in 'abc':
            (folder / name).write_text(sys.argv[2])
        try:
            files.replace_folder(folder, sys.argv[1], lambda folder: None)
        except OSError:
            pass  # another was faster
"""
    out = tmp_path / 'out'
    running = [subprocess.Popen([sys.executable, '-c', code, out, str(i)], stderr=subprocess.PIPE) for i in range(3)]
    for process in running:
        assert process.wait(120) == 0, process.stderr and process.stderr.read()
        assert process.stderr and process.stderr.read() == b''
    assert names(tmp_path) == ['out', 'out/a', 'out/b', 'out/c']
    assert len({path.read_text() for path in out.iterdir()}) == 1


def test_a_pipe_among_the_leftovers_keeps_nobody(tmp_path):
    os.mkfifo(tmp_path / '.out.0123abcd.tmp')
    start = time.monotonic()
    files.sweep(tmp_path)
    assert time.monotonic() - start < 5

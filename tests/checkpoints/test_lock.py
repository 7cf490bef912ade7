"""Two runs never share a folder of checkpoints."""

import os
import subprocess
import sys
import time

import pytest
from runs import write_run

from dhrd_plugin import load_config, train
from dhrd_plugin.checkpoints import lock
from dhrd_plugin.checkpoints.lock import LOCK, only_run
from dhrd_plugin.errors import UserError

HOLDS = """
import os, sys, time
from dhrd_plugin.checkpoints.lock import only_run
with only_run(sys.argv[1]):
    if os.fork() == 0:  # as a worker of a DataLoader, which outlives a killed run by seconds
        time.sleep(60)
    print(os.getpid(), flush=True)
    time.sleep(60)
"""


@pytest.fixture
def another(tmp_path):
    """Another run that holds the folder, and a worker of it."""
    command = [sys.executable, '-c', HOLDS, str(tmp_path / 'checkpoints')]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stdout and int(process.stdout.readline()) == process.pid
        yield process
        os.killpg(process.pid, 9)


def test_the_second_run_is_refused_and_a_kill_frees_the_folder_at_once(tmp_path, another, monkeypatch):
    monkeypatch.setattr(lock, 'PATIENCE', 0.3)
    with (
        pytest.raises(
            UserError, match=f'save_folder: .*checkpoints: is in use by another run, process {another.pid} on'
        ),
        only_run(str(tmp_path / 'checkpoints')),
    ):
        pass
    assert os.listdir(tmp_path / 'checkpoints') == [LOCK]
    another.kill()
    another.wait()
    start = time.monotonic()
    with only_run(str(tmp_path / 'checkpoints')):
        assert time.monotonic() - start < 0.3
    assert os.listdir(tmp_path / 'checkpoints') == []


def test_a_run_without_checkpoints_has_its_output_dir_to_itself(tmp_path, another, monkeypatch):
    monkeypatch.setattr(lock, 'PATIENCE', 0.3)
    yaml = write_run(tmp_path / 'material')
    config = load_config(yaml, [f'output_dir={tmp_path / "checkpoints"}', 'save_folder=null', 'autoresume=false'])
    with pytest.raises(UserError, match=r'output_dir: .*checkpoints: is in use by another run, process \d+ on'):
        train(config)


def test_it_waits_for_one_that_is_about_to_end(tmp_path, another, capsys):
    killer = subprocess.Popen([sys.executable, '-c', f'import os, time; time.sleep(1); os.kill({another.pid}, 9)'])
    with only_run(str(tmp_path / 'checkpoints')):
        assert f'in use by process {another.pid}' in capsys.readouterr().out
    killer.wait()


def test_nothing_is_left_and_what_stands_there_stays(tmp_path):
    for folder in (tmp_path / 'new' / 'checkpoints', tmp_path):
        with only_run(str(folder)):
            assert (folder / LOCK).exists()
        assert os.listdir(tmp_path) == []
    (tmp_path / 'ep1-ba1-rank0.pt').touch()
    with pytest.raises(KeyError), only_run(str(tmp_path)):
        raise KeyError
    assert os.listdir(tmp_path) == ['ep1-ba1-rank0.pt']


def test_a_lock_that_was_just_removed_is_not_taken_for_one(tmp_path, monkeypatch):
    """The run before removes the file between our opening it and our lock."""
    take, gone = lock.fcntl.lockf, []

    def late(descriptor, operation):
        take(descriptor, operation)
        if not gone:
            gone.append((tmp_path / LOCK).unlink())

    monkeypatch.setattr(lock.fcntl, 'lockf', late)
    with only_run(str(tmp_path)):
        assert (tmp_path / LOCK).exists()


@pytest.mark.parametrize('folder', [None, 's3://bucket/run'])
def test_without_a_folder_nothing_is_held(folder):
    with only_run(folder):
        pass

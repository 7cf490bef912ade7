"""Ctrl-C in a training: one line, which says how to go on, and exit status 130."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from forks import Popen
from runs import finish, launch, wait_for, write_run

from dhrd_plugin import cli
from dhrd_plugin.checkpoints import saver as saver_module
from dhrd_plugin.checkpoints.saver import save
from dhrd_plugin.errors import UserError


@pytest.mark.parametrize('ranks', [1, 2])
def test_ctrl_c_in_a_training(tmp_path, ranks):
    path = write_run(tmp_path / 'run')
    start = subprocess.Popen if ranks == 2 else Popen  # which forks
    process = launch(path, tmp_path, 'max_duration=50ep', ranks=ranks, start=start)
    assert wait_for(process, lambda: any(tmp_path.glob('out/checkpoints/ep*.pt')))
    os.killpg(process.pid, signal.SIGINT)  # as a terminal sends it, to the launcher too
    output = finish(process)
    assert process.returncode == 130, output[-3000:]
    line = 'interrupted; start it again to go on from the last checkpoint in out/checkpoints'
    assert [found for found in output.splitlines() if 'interrupted' in found] == [line]
    assert 'dhrd_plugin' not in output  # no traceback of ours; the composer command prints one of its own
    assert 'Traceback' not in output or ranks == 2


@pytest.mark.parametrize('error', [KeyboardInterrupt(), SystemExit(130)])  # without and with Composer
def test_ctrl_c_in_any_verb(error, capsys):
    def work():
        raise error

    assert cli.run(work) == 130
    assert capsys.readouterr().err == 'interrupted\n'


def test_another_exit_is_left_alone():
    with pytest.raises(SystemExit) as raised:
        cli.run(lambda: sys.exit(143))
    assert raised.value.code == 143


def test_ctrl_c_waits_until_a_checkpoint_is_written():
    """Broken off in a write, torch's writer ends the whole process."""

    class Saver:
        last_checkpoint_batch, symlink_count, written = None, 0, False

        def run_event(self, *_):
            signal.raise_signal(signal.SIGINT)
            self.written = True

    saver, before = Saver(), signal.getsignal(signal.SIGINT)
    with pytest.raises((KeyboardInterrupt, SystemExit)):  # without and with Composer
        save(saver, None, None, None)
    assert saver.written and signal.getsignal(signal.SIGINT) is before


def test_a_rank_that_fails_beside_composers_own_gathering_tells_what_it_met(monkeypatch):
    """The others send it the files that they saved, not what they met."""

    class Saver:
        last_checkpoint_batch, symlink_count = None, 0

        def run_event(self, *_):
            self.last_checkpoint_batch, self.symlink_count = 1, 1
            raise FileExistsError(17, 'File exists', 'latest')

    monkeypatch.setattr(saver_module.dist, 'all_gather_object', lambda mine: [['ep1/__0_0.distcp'], mine])
    monkeypatch.setattr(saver_module, '_path', lambda *_: Path('ep1'))
    with pytest.raises(UserError, match=r'^save_folder: ep1: cannot be written: File exists'):
        save(Saver(), None, None, None)

"""A forked program is what a plain one is: its ids, signals, files, exit status and what it starts."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from forks import COMPOSER, Popen

TELL = """
import json, os, sys
print(json.dumps({
    'argv': sys.argv, 'name': __name__, 'main': sys.modules['__main__'].__file__, 'path': sys.path[0],
    'cwd': os.getcwd(), 'env': {key: os.environ.get(key) for key in ('MARK', 'RANK', 'HOME')},
    'parent': os.getppid(), 'group': os.getpgrp() == os.getpid(), 'session': os.getsid(0) == os.getpid(),
    'input': sys.stdin.read(), 'terminal': sys.stdout.isatty(), 'lines': sys.stdout.line_buffering,
    'through': sys.stdout.write_through, 'encoding': sys.stdout.encoding,
}))
print('at the end', file=sys.stderr)
"""
ENDS = {
    'import sys; sys.exit(3)': 3,
    'raise ValueError("no")': 1,
    'import os; os._exit(7)': 7,
    'import sys; sys.exit("why")': 1,
    'raise KeyboardInterrupt': 1,  # as wherever Composer is imported
    'import os; os.kill(os.getpid(), 9)': -signal.SIGKILL,
    'import atexit, os; atexit.register(os.rmdir, "empty"); import sys; sys.exit(4)': 4,
}
WAIT = 'import time; print("ready", flush=True); time.sleep(60)'
NESTED = """
import os, subprocess, sys
child = subprocess.Popen([sys.executable, 'child.py'], stdout=subprocess.PIPE, text=True)
parent, group = child.stdout.readline().split()
print(int(parent) == os.getpid(), int(group) == os.getpgrp(), type(child).__module__, child.pid, flush=True)
child.wait()
"""
CHILD = 'import os, time; print(os.getppid(), os.getpgrp(), flush=True); time.sleep(60)'


@pytest.fixture
def script(tmp_path):
    """Writes a script, and gives its path."""

    def write(text, name='script.py'):
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return write


@pytest.mark.parametrize('env', [{}, {'PYTHONUNBUFFERED': '1', 'RANK': '1'}])
@pytest.mark.parametrize('module', [False, True])
def test_it_sees_what_a_plain_process_sees(script, tmp_path, module, env):
    command = [sys.executable, *(['-m', 'script'] if module else [script(TELL)]), 'a', '--b=c d']
    script(TELL)
    options = {'cwd': tmp_path, 'start_new_session': module, 'text': True, 'env': {**os.environ, 'MARK': 'é', **env}}
    pipes = dict.fromkeys(('stdin', 'stdout', 'stderr'), subprocess.PIPE)
    found = []
    for start in (subprocess.Popen, Popen):
        process = start(command, **options, **pipes)
        output, errors = process.communicate('typed', timeout=60)
        assert process.returncode == 0 and errors == 'at the end\n'
        found.append(json.loads(output))
    assert found[0] == found[1] and found[0]['parent'] == os.getpid()


@pytest.mark.parametrize('text', ENDS)
def test_it_ends_as_a_plain_process_does(script, tmp_path, text):
    (tmp_path / 'empty').mkdir()
    process = Popen([sys.executable, script(text)], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == ENDS[text]
    assert ('Traceback' in errors) == text.startswith('raise') and ('why' in errors) == ('why' in text)
    assert (tmp_path / 'empty').exists() == ('rmdir' not in text)


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_its_group_is_ended_with_what_it_started(script, tmp_path, number):
    script(CHILD, 'child.py')
    command = [sys.executable, script(NESTED)]
    process = Popen(command, cwd=tmp_path, start_new_session=True, stdout=subprocess.PIPE, text=True)
    parent, group, module, child = process.stdout.readline().split()
    assert (parent, group, module) == ('True', 'True', '__main__')
    os.killpg(process.pid, number)
    assert process.wait(60) == (-number if number == signal.SIGKILL else 128 + number)  # by Composer's handlers
    assert process.stdout.read() == ''  # nobody holds it open
    end = time.monotonic() + 60
    while left := processes(tmp_path):
        assert time.monotonic() < end, left
        time.sleep(0.05)
    assert not os.path.exists(f'/proc/{child}/exe')


def processes(folder):
    """The command lines of what runs in a folder."""
    found = []
    for process in filter(str.isdigit, os.listdir('/proc')):
        try:
            if os.readlink(f'/proc/{process}/cwd') == str(folder):
                found.append(Path(f'/proc/{process}/cmdline').read_text())
        except OSError:
            continue
    return found


def test_a_killed_program_takes_its_server_with_it(script, tmp_path):
    process = Popen([sys.executable, script(WAIT)], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == 'ready\n'
    assert any(line.startswith(f'{sys.executable} {tmp_path}/script.py') for line in processes(tmp_path))
    (server,) = Path(f'/proc/{process.pid}/task/{process.pid}/children').read_text().split()
    process.kill()
    assert process.wait(60) == -signal.SIGKILL
    end = time.monotonic() + 60
    while os.path.exists(f'/proc/{server}/exe'):
        assert time.monotonic() < end
        time.sleep(0.05)


def test_ranks_are_forked_from_a_launcher_that_is(script, tmp_path):
    text = 'import os, sys; print(os.environ["RANK"], os.getppid(), "torch" in sys.modules)'
    command = [COMPOSER, '-n', '2', '--stdout', 'rank{rank}.txt', script(text)]
    process = Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and output.splitlines()[0] == f'0 {process.pid} True'
    assert (tmp_path / 'rank1.txt').read_text() == f'1 {process.pid} True\n'


def test_what_is_read_while_importing_needs_a_plain_process(script):
    with pytest.raises(ValueError, match='HF_HOME'):
        Popen([sys.executable, script('')], env={**os.environ, 'HF_HOME': '/nowhere'})


def test_other_commands_are_no_forks(tmp_path):
    for command in (['sh', '-c', 'echo $0'], [sys.executable, '-c', 'import sys; print("torch" in sys.modules)']):
        process = Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.communicate(timeout=60)[0] in ('sh\n', 'False\n')

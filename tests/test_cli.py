"""What the command line says of a mistake, on one rank and on several."""

import subprocess
import sys
import textwrap

import pytest
from runs import finish, launch

# Rank 0 is slow to see what the other has seen already.
SLOW = """
    import os, sys, time
    from dhrd_plugin.cli import run
    from dhrd_plugin.errors import {error}

    def work():
        if os.environ.get('RANK', '0') == '0':
            time.sleep(3)
        raise {error}('rows.jsonl: line 3: found nothing')

    sys.exit(run(work))
"""


@pytest.mark.parametrize('ranks', [1, 2])
@pytest.mark.parametrize('error', ['UserError', 'RankError'])
def test_rank_0_tells_a_mistake_though_another_rank_saw_it_first(tmp_path, error, ranks):
    script = tmp_path / 'slow.py'
    script.write_text(textwrap.dedent(SLOW.format(error=error)))
    # No forks, which end more slowly than a script that imports as little as this one.
    process = launch(script, tmp_path, ranks=ranks, script=str(script), start=subprocess.Popen)
    output = finish(process)
    assert process.returncode == 2
    assert output.count('error: rows.jsonl: line 3: found nothing\n') == 1, output
    assert 'Traceback' not in output


@pytest.mark.parametrize(('local', 'told'), [('0', 1), ('1', 0)])
def test_the_first_rank_of_another_node_tells_what_may_be_wrong_there_alone(tmp_path, monkeypatch, local, told):
    script = tmp_path / 'missing.py'
    work = "cli.run(lambda: (_ for _ in ()).throw(cli.UserError('rows.jsonl: no such file')))"
    script.write_text(f'import sys; from dhrd_plugin import cli; cli.GRACE = 0.1; sys.exit({work})')
    for name, value in {'RANK': '2', 'LOCAL_RANK': local, 'WORLD_SIZE': '4'}.items():
        monkeypatch.setenv(name, value)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count('error on rank 2: rows.jsonl: no such file\n') == told, done.stderr


def test_a_reader_that_leaves_is_no_error():
    """As ``dhrd evaluate ... | head -1``."""
    code = 'import sys; from dhrd_plugin.cli import run; sys.exit(run(lambda: [print(n) for n in range(99999)]))'
    pipes = {'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE, 'text': True}
    with subprocess.Popen([sys.executable, '-c', code], **pipes) as process:
        assert process.stdout.readline() == '0\n'
        process.stdout.close()
        assert process.stderr.read() == ''
    assert process.returncode == 141

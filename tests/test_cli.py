"""What the command line says of a mistake, on one rank and on several."""

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
    process = launch(script, tmp_path, ranks=ranks, script=str(script))
    output = finish(process)
    assert process.returncode == 2
    assert output.count('error: rows.jsonl: line 3: found nothing\n') == 1, output
    assert 'Traceback' not in output

"""The table of ``benchmark.py gpu``, out of the lines that its sections write."""

import json
import os
import queue
import re
from argparse import Namespace
from pathlib import Path
from unittest import mock

import pytest
from benchmarks import gpu
from gpu import verdict

from dhrd_plugin.comparison import cells, plan
from dhrd_plugin.errors import UserError
from dhrd_plugin.models import pretrained

ROOT = Path(__file__).parents[2]

LINES = [
    {'section': 'env', 'cores': 16, 'gpu': {'name': 'A GPU'}, 'versions': {'torch': '2.11'}},
    {'section': 'env', 'bf16_tflops': 798.0, 'copy_tb_s': 3.0},
    {'section': 'speed', 'model': '135M', 'precision': 'bf16', 'trained': 'whole', 'way': 'padded', 'rows': 64}
    | {'ms': 40.0, 'rows_s': 1600.0, 'tokens_s': 170_000.0, 'mfu': 0.251, 'reasoning': True, 'peak_mib': 9000.0},
    {'section': 'speed', 'way': 'one kernel', 'error': 'RuntimeError: no kernel', 'where': []},
    {'section': 'section', 'name': 'speed', 'seconds': 12.5, 'status': 0},
]


def test_the_table_has_a_row_for_each_step_and_tells_every_error(tmp_path, capsys):
    path = tmp_path / 'results.jsonl'
    path.write_text(
        '\n'.join(json.dumps(line) for line in LINES) + '\n{"section": "spe'
    )  # as a machine that went left it
    assert gpu.main(['--table', str(path)]) == 0
    said = capsys.readouterr().out
    assert 'A GPU, 16 cores (bf16_tflops 798, copy_tb_s 3); torch 2.11' in said
    (row,) = [line for line in said.splitlines() if line.startswith('| 135M  ')]
    assert [cell.strip() for cell in row.strip('|').split('|')] == [
        *('135M', 'bf16', 'whole', 'padded', '64', '40', '1,600', '170,000', '25.1 %', '9,000')
    ]
    assert (
        re.search(r'MFU of real tokens .* 0.251 +. yes', said)
        and 'RuntimeError: no kernel' in said
        and 'speed 12.5 s' in said
    )


def step(rate, **more):
    return LINES[2] | {'rows_s': rate, 'mfu': rate / 4000} | more


def test_of_several_runs_in_a_file_the_table_tells_the_last_and_how_its_sections_ended(tmp_path, capsys):
    path = tmp_path / 'results.jsonl'
    ended = [{'name': 'speed', 'seconds': 110, 'error': 'killed after 110 s'}, {'name': 'shapes', 'status': 1}]
    lines = [step(1600, run='a'), step(10, run='b'), *({'section': 'section', 'run': 'b'} | end for end in ended)]
    path.write_text('\n'.join(map(json.dumps, lines)))
    assert gpu.main(['--table', str(path)]) == 0
    said = capsys.readouterr().out
    assert re.search(r'MFU of real tokens .* 0.0025 +. no', said) and '1,600' not in said
    assert 'speed 110 s (**killed after 110 s**), shapes 0 s (**exit status 1**)' in said


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--table', 'absent.jsonl'], 'absent.jsonl: No such file or directory'),
        (['--only', 'env,sped'], "--only: found no section 'sped'; did you mean 'speed'?"),
    ],
)
def test_a_wrong_name_is_one_line(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(gpu.os, 'environ', dict(os.environ))
    assert gpu.main(arguments) == 2 and message in capsys.readouterr().err


def test_the_table_comes_last_and_the_status_tells_of_a_section_that_failed(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(gpu.os, 'environ', dict(os.environ))
    monkeypatch.setattr(gpu, '_fork', fork_of({'env': 0, 'speed': 1}))
    for name, status in ('env', 0), ('speed', 1):
        words = ['--only', name, '--output', str(tmp_path / 'results.jsonl')]
        assert gpu.main(words) == status
        said = capfd.readouterr().out
        assert said.splitlines()[-1].startswith(f'Sections: {name} ') and ('exit status 1' in said) == bool(status)
    runs = [json.loads(line)['run'] for line in (tmp_path / 'results.jsonl').read_text().splitlines()]
    assert len(runs) == 2


def fork_of(statuses):
    """In place of `_fork`: a process that ends at once, with a section's status."""

    def fork(common, name, *_):
        return os.fork() or os._exit(statuses[name])

    return fork


def test_a_comparison_on_a_gpu_goes_on_where_it_was_and_mixes_no_settings(tmp_path, monkeypatch):
    path, there, todo = Path('yamls', 'compare', 'verdict.yaml'), [], queue.Queue()
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(cells, 'read_lines', lambda _: there)
    monkeypatch.setattr(pretrained, 'resolve', lambda _: None)
    first, second = plan.build_cells(plan.load_comparison(path), path)[:2]
    there += [{'task': first.task, 'arm': first.arm, 'seed': first.seed, 'fingerprint': first.fingerprint}]
    monkeypatch.setattr(todo, 'get', mock.Mock(side_effect=queue.Empty))
    stage = Namespace(out=tmp_path), 'verdict', []
    verdict.run_stage(*stage, 9, todo, queue.Queue(), [])
    assert todo.queue[0][3] == second.key and first.key not in [key for *_, key in todo.queue]
    there[0]['fingerprint'] = 'another'
    with pytest.raises(UserError, match='was run with other settings'):
        verdict.run_stage(*stage, 9, todo, queue.Queue(), [])

"""The table of ``benchmark.py gpu``, out of the lines that its sections write."""

import json
import re

from benchmarks import gpu

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

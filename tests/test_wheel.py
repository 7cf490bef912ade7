"""What ``pip install`` of the wheel gives, outside of any checkout."""

import json
import os
import subprocess
import sys
import zipfile

import pytest


@pytest.fixture(scope='module')
def wheel(root, tmp_path_factory):
    """The package as the wheel has it, in a folder of its own."""
    out = tmp_path_factory.mktemp('wheel')
    clone = out / 'clone'
    subprocess.run(['git', 'clone', '-q', str(root), str(clone)], check=True)
    command = [sys.executable, '-m', 'pip', 'wheel', '-q', '--no-deps', '--no-build-isolation', '-w', str(out), '.']
    subprocess.run(command, cwd=clone, check=True, capture_output=True)
    (path,) = out.glob('*.whl')
    with zipfile.ZipFile(path) as archive:
        archive.extractall(out / 'site')
    return out / 'site'


def run(wheel, folder, *arguments):
    env = {**os.environ, 'PYTHONPATH': str(wheel), 'OMP_NUM_THREADS': '1'}
    done = subprocess.run(
        [sys.executable, '-m', 'dhrd_plugin', *arguments], cwd=folder, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_it_holds_the_yamls_and_no_benchmark_or_test(root, wheel):
    shipped = {path.relative_to(wheel / 'dhrd_plugin').as_posix() for path in wheel.glob('dhrd_plugin/yamls/**/*.yaml')}
    assert shipped == {path.relative_to(root).as_posix() for path in (root / 'yamls').rglob('*.yaml')}
    names = [path.relative_to(wheel).parts for path in wheel.rglob('*')]
    assert {name[0] for name in names if not name[0].endswith('.dist-info')} == {'dhrd_plugin'}
    assert not [name for name in names if 'benchmark' in name[-1] or name[-1].startswith('test_')]
    entry_points = next(wheel.glob('*.dist-info')) / 'entry_points.txt'
    assert 'dhrd = dhrd_plugin.cli:main' in entry_points.read_text()


def test_it_trains_by_its_own_yaml_and_predicts(wheel, tmp_path):
    short = ['max_duration=2ba', 'eval_interval=0ba', 'eval_loaders.contrast=null']
    said = run(wheel, tmp_path, 'train', 'yamls/rte.yaml', 'model.config_overrides={num_hidden_layers: 1}', *short)
    assert ' predict runs/rte/slim ' in said
    answer = json.loads(run(wheel, tmp_path, 'predict', 'runs/rte/slim', '{"input_text": "Ice is cold."}'))
    assert set(answer['probabilities']) == {'entailment', 'not_entailment'}

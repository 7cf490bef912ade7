"""A YAML is typed, interpolated and merged over its base; a mistake in it is one line that names the key."""

import subprocess
import sys

import pytest
from forks import Popen

from dhrd_plugin import load_config
from dhrd_plugin.errors import UserError
from dhrd_plugin.training.config import used


@pytest.fixture(scope='module')
def yaml(root):
    return root / 'yamls' / 'rte.yaml'


def test_markers_are_no_tokens_where_embeddings_are_frozen(yaml):
    with pytest.raises(UserError, match=r'found with model\.lora, which leaves the new tokens .* or model\.lora=null$'):
        load_config(yaml, ['markers.as_tokens=true'])
    overrides = ['markers.as_tokens=true', 'model.lora=null']
    assert load_config(yaml, overrides).markers.as_tokens
    with pytest.raises(UserError, match=r'found with model\.freeze_backbone.*or model\.freeze_backbone=false'):
        load_config(yaml, [*overrides, 'model.freeze_backbone=true'])


def test_no_yaml(tmp_path):
    with pytest.raises(UserError, match='no such file'):
        load_config(tmp_path / 'none.yaml')


def test_values_are_typed_and_interpolated(yaml):
    config = load_config(yaml, ['run_name=x', 'seed=3', 'algorithms.gradient_clipping=null'])
    assert config.output_dir == 'runs/x'
    assert config.callbacks['drop_reasoning_head']['output_dir'] == 'runs/x/slim'
    assert config.seed == 3
    assert list(used(config.algorithms)) == ['auxiliary_reasoning_loss']
    with pytest.raises(Exception, match='max_durations'):
        config.max_durations = '1ep'


def test_a_stream_of_null_is_left_out(yaml):
    config = load_config(yaml, ['train_loader.streams={a: {local: a}, b: {local: b}}', 'train_loader.streams.a=null'])
    assert config.train_loader.streams == {'b': {'local': 'b'}}


def test_the_command_says_it_without_a_traceback(root, yaml):
    command = [sys.executable, str(root / 'scripts' / 'train.py'), str(yaml)]
    overrides = ['algorithms.auxiliary_reasoning_loss.alhpa=1', 'train_loader.source=absent.jsonl']
    process = Popen(command + overrides, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 2
    (line,) = [line for line in errors.splitlines() if 'Warning' not in line and not line.startswith(' ')]
    assert line.startswith('error: ')
    assert "algorithms.auxiliary_reasoning_loss.alhpa: unknown key; did you mean 'alpha'?" in line


@pytest.fixture
def chain(yaml, tmp_path):
    """A YAML over one in another folder, which stands over the shipped one."""
    (tmp_path / 'low').mkdir()
    (tmp_path / 'low' / 'middle.yaml').write_text(
        f'base: {yaml}\nseed: 5\nmodel: {{head: linear}}\n'
        "variables: {name: middle}\nrun_name: '${variables.name}'\n"
    )
    top = tmp_path / 'top.yaml'
    top.write_text('base: low/middle.yaml\nmodel: {pooling: mean}\nvariables: {name: top}\n')
    return top


def test_a_yaml_is_merged_over_its_base(yaml, chain):
    config = load_config(chain, ['optimizer.lr=0.5'])
    below = load_config(yaml)
    assert (config.model.head, config.model.pooling, config.seed) == ('linear', 'mean', 5)
    assert config.optimizer['lr'] == 0.5 and config.optimizer['weight_decay'] == below.optimizer['weight_decay']
    assert config.train_loader == below.train_loader
    # Interpolations of a base see what stands over it, and what the command line says.
    assert config.callbacks['drop_reasoning_head']['output_dir'] == 'runs/top/slim'
    assert load_config(chain, ['variables.name=x']).output_dir == 'runs/x'


@pytest.mark.parametrize(
    ('middle', 'expected'),
    [
        ('base: [1]', 'middle.yaml: base: found [1]; expected the path of a YAML, relative to this one'),
        ('base: none.yaml', "middle.yaml: base: found 'none.yaml'; expected the path of a YAML"),
        ('base: middle.yaml', "middle.yaml: base: found 'middle.yaml', which has this file as its base"),
        ('base: ../top.yaml', "middle.yaml: base: found '../top.yaml', which has this file as its base"),
        ('sede: 1', "middle.yaml: sede: unknown key; did you mean 'seed'?"),
        ('seed: many', 'middle.yaml: seed: '),
        ('a: [', 'middle.yaml: not valid YAML'),
        ('model: [1]', 'middle.yaml: '),
        ('variables: [1]', 'middle.yaml: '),
    ],
)
def test_a_mistake_in_a_base_names_the_file_in_which_it_stands(chain, middle, expected):
    (chain.parent / 'low' / 'middle.yaml').write_text(middle)
    with pytest.raises(UserError) as error:
        load_config(chain)
    assert expected in str(error.value) and '\n' not in str(error.value)


def test_the_base_is_chosen_by_the_file_alone(chain):
    with pytest.raises(UserError, match=r'top\.yaml: base: unknown key'):
        load_config(chain, ['base=other.yaml'])

"""What the documents say, done: their scripts run, their commands and options, YAMLs and links are there."""

import contextlib
import functools
import io
import os
import re
import shlex
import subprocess
import sys
from dataclasses import fields
from importlib import import_module
from inspect import signature
from pathlib import Path

import pytest
import torch
import yaml
from composer.cli.launcher import _get_parser as launcher
from tiny import tiny_lm, tiny_tokenizer

from dhrd_plugin import DropReasoningHead, load_config
from dhrd_plugin.cli import VERBS
from dhrd_plugin.comparison.plan import Comparison, load_comparison
from dhrd_plugin.data.collator import Markers
from dhrd_plugin.data.tasks import METRICS, MULTI_LABEL_METRICS, Task, load_task
from dhrd_plugin.errors import UserError
from dhrd_plugin.training.config import Config, LoraConfig, ModelConfig, TrainLoaderConfig

ROOT = Path(__file__).parent.parent
FOLDERS = ('.', 'dhrd_plugin', 'scripts', 'yamls', 'results')
DOCUMENTS = sorted(
    str(path.relative_to(ROOT))
    for folder in FOLDERS
    for path in (ROOT / folder).glob('*.md' if folder == '.' else '**/README.md')
)
CARD = 'dhrd_plugin/algorithms/auxiliary_reasoning_loss/README.md'
DATA = 'dhrd_plugin/data/README.md'


def read(document):
    return (ROOT / document).read_text('utf-8')


def blocks(text, *kinds):
    """The fenced blocks of these kinds; '' is a block without one."""
    found = re.findall(r'^```(\w*)\n(.*?)^```$', text, re.DOTALL | re.MULTILINE)
    return [block for kind, block in found if kind in kinds]


def block_under(document, heading, kind='python'):
    """The one block of a kind in a section."""
    (section,) = re.findall(rf'^##+ {heading}\n(.*?)(?=^##|\Z)', read(document), re.DOTALL | re.MULTILINE)
    (block,) = blocks(section, kind)
    return block


def test_the_script_of_your_own_trains_and_exports(tmp_path, monkeypatch, one_thread):
    script = block_under(CARD, 'Composer Trainer')
    tiny_lm(tied=True).save_pretrained(tmp_path / 'lm')
    tiny_tokenizer().save_pretrained(tmp_path / 'lm')
    monkeypatch.chdir(tmp_path)
    exec(compile(script, CARD, 'exec'), {'NAME': str(tmp_path / 'lm')})
    assert (tmp_path / 'slim' / 'model.safetensors').is_file()


# The script's first half in a process that cannot import the package; its weights as plain tensors.
WITHOUT_US = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] == 'dhrd_plugin':
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Block())
NAME = {name!r}
{half}
torch.save(before.state.model.state_dict(), 'before.pt')
assert 'dhrd_plugin' not in sys.modules
"""


def test_the_script_of_a_pipeline_that_you_have(tmp_path, monkeypatch, one_thread):
    """Both halves train; the first is bit-equal to what it is where there is no package."""
    script = block_under('README.md', 'Add it to what you have')
    assert len(script.splitlines()) <= 25
    tiny_lm(tied=True).save_pretrained(tmp_path / 'lm')
    tiny_tokenizer().save_pretrained(tmp_path / 'lm')
    name, half = str(tmp_path / 'lm'), script.partition('from dhrd_plugin')[0]
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'HF_HUB_OFFLINE': '1'}
    done = subprocess.run(
        [sys.executable, '-c', WITHOUT_US.format(name=name, half=half)],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]

    monkeypatch.chdir(tmp_path)
    found = {'NAME': name}
    exec(compile(script, 'README.md', 'exec'), found)
    expected = torch.load(tmp_path / 'before.pt', weights_only=True)
    before, after = (found[key].state.model.state_dict() for key in ('before', 'after'))
    assert expected.keys() == before.keys() == after.keys()
    assert all(torch.equal(before[key], value) for key, value in expected.items())
    pretrained = tiny_lm(tied=True).state_dict()['model.embed_tokens.weight']
    rows = [weights['model.model.embed_tokens.weight'] - pretrained for weights in (before, after)]
    reason = tiny_tokenizer().convert_tokens_to_ids('<REASON>')
    assert all(moved.any() for moved in rows)
    assert found['before'].state.timestamp.batch == found['after'].state.timestamp.batch == 3
    assert set(found['after'].state.loss) == {'total', 'classification', 'reasoning'}
    assert float(found['after'].state.loss['reasoning']) > 0 and not torch.equal(rows[0][reason], rows[1][reason])


def test_the_template_is_a_task(tmp_path):
    template = block_under(DATA, 'Templates', 'yaml')
    (tmp_path / 'creak.yaml').write_text(template)
    task = load_task(tmp_path / 'creak.yaml')
    row = {'ex_id': 'a', 'sentence': 'Ice is warm.', 'label': 'false', 'explanation': 'Ice melts.'}
    (triplet,) = task.triplets(row)
    assert triplet['label'] == 'false' and triplet['answer'] == 'False'
    assert triplet['rationale'] == 'Ice melts.'
    assert triplet['input_text'] == 'Claim: Ice is warm.\nIs the claim true or false?'


def test_the_script_of_a_loop_of_your_own(tmp_path):
    tiny_lm().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    found = {'NAME': str(tmp_path)}
    exec(compile(block_under(CARD, 'Functional Interface'), CARD, 'exec'), found)
    assert not torch.equal(found['network'].lm_head.weight, tiny_lm().lm_head.weight)


def test_the_script_that_writes_shards(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(block_under(DATA, 'Prepare'), DATA, 'exec'), {})
    assert (tmp_path / 'shards' / 'train' / 'index.json').is_file()


def test_the_script_that_writes_a_frame(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = {}
    exec(compile(block_under(DATA, 'From Python'), DATA, 'exec'), found)
    assert found['summary']['label_names'] == ['billing', 'bug']
    assert (tmp_path / 'shards' / 'validation' / 'index.json').is_file()


# ------------------------------------------------------------------------------------ what they name


def test_the_readme_is_short():
    assert len(read('README.md').encode()) <= 9500


def anchors(text):
    """The anchors that GitHub gives a document's headings."""
    headings = re.findall(r'^#+ (.*)$', re.sub(r'^```.*?^```$', '', text, flags=re.DOTALL | re.MULTILINE), re.MULTILINE)
    return {re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-') for heading in headings}


@pytest.mark.parametrize('document', DOCUMENTS)
def test_what_it_links_is_there(document):
    text = re.sub(r'^```.*?^```$', '', read(document), flags=re.DOTALL | re.MULTILINE)
    for link in re.findall(r'\]\(((?!http)[^)]+)\)', text):
        path, _, anchor = link.partition('#')
        target = (ROOT / document).parent / path if path else ROOT / document
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text('utf-8')), link


def names(*kinds):
    return [field.name for kind in kinds for field in fields(kind)]


KEYS = {
    'yamls/README.md': names(Config, ModelConfig, LoraConfig, TrainLoaderConfig, Markers),
    DATA: [*names(Task), *METRICS, *MULTI_LABEL_METRICS],
    'dhrd_plugin/export/README.md': [*signature(DropReasoningHead).parameters, 'int8'],
    'results/README.md': names(Comparison),
}


@pytest.mark.parametrize('document', KEYS)
def test_every_key_is_told(document):
    text = read(document)
    code = ' '.join([*re.findall(r'`([^`\n]+)`', text), *blocks(text, 'yaml')])
    assert [key for key in KEYS[document] if not re.search(rf'\b{key}\b', code)] == []


YAMLS = [(document, block) for document in DOCUMENTS for block in blocks(read(document), 'yaml')]


@pytest.mark.parametrize(('document', 'block'), [pair for pair in YAMLS if 'prompt:' not in pair[1]])
def test_its_yaml_is_of_a_run(document, block):
    load_config(ROOT / 'yamls' / 'rte.yaml', layers={document: yaml.safe_load(block)})


# --------------------------------------------------------------------------------- what they type

LOADED_BY = {'training.run': load_config, 'show_batch': load_config, 'comparison.cells': load_comparison}
TYPED = ('dhrd ', 'python ', 'composer ', 'make ', 'mcli ')


def commands(text, prompt=''):
    """The command lines of a document: in blocks, or, without a prompt, between backticks too."""
    lines = '\n'.join(blocks(text, '', 'bash')).replace('\\\n', ' ').splitlines()
    spans = [] if prompt else re.findall(r'`([^`\n]+)`', text)
    found = [line for line in [*lines, *spans] if line.startswith(tuple(prompt + start for start in TYPED))]
    return [line.removeprefix(prompt) for line in found if '...' not in line]


@functools.cache
def options_of(module):
    """The options that a command's ``--help`` names."""
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
        import_module(module).main(['--help'])
    return set(re.findall(r'--[a-z][a-z0-9-]*', shown.getvalue()))


def check_command(words):
    """Hold a command line against what it would run: the file, its options, its YAML with the overrides."""
    program, name, *rest = words
    if program == 'make':
        assert re.search(rf'^{name}:', read('Makefile'), re.MULTILINE), name
        given = dict(word.partition('=')[::2] for word in rest)
        assert given.keys() <= {'ARGS', 'STACK', 'TESTS'} and given.get('STACK', 'current') == 'current'
        load_config('yamls/rte.yaml', shlex.split(given.get('ARGS', '')))
    elif program == 'mcli':
        assert all(Path(word).exists() for word in rest if word.endswith('.yaml'))
    elif program == 'composer':
        launch = launcher().parse_args(words[1:])
        interpreter = [] if launch.command_mode else ['python']
        check_command([*interpreter, launch.training_script, *launch.training_script_args])
    elif program == 'llmfoundry':
        assert all(Path(word).exists() for word in rest if word.endswith('.yaml'))
    elif program == 'python' and name == '-m':
        check_command(['dhrd', *rest[1:]])
    elif program == 'python':
        text = Path(name).read_text('utf-8')
        module = re.search(r'^from (\S+) import main$', text, re.MULTILINE)
        if module:
            check_verb(module[1], rest)
        else:
            assert all(f"'{word}'" in text for word in rest if word.startswith('--'))
    elif not name.isupper():
        check_verb(f'dhrd_plugin.{VERBS[name][0]}', rest)


def check_verb(module, words):
    """Hold a verb's arguments against its ``--help``, and load its YAML with the overrides."""
    assert not {word.partition('=')[0] for word in words if word.startswith('--')} - options_of(module)
    paths = [word for word in words if word.endswith('.yaml')]
    overrides = [word for word in words if '=' in word and not word.startswith('-')]
    load = LOADED_BY.get(module.removeprefix('dhrd_plugin.'), lambda *_: None)
    for path in paths:
        load(path, overrides)


@pytest.mark.parametrize('document', DOCUMENTS)
def test_its_commands_are_there(document, monkeypatch):
    monkeypatch.chdir(ROOT)
    for command in commands(read(document)):
        try:
            check_command(shlex.split(command, comments=True))
        except (AssertionError, KeyError, OSError, UserError, SystemExit) as error:
            pytest.fail(f'{command}: {error!r}')


@pytest.mark.parametrize('document', DOCUMENTS)
def test_its_mistakes_are_told_as_shown(document, monkeypatch):
    monkeypatch.chdir(ROOT)
    text = read(document)
    for command in commands(text, prompt='$ '):
        with pytest.raises(UserError) as error:
            check_command(shlex.split(command))
        assert f'$ {command}\nerror: {error.value}\n' in text

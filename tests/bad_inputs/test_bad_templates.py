"""Templates that are none, through the verbs that take one: one line with the file, the key and what would be right."""

import os
from pathlib import Path

import pytest
import yaml

GOOD = {'name': 'odd', 'prompt': '{text}', 'id': 'id', 'labels': ['yes', 'no']}
CHANGES = {
    'labels a number': ({'labels': 5}, 'labels: found 5; expected a list'),
    'labels a text': ({'labels': 'yes, no'}, 'labels: found "yes, no"; expected a list'),
    'labels a mapping': ({'labels': {'yes': 1, 'no': 0}}, 'labels: found {"no": 0, "yes": 1}; expected a list'),
    'labels with a list': ({'labels': [['yes'], 'no']}, 'labels: value: found ["yes"]; expected a text'),
    'labels with null': ({'labels': [None, 'no']}, 'labels: value: found null; expected a text'),
    'labels with a date': ({'labels': [yaml.safe_load('2024-01-01'), 'no']}, 'labels: value: found '),
    'labels with a fraction': ({'labels': [1.5, 2]}, 'found 1.5; expected a text, a whole number or true/false'),
    'labels twice': ({'labels': ['yes', 'yes']}, 'labels: found "yes", "yes"; expected two or more, each value once'),
    'one label': ({'labels': ['only']}, 'labels: found "only"; expected two or more'),
    'a label misspelt': ({'labels': [{'value': 1, 'nme': ''}, 2]}, "labels: unknown key 'nme'; did you mean 'name'?"),
    'a label without a value': ({'labels': [{'name': 'yes'}, 'no']}, 'labels: value: found null'),
    'an answer a number': ({'labels': [{'value': 1, 'answer': 1}, 2]}, 'labels: answer: found 1; expected a text'),
    'prompt a number': ({'prompt': 5}, 'prompt: found 5; expected a text'),
    'prompt a list': ({'prompt': ['{text}']}, 'prompt: found ["{text}"]; expected a text'),
    'prompt without a field': ({'prompt': 'text'}, 'prompt: names no field; write one as {name}'),
    'an unnamed field': ({'prompt': '{}'}, 'prompt: {} is not a field; write {name}'),
    'an attribute': ({'prompt': '{text.__class__}'}, 'prompt: {text.__class__} is not a field'),
    'a conversion': ({'prompt': '{text!r}'}, 'prompt: {text} is not a field'),
    'an open brace': ({'prompt': '{text'}, "prompt: expected '}' before end of string"),
    'an open bracket': ({'prompt': '{text[}'}, 'prompt: '),
    'a field in a format': ({'prompt': '{text:{width}}'}, 'prompt: {text:{width}} holds no format of a number'),
    'a format of nothing': ({'prompt': '{text:zz}'}, 'prompt: {text:zz} holds no format of a number, such as {text:d}'),
    'a format without end': ({'prompt': '{text:99999999d}'}, 'holds no format of a number'),
    'a literal backslash': ({'prompt': r'{text}\n'}, 'prompt: found a backslash and an n; for a line break use "..."'),
    'metrics a number': ({'metrics': 5}, 'metrics: found 5; expected a list'),
    'metrics a text': ({'metrics': 'accuracy'}, 'metrics: found "accuracy"; expected a list'),
    'metrics of numbers': ({'metrics': [5]}, 'metrics: found 5; expected a list of texts'),
    'metrics unknown': ({'metrics': ['f1']}, "metrics: unknown metric 'f1'; did you mean 'f1a'?"),
    'em without a group': ({'metrics': ['em']}, 'metrics: em, exact match by group, needs the key group'),
    'f1a of three labels': ({'metrics': ['f1a'], 'labels': [1, 2, 3]}, 'metrics: f1a needs two labels'),
    'explode a text': ({'explode': 'x'}, 'explode: found "x"; expected a list'),
    'explode a number': ({'explode': [5]}, 'explode: found 5; expected a list of texts'),
    'explode without in': ({'explode': ['x']}, "explode: found 'x'; expected 'name in field'"),
    'words a list': ({'words': ['a']}, 'words: found ["a"]; expected a mapping'),
    'words of a number': ({'words': {'text': 5}}, 'words: text: found 5; expected a mapping of texts to texts'),
    'words to numbers': ({'words': {'text': {'a': 5}}}, 'words: text: found {"a": 5}; expected a mapping of texts'),
    'words from booleans': ({'words': {'text': {True: 'b'}}}, 'words: text: found {"true": "b"}; expected a mapping'),
    'words of no field': ({'words': {'txt': {}}}, "words: the prompt has no field 'txt'; did you mean 'text'?"),
    'may_be_empty a text': ({'may_be_empty': 'text'}, 'may_be_empty: found "text"; expected a list'),
    'may_be_empty of a list': ({'may_be_empty': [['text']]}, 'may_be_empty: found ["text"]; expected a list of texts'),
    'may_be_empty of no field': ({'may_be_empty': ['b']}, "may_be_empty: the prompt has no field 'b'"),
    'id a list': ({'id': ['id']}, 'id: found ["id"]; expected a text'),
    'id with a broken format': ({'id': '{a[b}'}, 'id: '),
    'group a number': ({'group': 3}, 'group: found 3; expected a text'),
    'hub a text': ({'hub': 'super_glue'}, 'hub: found "super_glue"; expected a mapping'),
    'hub with a number': ({'hub': {'path': 3}}, 'hub: path: found 3; expected a text'),
    'hub with other labels': ({'hub': {'labels': 5}}, 'hub: labels: found 5; expected a list'),
    'hub with an unknown key': ({'hub': {'pth': 'x'}}, "hub: unknown key 'pth'; did you mean 'path'?"),
    'hub with a conversion': ({'hub': {'prompt': '{text!r}'}}, 'hub: prompt: {text} is not a field'),
    'hub with a backslash': ({'hub': {'prompt': r'{text}\n'}}, 'hub: prompt: found a backslash and an n'),
    'an unknown key': ({'lables': []}, "unknown key 'lables'; did you mean 'labels'?"),
    'a key that is no text': ({5: 'x'}, "unknown key 5"),
    'no name': ({'name': ''}, "name: is empty"),
}  # fmt: skip
TEXTS = {
    'empty': (b'', 'found null; expected a mapping of keys'),
    'a list': (b'- a', 'found ["a"]; expected a mapping of keys'),
    'a text': (b'rte', 'found "rte"; expected a mapping of keys'),
    'no YAML': (b'a: [', 'not valid YAML'),
    'a tab': (b'a:\n\t- b', 'not valid YAML'),
    'code': (b'!!python/object/apply:os.system ["touch proof"]', 'not valid YAML'),
    'digits': (b'name: ' + b'9' * 5000, 'not valid YAML: Exceeds the limit'),
    'nested': (b'[' * 1500, 'not valid YAML'),
    'no date': (b'name: 2024-13-45', 'not valid YAML'),
    'Latin-1': (b'name: \xe4', 'not valid YAML'),
}


def prepare(refused, path: Path) -> str:
    rows = path.with_name('rows.jsonl')
    rows.write_text('{"id": 0, "text": "a", "label": "yes"}')
    return refused('prepare', '--template', path, '--input', rows, '--output', path.with_name('out'))


def rationales(refused, path: Path) -> str:
    arguments = ['--input', path.with_name('rows.jsonl'), '--output', path.with_name('r.jsonl'), '--model', 'm']
    return refused('rationales', '--task', path, *arguments)


@pytest.mark.parametrize('name', CHANGES)
def test_a_key_of_the_wrong_kind(refused, tmp_path, name):
    change, words = CHANGES[name]
    path = tmp_path / 'odd.yaml'
    path.write_text(yaml.safe_dump({**GOOD, **change}))
    line = prepare(refused, path)
    assert line.startswith(f'error: {path}: ') and words in line


@pytest.mark.parametrize('verb', [prepare, rationales])
@pytest.mark.parametrize('name', TEXTS)
def test_a_file_that_is_no_template(refused, tmp_path, monkeypatch, name, verb):
    monkeypatch.chdir(tmp_path)
    content, words = TEXTS[name]
    (tmp_path / 'odd.yaml').write_bytes(content)
    line = verb(refused, tmp_path / 'odd.yaml')
    assert line.startswith(f'error: {tmp_path}/odd.yaml: ') and words in line


def test_no_file(refused, tmp_path):
    assert 'none.yaml: No such file or directory' in prepare(refused, tmp_path / 'none.yaml')
    (tmp_path / 'folder.yaml').mkdir()
    assert 'folder.yaml: is not a file; expected a YAML template' in prepare(refused, tmp_path / 'folder.yaml')
    os.mkfifo(tmp_path / 'pipe.yaml')
    assert 'pipe.yaml: is not a file' in prepare(refused, tmp_path / 'pipe.yaml')
    assert "unknown task 'odd.json'" in prepare(refused, tmp_path / 'odd.json').replace(f'{tmp_path}/', '')

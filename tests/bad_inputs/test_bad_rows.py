"""Files of rows that are none, through every verb that reads rows: one line with the file, the row and the field."""

import gzip
import json
import os

import pytest
from configs import export_of, write_readable_run
from omegaconf import OmegaConf

pytestmark = pytest.mark.usefixtures('one_thread')

TASK = {'name': 'odd', 'prompt': '{text}', 'id': 'id', 'labels': ['yes', 'no', 'maybe']}
ROW = {'id': 0, 'text': 'w1 w2', 'label': 'no'}
GOOD = json.dumps(ROW)
DIGITS = '9' * 5000
DEEP = '[' * 900 + ']' * 900


def row(**change):
    return json.dumps({**ROW, **change}).encode()


# The name of a file, what is in it, and what the line says of it.
FILES = {
    'empty': ('a.jsonl', b'', 'a.jsonl: found no row'),
    'blank': ('a.jsonl', b'\n\n  \n', 'a.jsonl: found no row'),
    'empty array': ('a.json', b'[]', 'a.json: found no row'),
    'header only': ('a.csv', b'id,text,label\n', 'a.csv: found no row'),
    'no header': ('a.csv', b'', 'a.csv: found no row'),
    'no object': ('a.jsonl', b'5', 'a.jsonl, line 1: found 5; expected an object of fields'),
    'a text': ('a.jsonl', b'"w1"', 'line 1: found "w1"; expected an object'),
    'plain text': ('a.jsonl', b'w1 w2\n', 'line 1: not valid JSON: Expecting value, column 1'),
    'breaks off': ('a.jsonl', GOOD.encode()[:-9], 'line 1, field text: not valid JSON: Unterminated string'),
    'object over lines': ('a.json', json.dumps(ROW, indent=1).encode(), 'the object goes on in the next line'),
    'rows under a key': ('a.json', json.dumps({'data': [ROW]}).encode(), 'one object that holds the rows'),
    'columns': ('a.json', json.dumps({'text': {'0': 'w1'}, 'id': {'0': 1}}).encode(), 'one object that holds the rows'),
    'two arrays': ('a.json', f'[{GOOD}] [{GOOD}]'.encode(), 'a.json: not valid JSON: Extra data'),
    'missing comma': ('a.json', f'[{GOOD}\n{GOOD}]'.encode(), "JSON: Expecting ',' delimiter: line 2 column 1 "),
    'array of a broken row': ('a.json', f'[{GOOD},\n{{"id": ]'.encode(), 'JSON: Expecting value: line 2 column 8 '),
    'array breaks off after a row': ('a.json', f'[{GOOD}'.encode(), "not valid JSON: Expecting ',' delimiter"),
    'array breaks off': ('a.json', f'[{GOOD},\n'.encode(), 'the file breaks off there'),
    'array of arrays': ('a.json', b'[[1, 2]]', 'a.json, row 1: found [1, 2]; expected an object'),
    'key twice': ('a.jsonl', b'{"id": 1, "text": "w1", "text": "w2", "label": "no"}', 'field text: stands twice'),
    'key twice in an array': ('a.json', f'[{GOOD}, {{"id": 1, "id": 2}}]'.encode(), 'row 2, field id: stands twice'),
    'column twice': ('a.csv', b'id,text,label,text\n1,w1,no,w2\n', 'line 1, field text: stands twice in the header'),
    'header in Latin-1': ('a.csv', b'id,text,l\xe4bel\n', 'line 1: the header is no line of names in UTF-8'),
    'cell in Latin-1': ('a.csv', b'id,text,label\n1,w\xe4,no\n', 'line 2, field text: is not valid UTF-8'),
    'a cell too many': ('a.csv', b'id,text,label\n1,w1,no,x\n', 'line 2: 4 cells where the header has 3'),
    'a cell too few': ('a.csv', b'id,text,label\n0,"w1\nw2",no\n1\n', 'line 4: 1 cells where the header has 3'),
    'a quote inside': ('a.csv', b'id,text,label\n1,"w1 "w2" w3",no\n', 'line 2: not valid CSV'),
    'a quote too few': ('a.csv', b'id,text,label\n1,"w1,no\n', 'line 2: not valid CSV: unexpected end of data'),
    'a long row': ('a.csv', b'id,text,label\n1,' + b'w' * 1_100_000 + b',no\n', 'line 2: the row is longer than 1,04'),
    'UTF-16': ('a.csv', 'id,text,label\n'.encode('utf-16'), 'a.csv: is UTF-16 text; save it as UTF-8'),
    'gzip': ('a.jsonl', gzip.compress(GOOD.encode(), mtime=0), 'a.jsonl: is a gzip file; unpack it'),
    'a workbook': ('a.csv', b'PK\x03\x04rest', 'a.csv: is a zip file (or .xlsx)'),
    'Parquet by another name': ('a.json', b'PAR1rest', 'a.json: is a Parquet file; let its name end in .parquet'),
    'no Parquet': ('a.parquet', GOOD.encode(), 'a.parquet: not a whole Parquet file'),
    'another kind': ('a.tsv', b'id\ttext\n', "a.tsv: unknown kind of file '.tsv'"),
    'digits': ('a.jsonl', f'{{"id": {DIGITS}}}'.encode(), 'line 1: not valid JSON: Exceeds the limit (4300 digits)'),
    'digits in an array': ('a.json', f'[{GOOD}, {{"id": {DIGITS}}}]'.encode(), 'row 2: not valid JSON: Exceeds'),
    'nested': ('a.jsonl', b'{"id": 1, "text": ' + DEEP.encode() + b'}', 'line 1: not valid JSON: nested too deeply'),
    'nested in an array': ('a.json', b'[{"id": ' + DEEP.encode() + b'}]', 'row 1: not valid JSON: nested too deeply'),
    'nested without end': ('a.json', b'[' * 100_000, 'a.json: not valid JSON: nested too deeply'),
    'surrogate': ('a.jsonl', b'{"id": 1, "text": "w\\ud800", "label": "no"}', 'field text: is not valid Unicode'),
    'surrogate in the label': ('a.jsonl', b'{"id": 1, "text": "w1", "label": "\\ud800"}', 'label: found "\\ud800"'),
    'invalid UTF-8': ('a.jsonl', b'{"id": 1, "text": "w\xff", "label": "no"}', 'field text: is not valid UTF-8'),
    'invalid UTF-8 in an array': ('a.json', b'[{"text": "w\xff"}]', 'a.json, row 1, field text: is not valid UTF-8'),
    'text is a number': ('a.jsonl', row(text=7), 'line 1, field text: found 7; expected text'),
    'text is a list': ('a.jsonl', row(text=['w1']), 'field text: found ["w1"]; expected text'),
    'text is NaN': ('a.jsonl', row(text=float('nan')), 'field text: found NaN; expected text'),
    'text is null': ('a.jsonl', row(text=None), 'field text: is missing'),
    'text is blank': ('a.jsonl', row(text=' \t'), 'field text: is empty'),
    'id is a fraction': ('a.jsonl', row(id=1.5), 'field id: found 1.5; expected text'),
    'id is true': ('a.jsonl', row(id=True), 'field id: found true; expected text'),
    'id is empty': ('a.jsonl', row(id=''), 'field id: is empty'),
    'id is null': ('a.jsonl', row(id=None), 'field id: is missing'),
    'id twice': ('a.jsonl', f'{GOOD}\n{GOOD}'.encode(), "a.jsonl, line 2, field id: found '0' twice, first in"),
    'label is a number': ('a.jsonl', row(label=1), 'field label: found 1; expected one of "yes", "no", "maybe"'),
    'label is beyond floats': ('a.jsonl', row(label=10**400), 'field label: found 1000'),
    'label is an object': ('a.jsonl', row(label={'a': 1}), 'field label: found {"a": 1}; expected one of'),
    'label is missing': ('a.csv', b'id,text,label\n1,w1,\n', 'line 2, field label: is missing'),
    'rationale is NaN': ('a.jsonl', row(rationale=float('nan')), 'field rationale: found NaN; expected text'),
    'rationale is a number': ('a.jsonl', row(rationale=['r', 3]), 'field rationale[1]: found 3; expected text'),
    'rationale is empty': ('a.jsonl', row(rationale=''), 'field rationale: is empty'),
    'rationale is an empty list': ('a.jsonl', row(rationale=[]), 'field rationale: found []; expected text'),
    'weight is a text': ('a.jsonl', row(weight='high'), 'field weight: found "high"; expected a number'),
    'weight is negative': ('a.jsonl', row(weight=-1), 'field weight: found -1; expected a finite number'),
    'weight is infinite': ('a.jsonl', row(weight=float('inf')), 'field weight: found inf; expected a finite number'),
    'weight is beyond floats': ('a.jsonl', row(weight=10**400), 'field weight: found 1000'),
    'weight is no number': ('a.csv', b'id,text,label,weight\n1,w1,no,much\n', 'field weight: found "much"; expected'),
}  # fmt: skip
# What a row without a label and an id of its own may lack: predict reads the text alone.
OF_THE_TEXT = [
    name
    for name in FILES
    if not name.startswith(('id ', 'label ', 'rationale ', 'weight ', 'surrogate in'))
    and name not in ('breaks off', 'another kind')
]
SOME = [
    'empty',
    'no object',
    'column twice',
    'a quote inside',
    'gzip',
    'digits',
    'nested',
    'text is a number',
    'id twice',
]


@pytest.fixture(scope='module')
def slim(tmp_path_factory):
    """An export that holds the task."""
    return export_of(TASK, tmp_path_factory.mktemp('rows') / 'slim')


@pytest.fixture(scope='module')
def config(tmp_path_factory):
    """A config of a run that reads ``SOURCE``."""
    return write_readable_run(tmp_path_factory.mktemp('rows'), TASK, {'source': '???'})


@pytest.fixture
def template(tmp_path):
    path = tmp_path / 'odd.yaml'
    path.write_text(OmegaConf.to_yaml(OmegaConf.create(TASK)))
    return path


@pytest.fixture
def put(tmp_path):
    def write(name):
        path = tmp_path / FILES[name][0]
        path.write_bytes(FILES[name][1])
        return path, FILES[name][2]

    return write


@pytest.mark.parametrize('name', FILES)
def test_prepare(refused, tmp_path, template, put, name):
    path, words = put(name)
    line = refused('prepare', '--template', template, '--input', path, '--output', tmp_path / 'out')
    assert words in line and str(path) in line
    assert ('the file breaks off' in line) == ('breaks off' in name)


@pytest.mark.parametrize('name', OF_THE_TEXT)
def test_predict(refused, slim, put, name):
    path, words = put(name)
    line = refused('predict', slim, '--input', path)
    words = words.replace('found no row', 'found no text')
    if name in ('rows under a key', 'columns'):
        words = 'a.json, line 1, field text: '
    assert str(path) in line and words in line


@pytest.mark.parametrize('name', SOME)
def test_evaluate(refused, slim, put, name):
    path, words = put(name)
    line = refused('evaluate', slim, path)
    assert words.replace('found no row', 'found no rows') in line and str(path) in line


@pytest.mark.parametrize('name', [name for name in SOME if name != 'empty'])
def test_rationales(refused, tmp_path, template, put, name):
    path, words = put(name)
    arguments = ['--task', template, '--input', path, '--output', tmp_path / 'r.jsonl', '--model', 'm', '--dry-run']
    line = refused('rationales', *arguments)
    assert words in line and str(path) in line


@pytest.mark.parametrize('name', SOME)
def test_show_batch(refused, config, put, name):
    path, words = put(name)
    assert words in refused('show-batch', config, f'train_loader.source={path}')


@pytest.mark.parametrize(
    ('content', 'words'),
    [
        (b'w1\nw\xff2\n', 'a.txt, line 2: is not valid UTF-8'),
        (b'w1\n\nw2\n', 'a.txt, line 2: is empty'),
        (b'w1\n{braces} are no JSON\n', 'a text that begins with { is written as {"input_text": "{..."}'),
        (b'{"input_text": 5}\n', 'a.txt, line 1, field input_text: found 5; expected text'),
        (b'{"input_text": null}\n', 'a.txt, line 1, field input_text: is missing'),
        (b'{"input_text": ["w1"]}\n', 'a.txt, line 1, field input_text: found ["w1"]; expected text'),
        (b'{"input_text": "w\\ud800"}\n', 'a.txt, line 1, field input_text: is not valid Unicode'),
        (b'{"input_text": "w1", "input_text": "w2"}\n', 'a.txt, line 1, field input_text: stands twice'),
        (b'{"input_text": ' + DIGITS.encode() + b'}\n', 'a.txt, line 1: not valid JSON: Exceeds the limit'),
        (b'{"a":' * 100_000, 'a.txt, line 1: not valid JSON: nested too deeply'),
        (b'{"txt": "w1"}\n', 'a.txt, line 1, field text: is missing'),
        (gzip.compress(b'w1', mtime=0), 'a.txt: is a gzip file; unpack it'),
        ('w1'.encode('utf-16'), 'a.txt: is UTF-16 text; save it as UTF-8'),
        (b'', 'a.txt: found no text'),
    ],
)
def test_predict_lines_of_text(refused, slim, tmp_path, content, words):
    (tmp_path / 'a.txt').write_bytes(content)
    assert words in refused('predict', slim, '--input', tmp_path / 'a.txt')


def test_predict_arguments(refused, slim):
    assert 'argument 2: is empty' in refused('predict', slim, 'w1', ' ')
    assert 'argument 1: is not valid UTF-8' in refused('predict', slim, 'w\udcff')
    assert 'argument 1: not valid JSON' in refused('predict', slim, '{w1')


@pytest.mark.parametrize('name', ['a.jsonl', 'a.txt'])
def test_what_is_no_file(refused, slim, template, tmp_path, name):
    os.mkfifo(tmp_path / name)
    assert f'no such file: {tmp_path / name}' in refused('predict', slim, '--input', tmp_path / name)
    line = refused('prepare', '--template', template, '--input', tmp_path / name, '--output', tmp_path / 'out')
    assert line == f'error: {tmp_path / name}: is neither a file nor a folder'
    (tmp_path / name).unlink()
    (tmp_path / name).mkdir()
    assert f'no such file: {tmp_path / name}' in refused('predict', slim, '--input', tmp_path / name)
    assert 'is a folder; name a split' in refused('evaluate', slim, tmp_path / name)


RATIONALES = {
    'nobody': (b'{"id": 7, "rationale": "r"}', 'none of its 1 rationales matches a row: it has ids such as "7"; a row'),
    'empty': (b'', 'r.jsonl: holds no rationale'),
    'a number': (b'{"id": 0, "rationale": 5}', 'r.jsonl, line 1, field rationale: found 5; expected text'),
    'nothing': (b'{"id": 0}', 'r.jsonl, line 1, field rationale: is missing'),
    'no id': (b'{"rationale": "r"}', 'r.jsonl, line 1, field id: is missing'),
    'twice': (b'{"id": 0, "rationale": "r"}\n{"id": "0", "rationale": "s"}', "line 2, field id: found '0' twice"),
    'gzip': (gzip.compress(b'{}', mtime=0), 'r.jsonl: is a gzip file'),
    'weight': (b'{"id": 0, "rationale": "r", "weight": -1}', 'r.jsonl, line 1, field weight: found -1'),
}


@pytest.mark.parametrize('name', RATIONALES)
def test_rationales_of_a_file(refused, tmp_path, template, name):
    content, words = RATIONALES[name]
    (tmp_path / 'a.jsonl').write_text(GOOD)
    (tmp_path / 'r.jsonl').write_bytes(content)
    arguments = ['--template', template, '--input', tmp_path / 'a.jsonl', '--output', tmp_path / 'out']
    assert words in refused('prepare', *arguments, '--rationales', tmp_path / 'r.jsonl')


@pytest.mark.parametrize('name', ['nobody', 'a quote inside'])
def test_what_cannot_be_set_aside(refused, tmp_path, template, put, name):
    path, words = put('a quote inside')
    arguments = ['--template', template, '--output', tmp_path / 'out', '--skip-bad', tmp_path / 'bad.jsonl']
    if name == 'nobody':
        path = tmp_path / 'a.jsonl'
        path.write_text(GOOD)
        content, words = RATIONALES[name]
        (tmp_path / 'r.jsonl').write_bytes(content)
        arguments += ['--rationales', tmp_path / 'r.jsonl']
    assert words in refused('prepare', '--input', path, *arguments)


def test_the_hub(refused, tmp_path, monkeypatch):
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    arguments = ['--task', 'rte', '--output', tmp_path / 'out', '--split', 'train']
    assert "hub:../x: cannot load '../x'" in refused('prepare', '--input', 'hub:../x', *arguments)
    assert 'name a split' in refused('prepare', '--input', 'hub:', '--task', 'rte', '--output', tmp_path / 'out')

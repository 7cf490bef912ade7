"""Where dhrd predict finds its texts, and which it refuses."""

import csv
import datetime
import io
import json
from pathlib import Path

import pandas
import pyarrow as pa
import pytest
import torch
from configs import TASK
from forks import run_ranks
from pyarrow import parquet as pq
from tiny import LABELS, tiny_classifier, tiny_tokenizer, triplet
from transformers import GPT2Config, GPT2ForSequenceClassification

from dhrd_plugin import load_classifier
from dhrd_plugin.data.rows import read_rows
from dhrd_plugin.data.shards import write_triplets
from dhrd_plugin.data.tasks import load_task
from dhrd_plugin.data.texts import Text, as_argument, read_lines, texts_of
from dhrd_plugin.errors import UserError
from dhrd_plugin.evaluate import main as evaluate
from dhrd_plugin.export.classify import logits_of_texts
from dhrd_plugin.export.load import RUNTIMES
from dhrd_plugin.export.write import write_slim
from dhrd_plugin.predict import WINDOW, main

pytestmark = pytest.mark.usefixtures('one_thread')

TEXTS = ['w1 w2 w3', 'a scraped\u2028text\x85in\x0bfour\x1chalves', 'w9']
ROWS = [{'id': str(i), 'text': text} for i, text in enumerate(TEXTS)]


def export_of(task, folder, onnx=False):
    model = tiny_classifier(head='linear')
    model.info['task'] = {**TASK, **task}
    return write_slim(model.get_metadata(), model.network.state_dict(), folder / 'slim', onnx=onnx)


@pytest.fixture(scope='module')
def slim(tmp_path_factory):
    """Its prompt has one field, and words beside it."""
    return export_of({'prompt': 'w7 {text}'}, tmp_path_factory.mktemp('predict'), onnx=True)


@pytest.fixture(scope='module')
def pairs(tmp_path_factory):
    """Its prompt has two fields."""
    return export_of({'prompt': '{left} {right}'}, tmp_path_factory.mktemp('predict'))


@pytest.fixture(scope='module')
def absolute(tmp_path_factory):
    """A GPT-2 of 16 positions; a longer text has none."""
    folder = tmp_path_factory.mktemp('predict') / 'gpt2'
    tokenizer = tiny_tokenizer()
    names = {'id2label': dict(enumerate(LABELS)), 'label2id': {name: i for i, name in enumerate(LABELS)}}
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=16, n_embd=16, n_layer=1, n_head=2, pad_token_id=0, num_labels=3, **names
    )
    torch.manual_seed(0)
    GPT2ForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def printed(capsys, *arguments):
    capsys.readouterr()
    status = main([str(argument) for argument in arguments])
    out, error = capsys.readouterr()
    assert status == 0, error
    assert error.startswith('runs on: ')
    return [json.loads(line) for line in out.splitlines()]


def without_ids(rows):
    return [{key: value for key, value in row.items() if key != 'id'} for row in rows]


@pytest.fixture
def expected(slim, capsys):
    """Of the texts as they are given, in one line of JSON each."""
    return printed(capsys, slim, *(json.dumps({'input_text': f'w7 {text}'}) for text in TEXTS))


def jsonl(rows, end='\n'):
    return ''.join(json.dumps(row, ensure_ascii=False) + end for row in rows).encode()


def csv_of(rows):
    out = io.StringIO(newline='')
    writer = csv.DictWriter(out, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().encode()


def parquet_of(rows):
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), out)
    return out.getvalue()


@pytest.mark.parametrize(
    ('name', 'content'),
    [
        ('a.txt', '\n'.join(TEXTS).encode()),
        ('a.txt', '\r\n'.join(TEXTS).encode() + b'\r\n'),
        ('a.txt', b'\xef\xbb\xbf' + '\n'.join(TEXTS).encode()),
        ('a', jsonl(ROWS)),
        ('a.txt', b'\xef\xbb\xbf' + jsonl(ROWS)),
        ('a.jsonl', jsonl(ROWS)),
        ('a.JSONL', b'\xef\xbb\xbf' + jsonl(ROWS, '\r\n\r\n')),
        ('a.json', json.dumps(ROWS, indent=1).encode()),
        ('a.csv', csv_of(ROWS)),
        ('a.CSV', b'\xef\xbb\xbf' + csv_of(ROWS)),
        ('a.parquet', parquet_of(ROWS)),
    ],
)
def test_every_kind_of_file_gives_the_same_texts(slim, tmp_path, capsys, monkeypatch, expected, name, content):
    """Each in the template; with the ids of rows."""
    (tmp_path / name).write_bytes(content)
    found = printed(capsys, slim, '--input', tmp_path / name)
    assert without_ids(found) == expected
    assert [row.get('id') for row in found] == [row['id'] if b'id' in content else None for row in ROWS]
    if name in ('a', 'a.txt'):
        monkeypatch.setattr('sys.stdin', io.TextIOWrapper(io.BytesIO(content)))
        assert printed(capsys, slim) == found


def test_shards_and_addresses(slim, tmp_path, capsys, s3, expected):
    rows = [{**triplet(i), 'id': f'r{i}', 'input_text': f'w7 {text}'} for i, text in enumerate(TEXTS)]
    write_triplets(rows, tmp_path / 'set')
    write_triplets(rows, f'{s3.bucket}/predict/set')
    s3.put('predict/rows.csv', csv_of(ROWS))
    s3.put('predict/bad.txt', b'w1\n\n')
    for place in (tmp_path / 'set', f'{s3.bucket}/predict/set', f'{s3.bucket}/predict/rows.csv'):
        found = printed(capsys, slim, '--input', place)
        assert without_ids(found) == expected
        assert [row['id'] for row in found] == [row['id'] for row in (ROWS if '.csv' in str(place) else rows)]
    for name, flaw in (('bad.txt', 'bad.txt, line 2: is empty'), ('absent.csv', 'no such file: s3://')):
        assert main([str(slim), '--input', f'{s3.bucket}/predict/{name}']) == 2
        assert flaw in capsys.readouterr().err


def test_rows_go_through_the_template(pairs, tmp_path, capsys):
    rows = [{'left': 'w1', 'right': 'w2 w3'}, {'left': 'w8 w9', 'right': 'w9'}]
    found = printed(capsys, pairs, '{"input_text": "w1 w2 w3"}', '{"input_text": "w8 w9 w9"}')
    for name, content in (('a.csv', csv_of(rows)), ('a.jsonl', jsonl(rows)), ('a.txt', jsonl(rows))):
        (tmp_path / name).write_bytes(content)
        assert printed(capsys, pairs, '--input', tmp_path / name) == found


def test_a_row_of_the_template_is_that_row_whatever_else_it_holds(pairs, capsys):
    row = '{"left": "w1", "right": "w2 w3", "input_text": "w8"}'
    assert printed(capsys, pairs, row) == printed(capsys, pairs, '{"input_text": "w1 w2 w3"}')


def test_plain_text_is_refused_where_the_prompt_has_several_fields(refused, pairs, tmp_path):
    (tmp_path / 'a.txt').write_text('{"left": "w1", "right": "w2"}\nw1 w2\n')
    for arguments, place in (['w1 w2'], 'argument 1'), (['--input', tmp_path / 'a.txt'], f'{tmp_path}/a.txt, line 2'):
        line = refused('predict', pairs, *arguments)
        assert line.startswith(f'error: {place}: found plain text; the prompt has the fields left, right: give a row')
    with pytest.raises(UserError, match=r'^text 1: found plain text; the prompt has the fields left, right'):
        load_classifier(pairs).predict(['w1 w2'])


def test_what_is_shown_after_training_is_taken_as_it_was_rendered():
    one, two, bare = (load_task({**TASK, 'prompt': prompt}) for prompt in ('w7 {text}', '{left} {right}', '{text}'))
    for task in (one, two, bare, None):
        for text in ('w7 w1', '{w7', 'w1\nw2'):
            (found,) = read_lines([as_argument(text, task).encode()], task, 'argument ')
            assert found.text == text
    assert as_argument('w1 w2', bare) == as_argument('w1 w2', None) == 'w1 w2'


@pytest.fixture(scope='module')
def many(tmp_path_factory):
    """Rows of several windows, of many lengths."""
    path = tmp_path_factory.mktemp('predict') / 'many.jsonl'
    path.write_bytes(jsonl([{'id': f'r{i}', 'text': ' '.join(['w1', 'w2', 'w3'][: 1 + i % 3])} for i in range(5000)]))
    return path


@pytest.mark.parametrize(('ranks', 'name'), [(1, 'a.jsonl'), (1, 'a.parquet'), (2, 'a.parquet'), (2, None)])
def test_ids_and_order_over_windows_and_ranks(slim, many, tmp_path, capsys, ranks, name):
    script, out = Path(__file__).parents[1] / 'scripts' / 'predict.py', tmp_path / (name or 'nowhere')
    arguments = [str(slim), '--input', str(many), '--runtime', 'torch']
    expected = printed(capsys, *arguments)
    arguments += ['--output', str(out)] if name else []
    if ranks == 1:
        assert main(arguments) == 0
        said = ''
    else:
        done = run_ranks(2, script, *arguments)
        said = ''.join(line for line in done.stdout.splitlines(True) if line.startswith('{'))  # the launcher speaks
    lines = out.read_text() if name == 'a.jsonl' else said
    found = pq.read_table(out).to_pylist() if name == 'a.parquet' else [*map(json.loads, lines.splitlines())]
    assert [row['id'] for row in found] == [row['id'] for row in expected] == [f'r{i}' for i in range(5000)]
    assert [row['label'] for row in found] == [row['label'] for row in expected]
    for row, other in zip(found, expected, strict=True):
        assert row['probabilities'] == pytest.approx(other['probabilities'], abs=2e-4)


def test_what_was_printed_before_a_bad_row_stays(slim, many, tmp_path, capsys):
    lines = many.read_text().splitlines()
    (tmp_path / 'a.jsonl').write_text('\n'.join([*lines[:3000], '{"id": "x"}', *lines[3000:]]))
    assert main([str(slim), '--input', str(tmp_path / 'a.jsonl')]) == 2
    out, error = capsys.readouterr()
    assert len(out.splitlines()) == WINDOW
    assert error.splitlines()[1:] == [f'error: {tmp_path}/a.jsonl, line 3001, field text: is missing']
    out = tmp_path / 'out.jsonl'
    assert main([str(slim), '--input', str(tmp_path / 'a.jsonl'), '--output', str(out)]) == 2
    assert [path.name for path in tmp_path.iterdir()] == ['a.jsonl']


def test_an_output_replaces_predictions_alone(refused, slim, tmp_path):
    rows = tmp_path / 'a.jsonl'
    rows.write_bytes(jsonl([{'label': 'no', 'probabilities': {'no': 1}, 'text': 'w1'}]))
    (tmp_path / 'b.parquet').write_bytes(parquet_of(ROWS))
    for out, flaw in (
        (rows, 'is --input; expected another place'),
        (tmp_path / 'b.parquet', 'holds something else than predictions'),
        (tmp_path / 'c.csv', 'expected a name that ends in .jsonl or .parquet'),
    ):
        assert flaw in refused('predict', slim, '--input', rows, '--output', out)
    assert 'holds something else than predictions' in refused('predict', slim, 'w1', '--output', rows)


@pytest.mark.parametrize('name', ['out.jsonl', 'out.parquet'])
def test_an_output_may_be_written_again(slim, tmp_path, capsys, name):
    for texts in (TEXTS, TEXTS[:1]):
        assert main([str(slim), *texts, '--output', str(tmp_path / name)]) == 0
        assert capsys.readouterr().out == ''
    found = pq.read_table(tmp_path / name).num_rows if 'q' in name else (tmp_path / name).read_text().count('\n')
    assert found == 1


def test_an_output_that_is_a_link_is_written_where_it_points(slim, tmp_path, capsys):
    (tmp_path / 'real').mkdir()
    (tmp_path / 'link.jsonl').symlink_to('real/out.jsonl')
    for texts in (TEXTS, TEXTS[:1]):
        assert main([str(slim), *texts, '--output', str(tmp_path / 'link.jsonl')]) == 0
        assert (tmp_path / 'real' / 'out.jsonl').read_text().count('\n') == len(texts)
    assert (tmp_path / 'link.jsonl').is_symlink() and len([*tmp_path.rglob('*')]) == 3


def test_arguments_that_name_a_place_are_no_texts(refused, slim, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'new.csv').write_bytes(csv_of(ROWS))
    write_triplets([triplet(0)], tmp_path / 'set')
    for names in (['new.csv'], ['set'], ['new.csv', 'set']):
        expected = f'error: {names[0]}: found a place that holds texts; expected a text, or --input {names[0]}'
        assert refused('predict', slim, *names) == expected
    expected = 'error: --input: new.csv: found beside texts; expected one or the other'
    assert refused('predict', slim, 'w1', '--input', 'new.csv') == expected
    assert len(printed(capfd, slim, '{"input_text": "new.csv"}')) == 1
    assert len(printed(capfd, slim, 'new.csv', 'w1')) == 2


@pytest.mark.parametrize('name', ['new.tsv', 'new.TAB'])
def test_a_table_is_not_read_as_lines(refused, slim, tmp_path, capfd, s3, name):
    table = b'id\ttext\n1\tw1\n'
    (tmp_path / name).write_bytes(table)
    s3.put(f'predict/{name}', table)
    words = f'{name}: unknown kind of file {name[-4:]!r}; expected a name that ends in .csv'
    for place in (tmp_path / name, f'{s3.bucket}/predict/{name}'):
        assert refused('predict', slim, '--input', place) == f'error: {place}: {words.partition(": ")[2]}'
    (tmp_path / name).rename(tmp_path / 'new.csv')
    assert [row['id'] for row in printed(capfd, slim, '--input', tmp_path / 'new.csv')] == ['1']


@pytest.mark.parametrize('kind', ['date', 'struct'])
def test_a_parquet_cell_that_python_has_no_value_for_is_named(refused, slim, tmp_path, kind):
    late = pa.array([0, 10_000_000], pa.int32()).cast(pa.date32())
    alike = pa.StructArray.from_arrays([pa.array([1, 2])] * 2, names=['k', 'k'])
    pq.write_table(pa.table({'text': ['w1', 'w2'], 'more': late if kind == 'date' else alike}), tmp_path / 'a.parquet')
    line = refused('predict', slim, '--input', tmp_path / 'a.parquet')
    row = 2 if kind == 'date' else 1
    assert line.startswith(f'error: {tmp_path}/a.parquet, row {row}, field more: has no value in Python: ')
    bad = []
    assert [row.fields for row in read_rows(tmp_path / 'a.parquet', bad.append)] == (
        [{'text': 'w1', 'more': datetime.date(1970, 1, 1)}] if kind == 'date' else []
    )
    assert {error.field for error in bad} == {'more'}


def test_it_abstains_below_a_probability(slim, tmp_path, capsys):
    found = printed(capsys, slim, *TEXTS)
    sure = sorted(max(row['probabilities'].values()) for row in found)
    middle = (sure[0] + sure[-1]) / 2
    for row, other in zip(found, printed(capsys, slim, *TEXTS, '--abstain', middle), strict=True):
        assert other['probabilities'] == row['probabilities']
        assert other['label'] == (row['label'] if max(row['probabilities'].values()) >= middle else None)
    labels = load_classifier(slim).predict(TEXTS, abstain=middle)
    assert labels.count(None) in (1, 2)
    assert main([str(slim), *TEXTS, '--abstain', '1', '--output', str(tmp_path / 'a.parquet')]) == 0
    assert pq.read_table(tmp_path / 'a.parquet')['label'].to_pylist() == [None] * len(TEXTS)


@pytest.mark.parametrize(('ident', 'found'), [(1.0, '1'), (3, '3'), ('a', 'a'), (0.5, None), ([1], None), ('', None)])
def test_an_id_that_nobody_named_is_taken_where_it_is_one(ident, found):
    """Training numbers such rows; pandas makes 1.0 of a 1 in a column with gaps."""
    task = load_task({'prompt': '{text}', 'labels': ['a', 'b']})
    for row in ({'text': 'w1'}, {'input_text': 'w1'}):
        (text,) = texts_of([{**row, 'id': ident}], task)
        assert text.id == found


def test_in_python(slim, capsys, expected):
    classifier = load_classifier(slim)
    assert classifier.label_names == LABELS
    rows = [{'text': text, 'id': i} for i, text in enumerate(TEXTS)]
    for texts in (TEXTS, rows, pandas.DataFrame(rows), pandas.Series(TEXTS)):
        probabilities = classifier.predict_proba(texts)
        assert probabilities.shape == (3, 3) and probabilities.dtype == torch.float32
        names = [dict(zip(LABELS, values)) for values in probabilities.tolist()]
        for row, other in zip(names, expected, strict=True):
            assert row == pytest.approx(other['probabilities'], abs=1e-4)
        assert classifier.predict(texts) == [row['label'] for row in expected]
    assert classifier.predict([]) == []
    for texts, flaw in (
        ('w1', 'found one text or row; expected a list'),
        ([{'txt': 'w1'}], 'text 1, field text: is missing'),
        (pandas.DataFrame({'text': ['w1', float('nan')]}), 'text 2, field text: is missing'),
        ([3], 'text 1: found 3; expected text'),
    ):
        with pytest.raises(UserError, match=flaw):
            classifier.predict(texts)


def test_a_classifier_of_the_hub(slim, monkeypatch):
    monkeypatch.setattr('huggingface_hub.snapshot_download', lambda name, allow_patterns: {'us/tiny': slim}[name])
    assert load_classifier('hub:us/tiny').predict(TEXTS) == load_classifier(slim).predict(TEXTS)
    with pytest.raises(UserError, match=r'^hub:us/absent: cannot be loaded: KeyError'):
        load_classifier('hub:us/absent')


@pytest.mark.parametrize('verb', [main, evaluate])
def test_onnx_runs_by_itself_and_agrees_with_torch(slim, tmp_path, capsys, monkeypatch, verb):
    (tmp_path / 'rows.jsonl').write_bytes(jsonl([{**row, 'label': 'no'} for row in ROWS]))
    arguments = [str(slim), *(['--input'] if verb is main else []), str(tmp_path / 'rows.jsonl')]

    def told(*more):
        assert verb([*arguments, *more]) == 0
        return capsys.readouterr().err.splitlines()[0]

    assert told() == told('--runtime', 'onnx') == 'runs on: onnxruntime, 1 thread'
    assert told('--runtime', 'torch') == told('--precision', 'amp_bf16') == 'runs on: torch, cpu'
    first, second = (load_classifier(slim, runtime).predict_proba(TEXTS) for runtime in RUNTIMES)
    torch.testing.assert_close(first, second, atol=1e-4, rtol=0)
    monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
    assert told() == 'runs on: torch, cpu'


def test_a_runtime_that_cannot_be_is_told(refused, slim, pairs):
    text = '{"input_text": "w1"}'
    assert 'holds no model.onnx' in refused('predict', pairs, text, '--runtime', 'onnx')
    assert 'is an ONNX file, which onnx runs' in refused('predict', slim / 'model.onnx', text, '--runtime', 'torch')


@pytest.mark.parametrize('length', [16, 17])
def test_a_text_longer_than_the_positions_is_named(refused, absolute, tmp_path, length):
    texts = ['w1', ' '.join(['w2'] * length), 'w3']
    path = tmp_path / 'a.txt'
    path.write_text('\n'.join(texts))
    rows = tmp_path / 'rows.jsonl'
    rows.write_bytes(jsonl([{**triplet(i), 'id': f'r{i}', 'input_text': text} for i, text in enumerate(texts)]))
    task = tmp_path / 'task.yaml'
    task.write_text(json.dumps(TASK))
    if length == 16:
        assert main([str(absolute), '--input', str(path)]) == 0
        assert evaluate([str(absolute), str(rows), '--task', str(task)]) == 0
    else:
        reason = 'found 17 tokens; expected at most 16, the positions that the model has'
        assert refused('predict', absolute, '--input', path) == f'error: {path}, line 2: {reason}'
        assert refused('evaluate', absolute, rows, '--task', task) == f'error: row r1: {reason}'


def test_rotary_positions_have_no_end(slim, capsys):
    assert len(printed(capsys, slim, ' '.join(['w1'] * 80))) == 1  # its max_position_embeddings is 64


def test_a_text_of_no_token_is_told_by_its_place(slim):
    found, texts = load_classifier(slim), [Text('row 1', None, 'w1'), Text('row 2', None, ' ')]
    with pytest.raises(UserError, match=r'^row 2: found no token; expected text$'):
        logits_of_texts(found.model, found.tokenizer, texts, None, None)

"""Where dhrd predict finds its texts, and which it refuses."""

import csv
import io
import json

import pytest
import torch
from configs import TASK
from tiny import LABELS, tiny_classifier, tiny_tokenizer, triplet
from transformers import GPT2Config, GPT2ForSequenceClassification

from dhrd_plugin.errors import UserError
from dhrd_plugin.evaluate import main as evaluate
from dhrd_plugin.export.load import open_classifier
from dhrd_plugin.export.write import write_slim
from dhrd_plugin.predict import main, predict

pytestmark = pytest.mark.usefixtures('one_thread')

TEXTS = ['w1 w2 w3', 'a scraped\u2028text\x85in\x0bfour\x1chalves', 'w9']
ROWS = [{'id': str(i), 'input_text': text} for i, text in enumerate(TEXTS)]


@pytest.fixture(scope='module')
def slim(tmp_path_factory):
    model = tiny_classifier(head='linear')
    model.info['task'] = {**TASK, 'prompt': '{left} {right}'}
    return write_slim(model.get_metadata(), model.network.state_dict(), tmp_path_factory.mktemp('predict') / 'slim')


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
    return [json.loads(line) for line in out.splitlines()]


@pytest.fixture
def expected(slim, capsys):
    return printed(capsys, slim, *TEXTS)


def jsonl(rows, end='\n'):
    return ''.join(json.dumps(row, ensure_ascii=False) + end for row in rows).encode()


def csv_of(rows):
    out = io.StringIO(newline='')
    writer = csv.DictWriter(out, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().encode()


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
    ],
)
def test_every_kind_of_file_gives_the_same_texts(slim, tmp_path, capsys, monkeypatch, expected, name, content):
    (tmp_path / name).write_bytes(content)
    assert printed(capsys, slim, '--input', tmp_path / name) == expected
    if name in ('a', 'a.txt'):
        monkeypatch.setattr('sys.stdin', io.TextIOWrapper(io.BytesIO(content)))
        assert printed(capsys, slim) == expected


def test_rows_go_through_the_template(slim, tmp_path, capsys):
    rows = [{'left': 'w1', 'right': 'w2 w3'}, {'left': 'w8 w9', 'right': 'w9'}]
    found = printed(capsys, slim, 'w1 w2 w3', 'w8 w9 w9')
    for name, content in (('a.csv', csv_of(rows)), ('a.jsonl', jsonl(rows)), ('a.txt', jsonl(rows))):
        (tmp_path / name).write_bytes(content)
        assert printed(capsys, slim, '--input', tmp_path / name) == found


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


def test_texts_are_named_by_their_number(slim):
    found = open_classifier(slim)
    with pytest.raises(UserError, match=r'^text 2: found no token; expected text$'):
        predict(found.model, found.tokenizer, ['w1', ' '])

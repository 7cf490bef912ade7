"""A file of one's own: its labels, its cells, its lengths; from a CSV to predictions."""

import csv
import json
import math
import re
import shlex
import shutil
import unicodedata
from collections import Counter
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Sequence, Value
from omegaconf import OmegaConf
from test_documents import block_under
from tiny import byte_tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig

from dhrd_plugin import load_config, train
from dhrd_plugin.cli import main
from dhrd_plugin.data.inspect import read_shards
from dhrd_plugin.data.labels import with_labels
from dhrd_plugin.data.prepare import write_rows
from dhrd_plugin.data.rows import read_rows
from dhrd_plugin.data.tasks import build_labels, load_task, with_found_labels
from dhrd_plugin.data.texts import read_texts, texts_of
from dhrd_plugin.data.triplets import read_triplets
from dhrd_plugin.data.truncate import fit
from dhrd_plugin.errors import UserError
from dhrd_plugin.problem_type import MULTI_LABEL
from dhrd_plugin.training.config import find_yaml

BARE = {'prompt': '{text}', 'label': 'label'}
KINDS = {'billing': 'invoice', 'bug': 'crash', 'access': 'login', 'other': 'hello'}
TICKETS = {
    'prompt': 'Ticket: {my text}\nNotes: {notes}\nTopic:',
    'id': 'ticket id',
    'label': 'topic',
    'rationale': 'why',
    'may_be_empty': ['notes'],
}
LIMIT = 160
FILES = {'train': range(140), 'val': range(140, 180), 'new': range(180, 200)}
LONG = (5, 150, 190)  # one in each file


def write(path, labels, kind='jsonl'):
    """A file of rows with these labels, as the kind spells them."""
    if kind == 'csv':
        lines = ['text,label', *(f'w{i},{label}' for i, label in enumerate(labels))]
    else:
        lines = [json.dumps({'text': f'w{i}', 'label': label}) for i, label in enumerate(labels)]
    path = path / f'rows.{kind}'
    path.write_text('\n'.join(lines) + '\n')
    return path


@pytest.mark.parametrize(
    'kind, labels, values',
    [
        ('jsonl', ['b', 'a', 'b'], ['a', 'b']),
        ('jsonl', [10, 2, None, 2], [2, 10]),
        ('jsonl', [1.0, 0, 0.0], [0, 1]),
        ('jsonl', ['10', '9'], ['9', '10']),
        ('jsonl', [True, False], [False, True]),
        ('csv', ['10', '2', '', '2.0'], [2, 10]),
        ('csv', ['01', '2'], ['01', '2']),
        ('csv', ['1.0', '2.0', '1.0'], [1, 2]),
        ('csv', ['1.0', '2.0', '2.0.1'], ['1.0', '2.0', '2.0.1']),
        ('csv', ['yes', 'no'], ['no', 'yes']),
    ],
)
def test_labels_are_found_in_the_order_of_their_values(tmp_path, kind, labels, values):
    task = with_labels(load_task(BARE), write(tmp_path, labels, kind))
    assert [label.value for label in task.labels] == values
    assert task.label_names == tuple(map(str, values)) and task.answers == {str(v): str(v) for v in values}
    assert load_task(json.loads(json.dumps(task.to_dict()))) == task


@pytest.mark.parametrize(
    'kind, labels, words',
    [
        ('jsonl', ['a', 'a'], 'field label: found the label "a" alone; expected two or more'),
        ('jsonl', [None], 'found no label; expected two or more'),
        ('jsonl', [0.5, 1], 'found 0.5, a number to predict; expected classes'),
        ('csv', ['0.25', '1'], 'found 0.25, a number to predict'),
        ('csv', range(1001), 'found more than 1,000 labels, such as "0", "1", "2"; expected classes'),
        ('jsonl', ['Yes', 'no', 'yes '], 'found "Yes" and "yes "; expected one spelling'),
        ('jsonl', [unicodedata.normalize(form, 'Caf\u00e9') for form in ('NFC', 'NFD')], 'expected one spelling of a'),
        ('csv', ['1', '1.0', 'beta'], 'found "1" and "1.0"; expected one spelling'),
        ('jsonl', [['a'], 'b'], 'line 1, field label: found ["a"]; expected a text, a whole number or true/false'),
        ('jsonl', [' ', 'b'], 'line 1, field label: is empty'),
    ],
)
def test_what_are_no_labels_is_told_in_a_line(tmp_path, kind, labels, words):
    with pytest.raises(UserError) as error:
        with_labels(load_task(BARE), write(tmp_path, labels, kind))
    assert words in str(error.value) and '\n' not in str(error.value)


@pytest.mark.parametrize(
    'more, labels, words',
    [
        ({'problem_type': MULTI_LABEL}, [['None'], ['a']], "answer: found 'None'; expected no comma"),
        ({'problem_type': MULTI_LABEL}, [['u, v'], ['a']], "answer: found 'u, v'; expected no comma"),
        ({'metrics': ['f1a']}, ['a', 'b', 'c'], 'metrics: f1a needs two labels'),
    ],
)
def test_labels_that_are_found_are_checked_as_those_that_are_named(tmp_path, more, labels, words):
    named = sorted({name for label in labels for name in ([label] if isinstance(label, str) else label)})
    for find in (
        lambda: load_task({**BARE, **more, 'labels': named}),
        lambda: with_labels(load_task({**BARE, **more}), write(tmp_path, labels)),
        lambda: write_rows([{'text': 'x', 'label': label} for label in labels], tmp_path / 'set', {**BARE, **more}),
        lambda: with_found_labels(load_task({**BARE, **more}), build_labels(named, ''), ''),
    ):
        with pytest.raises(UserError, match=re.escape(words)):
            find()


def test_a_label_that_is_in_no_row_is_told_with_the_nearest(tmp_path):
    with pytest.raises(UserError, match="field lable: is in no row; did you mean 'label'"):
        with_labels(load_task({**BARE, 'label': 'lable'}), write(tmp_path, ['a', 'b']))


@pytest.mark.parametrize('labels, cell', [([0, 1], '1.0'), (['0', '1'], '1.0'), ([0, 1], '1')])
def test_whole_numbers_as_pandas_writes_them(tmp_path, labels, cell):
    task = load_task({**BARE, 'labels': labels})
    assert [row['label'] for row in read_triplets(write(tmp_path, [cell], 'csv'), task)] == ['1']
    if isinstance(labels[0], int):
        assert [row['label'] for row in read_triplets(write(tmp_path, [float(cell)]), task)] == ['1']


@pytest.mark.parametrize('labels', [['1.0', '2.0'], ['1', '1.0'], ['1.0', '1']])
def test_a_class_is_its_own_text_before_it_is_a_whole_number(tmp_path, labels):
    task = load_task({**BARE, 'labels': labels})
    assert [row['label'] for row in read_triplets(write(tmp_path, labels, 'csv'), task)] == labels


@pytest.mark.parametrize('mark', ',;\t|')
@pytest.mark.parametrize('name', ['a.csv', 'a.CSV'])
def test_the_header_tells_what_stands_between_cells(tmp_path, mark, name):
    rows = [['my text', 'x, or y', 'label'], ['a; b, c\td | "e"\nf', '', 'n'], ['g' * 5000, 'h', 'n']]
    with (tmp_path / name).open('w', encoding='utf-8-sig', newline='') as file:
        csv.writer(file, delimiter=mark).writerows(rows)
    found = [row.fields for row in read_rows(tmp_path / name)]
    assert found == [dict(zip(rows[0], (cell or None for cell in row))) for row in rows[1:]]
    bad = []
    list(read_rows(tmp_path / name, bad.append, max_bytes=1000))
    assert [error.where for error in bad] == [f'{tmp_path / name}, line 4']


@pytest.mark.parametrize('mark', ',;\t|')
def test_a_header_of_two_lines_or_behind_an_empty_one(tmp_path, mark):
    for name, text in (('two', f'"my\ntext"{mark}topic\na{mark}b\n'), ('behind', f'\nmy text{mark}topic\na{mark}b\n')):
        path = tmp_path / f'{name}.csv'
        path.write_text(text)
        (row,) = read_rows(path)
        assert list(row.fields.values()) == ['a', 'b'] and list(row.fields)[1] == 'topic'


def text_of(task, row):
    ((_, text, _),) = task.texts(row)
    return text


@pytest.mark.parametrize(
    'row, optional, expected',
    [
        ({'text': 'a', 'note': ''}, True, 'a '),
        ({'text': 'a', 'note': None}, True, 'a '),
        ({'text': 'a', 'note': None}, False, r'field note: is missing \(empty, or null\); may_be_empty: \[note\]'),
        ({'text': 'a', 'note': ' '}, False, r'field note: is empty; may_be_empty: \[note\]'),
        ({'text': 'a'}, True, 'field note: is missing$'),
    ],
)
def test_an_empty_cell_is_no_missing_column(row, optional, expected):
    task = load_task({'prompt': '{text} {note}', 'labels': [0, 1], 'may_be_empty': ['note'] if optional else []})
    if not expected.startswith('field'):
        assert text_of(task, row) == expected
        return
    with pytest.raises(UserError, match=expected):
        text_of(task, row)


EMPTY = {'prompt': 'a {note}', 'labels': [0, 1]}


@pytest.mark.parametrize('value', [None, '', float('nan')])
@pytest.mark.parametrize(
    'more, printed',
    [
        ({}, 'a '),
        ({'prompt': 'a {note:d}'}, 'a '),
        ({'prompt': 'a {note:.1f}'}, 'a '),
        ({'words': {'note': {'1': 'one'}}}, 'a '),
        ({'words': {'note': {'1': 'one', '': 'none'}}}, 'a none'),
    ],
)
def test_an_empty_cell_prints_nothing_in_a_number_and_in_words(value, more, printed):
    assert text_of(load_task({**EMPTY, **more, 'may_be_empty': ['note']}), {'note': value}) == printed
    with pytest.raises(UserError, match=r'field note: (is missing|is empty|found NaN; expected)'):
        text_of(load_task({**EMPTY, **more}), {'note': value})


@pytest.mark.parametrize(
    'year, printed', [('2001', '2001'), ('2001.0', '2001'), ('two', None), ('', None), ('nan', None)]
)
def test_a_number_of_a_file_without_types_is_told_by_its_text(tmp_path, year, printed):
    """So that a template of a frame, where it is a number, reads a CSV file as well."""
    task = load_task({**BARE, 'labels': ['a', 'b'], 'prompt': '{year:d}'})
    (tmp_path / 'a.csv').write_text(f'year,label,more\n{year},a,x\n')
    if printed is None:
        for read in (read_triplets, lambda path, task: read_texts(str(path), task)):
            with pytest.raises(
                UserError, match=r'a\.csv, line 2, field year: (found .*; expected a number|is missing)'
            ):
                list(read(tmp_path / 'a.csv', task))
        return
    frame = pd.DataFrame({'year': [int(printed), None], 'label': ['a', 'b']})[:1]  # floats, because of the gap
    texts = [*read_texts(str(tmp_path / 'a.csv'), task), *texts_of(frame, task), *texts_of([year], task)]
    assert [row['input_text'] for row in read_triplets(tmp_path / 'a.csv', task)] == [printed]
    assert [text.text for text in texts] == [printed] * 3


def test_decimals_of_parquet_are_numbers(tmp_path):
    """In the prompt and as weights."""
    row = {'price': [Decimal('1.50')], 'year': [Decimal(2001)], 'weight': [Decimal('0.25')], 'label': ['a']}
    pq.write_table(pa.table(row), tmp_path / 'a.parquet')
    task = load_task({'prompt': '{price:.2f} in {year:d}', 'labels': ['a', 'b']})
    (found,) = read_triplets(tmp_path / 'a.parquet', task)
    assert (found['input_text'], found['weight']) == ('1.50 in 2001', 0.25)


@pytest.mark.parametrize('field', ['word ' * 30, '\U0001f642 \u05e9\u05dc\u05d5\u05dd ' * 9])
@pytest.mark.parametrize('limit', [20, 21, 22, 23, 24, 40])
def test_a_field_is_cut_and_the_frame_stays(field, limit):
    tokenizer, before, after = byte_tokenizer(), 'Text: ', '\nTopic:'
    text = fit(tokenizer, before + field + after, [len(before), len(before + field)], limit)
    assert limit - 4 < len(tokenizer(text)['input_ids']) <= limit  # whole characters, of up to four bytes
    assert text.startswith(before + field[0]) and text.endswith(after)
    kept = text.removeprefix(before).removesuffix(after)
    assert field.startswith(kept)


@pytest.mark.parametrize('limit', [4, 5, 6])
def test_a_field_is_never_cut_to_nothing(limit):
    """Its one character has three tokens."""
    assert fit(byte_tokenizer(), 'ab\u20accd', [2, 3], limit) == 'ab\u20accd'


def test_what_cannot_be_cut_stays():
    for limit, cuttable in ((5, None), (5, [6, 9]), (None, [6, 9]), (99, [6, 9])):
        assert fit(byte_tokenizer(), 'Text: abc, Topic', cuttable, limit) == 'Text: abc, Topic'


@pytest.mark.parametrize('kind', ['frame', 'dataset', 'rows', 'numbers'])
def test_rows_in_memory(tmp_path, kind):
    rows = {'my text': ['a', 'b', 'c'], 'note': ['x', None, 'y'], 'label': [1, 0, 1], 'why': [None, 'It is.', None]}
    data = {
        'frame': lambda: pd.DataFrame(rows),
        'numbers': lambda: pd.DataFrame(rows | {'label': [1.0, 0.0, 1.0]}),
        'dataset': lambda: Dataset.from_dict(rows),
        'rows': lambda: (dict(zip(rows, row)) for row in zip(*rows.values())),
    }[kind]()
    task = {'prompt': '{my text}: {note}', 'rationale': 'why', 'may_be_empty': ['note']}
    summary = write_rows(data, tmp_path / 'set', task)
    assert summary['label_names'] == ['0', '1'] and summary['labels'] == {'0': 1, '1': 2}
    found = [row for _, rows in read_shards(tmp_path / 'set') for row in rows]
    assert [row['input_text'] for row in found] == ['a: x', 'b: ', 'c: y']
    assert [row['rationale'] for row in found] == [None, 'It is.', None]
    with pytest.raises(UserError, match='row 1, field label: found 7; expected one of 0, 1'):
        write_rows([{'my text': 'a', 'note': '', 'label': 7}], tmp_path / 'other', summary['task'])


NESTED = {'passage': {'q': ['x', 'y']}, 'choices': ['l', 'm'], 'year': 2001, 'label': 'a'}
IN_MEMORY = {
    'columns that are numbers': (pd.DataFrame([['x', 'a'], ['y', 'b']]), {'prompt': '{0}', 'label': '1'}, ['x', 'y']),
    'keys that are numbers': ([{0: 'x', 1: 'a'}], {'prompt': '{0}', 'label': '1'}, ['x']),
    'arrays in cells': (
        pd.DataFrame([{**NESTED, 'passage': {'q': np.array(['x', 'y'], object)}}]),
        {'prompt': '{q}', 'explode': ['q in passage[q]']},
        ['x', 'y'],
    ),
    'an item': (pd.DataFrame([{**NESTED, 'choices': np.array(['l', 'm'])}]), {'prompt': '{choices[1]}'}, ['m']),
    'scalars of NumPy': ([{**NESTED, 'year': np.int64(2001)}], {'prompt': '{year:d}'}, ['2001']),
    'a tuple': ([{**NESTED, 'choices': ('l', 'm')}], {'prompt': '{choices[0]}'}, ['l']),
    'a data set': (Dataset.from_list([NESTED]), {'prompt': '{year:d} {passage[q][0]}'}, ['2001 x']),
    'a missing cell': (
        pd.DataFrame({'text': ['x', 'y'], 'note': [None, float('nan')], 'label': 'a'}),
        {'prompt': '{text}{note}', 'may_be_empty': ['note']},
        ['x', 'y'],
    ),
    'NaN in a cell': (
        [{**NESTED, 'choices': [float('nan'), 'm']}],
        {'prompt': '{choices[0]}'},
        'field choices[0]: is missing',
    ),
    'columns that are alike': (
        pd.DataFrame([['x', 'a', 'z']], columns=['text', 'label', 'text']),
        {'prompt': '{text}'},
        'DataFrame, field text: stands twice among the columns',
    ),
    'keys that are alike': ([{0: 'x', '0': 'y'}], {'prompt': '{0}'}, ' 1, field 0: stands twice'),
}  # fmt: skip


@pytest.mark.parametrize('name', IN_MEMORY)
def test_rows_in_memory_are_read_alike_in_training_and_in_prediction(tmp_path, name):
    rows, task, expected = IN_MEMORY[name]
    task = load_task({'labels': ['a', 'b'], **task})

    def written(rows):
        write_rows(rows, tmp_path / 'set', task)
        return [row['input_text'] for _, rows in read_shards(tmp_path / 'set') for row in rows]

    for read in (written, lambda rows: [text.text for text in texts_of(rows, task)]):
        if isinstance(expected, list):
            assert read(rows) == expected
        else:
            with pytest.raises(UserError, match=re.escape(expected)):
                read(rows)


def test_rows_in_memory_have_ids_that_differ(tmp_path):
    rows = [{'id': 1, 'text': 'x', 'label': 'a'}, {'id': '1', 'text': 'y', 'label': 'b'}]
    with pytest.raises(UserError, match=r"^row 2, field id: found '1' twice, first in row 1$"):
        write_rows(rows, tmp_path / 'set', {**BARE, 'id': 'id'})


CLASSES = ClassLabel(names=['entailment', 'neutral', 'contradiction'])
SEVERAL = {'problem_type': 'multi_label_classification'}


@pytest.mark.parametrize(
    'feature, values, more, labels',
    [
        (CLASSES, [0, 1, 2, -1], {}, {'contradiction': 1, 'entailment': 1, 'neutral': 1, '': 1}),
        (
            CLASSES,
            [0, 2, 0],
            {'labels': ['neutral', 'contradiction', 'entailment']},
            {'neutral': 0, 'contradiction': 1, 'entailment': 2},
        ),
        (CLASSES, [0, 2], {'labels': [2, 1, 0]}, {'2': 1, '1': 0, '0': 1}),
        (CLASSES, [0, 0], {'labels': [{'value': 5, 'name': 'entailment'}, 0]}, {'entailment': 2, '0': 0}),
        (Sequence(CLASSES), [[0], [0, 2], []], SEVERAL, {'contradiction': 1, 'entailment': 2}),
        (
            Sequence(CLASSES),
            [[0], [-1]],
            {**SEVERAL, 'labels': ['neutral', 'entailment']},
            {'neutral': 0, 'entailment': 1, '': 1},
        ),
    ],
)
@pytest.mark.parametrize('where', ['memory', 'hub'])
def test_classes_of_a_data_set_are_told_by_name(tmp_path, monkeypatch, capsys, where, feature, values, more, labels):
    """Where its label is a number that stands for a name, or several; -1 is none."""
    rows = Dataset.from_dict(
        {'text': [f'w{index}' for index in range(len(values))], 'label': values},
        features=Features({'text': Value('string'), 'label': feature}),
    )
    if where == 'memory':
        summary = write_rows(rows, tmp_path / 'set', {**BARE, **more}, labelled=False)
    else:
        monkeypatch.setattr('datasets.config.HF_DATASETS_CACHE', tmp_path / 'cache')
        (tmp_path / 'data').mkdir()
        rows.to_parquet(tmp_path / 'data' / 'train.parquet')
        (tmp_path / 'task.yaml').write_text(json.dumps({**BARE, **more}))
        common = ['--template', str(tmp_path / 'task.yaml'), '--input', f'hub:{tmp_path}/data', '--split', 'train']
        assert main(['prepare', *common, '--unlabelled', '--output', str(tmp_path / 'set')]) == 0, capsys.readouterr()
        summary = json.loads((tmp_path / 'set' / 'triplets.json').read_text())
    assert summary['labels'] == labels and summary['label_names'] == [name for name in labels if name]


def test_labels_of_rows_that_are_set_aside_are_none(tmp_path, capsys):
    """A row is one of them for its text, its id, or another item of it."""
    rows = [{'id': n, 'text': f'w{n}', 'label': 'ab'[n]} for n in range(2)]
    odd = [{'id': 2, 'text': '', 'label': 'junk'}, {'id': 0, 'text': 'w', 'label': 'twice'}]
    odd += [{'id': 3, 'text': 'w', 'label': 'heavy', 'weight': -1}, {'id': 4, 'text': 'w', 'label': ['x']}]
    (tmp_path / 'a.jsonl').write_text('\n'.join(map(json.dumps, rows + odd)))
    (tmp_path / 'task.yaml').write_text(json.dumps({**BARE, 'id': 'id'}))
    common = ['prepare', '--template', str(tmp_path / 'task.yaml'), '--input', str(tmp_path / 'a.jsonl')]
    assert main([*common, '--output', str(tmp_path / 'out'), '--skip-bad', str(tmp_path / 'bad.jsonl')]) == 0
    printed = capsys.readouterr().out
    assert 'labels: a 1 (50%), b 1 (50%)\n' in printed and 'set aside: 4 bad rows' in printed


def test_a_rationale_that_begins_with_none_states_no_label(tmp_path):
    """``none`` is the answer of a row without any of several labels."""
    rows = [{'text': 'w', 'label': [], 'why': 'None of the pages load.'}, {'text': 'w', 'label': [], 'why': 'None.'}]
    (tmp_path / 'a.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    task = {**BARE, **SEVERAL, 'labels': ['a', 'b'], 'rationale': 'why'}
    (tmp_path / 'task.yaml').write_text(json.dumps(task))
    common = ['prepare', '--template', str(tmp_path / 'task.yaml'), '--input', str(tmp_path / 'a.jsonl')]
    assert main([*common, '--output', str(tmp_path / 'out')]) == 0
    assert json.loads((tmp_path / 'out' / 'triplets.json').read_text())['states_label'] == {'rows': 1, 'ids': ['2']}


def test_numbers_in_the_lists_of_a_csv_file_are_labels(tmp_path):
    (tmp_path / 'a.csv').write_text('text,label\nw1,"[2, 10]"\nw2,[2.0]\n')
    task = with_labels(load_task({**BARE, **SEVERAL}), tmp_path / 'a.csv')
    assert [label.value for label in task.labels] == [2, 10]
    assert [row['label'] for row in read_triplets(tmp_path / 'a.csv', task)] == [['2', '10'], ['2']]


def test_prepare_takes_the_labels_of_the_split_train(tmp_path, capsys):
    write(tmp_path, ['10', '9'], 'csv').rename(tmp_path / 'train.csv')
    (tmp_path / 'task.yaml').write_text(json.dumps(BARE))
    common = ['prepare', '--template', str(tmp_path / 'task.yaml'), '--input', str(tmp_path)]
    for labels, status in ((['9', '9'], 0), (['9', '8'], 2)):
        write(tmp_path, labels, 'csv').rename(tmp_path / 'validation.csv')
        assert main([*common, '--output', str(tmp_path / f'out{status}')]) == status
        assert main([*common, '--split', 'validation', '--output', str(tmp_path / f'one{status}')]) == status
    printed = capsys.readouterr()
    assert 'labels: 9 1 (50%), 10 1 (50%)' in printed.out and 'labels: 9 2 (100%), 10 0 (0%)' in printed.out
    assert 'validation.csv, line 3, field label: found "8"; expected one of 9, 10' in printed.err


# ----------------------------------------------------------------------------- from a CSV to predictions


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """200 tickets in three files, and a tiny model that reads bytes."""
    folder = tmp_path_factory.mktemp('own')
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(folder / 'model')
    shape: dict[str, Any] = {'hidden_size': 16, 'intermediate_size': 24, 'num_hidden_layers': 1}
    ends: dict[str, Any] = {'pad_token_id': 256, 'eos_token_id': 256, 'bos_token_id': 256}
    torch.manual_seed(0)
    config = LlamaConfig(**shape, **ends, num_attention_heads=2, vocab_size=len(tokenizer), initializer_range=0.3)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / 'model')
    for name, indices in FILES.items():
        with (folder / f'{name}.csv').open('w', encoding='utf-8-sig', newline='') as file:
            lines = csv.writer(file, delimiter=';')
            lines.writerow(['ticket id', 'my text', 'notes', 'topic', 'why'])
            lines.writerows(map(ticket, indices))
    return folder


def ticket(index):
    topic = list(KINDS)[max(0, index % 6 - 2)]
    text = f'{KINDS[topic]} "{index}", \U0001f642 \u05e9\u05dc\u05d5\u05dd;\nplease'
    text += ' help' * (900 if index in LONG else 0)
    return [f't{index}', text, '' if index % 3 else 'n', topic, f'It speaks of {topic}.' if index % 5 < 3 else '']


def config_of(folder, out, task, **more):
    settings = {
        'output_dir': str(out),
        'task': task,
        'max_seq_len': LIMIT,
        'model': {'pretrained_model_name_or_path': str(folder / 'model'), 'class_weights': 'balanced'},
        'train_loader': {'source': str(folder / 'train.csv'), 'cache_dir': str(out / 'cache')},
        'eval_loaders': {'validation': {'source': str(folder / 'val.csv'), 'cache_dir': str(out / 'cache')}},
        'optimizer': {'name': 'adamw', 'lr': 0.001},
        'algorithms': {'auxiliary_reasoning_loss': {}},
        'callbacks': {'drop_reasoning_head': {'output_dir': '${output_dir}/slim'}},
        'max_duration': '1ep',
        'global_train_batch_size': 8,
        'device': 'cpu',
        'progress_bar': False,
        'log_to_console': False,
        **more,
    }
    out.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(OmegaConf.create(settings), out / 'run.yaml')
    return load_config(out / 'run.yaml')


@pytest.fixture
def workplace(folder, tmp_path, caches, monkeypatch):
    """An empty folder but for the three files."""
    (tmp_path / 'work').mkdir()
    for name in FILES:
        shutil.copy(folder / f'{name}.csv', tmp_path / 'work')
    monkeypatch.chdir(tmp_path / 'work')


def test_from_a_csv_to_predictions_by_the_commands_of_the_readme(folder, workplace, capsys, one_thread):
    """As they stand there, but for the model."""
    commands = block_under('README.md', 'Your own file', 'bash').replace('\\\n', ' ').splitlines()
    assert len(commands) <= 4
    printed = {}
    for program, verb, *words in map(shlex.split, commands):
        model = [f'model.pretrained_model_name_or_path={folder}/model'] if verb == 'train' else []
        assert program == 'dhrd' and main([verb, *words, *model]) == 0, capsys.readouterr().err
        printed[verb] = capsys.readouterr().out

    names, kinds = sorted(KINDS), [ticket(index)[3] for index in FILES['train']]
    shares = ', '.join(f'{name} {kinds.count(name)} ({kinds.count(name) / 140:.0%})' for name in names)
    first, second, third = printed['train'].splitlines()[:3]
    assert first == f'train_loader: 140 rows, 84 with a rationale: {shares}'
    assert re.match(
        r'tokens of the input: 42 at 50%, 44 at 95%, 4,5\d\d at 100%; .* at 512 tokens: 1 inputs cut', second
    )
    assert third.startswith('warning: the rationale states the label in 84 rows: t0, t1, t2, t5')
    summary = json.loads(Path('runs/tickets/summary.json').read_text())
    assert [label['value'] for label in summary['config']['task']['labels']] == names
    assert summary['config']['model']['class_weights'] == [140 / (4 * kinds.count(name)) for name in names]
    slim = Path('runs/tickets/slim')
    assert json.loads((slim / 'config.json').read_text())['id2label'] == {str(i): n for i, n in enumerate(names)}
    assert json.loads((slim / 'tokenizer_config.json').read_text())['model_max_length'] == 512
    reached = summary['metrics']['validation']['MulticlassAccuracy']
    assert printed['evaluate'].startswith(f'accuracy           {reached:.4f}\n')
    for name, count in Counter(ticket(index)[3] for index in FILES['val']).items():
        assert re.search(rf'^{name} +\S+ +\S+ +{count} ', printed['evaluate'], re.MULTILINE)

    found = [json.loads(line) for line in printed['predict'].splitlines()]
    assert [row['id'] for row in found] == [ticket(index)[0] for index in FILES['new']]
    assert len({row['label'] for row in found}) > 1
    for row in found:
        assert [*row['probabilities']] == names and sum(row['probabilities'].values()) == pytest.approx(1, abs=1e-3)
        assert row['label'] == max(names, key=row['probabilities'].__getitem__)


def test_from_a_frame_to_predictions_by_the_script_of_the_document(folder, workplace):
    """As it stands there, with a YAML of the same name but for the model."""
    script = block_under('dhrd_plugin/data/README.md', 'From a frame to a classifier')
    assert sum(bool(line.strip()) for line in script.splitlines()) <= 10
    settings = {'base': str(find_yaml('yamls/rte.yaml')), 'model': {'pretrained_model_name_or_path': f'{folder}/model'}}
    Path('yamls').mkdir()
    OmegaConf.save(OmegaConf.create(settings), 'yamls/rte.yaml')
    frames = [pd.read_csv(f'{name}.csv', sep=';') for name in FILES]
    found = {'frame': pd.concat(frames[:2]), 'new': frames[2]}
    exec(compile(script, 'README.md', 'exec'), found)
    summary = json.loads(Path('runs/tickets/summary.json').read_text())
    assert summary['rows'] == 140 and [*summary['metrics']] == ['validation']
    slim, out = Path('runs/tickets/slim'), Path('out.jsonl')
    assert main(['predict', str(slim), '--input', 'new.csv', '--output', str(out)]) == 0
    assert found['labels'] == [json.loads(line)['label'] for line in out.read_text().splitlines()]
    assert len(found['labels']) == 20 and set(found['labels']) <= set(KINDS)


def test_what_is_too_long_is_cut_alike_in_evaluation_and_prediction(folder, tmp_path, capsys):
    """Whether the export or a file gives the task."""
    task = {**TICKETS, 'truncate': 'my text'}
    train(config_of(folder, tmp_path / 'run', task))
    summary = json.loads((tmp_path / 'run' / 'summary.json').read_text())
    slim, data = str(tmp_path / 'run' / 'slim'), str(folder / 'val.csv')
    (tmp_path / 'own.yaml').write_text(json.dumps(task))
    for words in ((), ('--task', str(tmp_path / 'own.yaml'))):
        assert main(['evaluate', slim, data, *words, '--output', str(tmp_path / 'report')]) == 0
    report = json.loads((tmp_path / 'report' / 'report.json').read_text())
    reached = summary['metrics']['validation']['MulticlassAccuracy']
    assert math.isclose(report['metrics']['accuracy'], reached, abs_tol=1e-6)
    capsys.readouterr()
    assert main(['predict', slim, '--input', data]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    told = [json.loads(line) for line in (tmp_path / 'report' / 'predictions.jsonl').read_text().splitlines()]
    assert [line['label'] for line in lines] == [row['prediction'] for row in told]
    for line, row in zip(lines, told, strict=True):
        assert line['probabilities'] == pytest.approx(row['probabilities'], abs=1e-4)


@pytest.mark.parametrize('loader', ['train_loader', 'eval_loaders.validation'])
def test_a_text_too_long_is_told_before_the_first_step(folder, tmp_path, loader):
    short = {'source': write(tmp_path, ['bug', 'other'], 'csv'), 'cache_dir': str(tmp_path / 'cache')}
    task = {**TICKETS, 'labels': list(KINDS)}
    if loader == 'eval_loaders.validation':
        (tmp_path / 'short.csv').write_text('ticket id,my text,notes,topic\n1,a,,bug\n')
        more = {'train_loader': {**short, 'source': str(tmp_path / 'short.csv')}}
    else:
        more = {}
    config = config_of(folder, tmp_path / 'run', task, global_train_batch_size=1, **more)
    config.model.class_weights = None
    rows, first = (40, 't150') if more else (140, 't5')
    with pytest.raises(UserError) as error:
        train(config)
    assert f'{loader}: row {first}: input_text: found ' in str(error.value)
    assert f'which 1 of {rows} inputs are longer than' in str(error.value) and 'truncate: FIELD' in str(error.value)


def test_an_evaluation_row_of_another_label_is_named(folder, tmp_path):
    (tmp_path / 'odd.csv').write_text('ticket id,my text,notes,topic\n1,a,,bug\n2,b,,sales\n')
    loader = {'odd': {'source': str(tmp_path / 'odd.csv'), 'cache_dir': str(tmp_path / 'cache')}}
    with pytest.raises(
        UserError, match=r'odd\.csv, line 3, field topic: found "sales"; expected one of "access", "bill'
    ):
        train(config_of(folder, tmp_path / 'run', TICKETS, eval_loaders=loader))


def test_shards_bring_their_labels(folder, tmp_path):
    write_rows(pd.read_csv(folder / 'train.csv', sep=';'), tmp_path / 'set', {**TICKETS, 'truncate': 'my text'})
    loader = {'local': str(tmp_path / 'set')}
    trainer = train(config_of(folder, tmp_path / 'run', TICKETS, train_loader=loader, eval_loaders={}))
    assert trainer.state.model.label_names == sorted(KINDS)


@pytest.mark.parametrize('weights', [{'repeat': 4}, {'proportion': 0.5}, {'choose': 7}])
def test_balanced_weights_are_not_for_a_mixture_of_sets(folder, tmp_path, weights):
    write_rows(pd.read_csv(folder / 'train.csv', sep=';'), tmp_path / 'set', {**TICKETS, 'truncate': 'my text'})
    loader = {'streams': {name: {'local': str(tmp_path / 'set'), **weights} for name in 'ab'}}
    with pytest.raises(UserError, match=f'class_weights: balanced: found with {next(iter(weights))} of a stream'):
        train(config_of(folder, tmp_path / 'run', TICKETS, train_loader=loader, eval_loaders={}))


def test_balanced_needs_a_row_of_every_label(folder, tmp_path):
    task = {**TICKETS, 'truncate': 'my text', 'labels': [*KINDS, 'sales']}
    with pytest.raises(UserError, match="class_weights: balanced: found no training row of the label 'sales'"):
        train(config_of(folder, tmp_path / 'run', task))

"""Reading rows of every kind, the join, the controls."""

import csv
import io
import itertools
import json
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from real import COUNTS, CREAK

from dhrd_plugin.data.controls import CONTROLS, apply_control
from dhrd_plugin.data.csv_lines import CsvLines
from dhrd_plugin.data.lengths import describe_changed
from dhrd_plugin.data.rows import read_rows, source_file
from dhrd_plugin.data.shards import cached_shards
from dhrd_plugin.data.tasks import load_task
from dhrd_plugin.data.texts import read_texts
from dhrd_plugin.data.triplet import BadRow, fingerprint
from dhrd_plugin.data.triplets import join_rationales, read_triplets
from dhrd_plugin.errors import UserError

RTE = load_task('rte')
ROWS = [
    {'idx': 0, 'premise': 'It rains.', 'hypothesis': 'It is "wet",\nno?', 'label': 'entailment'},
    {'idx': 1, 'premise': 'Ünïcode 😀', 'hypothesis': 'It is dry.', 'label': 'not_entailment'},
]


def write_jsonl(path, rows):
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows), 'utf-8')
    return path


def triplet(ident, rationale='r', answer='a'):
    return {
        'id': str(ident),
        'input_text': 'x',
        'label': answer,
        'answer': answer,
        'rationale': rationale,
        'weight': 1.0,
        'group': '',
    }


# ------------------------------------------------------------------------------------------------
# Real data


@pytest.mark.parametrize(('name', 'split'), [(name, split) for name in COUNTS for split in COUNTS[name]])
def test_superglue_has_the_papers_row_counts(shared, name, split):
    rows = list(
        read_triplets(shared / 'superglue' / name, load_task(name.lower()), split=split, labelled=split != 'test')
    )
    assert len(rows) == COUNTS[name][split]
    assert all(row['label'] for row in rows) == (split != 'test')


def test_every_rationale_of_rte_joins(shared):
    report = {}
    rationales = shared / 'rationales' / 'rte_train.jsonl'
    rows = list(read_triplets(shared / 'superglue' / 'RTE', RTE, rationales, 'train', report=report))
    assert report == {
        'rationales': 2490,
        'joined': 2490,
        'replaced': 0,
        'changed': 0,
        'unmatched': 0,
        'rows_without': 0,
    }
    assert all(row['rationale'] for row in rows)


def test_creak_is_a_template_alone(shared, tmp_path):
    (tmp_path / 'creak.yaml').write_text(CREAK)
    rows = list(read_triplets(shared / 'creak' / 'train.json', load_task(tmp_path / 'creak.yaml')))
    assert len(rows) == 10176 and sum(row['label'] == 'true' for row in rows) == 5088
    assert rows[0]['rationale'].startswith('The rock group')


def test_the_sample_reads_as_rte_with_its_own_rationales(sample):
    rows = list(read_triplets(sample, RTE, split='train'))
    assert len(rows) == 750 and all(row['rationale'] for row in rows)


def test_the_sample_has_a_name_in_every_folder(sample, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = list(read_triplets('sample/validation.jsonl', RTE))
    assert rows == list(read_triplets(sample / 'validation.jsonl', RTE))
    assert [text.text for text in read_texts('sample/validation.jsonl', RTE)] == [row['input_text'] for row in rows]
    (tmp_path / 'sample').mkdir()
    (own,) = read_triplets(write_jsonl(Path('sample/validation.jsonl'), ROWS[:1]), RTE)
    assert own['input_text'] != rows[0]['input_text']


# ------------------------------------------------------------------------------------------------
# Kinds of files


@pytest.mark.parametrize('kind', ['jsonl', 'jsonl with mark', 'lines in json', 'array', 'csv', 'parquet'])
def test_every_kind_of_file_gives_the_same_triplets(tmp_path, kind):
    path = tmp_path / {'csv': 'a.csv', 'parquet': 'a.parquet', 'array': 'a.json', 'lines in json': 'a.json'}.get(
        kind, 'a.jsonl'
    )
    if kind == 'parquet':
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    elif kind == 'csv':
        with path.open('w', encoding='utf-8-sig', newline='') as file:
            writer = csv.DictWriter(file, ROWS[0])
            writer.writeheader()
            writer.writerows(ROWS)
    elif kind == 'array':
        path.write_text(json.dumps(ROWS, indent=1, ensure_ascii=False), 'utf-8')
    else:
        write_jsonl(path, ROWS)
    if kind == 'jsonl with mark':
        path.write_bytes(b'\xef\xbb\xbf' + path.read_bytes().replace(b'\n', b'\r\n\r\n'))
    rows = list(read_triplets(path, RTE))
    assert [row['id'] for row in rows] == ['0', '1']
    assert rows == [next(RTE.triplets(row)) for row in ROWS]


def test_csv_cells_have_no_types(tmp_path):
    path = tmp_path / 'a.csv'
    path.write_text('a,label,rationale,weight\nx,true,,2.5\ny,False,why,\n')
    task = load_task({'name': 'x', 'prompt': '{a}', 'labels': [False, True]})
    first, second = read_triplets(path, task)
    assert (first['label'], first['rationale'], first['weight']) == ('True', None, 2.5)
    assert (second['label'], second['rationale'], second['id']) == ('False', 'why', '2')


def test_jsonl_streams_in_constant_memory(tmp_path):
    def peak(count):
        with (tmp_path / 'big.jsonl').open('w') as file:
            for index in range(count):
                file.write(json.dumps({**ROWS[0], 'idx': index, 'premise': 'p' * 200}) + '\n')
        write_jsonl(tmp_path / 'r.jsonl', [{'idx': index, 'rationale': 'r' * 200} for index in range(count)])
        tracemalloc.start()
        for _ in read_triplets(tmp_path / 'big.jsonl', RTE, tmp_path / 'r.jsonl'):
            pass
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    peak(100)  # what is made once
    assert peak(20_000) < peak(2_000) + 500_000  # the files differ by 9 MB


def test_an_endless_line_does_not_fill_the_memory(tmp_path):
    path = tmp_path / 'a.jsonl'
    path.write_text('{"premise": "' + 'x' * 20_000_000 + '"}\n' + json.dumps(ROWS[1]) + '\n')
    bad = []
    tracemalloc.start()
    rows = list(read_triplets(path, RTE, on_bad=bad.append))
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert [row['id'] for row in rows] == ['1'] and len(bad) == 1 and most < 10_000_000


def test_folders_and_splits(tmp_path):
    write_jsonl(tmp_path / 'train.jsonl', ROWS)
    write_jsonl(tmp_path / 'val.jsonl', ROWS)
    assert source_file(tmp_path, 'validation') == source_file(tmp_path, 'val') == tmp_path / 'val.jsonl'
    for split, message in [
        (None, r'name a split \(here: train, validation\)'),
        ('test', "has no split 'test'"),
        ('tain', "unknown split 'tain'"),
    ]:
        with pytest.raises(UserError, match=message):
            source_file(tmp_path, split)
    (tmp_path / 'dev.csv').touch()
    with pytest.raises(UserError, match=r'ambiguous: dev.csv, val.jsonl'):
        source_file(tmp_path, 'val')
    with pytest.raises(UserError, match='is one file'):
        source_file(tmp_path / 'train.jsonl', 'train')
    with pytest.raises(UserError, match='no such file or folder'):
        source_file(tmp_path / 'none')
    (tmp_path / 'a.txt').touch()
    with pytest.raises(UserError, match=r"unknown kind of file '.txt'"):
        list(read_rows(tmp_path / 'a.txt'))


# ------------------------------------------------------------------------------------------------
# The hub, by a local stand-in of the same schema


def hub_folder(path, config, features, rows):
    """A data set repository as the hub holds it: Parquet under a README that lists the configs."""
    from datasets import Dataset, Features

    (path / config).mkdir(parents=True)
    for split in rows:
        Dataset.from_list(rows[split], Features(features)).to_parquet(path / config / f'{split}-00000-of-00001.parquet')
    files = ''.join(f'  - {{split: {split}, path: {config}/{split}-*}}\n' for split in rows)
    (path / 'README.md').write_text(f'---\nconfigs:\n- config_name: {config}\n  data_files:\n{files}---\n')


@pytest.fixture
def hub(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', tmp_path / 'cache')
    return tmp_path / 'super_glue'


def test_hub_rows_with_class_numbers(hub):
    from datasets import ClassLabel, Value

    text, number = Value('string'), Value('int32')
    features = {'premise': text, 'hypothesis': text, 'idx': number, 'label': ClassLabel(names=list(RTE.label_names))}
    rows = {'train': [{**ROWS[0], 'label': 0}, {**ROWS[1], 'label': 1}], 'test': [{**ROWS[0], 'label': -1}]}
    hub_folder(hub, 'rte', features, rows)
    assert list(read_triplets(f'hub:{hub}', RTE, split='train')) == [next(RTE.triplets(row)) for row in ROWS]
    assert [row['label'] for row in read_triplets(f'hub:{hub}:rte', RTE, split='test', labelled=False)] == ['']
    with pytest.raises(BadRow, match='row 1, field label: is missing'):
        list(read_triplets(f'hub:{hub}', RTE, split='test'))
    with pytest.raises(UserError, match=r"cannot load .*split 'validation'"):
        list(read_triplets(f'hub:{hub}', RTE, split='val'))
    with pytest.raises(UserError, match='name a split'):
        list(read_triplets(f'hub:{hub}', RTE))


def test_the_cache_of_a_hub_set_is_named_by_its_rows(hub, tmp_path):
    from datasets import ClassLabel, Value
    from streaming import LocalDataset

    features = {
        'premise': Value('string'),
        'hypothesis': Value('string'),
        'idx': Value('int32'),
        'label': ClassLabel(names=list(RTE.label_names)),
    }
    hub_folder(hub, 'rte', features, {'train': [{**ROWS[0], 'label': 0}], 'validation': [{**ROWS[1], 'label': 1}]})
    folders = [cached_shards(f'hub:{hub}', RTE, split=split, cache_dir=tmp_path) for split in ('train', 'val', 'train')]
    assert folders[0] == folders[2] != folders[1]
    assert [row['id'] for row in LocalDataset(str(folders[1]))] == ['1']


def test_hub_rows_of_multirc_are_flat(hub):
    from datasets import ClassLabel, Value

    text, number = Value('string'), Value('int32')
    features = {
        'paragraph': text,
        'question': text,
        'answer': text,
        'label': ClassLabel(names=['False', 'True']),
        'idx': {'paragraph': number, 'question': number, 'answer': number},
    }
    row = {
        'paragraph': 'P',
        'question': 'Q',
        'answer': 'A',
        'label': 1,
        'idx': {'paragraph': 7, 'question': 9, 'answer': 4},
    }
    hub_folder(hub, 'multirc', features, {'train': [row]})
    (found,) = read_triplets(f'hub:{hub}', load_task('multirc'), split='train')
    assert (found['id'], found['group'], found['label'], found['answer']) == ('7-9-4', '7-9', 'True', 'Yes')


# ------------------------------------------------------------------------------------------------
# Bad rows

GOOD = json.dumps(ROWS[1]).encode() + b'\n'
BAD_LINES = {
    'missing field': (b'{"idx": 0, "premise": "a", "label": "entailment"}', 'field hypothesis: is missing'),
    'label outside': (
        json.dumps({**ROWS[0], 'label': 'maybe'}).encode(),
        'field label: found "maybe"; expected one of',
    ),
    'number': (json.dumps({**ROWS[0], 'premise': 7}).encode(), 'field premise: found 7; expected text'),
    'empty text': (json.dumps({**ROWS[0], 'premise': ''}).encode(), 'field premise: is empty'),
    'invalid UTF-8': (
        b'{"idx": 0, "premise": "\xff", "hypothesis": "h", "label": "entailment"}',
        'field premise: is not valid UTF-8',
    ),
    '5 MB': (json.dumps({**ROWS[0], 'premise': 'x' * 5_000_000}).encode(), 'longer than 1,048,576 bytes'),
    'duplicate id': (json.dumps({**ROWS[0], 'idx': 1}).encode(), "field id: found '1' twice, first in .*, line 1"),
    'empty rationale': (json.dumps({**ROWS[0], 'rationale': ''}).encode(), 'field rationale: is empty'),
    'no JSON': (b'{"idx": 0, "premise": }', 'field premise: not valid JSON: Expecting value, column 23'),
    'no object': (b'[1]', r'found \[1\]; expected an object of fields'),
    'too deep': (b'[' * 100_000, 'nested too deeply'),
}


@pytest.mark.parametrize('name', BAD_LINES)
def test_a_bad_line_is_named_or_set_aside(tmp_path, name):
    line, message = BAD_LINES[name]
    path = tmp_path / 'a.jsonl'
    path.write_bytes(GOOD + line + b'\n' + GOOD.replace(b'"idx": 1', b'"idx": 2'))
    with pytest.raises(BadRow, match=f'^{path}, line 2.*{message}') as error:
        list(read_triplets(path, RTE))
    assert len(str(error.value)) < 500 and '\n' not in str(error.value)
    bad = []
    assert [row['id'] for row in read_triplets(path, RTE, on_bad=bad.append)] == ['1', '2']
    assert [str(row) for row in bad] == [str(error.value)]


def test_an_empty_array_has_no_rows(tmp_path):
    (tmp_path / 'a.json').write_text(' [ ]\n')
    assert list(read_rows(tmp_path / 'a.json')) == []


LONG = [
    {'id': '1', 'text': 'short one', 'label': 'no'},
    {'id': '2', 'text': 'contract clause. ' * 12000, 'label': 'yes'},
    {'id': '3', 'text': '\n'.join(f'line {i}, "quoted" text' for i in range(9000)), 'label': 'yes'},
    {'id': '4', 'text': 'short two', 'label': 'yes'},
]


def write_csv(path, rows):
    with path.open('w', encoding='utf-8', newline='') as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.mark.parametrize(('limit', 'kept'), [(1 << 20, '1234'), (210_000, '124'), (131_072, '14'), (90, '14')])
def test_a_long_csv_row_is_read_or_left_out_to_its_end(tmp_path, limit, kept):
    path, bad = write_csv(tmp_path / 'a.csv', LONG), []
    rows = list(read_rows(path, bad.append, limit))
    assert [row.fields for row in rows] == [row for row in LONG if row['id'] in kept]
    left_out = [int(row['id']) for row in LONG if row['id'] not in kept]
    lines = {2: 3, 3: 4}
    reason = f'the row is longer than {limit:,} bytes'
    assert [(error.where, error.reason) for error in bad] == [(f'{path}, line {lines[i]}', reason) for i in left_out]
    assert [row.number for row in rows] == [int(ident) for ident in kept]


@given(
    rows=st.lists(st.lists(st.text('a",\r\né ', max_size=12), min_size=2, max_size=2), max_size=6),
    limit=st.integers(2, 40),
)
def test_csv_rows_are_cut_where_they_end(rows, limit):
    written, ends = io.StringIO(newline=''), [0]
    for row in rows:
        csv.writer(written, quoting=csv.QUOTE_ALL).writerow(row)
        ends.append(written.tell())
    lengths = [end - start - 2 for start, end in itertools.pairwise(ends)]
    found = list(CsvLines(io.StringIO(written.getvalue(), newline=''), limit))
    assert found == [row if length <= limit else None for row, length in zip(rows, lengths, strict=True)]


def test_an_endless_csv_cell_does_not_fill_the_memory(tmp_path):
    path = tmp_path / 'a.csv'
    path.write_text('a,b\n"' + 'x"",\n' * 4_000_000 + '",1\ny,2\n')
    bad = []
    tracemalloc.start()
    rows = [row.fields for row in read_rows(path, bad.append)]
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert rows == [{'a': 'y', 'b': '2'}] and len(bad) == 1 and most < 10_000_000


def test_suffixes_in_any_case(tmp_path):
    rows = [{'id': '1', 'text': 'w', 'label': 'no'}]
    assert [row.fields for row in read_rows(write_csv(tmp_path / 'train.CSV', rows))] == rows
    assert source_file(tmp_path, 'train') == tmp_path / 'train.CSV'
    task = load_task({'name': 'x', 'prompt': '{text}', 'labels': [False, True]})
    write_csv(tmp_path / 'train.CSV', [{'text': 'w', 'label': 'true'}])
    assert [row['label'] for row in read_triplets(tmp_path, task, split='train')] == ['True']  # cells have no types
    write_jsonl(tmp_path / 'val.JsonL', rows)
    assert [row.fields for row in read_rows(tmp_path / 'val.JsonL')] == rows


def test_nameless_columns_may_be_alike(tmp_path):
    (tmp_path / 'a.csv').write_text('a,b,,\n1,2,,\n')
    assert [row.fields for row in read_rows(tmp_path / 'a.csv')] == [{'a': '1', 'b': '2'}]


def test_a_bad_item_of_an_array_is_left_out_alone(tmp_path):
    path, bad = tmp_path / 'a.json', []
    path.write_text('[{"a": 1}, {"a": 1, "a": 2}, 7, {"a": ' + '9' * 5000 + '}, {"a": {"b": "]"}}]')
    assert [(row.number, row.fields) for row in read_rows(path, bad.append)] == [(1, {'a': 1}), (5, {'a': {'b': ']'}})]
    assert [error.where for error in bad] == [f'{path}, row {number}' for number in (2, 3, 4)]


def test_bad_parquet(tmp_path):
    path = tmp_path / 'a.parquet'
    broken = pa.StringArray.from_buffers(1, pa.py_buffer(b'\0\0\0\0\1\0\0\0'), pa.py_buffer(b'\xff'))
    pq.write_table(pa.table({'good': ['x'], 'text': broken}), path)
    with pytest.raises(BadRow, match='row 1, field text: is not valid UTF-8'):
        list(read_rows(path))


# ------------------------------------------------------------------------------------------------
# The join


def test_join_takes_texts_lists_and_weights(tmp_path):
    path = write_jsonl(
        tmp_path / 'r.jsonl', [{'idx': 0, 'rationale': 'why', 'weight': 3}, {'idx': '1', 'rationale': ['a', 'b']}]
    )
    report = {}
    rows = list(join_rationales([triplet(0, None), triplet(1, 'old'), triplet(2, None)], path, report=report))
    assert [row['rationale'] for row in rows] == ['why', ['a', 'b'], None]
    assert [row['weight'] for row in rows] == [3.0, 1.0, 1.0]
    assert report == {'rationales': 2, 'joined': 2, 'replaced': 1, 'changed': 0, 'unmatched': 0, 'rows_without': 1}


def test_several_rationales_in_a_cell_of_a_csv_file_are_json(tmp_path):
    cells = {'["a", "b"]': ['a', 'b'], '[sic] a': '[sic] a', '["a': '["a', '5': '5'}

    def write(path, cells):
        with path.open('w', newline='') as file:
            writer = csv.DictWriter(file, [*ROWS[0], 'rationale'])
            writer.writeheader()
            writer.writerows({**ROWS[0], 'idx': index, 'rationale': cell} for index, cell in enumerate(cells))
        return path

    path = write(tmp_path / 'a.csv', cells)
    joined = join_rationales([triplet(index, None) for index in range(len(cells))], path, RTE)
    for rows in (read_triplets(path, RTE), joined):
        assert [row['rationale'] for row in rows] == [*cells.values()]
    with pytest.raises(BadRow, match=r'field rationale: found \[\]; expected text'):
        list(read_triplets(write(tmp_path / 'b.csv', ['[]']), RTE))


@pytest.mark.parametrize(
    ('row', 'message'),
    [
        ({'idx': 9, 'rationale': 'x'}, "line 2, field idx: '9' matches no row of the data; 1 of the 2 rationales"),
        ({'idx': 0, 'rationale': 'x'}, "line 2, field id: found '0' twice, first in .*line 1"),
        ({'idx': 1, 'rationale': ''}, 'line 2, field rationale: is empty'),
        ({'idx': 1}, 'line 2, field rationale: is missing'),
        ({'rationale': 'x'}, 'line 2, field idx: is missing'),
        ({'idx': 1, 'rationale': 'x', 'weight': 'much'}, 'line 2, field weight: found "much"; expected a number'),
    ],
)
def test_bad_rationales(tmp_path, row, message):
    path = write_jsonl(tmp_path / 'r.jsonl', [{'idx': 0, 'rationale': 'why'}, row])
    with pytest.raises(BadRow, match=message):
        list(join_rationales([triplet(0), triplet(1)], path))
    bad = []
    rows = list(join_rationales([triplet(0), triplet(1)], path, on_bad=bad.append))
    assert len(rows) == 2 and len(bad) == 1


VOTES = {'entailment': 0.25, 'not_entailment': 0.75}


@pytest.mark.parametrize('value', [[0.25, 0.75], VOTES])
@pytest.mark.parametrize('kind', ['a.jsonl', 'a.csv', 'a.parquet'])
def test_probabilities_in_every_kind_of_file(tmp_path, kind, value):
    """Beside a label, and instead of one."""
    path = tmp_path / kind
    given = [{**ROWS[0], 'probabilities': value}, {**ROWS[1], 'label': None, 'probabilities': value}, ROWS[1]]
    given = [{**row, 'idx': index} for index, row in enumerate(given)]
    if kind == 'a.csv':
        with path.open('w', newline='') as file:
            writer = csv.DictWriter(file, [*ROWS[0], 'probabilities'])
            writer.writeheader()
            writer.writerows([{**row, 'probabilities': json.dumps(row.get('probabilities', ''))} for row in given[:2]])
            writer.writerow(given[2])
    elif kind == 'a.parquet':
        pq.write_table(pa.Table.from_pylist([{'probabilities': None, **row} for row in given]), path)
    else:
        write_jsonl(path, given)
    rows = list(read_triplets(path, RTE))
    assert [row['probabilities'] for row in rows] == [VOTES, VOTES, None]
    assert [row['label'] for row in rows] == ['entailment', '', 'not_entailment']


@pytest.mark.parametrize(
    ('row', 'message'),
    [
        ({'probabilities': [1.0]}, 'probabilities: found 1; expected 2, one for each of entailment, not_entailment'),
        (
            {'probabilities': {'entailment': 1}},
            r'probabilities: found those of \["entailment"\]; expected those of ent',
        ),
        ({'probabilities': {**VOTES, 'x': 0}}, 'probabilities: found those of'),
        ({'probabilities': 0.5}, 'probabilities: found 0.5; expected a number for each class'),
        ({'probabilities': '[0.5, 0.5]'}, r'probabilities: found "\[0.5, 0.5\]"; expected a number for each class'),
        ({'probabilities': [0.5, None]}, 'probabilities.not_entailment: found null; expected a number'),
        ({'probabilities': [1.5, -0.5]}, 'probabilities.not_entailment: found -0.5; expected a finite number, zero'),
        ({'probabilities': [float('nan'), 1]}, 'probabilities.entailment: found nan; expected a finite number'),
        ({'probabilities': [0.5, 0.6]}, 'probabilities: found a sum of 1.1; expected 1'),
        ({'probabilities': [0, 0]}, 'probabilities: found a sum of 0; expected 1'),
        ({'probabilities': None}, 'label: is missing'),
        ({'probabilities': [0, 1], 'rationale': 'r'}, 'rationale: found without a label, in whose answer'),
    ],
)
def test_probabilities_that_make_no_sense_are_refused(tmp_path, row, message):
    row = {**ROWS[1], 'label': None, **row}
    with pytest.raises(BadRow, match=f'^{tmp_path}/a.jsonl, line 2, field {message}'):
        list(read_triplets(write_jsonl(tmp_path / 'a.jsonl', [ROWS[0], row]), RTE))
    # The same of a file that is joined: there by its line, of what it leaves undone by the row.
    ours, theirs = {**row, 'probabilities': None, 'rationale': None}, {k: v for k, v in row.items() if v is not None}
    data = write_jsonl(tmp_path / 'data.jsonl', [ROWS[0], ours])
    why = write_jsonl(tmp_path / 'why.jsonl', [{'idx': 0, 'rationale': 'r'}, {**theirs, 'idx': 1}])
    message = message if 'label' not in message else 'rationale: is missing' if 'rationale' not in row else message
    with pytest.raises(BadRow, match=f'(why.jsonl, line 2|data.jsonl, row 1), field {message}'):
        list(read_triplets(data, RTE, why))


def test_votes_join_beside_rationales_and_instead_of_them(tmp_path):
    data = write_jsonl(tmp_path / 'a.jsonl', [ROWS[0], {**ROWS[1], 'label': None}, {**ROWS[0], 'idx': 2}])
    votes = [
        {'idx': 0, 'rationale': ['r'], 'probabilities': VOTES},
        {'idx': 1, 'rationale': None, 'probabilities': VOTES},
    ]
    report = {}
    rows = list(read_triplets(data, RTE, write_jsonl(tmp_path / 'v.jsonl', votes), report=report))
    assert [(row['label'], row['rationale'], row['probabilities']) for row in rows] == [
        ('entailment', ['r'], VOTES),
        ('', None, VOTES),
        ('entailment', None, None),
    ]
    assert report == {'rationales': 2, 'joined': 2, 'replaced': 0, 'changed': 0, 'unmatched': 0, 'rows_without': 2}


def test_a_row_that_the_join_leaves_without_a_label_is_refused(tmp_path):
    data = write_jsonl(tmp_path / 'a.jsonl', [ROWS[0], {**ROWS[1], 'label': None}])
    votes = write_jsonl(tmp_path / 'v.jsonl', [{'idx': 0, 'probabilities': [0.5, 0.5]}])
    with pytest.raises(BadRow, match=f'^{data}, row 1, field label: is missing$'):
        list(read_triplets(data, RTE, votes))
    assert len(list(read_triplets(data, RTE, votes, labelled=False))) == 2


def test_a_rationale_stands_where_the_template_says(tmp_path):
    task = load_task({
        'name': 'choice',
        'prompt': '{question[stem]}',
        'id': 'id',
        'label': 'key',
        'labels': ['A', 'B'],
        'rationale': 'explanation[open-ended]',
    })  # fmt: skip
    rows = [{'id': f'q{i}', 'key': 'AB'[i], 'question': {'stem': f's{i}'}} for i in range(2)]
    data = write_jsonl(tmp_path / 'a.jsonl', rows)
    theirs = [{'id': f'q{i}', 'explanation': {'open-ended': f'r{i}', 'selected': 'x'}} for i in range(2)]
    for why in (theirs, [{'idx': f'q{i}', 'rationale': f'r{i}'} for i in range(2)]):
        report = {}
        joined = list(read_triplets(data, task, write_jsonl(tmp_path / 'why.jsonl', why), report=report))
        assert [row['rationale'] for row in joined] == ['r0', 'r1'] and report['joined'] == 2


def test_a_rationale_is_found_by_an_id_of_several_fields(tmp_path):
    task = load_task({'name': 'x', 'prompt': '{text}', 'id': '{doc[name]}-{n}', 'labels': ['A', 'B']})
    row = {'doc': {'name': 'd'}, 'n': 3, 'text': 't', 'label': 'A'}
    data = write_jsonl(tmp_path / 'a.jsonl', [row])
    for why in ({'doc': {'name': 'd'}, 'n': 3, 'rationale': 'r'}, {'id': 'd-3', 'rationale': 'r'}):
        (found,) = read_triplets(data, task, write_jsonl(tmp_path / 'why.jsonl', [why]))
        assert found['rationale'] == 'r'


@pytest.mark.parametrize('names', [['id'], ['idx'], ['idx', 'id']])
def test_ids_that_the_template_does_not_name_are_no_numbers_of_rows(tmp_path, names):
    bare = {'name': 'x', 'prompt': '{text}', 'labels': ['A', 'B']}
    rows = [{'id': i, 'text': f't{i}', 'label': 'A'} for i in range(3)]
    data, why = (tmp_path / name for name in ('a.jsonl', 'why.jsonl'))
    write_jsonl(data, rows)
    write_jsonl(why, [{**dict.fromkeys(names, i), 'rationale': f'r{i}'} for i in (1, 2)])
    found = 'one' if 'id' in names else 'a field id'
    with pytest.raises(
        UserError, match=f'^{why}: field .*: {data} has {found} too, which .* expected id: id in the te'
    ):
        read_triplets(data, load_task(bare), why)
    named = read_triplets(data, load_task({**bare, 'id': 'id'}), why)
    assert [row['rationale'] for row in named] == [None, 'r1', 'r2']
    for row in rows:
        del row['id']
    write_jsonl(data, rows)
    numbered = read_triplets(data, load_task(bare), why)
    assert [row['rationale'] for row in numbered] == ['r1', 'r2', None]


def test_rationales_of_another_state_of_the_data_are_counted(tmp_path):
    """Where the template names no id, a row that is put in before moves all the others."""
    task = load_task({'name': 'x', 'prompt': '{text}', 'labels': ['A', 'B']})
    rows = [{'text': f't{i}', 'label': 'AB'[i % 2]} for i in range(4)]
    data = write_jsonl(tmp_path / 'a.jsonl', rows)
    made = [{'idx': row['id'], 'rationale': 'r', 'input': fingerprint(row)} for row in read_triplets(data, task)]
    made[2] |= {'votes': 3, 'asked': 4, 'input': fingerprint({**rows[2], 'input_text': 't2', 'answer': 'A'}, 4)}
    made[3] |= {'votes': 3}  # of these the file does not say how many were asked for
    why = write_jsonl(tmp_path / 'why.jsonl', made)
    for more, expected in ([], 0), ([{'text': 'new', 'label': 'A'}], 3):
        report = {}
        write_jsonl(data, [*more, *rows])
        assert len(list(read_triplets(data, task, why, report=report))) == 4 + len(more)
        assert (report['joined'], report['changed']) == (4, expected)
    told = describe_changed({'joined': report})
    assert told.startswith('3 of 4 rationales were written for another text or answer') and not describe_changed({})


@pytest.mark.parametrize('rationales', [[], [{'idx': 8, 'rationale': 'x'}, {'idx': 9, 'rationale': 'x'}]])
def test_a_join_of_none_is_an_error(tmp_path, rationales):
    path = write_jsonl(tmp_path / 'r.jsonl', rationales)
    message = 'none of its 2 rationales matches a row: it has ids such as "8", "9"; a row of the data has "0"'
    with pytest.raises(UserError, match=message if rationales else 'r.jsonl: holds no rationale'):
        list(join_rationales([triplet(0, None)], path, on_bad=lambda bad: None))


def test_columns_with_dots(tmp_path):
    path = tmp_path / 'batch.csv'
    path.write_text('HITId,Input.premise,Answer.label,Answer.why\n3A1,It is shut.,yes,One is late.\n')
    for prompt in ('{Input.premise}', '{[Input.premise]}'):
        spec = {'name': 'crowd', 'prompt': prompt, 'labels': ['no', 'yes']}
        task = load_task({**spec, 'id': 'HITId', 'label': 'Answer.label', 'rationale': '[Answer.why]'})
        (found,) = read_triplets(path, task)
        assert (found['input_text'], found['label'], found['rationale']) == ('It is shut.', 'yes', 'One is late.')


def test_columns_with_brackets(tmp_path):
    path = tmp_path / 'scores.csv'
    path.write_text('Text [EN],Topic [1],Reason [EN],Score [1-5]\nIt is shut.,late,One is late.,3\n')
    spec = {'prompt': '{Text [EN]}', 'label': 'Topic [1]', 'labels': ['late', 'lost'], 'rationale': 'Reason [EN]'}
    (found,) = read_triplets(path, load_task({**spec, 'weight': 'Score [1-5]'}))
    expected = ('It is shut.', 'late', 'One is late.', 3.0)
    assert (found['input_text'], found['label'], found['rationale'], found['weight']) == expected


def test_exploded_rows_without_an_id_are_numbered_by_row_and_item(tmp_path):
    task = {'name': 'x', 'prompt': '{text} {r[0]}', 'explode': ['r in reasons'], 'label': 'r[1]', 'labels': ['V', 'I']}
    rows = [{'text': 't', 'reasons': [['a', 'V'], ['b', 'I']]}, {'text': 'u', 'reasons': [['c', 'V']]}]
    path = tmp_path / 'rows.json'
    path.write_text(json.dumps(rows))
    found = [(row['id'], row['input_text']) for row in read_triplets(path, load_task(task))]
    assert found == [('1-1', 't a'), ('1-2', 't b'), ('2-1', 'u c')]


# ------------------------------------------------------------------------------------------------
# Controls


def test_what_the_controls_change():
    rows = [triplet(index, f'r{index}', f'a{index}') for index in range(5)] + [triplet(5, None)]
    result = {control: list(apply_control(rows, control, seed=1)) for control in CONTROLS}
    assert result['ConsistentReasoningLabel'] == rows
    assert [row['rationale'] for row in result['OnlyLabel']] == [''] * 5 + [None]  # the rows that have one, no more
    assert [row['answer'] for row in result['OnlyLabel']] == [row['answer'] for row in rows]
    for row, shuffled in zip(rows[:5], result['ShuffleReasoning'], strict=False):
        assert shuffled['rationale'] != row['rationale'] and shuffled == {**row, 'rationale': shuffled['rationale']}
    for row, shuffled in zip(rows[:5], result['ShuffleReasoningLabel'], strict=False):
        assert shuffled['answer'][1:] == shuffled['rationale'][1:] != row['rationale'][1:]
        assert shuffled['label'] == row['label']
    assert result['ShuffleReasoning'][5] == rows[5]
    assert result['ShuffleTokens'] == rows  # of one word each, or without a rationale


@given(st.lists(st.lists(st.sampled_from('abcdefgh'), min_size=1, max_size=2, unique=True), max_size=30), st.integers())
def test_nobody_meets_a_rationale_of_its_own(texts, seed):
    rows = [triplet(index, several if len(several) > 1 else several[0]) for index, several in enumerate(texts)]
    try:
        shuffled = list(apply_control(rows, 'ShuffleReasoning', seed))
    except UserError as error:
        assert 'share one text' in str(error)
        return
    assert all(set(row['rationale']).isdisjoint(new['rationale']) for row, new in zip(rows, shuffled, strict=True))
    assert sorted(map(str, texts)) == sorted(str(list(row['rationale'])) for row in shuffled)
    assert shuffled == list(apply_control(rows, 'ShuffleReasoning', seed))


@pytest.mark.parametrize('several', [False, True])
def test_words_are_shuffled_by_seed_and_row(several):
    text = ' '.join(f'w{number}' for number in range(12))
    rows = [triplet(index, [text, f'{text} x'] if several else text) for index in range(3)]
    found, other = (list(apply_control(rows, 'ShuffleTokens', seed)) for seed in (1, 2))
    shuffled = [row['rationale'] for row in found + other]
    assert len({str(rationale) for rationale in shuffled} | {str(rows[0]['rationale'])}) == 7
    for new, row in zip(found, rows, strict=True):
        assert new == {**row, 'rationale': new['rationale']}
        pairs = zip(new['rationale'], row['rationale']) if several else [(new['rationale'], row['rationale'])]
        assert all(sorted(one.split()) == sorted(before.split()) for one, before in pairs)
    # Neither the other rows nor their order have a part in it.
    assert list(apply_control(rows[2:], 'ShuffleTokens', 1)) == found[2:]


def test_half_of_one_text_can_be_shuffled_and_more_cannot():
    half = [triplet(index, 'same' if index < 5 else f'r{index}') for index in range(10)]
    assert all(
        row['rationale'] != new['rationale']
        for row, new in zip(half, apply_control(half, 'ShuffleReasoning'), strict=True)
    )
    with pytest.raises(UserError, match='cannot shuffle the rationales: 6 of 11 rows share one text'):
        list(apply_control([*half, triplet(10, 'same')], 'ShuffleReasoning'))
    with pytest.raises(UserError, match="control: unknown 'Shuffle'; did you mean"):
        list(apply_control([], 'Shuffle'))


def test_seeds_differ():
    rows = [triplet(index, f'r{index}') for index in range(20)]
    first, second = (list(apply_control(rows, 'ShuffleReasoning', seed)) for seed in (1, 2))
    assert first != second

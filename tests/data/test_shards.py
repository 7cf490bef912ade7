"""Shards: bytes, atomicity, the cache."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from streaming import LocalDataset, MDSWriter, StreamingDataset
from tiny import tiny_tokenizer

from dhrd_plugin.data.collator import TripletCollator
from dhrd_plugin.data.inspect import inspect_set
from dhrd_plugin.data.shards import cached_shards, check_triplet, encode_triplet, write_triplets
from dhrd_plugin.data.tasks import load_task
from dhrd_plugin.data.texts import read_texts
from dhrd_plugin.data.triplet import COLUMNS
from dhrd_plugin.data.triplets import read_triplets
from dhrd_plugin.errors import UserError
from dhrd_plugin.streams.cache import machine_lock
from dhrd_plugin.streams.dataset import StreamingTripletDataset
from dhrd_plugin.streams.publish import is_whole
from dhrd_plugin.streams.stream import TripletStream

RTE = load_task('rte')
text = st.text(st.characters(exclude_categories=['Cs']), max_size=40)
some_text = text.filter(lambda value: value.strip())
triplets = st.builds(
    dict,
    id=some_text,
    input_text=some_text,
    label=some_text,
    answer=some_text,
    rationale=st.none() | some_text | st.lists(some_text, min_size=1, max_size=3) | st.just(''),
    weight=st.floats(0, 1e300),
    group=text,
    probabilities=st.none() | st.just({'a': 0.25, 'b': 0.75}),
    cuttable=st.none() | st.just([0, 1]),
)


def rows(count, label='entailment'):
    return [
        check_triplet({'id': str(i), 'input_text': f'text {i}', 'label': label, 'rationale': f'r {i}'}, RTE)
        for i in range(count)
    ]


def read(folder):
    data = LocalDataset(str(folder))
    return [data[index] for index in range(len(data))]


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@settings(deadline=None, max_examples=60)
@given(st.lists(triplets, min_size=1, max_size=5, unique_by=lambda row: row['id']))
def test_every_field_comes_back_byte_for_byte(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp('round') / 'set'
    write_triplets(rows, folder)
    assert read(folder) == rows


def test_real_rows_come_back(shared, tmp_path):
    source = shared / 'superglue' / 'RTE'
    rationales = shared / 'rationales' / 'rte_train.jsonl'
    expected = list(read_triplets(source, RTE, rationales, 'train'))
    summary = write_triplets(expected, tmp_path / 'rte', task=RTE)
    assert read(tmp_path / 'rte') == expected
    assert summary['labels'] == {'entailment': 1249, 'not_entailment': 1241}
    assert (summary['rows'], summary['without_rationale']) == (2490, 0)
    assert load_task(json.loads((tmp_path / 'rte' / 'triplets.json').read_text())['task']) == RTE


@pytest.fixture(scope='module')
def bare_writer(tmp_path_factory):
    writer = MDSWriter(columns=COLUMNS, out=str(tmp_path_factory.mktemp('bare') / 'set'))
    yield writer
    writer.finish()


@settings(deadline=None, max_examples=200)
@given(triplets)
def test_a_row_has_the_bytes_that_streaming_gives_it(bare_writer, row):
    assert encode_triplet(row) == bare_writer.encode_sample(row)


@pytest.mark.parametrize(('kind', 'labels'), [('str', ['', 'yes', 'é']), ('json', ['', [], ['a'], ['b', 'é']])])
def test_a_label_of_every_kind_has_the_bytes_that_streaming_gives_it(tmp_path, kind, labels):
    columns = {**COLUMNS, 'label': kind}
    writer = MDSWriter(columns=columns, out=str(tmp_path / 'set'))
    for label in labels:
        row = {**rows(1)[0], 'label': label}
        assert encode_triplet(row, columns) == writer.encode_sample(row)


def test_one_shard_has_the_bytes_of_a_bare_writer(tmp_path):
    write_triplets(rows(100), tmp_path / 'ours')
    with MDSWriter(columns=COLUMNS, out=str(tmp_path / 'bare'), hashes=['sha1', 'xxh64'], size_limit=None) as writer:
        for row in rows(100):
            writer.write(row)
    ours, bare = files(tmp_path / 'ours'), files(tmp_path / 'bare')
    assert ours['shard.00000.mds'] == bare['shard.00000.mds']
    assert json.loads(ours['index.json']) == json.loads(bare['index.json'])


@pytest.mark.parametrize('compression', [None, 'zstd'])
def test_the_bytes_do_not_depend_on_the_workers(tmp_path, compression):
    for workers in (1, 2, 3):
        out = tmp_path / str(workers)
        write_triplets(rows(500), out, size_limit=1000, workers=workers, compression=compression)
    assert len(files(tmp_path / '1')) > 8
    assert files(tmp_path / '1') == files(tmp_path / '2') == files(tmp_path / '3')
    if compression is None:
        assert read(tmp_path / '3') == rows(500)


def test_streaming_reads_them_and_checks_the_hash(tmp_path):
    write_triplets(rows(50), tmp_path / 'set')
    options = {'batch_size': 1, 'shuffle': False, 'validate_hash': 'sha1'}
    with machine_lock():
        data = StreamingDataset(remote=str(tmp_path / 'set'), local=str(tmp_path / 'copy'), **options)
    assert [row['id'] for row in data] == [str(index) for index in range(50)]
    shard = tmp_path / 'set' / 'shard.00000.mds'
    content = bytearray(shard.read_bytes())
    content[-10] ^= 1
    shard.write_bytes(content)
    with machine_lock():
        data = StreamingDataset(remote=str(tmp_path / 'set'), local=str(tmp_path / 'again'), **options)
    with pytest.raises(ValueError, match=r'Checksum failure: .*shard.00000.mds'):
        data[0]


def test_writing_is_nearly_as_fast_as_a_bare_writer(tmp_path):
    many = [{**row, 'input_text': 'w ' * 150, 'rationale': 'r ' * 100} for row in rows(5000)]

    def bare(out):
        with MDSWriter(columns=COLUMNS, out=str(out), hashes=['sha1', 'xxh64']) as writer:
            for row in many:
                writer.write(row)

    def seconds(write):
        start = time.perf_counter()
        write(tmp_path / 'set')
        spent = time.perf_counter() - start
        shutil.rmtree(tmp_path / 'set')
        return spent

    # The best of seven: the machine is not ours alone.
    assert any(seconds(bare) > 0.8 * seconds(lambda out: write_triplets(many, out, task=RTE)) for _ in range(7))


# ------------------------------------------------------------------------------------------------
# Whole or not at all


def test_defaults_are_filled_in(tmp_path):
    write_triplets([{'id': 'a', 'input_text': 'x', 'label': 'not_entailment'}], tmp_path / 'set', task=RTE)
    assert read(tmp_path / 'set') == [
        {
            'id': 'a',
            'input_text': 'x',
            'label': 'not_entailment',
            'answer': 'No',
            'rationale': None,
            'weight': 1.0,
            'group': '',
            'probabilities': None,
            'cuttable': None,
        }
    ]


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'label': 'maybe'}, "triplet '5', field label: found 'maybe'; expected one of entailment, not_entailment"),
        ({'label': None}, 'field label: is missing'),
        ({'label': ''}, 'field label: is empty'),
        ({'id': 5}, 'triplet 5, field id: found 5; expected text'),
        ({'id': '1'}, "triplet 6, field id: found '1' twice, first in triplet 2"),
        ({'input_text': ''}, 'field input_text: is empty'),
        ({'rationale': 3}, 'field rationale: found 3; expected text'),
        ({'rationale': ['']}, r'field rationale\[0\]: is empty'),
        ({'weight': True}, 'field weight: found true; expected a number'),
        ({'rational': 'x'}, 'field rational: is not a field of a triplet; did you mean'),
        ({'answer': 'a\udc80'}, 'field answer: is not valid Unicode'),
        (
            {'probabilities': [1]},
            'field probabilities: found 1; expected 2, one for each of entailment, not_entailment',
        ),
        ({'cuttable': [1, 9]}, r'field cuttable: found \[1, 9\]; expected \[start, end\]'),
        ({'label': '', 'probabilities': [0, 1], 'rationale': 'r'}, 'field rationale: found without a label'),
    ],
)
def test_a_bad_triplet_leaves_the_old_set(tmp_path, change, message):
    write_triplets(rows(3), tmp_path / 'set', task=RTE)
    before = files(tmp_path / 'set')
    bad = [*rows(5), {'id': '5', 'input_text': 'x', 'label': 'entailment', **change}]
    with pytest.raises(UserError, match=message):
        write_triplets(bad, tmp_path / 'set', task=RTE, overwrite=True)
    assert files(tmp_path / 'set') == before
    assert os.listdir(tmp_path) == ['set']


def test_what_are_no_triplets_is_told_in_a_line(tmp_path):
    with pytest.raises(UserError, match=r'^triplets: found "id"; expected mappings \(write_rows takes a DataFrame\)$'):
        write_triplets(pd.DataFrame(rows(3)), tmp_path / 'set')  # pyright: ignore[reportArgumentType]
    assert not os.listdir(tmp_path)


def test_unlabelled_rows_where_they_are_asked_for(tmp_path):
    write_triplets([{'id': 'a', 'input_text': 'x', 'label': ''}], tmp_path / 'set', task=RTE, labelled=False)
    assert [(row['label'], row['answer']) for row in read(tmp_path / 'set')] == [('', '')]


@pytest.mark.parametrize('problem', ['single_label_classification', 'multi_label_classification'])
def test_a_set_of_unlabelled_rows_can_be_read(tmp_path, problem):
    task = load_task({'prompt': '{text}', 'labels': ['a', 'b'], 'problem_type': problem})
    some = ['a'] if task.multi_label else 'a'
    given = [{'id': str(i), 'input_text': 'x', **more} for i, more in enumerate([{}, {'label': None}, {'label': some}])]
    summary = write_triplets(given, tmp_path / 'set', task=task, labelled=False)
    assert (summary['without_target'], summary['labels']) == (2, {'a': 1, 'b': 0, '': 2})
    found = [row['label'] for row in inspect_set(tmp_path / 'set').first]
    assert found == [row['label'] for row in read(tmp_path / 'set')] == ['', '', some]
    (out,) = {text.text for text in read_texts(str(tmp_path / 'set'), None)}
    assert out == 'x'


def test_no_label_is_no_class(tmp_path):
    given = [{'id': '0', 'input_text': 'x'}, {'id': '1', 'input_text': 'x', 'label': 'a'}]
    assert write_triplets(given, tmp_path / 'set', labelled=False)['label_names'] == ['a']


def test_labels_stand_in_the_order_of_the_classes(tmp_path):
    task = load_task({'prompt': '{text}', 'labels': ['b', 'a'], 'problem_type': 'multi_label_classification'})
    write_triplets([{'id': '0', 'input_text': 'x', 'label': ['a', 'b']}], tmp_path / 'set', task=task)
    assert [(row['label'], row['answer']) for row in read(tmp_path / 'set')] == [(['b', 'a'], 'b, a')]


def test_a_row_of_probabilities_needs_no_label(tmp_path):
    told = [{'entailment': 0.25, 'not_entailment': 0.75}, [0.33, 0.66], None]
    given = [{'id': str(i), 'input_text': 'x', 'probabilities': value} for i, value in enumerate(told)]
    given[2]['label'] = 'entailment'
    summary = write_triplets(given, tmp_path / 'set', task=RTE)
    found = [row['probabilities'] for row in read(tmp_path / 'set')]
    assert found == [told[0], pytest.approx({'entailment': 1 / 3, 'not_entailment': 2 / 3}), None]
    assert (summary['with_probabilities'], summary['without_target']) == (2, 0)
    assert summary['labels'] == {'entailment': 1, 'not_entailment': 0, '': 2}
    with pytest.raises(UserError, match="triplet '0', field label: is missing"):
        write_triplets([{'id': '0', 'input_text': 'x', 'probabilities': None}], tmp_path / 'other', task=RTE)


def test_shards_of_an_older_version_are_read_beside_those_of_this_one(tmp_path):
    old = {name: kind for name, kind in COLUMNS.items() if name not in ('cuttable', 'probabilities')}
    with MDSWriter(columns=old, out=str(tmp_path / 'old')) as writer:
        for row in rows(3):
            writer.write({name: row[name] for name in old})
    told = [{**row, 'probabilities': [0.5, 0.5]} for row in rows(2)]
    write_triplets(told, tmp_path / 'new', task=RTE)
    streams = [TripletStream(local=str(tmp_path / name)) for name in ('old', 'new')]
    with machine_lock():
        dataset = StreamingTripletDataset(streams=streams, batch_size=5)
    collate = TripletCollator(tiny_tokenizer(), RTE.label_names)
    batch = collate([dataset[index] for index in range(5)])
    assert batch['label_probabilities'].tolist() == [[0, 0]] * 3 + [[0.5, 0.5]] * 2
    assert [row.get('probabilities') for row in inspect_set(tmp_path / 'old').first] == [None] * 3


def test_what_is_there_is_not_lost(tmp_path):
    out = tmp_path / 'set'
    out.mkdir()
    write_triplets(rows(3), out)  # an empty folder is free
    with pytest.raises(UserError, match='already holds a shard set'):
        write_triplets(rows(4), out)
    write_triplets(rows(4), out, overwrite=True)
    assert len(read(out)) == 4
    (out / 'index.json').unlink()
    with pytest.raises(UserError, match='is not a shard set'):
        write_triplets(rows(4), out, overwrite=True)
    with pytest.raises(UserError, match='triplets: found no row to write'):
        write_triplets([], tmp_path / 'none')
    assert not (tmp_path / 'none').exists()


KILLED = """
import sys, time
from dhrd_plugin.data.shards import write_triplets
def rows():
    for index in range(10_000):
        yield {'id': str(index), 'input_text': 'x' * 100, 'label': 'new'}
        if index == 5_000:
            print('half', flush=True)
            time.sleep(60)
write_triplets(rows(), sys.argv[1], size_limit=1000, overwrite=True, workers=int(sys.argv[2]))
"""


@pytest.mark.parametrize(('sent', 'workers'), [(signal.SIGKILL, 1), (signal.SIGINT, 2)])
def test_a_kill_leaves_the_old_set(tmp_path, sent, workers):
    write_triplets(rows(3), tmp_path / 'set')
    before = files(tmp_path / 'set')
    command = [sys.executable, '-c', KILLED, str(tmp_path / 'set'), str(workers)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True) as process:
        assert process.stdout and process.stdout.readline() == b'half\n'
        os.killpg(process.pid, sent)
        process.wait(120)
    assert files(tmp_path / 'set') == before
    if sent == signal.SIGINT:
        assert os.listdir(tmp_path) == ['set']


# ------------------------------------------------------------------------------------------------
# The cache


def source(tmp_path, count=3):
    lines = [{'idx': i, 'premise': f'p{i}', 'hypothesis': 'h', 'label': 'entailment'} for i in range(count)]
    (tmp_path / 'train.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
    reasons = [{'idx': i, 'rationale': f'r{i}'} for i in range(count)]
    (tmp_path / 'reasons.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in reasons))
    return tmp_path / 'train.jsonl', tmp_path / 'reasons.jsonl'


def test_a_changed_file_is_never_served_stale(tmp_path):
    data, reasons = source(tmp_path)
    cache = tmp_path / 'cache'
    first = cached_shards(data, RTE, reasons, cache_dir=cache)
    assert cached_shards(tmp_path, RTE, reasons, 'train', cache_dir=cache) == first
    assert [row['rationale'] for row in read(first)] == ['r0', 'r1', 'r2']
    assert json.loads((first / 'triplets.json').read_text())['joined']['joined'] == 3

    others = {
        cached_shards(data, RTE, cache_dir=cache),
        cached_shards(data, RTE, reasons, control='OnlyLabel', cache_dir=cache),
        cached_shards(data, RTE, reasons, control='ShuffleReasoning', cache_dir=cache),
        cached_shards(data, RTE, reasons, control='ShuffleReasoning', seed=1, cache_dir=cache),
        cached_shards(data, load_task({**RTE.to_dict(), 'prompt': '{premise}'}), reasons, cache_dir=cache),
    }
    reasons.write_text(reasons.read_text().replace('r1', 'other'))
    changed = cached_shards(data, RTE, reasons, cache_dir=cache)
    data.write_text(data.read_text().replace('p1', 'q1'))
    again = cached_shards(data, RTE, reasons, cache_dir=cache)
    assert len(others | {first, changed, again}) == 8
    assert [row['rationale'] for row in read(changed)] == ['r0', 'other', 'r2']
    assert 'q1' in read(again)[1]['input_text']


def test_the_cache_stands_where_the_environment_says(tmp_path, monkeypatch):
    data, _ = source(tmp_path)
    monkeypatch.setenv('DHRD_CACHE', str(tmp_path / 'mine'))
    assert cached_shards(data, RTE).parent == tmp_path / 'mine' / 'shards'


def test_half_a_set_is_never_taken_for_a_whole(tmp_path):
    data, _ = source(tmp_path)
    folder = cached_shards(data, RTE, cache_dir=tmp_path / 'cache')
    (folder / 'index.json').unlink()
    (folder / 'shard.00000.mds').write_bytes(b'torn')
    assert cached_shards(data, RTE, cache_dir=tmp_path / 'cache') == folder
    assert is_whole(folder) and len(read(folder)) == 3
    assert os.listdir(tmp_path / 'cache') == [folder.name]


def ask(data, cache, queue):
    queue.put(str(cached_shards(data, RTE, cache_dir=cache)))


def test_processes_that_race_agree(tmp_path):
    data, _ = source(tmp_path, 2000)
    context = multiprocessing.get_context('fork')
    queue = context.Queue()
    racers = [context.Process(target=ask, args=(data, tmp_path / 'cache', queue)) for _ in range(4)]
    for racer in racers:
        racer.start()
    folders = {queue.get(timeout=60) for _ in racers}
    for racer in racers:
        racer.join()
    (folder,) = folders
    assert len(read(folder)) == 2000
    assert len(os.listdir(tmp_path / 'cache')) == 1


def test_a_bad_row_leaves_no_cache(tmp_path):
    data, _ = source(tmp_path)
    data.write_text(data.read_text() + '{"idx": 9}\n')
    with pytest.raises(UserError, match=r'line 4, field premise: is missing'):
        cached_shards(data, RTE, cache_dir=tmp_path / 'cache')
    assert list((tmp_path / 'cache').glob('*')) == []


def test_unknown_names_of_options(tmp_path):
    with pytest.raises(UserError, match="compression: unknown 'zip'; expected one of br"):
        write_triplets(rows(1), tmp_path / 'set', compression='zip')
    with pytest.raises(UserError, match="hashes: unknown 'crc'; expected one of "):
        write_triplets(rows(1), tmp_path / 'set', hashes=['crc'])

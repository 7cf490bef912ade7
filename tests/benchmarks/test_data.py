"""The benchmark of data at toy size: the same bytes, every row once, from the server; no time is asserted."""

import time
from collections import Counter
from types import SimpleNamespace

import pytest
from benchmarks import data, fits
from benchmarks.material import build_classifier
from benchmarks.options import Options
from benchmarks.reading import Place, load_bare, load_ours, read_epoch, write_bare
from benchmarks.table import render
from composer import DataSpec
from composer.core import Event
from streaming import LocalDataset
from tiny import LABELS, tiny_tokenizer, triplets
from torch.utils.data import DataLoader

from dhrd_plugin.data.collator import TripletCollator
from dhrd_plugin.data.data_spec import triplet_data_spec
from dhrd_plugin.data.shards import write_triplets
from dhrd_plugin.data.tasks import load_task

pytestmark = pytest.mark.usefixtures('one_thread', 'caches')

ROWS = triplets(24)
COUNTS = Counter(row['id'] for row in ROWS)


@pytest.fixture
def model(model_folder):
    """As the command line names it."""
    return str(model_folder)


@pytest.fixture(params=['disk', 's3'])
def place(request, tmp_path):
    """The rows in several shards, in a folder and on the server."""
    if request.param == 'disk':
        found = Place('disk', str(tmp_path / 'set'))
    else:
        found = Place('S3', f'{request.getfixturevalue("s3").bucket}/read', tmp_path / 'caches')
    write_triplets(ROWS, found.address, size_limit=200, overwrite=True)
    return found


def row_bytes(folder):
    """Of every row, as the shards hold them."""
    return [shard.get_sample_data(i) for shard in LocalDataset(str(folder)).shards for i in range(shard.samples)]


def test_the_bare_writer_writes_the_same_bytes(tmp_path):
    write_triplets(ROWS, tmp_path / 'ours', size_limit=200)
    write_bare(ROWS, tmp_path / 'several', size_limit=1200)
    assert len(list((tmp_path / 'several').glob('shard.*'))) > 1
    assert row_bytes(tmp_path / 'several') == row_bytes(tmp_path / 'ours')
    write_triplets(ROWS, tmp_path / 'whole')
    write_bare(ROWS, tmp_path / 'bare', size_limit=None)
    assert (tmp_path / 'bare' / 'shard.00000.mds').read_bytes() == (tmp_path / 'whole' / 'shard.00000.mds').read_bytes()


@pytest.mark.parametrize('workers', [0, 2])
def test_both_readers_read_every_row_once(place, workers):
    for load in (load_bare, load_ours):
        loader = load(place, 4, workers)
        assert Counter(row['id'] for batch in loader for row in batch) == COUNTS
        assert read_epoch(loader) == len(ROWS)
    assert read_epoch(load_ours(place, 4, workers, TripletCollator(tiny_tokenizer(), LABELS))) == len(ROWS)


def test_rows_of_s3_come_from_the_server(s3, tmp_path):
    place = Place('S3', f'{s3.bucket}/served', tmp_path / 'caches')
    write_triplets(ROWS, place.address, size_limit=200)
    served = {path.name: path.read_bytes() for path in (s3.folder / 'served').glob('*.mds')}
    assert len(served) > 2
    for load in (load_bare, load_ours):
        assert read_epoch(load(place, 4, 0)) == len(ROWS)
    for cache in ('ours/*', 'bare*'):
        (folder,) = place.caches.glob(cache)
        assert {path.name: path.read_bytes() for path in folder.glob('*.mds')} == served


@pytest.fixture
def seconds(monkeypatch):
    """A clock that goes only when it is told to."""
    now = [0.0]
    monkeypatch.setattr(fits, 'time', SimpleNamespace(perf_counter=lambda: now[0]))
    return now


def test_the_clock_tells_waiting_from_work(seconds):
    clock = fits.StepClock()
    for wait, work in [(9, 1), (1, 3), (1, 2), (0, 5), (2, 8)]:
        clock.run_event(Event.BEFORE_DATALOADER, None, None)
        seconds[0] += wait
        clock.run_event(Event.AFTER_DATALOADER, None, None)
        seconds[0] += work
        clock.run_event(Event.BATCH_CHECKPOINT, None, None)
    assert clock.waits == [9, 1, 1, 0, 2]
    assert clock.steps == [10, 4, 3, 5, 10]
    assert fits.waited(clock, 1, 2) == [pytest.approx(100 * 2 / 7), pytest.approx(100 * 2 / 15)]
    assert fits.describe_waits(clock, 1) == {'longest': 2000, 'first': 9000}


def test_a_loader_that_dawdles_is_waited_for(model):
    lm, tokenizer = data.load_backbone(Options(model=model))
    classifier = build_classifier(lm, tokenizer, load_task('rte'))
    before = {name: value.clone() for name, value in classifier.named_parameters()}
    collate = TripletCollator(tokenizer, ['entailment', 'not_entailment'])

    def dawdle(rows):
        time.sleep(0.3)
        return collate([{**row, 'label': 'entailment'} for row in rows])

    spec = triplet_data_spec(DataLoader(ROWS, 4, collate_fn=dawdle))
    assert isinstance(spec, DataSpec)
    clock = fits.fit(classifier, spec, 4, 2)
    assert len(clock.waits) == len(clock.steps) == 4
    assert all(0.3 <= wait < step for wait, step in zip(clock.waits, clock.steps))
    assert any((value != before[name]).any() for name, value in classifier.named_parameters())


def test_the_report(monkeypatch, model, s3):
    monkeypatch.setattr(data, 'WORKERS', (1, 2))
    report = data.run(Options(model=model, rows=16, repetitions=1, s3=f'{s3.bucket}/some'))
    rows = {(row['what'], row.get('against')): row for row in report['rows']}
    assert rows['writing, ours', 'bare MDSWriter']['bar'] == '>= 0.8'
    for name in ('disk', 'S3'):
        for workers in ('1 worker', '2 workers'):
            for against in (data.BARE, 'training step'):
                assert rows[f'reading ours, {name}, {workers}', against]['ratio'] > 0
            assert rows[f'step waits for data, {name}, {workers}', None]['bar'] == '<= 1'
    assert rows['step waits for data, disk, 0 workers', None]['median'] > 0
    assert (s3.folder / 'some' / data.SET / 'index.json').is_file()


def test_without_a_server_the_table_says_so(monkeypatch, model):
    monkeypatch.setattr(data, 'WORKERS', ())
    report = data.run(Options(model=model, rows=16, repetitions=1))
    gaps = [row['what'] for row in report['rows'] if row.get('note') == 'not measured: no --s3']
    assert gaps == ['reading, S3', 'waiting, S3']
    assert not any(row['repetitions'] and 'S3' in row['what'] for row in report['rows'])
    assert '| reading, S3' in render(report)

"""The benchmark of scale at toy size: power laws are found, and sizes are those stated."""

import json
import math
import subprocess
from types import SimpleNamespace

import pytest
import torch
from benchmarks import main as benchmark
from benchmarks import rank_step, scale, scale_lengths, scale_rows, scale_vocabulary, steps
from benchmarks.power import exponent, growth_rows
from configs import TASK
from forks import Popen
from streaming import StreamingDataset
from streaming.base.world import World
from tiny import tiny_lm, tiny_tokenizer, triplet, triplets

from dhrd_plugin import write_triplets
from dhrd_plugin.data.tasks import load_task
from dhrd_plugin.errors import UserError

pytestmark = pytest.mark.usefixtures('one_thread', 'caches')


@pytest.mark.parametrize('power', [0.0, 0.5, 1.0, 2.0])
def test_a_power_law_is_found(power):
    sizes = [10, 100, 1000]
    assert exponent(sizes, [7 * size**power for size in sizes]) == pytest.approx(power, abs=1e-9)


def test_each_repetition_has_its_exponent_and_its_ratio():
    costs = {'small': [1.0, 1.0, 2.0], 'large': [10.0, 100.0, 2.0]}
    *rows, last = growth_rows('a thing', 's', costs, 'rows', [1, 10], '1')
    assert [(row['what'], row['ratio'], row['against']) for row in rows] == [
        ('a thing, small', 1.0, 'small'),
        ('a thing, large', 10.0, 'small'),
    ]
    assert (last['what'], last['median']) == ('a thing: exponent over rows', pytest.approx(1.0))
    assert last['spread'] == [pytest.approx(0.5), pytest.approx(1.5)]
    others = {'small': [2.0] * 3, 'large': [5.0] * 3}
    beside = growth_rows('a thing', 's', costs, 'rows', [1, 10], '1', ('that', others))
    assert [(row['ratio'], row['against']) for row in beside[:2]] == [(0.5, 'that'), (2.0, 'that')]


# --------------------------------------------------------------------------------------- rationales


@pytest.mark.parametrize('length', [0, 1, 7, 33])
def test_rationales_are_as_long_as_is_stated(length):
    bench = steps.make_bench(tiny_lm(), tiny_tokenizer(), load_task(TASK))
    rows = [{**triplet(i, 4), 'rationale': text} for i, text in enumerate(('w1 w2 x w3', None))]
    made = scale_lengths.resized(bench, rows, length)
    for row, before in zip(made, rows, strict=True):
        assert len(bench.tokenizer(f' {row["rationale"]}', add_special_tokens=False)['input_ids']) == length
        assert {**row, 'rationale': None} == {**before, 'rationale': None}
    # input, <REASON>, rationale, <ANS>, answer
    assert [len(row.input_ids) for row in bench.encode(made)] == [4 + bool(length) + length + 2] * 2


def test_longer_words_are_left_out_where_they_do_not_fit():
    class Letters:  # a token is a letter
        def __call__(self, text, **kwargs):
            return {'input_ids': list(text.strip())}

    assert scale_lengths._words(Letters(), 'a bcd ef', 7) == 'a bcd ef a'
    assert scale_lengths._words(Letters(), 'a bcd ef', 2) == 'a a'
    with pytest.raises(UserError, match='no word of one token'):
        scale_lengths._words(Letters(), 'bcd ef', 3)


# ---------------------------------------------------------------------------------------- vocabulary


def test_both_losses_have_the_same_gradients(monkeypatch):
    monkeypatch.setattr(scale_vocabulary, 'SUPERVISED', 300)  # more than a chunk
    makes = (scale_vocabulary.ours, scale_vocabulary.full)
    ours, full = (scale_vocabulary.LossWork(loss, 50, 8, torch.device('cpu')) for loss in makes)
    for found, expected in zip(ours(), full(), strict=True):
        torch.testing.assert_close(found, expected)


# --------------------------------------------------------------------------------------------- order


@pytest.mark.parametrize(('rows', 'batch', 'workers'), [(1000, 4, 1), (1001, 8, 3), (64, 1, 1)])
def test_the_order_is_as_large_as_is_said(rows, batch, workers, tmp_path):
    """By the formula of the README's figures on paper."""
    write_triplets(triplets(50), tmp_path / 'set')
    work = scale_rows.order(tmp_path / 'set', World(2, 3, workers, 0), batch, rows)
    assert isinstance(work.args[1], StreamingDataset)
    found = work()
    by_rank = math.ceil(math.ceil(rows / 2) / 3)
    assert found.nbytes == 8 * 6 * math.ceil(by_rank / (workers * batch)) * workers * batch
    assert set(found.flatten().tolist()) - {-1} == set(range(50))


# ---------------------------------------------------------------------------------------------- verb


@pytest.fixture(scope='module')
def ran(tmp_path_factory):
    """The report of the verb at toy size, the command's own, and what the launches of its ranks found."""
    folder, launches = tmp_path_factory.mktemp('scale'), []
    model, out = folder / 'model', folder / 'report.json'
    tiny_lm(tied=True).save_pretrained(model)
    tiny_tokenizer().save_pretrained(model)

    def launch(ranks, spec, folder):
        if ranks == 1:  # here, as it takes a minute where importing is slow
            (folder / 'one.json').write_text(json.dumps({**spec, 'output': str(folder / 'found.json')}))
            rank_step.main(str(folder / 'one.json'))
            found = json.loads((folder / 'found.json').read_text())
        else:
            found = rank_step.launch(ranks, spec, folder)
        launches.append((ranks, found))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('DHRD_CACHE', str(folder / 'caches'))
        patch.setattr(scale, 'launch', launch)
        patch.setattr(subprocess, 'Popen', Popen)  # which forks the ranks
        patch.setattr(scale, 'RANK_STEPS', 2)
        patch.setattr(scale_rows, 'EPOCHS', (10**3, 10**4))
        patch.setattr(scale_lengths, 'LENGTHS', (0, 5, 9))
        patch.setattr(scale_vocabulary, 'VOCABULARIES', (64, 128))
        command = ['scale', '--model', str(model), '--rows', '1600', '--repetitions', '1', '--output', str(out)]
        assert benchmark.main(command) == 0
    return SimpleNamespace(report=json.loads(out.read_text()), launches=launches)


def test_the_verb_measures_everything(ran):
    rows = {row['what']: row for row in ran.report['rows']}
    sizes = ('16 rows', '160 rows', '1,600 rows')
    for what in (
        'writing',
        'on disk',
        'opening, to the first batch',
        'checking all shards',
        'reading 8 rows, collated',
        'resident memory, growth',
    ):
        assert all(rows[f'{what}, {size}']['median'] > 0 for size in sizes)
        assert rows[f'{what}: exponent over rows']['note'].startswith('expected')
    assert rows['on disk: exponent over rows']['median'] == pytest.approx(1, abs=0.1)
    for what, over in (
        ('order of an epoch', 'rows'),
        ('step of 2 rows', 'real tokens'),
        ('reasoning loss of 1,024 tokens', 'words'),
        ('reasoning loss of 1,024 tokens, extra peak memory', 'words'),
    ):
        assert f'{what}: exponent over {over}' in rows
    assert all(f'a real token of it, rationale of {length} tokens' in rows for length in (0, 5, 9))
    assert rows['weak scaling, efficiency at 2 ranks']['median'] > 0
    assert all(row['repetitions'] for row in rows.values())


def test_each_rank_runs_the_same_rows(ran):
    (one, first), (two, second) = ran.launches
    assert (one, two) == (1, 2)
    assert len(first['seconds']) == len(second['seconds']) == 3 and min(first['seconds'] + second['seconds']) > 0
    assert first['rows'] * 2 == second['rows'] == [[2, 2, 2]] * 2
    assert first['tokens'] * 2 == second['tokens']


def test_a_launch_that_fails_leaves_a_gap_with_its_reason(monkeypatch):
    def fail(ranks, spec, folder):
        if ranks == 2:
            raise rank_step.LaunchFailed('RuntimeError: no second GPU')
        return {'seconds': [9.0, 1.0]}

    monkeypatch.setattr(scale, 'launch', fail)
    rows = scale.rank_rows({'rows': [1, 2]}, 1, None)
    assert [(row['what'], row['median']) for row in rows] == [
        ('step, 1 rank of 2 rows', None),
        ('step, 2 ranks of 2 rows', None),
    ]
    assert rows[1]['note'] == 'RuntimeError: no second GPU'


@pytest.mark.parametrize(
    ('said', 'reason'),
    [
        (
            'Traceback\nValueError: one\ntorch.cuda.OutOfMemoryError: two\n---End---\nERROR:composer:Rank 0 crashed\n',
            'torch.cuda.OutOfMemoryError: two',
        ),
        ('error: model: cannot load\nGlobal rank 0 exited\n', 'error: model: cannot load'),
        ('Killed\n', 'exit status 1'),
    ],
)
def test_the_reason_is_the_last_error(said, reason):
    assert rank_step._reason(said, 1) == reason


def test_too_few_rows_are_refused(capsys, model_folder):
    assert benchmark.main(['scale', '--model', str(model_folder), '--rows', '100']) == 2
    # transformers 5 shows bars of the tiny model before.
    assert capsys.readouterr().err.splitlines()[-1] == 'error: rows: found 100; expected 1600 or more'

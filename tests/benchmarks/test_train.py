"""Every way to make a training step makes the same one, and the floor runs the real tokens and no other."""

import json

import pytest
import torch
from benchmarks import main as benchmark
from benchmarks import memory, steps, train
from benchmarks.steps import ThroughComposer
from configs import TASK
from reference import gradients, total_loss
from tiny import LABELS, VOCAB, exact, relative_error, tiny_lm, tiny_tokenizer, triplet

from dhrd_plugin.data.tasks import load_task

pytestmark = pytest.mark.usefixtures('one_thread')

ROWS = [triplet(i, 2 + i % 5, 1 + 2 * (i % 4)) for i in range(8)]


@pytest.fixture(params=['llama', 'gpt2'])
def bench(request):
    """On a tiny random model in fp64."""
    lm = tiny_lm(request.param, tied=True)
    lm.config._attn_implementation = 'sdpa'
    made = steps.make_bench(exact(lm), tiny_tokenizer(), load_task(TASK))
    exact(made.network)
    torch.nn.init.normal_(made.network.classifier.out_proj.weight, std=0.3)
    return made


def stepped_by(bench, work):
    """What a way returns, and the gradients of its last step."""
    found = {}

    def keep(*_):
        for name, weight in bench.network.named_parameters():
            found[name] = torch.zeros_like(weight) if weight.grad is None else weight.grad.clone()

    handle = bench.optimizer.register_step_post_hook(keep)  # Composer makes them in the step
    returned = work()
    handle.remove()
    return returned, found


WAYS = {
    'ours, 1 row at a time': lambda bench: ThroughComposer(bench, ROWS, 1),
    'ours, 2 rows at a time': lambda bench: ThroughComposer(bench, ROWS, 2),
    'ours, all at once': lambda bench: ThroughComposer(bench, ROWS, 8),
    'padding_free': lambda bench: ThroughComposer(bench, ROWS, 4, padding_free=True),
    'bare': lambda bench: steps.bare_loop(bench, ROWS, 2),
    'bare, padding_free': lambda bench: steps.bare_loop(bench, ROWS, 8, padding_free=True),
    'two passes': lambda bench: steps.two_passes(bench, ROWS, 1, length=32),
    'two passes, 3 rows at a time': lambda bench: steps.two_passes(bench, ROWS, 3, length=32),
}
POOLED = {
    'ours': lambda bench: ThroughComposer(bench, ROWS, 2, reasoning=False),
    'padding_free': lambda bench: ThroughComposer(bench, ROWS, 8, padding_free=True, reasoning=False),
    'stock': lambda bench: steps.stock(bench, ROWS),
}


@pytest.mark.parametrize(
    ('make', 'alpha'),
    [
        *(pytest.param(make, 1.0, id=name) for name, make in WAYS.items()),
        *(pytest.param(make, 0.0, id=f'pooled, {name}') for name, make in POOLED.items()),
    ],
)
def test_every_way_makes_the_same_step(bench, make, alpha):
    before = {name: weight.clone() for name, weight in bench.network.named_parameters()}
    loss = total_loss(bench.network, ROWS, VOCAB, LABELS, alpha=alpha)
    expected = gradients(loss, bench.network)
    work = make(bench)
    for _ in range(2):  # as they are repeated, and the weights stay
        found, grads = stepped_by(bench, work)
        assert found == pytest.approx(float(loss), rel=1e-6)  # Composer's losses are fp32
        assert relative_error(grads, expected) < 1e-9
    assert all(torch.equal(weight, before[name]) for name, weight in bench.network.named_parameters())


def test_composer_is_timed_by_its_steps(bench):
    work = ThroughComposer(bench, ROWS + ROWS, 4)
    work(), work()
    assert len(work.clock.steps) == 4 and len(work.seconds) == len(work.around) == 2
    assert sum(work.seconds) == pytest.approx(sum(work.clock.steps)) and min(work.around) > 0


@pytest.mark.parametrize('floor', [steps.floor_by_row, steps.floor_in_one])
def test_the_floor_runs_the_real_tokens_and_no_other(bench, floor, monkeypatch):
    seen = {'tokens': 0, 'products': 0}
    work = floor(bench, ROWS)
    product = steps.product

    def count(head, hidden, targets, **kwargs):
        seen['tokens'] += len(hidden)
        seen['products'] += int((targets >= 0).sum())
        product(head, hidden, targets, chunk=3)

    monkeypatch.setattr(steps, 'product', count)
    _, grads = stepped_by(bench, work)
    rows = bench.encode(ROWS)
    lengths = [len(row.input_ids) for row in rows]
    assert seen == {'tokens': sum(lengths), 'products': sum(lengths) - len(rows)}
    # Back goes what would come of half the logits' squares.
    loss = sum(
        bench.network.causal_lm(torch.tensor([row.input_ids]), use_cache=False).logits[:, :-1].square().sum() / 2
        for row in rows
    )
    expected = gradients(loss, bench.network)
    assert relative_error(grads, expected) < 1e-9


def test_the_ways_to_measure_memory_run_the_same_tokens(bench):
    batch = memory.whole_input(9, len(VOCAB), bench.device)
    ours, full = (loss(bench, batch) for loss in (memory.both_losses, memory.full_losses))
    torch.testing.assert_close(ours, full)
    assert memory.pooled_loss(bench, batch) < ours
    assert (batch['reasoning_labels'][:, 1:] >= 0).sum() == 8 * steps.BATCH


def test_rows_are_spread_over_the_lengths_or_alike():
    lengths = list(range(100))
    rows = [triplet(length) for length in lengths]
    assert sorted(int(row['id']) for row in train.spread(rows, lengths, 4)) == [12, 37, 62, 87]
    assert {int(row['id']) for row in train.similar(rows, lengths, 4)} <= set(range(47, 53))
    assert len(train.spread(rows[:3], lengths[:3], 8)) == len(train.similar(rows[:3], lengths[:3], 8)) == 8


@pytest.mark.parametrize(('microbatch', 'tokens'), [(1, 15), (2, 20), (4, 32)])
def test_padding_is_counted_as_it_is_cut(microbatch, tokens):
    assert train.padded_tokens([8, 1, 4, 2], microbatch) == tokens


def test_the_verb_measures_every_bar(model_folder, tmp_path, monkeypatch, capsys):
    out = tmp_path / 'report.json'
    monkeypatch.setattr(train, 'MICROBATCHES', (2, 8))
    command = ['train', '--model', str(model_folder), '--rows', '8', '--repetitions', '1', '--output', str(out)]
    assert benchmark.main(command) == 0
    report = json.loads(out.read_text())
    bars = [(row['bar'], row.get('against')) for row in report['rows'] if 'bar' in row]
    floor = next(against for bar, against in bars if bar == '<= 1.15')
    assert floor.startswith('floor')
    for layout in ('ours', 'ours, padding_free'):
        assert ('<= 1.05', f'{layout}, bare loop') in bars
    for bar, against, times in (
        ('>= 10', 'two passes at 512', 2),
        ('<= 1.15', floor, 2),
        ('>= 1', 'AutoModel', 2),
        ('>= 1.2', 'AutoModel', 2),
        ('<= 0.25', 'fp32 logits alone', 1),
    ):
        assert bars.count((bar, against)) == times
    assert all(row['median'] is not None for row in report['rows'])
    assert 'real tokens' in capsys.readouterr().out

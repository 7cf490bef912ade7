"""What a run shows: bars on a terminal, plain lines elsewhere, and padding that is counted."""

import fcntl
import json
import os
import pty
import re
import struct
import sys
import termios
from pathlib import Path

import pytest
import torch
from composer import State, Time, Timestamp
from composer.devices import DeviceCPU
from forks import Popen, run_ranks
from runs import BATCH, EPOCH, write_run
from tiny import LABELS, tiny_lm, tiny_tokenizer, triplets

from dhrd_plugin import DualHeadNetwork, TripletCollator, load_config, train
from dhrd_plugin.callbacks.token_counter import count_padding
from dhrd_plugin.models.composer_model import RETURN_REASONING_LOSS
from dhrd_plugin.training.display import find_epoch, share_done, steps_of_fit

pytestmark = pytest.mark.usefixtures('one_thread')

SHOWN = ['log_to_console=null', 'autoresume=false', 'save_folder=null']  # the run of the tests is silent
POOLED = 'algorithms.auxiliary_reasoning_loss=null'
LOSS = r'\d+\.\d{4}'
PACE = r'[\d,]+ tok/s, padding \d+\.\d %'
LEFT = r'\d\d:\d\d left'
BOTH = rf'classification {LOSS}, reasoning {LOSS}, alpha \d\S*'


@pytest.fixture(scope='module')
def yaml(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp('material') / 'run')


@pytest.fixture
def shown(yaml, tmp_path, monkeypatch, capsys):
    """Trains in this process; the lines that it wrote to stderr, and the summary."""
    monkeypatch.chdir(tmp_path)

    def show(*overrides):
        train(load_config(yaml, [*SHOWN, *overrides]))
        summary = json.loads(Path('out/summary.json').read_text())
        return [line for line in capsys.readouterr().err.splitlines() if re.match('(train|eval) ', line)], summary

    return show


@pytest.fixture
def passes(monkeypatch):
    """Notes the tokens that the decoder is given in training, and how many of them are real."""
    found = []
    original = DualHeadNetwork._last_hidden_state

    def note(self, input_ids, attention_mask, extent):
        if self.training:
            found.append((input_ids.numel(), int(attention_mask.sum())))
        return original(self, input_ids, attention_mask, extent)

    monkeypatch.setattr(DualHeadNetwork, '_last_hidden_state', note)
    return found


def match(lines, patterns):
    assert len(lines) == len(patterns), '\n'.join(lines)
    for line, pattern in zip(lines, patterns):
        assert re.fullmatch(pattern, line), f'{line!r} is not {pattern!r}'


# ------------------------------------------------------------------------------------------- padding

MASKS = {'right': [[1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0]], 'left': [[0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 1, 1]]}


@pytest.mark.parametrize(
    ('side', 'pools', 'asked', 'padding_free', 'expected'),
    [
        ('right', [1, 0], True, False, [8, 2]),  # the last two columns are cut
        ('right', [1, 0], False, False, [4, 1]),  # the input spans alone: 2 and 1
        ('left', [4, 3], True, False, [8, 1]),
        ('left', [4, 3], False, False, [6, 2]),
        ('left', [4, 3], True, True, [7, 0]),
        ('right', [1, 0], False, True, [3, 0]),
    ],
)
def test_padding_by_hand(side, pools, asked, padding_free, expected):
    mask = torch.tensor(MASKS[side])
    batch = {'attention_mask': mask, 'pool_index': torch.tensor(pools), 'reasoning_labels': mask}
    batch[RETURN_REASONING_LOSS] = asked
    network = DualHeadNetwork(tiny_lm(), len(LABELS), padding_free=padding_free)
    assert count_padding(batch, network).tolist() == expected


@pytest.mark.parametrize('side', ['right', 'left'])
@pytest.mark.parametrize('asked', [True, False])
@pytest.mark.parametrize('padding_free', [True, False])
def test_padding_is_that_of_the_tokens_that_the_decoder_gets(side, asked, padding_free):
    network = DualHeadNetwork(tiny_lm(), len(LABELS), padding_free=padding_free)
    batch = TripletCollator(tiny_tokenizer(), LABELS, padding_side=side)(triplets())
    batch[RETURN_REASONING_LOSS] = asked
    given = []
    network.backbone.register_forward_pre_hook(
        lambda module, args, kwargs: given.append(kwargs['input_ids'].numel()), with_kwargs=True
    )
    network(*(batch[key] for key in ('input_ids', 'attention_mask', 'pool_index', 'reasoning_labels')), asked)
    run, padding = count_padding(batch, network).tolist()
    assert run == given[0]
    columns = torch.arange(batch['input_ids'].shape[1])
    read = batch['attention_mask'] if asked else batch['attention_mask'] * (columns <= batch['pool_index'][:, None])
    assert run - padding == int(read.sum())


# --------------------------------------------------------------------------------------------- time


@pytest.mark.parametrize(
    ('duration', 'steps', 'epoch', 'done'),
    [
        ('3ep', 60, ('epoch 2/3', 20), 25 / 60),
        ('30ba', 30, ('epoch 2/2', 10), 25 / 30),
        ('200sp', None, ('epoch 2', 20), 100 / 200),
        ('5000tok', None, ('epoch 2', 20), 1000 / 5000),
    ],
)
def test_the_share_of_any_duration(duration, steps, epoch, done):
    state = State(rank_zero_seed=0, run_name='', model=torch.nn.Linear(1, 1), device=DeviceCPU(), max_duration=duration)
    state.set_dataloader(range(EPOCH), 'train')
    now = Timestamp(epoch=1, batch=25, batch_in_epoch=5, sample=100, token=1000)
    assert steps_of_fit(Time.from_timestring(duration), EPOCH) == steps
    assert find_epoch(state, now) == epoch
    assert share_done(state, now) == pytest.approx(done)


# -------------------------------------------------------------------------------------------- lines


def test_a_line_an_interval_and_one_at_the_end(shown, passes):
    """The fit ends within its third epoch; alpha comes to 0 before."""
    lines, summary = shown('console_log_interval=10ba', 'max_duration=45ba')
    evaluation = rf'eval validation: MulticlassAccuracy {LOSS}'
    match(
        lines,
        [
            *(rf'train epoch 1/3 batch {batch}/20: {BOTH}, {PACE}, {LEFT}' for batch in (10, 20)),
            evaluation,
            *(rf'train epoch 2/3 batch {batch}/20: {BOTH}, {PACE}, {LEFT}' for batch in (10,)),
            rf'train epoch 2/3 batch 20/20: classification {LOSS}, alpha 0, {PACE}, {LEFT}',
            evaluation,
            rf'train epoch 3/3 batch 5/5: classification {LOSS}, alpha 0, {PACE}, 00:00 left',
            evaluation,
        ],
    )
    run, real = map(sum, zip(*passes))
    assert summary['padding'] == (run - real) / run > 0
    logged = re.findall(r'dhrd/padding: (\S+)', Path('out/log-rank0.txt').read_text())
    assert float(logged[-1]) == pytest.approx(summary['padding'], abs=1e-4)


def test_a_resumed_run_goes_on(shown):
    """An epoch to its end, and the same from its 13th batch on."""
    same = ['max_duration=1ep', 'algorithms.auxiliary_reasoning_loss.schedule=null']
    saves = [*same, 'save_folder=out/checkpoints', 'save_interval=13ba']
    lines, straight = shown(*saves)
    match(lines, [rf'train epoch 1/1 batch 20/20: {BOTH}, {PACE}, 00:00 left', 'eval .*'])
    going_on = ['load_path=out/checkpoints/ep0-ba13-rank0.pt', 'console_log_interval=5ba', *same]
    lines, summary = shown(*going_on)
    match(lines, [rf'train epoch 1/1 batch {batch}/20: {BOTH}, {PACE}, {LEFT}' for batch in (15, 20)] + ['eval .*'])
    assert summary['padding'] == straight['padding'] > 0


@pytest.mark.parametrize('overrides', [['log_to_console=false'], ['log_to_console=true', 'console_log_interval=1ba']])
def test_no_lines_of_ours_where_they_are_not_wanted(shown, overrides):
    lines, _ = shown('max_duration=2ba', *overrides)
    assert lines == []


def test_two_ranks_through_a_pipe(yaml, tmp_path, root):
    """The pooled baseline: one loss, no alpha; rank 0 speaks, for the rows of both."""
    files = ['--stdout', str(tmp_path / 'rank{rank}.out'), '--stderr', str(tmp_path / 'rank{rank}.err')]
    overrides = [*SHOWN, POOLED, 'max_duration=6ba', 'console_log_interval=3ba', 'progress_bar=true']
    done = run_ranks(2, *files, root / 'tests/runs.py', yaml, *overrides, cwd=tmp_path, env=environment())
    assert '\r' not in done.stdout + done.stderr and '\x1b' not in done.stdout + done.stderr
    shown = [line for line in done.stderr.splitlines() if re.match('(train|eval) ', line)]
    trained = [rf'train epoch 1/1 batch {batch}/6: classification {LOSS}, {PACE}, {LEFT}' for batch in (3, 6)]
    match(shown, [*trained, 'eval validation: .*'])
    lines = done.stdout.splitlines()
    first = next(line for line in lines if line.startswith('tiny: '))
    rows = f'{EPOCH * BATCH} rows, {EPOCH} steps an epoch, 6ba = 6 steps, 2 ranks; pooled baseline'
    assert re.fullmatch(rf'tiny: [\d,]+ parameters, [\d,]+ trained; {rows}, no reasoning loss', first)
    assert {'log: out/log-rank0.txt', 'summary: out/summary.json', 'slim classifier: out/slim'} <= {*lines}
    assert not re.search('train|eval|summary', (tmp_path / 'rank1.out').read_text())
    assert not re.search('^(train|eval) ', (tmp_path / 'rank1.err').read_text(), re.MULTILINE)

    # A rank's batch is one microbatch of two rows, of which only the input is read.
    run = real = 0
    for rank in range(2):
        lengths = [len(line.split()) - 1 for line in (tmp_path / f'rows-rank{rank}.txt').read_text().splitlines()]
        assert len(lengths) == 6 * BATCH // 2
        run += sum(2 * max(pair) for pair in zip(lengths[::2], lengths[1::2]))
        real += sum(lengths)
    summary = json.loads((tmp_path / 'out/summary.json').read_text())
    assert summary['tokens'] == real
    assert summary['padding'] == (run - real) / run > 0


# --------------------------------------------------------------------------------------------- bars


def test_bars_on_a_terminal(yaml, tmp_path, root):
    master, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack('HHHH', 40, 200, 0, 0))
    overrides = [*SHOWN, 'progress_bar=true', 'max_duration=30ba', 'eval_interval=15ba', 'save_folder=out/{run_name}']
    process = Popen(
        [sys.executable, str(root / 'scripts/train.py'), str(yaml), *overrides],
        cwd=tmp_path,
        env=environment(),
        stdout=terminal,
        stderr=terminal,
    )
    os.close(terminal)
    output = read_all(master)
    assert process.wait() == 0, output[-3000:]
    frames = [frame.strip() for frame in re.split(r'[\r\n]+|\x1b\[A', output)]

    def drawn(pattern):
        return [frame for frame in frames if re.fullmatch(pattern, frame)]

    for epoch, total in ((1, 20), (2, 10)):
        head = rf'train epoch {epoch}/2: +\d+%\|.*\| \d+/{total}, {LEFT}'
        assert drawn(rf'{head}, {BOTH}, {PACE}') or drawn(rf'{head}, classification {LOSS}, alpha \d\S*, {PACE}')
        assert drawn(rf'train epoch {epoch}/2: 100%\|.*\| {total}/{total}, {LEFT}, classification .*')
    assert drawn(r'eval validation: +\d+%\|.*\| \d+/4')
    assert len(drawn(rf'eval validation: MulticlassAccuracy {LOSS}')) == 2
    # What is left to do is named, and what is said then begins lines of its own.
    assert frames.index('export') < frames.index('checkpoints: out/tiny') < frames.index('summary: out/summary.json')


def environment() -> dict[str, str]:
    return {**os.environ, 'OMP_NUM_THREADS': '1', 'OMP_WAIT_POLICY': 'passive', 'TOKENIZERS_PARALLELISM': 'false'}


def read_all(master: int) -> str:
    """All that is written to a terminal until nobody holds it any more."""
    chunks = []
    while True:
        try:
            chunk = os.read(master, 1 << 16)
        except OSError:  # Linux's way to say so
            chunk = b''
        if not chunk:
            os.close(master)
            return b''.join(chunks).decode()
        chunks.append(chunk)

"""A run that is stopped, killed or refused by the disk goes on to the very end that it would have come to.

`tests/kills.py` is the long form: 20 kills at random moments.
"""

import json
import os
import shutil
import signal
import subprocess
import zipfile
from pathlib import Path

import pytest
import torch
from composer.algorithms.sam.sam import SAMOptimizer
from composer.callbacks import CheckpointSaver
from composer.utils import dist
from forks import Popen
from runs import BATCH, EPOCH, STEPS, RowRecorder, finish, kill, launch, losses, outcome, rows_read, wait_for, write_run

import dhrd_plugin.training.run
from dhrd_plugin import load_config, train
from dhrd_plugin.callbacks.stoppers import EarlyStopper, ThresholdStopper
from dhrd_plugin.checkpoints.read import describe_checkpoint
from dhrd_plugin.checkpoints.resume import find_checkpoint, set_log_aside
from dhrd_plugin.checkpoints.same import differences
from dhrd_plugin.checkpoints.saver import SafeCheckpoints
from dhrd_plugin.checkpoints.whole import find_flaw, list_checkpoints, newest_checkpoint
from dhrd_plugin.errors import UserError
from dhrd_plugin.evaluate import report_on

pytestmark = pytest.mark.usefixtures('one_thread')

COMPARED = ('weights', 'summary', 'export')


@pytest.fixture(scope='module')
def yaml(tmp_path_factory):
    """The run's YAML, with its model and rows."""
    return write_run(tmp_path_factory.mktemp('material') / 'run')


@pytest.fixture(scope='module')
def straight(yaml, tmp_path_factory):
    """Makes runs that nothing stops, one for each set of overrides: their folder, and what they end with."""
    made = {}

    def make(*overrides):
        if overrides not in made:
            folder = tmp_path_factory.mktemp('straight')
            run(yaml, folder, *overrides)
            made[overrides] = folder, outcome(folder / 'out')
            assert len(made[overrides][1]['losses']) in (STEPS, 58)
        return made[overrides]

    return make


def run(yaml: Path, folder: Path, *overrides: str):
    """Train in this process, in ``folder``."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        return train(load_config(yaml, overrides))
    finally:
        os.chdir(before)


def stop(yaml: Path, folder: Path, step: int, monkeypatch, *overrides: str) -> None:
    """Train in this process up to a SIGTERM in a batch."""
    with monkeypatch.context() as patch:
        patch.setattr(dhrd_plugin.training.run, 'TokenCounter', RowRecorder)
        patch.setattr(RowRecorder, 'stop_at', step - 1)
        before = signal.getsignal(signal.SIGTERM)
        with pytest.raises(SystemExit) as stopped:
            run(yaml, folder, *overrides)
        assert stopped.value.code == 143 and signal.getsignal(signal.SIGTERM) is before


def keep(source: Path, folder: Path, *steps: int) -> dict[int, Path]:
    """Copy the checkpoints of some steps to where a run in ``folder`` looks for its own."""
    target = folder / 'out' / 'checkpoints'
    target.mkdir(parents=True)
    copied = {}
    for step in steps:
        (found,) = (source / 'out' / 'checkpoints').glob(f'ep*-ba{step}-rank0.pt')
        copied[step] = Path(shutil.copy(found, target))
    (target / 'latest-rank0.pt').symlink_to(copied[max(steps)].name)
    return copied


def same_end(found: dict, expected: dict) -> None:
    for key in COMPARED:
        assert found[key] == expected[key], key
    assert found['losses'].items() <= expected['losses'].items()


SAVES = ('save_interval=10ba', 'save_num_checkpoints_to_keep=-1')
BY_EPOCH = ('save_interval=1ep', 'train_loader.num_workers=2', 'eval_interval=7ba')


BY_BATCH = ('save_interval=19ba', 'max_duration=58ba', 'model.head=verbalizer')  # ends within an epoch


@pytest.mark.parametrize(
    ('overrides', 'step'),
    [(SAVES, 10), (SAVES, EPOCH), (SAVES, STEPS), (BY_EPOCH, EPOCH), (BY_EPOCH, STEPS), (BY_BATCH, 57), (BY_BATCH, 58)],
)
def test_any_checkpoint_leads_to_the_same_end(yaml, straight, tmp_path, overrides, step):
    """Within an epoch, at its last batch, between two epochs with workers that persist, at the end of the run."""
    folder, end = straight(*overrides)
    keep(folder, tmp_path, step)
    run(yaml, tmp_path, *overrides)
    found = outcome(tmp_path / 'out')
    same_end(found, end)
    assert len(found['losses']) == len(end['losses']) - step
    assert found['summary']['rationales_cut'] > 0


def test_the_cards_metrics_are_those_of_the_weights_beside_it(yaml, straight):
    """Where the run ends within an epoch, and is evaluated after each of them."""
    out = straight(*BY_BATCH)[0] / 'out'
    metrics = json.loads((out / 'summary.json').read_text())['metrics']['validation']
    report = report_on(out / 'slim', [yaml.parent / 'validation.jsonl'])
    assert metrics['MulticlassAccuracy'] == pytest.approx(report['metrics']['accuracy'], abs=1e-6)
    card = (out / 'slim' / 'README.md').read_text()
    assert all(f'| validation | {name} | {value:.4f} |' in card for name, value in metrics.items())


@pytest.mark.slow
def test_two_kills_and_the_same_end(yaml, straight, tmp_path):
    """SIGKILL while a checkpoint is written, and again while the export is; the first run is no fork."""
    out = tmp_path / 'out'
    moments = (lambda: any((out / 'checkpoints').glob('ep1-ba28-*.pt')), lambda: any(out.glob('.slim.*.tmp')))
    for reached, start in zip(moments, (subprocess.Popen, Popen)):
        process = launch(yaml, tmp_path, start=start)
        assert wait_for(process, reached), process.communicate()[0]
        kill(process)
        assert not (out / 'slim').exists()
    output = finish(launch(yaml, tmp_path))
    assert 'going on from out/checkpoints/ep' in output
    found = outcome(out)
    same_end(found, straight()[1])
    assert found['losses'] == straight()[1]['losses']  # of all three logs
    assert len(list((out / 'checkpoints').glob('ep*.pt'))) == 3
    assert not list(out.rglob('.*'))  # the second start removed what the first left, the third what the second


@pytest.mark.parametrize('step', [13, EPOCH])
def test_sigterm_saves_and_the_same_command_goes_on(yaml, straight, tmp_path, monkeypatch, capsys, step):
    stop(yaml, tmp_path, step, monkeypatch)
    assert f'SIGTERM: saved a checkpoint at batch {step} and stopped' in capsys.readouterr().out
    (newest, *_) = list_checkpoints(str(tmp_path / 'out' / 'checkpoints'))
    assert f'-ba{step}-' in newest and not (tmp_path / 'out' / 'slim').exists()
    run(yaml, tmp_path)
    found = outcome(tmp_path / 'out')
    same_end(found, straight()[1])
    assert found['losses'] == straight()[1]['losses']


def test_from_one_rank_to_two_and_back_every_row_is_read_once_an_epoch(yaml, straight, tmp_path, monkeypatch):
    stop(yaml, tmp_path, 13, monkeypatch)

    process = launch(yaml, tmp_path, ranks=2, script='tests/runs.py')
    assert wait_for(process, lambda: 30 in losses(tmp_path / 'out')), process.communicate()[0]
    os.kill(process.pid, signal.SIGTERM)  # the launcher, which passes it on
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 143
    assert 'SIGTERM: saved a checkpoint at batch' in output
    steps = max(losses(tmp_path / 'out')) + 1
    assert 30 < steps < STEPS and f'-ba{steps}-' in list_checkpoints(str(tmp_path / 'out' / 'checkpoints'))[0]

    monkeypatch.setattr(dhrd_plugin.training.run, 'TokenCounter', RowRecorder)
    run(yaml, tmp_path)
    rows = rows_read(tmp_path)
    assert len(set(rows[0])) == EPOCH * BATCH
    assert rows[0] == rows[1] == rows[2] == sorted(set(rows[0]))
    found = outcome(tmp_path / 'out')['summary']
    expected = straight()[1]['summary']
    assert {**found, 'metrics': None} == {**expected, 'metrics': None}


class Hyperparameters(RowRecorder):
    """Notes what each step is taken with."""

    noted: dict[int, dict] = {}

    def after_train_batch(self, state, logger):
        (group,) = state.optimizers[0].param_groups
        self.noted[int(state.timestamp.batch)] = {key: group[key] for key in ('lr', 'weight_decay')}


Hyperparameters.__qualname__ = RowRecorder.__qualname__


def test_a_run_that_goes_on_has_the_hyperparameters_of_its_own_config(yaml, tmp_path, monkeypatch):
    monkeypatch.setattr(dhrd_plugin.training.run, 'TokenCounter', Hyperparameters)

    def steps(name, *overrides):
        monkeypatch.setattr(Hyperparameters, 'noted', {})
        (tmp_path / name).mkdir(exist_ok=True)
        run(yaml, tmp_path / name, 'max_duration=8ba', 'save_interval=4ba', *overrides)
        return Hyperparameters.noted

    first = steps('first')
    for name in ('rate', 'constant'):
        keep(tmp_path / 'first', tmp_path / name, 4)
    rate = steps('rate', 'optimizer.lr=1e-3', 'optimizer.weight_decay=0.3')
    assert list(rate) == [4, 5, 6, 7] and all(found['weight_decay'] == 0.3 for found in rate.values())
    for step in (5, 6, 7):
        assert 3 * rate[step]['lr'] == pytest.approx(first[step]['lr'])
    assert 3 * rate[4]['lr'] == pytest.approx(first[5]['lr'])  # Composer's schedulers are a step behind
    constant = steps('constant', 'scheduler=null')
    assert {step: found['lr'] for step, found in constant.items()} == dict.fromkeys((4, 5, 6, 7), 3e-3)


# ------------------------------------------------------------------------------ damaged checkpoints


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    """One bit of the largest record."""
    with zipfile.ZipFile(path) as archive:
        record = max(archive.infolist(), key=lambda info: info.file_size)
        content = archive.read(record)
    data = bytearray(path.read_bytes())
    data[data.index(content) + len(content) // 2] ^= 1
    path.write_bytes(bytes(data))


def empty(path: Path) -> None:
    path.write_bytes(b'')


def other(path: Path) -> None:
    path.write_text('{"not": "a checkpoint"}')


DAMAGES = (cut_short, half, flip, empty, other)


@pytest.mark.parametrize('damage', DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_and_refused_by_its_path(yaml, straight, tmp_path, damage, caplog):
    copied = keep(straight(*SAVES)[0], tmp_path, 30, 40, 50)
    folder = str(tmp_path / 'out' / 'checkpoints')
    damage(copied[50])
    assert newest_checkpoint(folder) == str(copied[40])
    (line,) = caplog.messages
    assert line.startswith(f'{copied[50]}: ') and line.endswith('; passed over') and '\n' not in line
    with pytest.raises(UserError) as error:
        run(yaml, tmp_path, 'autoresume=false', f'load_path={copied[50]}', 'save_folder=null')
    assert str(error.value).startswith(f'load_path: {copied[50]}: ') and '\n' not in str(error.value)
    damage(copied[40])
    damage(copied[30])
    assert newest_checkpoint(folder) is None


def test_autoresume_goes_on_from_the_newest_whole_one(yaml, straight, tmp_path, caplog):
    folder, end = straight(*SAVES)
    copied = keep(folder, tmp_path, 40, 50)
    half(copied[50])
    run(yaml, tmp_path, *SAVES)
    assert f'{copied[50].name}: ' in caplog.text
    found = outcome(tmp_path / 'out')
    same_end(found, end)
    assert len(found['losses']) == STEPS - 40
    assert find_flaw(str(copied[50])) is None  # written again when its batch came


def test_the_newest_is_what_latest_names(tmp_path):
    for name in ('ep0-ba9-rank0.pt', 'ep0-ba10-rank0.pt', 'ep1-ba11-rank0.pt', 'ep0-ba10', 'notes.pt'):
        (tmp_path / name).touch()
    names = [Path(path).name for path in list_checkpoints(str(tmp_path))]
    assert names == ['ep1-ba11-rank0.pt', 'ep0-ba10-rank0.pt', 'ep0-ba9-rank0.pt']
    # A longer run was here before: its last checkpoint is not this run's.
    (tmp_path / 'latest-rank0.pt').symlink_to('ep0-ba10-rank0.pt')
    assert [Path(path).name for path in list_checkpoints(str(tmp_path))] == ['ep0-ba10-rank0.pt', 'ep0-ba9-rank0.pt']
    assert [Path(path).name for path in list_checkpoints(str(tmp_path), sharded=True)] == ['ep0-ba10']
    assert list_checkpoints(str(tmp_path / 'absent')) == []


@pytest.fixture
def shards(tmp_path):
    """A sharded checkpoint, as torch writes it for Composer."""
    folder = tmp_path / 'ep0-ba10'
    state = {'state': {'model': {f'{i}': torch.arange(1000.0) + i for i in range(3)}, 'timestamp': {'batch': 10}}}
    torch.distributed.checkpoint.save(state, checkpoint_id=folder, no_dist=True)
    return folder


@pytest.mark.parametrize('autoresume', [True, False])
def test_a_folder_of_the_other_kind_is_no_new_one(shards, autoresume):
    with pytest.raises(UserError, match=': found checkpoints in shards, and this run saves files'):
        find_checkpoint(str(shards.parent), sharded=False, autoresume=autoresume)
    assert find_checkpoint(str(shards.parent), sharded=False, autoresume=True, save_overwrite=True) is None
    (shards.parent / 'ep0-ba9-rank0.pt').touch()
    assert find_checkpoint(str(shards.parent), sharded=True, autoresume=True) == str(shards)
    shutil.rmtree(shards)
    with pytest.raises(UserError, match='found checkpoints in files, and this run saves shards'):
        find_checkpoint(str(shards.parent), sharded=True, autoresume=autoresume)


@pytest.mark.parametrize('own', [True, False])
def test_each_ranks_log_is_set_aside_once(tmp_path, monkeypatch, own):
    logs = [tmp_path / f'log-rank{rank if own else 0}.txt' for rank in (0, 1)]
    for number, log in enumerate(dict.fromkeys(logs)):
        log.write_text(f'{number}')
    monkeypatch.setattr(dist, 'all_gather_object', lambda log: logs)
    for rank, log in enumerate(logs):
        monkeypatch.setattr(dist, 'get_global_rank', lambda rank=rank: rank)
        set_log_aside(log)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ['log-rank0.1.txt', 'log-rank1.1.txt'][: 2 if own else 1]


STOPPER = ('callbacks.early_stopper={monitor: MulticlassAccuracy, dataloader_label: validation, patience: 4ba}',)
AT_REST = ('optimizer.lr=1e-9', 'scheduler=null', 'eval_interval=2ba', 'save_interval=2ba', 'max_duration=14ba')


THRESHOLD = ('callbacks.threshold_stopper={monitor: MulticlassAccuracy, dataloader_label: validation, threshold: -1}',)


@pytest.mark.parametrize(
    ('stopper', 'more', 'expected'),
    [
        (STOPPER, 'callbacks.early_stopper.patience=8ba', [8, 8, 12]),
        (THRESHOLD, 'callbacks.threshold_stopper.threshold=2', [2, 2, 14]),
    ],
)
def test_a_run_that_was_stopped_stays_stopped_unless_it_is_to_go_further(yaml, tmp_path, stopper, more, expected):
    steps = []
    for override in ((), (), (more,)):
        trainer = run(yaml, tmp_path, *AT_REST, *stopper, *override)
        steps.append(int(trainer.state.timestamp.batch))
        trainer.close()
    assert steps == expected


@pytest.mark.parametrize('change', [{'monitor': 'MulticlassF1Score'}, {'dataloader_label': 'other'}, {}])
@pytest.mark.parametrize('kind', [EarlyStopper, ThresholdStopper])
def test_a_stopper_remembers_nothing_of_another_metric(kind, change):
    settings = {'monitor': 'MulticlassAccuracy', 'dataloader_label': 'val'}
    settings |= {'threshold': 0.5} if kind is ThresholdStopper else {}
    first, second = kind(**settings), kind(**settings | change)
    memory = first.state_dict()
    memory |= {name: torch.tensor(0.7) if isinstance(value, torch.Tensor) else value for name, value in memory.items()}
    first.load_state_dict(memory)
    second.load_state_dict(first.state_dict())
    found = second.state_dict()['best' if kind is EarlyStopper else 'last']
    assert found.isnan() if change else found == torch.tensor(0.7)


def test_a_run_that_goes_on_stops_where_it_would_have_stopped(yaml, tmp_path, monkeypatch):
    stop(yaml, tmp_path, 5, monkeypatch, *AT_REST, *STOPPER)
    assert run(yaml, tmp_path, *AT_REST, *STOPPER).state.timestamp.batch == 8


@pytest.mark.parametrize('damage', [None, cut_short, half, empty, 'flip', 'index', 'shard'])
def test_shards_are_verified_by_their_index(shards, damage):
    (shard,) = shards.glob('*.distcp')
    if callable(damage):
        damage(shard)
    elif damage == 'flip':
        data = bytearray(shard.read_bytes())
        middle = data.index(torch.arange(1000.0).numpy().tobytes()) + 2000
        data[middle] ^= 1
        shard.write_bytes(bytes(data))
    elif damage == 'index':
        (shards / '.metadata').unlink()
    elif damage == 'shard':
        shard.unlink()
    flaw = find_flaw(str(shards))
    assert (flaw is None) == (damage is None)
    assert newest_checkpoint(str(shards.parent), sharded=True) == (None if damage else str(shards))


# ------------------------------------------------------------------------------------ object storage


def test_from_object_storage(yaml, straight, tmp_path, s3, uploads, caplog):
    """The newest object is damaged; the run goes on from the one before, and saves to the bucket in turn."""
    folder, end = straight(*SAVES)
    address, objects = f'{s3.bucket}/runs/one', s3.folder / 'runs' / 'one'
    copied = keep(folder, tmp_path, 20, 30, 40)
    half(copied[30])
    for path in copied.values():
        s3.put(f'runs/one/{path.name}', path.read_bytes())
    s3.put('runs/one/latest-rank0.pt.symlink', f'runs/one/{copied[30].name}'.encode())  # the last upload that ended
    shutil.rmtree(tmp_path / 'out' / 'checkpoints')

    trainer = run(yaml, tmp_path, f'save_folder={address}', 'save_interval=40ba')
    assert f'{address}/{copied[30].name}: ' in caplog.text
    found = outcome(tmp_path / 'out', objects)
    assert found['weights'] == end['weights'] and found['summary'] == end['summary']
    assert found['export']['model.safetensors'] == end['export']['model.safetensors']
    assert set(found['losses']) == set(range(20, STEPS)) and found['losses'].items() <= end['losses'].items()
    assert sorted(path.name for path in tmp_path.iterdir()) == ['out']
    assert newest_checkpoint(address) == f'{address}/ep3-ba{STEPS}-rank0.pt'
    (saver,) = (part for part in trainer.state.callbacks if isinstance(part, CheckpointSaver))
    assert saver.remote_uploader and not [*Path(saver.folder).rglob('ep*')]  # no copies that fill a disk

    with pytest.raises(UserError, match=f'load_path: {address}/{copied[30].name}: '):
        run(yaml, tmp_path, 'autoresume=false', f'load_path={address}/{copied[30].name}', 'save_folder=null')
    with pytest.raises(UserError, match='cannot be read'):
        newest_checkpoint('s3://no-such-bucket/run')


# ---------------------------------------------------------------------------------------- full disks


@pytest.fixture
def small_disk(tmp_path, tmpfs):
    """Where a run in ``tmp_path`` saves: room for two of its checkpoints."""
    return tmpfs(tmp_path / 'out' / 'checkpoints', '360k')


@pytest.mark.parametrize('ranks', [1, 2])
def test_a_full_disk_is_told_in_one_line(yaml, straight, tmp_path, small_disk, ranks):
    process = launch(yaml, tmp_path, ranks=ranks)
    output = finish(process)  # none hangs
    assert process.returncode == 2
    (line,) = (line for line in output.splitlines() if line.startswith('error: '))
    assert 'checkpoints/ep1-ba21-rank0.pt: cannot be written: No space left on device' in line
    whole = sorted(path.name for path in small_disk.glob('ep*'))
    assert whole == ['ep0-ba14-rank0.pt', 'ep0-ba7-rank0.pt']
    assert [find_flaw(str(small_disk / name)) for name in whole] == [None, None]
    assert os.readlink(small_disk / 'latest-rank0.pt') == 'ep0-ba14-rank0.pt'
    if ranks == 1:
        subprocess.run(['mount', '-o', 'remount,size=10m', small_disk], check=True)
        run(yaml, tmp_path)
        same_end(outcome(tmp_path / 'out'), straight()[1])


# ------------------------------------------------------------------------------- losses and configurations


@pytest.mark.parametrize('ranks', [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_loss_that_is_not_finite_ends_the_run(yaml, tmp_path, ranks):
    """The weights before it are saved; the export of a run before stays."""
    steps = ('max_duration=6ba', 'scheduler=null', 'save_interval=6ba')
    run(yaml, tmp_path, 'max_duration=2ba', 'save_folder=null', 'autoresume=false')
    before = outcome_of_export(tmp_path)
    if ranks == 1:
        with pytest.raises(UserError) as error:
            run(yaml, tmp_path, *steps, 'optimizer.lr=1e30')
        line = f'error: {error.value}'
    else:
        process = launch(yaml, tmp_path, *steps, 'optimizer.lr=1e30', ranks=ranks)
        (line,) = (line for line in finish(process).splitlines() if line.startswith('error: '))
        assert process.returncode == 2
    assert line.startswith('error: loss: found one that is not finite in batch 2; expected a number')
    assert line.endswith('; the weights before it: out/checkpoints/ep0-ba1-rank0.pt')
    assert find_flaw(str(tmp_path / 'out' / 'checkpoints' / 'ep0-ba1-rank0.pt')) is None
    assert outcome_of_export(tmp_path) == before
    if ranks == 1:  # the same command goes on from there, and a better one as well
        with pytest.raises(UserError, match=r'found one that is not finite in batch 2; .*\)$'):
            run(yaml, tmp_path, *steps, 'optimizer.lr=1e30')


def test_the_weights_before_a_loss_in_the_second_pass_of_sam_are_not_shifted(yaml, tmp_path, monkeypatch):
    climb, note, kept = SAMOptimizer.first_step, SafeCheckpoints.after_loss, []

    def first_step(optimizer):
        if optimizer.global_step == 2:
            kept.extend(weight.detach().clone() for group in optimizer.param_groups for weight in group['params'])
        climb(optimizer)

    def after_loss(saver, state, logger):
        if kept:
            state.loss = {name: loss * torch.nan for name, loss in state.loss.items()}
        note(saver, state, logger)

    monkeypatch.setattr(SAMOptimizer, 'first_step', first_step)
    monkeypatch.setattr(SafeCheckpoints, 'after_loss', after_loss)
    with pytest.raises(UserError, match=r'not finite in batch 3; .*; the weights before it: .*ep0-ba2-rank0\.pt'):
        run(yaml, tmp_path, 'algorithms.sam={rho: 0.5}', 'autoresume=false')
    saved = torch.load(tmp_path / 'out' / 'checkpoints' / 'ep0-ba2-rank0.pt', weights_only=False)['state']['model']
    for weight in kept:
        assert any(torch.allclose(weight, found, atol=1e-6) for found in saved.values() if found.shape == weight.shape)


@pytest.mark.parametrize(
    ('override', 'words'),
    [
        ('algorithms.sam={}', 'algorithms.sam: found with autoresume: its checkpoints lack the state of the optimizer'),
        (
            'algorithms.layer_freezing={}',
            'algorithms.layer_freezing: found with save_folder: the optimizer of a frozen',
        ),
        (
            'callbacks.early_stopper={monitor: MulticlassAccuracy, dataloader_label: validation, patience: -1}',
            r'early_stopper\.patience: found -1ep; expected epochs \(ep\) or batches \(ba\), 0 or more',
        ),
        (
            'callbacks.early_stopper={monitor: ExactMatch, dataloader_label: train}',
            "early_stopper.monitor: found 'ExactMatch'; expected one of MulticlassAccuracy",
        ),
    ],
)
def test_what_could_not_go_on_or_not_stop_is_refused(yaml, tmp_path, override, words):
    with pytest.raises(UserError, match=words):
        run(yaml, tmp_path, 'task.metrics=[accuracy, em]', 'task.group=idx', override)


def test_no_figures_are_told_of_other_weights(yaml, tmp_path, capsys):
    """The only evaluation came before the first step. `FreeOutputs` leaves the metrics no outputs."""
    overrides = ('eval_first=true', 'eval_interval=0ep', 'callbacks.free_outputs={}', 'max_duration=2ba')
    trainer = run(yaml, tmp_path, *overrides)
    assert trainer.state.eval_metrics['validation']['MulticlassAccuracy'].update_called
    assert json.loads((tmp_path / 'out' / 'summary.json').read_text())['metrics'] == {}
    assert 'MulticlassAccuracy' not in capsys.readouterr().out


def test_a_threshold_that_is_reached_before_the_first_step_ends_the_run(yaml, tmp_path):
    trainer = run(yaml, tmp_path, 'eval_first=true', *THRESHOLD)
    assert trainer.state.timestamp.batch == 0 and (tmp_path / 'out' / 'slim').is_dir()


def outcome_of_export(folder):
    return {path.name: path.read_bytes() for path in (folder / 'out' / 'slim').iterdir()}


def test_weights_of_a_run_on_other_rows_begin_a_new_one(yaml, straight, tmp_path):
    (tmp_path / 'rows.jsonl').write_text(''.join((yaml.parent / 'train.jsonl').read_text().splitlines(True)[:40]))
    checkpoint = keep(straight(*SAVES)[0], tmp_path / 'other', 20)[20]
    load = (f'load_path={checkpoint}', 'load_weights_only=true', 'autoresume=false', 'max_duration=2ba')
    other = ('optimizer.name=decoupled_adamw', 'model.classifier_dropout=0')
    run(yaml, tmp_path, *load, *other, f'train_loader.source={tmp_path / "rows.jsonl"}')
    assert (tmp_path / 'out' / 'slim').exists()


def test_a_run_that_goes_on_by_load_path_keeps_later_checkpoints_and_the_log(yaml, straight, tmp_path):
    copied = keep(straight(*SAVES)[0], tmp_path, 10, 20)
    begins = (*SAVES, 'autoresume=false', 'max_duration=21ba')
    for back in ((f'load_path={copied[10]}',), (f'load_path={copied[20]}', 'load_weights_only=true')):
        with pytest.raises(UserError, match=r'^save_folder: out/checkpoints: found checkpoints; expected autoresume='):
            run(yaml, tmp_path, *begins, *back)
    log = 'loggers.file={filename: out/log.txt}'
    (tmp_path / 'out' / 'log.txt').write_text('[stdout]: before')
    run(yaml, tmp_path, *begins, f'load_path={copied[20]}', log)
    assert (tmp_path / 'out' / 'log.1.txt').read_text() == '[stdout]: before'
    assert find_flaw(str(copied[10])) is None is find_flaw(str(copied[20]))


def test_a_checkpoint_in_shards_is_described_as_the_file_is(yaml, straight, tmp_path):
    (checkpoint,) = (straight(*SAVES)[0] / 'out' / 'checkpoints').glob('ep*-ba20-rank0.pt')
    state = torch.load(checkpoint, weights_only=False)['state']
    kept = {key: state[key] for key in ('model', 'optimizers', 'integrations')}
    torch.distributed.checkpoint.save({'state': kept}, checkpoint_id=tmp_path / 'ep1-ba20', no_dist=True)
    found, expected = (describe_checkpoint(str(path)) for path in (tmp_path / 'ep1-ba20', checkpoint))
    assert [*differences(found, expected), *differences(expected, found)] == []
    assert found.shapes == expected.shapes and found.optimizer == expected.optimizer == 'AdamW'
    found.metadata['dhrd']['label_names'].reverse()
    assert next(differences(found, expected)).startswith("label_names: found ['maybe', 'no', 'yes']; this run has ['ye")


# ----------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ('overrides', 'expected'),
    [
        (['save_folder=null'], 'autoresume: found without save_folder; expected a folder'),
        (['save_interval=often'], "save_interval: found 'often'; expected a Composer time string"),
        (['autoresume=false'], 'save_folder: out/checkpoints: found checkpoints; expected autoresume=true'),
        (['autoresume=false', 'load_path=no.pt'], 'load_path: no.pt: no such file; expected a whole checkpoint'),
    ],
)
def test_mistakes_are_told_early(yaml, straight, tmp_path, overrides, expected):
    keep(straight(*SAVES)[0], tmp_path, 10)
    with pytest.raises(UserError) as error:
        run(yaml, tmp_path, *overrides)
    assert expected in str(error.value) and '\n' not in str(error.value)

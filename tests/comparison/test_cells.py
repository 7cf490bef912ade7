"""Cells are processes: what they find is the same however they are run, and none outlives its comparison."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from forks import Popen
from plans import COMPARISON, SHORT, load, write
from runs import finish, kill, launch, wait_for, write_run

from dhrd_plugin.checkpoints import lock
from dhrd_plugin.comparison import cells as room
from dhrd_plugin.comparison.cells import OUTPUT, compare, main
from dhrd_plugin.comparison.plan import build_cells
from dhrd_plugin.comparison.results import PLAN, RESULTS, read_lines
from dhrd_plugin.data.tasks import load_task
from dhrd_plugin.errors import UserError
from dhrd_plugin.evaluate import evaluate, read_data
from dhrd_plugin.export.load import load_classifier

SCRIPT = 'scripts/compare.py'
TIMES = ('seconds_per_step', 'finished')
TWO = {arm: COMPARISON['arms'][arm] for arm in ('pooled', 'dhrd')}
PLAIN = subprocess.Popen
LONG = {'tiny': {**SHORT, 'max_duration': '100000ba', 'eval_interval': '100000ba'}}


@pytest.fixture(scope='module')
def run_folder(tmp_path_factory):
    """A model, rows and the YAML of a small run."""
    return write_run(tmp_path_factory.mktemp('compare')).parent


@pytest.fixture(scope='module', autouse=True)
def forked_cells():
    """Of comparisons in this process, and of those that :func:`runs.launch` forks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess, 'Popen', Popen)
        patch.setenv('OMP_NUM_THREADS', '1')
        patch.setenv('OMP_WAIT_POLICY', 'passive')
        yield


@pytest.fixture(scope='module')
def straight(run_folder, tmp_path_factory):
    """The results of a comparison that nothing stopped, and its folder, with the exports kept."""
    out = tmp_path_factory.mktemp('straight') / 'out'
    return read_lines(compare(write(run_folder, keep_exports=True), [f'output_dir={out}'])), out


def copy_results(straight, out):
    for name in (PLAN, RESULTS):
        shutil.copy(straight[1] / name, out)


def timeless(records, seeds=(1, 2), arms=tuple(COMPARISON['arms'])):
    kept = [record for record in records if record['seed'] in seeds and record['arm'] in arms]
    return sorted(json.dumps({k: v for k, v in record.items() if k not in TIMES}) for record in kept)


def processes(folder: Path) -> list[int]:
    """The cells that run below a folder."""
    found = []
    for process in Path('/proc').glob('[0-9]*'):
        try:
            if b'--cell' in (process / 'cmdline').read_bytes() and (process / 'cwd').resolve() == folder:
                found.append(int(process.name))
        except OSError:  # it has gone
            continue
    return found


def vanish(folder: Path) -> bool:
    """Whether all cells below a folder end soon."""
    for _ in range(1200):
        if not processes(folder):
            return True
        time.sleep(0.1)
    return False


def test_a_record_tells_of_its_cell(straight):
    found = {(record['task'], record['arm'], record['seed']): record for record in straight[0]}
    assert list(found) == [('tiny', arm, seed) for seed in (1, 2) for arm in ('pooled', 'dhrd', 'shuffled')]
    pooled, dhrd, shuffled = (found['tiny', arm, 1] for arm in ('pooled', 'dhrd', 'shuffled'))
    assert (pooled['alpha'], dhrd['alpha'], shuffled['control']) == (None, 0.5, 'ShuffleReasoning')
    assert pooled['tokens'] < dhrd['tokens'] and dhrd['steps'] == pooled['steps'] == 6  # it reads no rationale
    assert 'loss/train/reasoning' in dhrd['series'] and 'loss/train/reasoning' not in pooled['series']
    assert [value for _, value in dhrd['series']['dhrd/alpha']] == [0.5] * 6
    assert pooled['ids'] == dhrd['ids'] and pooled['labels'] == dhrd['labels'] and pooled['split'] == 'validation'


def test_predictions_are_those_of_the_export(straight, run_folder):
    records, out = straight
    classifier = load_classifier(str(out / 'cells/tiny/dhrd/1/slim'))
    task = load_task(classifier.task)
    rows = read_data(str(run_folder / 'validation.jsonl'), task)
    probabilities = classifier.predict_proba(rows)
    assert [row['id'] for row in rows] == records[1]['ids']
    assert probabilities.argmax(-1).tolist() == records[1]['predictions']
    assert evaluate(probabilities, rows, task)['metrics'] == records[1]['metrics']


def test_a_killed_comparison_goes_on(straight, run_folder, tmp_path):
    """Killed with all of its processes in its second cell: the first is not run again, and all ends alike."""
    yaml, results = write(run_folder, seeds=[1], arms=TWO), tmp_path / 'out' / RESULTS
    process = launch(yaml, tmp_path, script=SCRIPT)
    assert wait_for(process, (tmp_path / 'out/cells/tiny/dhrd/1/log-rank0.txt').exists)
    kill(process)
    assert vanish(tmp_path)
    (first,) = read_lines(results)
    output = finish(launch(yaml, tmp_path, script=SCRIPT), 600)
    assert '2 cells, 1 of them in' in output, output
    records = read_lines(results)
    assert records[0] == first
    assert timeless(records) == timeless(straight[0], [1], TWO)
    assert {'report.html', 'report.md', 'comparison.yaml'} <= {path.name for path in (tmp_path / 'out').iterdir()}
    assert not list((tmp_path / 'out').glob('cells/*/*/*/slim'))


def test_cells_side_by_side_find_the_same(straight, run_folder, tmp_path):
    """Started again after its parent alone was killed, which no cell outlives."""
    yaml, out = write(run_folder, seeds=[1]), tmp_path / 'out'
    process = launch(yaml, tmp_path, '--jobs', '2', script=SCRIPT)
    assert wait_for(process, lambda: len(list(out.glob('cells/*/*/*/log-rank0.txt'))) == 2)
    assert len(processes(tmp_path)) == 2
    process.kill()
    process.wait()
    assert vanish(tmp_path)
    output = finish(launch(yaml, tmp_path, '--jobs', '2', script=SCRIPT), 600)
    assert timeless(read_lines(out / RESULTS)) == timeless(straight[0], [1]), output
    lines = [line for line in output.splitlines() if line.startswith('--- cell')]
    assert sum(line.endswith(OUTPUT) for line in lines) == sum(line.endswith(': done') for line in lines)
    assert 'parameters' not in output
    assert 'parameters' in (out / 'cells/tiny/shuffled/1' / OUTPUT).read_text()


@pytest.mark.parametrize('number', [signal.SIGKILL, signal.SIGTERM])
def test_no_cell_outlives_its_comparison(run_folder, tmp_path, number):
    """Not even one that has not begun to train; no forks are those that SIGKILL ends."""
    start = PLAIN if number == signal.SIGKILL else Popen
    process = launch(write(run_folder, tasks=LONG), tmp_path, '--jobs', '2', script=SCRIPT, start=start)
    assert wait_for(process, lambda: len(processes(tmp_path)) == 2)
    process.send_signal(number)
    assert process.wait(60) == {signal.SIGKILL: -9, signal.SIGTERM: 143}[number]
    assert vanish(tmp_path)
    assert not list((tmp_path / 'out').glob('cells/*/*/*/summary.json'))


def test_a_cell_that_fails_is_one_line_and_ends_the_others(straight, run_folder, tmp_path, capsys, monkeypatch):
    rows = (run_folder / 'train.jsonl').read_text().replace('"label": ', '"label": "none of these", "was": ', 1)
    (run_folder / 'broken.jsonl').write_text(rows)
    out = tmp_path / 'out'
    out.mkdir()
    copy_results(straight, out)
    long = {'max_duration': '100000ba', 'eval_interval': '100000ba'}
    broken = {'train_loader': {'source': str(run_folder / 'broken.jsonl')}}
    arms = {**COMPARISON['arms'], 'broken': broken, 'long': long, 'never': long}
    yaml = write(run_folder, arms=arms, seeds=[1])
    monkeypatch.chdir(tmp_path)
    assert main([str(yaml), 'output_dir=out', '--jobs', '2']) == 2
    (line,) = capsys.readouterr().err.splitlines()
    output = out / 'cells/tiny/broken/1' / OUTPUT
    assert line == f'error: tiny broken seed 1: exit status 2; see {output.relative_to(tmp_path)}'
    assert output.read_text().splitlines()[-1].startswith('error: ') and 'none of these' in output.read_text()
    assert not processes(tmp_path) and not (out / 'cells/tiny/never').exists()
    assert (out / RESULTS).read_text() == (straight[1] / RESULTS).read_text()


def test_only_what_is_new_is_run(straight, run_folder, tmp_path, capsys):
    out = tmp_path / 'out'
    out.mkdir()
    copy_results(straight, out)
    arms = {**COMPARISON['arms'], 'quiet': SHORT}
    compare(write(run_folder, arms=arms, seeds=[1]), [f'output_dir={out}'])
    assert '4 cells, 3 of them in' in capsys.readouterr().out
    assert [record['arm'] for record in read_lines(out / RESULTS)] == [*['pooled', 'dhrd', 'shuffled'] * 2, 'quiet']


def test_two_ranks_predict_the_same(straight, run_folder, tmp_path):
    """In two cells, whose ranks meet at the same port."""
    yaml = write(run_folder, seeds=[1], arms=TWO)
    output = finish(launch(yaml, tmp_path, ranks=2, script=SCRIPT), 600)
    records = read_lines(tmp_path / 'out' / RESULTS)
    assert [record['arm'] for record in records] == ['pooled', 'dhrd'], output
    for record, alone in zip(records, straight[0]):
        assert record['world_size'] == 2 and len(record['ids']) == 30
        assert record['ids'] == alone['ids'] and record['tokens'] == alone['tokens']
    assert output.count('--- cell') == 2 and output.count('report.html') == 1


def test_ranks_share_a_cell_and_no_more(run_folder, capsys, monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', '2')
    assert main([str(write(run_folder)), '--jobs', '2']) == 2
    assert capsys.readouterr().err == 'error: --jobs: found 2 on 2 ranks; expected 1, as ranks share a cell\n'


def test_a_cell_is_none_of_a_yaml_that_has_changed(run_folder, capsys, monkeypatch):
    monkeypatch.setattr(room.ranks, 'end_with_parent', lambda by: None)
    command = [str(write(run_folder)), '--cell', 'tiny', 'pooled', '1', 'a0b1', str(os.getppid())]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert 'tiny pooled seed 1: changed since the comparison began' in error and error.count('\n') == 1
    assert main([*command[:-1], '0']) == 0  # the comparison has gone: nothing is run


def test_a_process_that_does_not_end_as_it_is_told_to_is_killed(monkeypatch):
    """As where the signal came in a ``__del__``, in which Python raises nothing."""
    monkeypatch.setattr(room, 'GRACE', 0.2)
    deaf = 'import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print("", flush=True); time.sleep(60)'
    with subprocess.Popen([sys.executable, '-c', deaf], stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        process.terminate()
        room.end(process)
    assert process.returncode == -signal.SIGKILL


def test_results_of_other_settings_are_refused(straight, run_folder, tmp_path):
    copy_results(straight, tmp_path)
    changed = write(run_folder, tasks={'tiny': {**SHORT, 'max_duration': '7ba'}})
    with pytest.raises(UserError, match=r'results.jsonl: tiny pooled seed 1 was run with other settings'):
        compare(changed, [f'output_dir={tmp_path}'])
    records = [{**record, 'data': 'another'} for record in straight[0]]
    (tmp_path / RESULTS).write_text(''.join(f'{json.dumps(record)}\n' for record in records))
    with pytest.raises(UserError, match='pooled seed 1 was run on other rows'):
        compare(write(run_folder), [f'output_dir={tmp_path}'])
    (tmp_path / RESULTS).write_text('{"task": "tiny"}\n')
    with pytest.raises(UserError, match=r'results.jsonl, line 1: arm: found'):
        compare(write(run_folder), [f'output_dir={tmp_path}'])


@pytest.mark.parametrize(
    'override, message',
    [
        ('baseline=dhrd', "comparison.yaml: baseline: found 'pooled', where "),
        ('arms.shuffled=null', "comparison.yaml: arms: found ['pooled', 'dhrd', 'shuffled'], where "),
        ('seeds=[1]', 'comparison.yaml: seeds: found [1, 2], where '),
        (
            'tasks.tiny.max_duration=99ba',
            'results.jsonl: tiny pooled seed 1 was run with other settings than it has now',
        ),
        ('arms.dhrd.max_seq_len=8', 'results.jsonl: tiny dhrd seed 1 was run with other settings than it has now'),
    ],
)
def test_a_report_is_of_the_plan_that_was_run(straight, run_folder, tmp_path, capsys, override, message):
    copy_results(straight, tmp_path)
    command = [str(write(run_folder)), f'output_dir={tmp_path}', '--report']
    assert main([*command, override]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count('\n') == 1
    assert not (tmp_path / 'report.md').exists()
    assert main(command) == 0
    assert (tmp_path / 'report.md').exists()


def test_only_the_very_same_cell_goes_on(run_folder, tmp_path):
    def start(task):
        (cell, *_) = build_cells(load(run_folder, tmp_path, tasks={'tiny': {**SHORT, **task}}))
        kept = cell.folder / 'checkpoints/kept'
        room._clear(cell)
        was = kept.exists()
        kept.parent.mkdir(exist_ok=True)
        kept.touch()
        return was

    resumed = {'save_folder': 'checkpoints', 'autoresume': True}
    assert [start(task) for task in (resumed, resumed, {**resumed, 'max_seq_len': 8}, {}, resumed)] == [
        False,
        True,
        False,
        False,
        False,
    ]


def test_two_comparisons_at_once_are_told_apart(run_folder, tmp_path, capsys, monkeypatch):
    yaml = write(run_folder, tasks=LONG, output_dir=str(tmp_path / 'out'))
    process = launch(yaml, tmp_path, script=SCRIPT)
    assert wait_for(process, lambda: len(processes(tmp_path)) == 1)
    monkeypatch.setattr(lock, 'PATIENCE', 0.1)
    before = {path for path in (tmp_path / 'out').rglob('*') if path.is_dir()}
    assert main([str(yaml)]) == 2
    error = capsys.readouterr().err
    assert f'output_dir: {tmp_path / "out"}: is in use by another run, process {process.pid} on ' in error
    assert error.count('\n') == 1 and before <= set((tmp_path / 'out').rglob('*'))
    process.kill()
    process.wait()
    assert vanish(tmp_path)

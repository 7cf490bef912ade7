import json
import shutil
import weakref
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from runs import finish, kill, launch, wait_for, write_run

from dhrd_plugin.compare import PLAN, RESULTS, build_cells, compare, load_comparison, main
from dhrd_plugin.comparison.results import read_lines
from dhrd_plugin.data.tasks import load_task
from dhrd_plugin.errors import UserError
from dhrd_plugin.evaluate import evaluate, open_classifier, predict_rows, read_data
from dhrd_plugin.training import train

SHORT = {
    'max_duration': '6ba',
    'eval_interval': '6ba',
    'save_folder': None,
    'autoresume': False,
    'algorithms': {'auxiliary_reasoning_loss': {'alpha': 0.5, 'schedule': None}},
}
COMPARISON = {
    'name': 'tiny',
    'base': 'tiny.yaml',
    'output_dir': 'out',
    'tasks': {'tiny': SHORT},
    'arms': {
        'pooled': {'algorithms': {'auxiliary_reasoning_loss': None}},
        'dhrd': {},
        'shuffled': {'train_loader': {'control': 'ShuffleReasoning'}},
    },
    'seeds': [1, 2],
}
TIMES = ('seconds_per_step', 'finished')


@pytest.fixture(scope='module')
def run_folder(tmp_path_factory):
    """A model, rows and the YAML of a small run."""
    return write_run(tmp_path_factory.mktemp('compare')).parent


def write(folder: Path, **changes) -> Path:
    path = folder / 'comparison.yaml'
    OmegaConf.save(OmegaConf.create({**COMPARISON, **changes}), path)
    return path


def load(folder: Path, out: Path, **changes):
    return load_comparison(write(folder, output_dir=str(out), **changes))


@pytest.fixture(scope='module')
def straight(run_folder, tmp_path_factory):
    """The results of a comparison that nothing stopped, and its folder, with the exports kept."""
    out = tmp_path_factory.mktemp('straight') / 'out'
    return read_lines(compare(load(run_folder, out, keep_exports=True))), out


def timeless(records):
    return sorted(json.dumps({k: v for k, v in record.items() if k not in TIMES}) for record in records)


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
    with open_classifier(str(out / 'cells/tiny/dhrd/1/slim')) as classifier:
        task = load_task(classifier.task)
        rows = read_data(str(run_folder / 'validation.jsonl'), task)
        probabilities = predict_rows(classifier, rows, task)
    assert [row['id'] for row in rows] == records[1]['ids']
    assert probabilities.argmax(-1).tolist() == records[1]['predictions']
    assert evaluate(probabilities, rows, task)['metrics'] == records[1]['metrics']


def test_a_killed_comparison_goes_on(straight, run_folder, tmp_path):
    """Killed in its second cell: the first is not run again, and all ends as if nothing had happened."""
    yaml, results = write(run_folder), tmp_path / 'out' / RESULTS
    process = launch(yaml, tmp_path, script='scripts/compare.py')
    second = tmp_path / 'out/cells/tiny/dhrd/1/log-rank0.txt'
    assert wait_for(process, second.exists)
    kill(process)
    (first,) = read_lines(results)
    output = finish(launch(yaml, tmp_path, script='scripts/compare.py'))
    assert '6 cells, 1 of them in' in output, output
    records = read_lines(results)
    assert records[0] == first
    assert timeless(records) == timeless(straight[0])
    assert {'report.html', 'report.md', 'comparison.yaml'} <= {path.name for path in (tmp_path / 'out').iterdir()}
    assert not list((tmp_path / 'out').glob('cells/*/*/*/slim'))


def test_no_cell_keeps_its_model(run_folder, tmp_path, monkeypatch):
    models = []

    def remembering(config):
        trainer = train(config)
        models.append(weakref.ref(trainer.state.model))
        return trainer

    monkeypatch.setattr('dhrd_plugin.compare.train', remembering)
    compare(load(run_folder, tmp_path / 'out', seeds=[1]))
    assert [model() for model in models] == [None] * 3


def test_only_what_is_new_is_run(straight, run_folder, tmp_path, capsys):
    out = tmp_path / 'out'
    out.mkdir()
    lines = (straight[1] / RESULTS).read_text()
    (out / RESULTS).write_text(lines)
    compare(load(run_folder, out, arms={**COMPARISON['arms'], 'quiet': SHORT | {'seed': 1}}, seeds=[1]))
    assert '4 cells, 3 of them in' in capsys.readouterr().out
    assert [record['arm'] for record in read_lines(out / RESULTS)] == [*['pooled', 'dhrd', 'shuffled'] * 2, 'quiet']


def test_two_ranks_predict_the_same(straight, run_folder, tmp_path):
    yaml = write(run_folder, seeds=[1], arms={'pooled': COMPARISON['arms']['pooled']})
    output = finish(launch(yaml, tmp_path, ranks=2, script='scripts/compare.py'))
    (record,) = read_lines(tmp_path / 'out' / RESULTS) or pytest.fail(output)
    assert record['world_size'] == 2 and len(record['ids']) == 30
    assert record['ids'] == straight[0][0]['ids'] and record['tokens'] == straight[0][0]['tokens']


@pytest.mark.parametrize(
    'changes, same',
    [
        ({'model': {'head': 'mlp', 'chunk_size': 256}}, True),  # as by default
        ({'progress_bar': True, 'loggers': {'console': {}}}, True),  # what is shown is not what is found
        ({'model': {'chunk_size': 64}}, False),
        ({'model': {'lora': {'r': 2}}}, False),
        ({'max_seq_len': 32}, False),
    ],
)
def test_a_fingerprint_is_of_what_a_result_depends_on(run_folder, tmp_path, changes, same):
    def fingerprint(task):
        return build_cells(load(run_folder, tmp_path, tasks={'tiny': task}))[0].fingerprint

    assert (fingerprint({**SHORT, **changes}) == fingerprint(SHORT)) is same


def test_null_leaves_a_task_or_an_arm_out_and_says_so(run_folder, tmp_path, capsys):
    path = write(run_folder, output_dir=str(tmp_path), tasks={'tiny': SHORT, 'other': SHORT}, seeds=[1])
    cells = build_cells(load_comparison(path, ['tasks.other=null', 'arms.shuffled=null']))
    assert [cell.key for cell in cells] == [('tiny', 'pooled', 1), ('tiny', 'dhrd', 1)]
    tasks, arms = capsys.readouterr().out.splitlines()
    assert tasks.endswith('tasks: left out, being null: other')
    assert arms.endswith('arms: left out, being null: shuffled')


def test_a_dot_in_the_name_of_an_arm_is_part_of_it(run_folder, tmp_path):
    arms = {'pooled': None, 'dhrd_0': {}, 'dhrd_0.3': {}}
    path = write(run_folder, output_dir=str(tmp_path), arms=arms, baseline='dhrd_0')
    assert list(load_comparison(path, ['arms.dhrd_0.3=null']).arms) == ['dhrd_0']
    assert load_comparison(path, ['arms.dhrd_0.3.seed=5']).arms == {'dhrd_0': {}, 'dhrd_0.3': {'seed': 5}}


def test_results_of_other_settings_are_refused(straight, run_folder, tmp_path):
    (tmp_path / RESULTS).write_text((straight[1] / RESULTS).read_text())
    with pytest.raises(UserError, match=r'results.jsonl: tiny pooled seed 1 was run with other settings'):
        compare(load(run_folder, tmp_path, tasks={'tiny': {**SHORT, 'max_duration': '7ba'}}))
    (tmp_path / RESULTS).write_text('{"task": "tiny"}\n')
    with pytest.raises(UserError, match=r'results.jsonl, line 1: arm: found'):
        compare(load(run_folder, tmp_path))


@pytest.mark.parametrize(
    'override, message',
    [
        ('baseline=dhrd', "baseline: found 'pooled', where "),
        ('arms.shuffled=null', "arms: found ['pooled', 'dhrd', 'shuffled'], where "),
        ('seeds=[1]', 'seeds: found [1, 2], where '),
    ],
)
def test_a_report_is_of_the_plan_that_was_run(straight, run_folder, tmp_path, capsys, override, message):
    for name in (PLAN, RESULTS):
        shutil.copy(straight[1] / name, tmp_path)
    command = [str(write(run_folder)), f'output_dir={tmp_path}', '--report']
    assert main([*command, override]) == 2
    error = capsys.readouterr().err
    assert f'{PLAN}: {message}' in error and error.count('\n') == 1
    assert not (tmp_path / 'report.md').exists()
    assert main(command) == 0
    assert (tmp_path / 'report.md').exists()


@pytest.mark.parametrize(
    'changes, message',
    [
        ({'sedes': [1]}, "sedes: Key 'sedes' not in 'Comparison'"),
        ({'seeds': ['a']}, 'seeds'),
        ({'arms': {}}, 'arms: found none; expected at least one'),
        ({'tasks': {'tiny': None}}, 'tasks: found none; expected at least one'),
        ({'baseline': 'poled'}, "baseline: found 'poled'; did you mean 'pooled'?"),
        ({'tasks': {'a/b': {}}}, "tasks: found 'a/b'; expected a name of letters"),
        ({'base': 'absent.yaml'}, 'absent.yaml: no such file'),
        ({'arms': {'pooled': {'train_loader': {'contrl': 'x'}}}}, 'arms.pooled: train_loader.contrl: unknown key'),
        ({'arms': {'pooled': {'train_loader': {'control': 'Only'}}}}, "train_loader.control: found 'Only'"),
        ({'tasks': {'tiny': {'max_duration': 'long'}}}, 'max_duration: found'),
        ({'tasks': {'tiny': {'eval_loaders': {'validation': None}}}}, 'tasks.tiny.eval_loaders: found none'),
    ],
)
def test_mistakes_are_told_before_anything_is_run(run_folder, tmp_path, capsys, changes, message):
    assert main([str(write(run_folder, output_dir=str(tmp_path / 'out'), **changes))]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count('\n') == 1
    assert not (tmp_path / 'out').exists()


def test_what_is_no_yaml_or_no_override_is_told_in_one_line(run_folder, tmp_path, capsys):
    (tmp_path / 'broken.yaml').write_text('arms: [')
    assert main([str(tmp_path / 'broken.yaml')]) == 2
    assert main([str(write(run_folder)), 'seeds']) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert 'broken.yaml: not valid YAML: ' in first
    assert second == 'error: seeds: expected an override of the form key=value'

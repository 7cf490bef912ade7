"""A comparison's YAML becomes cells, or one line that says what is wrong; committed results are of committed YAMLs."""

import shutil
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from plans import COMPARISON, SHORT, load, write
from runs import ROOT, write_run
from tiny import triplet

from dhrd_plugin import write_triplets
from dhrd_plugin.comparison import cells as room
from dhrd_plugin.comparison import charts
from dhrd_plugin.comparison.cells import main
from dhrd_plugin.comparison.charts import Chart
from dhrd_plugin.comparison.plan import build_cells, load_comparison
from dhrd_plugin.comparison.results import PLAN, RESULTS, read_lines

DATA = 'variables.data=../shared/data'  # by which the committed results were made; a path counts
NAMES = sorted(path.parent.name for path in (ROOT / 'results').glob(f'*/{RESULTS}'))


@pytest.fixture(scope='module')
def run_folder(tmp_path_factory):
    """A model, rows and the YAML of a small run."""
    return write_run(tmp_path_factory.mktemp('compare')).parent


@pytest.mark.parametrize('name', NAMES)
def test_committed_results_are_of_the_committed_yaml_and_reported_as_they_were(name, tmp_path, capsys, monkeypatch):
    """Needs no data: whether there are any is asked when a cell is about to run. What would be drawn is not."""
    cells = []
    monkeypatch.setattr(room, 'build_cells', lambda *given: cells.extend(build_cells(*given)) or cells)
    monkeypatch.setattr(charts, '_render', lambda name, title, alt, figure: Chart(name, title, alt, '<svg></svg>', b''))
    for file in (PLAN, RESULTS):
        shutil.copy(results(name).with_name(file), tmp_path)
    yaml, settings = ROOT / f'yamls/compare/{name}.yaml', [] if name == 'verdict' else [DATA]
    assert main([str(yaml), f'output_dir={tmp_path}', *settings, '--report']) == 0
    capsys.readouterr()
    assert (tmp_path / 'report.md').read_bytes() == results(name).with_name('report.md').read_bytes()
    assert (tmp_path / PLAN).read_bytes() == results(name).with_name(PLAN).read_bytes()
    found = {(line['task'], line['arm'], line['seed']): line['fingerprint'] for line in read_lines(results(name))}
    assert found == {cell.key: cell.fingerprint for cell in cells}
    # A run in a fresh clone starts with none of them.
    assert load_comparison(yaml, settings).output_dir == f'runs/compare/{name}'


def results(name: str) -> Path:
    return ROOT / 'results' / name / RESULTS


@pytest.mark.parametrize(
    'changes, same',
    [
        ({'model': {'head': 'mlp', 'chunk_size': None}}, True),  # as by default
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


@pytest.mark.parametrize('folder', ['${output_dir}/checkpoints', 'fixed', 's3://bucket/one'])
def test_no_cell_goes_on_from_the_checkpoints_of_another(run_folder, tmp_path, folder):
    def built(save_folder):
        saving = {**SHORT, 'save_folder': save_folder, 'autoresume': True}
        return build_cells(load(run_folder, tmp_path, tasks={'tiny': saving}))

    cells = built(folder)
    assert [cell.config.save_folder for cell in cells] == [str(cell.folder / 'checkpoints') for cell in cells]
    assert len({cell.config.save_folder for cell in cells}) == len(cells) == 6
    assert [cell.fingerprint for cell in cells] == [cell.fingerprint for cell in built('elsewhere')]


@pytest.mark.parametrize('changed', ['train.jsonl', 'validation.jsonl', 'rationales.jsonl', 'template.yaml'])
def test_what_a_cell_reads_has_a_hash_of_its_own(run_folder, tmp_path, changed):
    for name in ('train.jsonl', 'validation.jsonl'):
        shutil.copy(run_folder / name, tmp_path)
    (tmp_path / 'rationales.jsonl').write_text('{"idx": 1, "rationale": "so"}\n')
    (tmp_path / 'template.yaml').write_text('prompt: "{text}"\nid: idx\n')
    loader = {'source': str(tmp_path / 'train.jsonl'), 'rationales': str(tmp_path / 'rationales.jsonl')}
    task = {
        **SHORT,
        'task': str(tmp_path / 'template.yaml'),
        'train_loader': loader,
        'eval_loaders': {'validation': {'source': str(tmp_path / 'validation.jsonl')}},
    }

    def built():
        return build_cells(load(run_folder, tmp_path / 'out', tasks={'tiny': task}))[0]

    first, again = built(), built()
    assert first.data == again.data is not None
    (tmp_path / changed).write_text((tmp_path / changed).read_text() + ' \n')
    assert built().data not in (first.data, None) and built().fingerprint == first.fingerprint
    (tmp_path / changed).unlink()
    assert built().data is None


def test_shards_and_a_file_in_the_home_folder_have_a_hash_too(run_folder, tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))

    def digest(rows, **loader):
        (tmp_path / 'train.jsonl').write_text(rows)
        write_triplets([triplet(reason=len(rows))], tmp_path / 'shards' / 'train', overwrite=True)
        task = {**SHORT, 'train_loader': {'source': None, **loader}}
        return build_cells(load(run_folder, tmp_path / 'out', tasks={'tiny': task}))[0].data

    shards = {'local': '~/shards', 'split': 'train'}
    for loader in ({'source': '~/train.jsonl'}, shards, {'streams': {'one': shards}}):
        one, two = digest('one rationale', **loader), digest('another rationale', **loader)
        assert None not in (one, two) and one != two and digest('one rationale', **loader) == one


def test_null_leaves_a_task_or_an_arm_out_and_says_so(run_folder, tmp_path, capsys):
    path = write(run_folder, output_dir=str(tmp_path), tasks={'tiny': SHORT, 'other': SHORT}, seeds=[1])
    overrides = ['tasks.other=null', 'arms.shuffled=null']
    cells = build_cells(load_comparison(path, overrides))
    assert [cell.key for cell in cells] == [('tiny', 'pooled', 1), ('tiny', 'dhrd', 1)]
    tasks, arms = capsys.readouterr().out.splitlines()
    assert tasks.endswith('tasks: left out, being null: other')
    assert arms.endswith('arms: left out, being null: shuffled')
    load_comparison(path, overrides, quiet=True)
    assert capsys.readouterr().out == ''


def test_a_dot_in_the_name_of_an_arm_is_part_of_it(run_folder, tmp_path):
    arms = {'pooled': None, 'dhrd_0': {}, 'dhrd_0.3': {}}
    path = write(run_folder, output_dir=str(tmp_path), arms=arms, baseline='dhrd_0')
    assert list(load_comparison(path, ['arms.dhrd_0.3=null']).arms) == ['dhrd_0']
    assert load_comparison(path, ['arms.dhrd_0.3.seed=5']).arms == {'dhrd_0': {}, 'dhrd_0.3': {'seed': 5}}


@pytest.mark.parametrize(
    'changes, message',
    [
        ({'sedes': [1]}, "sedes: unknown key; did you mean 'seeds'?"),
        ({'seeds': ['a']}, 'seeds'),
        ({'arms': {}}, 'arms: found none; expected at least one'),
        ({'tasks': {'tiny': None}}, 'tasks: found none; expected at least one'),
        ({'baseline': 'poled'}, "baseline: found 'poled'; did you mean 'pooled'?"),
        ({'tasks': {'a/b': {}}}, "tasks: found 'a/b'; expected a name of letters"),
        ({'base': 'absent.yaml'}, 'absent.yaml: no such file'),
        ({'arms': {'pooled': {'train_loader': {'contrl': 'x'}}}}, 'arms.pooled: train_loader.contrl: unknown key'),
        ({'arms': {'pooled': {'train_loader': {'control': 'Only'}}}}, "train_loader.control: found 'Only'"),
        ({'tasks': {'tiny': {'max_duration': 'long'}}}, 'max_duration: found'),
        ({'seeds': [1, 2, 1]}, 'seeds: found [1, 2, 1]; expected each once'),
        ({'arms': {'pooled': {'seed': 5}}}, 'arms.pooled.seed: found 5; expected none, as each cell has its own'),
        ({'arms': {'pooled': {'run_name': 'x'}}}, "arms.pooled.run_name: found 'x'; expected none"),
        ({'tasks': {'tiny': {'output_dir': 'x'}}}, "tasks.tiny.output_dir: found 'x'; expected none"),
        ({'tasks': {'tiny': {'eval_loaders': {'validation': None}}}}, 'tasks.tiny.eval_loaders: found none'),
    ],
)
def test_mistakes_are_told_before_anything_is_run(run_folder, tmp_path, capsys, changes, message):
    assert main([str(write(run_folder, output_dir=str(tmp_path / 'out'), **changes))]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count('\n') == 1
    assert not (tmp_path / 'out').exists()


def test_a_comparison_without_a_base_is_told_in_one_line(run_folder, tmp_path, capsys):
    path = tmp_path / 'comparison.yaml'
    OmegaConf.save(OmegaConf.create({key: value for key, value in COMPARISON.items() if key != 'base'}), path)
    assert main([str(path)]) == 2
    error = capsys.readouterr().err
    assert 'comparison.yaml: base: ' in error and error.count('\n') == 1


def test_what_is_no_yaml_or_no_override_is_told_in_one_line(run_folder, tmp_path, capsys):
    (tmp_path / 'broken.yaml').write_text('arms: [')
    assert main([str(tmp_path / 'broken.yaml')]) == 2
    assert main([str(write(run_folder)), 'seeds']) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert 'broken.yaml: not valid YAML: ' in first
    assert second == 'error: seeds: expected an override of the form key=value'

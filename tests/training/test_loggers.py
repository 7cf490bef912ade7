"""A run tracked by Composer's loggers from the YAML, on two ranks, into a real MLflow server; and what goes wrong."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from browser import open_browser
from runs import EPOCH, RowRecorder, finish, launch, write_run
from tiny import WORDS
from trackers import ask, mlflow_server, read_tensorboard, read_wandb
from transformers.utils import flatten_dict

import dhrd_plugin.training.mlflow_logger
import dhrd_plugin.training.run
from dhrd_plugin import load_config, train
from dhrd_plugin.errors import UserError
from dhrd_plugin.predict import main as predict
from dhrd_plugin.training.config import written
from dhrd_plugin.training.loggers import build_loggers, credentials_to_environment, mlflow_run, without_secret_arguments
from dhrd_plugin.training.mlflow_logger import MLFlowLogger, fit_name

pytestmark = pytest.mark.usefixtures('one_thread')

SERIES = ('loss/train/total', 'loss/train/classification', 'loss/train/reasoning', 'dhrd/alpha')
SECRET = 'hunter2'
TEXTS = [' '.join(WORDS[start : start + 2 + start % 5]) for start in range(0, 40, 3)]


@pytest.fixture(scope='module')
def tracked(tmp_path_factory):
    """One run of two ranks with every logger, and secrets in its YAML, on its command line and in its environment."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('INNOCENT', SECRET)
        yield from _tracked(tmp_path_factory)


def _tracked(tmp_path_factory):
    folder = tmp_path_factory.mktemp('tracked')
    path = write_run(folder / 'run')
    settings = yaml.safe_load(path.read_text())
    variables = {'db_password': SECRET, 'innocent': '${oc.env:INNOCENT}', 'site': 'at ${variables.innocent}'}
    settings |= {'variables': variables, 'log_to_console': True, 'max_duration': '1ep'}
    settings['loggers'] |= {
        'mlflow': {'experiment_name': 'dhrd', 'log_system_metrics': False},
        'tensorboard': {'log_dir': 'tb'},
        'wandb': {'project': 'dhrd', 'init_kwargs': {'mode': 'offline', 'dir': str(folder)}},
    }
    path.write_text(yaml.safe_dump(settings))
    with mlflow_server(folder) as address:
        uri = f'loggers.mlflow.tracking_uri=http://user:{SECRET}@{address}'
        output = finish(process := launch(path, folder, uri, ranks=2))
        assert process.returncode == 0, output[-3000:]
        experiment = ask(address, 'experiments/get-by-name?experiment_name=dhrd')['experiment']['experiment_id']
        yield SimpleNamespace(
            folder=folder,
            address=address,
            output=output,
            experiment=experiment,
            runs=ask(address, 'runs/search', experiment_ids=[experiment])['runs'],
            hyperparameters=flatten_dict(written(load_config(path, [uri]))),
            log=(folder / 'out' / 'log-rank0.txt').read_text(),
        )


def logged(log: str, name: str) -> dict[int, float]:
    """A series of the file log."""
    found = re.findall(rf'\[batch=(\d+)\]: {re.escape(name)}: (\S+)', log)
    return {int(step): float(value) for step, value in found}


def test_mlflow_has_one_run_with_parameters_losses_alpha_and_metrics(tracked):
    (run,) = tracked.runs
    assert run['info']['status'] == 'FINISHED' and run['info']['run_name'] == 'tiny'
    params = {item['key']: item['value'] for item in run['data']['params']}
    assert {name: params.get(name) for name in tracked.hyperparameters} == {
        name: str(value) for name, value in tracked.hyperparameters.items()
    }
    assert params['variables.db_password'] == '***'
    assert params['variables.site'] == 'at ${oc.env:INNOCENT}'
    metrics = {item['key'] for item in run['data']['metrics']}
    assert {*SERIES, 'metrics/validation/MulticlassAccuracy', 'metrics/train/MulticlassAccuracy'} <= metrics
    for name in SERIES:
        query = f'metrics/get-history?run_id={run["info"]["run_id"]}&metric_key={name}'
        history = {item['step']: item['value'] for item in ask(tracked.address, query)['metrics']}
        written = logged(tracked.log, name)
        assert len(written) == EPOCH if 'reasoning' not in name else len(written) >= 10
        # A value that did not change is not sent again.
        assert history == pytest.approx({step: written[step] for step in history}, abs=1e-4)
        assert len(history) >= len(set(written.values()))


def test_the_logged_model_predicts_as_the_export_does(tracked, capsys):
    (run,) = tracked.runs
    uri, script = f'runs:/{run["info"]["run_id"]}/slim', Path(__file__).parents[1] / 'serve_logged.py'
    env = {**os.environ, 'MLFLOW_TRACKING_URI': f'http://{tracked.address}', 'OMP_NUM_THREADS': '1'}
    command = [sys.executable, str(script), uri, *TEXTS]
    done = subprocess.run(command, env=env, cwd=tracked.folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert predict([str(tracked.folder / 'out' / 'slim'), *TEXTS]) == 0
    expected = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row['label'] for row in rows] == [row['label'] for row in expected]
    for row, other in zip(rows, expected, strict=True):
        assert row['probabilities'] == pytest.approx(other['probabilities'], abs=1e-4)


def test_the_logged_model_has_a_signature_and_no_pickle(tracked):
    (run,) = tracked.runs
    files = ask(tracked.address, f'artifacts/list?run_id={run["info"]["run_id"]}&path=slim')['files']
    assert 'slim/MLmodel' in {item['path'] for item in files}
    (path,) = (tracked.folder / 'artifacts').rglob('MLmodel')
    signature = yaml.safe_load(path.read_text())['signature']
    assert [item['type'] for item in json.loads(signature['inputs'])] == ['string']
    label, probabilities = json.loads(signature['outputs'])
    assert label['name'] == 'label' and set(probabilities['properties']) == {'yes', 'no', 'maybe'}
    assert not [item for item in path.parent.rglob('*') if item.suffix in ('.pkl', '.pt', '.bin')]


def test_the_page_of_mlflow_lists_the_run(tracked, tmp_path):
    (run,) = tracked.runs
    with open_browser(tmp_path / 'profile') as browser:
        browser.implicitly_wait(60)
        page = f'http://localhost:{tracked.address.split(":")[1]}/#/experiments/{tracked.experiment}'
        browser.get(page)
        browser.find_element('link text', 'tiny')
        browser.get(f'{page}/runs/{run["info"]["run_id"]}')
        for text in ('loss/train/reasoning', 'algorithms.auxiliary_reasoning_loss.schedule.name'):
            browser.find_element('xpath', f'//*[contains(text(), "{text}")]')


def test_tensorboard_has_the_scalars_of_rank_0_alone(tracked):
    folder = tracked.folder / 'tb' / 'tiny'
    found = read_tensorboard(folder)
    for name in SERIES:
        assert found[name] == pytest.approx(logged(tracked.log, name), abs=1e-4), name
    assert len(found['metrics/validation/MulticlassAccuracy']) == 1
    processes = {path.name.split('.')[-2] for path in folder.rglob('events.out.tfevents.*')}
    assert len(processes) == 1


def test_wandb_offline_has_config_and_history(tracked):
    config, history = read_wandb(tracked.folder)
    assert {name: config.get(name) for name in tracked.hyperparameters} == tracked.hyperparameters
    for name in SERIES:
        found = {step: row[name] for step, row in history.items() if name in row}
        assert found == pytest.approx(logged(tracked.log, name), abs=1e-4), name


def test_hyperparameters_are_logged_once(tracked):
    for name in ('max_duration', 'algorithms.auxiliary_reasoning_loss.schedule.name'):
        assert tracked.log.count(f'[hyperparameter]: {name}: ') == 1
        assert len(re.findall(rf'^{re.escape(name)}: ', tracked.output, re.M)) == 1


def test_no_tracker_stored_a_secret(tracked):
    assert SECRET not in tracked.output
    stored = [path for path in tracked.folder.rglob('*') if path.is_file() and path.name != 'tiny.yaml']
    assert len(stored) > 20
    assert not [path for path in stored if SECRET.encode() in path.read_bytes()]


def test_the_run_ends_by_saying_where_mlflow_has_it(tracked):
    (run,) = tracked.runs
    where = f'/#/experiments/{tracked.experiment}/runs/{run["info"]["run_id"]}'
    assert f'mlflow: http://{tracked.address}{where}\n' in tracked.output


# ------------------------------------------------------------------------------- in one process


@pytest.fixture
def small(tmp_path, monkeypatch):
    """The settings of a small run into a local store, and the store's client."""
    from mlflow import MlflowClient

    monkeypatch.chdir(tmp_path)
    store = f'file://{tmp_path}/mlruns'
    mlflow = f'loggers={{mlflow: {{tracking_uri: "{store}", experiment_name: dhrd, log_system_metrics: false}}}}'
    path = write_run(tmp_path / 'run')
    client = MlflowClient(store)

    def runs():
        experiment = client.get_experiment_by_name('dhrd')
        return [] if experiment is None else list(client.search_runs([experiment.experiment_id]))

    return SimpleNamespace(config=lambda *more: load_config(path, [mlflow, *more]), runs=runs, client=client)


def test_a_stopped_run_goes_on_in_its_mlflow_run(small, monkeypatch):
    monkeypatch.setattr(dhrd_plugin.training.run, 'TokenCounter', RowRecorder)
    monkeypatch.setattr(RowRecorder, 'stop_at', 10)
    with pytest.raises(SystemExit):
        train(small.config('max_duration=1ep'))
    (run,) = small.runs()
    assert run.info.status == 'KILLED'
    monkeypatch.setattr(RowRecorder, 'stop_at', None)
    # What changed since is not refused: MLflow keeps the first value of a parameter.
    register = 'callbacks.drop_reasoning_head.mlflow_registered_model_name=tiny'
    train(small.config('max_duration=1ep', 'seed=17', 'dist_timeout=500', register)).close()
    (same,) = small.runs()
    assert same.info.run_id == run.info.run_id and same.info.status == 'FINISHED'
    history = small.client.get_metric_history(run.info.run_id, 'loss/train/total')
    assert {item.step for item in history} == set(range(EPOCH))
    (version,) = small.client.search_model_versions("name = 'tiny'")
    assert version.run_id == run.info.run_id


def test_a_run_that_fails_is_failed_in_mlflow(small, monkeypatch):
    def fail(self, state, logger):
        raise UserError('a disk that is full')

    monkeypatch.setattr(dhrd_plugin.callbacks.drop_reasoning_head.DropReasoningHead, 'fit_end', fail)
    with pytest.raises(UserError):
        train(small.config('max_duration=2ba', 'save_folder=null', 'autoresume=false'))
    assert [run.info.status for run in small.runs()] == ['FAILED']


def test_mlflow_false_logs_no_model(small):
    options = ['max_duration=2ba', 'save_folder=null', 'autoresume=false', 'eval_interval=0ba']
    train(small.config(*options, 'callbacks.drop_reasoning_head.mlflow=false')).close()
    (run,) = small.runs()
    assert not small.client.list_artifacts(run.info.run_id)


SHORT = ('max_duration=2ba', 'save_folder=null', 'autoresume=false', 'callbacks.drop_reasoning_head.mlflow=false')


def test_a_set_whose_name_mlflow_does_not_take_is_logged_under_one_that_it_takes(small):
    train(small.config(*SHORT, 'eval_loaders={"dev@2024 (hard), v1": "${eval_loaders.validation}"}')).close()
    (run,) = small.runs()
    assert run.info.status == 'FINISHED'
    assert 'eval_loaders.dev_2024 _hard__ v1.source' in run.data.params and len(run.data.params) > 60
    assert {'metrics/dev_2024 _hard__ v1/MulticlassAccuracy', 'loss/train/total'} <= set(run.data.metrics)


def test_two_sets_of_one_name_in_mlflow_are_refused(small):
    with pytest.raises(UserError) as error:
        train(
            small.config(
                *SHORT, 'eval_loaders={"a@": "${eval_loaders.validation}", "a#": "${eval_loaders.validation}"}'
            )
        )
    assert 'loggers.mlflow: eval_loaders.a@.source and eval_loaders.a#.source would be one name' in str(error.value)
    assert [run.info.status for run in small.runs()] == ['FAILED']


@pytest.mark.parametrize(
    ('name', 'fit'),
    [
        ('variables.dev@2024', 'variables.dev_2024'),
        ('metrics/val/Accuracy', 'metrics/val/Accuracy'),
        ('a//b', 'a__b'),
        ('../a', '___a'),
        ('/a', '_a'),
        ('é ü', 'é ü'),
        ('a' * 300, 'a' * 250),
    ],
)
def test_a_name_as_mlflow_takes_it(name, fit):
    from mlflow.utils.validation import _validate_metric_name

    assert fit_name(name) == fit
    _validate_metric_name(fit)


@pytest.mark.parametrize('part', ['parameters', 'metrics'])
def test_what_mlflow_does_not_take_is_told_and_the_run_is_not_finished(small, monkeypatch, capfd, part):
    if part == 'parameters':
        monkeypatch.setattr(dhrd_plugin.training.mlflow_logger, 'fit_name', lambda name: f'{name}@')
        with pytest.raises(UserError, match=r'^loggers.mlflow: MLflow does not take the parameters: .*@'):
            train(small.config(*SHORT))
    else:
        monkeypatch.setattr(MLFlowLogger, 'rename', lambda self, name: f'{name}@')
        train(small.config(*SHORT)).close()
        line = 'warning: loggers.mlflow: the run lacks what MLflow did not take: '
        assert capfd.readouterr().err.count(line) == 1
    assert [run.info.status for run in small.runs()] == ['FAILED']


@pytest.mark.parametrize('name', ['mlflow', 'tensorboard', 'wandb'])
def test_a_missing_package_is_refused_before_the_data(small, name, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)  # importing it fails, as where it is not installed
    monkeypatch.delitem(sys.modules, 'torch.utils.tensorboard', raising=False)
    monkeypatch.setattr(dhrd_plugin.training.run, 'find_streams', None)
    with pytest.raises(UserError) as error:
        train(small.config(f'loggers={{{name}: {{}}}}', 'autoresume=false'))
    expected = f"loggers.{name}: a package that it needs is not installed; pip install 'dhrd-plugin[{name}]'"
    assert str(error.value) == expected


def test_a_server_out_of_reach_is_refused_before_the_data(small, monkeypatch):
    monkeypatch.setenv('MLFLOW_HTTP_REQUEST_MAX_RETRIES', '0')
    monkeypatch.setattr(dhrd_plugin.training.run, 'find_streams', None)
    for name in ('USERNAME', 'PASSWORD'):  # restored after the test
        monkeypatch.setenv(f'MLFLOW_TRACKING_{name}', '')
    with pytest.raises(UserError, match=r'^loggers.mlflow: .*http://127.0.0.1:9/.* failed') as error:
        train(small.config(f'loggers.mlflow.tracking_uri=http://user:{SECRET}@127.0.0.1:9', 'autoresume=false'))
    assert '\n' not in str(error.value) and SECRET not in str(error.value)
    assert os.environ['MLFLOW_TRACKING_PASSWORD'] == SECRET


@pytest.mark.parametrize(
    ('override', 'expected'),
    [
        ('loggers.mlflow.experiment=dhrd', "loggers.mlflow.experiment: unknown key; did you mean 'experiment_name'?"),
        ('loggers.mlfow={}', "loggers.mlfow: unknown name 'mlfow'; did you mean 'mlflow'?"),
        ('loggers.wandb={project: 3}', 'loggers.wandb.project: found 3; expected'),
        ('loggers.tensorboard={flush_interval: often}', "loggers.tensorboard.flush_interval: found 'often'"),
    ],
)
def test_arguments_that_a_logger_does_not_have_are_refused(small, override, expected):
    with pytest.raises(UserError) as error:
        small.config(override)
    assert expected in str(error.value) and '\n' not in str(error.value)


def test_the_model_without_the_logger_is_refused(small):
    overrides = ['loggers=null', 'callbacks.drop_reasoning_head.mlflow=true', 'save_folder=null', 'autoresume=false']
    with pytest.raises(UserError, match=r'^drop_reasoning_head.mlflow: found without a logger of MLflow'):
        train(small.config(*overrides))


@pytest.mark.parametrize(
    ('address', 'kept'),
    [('https://me:a%40b@host:1/p', 'https://host:1/p'), ('postgresql://me:x@host/db', None), ('file:///tmp/a', None)],
)
def test_credentials_of_a_server_go_where_mlflow_does_not_print_them(address, kept, monkeypatch):
    for name in ('USERNAME', 'PASSWORD'):
        monkeypatch.setenv(f'MLFLOW_TRACKING_{name}', '')
    assert credentials_to_environment(address) == (kept or address)
    found = (os.environ['MLFLOW_TRACKING_USERNAME'], os.environ['MLFLOW_TRACKING_PASSWORD'])
    assert found == (('me', 'a@b') if kept else ('', ''))


@pytest.mark.parametrize(
    'address', ['http://bob:hunter2@host:5000', 'https://hunter2@host', 'postgresql://b:hunter2@h/d']
)
def test_an_address_is_told_without_its_credentials(address):
    logger = object.__new__(MLFlowLogger)  # no server is asked
    logger.tracking_uri, logger._experiment_id, logger._run_id = address, '1', 'abc'
    told = mlflow_run(SimpleNamespace(destinations=[logger]))
    assert 'abc' in told and 'hunter2' not in told


def test_credentials_in_the_environment_go_there_as_well(small, monkeypatch):
    for name in ('USERNAME', 'PASSWORD'):
        monkeypatch.setenv(f'MLFLOW_TRACKING_{name}', '')
    monkeypatch.setenv('MLFLOW_TRACKING_URI', 'http://bob:hunter2@localhost:9')
    monkeypatch.setattr('dhrd_plugin.training.registry.build', lambda *_: os.environ['MLFLOW_TRACKING_URI'])
    assert build_loggers(small.config('loggers={mlflow: {}}'), False)[-1] == 'http://localhost:9'
    assert os.environ['MLFLOW_TRACKING_PASSWORD'] == 'hunter2'


def test_arguments_as_they_may_be_stored():
    given = [
        *('run.yaml', 'seed=3', 'variables={hf_token: x, a: 1}', 'loggers.mlflow.tracking_uri=http://u:p@host', '-h'),
        *('variables.a=[hunter2', 'variables.site=${oc.env:SITE}', 'variables.pin=postgresql://h/db?password=hunter2'),
    ]
    assert without_secret_arguments(given) == [
        'run.yaml',
        'seed=3',
        'variables=***',
        'loggers.mlflow.tracking_uri=***',
        '-h',
        'variables.a=***',
        'variables.site=${oc.env:SITE}',
        'variables.pin=***',
    ]

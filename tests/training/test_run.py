"""The whole run, from the YAML to the export: on the packaged model cut to its first two layers, or one of its kind."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from configs import RANDOM
from forks import Popen, run_ranks
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from dhrd_plugin import load_config, train, write_triplets
from dhrd_plugin.errors import UserError
from dhrd_plugin.evaluate import report_on
from dhrd_plugin.export.load import Classifier, load_classifier
from dhrd_plugin.predict import main
from dhrd_plugin.redact import without_secrets
from dhrd_plugin.training.checks import check_fsdp

SMALL = [
    'model.config_overrides={num_hidden_layers: 2}',
    'eval_loaders.contrast=null',
    'log_to_console=false',
    'max_duration=3ba',
]
SERIES = ('loss/train/total', 'loss/train/classification', 'loss/train/reasoning', 'dhrd/alpha', 'dhrd/beta')


def packaged(root: Path, out: Path, *overrides: str):
    return load_config(root / 'yamls' / 'rte.yaml', [*SMALL, f'output_dir={out}', *overrides])


def small_config(root: Path, out: Path, *overrides: str):
    return packaged(root, out, *RANDOM, *overrides)


@pytest.fixture(scope='module')
def run(root, tmp_path_factory):
    """One run of the shipped YAML; the trainer and its folder."""
    out = tmp_path_factory.mktemp('run')
    return train(packaged(root, out, 'loggers.in_memory={}')), out


def test_the_summary_says_what_was_done(run):
    _, out = run
    summary = json.loads((out / 'summary.json').read_text())
    assert 0 <= summary['metrics']['validation']['MulticlassAccuracy'] <= 1
    assert summary['rows'] == 3 * 8 and summary['steps'] == 3
    assert summary['tokens'] > 24 * 20 and summary['rationales_cut'] == 0
    assert {'data', 'model', 'fit'} <= set(summary['seconds'])
    assert summary['versions']['mosaicml'] == '0.32.1'
    assert summary['config']['algorithms']['auxiliary_reasoning_loss']['alpha'] > 0
    assert summary['export'] == str(out / 'slim')


def test_all_five_series_are_logged(run):
    trainer, _ = run
    for name in SERIES:
        values = logged(trainer, name)
        assert len(values) == 3 and all(math.isfinite(value) for value in values), name


@pytest.mark.parametrize('plain_torch', [False, True])
def test_the_export_has_the_logits_of_the_live_model_on_every_validation_row(run, plain_torch):
    trainer, out = run
    if plain_torch:
        model = AutoModelForSequenceClassification.from_pretrained(out / 'slim', trust_remote_code=True).eval()
        tokenizer = AutoTokenizer.from_pretrained(out / 'slim')
    else:
        classifier = load_classifier(out / 'slim')
        model, tokenizer = classifier.model, classifier.tokenizer
    assert model.config.id2label == {0: 'entailment', 1: 'not_entailment'}
    live = trainer.state.model.eval()
    loader = trainer.state.evaluators[0].dataloader.dataloader
    texts = [row['input_text'] for row in (loader.dataset[i] for i in range(len(loader.dataset)))]
    assert len(texts) == 150
    with torch.inference_mode():
        expected = torch.cat([live.eval_forward(batch) for batch in loader])
    found = Classifier(model, tokenizer, [], None).predict_proba(texts)
    torch.testing.assert_close(found, expected.softmax(-1), atol=1e-5, rtol=0)


def test_predict_prints_a_label_for_each_text(run, capsys, tmp_path):
    _, out = run
    rows = tmp_path / 'rows.txt'
    rows.write_text('{"premise": "It rained.", "hypothesis": "It was wet."}\n{"input_text": "A text."}\n')
    assert main([str(out / 'slim'), '--input', str(rows)]) == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(answers) == 2
    assert set(answers[0]['probabilities']) == {'entailment', 'not_entailment'}
    assert main([str(tmp_path), 'text']) == 2
    assert 'config.json' in capsys.readouterr().err


def test_markers_as_added_tokens_are_trained_and_exported(root, tmp_path):
    overrides = ['markers={as_tokens: true, answer: <ANS>}', 'model.lora=null', 'eval_interval=0ba']
    trainer = train(small_config(root, tmp_path, *overrides))
    model = trainer.state.model
    markers = model.tokenizer.convert_tokens_to_ids(['<REASON>', '<ANS>'])
    assert markers == [len(model.tokenizer) - 2, len(model.tokenizer) - 1]
    # Both began as the mean of all rows, so they differ, and differ from it, by what they have learnt.
    for weight in (model.network.lm_head.weight, model.network.backbone.get_input_embeddings().weight):
        reason, answer = weight[markers].detach()
        assert not torch.equal(reason, answer)
    exported = load_classifier(tmp_path / 'slim')
    tokenizer = exported.tokenizer
    assert tokenizer.convert_tokens_to_ids(['<REASON>', '<ANS>']) == markers
    loader = trainer.state.train_dataloader
    row = loader.dataset[0]
    live = model.eval().eval_forward(loader.collate_fn([row])).detach().softmax(-1)
    torch.testing.assert_close(exported.predict_proba([row]), live, atol=1e-5, rtol=0)


def test_without_the_algorithm_it_is_the_pooled_baseline(root, tmp_path):
    trainer = train(small_config(root, tmp_path, 'algorithms.auxiliary_reasoning_loss=null'))
    assert (tmp_path / 'slim' / 'model.safetensors').is_file()
    seen = trainer.state.train_dataloader.collate_fn([trainer.state.train_dataloader.dataset[0]])
    assert 'reasoning_labels' not in seen
    assert 'loss/train/reasoning' not in trainer.state.total_loss_dict


def test_two_runs_of_one_seed_are_the_same(root, tmp_path):
    folders = [tmp_path / name for name in 'ab']
    for folder in folders:
        train(small_config(root, folder))
    first, second = [json.loads((folder / 'summary.json').read_text())['metrics'] for folder in folders]
    assert first == second
    weights = [(folder / 'slim' / 'model.safetensors').read_bytes() for folder in folders]
    assert weights[0] == weights[1]


def logged(trainer, name: str) -> list[float]:
    (logger,) = [logger for logger in trainer.logger.destinations if hasattr(logger, 'data')]
    return [float(value) for _, value in logger.data[name]]


def test_alpha_follows_a_schedule_from_the_yaml_and_cuts_are_counted(root, tmp_path):
    schedule = 'algorithms.auxiliary_reasoning_loss.schedule={name: linear, alpha_f: 0.0, t_max: 0.5dur}'
    overrides = ['loggers.in_memory={}', 'max_duration=4ba', 'max_seq_len=75', 'eval_interval=0ba', schedule]
    trainer = train(small_config(root, tmp_path, *overrides))
    assert logged(trainer, 'dhrd/alpha') == pytest.approx([0.3, 0.15, 0.0, 0.0])
    assert len(logged(trainer, 'loss/train/reasoning')) == 2
    assert len(logged(trainer, 'loss/train/classification')) == 4
    summary = json.loads((tmp_path / 'summary.json').read_text())
    assert 0 < summary['rationales_cut'] <= summary['rationale_tokens_cut']
    assert logged(trainer, 'dhrd/rationales_cut')[-1] == summary['rationales_cut']


@pytest.mark.parametrize('kind', ['local', 'remote', 'streams'])
def test_training_from_shards(root, tmp_path, kind):
    rows = [
        {'id': str(i), 'input_text': f'Row {i} is here.', 'label': 'entailment', 'rationale': 'It is.'}
        for i in range(12)
    ]
    for name in 'ab':
        write_triplets(rows, tmp_path / name)
    where = {
        'local': [f'train_loader.local={tmp_path}/a'],
        'remote': [f'train_loader.remote={tmp_path}/a', f'train_loader.local={tmp_path}/cache'],
        'streams': [
            f'train_loader.streams={{a: {{local: {tmp_path}/a, proportion: 0.25}}, '
            f'b: {{local: {tmp_path}/b, proportion: 0.75}}}}'
        ],
    }[kind]
    trainer = train(small_config(root, tmp_path, 'train_loader.source=null', 'eval_interval=0ba', *where))
    assert trainer.state.train_dataloader.dataset.num_samples == (24 if kind == 'streams' else 12)
    assert set(trainer.state.total_loss_dict) == set(SERIES[:3])


@pytest.mark.parametrize('weights', [None, 'reasoning', 'both'])
def test_weights_from_the_yaml_and_the_rationales_file(root, sample, tmp_path, weights):
    """A teacher's rating of 0 leaves the rationale out; the label too, where both losses are weighed."""
    lines = (sample / 'train.jsonl').read_text().splitlines()[:8]
    rows = [json.loads(line) for line in lines]
    (tmp_path / 'train.jsonl').write_text('\n'.join(lines))
    (tmp_path / 'rated.jsonl').write_text(
        '\n'.join(json.dumps({'idx': row['idx'], 'rationale': row['rationale'], 'weight': 0}) for row in rows)
    )
    overrides = [f'train_loader.source={tmp_path}/train.jsonl', f'train_loader.rationales={tmp_path}/rated.jsonl']
    overrides += [f'train_loader.weights={weights or "null"}', 'max_duration=1ba', 'eval_interval=0ba']
    overrides += ['callbacks.drop_reasoning_head=null', 'loggers.in_memory={}']
    trainer = train(small_config(root, tmp_path, *overrides))
    (classification,), (reasoning,) = (logged(trainer, f'loss/train/{x}') for x in ('classification', 'reasoning'))
    assert (classification == 0) == (weights == 'both')
    assert (reasoning == 0) == (weights is not None)


def write_rows(path, rows):
    path.write_text(''.join(f'{json.dumps(row)}\n' for row in rows))
    return path


def test_votes_train_from_the_rationales_file_and_rows_without_a_label_are_not_counted(root, sample, tmp_path):
    """Votes for the other label, at full weight, train as the other labels do; one row has no label of its own."""
    rows = [json.loads(line) for line in (sample / 'train.jsonl').read_text().splitlines()[:8]]
    names = ['entailment', 'not_entailment']
    other = {row['idx']: names[row['label'] == names[0]] for row in rows}
    flipped = write_rows(tmp_path / 'flipped.jsonl', [{**row, 'label': other[row['idx']]} for row in rows])
    for row in rows:
        del row['rationale']
    rows[0]['label'] = None
    given = write_rows(tmp_path / 'train.jsonl', rows)
    told = [
        {'idx': idx, 'probabilities': {name: float(name == label) for name in names}} for idx, label in other.items()
    ]
    votes = write_rows(tmp_path / 'votes.jsonl', told)
    evaluated = write_rows(tmp_path / 'val.jsonl', [{**row, 'probabilities': [0.5, 0.5]} for row in rows])
    same = ['max_duration=1ba', 'algorithms.auxiliary_reasoning_loss=null', 'loggers.in_memory={}', 'scheduler=null']
    same += [f'eval_loaders.validation.source={evaluated}', 'model.soft_label_weight=1']
    losses = []
    for source, rationales in ((given, votes), (flipped, 'null')):
        loader = [f'train_loader.source={source}', f'train_loader.rationales={rationales}']
        trainer = train(small_config(root, tmp_path / source.stem, *same, *loader))
        losses += logged(trainer, 'loss/train/total')
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    report = report_on(tmp_path / 'flipped' / 'slim', [evaluated])
    accuracy = float(trainer.state.eval_metric_values['MulticlassAccuracy'])
    assert report['rows'] == 7 and report['metrics']['accuracy'] == pytest.approx(accuracy, abs=1e-6)


def test_an_evaluation_set_without_any_label_is_refused(root, tmp_path):
    row = {'idx': 1, 'premise': 'a', 'hypothesis': 'b', 'probabilities': [0.5, 0.5]}
    rows = write_rows(tmp_path / 'val.jsonl', [row])
    with pytest.raises(UserError, match=r'^eval_loaders.validation: .*: found no row with a label to evaluate on$'):
        train(small_config(root, tmp_path, f'eval_loaders.validation.source={rows}'))


def test_rows_without_rationales_train_the_classification_head_and_say_so(root, tmp_path):
    write_triplets([{'id': str(i), 'input_text': f'Row {i}.', 'label': 'entailment'} for i in range(8)], tmp_path / 'a')
    shards = ['train_loader.source=null', f'train_loader.local={tmp_path}/a']
    overrides = [*shards, 'eval_interval=0ba', 'max_duration=1ba']
    with pytest.warns(UserWarning, match='TripletCollator'):
        trainer = train(small_config(root, tmp_path, *overrides))
    assert trainer.state.total_loss_dict['loss/train/reasoning'] == 0


@pytest.mark.parametrize('ranks', [1, 2])
def test_the_composer_command(root, tmp_path, ranks):
    """277 - not 278 or 288 - rows are evaluated on two ranks."""
    rows = tmp_path / 'odd.jsonl'
    lines = (root / 'dhrd_plugin' / 'data' / 'sample' / 'validation.jsonl').read_text().splitlines()
    rows.write_text('\n'.join(lines[:31]) + '\n')
    own = [f'output_dir={tmp_path}', f'eval_loaders.validation.source={rows}', 'log_to_console=true']
    overrides = [*SMALL, *RANDOM, *own]
    start = subprocess.Popen if ranks == 2 else Popen  # which forks
    done = run_ranks(ranks, 'scripts/train.py', 'yamls/rte.yaml', *overrides, start=start, cwd=root)
    assert f'dhrd predict {tmp_path}/slim' in done.stdout
    summary = json.loads((tmp_path / 'summary.json').read_text())
    assert summary['world_size'] == ranks
    correct = summary['metrics']['validation']['MulticlassAccuracy'] * 31
    assert abs(correct - round(correct)) < 1e-4 and 0 < correct < 31


def test_real_rte_by_overrides_alone(root, shared, tmp_path):
    trainer = train(
        small_config(
            root,
            tmp_path,
            f'train_loader.source={shared}/superglue/RTE/train.jsonl',
            f'train_loader.rationales={shared}/rationales/rte_train.jsonl',
            f'eval_loaders.validation.source={shared}/superglue/RTE/val.jsonl',
            'eval_interval=0ba',
            'max_duration=2ba',
        )
    )
    assert trainer.state.train_dataloader.dataset.num_samples == 2490
    assert set(trainer.state.total_loss_dict) == set(SERIES[:3])


@pytest.mark.parametrize(
    ('on_gpu', 'overrides', 'expected'),
    [
        (False, ['fsdp_config={version: 1}'], 'fsdp_config.version: found 1 on a CPU; expected 2'),
        (True, ['fsdp_config={version: 2}', 'device_train_microbatch_size=auto'], "found 'auto' with FSDP2"),
        (True, ['fsdp_config={version: 1, use_orig_params: false}'], 'fsdp_config.use_orig_params: found false'),
        (True, ['fsdp_config={version: 2, sync: true}'], 'fsdp_config.sync: unknown key of FSDP2Config'),
    ],
)
def test_limits_of_fsdp(root, tmp_path, monkeypatch, on_gpu, overrides, expected):
    monkeypatch.setattr('composer.utils.dist.get_world_size', lambda: 2)
    with pytest.raises(UserError) as error:
        check_fsdp(small_config(root, tmp_path, *overrides), on_gpu)
    assert expected in str(error.value)


def test_secrets_are_not_written():
    settings = {
        'loggers': {'mlflow': {'tracking_uri': 'https://user:pass@host/api', 'hf_token': 'hf_1', 'experiment': 'rte'}},
        'tokenizer': {'kwargs': {'pad_token': '<pad>'}, 'list': [{'api_key': 'k', 'aws_secret_access_key': 's'}]},
    }
    assert without_secrets(settings) == {
        'loggers': {'mlflow': {'tracking_uri': 'https://***@host/api', 'hf_token': '***', 'experiment': 'rte'}},
        'tokenizer': {'kwargs': {'pad_token': '<pad>'}, 'list': [{'api_key': '***', 'aws_secret_access_key': '***'}]},
    }


def test_importing_the_package_loads_neither_torch_nor_composer():
    code = "import sys, dhrd_plugin; assert not {'torch', 'composer', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, '-c', code], check=True)

"""Rows of any number of labels: from a CSV to an export that answers alike wherever it is loaded."""

import csv
import json
import random
import re
import shutil

import pandas as pd
import pytest
import torch
from configs import config_from
from sklearn.metrics import accuracy_score, f1_score
from tiny import LABELS, WORDS, exact, of_several, relative_error, tiny_classifier, tiny_lm, tiny_tokenizer, triplets
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding

from dhrd_plugin import RationaleCollator, TripletCollator, load_classifier, train, write_triplets
from dhrd_plugin.calibration import calibrate, calibration_error
from dhrd_plugin.cli import main
from dhrd_plugin.data.data_spec import split_by_length
from dhrd_plugin.data.inspect import inspect_set
from dhrd_plugin.data.labels import with_labels
from dhrd_plugin.data.prepare import write_rows
from dhrd_plugin.data.tasks import MULTI_LABEL_METRICS, load_task
from dhrd_plugin.data.triplet import BadRow
from dhrd_plugin.errors import UserError
from dhrd_plugin.evaluate import evaluate, predictions, report_on
from dhrd_plugin.losses import binary_cross_entropy
from dhrd_plugin.metrics import build_metrics
from dhrd_plugin.training.builders import find_streams
from dhrd_plugin.training.config import LoaderConfig

pytestmark = pytest.mark.usefixtures('one_thread')
TOPICS = {'access': 'w1', 'billing': 'w2', 'delivery': 'w3'}  # the word that a text of the topic has
TASK = {'prompt': '{text}', 'id': 'id', 'label': 'topics', 'problem_type': 'multi_label_classification'}
NAMED = {**TASK, 'labels': list(TOPICS)}


def tickets(count, seed):
    """Rows, a quarter of which has each topic, some none and some several."""
    draw = random.Random(seed)
    for number in range(count):
        topics = [topic for topic in TOPICS if draw.random() < 0.25]
        words = [*draw.choices(WORDS[10:], k=5), *(TOPICS[topic] for topic in topics)]
        why = ' '.join(TOPICS[topic] for topic in topics) or None
        yield {'id': f't{number}', 'text': ' '.join(draw.sample(words, len(words))), 'topics': topics, 'rationale': why}


def write_csv(path, rows, spell=json.dumps):
    with path.open('w', newline='', encoding='utf-8') as file:
        writer = csv.DictWriter(file, ['id', 'text', 'topics', 'rationale'])
        writer.writeheader()
        writer.writerows({**row, 'topics': spell(row['topics'])} for row in rows)
    return path


@pytest.fixture(scope='module')
def run(tmp_path_factory, one_thread):
    """A run from a CSV, and what it printed."""
    folder = tmp_path_factory.mktemp('several')
    tiny_lm().save_pretrained(folder / 'model')
    tiny_tokenizer(apart=True).save_pretrained(folder / 'model')  # so that the stock class will do
    export = {'output_dir': str(folder / 'slim'), 'onnx': 'int8', 'calibrate': 'validation'}
    settings = {
        'task': TASK,
        'output_dir': str(folder),
        'max_seq_len': 64,
        'model': {'pretrained_model_name_or_path': str(folder / 'model'), 'head': 'linear'},
        'train_loader': {'source': str(write_csv(folder / 'train.csv', tickets(160, 1)))},
        'eval_loaders': {'validation': {'source': str(write_csv(folder / 'val.csv', tickets(80, 2)))}},
        'optimizer': {'name': 'adamw', 'lr': 0.01},
        'algorithms': {'auxiliary_reasoning_loss': {'alpha': 0.1}},
        'callbacks': {'drop_reasoning_head': {**export, 'monitor': 'MultilabelMicroF1'}},
        'max_duration': '6ep',
        'global_train_batch_size': 8,
    }
    train(config_from(settings, folder))
    return folder


def test_what_was_learnt_is_better_than_the_constant_answer(run):
    summary = json.loads((run / 'summary.json').read_text())
    rows = [row['topics'] for row in tickets(80, 2)]
    truth = [[name in topics for name in TOPICS] for topics in rows]
    constants = [
        [[name in chosen for name in TOPICS]] * 80 for chosen in ({'access'}, {'billing'}, {'delivery'}, TOPICS)
    ]
    constant = summary['most_frequent']['validation']
    assert constant >= max(f1_score(truth, answer, average='micro') for answer in constants)
    assert summary['metrics']['validation'].keys() == {'MultilabelMicroF1', 'MultilabelMacroF1'}
    assert summary['metrics']['validation']['MultilabelMicroF1'] > constant + 0.2


def test_evaluate_finds_what_scikit_learn_finds(run):
    report = report_on(run / 'slim', [run / 'val.csv'], output=run / 'report')
    rows = [json.loads(line) for line in (run / 'report' / 'predictions.jsonl').read_text().splitlines()]
    truth, found = ([[name in row[key] for name in TOPICS] for row in rows] for key in ('label', 'prediction'))
    expected = {
        'micro_f1': f1_score(truth, found, average='micro'),
        'macro_f1': f1_score(truth, found, average='macro'),
        'exact_match': accuracy_score(truth, found),
    }
    assert report['metrics'] == pytest.approx(expected)
    assert [row['label'] for row in rows] == [row['topics'] for row in tickets(80, 2)]
    assert report['rows'] == 80 and sum(row['rows'] for row in report['calibration']['bins']) == 80 * len(TOPICS)
    assert (run / 'report' / 'confusion.png').stat().st_size > 5000
    logged = json.loads((run / 'summary.json').read_text())['metrics']['validation']
    best = float((run / 'slim' / 'README.md').read_text().split('| validation | MultilabelMicroF1 | ')[1].split()[0])
    assert best >= logged['MultilabelMicroF1'] - 1e-4
    assert report['metrics']['micro_f1'] == pytest.approx(best, abs=1e-4)


def test_every_loader_answers_alike(run):
    texts = [row['text'] for row in tickets(30, 3)]
    ours = load_classifier(run / 'slim', 'torch')
    expected = ours.predict_proba(texts)
    stock = AutoModelForSequenceClassification.from_pretrained(run / 'slim')
    assert type(stock).__name__ == 'LlamaForSequenceClassification'
    assert stock.config.problem_type == 'multi_label_classification'
    card = (run / 'slim' / 'README.md').read_text()
    (code,) = re.findall('```python\n(.*?)```', card, re.DOTALL)
    exec(code.replace('FOLDER', str(run / 'slim')), found := {})
    for row, answer in zip(expected.tolist(), found['classify'](texts)):
        assert {item['label']: item['score'] for item in answer} == pytest.approx(dict(zip(TOPICS, row)), abs=1e-5)
    onnx = load_classifier(run / 'slim' / 'model.onnx').predict_proba(texts)
    torch.testing.assert_close(onnx, expected, atol=1e-4, rtol=0)
    int8 = load_classifier(run / 'slim' / 'model-int8.onnx')
    same = [one == other for one, other in zip(int8.predict(texts), ours.predict(texts))]
    assert sum(same) >= 28
    assert 'any number of them to a text: `access`, `billing`, `delivery`' in card
    assert 'A text has the labels whose score is at least one half.' in card


def test_the_labels_that_are_one_half_probable_are_given(run):
    texts = [row['text'] for row in tickets(30, 3)]
    classifier = load_classifier(run / 'slim')
    values = classifier.predict_proba(texts).tolist()
    found = classifier.predict(texts)
    assert found == [[name for name, value in zip(TOPICS, row) if value >= 0.5] for row in values]
    assert [] in found and any(len(labels) > 1 for labels in found)
    sure = classifier.predict(texts, abstain=0.9)
    assert None in sure
    for row, labels, kept in zip(values, found, sure):
        assert kept == (labels if all(value >= 0.9 or value <= 0.1 for value in row) else None)


@pytest.mark.parametrize('kind', ['jsonl', 'parquet'])
def test_predict_writes_lists(run, tmp_path, kind):
    out = tmp_path / f'answers.{kind}'
    assert main(['predict', str(run / 'slim'), '--input', str(run / 'val.csv'), '--output', str(out)]) == 0
    rows = pd.read_parquet(out) if kind == 'parquet' else pd.read_json(out, lines=True)
    assert list(rows['id']) == [row['id'] for row in tickets(80, 2)]
    expected = load_classifier(run / 'slim').predict([row['text'] for row in tickets(80, 2)])
    assert [list(labels) for labels in rows['label']] == expected


def test_a_stock_pipeline_of_several_labels_reasons_about_their_names():
    tokenizer = tiny_tokenizer()
    rows = [
        {**tokenizer('w1 w2'), 'label': [1.0, 1.0, 0.0], 'rationale': 'w5'},
        {**tokenizer('w9'), 'label': [0.0, 0.0, 0.0], 'rationale': 'w6'},
    ]
    batch = RationaleCollator(tokenizer, ['w1', 'w2', 'w3'], DataCollatorWithPadding(tokenizer))(rows)
    assert batch['labels'].tolist() == [[1, 1, 0], [0, 0, 0]]
    # WordLevel knows no comma: what ends in one is unknown.
    assert tokenizer.decode(batch['input_ids'][0], skip_special_tokens=False).endswith('<ANS> <unk> w2')
    assert tokenizer.decode(batch['input_ids'][1][batch['attention_mask'][1].bool()]).endswith('<ANS> <unk>')


# ------------------------------------------------------------------------------------------- the parts


def test_the_loss_is_that_of_transformers_row_by_row():
    torch.manual_seed(0)
    logits, labels = torch.randn(5, 3, dtype=torch.float64), torch.randint(0, 2, (5, 3)).float()
    weights = torch.tensor([1.0, 3.0, 0.5], dtype=torch.float64)
    found = binary_cross_entropy(logits, labels, weights, 0.1)
    for row, expected_logits, target in zip(found, logits, labels):
        smooth = target * 0.9 + 0.05
        assert row == pytest.approx(
            float(binary_cross_entropy_with_logits(expected_logits, smooth, pos_weight=weights))
        )


def test_the_gradient_is_that_of_the_rows_alone_however_a_batch_is_cut():
    model = exact(tiny_classifier(multi_label=True))
    rows = of_several(triplets(7))
    batch = TripletCollator(model.tokenizer, LABELS, multi_label=True)(rows)

    def gradient(losses):
        model.zero_grad()
        sum(losses).backward()
        return {name: p.grad.clone() for name, p in model.network.named_parameters() if p.grad is not None}

    def alone(row):
        ids = torch.tensor([model.tokenizer(row['input_text'])['input_ids']])
        logits = model.network(ids, torch.ones_like(ids)).logits[0]
        terms = [-logsigmoid(z if name in row['label'] else -z) for name, z in zip(LABELS, logits)]
        return sum(terms) / len(LABELS) / len(rows)

    expected = gradient([alone(row) for row in rows])
    for size in (7, 3):
        parts = split_by_length(batch, size)
        found = gradient([model.loss(model(part), part) * len(part['labels']) / len(rows) for part in parts])
        assert relative_error(found, expected) < 1e-9


@pytest.fixture
def collate():
    return TripletCollator(tiny_tokenizer(), list(TOPICS), multi_label=True)


def test_a_batch_has_a_zero_or_one_for_each_class(collate):
    rows = [{'input_text': 'w1', 'label': ['delivery', 'access'], 'id': '1'}, {'input_text': 'w2', 'label': []}]
    labels = collate(rows)['labels']
    assert labels.tolist() == [[1, 0, 1], [0, 0, 0]] and labels.dtype == torch.float32


@pytest.mark.parametrize('label', ['access', None, ['other'], ['access', 'access'], [1]])
def test_a_batch_of_other_labels_is_refused(collate, label):
    with pytest.raises(UserError, match=r'row 7.*label: found'):
        collate([{'id': '7', 'input_text': 'w1', 'label': label}])


@pytest.mark.parametrize(
    'cell, typed, more, expected',
    [
        (['billing', 'access'], True, {}, (['access', 'billing'], 'access, billing')),
        ([], True, {}, ([], 'none')),
        ('["billing"]', False, {}, (['billing'], 'billing')),
        ('billing; access ;', False, {'label_separator': ';'}, (['access', 'billing'], 'access, billing')),
        (
            'billing',
            True,
            {},
            'found "billing"; expected a list of labels (\\[\\] for none of them), or label_separator',
        ),
        ("['billing']", False, {}, 'expected a list of labels'),
        (['billing', 'other'], True, {}, 'found "other"; expected one of "access", "billing", "delivery"'),
        (['billing', 'billing'], True, {}, 'expected each label once'),
        (None, True, {}, 'field topics: is missing'),
    ],
)
def test_the_cell_of_a_row(cell, typed, more, expected):
    task, row = load_task({**NAMED, **more}), {'id': 1, 'text': 'x', 'topics': cell}
    if isinstance(expected, str):
        with pytest.raises(BadRow, match=expected.replace('(', '\\(').replace(')', '\\)')):
            list(task.triplets(row, typed=typed))
    else:
        (triplet,) = task.triplets(row, typed=typed)
        assert (triplet['label'], triplet['answer']) == expected


@pytest.mark.parametrize(
    'more, words',
    [
        (
            {'problem_type': 'regression'},
            "problem_type: found 'regression'; expected one of single_label_classification",
        ),
        ({'problem_type': 'single_label_classification', 'label_separator': ';'}, 'label_separator: found without'),
        ({'metrics': ['accuracy']}, "unknown metric 'accuracy'"),
        ({'labels': ['none', 'a']}, "answer: found 'none'"),
        ({'labels': [{'value': 'a', 'answer': 'a, b'}, 'c']}, "answer: found 'a, b'"),
    ],
)
def test_a_template_that_cannot_be(more, words):
    with pytest.raises(UserError, match=words):
        load_task({**NAMED, **more})


def test_probabilities_of_one_class_are_refused():
    with pytest.raises(BadRow, match='field probabilities: found'):
        list(load_task(NAMED).triplets({'id': 1, 'text': 'x', 'topics': [], 'probabilities': {'access': 1}}))


@pytest.mark.parametrize('spell', [json.dumps, '; '.join])
def test_labels_are_found_in_the_rows(tmp_path, spell):
    rows = [row for row in tickets(40, 1) if row['topics']]
    separator = {} if spell is json.dumps else {'label_separator': ';'}
    task = with_labels(load_task({**TASK, **separator}), write_csv(tmp_path / 'rows.csv', rows, spell))
    assert task.label_names == tuple(TOPICS)


def test_shards_hold_and_count_every_label(tmp_path):
    rows = list(tickets(40, 1))
    summary = write_rows(pd.DataFrame(rows), tmp_path / 'set', TASK)
    counts = {name: sum(name in row['topics'] for row in rows) for name in TOPICS}
    assert summary['rows'] == 40 and summary['labels'] == counts and summary['without_target'] == 0
    contents = inspect_set(tmp_path / 'set')
    assert contents.labels == counts and [row['label'] for row in contents.first] == [r['topics'] for r in rows[:10]]
    find_streams('eval_loaders.validation', LoaderConfig(local=str(tmp_path / 'set')), load_task(NAMED))
    (tmp_path / 'set' / 'triplets.json').unlink()  # the rows themselves tell
    find_streams('eval_loaders.validation', LoaderConfig(local=str(tmp_path / 'set')), load_task(NAMED))
    with pytest.raises(UserError, match="found rows of the label 'delivery'"):
        other = load_task({**NAMED, 'labels': ['access', 'billing']})
        find_streams('eval_loaders.validation', LoaderConfig(local=str(tmp_path / 'set')), other)


@pytest.mark.parametrize('task, label', [(None, ['a']), (load_task(NAMED), 'access')])
def test_a_label_of_the_other_kind_is_not_written(tmp_path, task, label):
    with pytest.raises(UserError, match=r"triplet '1', field label: found .*expected a (list|text)"):
        write_triplets([{'id': '1', 'input_text': 'x', 'label': label}], tmp_path / 'set', task=task)


def test_a_temperature_makes_each_decision_as_sure_as_it_is_right():
    torch.manual_seed(0)
    logits = torch.randn(4000, 3)
    labels = torch.bernoulli(logits.sigmoid())
    found = calibrate(logits * 3, labels)
    assert found['temperature'] == pytest.approx(3, rel=0.1) and found['rows'] == 4000
    assert found['ece_after'] < 0.02 < found['ece_before']


def test_a_probability_of_one_half_is_a_yes_everywhere():
    task, probabilities = load_task(NAMED), torch.tensor([[0.5, 0.9, 0.1], [0.4, 0.5, 0.6]])
    labels = [['access', 'billing'], ['billing', 'delivery']]
    rows = [{**row, 'label': label, 'group': ''} for row, label in zip(triplets(2), labels)]
    report = evaluate(probabilities, rows, task)
    assert [row['prediction'] for row in predictions(probabilities, rows, task)] == labels
    assert report['metrics'] == dict.fromkeys(MULTI_LABEL_METRICS, 1.0)
    assert all((row['precision'], row['recall']) == (1, 1) for row in report['classes'].values())
    truth = torch.tensor([[1, 1, 0], [0, 1, 1]])
    for metric in build_metrics(MULTI_LABEL_METRICS, 3, multi_label=True):  # as a training has them
        metric.update(probabilities, truth)
        assert float(metric.compute()) == 1


def test_the_error_without_the_temperature_is_the_one_that_calibrate_had(run, tmp_path, monkeypatch):
    """Also where a temperature below 1 makes decisions so sure that fp32 has them for certain."""
    shutil.copytree(run / 'slim', tmp_path / 'slim')
    config = json.loads((tmp_path / 'slim' / 'config.json').read_text())
    config['dhrd']['calibration']['temperature'] = 0.1
    (tmp_path / 'slim' / 'config.json').write_text(json.dumps(config))
    logits = torch.randn(80, 3, generator=torch.Generator().manual_seed(0)) * 3
    monkeypatch.setattr('dhrd_plugin.evaluate.logits_on_ranks', lambda *_: logits / 0.1)
    found = report_on(tmp_path / 'slim', [run / 'val.csv'])['calibration']
    truth = torch.tensor([[int(name in row['topics']) for name in TOPICS] for row in tickets(80, 2)])
    decisions = torch.stack([torch.zeros(240), logits.flatten()], -1)
    for error, scores in ((found['before']['ece'], decisions), (found['ece'], decisions / 0.1)):
        assert error == pytest.approx(calibration_error(scores.softmax(-1), truth.flatten()), abs=1e-5)


def test_evaluate_refuses_a_classifier_of_the_other_kind(run, tmp_path):
    (tmp_path / 'rows.jsonl').write_text('{"id": 1, "text": "w1", "topics": "access"}\n')
    (tmp_path / 'one.yaml').write_text('prompt: "{text}"\nlabel: topics\nlabels: [access, billing, delivery]\n')
    with pytest.raises(UserError, match='problem_type: found single_label_classification; expected multi_label'):
        report_on(run / 'slim', [tmp_path / 'rows.jsonl'], str(tmp_path / 'one.yaml'))


def settings_of(run, **changes):
    """The settings of the run, of one step, with changes."""
    summary = json.loads((run / 'summary.json').read_text())
    return {**summary['config'], 'max_duration': '1ba', 'callbacks': {}, **changes}


def test_balanced_weights_are_rows_without_for_one_with(run, tmp_path):
    config = settings_of(run, output_dir=str(tmp_path))
    config['model'] = {**config['model'], 'class_weights': 'balanced'}
    trainer = train(config_from(config, tmp_path))
    rows = list(tickets(160, 1))
    counts = [sum(name in row['topics'] for row in rows) for name in TOPICS]
    assert trainer.state.model.class_weights.tolist() == pytest.approx([(160 - n) / n for n in counts])


def test_a_verbalizer_is_refused(run, tmp_path):
    config = settings_of(run, output_dir=str(tmp_path))
    config['model'] = {**config['model'], 'head': 'verbalizer'}
    with pytest.raises(UserError, match=r'model\.head: found verbalizer with several labels to a row'):
        train(config_from(config, tmp_path))


def test_transformers_loss_of_the_export_is_ours(run):
    """A fine-tuning that goes on from the export learns by the same loss."""
    stock = AutoModelForSequenceClassification.from_pretrained(run / 'slim')
    tokenizer = AutoTokenizer.from_pretrained(run / 'slim')
    rows = list(tickets(4, 3))
    batch = tokenizer([row['text'] for row in rows], padding=True, return_tensors='pt')
    labels = torch.tensor([[float(name in row['topics']) for name in TOPICS] for row in rows])
    out = stock(**batch, labels=labels)
    torch.testing.assert_close(out.loss, binary_cross_entropy(out.logits, labels).mean())

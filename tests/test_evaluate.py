"""Evaluation against scikit-learn and plain Python; the same report from every kind of model, on 1 and 2 ranks."""

import json
from pathlib import Path

import matplotlib.figure
import pytest
import torch
from composer import Trainer
from configs import TASK
from forks import run_ranks
from omegaconf import OmegaConf
from PIL import Image
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, precision_recall_fscore_support
from tiny import LABELS, tiny_classifier, tiny_lm, tiny_tokenizer, triplet
from transformers import LlamaConfig, LlamaForSequenceClassification

from dhrd_plugin import load_classifier
from dhrd_plugin.data.shards import write_triplets
from dhrd_plugin.data.tasks import load_task
from dhrd_plugin.errors import UserError
from dhrd_plugin.evaluate import BINS, FILES, describe, draw, evaluate, label_order, main, report_on
from dhrd_plugin.export.write import write_slim

pytestmark = pytest.mark.usefixtures('one_thread')

ROWS = [triplet(i, 2 + i % 6, None) for i in range(23)]


def random_predictions(classes, count=200, groups=17):
    names = [f'c{i}' for i in range(classes)]
    probabilities = torch.randn(count, classes, generator=torch.Generator().manual_seed(0)).mul(2).softmax(-1)
    rows = [{'id': str(i), 'label': names[(i * 7) % classes], 'group': f'g{i % groups}'} for i in range(count)]
    metrics = ['f1a', 'em'] if classes == 2 else ['macro_f1', 'accuracy']
    labels = [{'value': name, 'answer': name} for name in names]
    return names, probabilities, rows, load_task({**TASK, 'labels': labels, 'metrics': metrics, 'group': 'group'})


@pytest.mark.parametrize('classes', [2, 4])
def test_the_report_agrees_with_scikit_learn(classes):
    names, probabilities, rows, task = random_predictions(classes)
    report = evaluate(probabilities, rows, task)
    truth = [row['label'] for row in rows]
    guess = [names[i] for i in probabilities.argmax(-1).tolist()]
    assert report['metrics']['accuracy'] == pytest.approx(accuracy_score(truth, guess))
    assert report['metrics']['macro_f1'] == pytest.approx(f1_score(truth, guess, average='macro'))
    assert report['confusion'] == confusion_matrix(truth, guess, labels=names).tolist()
    precision, recall, _, support = precision_recall_fscore_support(truth, guess, labels=names)
    for index, name in enumerate(names):
        expected = {'precision': precision[index], 'recall': recall[index], 'support': support[index]}
        assert report['classes'][name] == pytest.approx(expected)
    if classes == 2:
        right = {}
        for row, label in zip(rows, guess, strict=True):
            right.setdefault(row['group'], []).append(label == row['label'])
        assert report['metrics']['em'] == pytest.approx(sum(map(all, right.values())) / len(right))
        assert report['metrics']['f1a'] == pytest.approx(f1_score(truth, guess, pos_label=names[1]))


def test_the_calibration_error_is_the_one_of_its_definition():
    names, probabilities, rows, task = random_predictions(3)
    report = evaluate(probabilities, rows, task)
    bins = {}
    for row, values in zip(rows, probabilities.tolist(), strict=True):
        confidence = max(values)
        number = min(int(confidence * BINS), BINS - 1)
        bins.setdefault(number, []).append((confidence, names[values.index(confidence)] == row['label']))
    means = [[sum(column) / len(found) for column in zip(*found, strict=True)] for _, found in sorted(bins.items())]
    counts = [len(found) for _, found in sorted(bins.items())]
    expected = sum(n * abs(a - b) for n, (a, b) in zip(counts, means, strict=True)) / len(rows)
    assert report['calibration']['ece'] == pytest.approx(expected, abs=1e-6)
    found = report['calibration']['bins']
    assert [row['rows'] for row in found] == counts
    for row, (confidence, accuracy) in zip(found, means, strict=True):
        assert (row['confidence'], row['accuracy']) == pytest.approx((confidence, accuracy))


def test_coverage_and_error_are_those_of_a_loop():
    names, probabilities, rows, task = random_predictions(3)
    report = evaluate(probabilities, rows, task)
    assert 'before' not in report['calibration']
    for found in report['coverage']:
        kept = [(row, p) for row, p in zip(rows, probabilities.tolist()) if max(p) >= found['confidence']]
        wrong = sum(names[p.index(max(p))] != row['label'] for row, p in kept)
        assert found['rows'] == len(kept) and found['share'] == pytest.approx(len(kept) / len(rows))
        assert found['error'] == (pytest.approx(wrong / len(kept), abs=1e-6) if kept else None)
    sure = next(row for row in report['coverage'] if row['confidence'] == 0.9)
    assert f'error at confidence of 90% and more: {sure["error"]:.2%} of {sure["rows"]} rows' in describe(report)


def test_the_error_without_the_temperature_is_told_beside():
    _, probabilities, rows, task = random_predictions(3)
    before = evaluate(probabilities, rows, task)['calibration']['ece']
    report = evaluate(probabilities.log().div(2).softmax(-1), rows, task, temperature=2.0)
    assert report['calibration']['before'] == {'temperature': 2.0, 'ece': pytest.approx(before, abs=1e-6)}
    assert f'({before:.4f} without the temperature 2.0000)' in describe(report)


@pytest.mark.parametrize(('classes', 'widest'), [(3, 1200), (12, 2200), (77, 2300), (400, 2300)])
def test_pictures_and_tables_of_many_classes_are_bounded(tmp_path, classes, widest):
    names = [f'class {i} {"x" * 60}' for i in range(classes)]
    confusion = torch.eye(classes).mul(3).long()
    confusion[0, 1] = 2
    report = {
        'label_names': names,
        'metrics': {'accuracy': 1.0},
        'classes': {name: {'precision': 1.0, 'recall': 1.0, 'support': 3} for name in names},
        'confusion': confusion.tolist(),
        'calibration': {'ece': 0.1, 'bins': [{'confidence': 0.5, 'accuracy': 0.5, 'rows': 3}]},
        'coverage': [{'confidence': 0.9, 'rows': 0, 'share': 0.0, 'error': None}],
    }
    draw(report, tmp_path)
    for side in Image.open(tmp_path / 'confusion.png').size:
        assert side < widest
    lines = describe(report).splitlines()
    assert len(lines) == classes + 5 and (classes < 9 or max(map(len, lines[5:])) < 240)
    if classes > 20:
        assert lines[5].endswith(f'  {names[0][:39]}… 3, {names[1][:39]}… 2')


@pytest.mark.parametrize('problem', ['single_label_classification', 'multi_label_classification'])
def test_a_class_may_have_any_name(tmp_path, monkeypatch, problem):
    """Dollar signs are no formula, and names alike in all that is shown of them have a row or a bar each."""
    names = ['$0-$50', '$50_$100', f'{"x" * 50}1', f'{"x" * 50}2']
    task = load_task({'prompt': '{text}', 'labels': names, 'problem_type': problem})
    label = {name: [name] if task.multi_label else name for name in names}
    rows = [{'id': name, 'label': label[name], 'group': ''} for name in names]
    figures, save = [], matplotlib.figure.Figure.savefig
    monkeypatch.setattr(matplotlib.figure.Figure, 'savefig', lambda *a, **k: figures.append(a[0]) or save(*a, **k))
    draw(evaluate(torch.eye(4), rows, task), tmp_path)
    axes = figures[0].axes[0]
    assert [text.get_text() for text in axes.get_yticklabels()] == [*names[:2], *[f'{"x" * 39}…'] * 2]
    if task.multi_label:
        assert len({bar.get_y() for bar in axes.patches}) == 4


def test_labels_are_found_by_name():
    assert label_order(['no', 'maybe', 'yes'], ['yes', 'no', 'maybe']) == [2, 0, 1]
    assert label_order(['LABEL_0', 'LABEL_1'], ['yes', 'no']) == [0, 1]
    with pytest.raises(UserError, match=r"the classifier has \['a', 'b'\]; expected the task's \['yes', 'no'\]"):
        label_order(['a', 'b'], ['yes', 'no'])


@pytest.fixture(scope='module')
def places(tmp_path_factory):
    """One model as export, ONNX file and checkpoint; its rows as a file and as shards; the folder of all."""
    root = tmp_path_factory.mktemp('evaluate')
    model = tiny_classifier()
    model.info['task'] = load_task(TASK).to_dict()
    write_slim(model.get_metadata(), model.network.state_dict(), root / 'slim', onnx=True)
    Trainer(model=model, device='cpu', progress_bar=False).save_checkpoint(str(root / 'checkpoint.pt'))
    (root / 'rows.jsonl').write_text('\n'.join(json.dumps(row) for row in ROWS))
    write_triplets(ROWS, root / 'shards')
    return root


def report_of(capsys, *arguments):
    assert main([str(argument) for argument in arguments]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


@pytest.mark.parametrize('model', ['slim', 'slim/model.onnx', 'checkpoint.pt'])
@pytest.mark.parametrize('data', ['rows.jsonl', 'shards'])
def test_every_kind_of_model_and_data_gives_the_same_report(places, capsys, model, data):
    expected = report_of(capsys, places / 'slim', places / 'rows.jsonl')
    assert 'accuracy' in expected and 'maybe' in expected
    assert report_of(capsys, places / model, places / data, '--batch-size', 4) == expected


def test_a_classifier_that_this_package_never_saw(tmp_path, capsys):
    """Its labels in an order of its own; its predictions are those of a plain loop over it."""
    torch.manual_seed(0)
    names = [*reversed(LABELS)]
    config = LlamaConfig(**{**tiny_lm().config.to_diff_dict(), 'id2label': dict(enumerate(names))})
    model, tokenizer = LlamaForSequenceClassification(config).eval(), tiny_tokenizer()
    model.save_pretrained(tmp_path / 'foreign')
    tokenizer.save_pretrained(tmp_path / 'foreign')
    (tmp_path / 'task.yaml').write_text(OmegaConf.to_yaml(OmegaConf.create(TASK)))
    (tmp_path / 'rows.jsonl').write_text('\n'.join(json.dumps(row) for row in ROWS))
    places = [tmp_path / 'foreign', tmp_path / 'rows.jsonl', '--task', tmp_path / 'task.yaml']
    report_of(capsys, *places, '--output', tmp_path / 'report')
    lines = (tmp_path / 'report' / 'predictions.jsonl').read_text().splitlines()
    found = {row['id']: row['prediction'] for row in map(json.loads, lines)}
    with torch.no_grad():
        logits = [model(tokenizer(row['input_text'], return_tensors='pt').input_ids).logits for row in ROWS]
    assert found == {row['id']: names[int(score.argmax())] for row, score in zip(ROWS, logits)}
    assert len({*found.values()}) > 1


def test_a_checkpoint_in_object_storage(places, s3, capsys):
    whole = (places / 'checkpoint.pt').read_bytes()
    s3.put('evaluate/checkpoint.pt', whole)
    s3.put('evaluate/half.pt', whole[:9000])
    expected = report_of(capsys, places / 'slim', places / 'rows.jsonl')
    assert report_of(capsys, f'{s3.bucket}/evaluate/checkpoint.pt', places / 'rows.jsonl') == expected
    for name, flaw in (('half.pt', 'damaged'), ('absent.pt', 'no such file')):
        assert main([f'{s3.bucket}/evaluate/{name}', str(places / 'rows.jsonl')]) == 2
        assert f'evaluate/{name}: {flaw}' in capsys.readouterr().err


def test_what_it_writes(places, capsys, tmp_path):
    report_of(capsys, places / 'slim', places / 'rows.jsonl', '--output', tmp_path)
    lines = [json.loads(line) for line in (tmp_path / 'predictions.jsonl').read_text().splitlines()]
    report = json.loads((tmp_path / 'report.json').read_text())
    assert [line['id'] for line in lines] == [row['id'] for row in ROWS]
    assert {line['group'] for line in lines} == {None}
    assert report['label_names'] == LABELS and report['task_metrics'] == list(load_task(TASK).metrics)
    right = sum(line['prediction'] == line['label'] for line in lines)
    assert report['metrics']['accuracy'] == pytest.approx(right / len(ROWS))
    for name in ('confusion.png', 'reliability.png'):
        assert (tmp_path / name).read_bytes().startswith(b'\x89PNG')


def test_several_places_are_one_set(places, capsys, tmp_path):
    parts = [tmp_path / 'rows.jsonl', tmp_path / 'shards']
    parts[0].write_text('\n'.join(json.dumps(row) for row in ROWS[:9]))
    write_triplets([{**row, 'group': row['id'][0]} for row in ROWS[9:]], parts[1])
    expected = report_of(capsys, places / 'slim', places / 'rows.jsonl')
    assert report_of(capsys, places / 'slim', *parts, '--output', tmp_path) == f'{expected}report: {tmp_path}\n'
    lines = [json.loads(line) for line in (tmp_path / 'predictions.jsonl').read_text().splitlines()]
    assert [line['id'] for line in lines] == [row['id'] for row in ROWS]
    assert [line['group'] for line in lines] == [None] * 9 + [row['id'][0] for row in ROWS[9:]]
    assert report_on(places / 'slim', parts) == json.loads((tmp_path / 'report.json').read_text())
    assert capsys.readouterr().out == ''


def test_rows_of_several_places_stay_apart(places, tmp_path):
    """Two files alike, but that all answers of one are right and all of the other are wrong."""
    (tmp_path / 'em.yaml').write_text(OmegaConf.to_yaml({**TASK, 'metrics': ['em'], 'group': 'group'}))
    right = load_classifier(places / 'slim').predict([row['input_text'] for row in ROWS])
    for name, labels in (('a', right), ('b', [LABELS[LABELS.index(label) - 1] for label in right])):
        rows = [{**row, 'label': label, 'group': row['id'][0]} for row, label in zip(ROWS, labels)]
        (tmp_path / f'{name}.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    both = [tmp_path / 'a.jsonl', tmp_path / 'b.jsonl']
    for data, expected in ((both[:1], 1), (both[1:], 0), (both, 0.5)):
        report = report_on(places / 'slim', data, str(tmp_path / 'em.yaml'), output=tmp_path / 'report')
        assert report['metrics']['em'] == expected
    lines = [json.loads(line) for line in (tmp_path / 'report' / 'predictions.jsonl').read_text().splitlines()]
    assert [line['id'] for line in lines] == [f'{place}:{row["id"]}' for place in (1, 2) for row in ROWS]
    assert [line['group'] for line in lines] == [f'{place}:{row["id"][0]}' for place in (1, 2) for row in ROWS]


def test_a_mount_point_takes_a_report(places, tmp_path, tmpfs):
    out = tmpfs(tmp_path / 'volume', '2m')
    for _ in range(2):
        report_on(places / 'slim', [places / 'rows.jsonl'], output=out)
    assert sorted(path.name for path in out.iterdir()) == sorted(FILES)


def test_a_report_that_cannot_be_written_is_printed(places, tmp_path, capsys, monkeypatch):
    def fail(*_):
        raise OSError(28, 'No space left on device')

    expected = report_of(capsys, places / 'slim', places / 'rows.jsonl')
    monkeypatch.setattr('dhrd_plugin.evaluate.draw', fail)
    assert main([str(places / 'slim'), str(places / 'rows.jsonl'), '--output', str(tmp_path / 'out')]) == 2
    out, error = capsys.readouterr()
    assert out == expected and f'error: {tmp_path}/out: No space left' in error
    assert not list(tmp_path.iterdir())


def test_two_ranks_read_every_row_once(places, tmp_path):
    script = Path(__file__).parent.parent / 'scripts' / 'evaluate.py'
    run_ranks(2, script, places / 'slim', places / 'rows.jsonl', '--output', tmp_path)
    assert main([str(places / 'slim'), str(places / 'rows.jsonl'), '--output', str(tmp_path / 'one')]) == 0
    found, expected = (json.loads((folder / 'report.json').read_text()) for folder in (tmp_path, tmp_path / 'one'))
    assert found['confusion'] == expected['confusion']
    assert found['metrics'] == pytest.approx(expected['metrics'], abs=1e-6)
    lines = [(folder / 'predictions.jsonl').read_text().splitlines() for folder in (tmp_path, tmp_path / 'one')]
    for found, expected in zip(*(map(json.loads, some) for some in lines), strict=True):
        assert (found['id'], found['prediction']) == (expected['id'], expected['prediction'])
        assert found['probabilities'] == pytest.approx(expected['probabilities'], abs=1e-5)


@pytest.mark.parametrize(
    ('arguments', 'expected'),
    [
        (['absent', 'rows.jsonl'], 'expected a folder with config.json'),
        (['slim', 'rows.jsonl', '--task', 'rte'], "expected the task's ['entailment', 'not_entailment']"),
        (['slim', 'absent.jsonl'], 'absent.jsonl'),
        (['slim', 'shards', '--task', 'em.yaml'], 'row 0: group: missing; exact match (em) counts rows by their'),
        (['slim', 'shards', '--split', 'test'], "shards: is one set of shards; leave out the split 'test'"),
        (['slim', 'rows.jsonl', '--batch-size', '0'], "found '0'; expected a whole number from 1"),
    ],
)
def test_mistakes_are_told_in_one_line(places, capsys, monkeypatch, arguments, expected):
    monkeypatch.chdir(places)
    (places / 'em.yaml').write_text(OmegaConf.to_yaml({**TASK, 'metrics': ['em'], 'group': 'group'}))
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert expected in error and len(error.splitlines()) == 1

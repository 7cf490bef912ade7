"""The paper's metrics against scikit-learn and plain Python, on one rank and on two."""

import json
import os
from pathlib import Path

import pytest
import torch
from evaluations import ALL, cases, classifier, evaluate, predictions
from forks import run_ranks
from sklearn.metrics import accuracy_score, f1_score
from tiny import LABELS, tiny_classifier, tiny_tokenizer, triplets

from dhrd_plugin import TripletCollator
from dhrd_plugin.data.collator import group_index
from dhrd_plugin.data.data_spec import split_by_length
from dhrd_plugin.data.tasks import load_task, task_names
from dhrd_plugin.errors import UserError
from dhrd_plugin.metrics import ExactMatch, build_metrics

pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture(scope='module')
def shared_or_none(root):
    folder = Path(os.environ.get('DHRD_SHARED', root.parent / 'shared')) / 'data'
    return folder if folder.is_dir() else None


@pytest.fixture(scope='module')
def two_ranks(root, shared_or_none, tmp_path_factory):
    """The metrics that either rank computed, of all cases, from one launch."""
    out = tmp_path_factory.mktemp('ranks')
    run_ranks(2, 'tests/evaluations.py', out, shared_or_none or '', cwd=root)
    return [json.loads((out / f'rank{rank}.json').read_text()) for rank in (0, 1)]


def expected_metrics(rows, labels, names):
    """By scikit-learn, and exact match by a loop over the questions."""
    truth, found = [labels.index(row['label']) for row in rows], predictions(rows, labels)
    assert len(rows) == 1 or len(set(found)) == len(labels)  # every class is predicted somewhere
    questions = {}
    for row, label, prediction in zip(rows, truth, found):
        questions[row['group']] = questions.get(row['group'], True) and label == prediction
    values = {
        'accuracy': ('MulticlassAccuracy', lambda: accuracy_score(truth, found)),
        'macro_f1': ('MulticlassF1Score', lambda: f1_score(truth, found, average='macro')),
        'f1a': ('AnswerF1', lambda: f1_score(truth, found)),
        'em': ('ExactMatch', lambda: sum(questions.values()) / len(questions)),
    }
    return {name: value() for name, value in (values[name] for name in names)}


def test_rows_without_a_label_do_not_count():
    told = dict.fromkeys(LABELS, 1 / 3)
    rows = [{**row, 'group': f'q{index // 3}', 'probabilities': told} for index, row in enumerate(triplets(8))]
    collate = TripletCollator(tiny_tokenizer(), LABELS, reasoning=False, groups=True)
    labelled = collate([row for index, row in enumerate(rows) if index not in (1, 4, 7)])
    mixed = collate([{**row, 'label': ''} if index in (1, 4, 7) else row for index, row in enumerate(rows)])
    none = collate([{**row, 'label': ''} for row in rows])
    model = tiny_classifier().eval()
    for name in ('accuracy', 'macro_f1', 'em'):
        (found,), (expected,) = build_metrics([name], len(LABELS)), build_metrics([name], len(LABELS))
        for batch in (mixed, none):
            model.update_metric(batch, model.eval_forward(batch), found)
        model.update_metric(labelled, model.eval_forward(labelled), expected)
        assert float(found.compute()) == float(expected.compute())


@pytest.mark.parametrize('case', ['binary', 'three classes', 'one row', 'multirc'])
@pytest.mark.parametrize('ranks', [1, 2])
def test_the_metrics_are_those_of_scikit_learn(case, ranks, two_ranks, shared_or_none):
    if case == 'multirc' and shared_or_none is None:
        pytest.skip('no real data')
    rows, labels, names, size = cases(shared_or_none)[case]
    expected = expected_metrics(rows, labels, names)
    assert ranks == 1 or len(rows) % 2 == 1
    for found in two_ranks if ranks == 2 else [None]:
        values = found[case] if found else evaluate(rows, labels, names, size)
        assert values == pytest.approx(expected, abs=1e-6)
        assert values.keys() <= ALL


def test_exact_match_counts_a_group_once_wherever_its_rows_are():
    metric, logits = ExactMatch(), torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    assert metric.compute().isnan()
    metric.update(logits, torch.tensor([1, 0]), torch.tensor([7, 8]))
    metric.update(logits, torch.tensor([1, 0]), torch.tensor([9, 9]))
    assert float(metric.compute()) == 1
    metric.update(logits, torch.tensor([1, 1]), torch.tensor([8, 7]))  # one more row of each, the second wrong
    assert float(metric.compute()) == pytest.approx(2 / 3)
    metric.update(logits, torch.tensor([1, 1]), torch.tensor([8, 7]))  # the same rows again
    assert float(metric.compute()) == pytest.approx(2 / 3)
    metric.reset()
    metric.update(logits, torch.tensor([0, 0]), torch.tensor([8, 7]))
    assert float(metric.compute()) == 0.5


def test_a_task_declares_the_papers_metrics():
    names = {'cb': ('macro_f1', 'accuracy'), 'multirc': ('f1a', 'em')}
    for task in task_names():
        assert load_task(task).metrics == names.get(task, ('accuracy',))
    assert [type(metric).__name__ for metric in build_metrics(('f1a', 'em'), 2)] == ['AnswerF1', 'ExactMatch']


def test_groups_travel_as_numbers_and_are_cut_with_their_rows():
    rows = [{**row, 'group': f'q{i // 2}'} for i, row in enumerate(triplets(8))]
    batch = TripletCollator(tiny_tokenizer(), LABELS, groups=True)(rows)
    assert batch['group'].tolist() == [group_index(row['group']) for row in rows]
    assert batch['group'].dtype == torch.int64 and len(set(batch['group'].tolist())) == 4
    cut = split_by_length(batch, 3)
    assert sorted(group for part in cut for group in part['group'].tolist()) == sorted(batch['group'].tolist())
    assert 'group' not in TripletCollator(tiny_tokenizer(), LABELS)(rows)


def test_rows_without_a_group_are_refused_where_exact_match_is_asked_for():
    with pytest.raises(UserError, match=r'row 0: group: missing; exact match'):
        TripletCollator(tiny_tokenizer(), LABELS, groups=True)(triplets(2))
    batch = TripletCollator(tiny_tokenizer(), LABELS)(triplets(2))
    model = classifier(LABELS, ['accuracy', 'em'])
    assert set(model.get_metrics(is_train=True)) == {'MulticlassAccuracy'}
    assert set(model.get_metrics(is_train=False)) == {'MulticlassAccuracy', 'ExactMatch'}
    with pytest.raises(UserError, match='found no `group` in the batch'):
        model.update_metric(batch, model.eval_forward(batch), ExactMatch())

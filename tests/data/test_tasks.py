"""Templates: what they render, and of which rows."""

import json

import pytest

from dhrd_plugin.data.tasks import load_task, task_names
from dhrd_plugin.data.triplet import BadRow

ROW = {'premise': 'It rains.', 'hypothesis': 'It is wet.', 'label': 'entailment', 'idx': 3}
CUSTOM = {'name': 'x', 'prompt': '{a}', 'labels': ['yes', 'no']}


def one(task, row, **options):
    (triplet,) = task.triplets(row, **options)
    return triplet


def test_seven_tasks_with_the_hubs_label_order():
    names = {name: load_task(name).label_names for name in task_names()}
    assert names == {
        'boolq': ('False', 'True'),
        'cb': ('entailment', 'contradiction', 'neutral'),
        'copa': ('choice1', 'choice2'),
        'multirc': ('False', 'True'),
        'rte': ('entailment', 'not_entailment'),
        'wic': ('False', 'True'),
        'wsc': ('False', 'True'),
    }
    assert load_task('cb').metrics == ('macro_f1', 'accuracy')
    assert load_task('multirc').metrics == ('f1a', 'em')


@pytest.mark.parametrize('name', task_names())
def test_a_task_survives_json_in_any_order_of_keys(name):
    task = load_task(name)
    assert load_task(json.loads(json.dumps(task.to_dict(), sort_keys=True))) == task


def test_rte_row():
    assert one(load_task('rte'), {**ROW, 'rationale': 'Rain wets.', 'weight': 2}) == {
        'id': '3',
        'input_text': 'Premise: It rains.\nHypothesis: It is wet.\nDoes the premise entail the hypothesis?',
        'label': 'entailment',
        'answer': 'Yes',
        'rationale': 'Rain wets.',
        'weight': 2.0,
        'group': '',
        'probabilities': None,
        'cuttable': None,
    }


def test_copa_prints_a_phrase_for_cause_and_effect():
    row = {'premise': 'He fell.', 'choice1': 'a', 'choice2': 'b', 'question': 'cause', 'idx': 0, 'label': 1}
    triplet = one(load_task('copa'), row)
    assert triplet['input_text'].startswith('He fell. What was the cause of this?')
    assert (triplet['label'], triplet['answer']) == ('choice2', '2')
    with pytest.raises(BadRow, match='field question: found "why"; expected one of "cause", "effect"'):
        one(load_task('copa'), {**row, 'question': 'why'})


def test_multirc_explodes_and_groups_by_question():
    answers = [{'text': 'A', 'idx': 4, 'label': 0}, {'text': '', 'idx': 5, 'label': 1, 'rationale': 'r'}]
    row = {'idx': 7, 'passage': {'text': 'P', 'questions': [{'question': 'Q', 'idx': 9, 'answers': answers}]}}
    first, second = load_task('multirc').triplets(row)
    assert (first['id'], first['group'], first['label']) == ('7-9-4', '7-9', 'False')
    assert (second['id'], second['rationale'], second['answer']) == ('7-9-5', 'r', 'Yes')
    assert first['input_text'] == 'P\nQuestion: Q\nAnswer: A\nIs this answer correct?'
    flat = {
        'paragraph': 'P',
        'question': 'Q',
        'answer': 'A',
        'label': 0,
        'idx': {'paragraph': 7, 'question': 9, 'answer': 4},
    }
    assert one(load_task('multirc').for_hub(), flat) == first


def test_wsc_reads_nested_fields_and_flat_ones_of_the_hub():
    nested = {'text': 'T', 'target': {'span1_text': 'N', 'span2_text': 'p'}, 'idx': 0, 'label': True}
    flat = {'text': 'T', 'span1_text': 'N', 'span2_text': 'p', 'idx': 0, 'label': True}
    assert one(load_task('wsc'), nested) == one(load_task('wsc').for_hub(), flat)


def test_the_hub_may_have_labels_of_its_own():
    labels = [{'value': 1, 'name': 'no'}, {'value': 0, 'name': 'yes'}]
    task = load_task({**CUSTOM, 'labels': ['no', 'yes'], 'hub': {'labels': labels}})
    assert load_task(task.to_dict()) == task
    assert [label.value for label in task.for_hub().labels] == [1, 0]


def test_json_types_of_labels_are_told_apart():
    booleans = load_task({**CUSTOM, 'labels': [False, True]})
    texts = load_task({**CUSTOM, 'labels': ['false', 'true']})
    numbers = load_task({**CUSTOM, 'labels': [0, 1]})
    tasks = {'true': booleans, '"true"': texts, '1': numbers}
    for right in tasks:
        for spelled, task in tasks.items():
            row = {'a': 'x', 'label': json.loads(spelled)}
            if spelled == right:
                assert one(task, row)['label'] == task.label_names[1]
            else:
                row['label'] = json.loads(right)
                with pytest.raises(BadRow, match=f'field label: found {right}; expected one of .*{spelled}'):
                    one(task, row)


def test_cells_without_types_match_by_their_text():
    for labels, cell in (([False, True], 'true'), ([False, True], 'True'), ([0, 1], '1')):
        task = load_task({**CUSTOM, 'labels': labels})
        assert one(task, {'a': 'x', 'label': cell}, typed=False)['label'] == task.label_names[1]


def test_numbers_only_where_the_prompt_says_so():
    task = load_task({**CUSTOM, 'prompt': '{a} {year:d} {share:.1f}'})
    assert one(task, {'a': 'x', 'year': 7, 'share': 0.25, 'label': 'no'})['input_text'] == 'x 7 0.2'
    with pytest.raises(BadRow, match='field year: found "7"; expected a number'):
        one(task, {'a': 'x', 'year': '7', 'share': 1, 'label': 'no'})


def test_rows_without_an_id_get_their_number():
    assert one(load_task(CUSTOM), {'a': 'x', 'label': 'no'}, number=12)['id'] == '12'


def test_unlabelled_rows_only_where_asked_for():
    row = {key: value for key, value in ROW.items() if key != 'label'}
    triplet = one(load_task('rte'), row, labelled=False)
    assert (triplet['label'], triplet['answer']) == ('', '')
    with pytest.raises(BadRow, match='field label: is missing'):
        one(load_task('rte'), row)


def test_a_template_from_a_file(tmp_path):
    path = tmp_path / 'mine.yaml'
    path.write_text('name: mine\nprompt: "{a}"\nlabels: [false, true]\n')
    assert load_task(path).label_names == ('False', 'True')

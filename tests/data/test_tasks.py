"""Templates: what they render, what they refuse."""

import json

import pytest

from dhrd_plugin.data.tasks import load_task, task_names
from dhrd_plugin.data.triplet import BadRow
from dhrd_plugin.errors import UserError

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


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'premise': None}, 'field premise: is missing'),
        ({'premise': 5}, 'field premise: found 5; expected text'),
        ({'premise': ' \n'}, 'field premise: is empty'),
        ({'premise': 'a\ud800'}, 'field premise: is not valid Unicode'),
        ({'label': 'entailmnt'}, 'field label: found "entailmnt"; expected one of "entailment", "not_entailment"'),
        ({'label': 0}, 'field label: found 0; expected one of'),
        ({'label': ['entailment']}, 'field label: found .*; expected one of'),
        ({'idx': None}, 'field idx: is missing'),
        ({'idx': 1.5}, 'field idx: found 1.5; expected text'),
        ({'idx': True}, 'field idx: found true; expected text'),
        ({'rationale': ''}, 'field rationale: is empty'),
        ({'rationale': []}, r'field rationale: found \[\]; expected text'),
        ({'rationale': ['a', 3]}, r'field rationale\[1\]: found 3; expected text'),
        ({'weight': 'high'}, 'field weight: found "high"; expected a number'),
        ({'weight': float('nan')}, 'field weight: found nan; expected a finite number'),
        ({'weight': -1}, 'field weight: found -1; expected a finite number'),
    ],
)
def test_bad_rows_name_the_field(change, message):
    with pytest.raises(BadRow, match=message):
        one(load_task('rte'), {**ROW, **change})


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'promt': 'x'}, "unknown key 'promt'; did you mean 'prompt'"),
        ({'labels': [{'value': 'a', 'anser': 'b'}, 'c']}, "labels: unknown key 'anser'; did you mean 'answer'"),
        ({'labels': [{'value': 'a', 'answer': True}, 'c']}, 'labels: answer: found true; expected a text'),
        ({'labels': ['only']}, 'labels: found "only"; expected two or more'),
        ({'labels': ['a', 'a']}, 'labels: found "a", "a"; expected two or more, each value once'),
        ({'labels': [1.5, 2.5]}, 'labels: value: found 1.5; expected a text, a whole number or true/false'),
        ({'labels': {}}, "the key 'labels' is missing|expected a list"),
        ({'prompt': 'no field'}, 'prompt: names no field'),
        ({'prompt': r'Claim: {a}\nTrue?'}, 'prompt: found a backslash and an n; for a line break use "..." or a block'),
        ({'hub': {'prompt': r'{a}\n'}}, 'hub: prompt: found a backslash and an n'),
        ({'prompt': '{a.__class__}'}, r'prompt: {a.__class__} is not a field'),
        ({'prompt': '{a!r}'}, r'prompt: {a} is not a field'),
        ({'prompt': '{a'}, 'prompt: expected'),
        ({'id': '{a[b}'}, 'id: '),
        ({'explode': ['a of b']}, "explode: found 'a of b'; expected 'name in field'"),
        ({'words': {'b': {'x': 'y'}}}, "words: the prompt has no field 'b'"),
        ({'may_be_empty': ['b']}, "may_be_empty: the prompt has no field 'b'"),
        ({'metrics': ['acuracy']}, "metrics: unknown metric 'acuracy'; did you mean 'accuracy'"),
        ({'metrics': ['em']}, 'metrics: em, exact match by group, needs the key group'),
        ({'metrics': ['f1a'], 'labels': ['a', 'b', 'c']}, 'metrics: f1a needs two labels'),
        ({'hub': {'pth': 'x'}}, "hub: unknown key 'pth'; did you mean 'path'"),
        ({'hub': {'prompt': '{a!r}'}}, 'hub: prompt: '),
        ({'name': 3}, 'name: found 3; expected a text'),
    ],
)
def test_bad_templates_name_the_key(change, message):
    with pytest.raises(UserError, match=message):
        load_task({**CUSTOM, **change})


def test_templates_from_files(tmp_path):
    path = tmp_path / 'mine.yaml'
    path.write_text('name: mine\nprompt: "{a}"\nlabels: [false, true]\n')
    assert load_task(path).label_names == ('False', 'True')
    path.write_text('name: mine\nprompt: "{a}"\nlabels: [false, true]\nwrods: {}\n')
    with pytest.raises(UserError, match=f"{path}: unknown key 'wrods'; did you mean 'words'"):
        load_task(path)
    path.write_text('a: [')
    with pytest.raises(UserError, match='not valid YAML'):
        load_task(path)
    path.write_text('- a')
    with pytest.raises(UserError, match='expected a mapping'):
        load_task(path)
    with pytest.raises(UserError, match=r'none.yaml: No such file or directory'):
        load_task(tmp_path / 'none.yaml')
    with pytest.raises(UserError, match="unknown task 'rt'; did you mean 'rte'"):
        load_task('rt')

"""What a comparison left behind is read whole, or refused in a line that says where it is broken."""

import json

import pytest
import yaml
from made import line, make, write

from dhrd_plugin.comparison.results import read_results
from dhrd_plugin.errors import UserError


@pytest.fixture
def lines():
    return [line('a', arm, seed, [0, 1, 1], [0, 1, 0]) for arm in ('pooled', 'arm') for seed in (1, 2)]


def test_tasks_arms_and_seeds_come_in_the_order_of_the_yaml(tmp_path):
    results = read_results(make(tmp_path))
    assert results.tasks == ['cb', 'multirc', 'rte'] and results.seeds == [17, 18, 19]
    assert results.arms[:2] == ['pooled', 'dhrd_0.3'] and results.baseline == 'pooled'
    assert len(results.records) == 45 and not results.missing and not results.extra and not results.repeated
    assert [*results.cells(('cb', 'validation'), 'dhrd_1')] == [17, 18, 19]


def test_missing_extra_and_repeated_cells_are_counted(tmp_path, lines):
    plan = {'baseline': 'pooled', 'tasks': {'a': {}, 'b': {}}, 'arms': {'pooled': {}, 'arm': {}}, 'seeds': [1]}
    again = line('a', 'arm', 1, [0, 1, 1], [1, 1, 1])
    results = read_results(write(tmp_path, [*lines, again], plan))
    assert results.missing == [('b', 'pooled', 1), ('b', 'arm', 1)]
    assert results.extra == [('a', 'pooled', 2), ('a', 'arm', 2)]
    assert results.repeated == 1
    assert results.records['a', 'validation', 'arm', 1]['predictions'] == [1, 1, 1]


def test_the_first_split_of_a_task_counts(tmp_path, lines):
    more = [{**entry, 'split': 'contrast'} for entry in lines]
    results = read_results(write(tmp_path, [found for pair in zip(lines, more) for found in pair]))
    assert results.sets == [('a', 'validation'), ('a', 'contrast')] and results.main_sets == [('a', 'validation')]


def test_without_results_all_cells_are_missing(tmp_path, lines):
    write(tmp_path, lines)
    (tmp_path / 'results.jsonl').unlink()
    results = read_results(tmp_path)
    assert len(results.missing) == 4 and not results.records and not results.main_sets


@pytest.mark.parametrize(
    ('change', 'expected'),
    [
        (
            {'ids': ['0', '1', '7']},
            "line 2: ids: differs from line 1, .* at entry 2, '7' against '2'; expected the same",
        ),
        ({key: [0, 1] for key in ('ids', 'labels', 'predictions', 'groups')}, 'ids: .* 2 entries against 3'),
        ({'labels': [0, 1, 0]}, 'line 2: labels: differs from line 1'),
        ({'predictions': [0, 1]}, 'line 2: predictions: found 2; expected 3'),
        ({'predictions': [0, 1, 2]}, 'line 2: predictions: found 2 at 2; expected 0 to 1'),
        ({'predictions': [0, 1, True]}, 'line 2: predictions: found True at 2'),
        ({'groups': [None, 'q', None]}, 'line 2: groups: found rows with a group and rows without'),
        ({'task_metrics': ['em']}, 'line 2: groups: found rows without a group; exact match'),
        ({'task_metrics': ['f1']}, "line 2: task_metrics: found 'f1'; did you mean 'f1a'"),
        ({'label_names': ['a', 'b', 'c'], 'task_metrics': ['f1a']}, 'line 2: label_names: found 3; f1a needs 2'),
        ({'seed': '1'}, "line 2: seed: found '1'; expected int"),
        ({'series': {'dhrd/alpha': [1, 2]}}, 'line 2: series: dhrd/alpha: expected a list of'),
    ],
)
def test_a_broken_line_is_told_in_one_line(tmp_path, lines, change, expected):
    lines[1] |= change
    with pytest.raises(UserError, match=expected) as found:
        read_results(write(tmp_path, lines))
    assert len(str(found.value).splitlines()) == 1


@pytest.mark.parametrize(
    ('text', 'expected'),
    [('{"task": "a", "arm"', 'line 1: not JSON'), ('[]', 'line 1: task: found'), ('\xff', 'line 1: not JSON')],
)
def test_a_broken_file_is_told_in_one_line(tmp_path, lines, text, expected):
    write(tmp_path, lines)
    (tmp_path / 'results.jsonl').write_text(text)
    with pytest.raises(UserError, match=expected) as found:
        read_results(tmp_path)
    assert len(str(found.value).splitlines()) == 1


@pytest.mark.parametrize(
    ('plan', 'expected'),
    [
        ({'baseline': 'poled'}, "baseline: found 'poled'; did you mean 'pooled'"),
        ({'seeds': []}, r'seeds: found \[\]; expected a list that is not empty'),
        ({'arms': None}, 'arms: found None; expected a dict'),
    ],
)
def test_a_broken_yaml_is_told_in_one_line(tmp_path, lines, plan, expected):
    write(tmp_path, lines)
    path = tmp_path / 'comparison.yaml'
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **plan}))
    with pytest.raises(UserError, match=expected):
        read_results(tmp_path)
    for text, problem in (('a: [', 'not YAML'), ('!!python/object:os.x {}', 'not YAML'), ('[]', 'tasks: found None')):
        path.write_text(text)
        with pytest.raises(UserError, match=problem) as found:
            read_results(tmp_path)
        assert len(str(found.value).splitlines()) == 1
    path.unlink()
    with pytest.raises(UserError, match='no such file; expected a folder that'):
        read_results(tmp_path)


def test_series_may_hold_what_is_no_number(tmp_path, lines):
    lines[0]['series'] = {'dhrd/alpha': [[1, float('nan')], [2, None]]}
    assert json.loads(json.dumps(lines[0]))
    assert len(read_results(write(tmp_path, lines)).records) == 4

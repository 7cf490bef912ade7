"""Repetitions take turns, ratios are of one round, the peak is the peak, and a bar that is missed shows."""

import json
import re
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from benchmarks import main as benchmark
from benchmarks.measure import describe_machine, interleave, peak_memory, percentile, quartiles, ratios
from benchmarks.options import Options
from benchmarks.table import make_report, make_row, render, spell


def test_repetitions_take_turns():
    ran = []
    seconds = interleave({name: lambda name=name: ran.append(name) for name in 'abc'}, 3, warmup=1)
    assert {name: len(values) for name, values in seconds.items()} == {'a': 3, 'b': 3, 'c': 3}
    rounds = [''.join(ran[start : start + 3]) for start in range(0, len(ran), 3)]
    assert rounds == ['cab', 'abc', 'bca', 'cab']


def test_a_slow_spell_of_the_machine_leaves_the_ratio_alone():
    assert ratios([2.0, 20.0, 2.0], [1.0, 10.0, 1.0]) == [2.0, 2.0, 2.0]
    with pytest.raises(ValueError):
        ratios([1.0], [1.0, 2.0])


def test_quartiles_and_percentiles():
    values = [float(value) for value in range(1, 101)]
    assert [percentile(values, percent) for percent in (50, 95, 100)] == [50, 95, 100]
    assert percentile([3.0], 50) == percentile([3.0], 95) == 3.0
    assert quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == [2.0, 4.0]
    assert quartiles([7.0]) == [7.0, 7.0]


# MiB, above glibc's largest threshold: smaller blocks it may keep, and take another beside them.
@pytest.mark.parametrize('size', [64, 96])
def test_peak_memory_is_what_was_held_at_once(size):
    kept = [bytearray(100 << 20)]  # what was there before, and what came and went, are not counted

    def work():
        for _ in range(3):
            torch.ones(size << 18)

    work()  # once before, as peak_memory asks
    assert peak_memory(work) == pytest.approx(size << 20, rel=0.1)
    del kept


@pytest.mark.parametrize(
    ('bar', 'met', 'missed_by'),
    [({'at_least': 2.0}, True, None), ({'at_most': 2.0}, False, 0.25), ({'at_least': 4.0}, False, 0.375)],
)
def test_a_bar_that_is_missed_shows_by_how_much(bar, met, missed_by):
    row = make_row('ours', [5.0, 5.0, 6.0], 's', [2.0, 2.5, 3.0], 'theirs', **bar)
    assert (row['median'], row['ratio'], row['met'], row.get('missed_by')) == (5.0, 2.5, met, missed_by)
    line = next(line for line in render(make_report('made', {}, [row])).splitlines() if 'ours' in line)
    assert line.split('|')[-2].strip() == ('yes' if met else f'no, by {100 * missed_by:.3g} %')


def test_a_bar_without_a_ratio_is_for_the_value():
    assert make_row('waiting', [0.5, 0.5, 3.0], '%', at_most=1.0)['met']


def test_a_report_is_a_table_and_plain_data():
    rows = [
        make_row('a', [1.0, 2.0, 3.0], 's', note='of one thread'),
        make_row('b', [1234.5], 'rows/s', [0.5], 'a', at_least=1),
    ]
    report = make_report('made', {'layers': 2}, rows, ['that is all'])
    assert json.loads(json.dumps(report)) == report
    assert report['machine']['versions']['torch'] == torch.__version__.split('+')[0]
    text = render(report).splitlines()
    head, last = ([cell.strip() for cell in text[line].split('|')[1:-1]] for line in (2, 5))
    assert head == ['what', 'median', 'spread', 'ratio', 'bar', 'met?']
    assert last == ['b', '1,234 rows/s', '', '0.5 x a', '>= 1', 'no, by 50 %']
    assert text[-2:] == ['- a: of one thread', '- that is all']


def test_the_machine_is_told():
    machine = describe_machine()
    assert machine['threads'] == torch.get_num_threads()
    assert machine['cores'] >= 1 and machine['processor'] and machine['versions']['mosaicml']


@pytest.fixture
def asked(monkeypatch):
    """What the benchmark ``infer`` was asked for; it measures nothing."""
    found: list[Options] = []
    stand_in = SimpleNamespace(run=lambda options: found.append(options) or make_report('infer', {}, []))
    monkeypatch.setitem(sys.modules, 'benchmarks.infer', stand_in)
    return found


def test_the_command_hands_on_its_options_and_writes_the_report(asked, tmp_path, capsys):
    out = tmp_path / 'report.json'
    assert benchmark.main(['infer', '--model', 'here', '--layers', '2', '--rows', '8', '--output', str(out)]) == 0
    assert asked == [Options(model='here', layers=2, rows=8)]
    assert json.loads(out.read_text())['benchmark'] == 'infer'
    assert 'median' in capsys.readouterr().out


@pytest.mark.parametrize('arguments', [['infer', '--layers', '-1'], ['infer', '--rows', 'many'], ['guess'], []])
def test_the_command_refuses_what_it_does_not_know(arguments, capsys):
    assert benchmark.main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith('error: ') and line.endswith('see benchmark.py --help')


README = Path(benchmark.__file__).parent / 'README.md'


def test_the_commands_of_the_readme_are_right():
    """Each is understood, and those that write a report write one that lies there."""
    commands = re.findall(r'python scripts/benchmark.py (.*)', README.read_text().replace('\\\n', ''))
    assert {command.split()[0] for command in commands} == set(benchmark.VERBS)
    for command in commands:
        options = benchmark._parse(shlex.split(command, comments=True))
        assert options.output is None or (README.parents[2] / options.output).is_file()


def test_the_figures_of_the_readme_are_those_of_the_reports():
    reports = [json.loads(path.read_text()) for path in (README.parent / 'results').glob('*.json')]
    rows = [row for report in reports for row in report['rows'] if row['repetitions']]
    pairs = [(row['median'], row['spread']) for row in rows]
    pairs += [(row['ratio'], row['ratio_spread']) for row in rows if 'ratio' in row]
    found = {f'{spell(median)} ({spell(low)} to {spell(high)})' for median, (low, high) in pairs}
    found |= {spell(median) for median, _ in pairs}
    said = [re.sub(' [x%]', '', text) for text in re.findall(r'\*\*([-0-9].*?)\*\*', README.read_text())]
    assert len(said) >= 15 and set(said) <= found


def test_the_readme_is_short_and_its_links_are_there():
    text = README.read_text()
    assert len(text.encode()) <= 9 * 1024
    assert all((README.parent / link).exists() for link in re.findall(r'\]\(((?!http)[^)#]+)\)', text))

"""What the sections of a report say."""

from made import line, write

from dhrd_plugin.comparison.results import read_results
from dhrd_plugin.comparison.sections import cost


def test_one_disturbed_cell_does_not_change_what_a_step_costs(tmp_path):
    seconds = {'pooled': (2.0, 2.1, 1.9), 'dhrd': (3.0, 46.0, 2.9)}  # a busy machine, once
    lines = [
        line('a', arm, seed, [0, 1], [0, 1], steps=10, tokens=800, seconds_per_step=value)
        for arm, values in seconds.items()
        for seed, value in enumerate(values)
    ]
    (table,) = cost(read_results(write(tmp_path, lines))).tables
    assert [list(row) for row in table.rows] == [
        ['a', 'pooled', '10', '800', '80', '2', '1.00 x'],
        ['a', 'dhrd', '10', '800', '80', '3', '1.50 x'],
    ]

"""How arms are told apart in the charts, and how a long series becomes a short one."""

import matplotlib
import numpy as np
import pytest
from made import ARMS, TASKS, make

from dhrd_plugin.comparison.charts import POINTS, STYLE, _add_legend, _new_figure, arm_styles, draw_curves, thin
from dhrd_plugin.comparison.results import read_results


def test_an_arm_looks_alike_wherever_it_is_and_unlike_the_others():
    arms = ['pooled', *(f'arm {i}' for i in range(30))]
    styles = arm_styles(arms, 'pooled')
    looks = {(style['color'], str(style['linestyle'])) for style in styles.values()}
    marks = {(style['color'], style['marker']) for style in styles.values()}
    assert len(looks) == 31 and len(marks) == 25  # 24 arms pass before a colour meets its mark again
    assert arm_styles(arms[:4], 'pooled') == {arm: styles[arm] for arm in arms[:4]}
    assert arm_styles(['arm 0', 'pooled', 'arm 1'], 'pooled') == {
        arm: styles[arm] for arm in ('arm 0', 'pooled', 'arm 1')
    }


@pytest.mark.parametrize(
    'labels',
    [
        ['pooled', 'dhrd_1', 'rationale_1', 'unclipped_1', 'pooled_unclipped'],  # matplotlib: two, one, one and one
        ['pooled', 'dhrd_0.3', 'dhrd_1', 'dhrd_1_to_0', 'shuffled_0.3'],
        ['an arm of a name that is as long as the picture is wide'],
    ],
)
def test_a_legend_lies_inside_the_figure(labels):
    with matplotlib.rc_context(STYLE):
        figure, axes = _new_figure(2.0)
        for label in labels:
            axes.plot([0, 1], label=label)
        _add_legend(figure, axes)
        figure.draw_without_rendering()
        found = figure.legends[0].get_window_extent()
    assert found.x0 >= 0 and found.x1 <= figure.bbox.x1


@pytest.mark.parametrize('length', [0, 1, POINTS, POINTS + 1, 1000])
def test_a_long_series_becomes_means_of_neighbours(length):
    series = [[step, 2.0 * step] for step in range(length)]
    found = thin(series)
    assert len(found) <= POINTS and (length > POINTS or found.tolist() == series)
    assert np.allclose(found[:, 1], 2 * found[:, 0])
    assert length == 0 or found[0, 0] < length / POINTS <= POINTS * len(found)


def test_what_is_no_number_is_left_out():
    assert thin([[0, 1.0], [1, float('nan')], [2, None], [3, float('inf')], [4, 5.0]]).tolist() == [[0, 1], [4, 5]]


def test_the_baselines_one_loss_stands_beside_the_classification_loss_of_the_others(tmp_path):
    arms = {arm: ARMS[arm] for arm in ('pooled', 'dhrd_1_to_0')}
    results = read_results(make(tmp_path, tasks={'rte': TASKS['rte']}, arms=arms, seeds=(17, 18)))
    charts = {chart.title: chart.alt for chart in draw_curves(results)}
    names = ['Classification loss', 'Reasoning loss', 'alpha, the weight of the reasoning loss']
    assert [*charts] == [*names, 'dhrd/grad/cosine', 'dhrd/grad/norm_ratio']  # neither what is counted nor what is flat
    assert all('dhrd_1_to_0 from' in alt for alt in charts.values())
    assert [name for name, alt in charts.items() if 'pooled from' in alt] == ['Classification loss']
    found = [
        thin(cell['series']['loss/train/total']) for cell in results.cells(('rte', 'validation'), 'pooled').values()
    ]
    first, last = (np.mean([points[end, 1] for points in found]) for end in (0, -1))
    assert f'rte: pooled from {first:.3g} to {last:.3g}' in charts['Classification loss']


def test_an_alpha_that_no_run_changes_is_no_curve(tmp_path):
    arms = {arm: ARMS[arm] for arm in ('pooled', 'dhrd_0.3', 'dhrd_1')}
    found = draw_curves(read_results(make(tmp_path, tasks={'rte': TASKS['rte']}, arms=arms, seeds=(17,))))
    assert 'curve-dhrd-alpha' not in {chart.name for chart in found} and len(found) == 4
    assert '>Reasoning loss</text>' in found[1].svg  # what the numbers on the left are


@pytest.mark.parametrize('arms', [4, 5])
def test_seeds_have_lines_of_their_own_where_arms_are_few(tmp_path, arms):
    few = dict([*ARMS.items()][:arms])
    (chart, *_) = draw_curves(read_results(make(tmp_path, tasks={'rte': TASKS['rte']}, arms=few, seeds=(17, 18))))
    assert ('opacity: 0.35' in chart.svg) == (arms == 4)

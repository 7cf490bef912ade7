"""What was logged while the cells trained: the losses, alpha, and whatever else stands under ``dhrd/``."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from numpy.typing import NDArray

from dhrd_plugin.comparison.charts import STYLE, Chart, add_legend, arm_styles, new_figure, render
from dhrd_plugin.comparison.results import Results

__all__ = ['draw_curves', 'thin']

CLASSIFICATION = 'loss/train/classification'
COUNTED = ('dhrd/tokens', 'dhrd/padding')  # costs: there is a table of them
TITLES = {
    CLASSIFICATION: 'Classification loss',
    'loss/train/reasoning': 'Reasoning loss',
    'dhrd/alpha': 'alpha, the weight of the reasoning loss',
}
POINTS = 30  # of a curve: of more steps than that, each point is a mean
Points = NDArray[np.float64]


def draw_curves(results: Results) -> list[Chart]:
    """A chart for each series, with a panel for each task: the mean over seeds, and thin lines for each of them.

    What never changes, such as beta or a count of cut rationales that stays at zero, is left out.
    """
    logged = sorted({name for record in results.records.values() for name in record['series']})
    others = [name for name in logged if name.startswith('dhrd/') and name not in (*TITLES, *COUNTED)]
    names = [*TITLES, *(name for name in others if _varies(results, name))]
    return [chart for name in names if (chart := _draw(results, name))]


def _varies(results: Results, name: str) -> bool:
    return len({value for record in results.records.values() for _, value in record['series'].get(name, ())}) > 1


def _series(record: Mapping[str, Any], name: str) -> Sequence[Sequence[float | None]]:
    """A cell's series; a pooled baseline has one loss, which is logged as the total."""
    if name == CLASSIFICATION and record.get('alpha') is None and name not in record['series']:
        name = 'loss/train/total'
    return record['series'].get(name, ())


def _draw(results: Results, name: str) -> Chart | None:
    panels = {rows[0]: _by_arm(results, rows, name) for rows in results.main_sets}
    panels = {task: arms for task, arms in panels.items() if arms}
    if not panels:
        return None
    styles = arm_styles(results.arms, results.baseline)
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    with matplotlib.rc_context(STYLE):
        figure, grid = new_figure(0.3 + 2.3 * rows, nrows=rows, ncols=columns, squeeze=False)
        for axes, (task, arms) in zip(grid.flat, panels.items()):
            for arm, seeds in arms.items():
                width = max(1.0, 2.4 - 0.2 * results.arms.index(arm))  # a line below one that is like it still shows
                _draw_arm(axes, arm, seeds, styles[arm], width)
            axes.set_title(task, fontsize=10)
            axes.set_xlabel('step')
            axes.grid(color='#eeeeee')
        for axes in list(grid.flat)[len(panels) :]:
            axes.set_visible(False)
        most = max(panels.values(), key=len)
        add_legend(figure, next(axes for axes, arms in zip(grid.flat, panels.values()) if arms is most))
        title = TITLES.get(name, name)
        return render(f'curve-{_slug(name)}', title, f'{title} over steps. {_ends(panels)}.', figure)


def _by_arm(results: Results, rows: tuple[str, str], name: str) -> dict[str, list[Points]]:
    found = {arm: [_series(cell, name) for cell in results.cells(rows, arm).values()] for arm in results.arms}
    thinned = {arm: [points for series in cells if len(points := thin(series))] for arm, cells in found.items()}
    return {arm: seeds for arm, seeds in thinned.items() if seeds}


def _draw_arm(axes: Any, arm: str, seeds: Sequence[Points], style: Mapping[str, Any], width: float) -> None:
    if len(seeds) > 1:
        for points in seeds:
            axes.plot(*points.T, color=style['color'], linewidth=0.6, alpha=0.35)
    mean = _mean(seeds)
    marker = style['marker'] if len(mean) < 3 else ''  # a lone point has no line to be seen by
    axes.plot(*mean.T, color=style['color'], linestyle=style['linestyle'], linewidth=width, marker=marker, label=arm)


def thin(series: Sequence[Sequence[float | None]], most: int = POINTS) -> Points:
    """[P, 2] steps and values, P at most ``most``: of longer series, means of as many neighbours each.

    What is no finite number is left out.
    """
    points = np.array(series, dtype=np.float64).reshape(-1, 2)
    points = points[np.isfinite(points).all(1)]
    size = max(1, -(-len(points) // most))
    return np.array([points[start : start + size].mean(0) for start in range(0, len(points), size)]).reshape(-1, 2)


def _mean(seeds: Sequence[Points]) -> Points:
    """[P, 2] the mean over seeds at the steps that all of them have."""
    tables = [dict(points.tolist()) for points in seeds]
    steps = [step for step in tables[0] if all(step in table for table in tables)]
    return np.array([(step, np.mean([table[step] for table in tables])) for step in steps]).reshape(-1, 2)


def _slug(name: str) -> str:
    return ''.join(letter if letter.isascii() and letter.isalnum() else '-' for letter in name)


def _ends(panels: Mapping[str, Mapping[str, Sequence[Points]]]) -> str:
    return '; '.join(
        f'{task}: ' + ', '.join(f'{arm} from {mean[0, 1]:.3g} to {mean[-1, 1]:.3g}' for arm, mean in means.items())
        for task, arms in panels.items()
        if (means := {arm: mean for arm, seeds in arms.items() if len(mean := _mean(seeds))})
    )

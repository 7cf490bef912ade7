"""Pictures of a comparison, drawn by matplotlib: scores, differences, curves. An arm looks alike in all of them."""

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.textpath import TextPath
from numpy.typing import NDArray

from dhrd_plugin.comparison.results import Results, Rows
from dhrd_plugin.comparison.statistics import Difference, Estimate, Statistics

WIDTH = 5.0  # inches: small enough to be read on a phone
GREY = '#666666'
# Okabe and Ito's colours, which people with any kind of colour vision tell apart; not their yellow, too pale on white,
# nor their second blue, which lines that thin do not tell from the first.
COLOURS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#000000')
MARKERS = ('s', '^', 'D', 'v', 'P', 'X', '<', '>')
# Five of these to six colours and eight markers: thirty arms pass before two look alike.
DASHES: tuple[Any, ...] = ('-', '--', '-.', (0, (1, 1)), (0, (5, 1, 1, 1, 1, 1)))
STYLE: Any = {
    'font.family': 'DejaVu Sans',  # comes with matplotlib
    'font.size': 10,
    'axes.spines.top': False,
    'axes.spines.right': False,
    'text.parse_math': False,  # a name may hold a dollar sign
    'svg.fonttype': 'none',
}
CLASSIFICATION = 'loss/train/classification'
COUNTED = ('dhrd/tokens', 'dhrd/padding')  # costs: there is a table of them
TITLES = {
    CLASSIFICATION: 'Classification loss',
    'loss/train/reasoning': 'Reasoning loss',
    'dhrd/alpha': 'alpha, the weight of the reasoning loss',
}
FEW = 4  # arms whose seeds have lines of their own; of more, they are a thicket
POINTS = 30  # of a curve: of more steps than that, each point is a mean
Points = NDArray[np.float64]


@dataclass(frozen=True)
class Chart:
    """A picture in both forms."""

    name: str  # of its file, without suffix; unique in a report
    title: str  # a line above it
    alt: str  # what it shows, in words
    svg: str  # an ``<svg>`` element for a page, its text as text, its ids unlike those of other charts
    png: bytes  # a PNG file


def _render(name: str, title: str, alt: str, figure: Figure) -> Chart:
    """Save a figure in both forms; the same figure gives the same SVG."""
    text, image = io.StringIO(), io.BytesIO()
    with matplotlib.rc_context({**STYLE, 'svg.hashsalt': name}):
        figure.savefig(text, format='svg', metadata={'Date': None}, transparent=True)
        figure.savefig(image, format='png', dpi=150)
    svg = text.getvalue()
    svg = re.sub(r'<metadata>.*?</metadata>\s*', '', svg[svg.index('<svg') :], flags=re.DOTALL)
    svg = svg.replace("'DejaVu Sans'", "'DejaVu Sans', Verdana, sans-serif")
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf'\g<1>{name}-', svg)
    return Chart(name, title, alt, svg, image.getvalue())


def arm_styles(arms: Sequence[str], baseline: str) -> dict[str, dict[str, Any]]:
    """Colour, marker and dashes of each arm, for ``plot``: the baseline is grey dots."""
    others = [arm for arm in arms if arm != baseline]
    styles = {
        arm: {
            'color': COLOURS[index % len(COLOURS)],
            'marker': MARKERS[index % len(MARKERS)],
            'linestyle': DASHES[index % len(DASHES)],
        }
        for index, arm in enumerate(others)
    }
    return {**styles, baseline: {'color': GREY, 'marker': 'o', 'linestyle': '-'}}


def _new_figure(height: float, **subplots: Any) -> tuple[Figure, Any]:
    """A figure of the reports' width, and its axes."""
    figure = Figure(figsize=(WIDTH, height), layout='constrained')
    return figure, figure.subplots(**subplots)


def _add_legend(figure: Figure, axes: Axes) -> None:
    """One legend below everything, in room of its own."""
    handles, labels = axes.get_legend_handles_labels()
    widths = [40 + TextPath((0, 0), label, size=10).get_extents().width for label in labels]  # with line and space

    def fits(columns: int) -> bool:  # as matplotlib shares them out: five in four columns are two, one, one and one
        return sum(max(part) for part in np.array_split(widths, columns)) < 72 * WIDTH - 10

    columns = max([1, *filter(fits, range(2, len(labels) + 1))])
    figure.set_figheight(figure.get_figheight() + 0.22 * -(-len(labels) // columns))
    figure.legend(handles, labels, loc='outside lower center', ncols=columns, columnspacing=1.0, frameon=False)


def draw_scores(results: Results, statistics: Statistics, sets: Sequence[Rows] = (), name: str = '') -> Chart:
    """The arms' scores: a radar chart over tasks as the paper's Figure 1.

    A radar with fewer than three axes shows nothing; then, or where tasks are settings, dots with their intervals,
    grouped by task.

    Args:
        results: see :func:`~dhrd_plugin.comparison.results.read_results`.
        statistics: of them.
        sets: further evaluation sets, of which there is no average. Default: those that count.
        name: what the name of the picture ends in. Default: nothing.
    """
    main = not sets
    sets = sets or [rows for rows in results.main_sets if rows[0] in statistics.common]
    arms = [arm for arm in results.arms if all((rows, arm) in statistics.scores for rows in sets)]
    styles = arm_styles(results.arms, results.baseline)
    values = {arm: [statistics.scores[rows, arm] for rows in sets] for arm in arms}
    alt = '; '.join(
        f'{arm}: {", ".join(f"{task} {value.value * 100:.1f}" for (task, _), value in zip(sets, found))}'
        for arm, found in values.items()
    )
    with matplotlib.rc_context(STYLE):
        if len(sets) >= 3 and results.average:
            figure, centre = _draw_radar([task for task, _ in sets], values, styles)
            title = f'Scores by task, in percent; the centre is {centre:.0f}'
            return _render(f'scores{name}', title, f'Radar chart of the scores in percent. {alt}.', figure)
        places = [task for task, _ in sets]
        if main and len(sets) > 1 and results.average:
            averages = statistics.averages
            values = {arm: [*found, averages[arm]] for arm, found in values.items() if arm in averages}
            places.append('average')
        figure = _draw_dots(places, values, styles)
        title = 'Scores by task, in percent, with 95 % intervals'
        return _render(f'scores{name}', title, f'Dots with intervals. {alt}.', figure)


def _draw_radar(
    tasks: Sequence[str], values: Mapping[str, Sequence[Estimate]], styles: Mapping[str, dict[str, Any]]
) -> tuple[Figure, float]:
    figure, axes = _new_figure(4.4, subplot_kw={'projection': 'polar'})
    angles = np.linspace(0, 2 * np.pi, len(tasks), endpoint=False)
    for arm, found in values.items():
        points = [100 * estimate.value for estimate in found]
        axes.plot([*angles, angles[0]], [*points, points[0]], label=arm, markersize=5, **styles[arm])
    shown = [100 * estimate.value for found in values.values() for estimate in found]
    floor, ceiling = max(0, 10 * np.floor((min(shown) - 5) / 10)), min(100, 10 * np.ceil((max(shown) + 1) / 10))
    axes.set(theta_offset=np.pi / 2, theta_direction=-1, ylim=(floor, ceiling))
    axes.set_xticks(angles, tasks)
    axes.tick_params(axis='x', pad=12)
    axes.set_yticks(np.arange(floor, ceiling + 1, 10 if ceiling - floor <= 60 else 20))
    axes.tick_params(axis='y', labelsize=8, labelcolor=GREY)
    axes.set_rlabel_position(180 / len(tasks))
    axes.spines['polar'].set_visible(False)
    axes.grid(color='#dddddd')
    _add_legend(figure, axes)
    return figure, floor


def _draw_dots(
    places: Sequence[str], values: Mapping[str, Sequence[Estimate]], styles: Mapping[str, dict[str, Any]]
) -> Figure:
    figure, axes = _new_figure(3.6)
    for index, (arm, found) in enumerate(values.items()):
        x = np.arange(len(found)) + 0.7 * ((index + 0.5) / len(values) - 0.5)
        low, y, high = (np.array([getattr(e, name) for e in found]) for name in ('low', 'value', 'high'))
        look = {'fmt': styles[arm]['marker'], 'color': styles[arm]['color'], 'markersize': 5, 'linewidth': 1.5}
        axes.errorbar(x, 100 * y, 100 * np.maximum(0, [y - low, high - y]), label=arm, **look)
    axes.set_xticks(range(len(places)), places)
    axes.set(ylabel='score in %', xlim=(-0.5, len(places) - 0.5))
    axes.tick_params(axis='x', length=0)
    for edge in range(1, len(places)):
        axes.axvline(edge - 0.5, color='#dddddd', linewidth=0.8)
    axes.grid(axis='y', color='#eeeeee')
    axes.set_axisbelow(True)
    _add_legend(figure, axes)
    return figure


def draw_differences(results: Results, statistics: Statistics, sets: Sequence[Rows] = (), name: str = '') -> Chart:
    """A forest plot: each arm minus the baseline, by task and on average, filled where zero is excluded.

    For the arguments see :func:`draw_scores`.
    """
    shown = sets or results.main_sets
    differences: dict[tuple[str, str], Difference] = {
        (rows[0], arm): value for (rows, arm), value in statistics.differences.items() if rows in shown
    }
    if not sets and len(statistics.common) > 1:
        differences |= {('average', arm): value for arm, value in statistics.average_differences.items()}
    lines: list[tuple[str, str | None, Difference | None]] = []
    for (group, arm), value in differences.items():
        if not lines or lines[-1][0] != group:
            lines.append((group, None, None))
        lines.append((group, arm, value))
    alt = '; '.join(f'{group} {arm} {describe(value)}' for group, arm, value in lines if arm and value)
    title = f'Difference from {results.baseline}, in points, with 95 % intervals'
    with matplotlib.rc_context(STYLE):
        figure, axes = _new_figure(0.9 + 0.27 * len(lines))
        axes.axvline(0, color=GREY, linewidth=1)
        styles = arm_styles(results.arms, results.baseline)
        for y, (_, arm, value) in enumerate(lines):
            if arm and value:
                _draw_line(axes, y, value, styles[arm])
        axes.set_yticks(range(len(lines)), [arm or group for group, arm, _ in lines])
        for tick, (_, arm, _) in zip(axes.get_yticklabels(), lines):
            tick.set_fontweight('normal' if arm else 'bold')
        axes.set(ylim=(len(lines) - 0.4, -0.6), xlabel=f'points above or below {results.baseline}')
        axes.tick_params(axis='y', length=0)
        axes.spines['left'].set_visible(False)
        axes.grid(axis='x', color='#eeeeee')
        axes.set_axisbelow(True)
        return _render(f'differences{name}', title, f'Forest plot. {alt}.', figure)


def _draw_line(axes: Axes, y: float, value: Difference, style: Mapping[str, Any]) -> None:
    low, middle, high = 100 * value.low, 100 * value.value, 100 * value.high
    filled = value.verdict in ('gain', 'loss')
    axes.plot([low, high], [y, y], color=style['color'], linewidth=1.8)
    face = style['color'] if filled else 'white'
    axes.plot([middle], [y], style['marker'], color=style['color'], markerfacecolor=face, markersize=6)
    axes.text(1.02, y, describe(value), transform=axes.get_yaxis_transform(), va='center', fontsize=9)


def describe(value: Estimate) -> str:
    """A difference in points, such as ``+1.2 [+0.4, +2.0]``."""
    text = f'{100 * value.value:+.1f} [{100 * value.low:+.1f},\N{NO-BREAK SPACE}{100 * value.high:+.1f}]'
    return text.replace('-', '\N{MINUS SIGN}')


# -------------------------------------------------------------------------- curves: what was logged


def draw_curves(results: Results) -> list[Chart]:
    """A chart for each series, with a panel for each task: means over seeds; thin lines of each where arms are few.

    What changes within no run, such as beta, an alpha without a schedule or a count of cut rationales that stays at
    zero, is left out.
    """
    logged = [item for record in results.records.values() for item in record['series'].items()]
    varying = {name for name, points in logged if len({value for _, value in points}) > 1}
    shown = [name for name in TITLES if name in varying or not name.startswith('dhrd/')]
    names = [*shown, *sorted(name for name in varying - {*TITLES, *COUNTED} if name.startswith('dhrd/'))]
    return [chart for name in names if (chart := _draw(results, name))]


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
        figure, grid = _new_figure(0.3 + 2.3 * rows, nrows=rows, ncols=columns, squeeze=False)
        for axes, (task, arms) in zip(grid.flat, panels.items()):
            for arm, seeds in arms.items():
                width = max(1.0, 2.4 - 0.2 * results.arms.index(arm))  # a line below one that is like it still shows
                _draw_arm(axes, arm, seeds, styles[arm], width, len(results.arms) <= FEW)
            axes.set_title(task, fontsize=10)
            axes.set_xlabel('step')
            axes.grid(color='#eeeeee')
        for axes in list(grid.flat)[len(panels) :]:
            axes.set_visible(False)
        most = max(panels.values(), key=len)
        _add_legend(figure, next(axes for axes, arms in zip(grid.flat, panels.values()) if arms is most))
        title = TITLES.get(name, name)
        figure.supylabel(title.split(',')[0].removeprefix('dhrd/'), fontsize=9)
        slug = re.sub('[^a-zA-Z0-9]', '-', name)
        return _render(f'curve-{slug}', title, f'{title} over steps. {_ends(panels)}.', figure)


def _by_arm(results: Results, rows: tuple[str, str], name: str) -> dict[str, list[Points]]:
    found = {arm: [_series(cell, name) for cell in results.cells(rows, arm).values()] for arm in results.arms}
    thinned = {arm: [points for series in cells if len(points := thin(series))] for arm, cells in found.items()}
    return {arm: seeds for arm, seeds in thinned.items() if seeds}


def _draw_arm(
    axes: Any, arm: str, seeds: Sequence[Points], style: Mapping[str, Any], width: float, thin_lines: bool
) -> None:
    if thin_lines and len(seeds) > 1:
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


def _ends(panels: Mapping[str, Mapping[str, Sequence[Points]]]) -> str:
    return '; '.join(
        f'{task}: ' + ', '.join(f'{arm} from {mean[0, 1]:.3g} to {mean[-1, 1]:.3g}' for arm, mean in means.items())
        for task, arms in panels.items()
        if (means := {arm: mean for arm, seeds in arms.items() if len(mean := _mean(seeds))})
    )

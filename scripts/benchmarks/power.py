"""Power laws: how a cost grows with a size, as the slope of a line through the logarithms."""

from collections.abc import Mapping, Sequence

import numpy as np

from benchmarks.measure import ratios
from benchmarks.table import Table, make_row

Costs = Mapping[str, Sequence[float]]  # by name, one for each repetition


def exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """The least-squares slope of ``log(cost)`` over ``log(size)``: 1 where twice the size costs twice as much."""
    return float(np.polyfit(np.log(sizes), np.log(costs), 1)[0])


def growth_rows(
    what: str,
    unit: str,
    costs: Costs,
    over: str,
    sizes: Sequence[float],
    expected: str,
    against: tuple[str, Costs] | None = None,
    at_most: float | None = None,
) -> Table:
    """Make a row for each size, and one for the exponent, which is fitted to each repetition by itself.

    Args:
        what: the thing that costs.
        unit: of the costs.
        costs: one name for each size.
        over: what the sizes are of.
        sizes: in the order of ``costs``.
        expected: the exponent that is expected, and why.
        against: a name, and what each cost is divided by, of the same repetition. Default: the first size's costs.
        at_most: the bar for the exponent. Default: none.
    """
    first = next(iter(costs))
    name, others = against or (first, dict.fromkeys(costs, costs[first]))
    rows = [
        make_row(f'{what}, {label}', values, unit, ratios(values, others[label]), name)
        for label, values in costs.items()
    ]
    found = [exponent(sizes, values) for values in zip(*costs.values(), strict=True)]
    return [*rows, make_row(f'{what}: exponent over {over}', found, at_most=at_most, note=f'expected: {expected}')]

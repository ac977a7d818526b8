"""Names written beside the points of a figure, so that none covers another."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes

from hybrid_scale.pages import svg

GAP = 0.06
"""Least distance of two names, as a share of the axes' height."""
LETTER = 0.019
"""Width of a letter, as a share of the axes' width, of figures as wide as ours."""


@dataclass(frozen=True)
class Name:
    text: str
    x: float
    y: float
    colour: str


def write_names(axes: Axes, names: Sequence[Name], gap: float = GAP) -> None:
    """Write each name right of its point; names that would touch are moved up or down, with a line to the point.

    Linear, logarithmic and other axes alike: places are computed where the axes are linear. Axes grow to hold the names.
    """
    if not names:
        return
    across, up = axes.xaxis.get_transform(), axes.yaxis.get_transform()
    xs, ys = (
        transform.transform(np.array(values, dtype=float))
        for transform, values in ((across, [name.x for name in names]), (up, [name.y for name in names]))
    )
    left, right = across.transform(np.array(axes.get_xlim()))
    needed = max(x + (right - left) * (0.05 + LETTER * len(name.text)) for x, name in zip(xs, names, strict=True))
    axes.set_xlim(*across.inverted().transform(np.array([left, max(right, needed)])))
    low, high = up.transform(np.array(axes.get_ylim()))
    distance = gap * (high - low)
    placed = spread_apart(ys, distance)
    axes.set_ylim(*up.inverted().transform(np.array([min(low, min(placed) - distance), max(high, max(placed) + distance)])))
    ends = zip(across.inverted().transform(xs + 0.035 * (right - left)), up.inverted().transform(np.array(placed)), strict=True)
    for name, before, height, end in zip(names, ys, placed, ends, strict=True):
        moved = abs(height - before) > 0.3 * distance
        arrow = {"arrowstyle": "-", "color": svg.MUTED, "linewidth": 0.7, "shrinkB": 6} if moved else None
        style = {"color": name.colour, "va": "center", "fontweight": "bold", "arrowprops": arrow}
        axes.annotate(name.text, (name.x, name.y), xytext=end, **style)  # type: ignore[arg-type]


def spread_apart(heights: Sequence[float] | np.ndarray, gap: float) -> list[float]:
    """`heights` moved as little as a few passes need to leave `gap` between any two; the order is kept."""
    order = np.argsort(heights, kind="stable")
    placed = np.array(heights, dtype=float)[order]
    for _ in range(100):
        overlap = gap - np.diff(placed)
        if (overlap <= 1e-9).all():
            break
        for at in np.flatnonzero(overlap > 0):
            push = max(0.0, gap - (placed[at + 1] - placed[at])) / 2
            placed[at] -= push
            placed[at + 1] += push
    result = np.empty_like(placed)
    result[order] = placed
    return [float(height) for height in result]

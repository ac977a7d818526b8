"""The report's figures, each with its caption and the data behind it.

Draws what it is given; which runs count was decided in `scores`.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from hybrid_scale.pages import svg
from hybrid_scale.pages.names import Name, write_names
from hybrid_scale.pages.parts import Plot

WIDTH, HEIGHT = 440, 330
CURVE_POINTS = 120
"""Most points of one run's curve; longer ones are averaged in bins."""

STOPS = tuple(
    ((0, 1 / 3, 2 / 3, 1), tuple(channel / 255 for channel in channels))
    for channels in zip((242, 246, 250), (156, 195, 224), (61, 134, 191), (8, 55, 107), strict=True)
)
"""Pale to deep blue, a scale for each channel."""
LEFT, TOP, CELL = 44, 38, (33, 29)
"""Of a heat map: where the cells begin, their width and height."""
DARK_TEXT, LIGHT_TEXT = "#101418", "#ffffff"
EQUAL_CONTRAST = 0.185
"""Relative luminance (WCAG 2) on which the two texts are equally readable."""


@dataclass(frozen=True)
class Look:
    colour: str
    marker: str


def looks(arms: Sequence[str]) -> dict[str, Look]:
    """A colour and a marker for each arm, the same in every figure."""
    colours, markers = svg.ARM_COLOURS, svg.ARM_MARKERS
    # The marker moves on once more after each round of colours, so that no pair repeats before 64 arms.
    return {arm: Look(colours[n % 8], markers[(n + n // 8) % 8]) for n, arm in enumerate(arms)}


def keep_apart(axes: Axes, labels: Sequence[tuple[str, float, float]], look: Mapping[str, Look]) -> None:
    """The names of arms beside their points (arm, x, y), each in its colour."""
    write_names(axes, [Name(arm, x, y, look[arm].colour) for arm, x, y in labels])


def heat_map(key: str, title: str, caption: str, matrix: pd.DataFrame, limits: tuple[float, float]) -> Plot:
    """Rows: query languages; columns: passage languages; values in hundredths, on a colour scale that arms share."""
    values, (low, high) = matrix.to_numpy(dtype=float), limits
    shade = np.clip((values - low) / (high - low if high > low else 1.0), 0, 1)
    colours = np.stack([np.interp(np.nan_to_num(shade), *STOPS[channel]) for channel in range(3)], -1)
    cells = [
        _cell(row, column, value, colours[row, column], bool(matrix.index[row] == matrix.columns[column]))
        for (row, column), value in np.ndenumerate(values)
    ]
    parts = [*_cell_names(list(map(str, matrix.index)), list(map(str, matrix.columns))), *cells]
    size = (LEFT + CELL[0] * values.shape[1] + 4, TOP + CELL[1] * values.shape[0] + 4)
    described = "A matrix in hundredths; rows: queries in a language, columns: passages in a language."
    drawn = svg.element(svg.texts("".join(parts)), key, title, described, *size)
    long = matrix.rename_axis("query_language").reset_index().melt("query_language", var_name="passage_language")
    return Plot(key, title, caption, drawn, long)


def _cell_names(rows: Sequence[str], columns: Sequence[str]) -> Iterator[str]:
    """Languages beside and above the cells, and what they are."""
    for n, name in enumerate(rows):
        yield svg.text(LEFT - 6, TOP + CELL[1] * (n + 0.5), name, svg.MUTED, "end")
    for n, name in enumerate(columns):
        yield svg.text(LEFT + CELL[0] * (n + 0.5), TOP - 10, name, svg.MUTED)
    yield svg.text(LEFT + CELL[0] * len(columns) / 2, 9, "passages in", svg.MUTED)
    middle = TOP + CELL[1] * len(rows) / 2
    yield svg.text(9, middle, "queries in", svg.MUTED, turned=True)


def _cell(row: int, column: int, value: float, colour: np.ndarray, same_language: bool) -> str:
    x, y = LEFT + CELL[0] * column, TOP + CELL[1] * row
    known = not np.isnan(value)
    text_colour = (DARK_TEXT if _luminance(colour) > EQUAL_CONTRAST else LIGHT_TEXT) if known else svg.MUTED
    shown = f"{100 * value:.0f}" if known else "\N{EN DASH}"
    text = svg.text(x + CELL[0] / 2, y + CELL[1] / 2, shown, text_colour, bold=same_language)
    return (svg.box(x + 0.5, y + 0.5, CELL[0] - 1, CELL[1] - 1, colour) if known else "") + text


def _luminance(colour: np.ndarray) -> float:
    """WCAG 2 relative luminance of an sRGB colour in 0..1."""
    channels = np.where(colour[:3] <= 0.04045, colour[:3] / 12.92, ((colour[:3] + 0.055) / 1.055) ** 2.4)
    return float(channels @ (0.2126, 0.7152, 0.0722))


X_LABELS = {"step": "step", "real_tokens": "real tokens trained on"}


def curves(
    key: str,
    title: str,
    caption: str,
    table: pd.DataFrame,
    y: str,
    label: str,
    look: Mapping[str, Look],
    x: str = "step",
    flops: float | None = None,
) -> Plot | None:
    """`y` over `x` (step or real_tokens). `table`: arm, seed, step, x, y. Thin lines: seeds; thick: the arm's running mean, over
    steps; names at the ends. `flops`: operations a token, for a second axis above."""
    table = table.dropna(subset=[y])
    if table.empty:
        return None
    with svg.canvas(WIDTH, HEIGHT) as (figure, axes):
        ends = []
        for arm, rows in table.groupby("arm", sort=False):
            colour = look[str(arm)].colour
            for _, of_seed in rows.groupby("seed"):
                axes.plot(of_seed[x], of_seed[y], color=colour, alpha=0.3, linewidth=0.9)
            mean = rows.assign(at=rows[x]).groupby("step")[["at", y]].mean()
            smooth = mean[y].rolling(max(1, len(mean) // 25), min_periods=1, center=True).mean()
            axes.plot(mean["at"], smooth, color=colour, marker=look[str(arm)].marker if len(smooth) <= 20 else "", markersize=5)
            ends.append((str(arm), float(mean["at"].iloc[-1]), float(smooth.iloc[-1])))
        axes.set(xlabel=X_LABELS[x], ylabel=label)
        if flops:
            to_flops, to_tokens = functools.partial(np.multiply, flops), functools.partial(np.multiply, 1 / flops)
            axes.secondary_xaxis("top", functions=(to_flops, to_tokens)).set_xlabel("training FLOPs")
        axes.margins(x=0.01)
        keep_apart(axes, ends, look)
        axes.set_xticks([tick for tick in axes.get_xticks() if 0 <= tick <= table[x].max()])  # none below the names
        drawn = svg.inline(figure, key, title, caption)
    return Plot(key, title, caption, drawn, table)


def thinned(curve: pd.DataFrame, y: str) -> pd.DataFrame:
    """One run's curve in at most CURVE_POINTS bins of equally many steps, each shown at its last step."""
    if len(curve) <= CURVE_POINTS:
        return curve
    bins = np.arange(len(curve)) * CURVE_POINTS // len(curve)
    return curve.groupby(bins).agg({**dict.fromkeys(curve.columns, "last"), y: "mean"})

"""A matplotlib figure as inline SVG that follows the page: its font, its light or dark colours, ids of its own.

The only place that knows matplotlib's SVG dialect; what is plotted is none of its business.
"""

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from html import escape
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Stand-ins: drawn with these colours, written as the variables, which the page sets for light and dark.
INK, MUTED, GRID, PAPER = "#1c2128", "#59636f", "#d8dee5", "#fefefe"
ARM_COLOURS = ("#0068a8", "#c24f00", "#007a5c", "#a3327a", "#7a6200", "#4a45a0", "#536070", "#007f96")
ARM_MARKERS = ("o", "s", "D", "^", "v", "P", "X", "h")
SIZE_COLOURS = ("#b57500", "#c2561c", "#b93246", "#9c2f7c", "#74389b", "#3f479f", "#12305f")
"""From the smallest to the largest model: told apart by lightness as well as by hue."""
VARIABLES = {
    **{INK: "--ink", MUTED: "--muted", GRID: "--grid", PAPER: "--paper"},
    **{colour: f"--arm-{position}" for position, colour in enumerate(ARM_COLOURS)},
    **{colour: f"--size-{position}" for position, colour in enumerate(SIZE_COLOURS)},
}

UNITS_PER_INCH = 72  # of the SVG's own coordinates; fonts are in the same units

STYLE: dict[Any, Any] = {
    **{"svg.fonttype": "none", "text.parse_math": False, "font.family": "sans-serif", "font.size": 12},
    **{"text.color": INK, "axes.labelcolor": MUTED, "axes.edgecolor": GRID, "axes.linewidth": 1.0},
    **{"xtick.color": GRID, "ytick.color": GRID, "xtick.labelcolor": MUTED, "ytick.labelcolor": MUTED},
    **{"xtick.major.size": 0, "ytick.major.size": 0, "axes.spines.top": False, "axes.spines.right": False},
    **{"axes.grid": True, "grid.color": GRID, "grid.linewidth": 0.8, "axes.axisbelow": True},
    **{"figure.facecolor": "none", "axes.facecolor": "none", "lines.linewidth": 2.0},
}


@contextmanager
def canvas(width: float, height: float, text: float = 12) -> Iterator[tuple[Figure, Axes]]:
    """A figure of `width` x `height` SVG units with one set of axes, in the house style while the block lasts.

    `text`: size of its letters, in the same units.
    """
    with mpl.rc_context({**STYLE, "font.size": text}):
        figure = Figure(figsize=(width / UNITS_PER_INCH, height / UNITS_PER_INCH), layout="constrained")
        yield figure, figure.subplots()


def inline(figure: Figure, key: str, title: str, description: str) -> str:
    """The figure as an `<svg>` element; `key` makes its ids unique on the page, `title` and `description` are read
    aloud by screen readers."""
    buffer = io.StringIO()
    # The salt makes the file the same each time it is written.
    with mpl.rc_context({"svg.hashsalt": key, **STYLE}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    drawn = buffer.getvalue()
    box = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', drawn)
    assert box is not None
    body = re.sub(
        r"<metadata>.*?</metadata>|<style.*?</style>", "", drawn[drawn.index(">", drawn.index("<svg")) + 1 :], flags=re.S
    )
    inner = _adapted(body, key).strip().removesuffix("</svg>")
    return element(inner, key, title, description, float(box[1]), float(box[2]))


def element(body: str, key: str, title: str, description: str, width: float, height: float) -> str:
    """An `<svg>` element around `body`, drawn in units of `width` x `height`."""
    name = f'role="img" aria-labelledby="{key}-title {key}-description"'
    size = f'viewBox="0 0 {width:g} {height:g}" style="--natural: {width:.0f}px"'
    told = f'<title id="{key}-title">{escape(title)}</title><desc id="{key}-description">{escape(description)}</desc>'
    return f'<svg class="plot" {name} {size}>{told}{body}</svg>'


def text(x: float, y: float, words: str, colour: str, anchor: str = "middle", bold: bool = False, turned: bool = False) -> str:
    """Words centred on `y`, inside `texts`; `colour` is one of the stand-ins or plain; `turned`: read upwards."""
    weight = ' font-weight="700"' if bold else ""
    turn = f' transform="rotate(-90 {x:g} {y:g})"' if turned else ""
    side = "" if anchor == "middle" else f' text-anchor="{anchor}"'
    fill = f' style="fill: {_follow(colour)}"' if colour in VARIABLES else f' fill="{colour}"'
    return f'<text x="{x:g}" y="{y + 4:g}"{side}{weight}{turn}{fill}>{escape(words)}</text>'


def texts(body: str) -> str:
    """A group around shapes and texts: what the texts share."""
    return f'<g class="cells" text-anchor="middle" font-size="11.5">{body}</g>'


def box(x: float, y: float, width: float, height: float, colour: Sequence[float] | np.ndarray) -> str:
    """A filled rectangle; `colour`: red, green, blue in 0..1."""
    fill = "#" + "".join(f"{round(255 * float(channel)):02x}" for channel in colour)
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" fill="{fill}"/>'


def _follow(colour: str) -> str:
    return f"var({VARIABLES[colour]})" if colour in VARIABLES else colour


def _adapted(body: str, key: str) -> str:
    body = re.sub(r'\bid="', f'id="{key}-', body)
    body = re.sub(r'(?:xlink:)?href="#', f'href="#{key}-', body)
    body = body.replace("url(#", f"url(#{key}-")
    body = re.sub(r"font-family: [^;\"]*;?\s*", "", body)
    body = re.sub(r'\b(?:d|x|y|transform)="[^"]*"', _shorter, body)
    for colour, variable in VARIABLES.items():
        body = body.replace(colour, f"var({variable})")
    return re.sub(r"\s*\n\s*", " ", body)


def _shorter(attribute: re.Match[str]) -> str:
    """Coordinates to a hundredth of a unit."""
    return re.sub(r"\d+\.\d{3,}", lambda number: f"{float(number[0]):.2f}", attribute[0])

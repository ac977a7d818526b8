"""The report's first figure: monolingual against cross-lingual quality, one curve over alpha for each size.

Draws the standings that it is given (results/trade_off.py).
"""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from hybrid_scale.pages import svg
from hybrid_scale.pages.names import Name, write_names
from hybrid_scale.pages.parts import Plot
from hybrid_scale.study.results.answers import in_words
from hybrid_scale.study.results.trade_off import Standing, curves

WIDTH, HEIGHT, TEXT = 470, 400, 13
MARKERS = {"cross": "s", "hybrid": "o", "mono": "^", "mixed": "X"}
MOST_NAMED = 2
"""Curves whose points are named one by one; with more of them only the curves are."""
LONGEST = 16
"""Letters of a reference's name in the figure; the caption has longer ones whole."""
NEAR = 0.6
"""A reference is drawn where it lies within this share of the arms' own extent beside them; else the caption gives it."""

References = Mapping[str, tuple[float, float]]
"""Name -> (mono mAP, cross mAP) of what the study didn't train."""


def trade_off(key: str, task: str, found: Sequence[Standing], references: References) -> Plot | None:
    """None where no arm has both metrics."""
    if not found:
        return None
    lines = curves(found)
    colours = _colours([line[0].arm.group for line in lines], found)
    title = f"The trade-off on {task}"
    with svg.canvas(WIDTH, HEIGHT, TEXT) as (figure, axes):
        for line in lines:
            axes.plot([p.mono.mean for p in line], [p.cross.mean for p in line], color=colours[line[0].arm.group], linewidth=1.8)
        for each in found:
            _point(axes, each, colours[each.arm.group])
        axes.margins(x=0.1, y=0.1)
        near, far = _split(axes, references)
        for x, y in near.values():
            axes.plot(x, y, "D", color=svg.MUTED, markersize=6, markerfacecolor="none")
        axes.set(xlabel="mono mAP (better \N{RIGHTWARDS ARROW})", ylabel="cross mAP (better \N{RIGHTWARDS ARROW})")
        write_names(axes, _names(lines, found, near, colours))
        _legend(axes, {each.arm.kind for each in found})
        caption = _caption(found, near, far, len(lines))
        drawn = svg.inline(figure, key, title, caption)
    return Plot(key, title, caption, drawn, _data(found, references))


def _colours(groups: Sequence[str], found: Sequence[Standing]) -> dict[str, str]:
    """By group, from the smallest to the largest; few groups take colours far apart."""
    names = list(dict.fromkeys((*groups, *(each.arm.group for each in found))))
    steps = np.linspace(0, len(svg.SIZE_COLOURS) - 1, len(names)).round().astype(int) if len(names) > 1 else [4]
    return {name: svg.SIZE_COLOURS[step] for name, step in zip(names, steps, strict=True)}


def _point(axes: Axes, each: Standing, colour: str) -> None:
    bars = {"color": colour, "alpha": 0.35, "linewidth": 1.3}
    axes.plot([each.mono.low, each.mono.high], [each.cross.mean] * 2, **bars)  # type: ignore[arg-type]
    axes.plot([each.mono.mean] * 2, [each.cross.low, each.cross.high], **bars)  # type: ignore[arg-type]
    size = 6 if each.arm.kind == "hybrid" else 8
    axes.plot(
        each.mono.mean, each.cross.mean, MARKERS.get(each.arm.kind, "o"), color=colour, markersize=size, markeredgecolor=svg.PAPER
    )


def _split(axes: Axes, references: References) -> tuple[References, References]:
    """Those near enough to be drawn, and the others."""
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    wide, tall = NEAR * (right - left), NEAR * (high - low)
    near = {
        name: (x, y) for name, (x, y) in references.items() if left - wide <= x <= right + wide and low - tall <= y <= high + tall
    }
    return near, {name: place for name, place in references.items() if name not in near}


def _names(
    lines: Sequence[Sequence[Standing]], found: Sequence[Standing], near: References, colours: Mapping[str, str]
) -> list[Name]:
    known = [Name(_short(name), x, y, svg.MUTED) for name, (x, y) in near.items()]
    if len(lines) <= MOST_NAMED:
        several = len({each.arm.group for each in found}) > 1
        return known + [
            Name(_arm_name(each, several), each.mono.mean, each.cross.mean, colours[each.arm.group]) for each in found
        ]
    ends = [line[-1] for line in lines]  # below the mono arms there is room
    return known + [Name(size_name(end), end.mono.mean, end.cross.mean, colours[end.arm.group]) for end in ends]


def _short(name: str) -> str:
    return name if len(name) <= LONGEST else f"{name[: LONGEST - 1].rstrip(' ,-_')}\N{HORIZONTAL ELLIPSIS}"


def _arm_name(each: Standing, several: bool) -> str:
    return f"{each.arm.name}, {size_name(each)}" if several and each.arm.size else each.arm.name


def size_name(each: Standing) -> str:
    """What tells a curve from the others: the model, or its size where the study has no axis of models."""
    return (
        each.arm.group.removeprefix("model ") if each.arm.group else in_words(each.arm.size) if each.arm.size else each.arm.model
    )


def _legend(axes: Axes, kinds: set[str]) -> None:
    """What the marks are; the colours are named at the curves."""
    words = {"cross": "cross", "hybrid": "hybrid", "mono": "mono", "mixed": "mixed"}
    handles = [
        Line2D([], [], marker=MARKERS[kind], color=svg.MUTED, linewidth=0, markersize=7, label=words[kind])
        for kind in MARKERS
        if kind in kinds
    ]
    axes.figure.legend(
        handles=handles, loc="outside upper left", ncols=len(handles), frameon=False, handletextpad=0.1, columnspacing=1.0
    )


def _caption(found: Sequence[Standing], near: References, far: References, lines: int) -> str:
    shares = sorted({each.share for each in found if each.arm.kind == "hybrid" and each.share is not None})
    parts = ["Up and to the right is better."]
    if any(each.share is not None for each in found):
        middle = f", hybrid ({', '.join(f'{share:g}' for share in shares)})" if shares else ""
        each_size = " for each size" if lines > 1 else ""
        parts.append(f"One curve{each_size} over alpha, the share of monolingual batches: cross (0){middle}, mono (1).")
    kinds = {each.mono.chance for each in found} - {"nothing"}
    if kinds:
        what = " or ".join(sorted(kinds, reverse=True))
        parts.append(f"Bars: 95 % intervals of single arms over {what}; paired differences, which are tested, vary less.")
    if any(each.mono.chance == "nothing" for each in found):
        parts.append("Marks without bars have no table of single queries.")
    parts += [f"Diamond: {name} (mono {x:.4f}, cross {y:.4f})." for name, (x, y) in near.items() if len(name) > LONGEST]
    parts += [f"Outside the picture: {name} (mono {x:.4f}, cross {y:.4f})." for name, (x, y) in far.items()]
    return " ".join(parts)


def _data(found: Sequence[Standing], references: References) -> pd.DataFrame:
    rows = [
        {"model": each.arm.model, "parameters": each.arm.size, "group": each.arm.group, "arm": each.arm.name, "alpha": each.share}
        | {"mono_map": each.mono.mean, "mono_low": each.mono.low, "mono_high": each.mono.high}
        | {"cross_map": each.cross.mean, "cross_low": each.cross.low, "cross_high": each.cross.high, "interval": each.mono.chance}
        for each in found
    ]
    rows += [{"arm": name, "mono_map": mono, "cross_map": cross} for name, (mono, cross) in references.items()]
    return pd.DataFrame(rows)

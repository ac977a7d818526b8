"""Figures over model size and cost: differences with intervals, power laws, fronts, predicted against measured.

Draws what it is given, as plots.py does.
"""

from collections.abc import Mapping, Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from hybrid_scale.pages import svg
from hybrid_scale.pages.parts import Plot
from hybrid_scale.statistics import FEWEST_SEEDS
from hybrid_scale.study.report.plots import HEIGHT, WIDTH, Look, keep_apart
from hybrid_scale.study.results.answers import in_words
from hybrid_scale.study.results.comparisons import Comparison
from hybrid_scale.study.results.pareto import Point, front
from hybrid_scale.study.results.scaling import Law, Priced

FILLED = {"on the front": 10.0, "overlaps the front": 7.0, "behind the front": 7.0}
"""Size of a mark by its place."""
POINTS = 40
"""Of a drawn curve."""


def _size_axis(axes: Axes, sizes: Sequence[float]) -> None:
    """Sizes in logarithms, each measured one written out, as far as they don't touch."""
    axes.set_xscale("log")
    kept: list[float] = []
    for size in sorted(set(sizes)):
        if not kept or size / kept[-1] > (max(sizes) / min(sizes)) ** 0.11:
            kept.append(size)
    axes.set_xticks(kept, [in_words(size) for size in kept])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set(xlabel="parameters of the encoder (logarithmic)")


def differences(key: str, comparisons: Sequence[Comparison], look: Mapping[str, Look]) -> Plot | None:
    """One measure: hybrid arms minus single arms of one kind over size, with intervals. At least two sizes."""
    shown = [each for each in comparisons if each.size is not None]
    if len({each.size for each in shown}) < 2:
        return None
    metric, rival = shown[0].metric, shown[0].rival
    title = f"{metric.label}: hybrid minus {rival}"
    lines = list(dict.fromkeys((each.arm, each.rival, each.series) for each in shown))
    with svg.canvas(WIDTH, HEIGHT) as (figure, axes):
        axes.axhline(0, color=svg.MUTED, linewidth=1.2)
        ends = []
        for position, line in enumerate(lines):
            points = sorted((p for p in shown if (p.arm, p.rival, p.series) == line), key=lambda p: p.size or 0.0)
            shift = 1.025 ** (position - (len(lines) - 1) / 2)  # so that the bars of arms don't hide each other
            x, y = [(p.size or 0.0) * shift for p in points], [p.difference for p in points]
            style = look[line[0]]
            axes.plot(x, y, marker=style.marker, color=style.colour, markersize=6, linewidth=1.4)
            for at, point in zip(x, points, strict=True):
                if point.interval is not None:
                    axes.plot([at, at], [point.interval.low, point.interval.high], color=style.colour, linewidth=2.4, alpha=0.6)
            ends.append((line[0], x[-1], y[-1]))
        _size_axis(axes, [p.size for p in shown if p.size is not None])
        better = "above" if metric.higher_is_better else "below"
        axes.set(ylabel=f"difference ({better} 0: hybrid is better)")
        axes.margins(y=0.1)
        keep_apart(axes, ends, look)
        caption = "Bars: intervals of 95 % that hold the chance of questions and of training seeds."
        if any(p.interval is not None and p.both is None for p in shown):
            caption += f" With fewer than {FEWEST_SEEDS} seeds they hold that of questions alone."
        if any(p.interval is None for p in shown):
            caption += " Points without a bar: no table of single queries."
        drawn = svg.inline(figure, key, title, caption)
    rows = [
        {"arm": p.arm, "rival": p.rival, "model": p.model, "parameters": p.size, "difference": p.difference}
        | {"low": p.interval.low if p.interval else None, "high": p.interval.high if p.interval else None}
        for p in shown
    ]
    return Plot(key, title, caption, drawn, pd.DataFrame(rows))


def fitted(key: str, found: Sequence[Law], look: Mapping[str, Look]) -> Plot | None:
    """One quantity of all arms over size in double logarithms; the line only where the fit isn't refused."""
    shown = [law for law in found if all(value > 0 for value in law.law.values)]
    if not shown:
        return None
    title = f"{shown[0].quantity} over model size"
    with svg.canvas(WIDTH, HEIGHT) as (figure, axes):
        ends = []
        for law in shown:
            style, fit = look[law.arm], law.law
            axes.plot(fit.sizes, fit.values, style.marker, color=style.colour, markersize=7)
            if not fit.refusal:
                low, high = fit.sizes[0], fit.sizes[-1]
                line = [low * (high / low) ** (n / POINTS) for n in range(POINTS + 1)]
                axes.plot(line, [fit.at(size) for size in line], color=style.colour, linewidth=1.4)
            ends.append((law.arm, fit.sizes[-1], fit.values[-1]))
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        _size_axis(axes, [size for law in shown for size in law.law.sizes])
        _plain_ticks(axes)
        axes.set(ylabel=f"{shown[0].quantity} (logarithmic)")
        keep_apart(axes, ends, look)
        refused = [law.arm for law in shown if law.law.refusal]
        caption = "Lines: least squares in logarithms over the means of seeds."
        if refused:
            caption += f" No line, because the interval of its exponent says nothing: {', '.join(refused)}."
        drawn = svg.inline(figure, key, title, caption)
    rows = [
        {"arm": law.arm, "series": law.series, "parameters": size, "value": value}
        for law in shown
        for size, value in zip(law.law.sizes, law.law.values, strict=True)
    ]
    return Plot(key, title, caption, drawn, pd.DataFrame(rows))


def _plain_ticks(axes: Axes) -> None:
    """A handful of round values on a logarithmic y axis that may span less than a decade."""
    low, high = axes.get_ylim()
    ticks = [low * (high / low) ** share for share in (0.08, 0.3, 0.52, 0.74, 0.96)]
    axes.set_yticks([float(f"{tick:.2g}") for tick in ticks])
    axes.yaxis.set_minor_locator(NullLocator())


def fronts(key: str, points: Sequence[Priced], cost: str, unit: str, look: Mapping[str, Look]) -> Plot | None:
    """Quality against `cost` (`device_hours` or `peak_gib`); the front as steps, marks that overlap it hollow."""
    place = "by_hours" if cost == "device_hours" else "by_memory"
    shown = [point for point in points if getattr(point, place) is not None]
    if len(shown) < 2:
        return None
    metric = shown[0].metric
    title = f"{metric.label} against {unit}"
    many = len({point.model for point in shown}) > 1
    with svg.canvas(WIDTH, HEIGHT) as (figure, axes):
        best = front([Point(point.arm, point.quality, getattr(point, cost)) for point in shown])
        axes.step([p.cost for p in best], [p.quality for p in best], where="post", color=svg.MUTED, linewidth=1.2, linestyle="--")
        for point in shown:
            at, where, style = getattr(point, cost), getattr(point, place), look[point.arm]
            if point.interval is not None:
                axes.plot([at, at], [point.interval.low, point.interval.high], color=style.colour, linewidth=1.4, alpha=0.5)
            face = style.colour if where == "on the front" else svg.PAPER if where == "overlaps the front" else svg.GRID
            axes.plot(
                at, point.quality, style.marker, color=style.colour, markersize=FILLED[where], markerfacecolor=face, linewidth=0
            )
        wide = max(getattr(p, cost) for p in shown) > 8 * min(getattr(p, cost) for p in shown) > 0
        if wide:
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set(xlabel=unit + (" (logarithmic)" if wide else ""), ylabel=f"{metric.label}  (better \N{RIGHTWARDS ARROW})")
        axes.margins(x=0.08, y=0.14)
        _name_fronts(axes, shown, place, cost, look, many)
        caption = "Filled: on the front. Hollow: not shown to be worse than the best that costs no more, paired. Grey: worse."
        caption += " Bars: intervals of 95 %." if any(p.interval for p in shown) else " No intervals: no single queries."
        drawn = svg.inline(figure, key, title, caption)
    rows = [
        {"model": p.model, "arm": p.arm, metric.key: p.quality, cost: getattr(p, cost), "place": getattr(p, place)}
        | {"low": p.interval.low if p.interval else None, "high": p.interval.high if p.interval else None}
        for p in shown
    ]
    return Plot(key, title, caption, drawn, pd.DataFrame(rows))


def _name_fronts(axes: Axes, shown: Sequence[Priced], place: str, cost: str, look: Mapping[str, Look], many: bool) -> None:
    """Names beside the points: all of one model; of several, those on the front, with their model."""
    if not many:
        keep_apart(axes, [(point.arm, getattr(point, cost), point.quality) for point in shown], look)
        return
    for point in shown:
        if getattr(point, place) == "on the front":
            at, name = (getattr(point, cost), point.quality), f"{point.model} {point.arm}"
            style = {"ha": "right", "color": look[point.arm].colour, "fontsize": 11, "fontweight": "bold"}
            axes.annotate(name, at, xytext=(-6, 7), textcoords="offset points", **style)  # type: ignore[arg-type]


def forecast(key: str, runs: pd.DataFrame, predicted: str, measured: str, unit: str, look: Mapping[str, Look]) -> Plot | None:
    """Predicted against measured; on the line the planner is right."""
    table = runs.dropna(subset=[predicted, measured])
    if table.empty:
        return None
    title = f"Predicted against measured: {unit}"
    with svg.canvas(WIDTH, HEIGHT) as (figure, axes):
        low = float(table[[predicted, measured]].min().min()) * 0.8
        high = float(table[[predicted, measured]].max().max()) * 1.25
        axes.plot([low, high], [low, high], color=svg.MUTED, linewidth=1.2, linestyle="--")
        for row in table.to_dict("records"):
            style = look[str(row["arm"])]
            axes.plot(row[predicted], row[measured], style.marker, color=style.colour, markersize=6, alpha=0.8)
        axes.set(xlim=(low, high), ylim=(low, high), xlabel=f"predicted, {unit}", ylabel=f"measured, {unit}")
        caption = "One mark a run. On the dashed line the planner is right; above it the run took more than predicted."
        drawn = svg.inline(figure, key, title, caption)
    return Plot(key, title, caption, drawn, table[["run", "model", "arm", predicted, measured]])

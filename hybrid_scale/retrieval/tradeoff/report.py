"""A trade-off study as files: tradeoff.json, tradeoff.csv and a page (tradeoff.html) with plots and a table, complete in itself.

Knows nothing of indexes: it shows what `tradeoff.finished` gives.
"""

import csv
import io
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hybrid_scale.runs import write_json, write_text

COLOURS = {"front": "#0068a8", "overlaps": "#7a6200", "behind": "#8a929b"}
MEANING = {
    "front": "on the front: nothing else is at least as good in quality, bytes and query time",
    "overlaps": "behind it, but its interval overlaps those of all that beat it",
    "behind": "behind it",
}
COSTS = {"bytes a vector": ("bytes", "measured"), "CPU milliseconds a query": ("query", "cpu_ms")}
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #1c2128 }}
table {{ border-collapse: collapse }} th, td {{ padding: .2rem .7rem; text-align: right; border-bottom: 1px solid #d8dee5 }}
th:first-child, td:first-child {{ text-align: left }} svg {{ max-width: 100%; height: auto }}
</style></head><body><h1>{title}</h1><p>{facts}</p>{body}</body></html>
"""


def write(directory: Path, result: dict[str, Any]) -> None:
    """Write all three files into `directory`, which is made."""
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / "tradeoff.json", result)
    write_text(directory / "tradeoff.csv", as_csv(result))
    write_text(directory / "tradeoff.html", as_page(result))


def rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    """One flat row a point and measure."""
    k = result["options"]["k"]
    return [
        {
            **{"task": result["task"], "variant": point["name"], "measure": measure, f"recall@{k}": point[f"recall@{k}"]},
            **quality,
            **{"bytes_measured": point["bytes"]["measured"], "bytes_formula": point["bytes"]["formula"]},
            **{f"build_{clock}": value for clock, value in point["build"].items()},
            **{f"query_{clock}": value for clock, value in point["query"].items()},
        }
        for point in result["points"]
        for measure, quality in point["quality"].items()
    ]


def as_csv(result: dict[str, Any]) -> str:
    flat = rows(result)
    text = io.StringIO(newline="")
    if flat:
        writer = csv.DictWriter(text, list(flat[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(flat)
    return text.getvalue()


def as_page(result: dict[str, Any]) -> str:
    """The page: a plot per measure and cost, one table a measure, what was refused."""
    options = result["options"]
    facts = (
        f"{result['passages']:,} passages of {result['dimensions']} dimensions, {result['queries']:,} queries "
        f"({result['questions']:,} questions: the unit of all intervals), {options['threads']} thread(s). "
        f"Intervals {options['level']:.0%}; equivalent: TOST with margin {options['margin']}."
    )
    parts = [f"<p>{_legend()}</p>"]
    for measure in result["certified"]:
        parts += [f"<h2>{escape(measure)}</h2>", plot(result, measure), _table(result, measure)]
    if result["refused"]:
        items = "".join(f"<li>{escape(name)}: {escape(why)}</li>" for name, why in result["refused"].items())
        parts.append(f"<h2>Not run</h2><ul>{items}</ul>")
    return PAGE.format(title=f"Index trade-off: {escape(result['task'])}", facts=escape(facts), body="\n".join(parts))


def _legend() -> str:
    return "; ".join(f'<b style="color:{COLOURS[state]}">{state}</b>: {meaning}' for state, meaning in MEANING.items())


def plot(result: dict[str, Any], measure: str) -> str:
    """Inline SVG: the difference from the exact list with its interval against each cost; linear within the margin, then log."""
    figure = Figure(figsize=(11, 6), layout="constrained")
    for axes, (label, (part, key)) in zip(figure.subplots(1, len(COSTS), sharey=True), COSTS.items(), strict=True):
        _draw(axes, result["points"], measure, label, part, key)
        margin = result["options"]["margin"]
        axes.set_yscale("symlog", linthresh=margin)
        axes.axhspan(-margin, margin, color="#0068a8", alpha=0.08)
    figure.axes[0].set_ylabel(f"{measure}, variant - exact")
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    whole = text.getvalue()
    return whole[whole.index("<svg") :]


def _draw(axes: Axes, points: Sequence[dict[str, Any]], measure: str, label: str, part: str, key: str) -> None:
    for point in points:
        quality, cost = point["quality"][measure], point[part][key]
        colour = COLOURS[quality["pareto"]]
        spread = [[max(0.0, quality["difference"] - quality["low"])], [max(0.0, quality["high"] - quality["difference"])]]
        axes.errorbar([cost], [quality["difference"]], yerr=spread, fmt="o", color=colour, markersize=4, linewidth=1)
        axes.annotate(
            point["name"],
            (cost, quality["difference"]),
            (4, 3),
            textcoords="offset points",
            fontsize=7,
            color=colour,
            rotation=30,
        )
    axes.set_xscale("log")
    axes.set_xlabel(label)
    axes.spines[["top", "right"]].set_visible(False)


def _table(result: dict[str, Any], measure: str) -> str:
    k = result["options"]["k"]
    quality = ("variant", f"recall@{k}", measure, "difference", "interval", "equivalent", "p (Holm)")
    heads = (*quality, "bytes", "formula", "ms a query", "build s", "Pareto")
    body = [_cells(point, measure, k) for point in result["points"]]
    lines = ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in body]
    head = "".join(f"<th>{escape(cell)}</th>" for cell in heads)
    return f"<table><tr>{head}</tr>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def _cells(point: dict[str, Any], measure: str, k: int) -> list[str]:
    quality = point["quality"][measure]
    return [
        point["name"],
        f"{point[f'recall@{k}']:.4f}",
        f"{quality['value']:.4f}",
        f"{quality['difference']:+.4f}",
        f"{quality['low']:+.4f} to {quality['high']:+.4f}",
        "yes" if quality["equivalent"] else "not shown",
        f"{quality['p_holm']:.4f}",
        f"{point['bytes']['measured']:,.0f}",
        f"{point['bytes']['formula']:,.0f}",
        f"{point['query']['cpu_ms']:.3f}",
        f"{point['build']['cpu_seconds']:.2f}",
        quality["pareto"],
    ]


def line(point: dict[str, Any], k: int) -> str:
    """One point for the terminal."""
    if "refused" in point:
        return f"{point['name']:22s} refused: {point['refused']}"
    qualities = "  ".join(
        f"{name} {q['difference']:+.4f} [{q['low']:+.4f}, {q['high']:+.4f}]{' equivalent' if q['equivalent'] else ''}"
        for name, q in point["quality"].items()
    )
    cost = f"{point['bytes']['measured']:7.0f} B  {point['query']['cpu_ms']:.3f} ms  build {point['build']['cpu_seconds']:.1f} s"
    return f"{point['name']:22s} recall@{k} {point[f'recall@{k}']:.4f}  {qualities}  {cost}"

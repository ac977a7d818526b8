"""A study of index compression as files: tradeoff.json, tradeoff.csv and a page (tradeoff.html) that is complete in itself.

Knows nothing of indexes: it shows what `tradeoff.finished` gives.
"""

import csv
import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from hybrid_scale.pages import svg
from hybrid_scale.pages.names import Name, write_names
from hybrid_scale.pages.page import template
from hybrid_scale.pages.parts import Cell, Plot, Row, Table, Tone
from hybrid_scale.retrieval.tradeoff.findings import counted, finding, names, whole
from hybrid_scale.runs import write_json, write_text

TEMPLATE = Path(__file__).with_name("tradeoff.html.j2")
WIDTH, HEIGHT, TEXT = 470, 420, 13
COLOURS = {"front": svg.ARM_COLOURS[0], "overlaps": svg.ARM_COLOURS[4], "behind": svg.MUTED}
TONES: dict[str, Tone] = {"equivalent": "good", "better": "good", "worse": "bad", "not shown": "open", "not judged": "plain"}
COSTS = (("bytes", "measured", "bytes a vector"), ("query", "cpu_ms", "CPU milliseconds a query"))
WORDS = {
    "equivalent": "shown to differ from the exact list by less than the margin: two one-sided tests, p at most 0.05 "
    "after Holm over all indexes",
    "worse, better": "shown to differ from the exact list, though not by less than the margin: sign-flip test over "
    "questions, p at most 0.05 after Holm over all indexes",
    "not shown": "neither of these: more questions would be needed to tell",
    "not judged": "the margin is too large a share of the score for a difference within it to be small",
    "exact list": "the certified nearest passages of every query, without any index",
    "front": "nothing else is at least as good in quality, bytes and query time",
    "overlaps": "behind the front, but its interval overlaps those of all that beat it",
    "behind": "behind the front",
}
ABOUT = {
    "ndcg": "nDCG@10: gain of the relevant passages among the first ten, the lower the later they stand, divided by "
    "that of the best possible order (0 to 1, higher is better).",
    "mrr": "MRR@100: one over the rank of the first relevant passage among the first hundred, else 0 (0 to 1, higher is better).",
    "map": "mAP@k: mean over queries of the average precision of the returned list of k passages; a relevant passage "
    "beyond it earns nothing (0 to 1, higher is better).",
}


def write(directory: Path, result: dict[str, Any]) -> None:
    """Write all three files into `directory`, which is made."""
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / "tradeoff.json", result)
    write_text(directory / "tradeoff.csv", as_csv(result))
    write_text(directory / "tradeoff.html", as_page(result))


def rows(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One flat row a point and metric."""
    k = result["options"]["k"]
    return [
        {
            **{"set": result["task"], "variant": point["name"], "metric": metric, f"recall@{k}": point[f"recall@{k}"]},
            **quality,
            **{"bytes_measured": point["bytes"]["measured"], "bytes_formula": point["bytes"]["formula"]},
            **{f"build_{clock}": value for clock, value in point["build"].items()},
            **{f"query_{clock}": value for clock, value in point["query"].items()},
        }
        for point in result["points"]
        for metric, quality in point["quality"].items()
    ]


def as_csv(result: Mapping[str, Any]) -> str:
    flat = rows(result)
    text = io.StringIO(newline="")
    if flat:
        writer = csv.DictWriter(text, list(flat[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(flat)
    return text.getvalue()


# ----------------------------------------------------------------------------------------------------------------- page


def as_page(result: Mapping[str, Any]) -> str:
    """The first metric's finding, figure and table first; the rest, what was refused and the words as details."""
    options = result["options"]
    facts = (
        f"{result['passages']:,} passages of {result['dimensions']} dimensions, {result['queries']:,} queries of "
        f"{result['questions']:,} questions, the unit of all intervals ({options['level']:.0%}); {options['threads']} "
        f"{'thread' if options['threads'] == 1 else 'threads'}."
    )
    if result.get("protocol", {}).get("pools") == "own language":
        facts += " Each query is ranked in the passages of its own language, which have an index of their own;"
        facts += " sizes and times are those of all indexes together."
    metrics = [_metric(result, metric) for metric in result["certified"]]
    look = {"arm_colours": svg.ARM_COLOURS, "size_colours": svg.SIZE_COLOURS}
    shown = {"task": result["task"], "refused": result["refused"], "words": WORDS.items()}
    return template(TEMPLATE).render(facts=facts, metrics=metrics, **shown, **look)


def _metric(result: Mapping[str, Any], metric: str) -> dict[str, Any]:
    """One metric's part of the page."""
    return {
        "label": names(metric),
        "about": ABOUT.get(metric.partition("@")[0], ""),
        "finding": finding(result, metric),
        "counted": counted(result, metric),
        "plots": list(_plots(result, metric)),
        "table": _table(result, metric),
        "numbers": _numbers(result, metric),
    }


def _table(result: Mapping[str, Any], metric: str) -> Table:
    """The verdict beside the metric, then what the index costs."""
    heads = ("index", names(metric), "bytes", "CPU ms", "place")
    notes = ("", "minus exact [95 %]", "a vector", "a query", "")
    body = tuple(
        Row(
            (
                Cell(point["name"]),
                _judged(point["quality"][metric]),
                Cell(f"{point['bytes']['measured']:,.0f}"),
                Cell(f"{point['query']['cpu_ms']:.3f}"),
                Cell(point["quality"][metric]["pareto"]),
            )
        )
        for point in result["points"]
    )
    data = pd.DataFrame([row for row in rows(result) if row["metric"] == metric])
    return Table(f"{_key(metric)}-table", f"{names(metric)} of each index", heads, body, data, notes)


def _judged(quality: Mapping[str, Any]) -> Cell:
    detail = f"{quality['difference']:+.4f} [{quality['low']:+.4f}, {quality['high']:+.4f}]"
    return Cell(f"{quality['value']:.4f}", tone=TONES[quality["verdict"]], verdict=quality["verdict"], detail=detail)


def _numbers(result: Mapping[str, Any], metric: str) -> Table:
    """What the first table leaves out."""
    k = result["options"]["k"]
    heads = (
        "index",
        f"recall@{k}",
        "p of a difference (Holm)",
        "p of equivalence (Holm)",
        "bytes by formula",
        "times smaller",
        "build s",
    )
    body = tuple(
        Row(
            (
                Cell(point["name"]),
                Cell(f"{point[f'recall@{k}']:.4f}"),
                Cell(f"{point['quality'][metric]['p_holm']:.4f}"),
                Cell(f"{point['quality'][metric]['tost_p_holm']:.4f}"),
                Cell(f"{point['bytes']['formula']:,.0f}"),
                Cell(f"{whole(result) / point['bytes']['measured']:.1f}"),
                Cell(f"{point['build']['cpu_seconds']:.2f}"),
            )
        )
        for point in result["points"]
    )
    data = pd.DataFrame([row for row in rows(result) if row["metric"] == metric])
    return Table(f"{_key(metric)}-numbers", f"{names(metric)}: the other numbers", heads, body, data)


def _key(metric: str) -> str:
    return metric.replace("@", "-")


# -------------------------------------------------------------------------------------------------------------- figures


def _plots(result: Mapping[str, Any], metric: str) -> Iterator[Plot]:
    """The difference from the exact list with its interval against each cost; none where nothing ran."""
    margin = result["options"]["margin"]
    for part, key, label in COSTS if result["points"] else ():
        name = f"{_key(metric)}-{part}"
        title = f"{names(metric)} against {label}"
        caption = (
            "Difference from the exact list with its 95 % interval; linear within the margin of "
            f"\N{PLUS-MINUS SIGN}{margin:g} (shaded), logarithmic beyond. To the left is cheaper. Named: the front."
        )
        with svg.canvas(WIDTH, HEIGHT, TEXT) as (figure, axes):
            _draw(axes, result, metric, part, key)
            axes.axhspan(-margin, margin, color=svg.ARM_COLOURS[0], alpha=0.08, linewidth=0)
            axes.set_yscale("symlog", linthresh=margin)
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.set(xlabel=f"{label} (logarithmic)", ylabel=f"{names(metric)} minus exact")
            front = [point for point in result["points"] if point["quality"][metric]["pareto"] == "front"]
            places = ((point["name"], point[part][key], point["quality"][metric]["difference"]) for point in front)
            write_names(axes, [Name(text, x, y, COLOURS["front"]) for text, x, y in places])
            drawn = svg.inline(figure, name, title, caption)
        yield Plot(name, title, caption, drawn, _points(result, metric, part, key))


def _draw(axes: Axes, result: Mapping[str, Any], metric: str, part: str, key: str) -> None:
    for point in result["points"]:
        quality, cost = point["quality"][metric], point[part][key]
        colour = COLOURS[quality["pareto"]]
        axes.plot([cost, cost], [quality["low"], quality["high"]], color=colour, linewidth=1.3, alpha=0.5)
        axes.plot(cost, quality["difference"], "o", color=colour, markersize=6, markeredgecolor=svg.PAPER)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 1 else f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.margins(x=0.06, y=0.08)


def _points(result: Mapping[str, Any], metric: str, part: str, key: str) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {"variant": point["name"], key: point[part][key]}
            | {name: point["quality"][metric][name] for name in ("difference", "low", "high", "pareto")}
            for point in result["points"]
        ]
    )


def line(point: dict[str, Any], k: int) -> str:
    """One point for the terminal."""
    if "refused" in point:
        return f"{point['name']:22s} refused: {point['refused']}"
    qualities = "  ".join(
        f"{name} {q['difference']:+.4f} [{q['low']:+.4f}, {q['high']:+.4f}] p of equivalence {q['tost_p']:.4f}"
        for name, q in point["quality"].items()
    )
    cost = f"{point['bytes']['measured']:7.0f} B  {point['query']['cpu_ms']:.3f} ms  build {point['build']['cpu_seconds']:.1f} s"
    return f"{point['name']:22s} recall@{k} {point[f'recall@{k}']:.4f}  {qualities}  {cost}"

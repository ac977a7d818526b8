"""The report's sortable tables: comparisons, slopes over size, power laws, cost, predicted against measured.

Formats numbers; computes none. What a table's link downloads is made by frames.py. Knows no HTML.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from hybrid_scale.statistics import Interval
from hybrid_scale.study.clock import clock
from hybrid_scale.study.results.answers import in_words
from hybrid_scale.study.results.comparisons import Comparison
from hybrid_scale.study.results.frames import comparisons_frame, costs_frame, laws_frame, trends_frame
from hybrid_scale.study.results.scaling import Law, Priced
from hybrid_scale.study.results.trends import Trend
from hybrid_scale.study.results.usage import COST_COLUMNS

NOTHING = "\N{EN DASH}"
NUMBER = re.compile(r"[<+-]? ?[\d.,]+ ?[%BMk]?|\[[-+.\d, ]+\]|\d+: \[[-+.\d, ]+\]")


@dataclass(frozen=True)
class Cell:
    text: str
    spread: str = ""
    best: bool = False
    sort: str = ""
    """What to sort by where the text isn't it."""


@dataclass(frozen=True)
class Table:
    """A sortable table; `data` is what its CSV link holds."""

    key: str
    title: str
    heads: tuple[str, ...]
    rows: list[list[Cell]]
    data: pd.DataFrame

    @property
    def numeric(self) -> list[bool]:
        """For each column whether it holds numbers, which stand to the right; the first names its row."""
        columns = ([row[n].text for row in self.rows] for n in range(len(self.heads)))
        found = [all(text == NOTHING or NUMBER.fullmatch(text) for text in column) for column in columns]
        return [False, *found[1:]]


# ------------------------------------------------------------------------------------------------------------ comparisons


COMPARED = (
    "model",
    "parameters",
    "arm",
    "minus",
    "measure",
    "difference",
    "95 %",
    "p",
    "p adjusted",
    "seeds",
    "family",
    "verdict",
)


def comparison_table(key: str, found: Sequence[Comparison]) -> Table:
    rows = [
        [
            Cell(each.model),
            Cell(in_words(each.size) if each.size else NOTHING, sort=f"{each.size or 0:.0f}"),
            Cell(each.arm),
            Cell(each.rival),
            Cell(each.metric.label),
            Cell(f"{each.difference:+.{each.metric.decimals}f}"),
            *_tested(each),
            Cell(str(each.seeds.count)),
            Cell(each.family),
            Cell(each.outcome),
        ]
        for each in found
    ]
    return Table(key, "Hybrid arms minus single arms", COMPARED, rows, comparisons_frame(found))


def _tested(each: Comparison | Trend) -> list[Cell]:
    """Interval, p, p after its correction."""
    interval = _bounds(each.interval, each.metric.decimals)
    return [Cell(interval), Cell(_p(each.p)), Cell(_p(each.adjusted))]


def _bounds(interval: Interval | None, places: int) -> str:
    return NOTHING if interval is None else f"[{interval.low:+.{places}f}, {interval.high:+.{places}f}]"


def _p(value: float | None) -> str:
    return NOTHING if value is None else "< .0001" if value < 0.0001 else f"{value:.4f}"


# ----------------------------------------------------------------------------------------------------------------- trends

TURNED = (
    *("arm", "minus", "measure", "sizes", "change for ten times the parameters", "95 %", "p", "p adjusted"),
    *("seeds", "verdict"),
)


def trend_table(key: str, found: Sequence[Trend]) -> Table:
    rows = [
        [
            Cell(each.arm),
            Cell(each.rival),
            Cell(each.metric.label),
            Cell(str(len(each.sizes))),
            Cell(f"{each.slope:+.{each.metric.decimals}f}"),
            *_tested(each),
            Cell(str(each.seeds) if each.seeds else NOTHING),
            Cell(each.outcome if not each.refusal else f"not judged: {each.refusal}"),
        ]
        for each in found
    ]
    return Table(key, "Differences over model size", *_with_series(found, TURNED, rows), trends_frame(found))


def _with_series(
    found: Sequence[Trend | Law], heads: tuple[str, ...], rows: list[list[Cell]]
) -> tuple[tuple[str, ...], list[list[Cell]]]:
    """Heads and rows with the series before them, where there are several."""
    if len({each.series for each in found}) < 2:
        return heads, rows
    return ("series", *heads), [[Cell(each.series or NOTHING), *row] for each, row in zip(found, rows, strict=True)]


# ------------------------------------------------------------------------------------------------------------------- laws


FITTED = (
    *("arm", "quantity", "sizes", "exponent", "95 % (bootstrap)"),
    *("error of a size left out", "largest size: predicted / measured", "why no exponent"),
)


def law_table(key: str, found: Sequence[Law]) -> Table:
    """The exponent stands only where it may be stated."""
    rows = []
    for each in found:
        law, largest = each.law, each.law.largest
        stated = not law.refusal and law.exponent is not None
        rows.append(
            [
                Cell(each.arm),
                Cell(each.quantity),
                Cell(str(len(law.sizes))),
                Cell(f"{law.exponent:.3f}" if stated else NOTHING),
                Cell(f"[{law.low:.2f}, {law.high:.2f}]" if stated else NOTHING),
                Cell(f"{law.prediction_error:.1%}" if law.prediction_error is not None else NOTHING),
                Cell(f"{largest.predicted:.4f} / {largest.measured:.4f} ({largest.error:+.1%})" if largest else NOTHING),
                Cell(law.refusal or NOTHING),
            ]
        )
    return Table(key, "Power laws", *_with_series(found, FITTED, rows), laws_frame(found))


# ------------------------------------------------------------------------------------------------------------------- cost


def cost_table(key: str, found: Sequence[Priced], gpu: bool) -> Table:
    hours = "GPU-hours" if gpu else "process-hours"
    heads = (
        "model",
        "arm",
        found[0].metric.label,
        "95 % of questions",
        hours,
        "quality for hours",
        "peak GiB",
        "quality for memory",
    )
    rows = [
        [
            Cell(each.model),
            Cell(each.arm),
            Cell(each.metric.show(each.quality)),
            Cell(f"[{each.interval.low:.4f}, {each.interval.high:.4f}]" if each.interval else NOTHING),
            Cell(f"{each.device_hours:.3g}" if each.device_hours is not None else NOTHING, sort=f"{each.device_hours or 0}"),
            Cell(each.by_hours or NOTHING),
            Cell(f"{each.peak_gib:.2f}" if each.peak_gib is not None else NOTHING),
            Cell(each.by_memory or NOTHING),
        ]
        for each in found
    ]
    return Table(key, "Quality and cost", heads, rows, costs_frame(found))


FORECAST = (
    *("run", "ranks", "device", "s a step: predicted", "s a step: measured", "error of time"),
    *("GiB: predicted", "GiB: measured", "error of memory", "why no prediction"),
)


def forecast_table(key: str, runs: pd.DataFrame) -> Table:
    """Predicted against measured of each run."""
    rows = [
        [
            Cell(row["run"]),
            Cell(str(row["ranks"])),
            Cell(row["device"] or NOTHING),
            *_pair(row["predicted_step_seconds"], row["median_step_seconds"]),
            *_pair(row["predicted_gib"], row["peak_gib"]),
            Cell(row["not_predicted"] or NOTHING),
        ]
        for row in plain(runs)
    ]
    names = [
        "run",
        "ranks",
        "device",
        *(name for name in COST_COLUMNS if name in runs and name not in ("ranks", "device", "gpu")),
    ]
    return Table(key, "Predicted against measured", FORECAST, rows, runs[names])


def _pair(predicted: float | None, measured: float | None) -> tuple[Cell, Cell, Cell]:
    shown = tuple(NOTHING if value is None else f"{value:.2f}" for value in (predicted, measured))
    error = f"{predicted / measured - 1:+.0%}" if predicted is not None and measured else NOTHING
    return Cell(shown[0]), Cell(shown[1]), Cell(error)


def plain(runs: pd.DataFrame) -> list[dict[str, Any]]:
    """The runs as plain values; what isn't known is null."""
    rows = [{str(key): None if pd.isna(value) else value for key, value in row.items()} for row in runs.to_dict("records")]
    for row in rows:
        row["time"] = clock(row["training_seconds"]) if row["training_seconds"] is not None else None
    return rows

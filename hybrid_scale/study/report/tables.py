"""The report's sortable tables: comparisons, slopes over size, power laws, cost, predicted against measured.

Formats numbers; computes none. A verdict stands beside the number that it is about. What a table's link downloads is made by
frames.py. Knows no HTML.
"""

from collections.abc import Sequence
from typing import Any

import pandas as pd

from hybrid_scale.pages.parts import NOTHING, Cell, Row, Table, Tone
from hybrid_scale.study.clock import clock
from hybrid_scale.study.report import words
from hybrid_scale.study.results.comparisons import Comparison
from hybrid_scale.study.results.foretold import Foretold, Verdict
from hybrid_scale.study.results.frames import comparisons_frame, costs_frame, foretold_frame, laws_frame, trends_frame
from hybrid_scale.study.results.scaling import Law, Priced
from hybrid_scale.study.results.trends import Trend
from hybrid_scale.study.results.usage import COST_COLUMNS

# ------------------------------------------------------------------------------------------------------------ comparisons


COMPARED = ("arms", "model", "metric", "difference", "95 %", "p", "p adjusted", "seeds", "family")


def comparison_table(key: str, shown: Sequence[Comparison], every: Sequence[Comparison], mark: str) -> Table:
    """Rows for `shown`; the CSV link holds `every` comparison of the set. `mark`: what stands at each of its numbers."""
    rows = tuple(
        Row(
            (
                Cell(f"{each.arm} \N{MINUS SIGN} {each.rival}"),
                Cell(each.model, sort=f"{each.size or 0:.0f}"),
                Cell(each.metric.label),
                _difference(each.difference, each, mark),
                *_tested(each),
                Cell(str(each.seeds.count)),
                Cell(each.family),
            )
        )
        for each in shown
    )
    notes = ("", "", "", "verdict", "", "", "", "", "")
    return Table(key, "Hybrid arms minus single arms", COMPARED, rows, comparisons_frame(every), notes)


def foretold_table(found: Sequence[Foretold]) -> Table:
    """The study's predictions with their verdicts: those that fail first, then those that hold."""
    order = ("fails", "holds", "not shown", "not judged")
    rows = tuple(
        Row(
            (
                Cell(each.says),
                Cell(each.metric.label, detail=each.task),
                Cell(each.model),
                Cell(each.verdict, tone=FORETOLD_TONES[each.verdict]),
                Cell("; ".join(each.numbers()) or NOTHING, detail=each.missing),
            )
        )
        for each in sorted(found, key=lambda each: order.index(each.verdict))
    )
    heads = ("prediction", "metric", "model", "verdict", "differences")
    return Table("foretold", "Predictions written down before the runs", heads, rows, foretold_frame(found))


FORETOLD_TONES: dict[Verdict, Tone] = {"holds": "good", "fails": "bad", "not shown": "open", "not judged": "plain"}


def _difference(value: float, each: Comparison | Trend, mark: str) -> Cell:
    """The number with its verdict beside it."""
    return Cell(f"{value:+.{each.metric.decimals}f}{mark}", verdict=each.outcome, tone=words.TONES[each.outcome])


def _tested(each: Comparison | Trend) -> list[Cell]:
    """Interval (of questions and seeds, or of questions where seeds are too few), p, p after its correction."""
    interval, places = each.interval, each.metric.decimals
    bounds = f"[{interval.low:+.{places}f}, {interval.high:+.{places}f}]" if interval else NOTHING
    return [Cell(bounds), Cell(_p(each.p)), Cell(_p(each.adjusted))]


def _p(value: float | None) -> str:
    return NOTHING if value is None else "< .0001" if value < 0.0001 else f"{value:.4f}"


# ----------------------------------------------------------------------------------------------------------------- trends

TURNED = ("arms", "metric", "slope", "95 %", "p", "p adjusted", "sizes", "seeds", "bend: p")


def trend_table(key: str, found: Sequence[Trend], mark: str) -> Table:
    rows = [
        [
            Cell(f"{each.arm} \N{MINUS SIGN} {each.rival}"),
            Cell(each.metric.label),
            _slope(each, mark),
            *_tested(each),
            Cell(str(len(each.sizes))),
            Cell(str(each.seeds) if each.seeds else NOTHING),
            Cell(_p(each.curvature.p if each.curvature else None)),
        ]
        for each in found
    ]
    notes = ("", "", "for ten times the parameters", "", "", "", "", "", "")
    return Table(key, "Differences over model size", *_with_series(found, TURNED, rows), trends_frame(found), notes)


def _slope(each: Trend, mark: str) -> Cell:
    if each.outcome == "no straight line":
        return Cell(NOTHING, verdict=each.outcome, tone=words.TONES[each.outcome])
    shown = _difference(each.slope, each, mark)
    return Cell(shown.text, verdict=shown.verdict, tone=shown.tone, detail=each.refusal)


def _with_series(
    found: Sequence[Trend | Law], heads: tuple[str, ...], rows: list[list[Cell]]
) -> tuple[tuple[str, ...], tuple[Row, ...]]:
    """Heads and rows, with the series in the first cell where there are several."""
    if len({each.series for each in found}) > 1:
        rows = [[Cell(row[0].text, detail=each.series), *row[1:]] for each, row in zip(found, rows, strict=True)]
    return heads, tuple(Row(tuple(row)) for row in rows)


# ------------------------------------------------------------------------------------------------------------------- laws


FITTED = (
    *("arm", "quantity", "sizes", "exponent", "95 %", "size left out"),
    *("largest size", "why no exponent"),
)


def law_table(key: str, found: Sequence[Law], mark: str) -> Table:
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
                Cell(f"{law.exponent:.3f}{mark}" if stated else NOTHING),
                Cell(f"[{law.low:.2f}, {law.high:.2f}]" if stated else NOTHING),
                Cell(f"{law.prediction_error:.1%}" if law.prediction_error is not None else NOTHING),
                Cell(f"{largest.predicted:.4f} / {largest.measured:.4f} ({largest.error:+.1%})" if largest else NOTHING),
                Cell(law.refusal or NOTHING),
            ]
        )
    notes = ("", "", "", "", "bootstrap", "error", "predicted / measured", "")
    return Table(key, "Power laws", *_with_series(found, FITTED, rows), laws_frame(found), notes)


# ------------------------------------------------------------------------------------------------------------------- cost


def cost_table(key: str, found: Sequence[Priced], gpu: bool, mark: str) -> Table:
    hours = "GPU-hours" if gpu else "process-hours"
    heads = ("arm", "model", found[0].metric.label, hours, "quality for hours", "peak GiB", "quality for memory")
    rows = tuple(
        Row(
            (
                Cell(each.arm),
                Cell(each.model),
                Cell(
                    each.metric.show(each.quality) + mark,
                    detail=f"[{each.interval.low:.4f}, {each.interval.high:.4f}]" if each.interval else "",
                ),
                Cell(f"{each.device_hours:.3g}" if each.device_hours is not None else NOTHING, sort=f"{each.device_hours or 0}"),
                _place(each.by_hours),
                Cell(f"{each.peak_gib:.2f}" if each.peak_gib is not None else NOTHING),
                _place(each.by_memory),
            )
        )
        for each in found
    )
    return Table(key, "Quality and cost", heads, rows, costs_frame(found), ("", "", "95 % of questions", "", "", "", ""))


def _place(place: str | None) -> Cell:
    return Cell(place, tone=words.PLACES[place]) if place else Cell(NOTHING)


FORECAST = ("run", "ranks", "s a step", "s a step", "error", "GiB", "GiB", "error", "why no prediction")
FORECAST_NOTES = ("device", "", "predicted", "measured", "of time", "predicted", "measured", "of memory", "")


def forecast_table(key: str, runs: pd.DataFrame) -> Table:
    """Predicted against measured of each run."""
    rows = tuple(
        Row(
            (
                Cell(row["run"], detail=row["device"] or ""),
                Cell(str(row["ranks"])),
                *_pair(row["predicted_step_seconds"], row["median_step_seconds"]),
                *_pair(row["predicted_gib"], row["peak_gib"]),
                Cell(row["not_predicted"] or NOTHING),
            )
        )
        for row in plain(runs)
    )
    names = [
        "run",
        "ranks",
        "device",
        *(name for name in COST_COLUMNS if name in runs and name not in ("ranks", "device", "gpu")),
    ]
    return Table(key, "Predicted against measured", FORECAST, rows, runs[names], FORECAST_NOTES)


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

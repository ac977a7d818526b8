"""Rows of the report's tables, and the same as data to download.

Formats numbers; computes none. Knows no HTML.
"""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from hybrid_scale.statistics import Interval
from hybrid_scale.study.clock import clock
from hybrid_scale.study.results.answers import in_words
from hybrid_scale.study.results.comparisons import Comparison
from hybrid_scale.study.results.crossed import Crossed
from hybrid_scale.study.results.findings import Finding, findings
from hybrid_scale.study.results.scaling import Law, Priced
from hybrid_scale.study.results.scores import Arm, Metric, Score
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


@dataclass(frozen=True)
class Row:
    name: str
    kind: str
    seeds: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Group:
    """Arms that may be compared: rows of the headline table and what they show."""

    label: str
    rows: tuple[Row, ...]
    findings: tuple[Finding, ...]


def headline(found: Sequence[Arm], metrics: Sequence[Metric], start: Mapping[str, Mapping[str, Score]]) -> tuple[Group, ...]:
    by_label: dict[str, list[Arm]] = defaultdict(list)
    for arm in found:
        by_label[arm.group].append(arm)
    return tuple(
        Group(_label(label, members), _rows(members, metrics, start.get(label, {})), tuple(findings(members)))
        for label, members in by_label.items()
    )


def _label(group: str, members: Sequence[Arm]) -> str:
    size = members[0].size
    return f"{group} ({in_words(size)} parameters)" if group.startswith("model ") and size else group


def _rows(found: Sequence[Arm], metrics: Sequence[Metric], start: Mapping[str, Score]) -> tuple[Row, ...]:
    best = {metric.key: _best(found, metric) for metric in metrics}
    rows = [
        Row(
            arm.name,
            arm.kind,
            f"{_finished(arm)} of {arm.runs}",
            tuple(_cell(arm.scores.get(metric.key), metric, best[metric.key]) for metric in metrics),
        )
        for arm in found
    ]
    if start:
        # Without a spread: before the first step runs of one base differ by rounding alone.
        before = tuple(Cell(_cell(start.get(metric.key), metric, None).text) for metric in metrics)
        rows.append(Row("untrained", "before step 1", "", before))
    return tuple(rows)


def _finished(arm: Arm) -> int:
    return max((len(score.by_seed) for score in arm.scores.values()), default=0)


def _best(found: Sequence[Arm], metric: Metric) -> float | None:
    means = [arm.scores[metric.key].mean for arm in found if metric.key in arm.scores]
    if len({metric.show(mean) for mean in means}) < 2:
        return None
    return max(means) if metric.higher_is_better else min(means)


def _cell(score: Score | None, metric: Metric, best: float | None) -> Cell:
    if score is None:
        return Cell(NOTHING)
    spread = metric.show(score.deviation) if score.deviation is not None and score.extent > 0 else ""
    shown = metric.show(score.mean)
    return Cell(shown, spread, best is not None and shown == metric.show(best))


def means(found: Sequence[Arm]) -> pd.DataFrame:
    """All metrics of all arms and seeds, for the download below the headline table."""
    rows = [
        {"group": arm.group, "arm": arm.name, "kind": arm.kind, "seed": seed, "metric": metric, "value": value}
        for arm in found
        for metric, score in arm.scores.items()
        for seed, value in score.by_seed.items()
    ]
    return pd.DataFrame(rows, columns=["group", "arm", "kind", "seed", "metric", "value"])


# ------------------------------------------------------------------------------------------------------------ comparisons


COMPARED = (
    "model",
    "parameters",
    "arm",
    "minus",
    "measure",
    "difference",
    "95 % of questions",
    "p",
    "p (Holm)",
    "seeds",
    "95 % of questions and seeds",
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
            Cell(_bounds(each.interval, each.metric.decimals)),
            Cell(_p(each.test.p if each.test else None)),
            Cell(_p(each.adjusted)),
            Cell(_seeds(each), sort=str(each.seeds.count)),
            Cell(_both(each.both, each.metric.decimals)),
            Cell(each.outcome),
        ]
        for each in found
    ]
    return Table(key, "Hybrid arms minus single arms", COMPARED, rows, comparison_data(found))


def _bounds(interval: Interval | None, places: int) -> str:
    return NOTHING if interval is None else f"[{interval.low:+.{places}f}, {interval.high:+.{places}f}]"


def _both(both: Crossed | None, places: int) -> str:
    if both is None:
        return NOTHING
    low, high = both.interval()
    return f"[{low:+.{places}f}, {high:+.{places}f}]"


def _p(value: float | None) -> str:
    return NOTHING if value is None else "< .0001" if value < 0.0001 else f"{value:.4f}"


def _seeds(each: Comparison) -> str:
    """Number of seeds, and where there are several the interval of the difference over them."""
    if each.seeds.low is None:
        return str(each.seeds.count)
    places = each.metric.decimals
    return f"{each.seeds.count}: [{each.seeds.low:+.{places}f}, {each.seeds.high:+.{places}f}]"


def comparison_data(found: Sequence[Comparison]) -> pd.DataFrame:
    rows = [
        {
            "task": each.task,
            "group": each.group,
            "model": each.model,
            "parameters": each.size,
            "arm": each.arm,
            "rival": each.rival,
            "measure": each.metric.key,
            "difference": each.difference,
            "low": each.interval.low if each.interval else None,
            "high": each.interval.high if each.interval else None,
            "interval": each.interval.method if each.interval else None,
            "questions": each.test.clusters if each.test else None,
            "p": each.test.p if each.test else None,
            "p_holm": each.adjusted,
            "seeds": each.seeds.count,
            "seeds_sd": each.seeds.sd,
            "seeds_low": each.seeds.low,
            "seeds_high": each.seeds.high,
            "both_low": each.both.interval()[0] if each.both else None,
            "both_high": each.both.interval()[1] if each.both else None,
            "verdict": each.outcome,
            "refusal": each.refusal,
        }
        for each in found
    ]
    return pd.DataFrame(rows)


# ----------------------------------------------------------------------------------------------------------------- trends

TURNED = (
    *("arm", "minus", "measure", "sizes", "change for ten times the parameters", "95 % of questions", "p", "p (Holm)"),
    *("95 % of questions and seeds", "verdict"),
)


def trend_table(key: str, found: Sequence[Trend]) -> Table:
    rows = [
        [
            Cell(each.arm),
            Cell(each.rival),
            Cell(each.metric.label),
            Cell(str(len(each.sizes))),
            Cell(f"{each.slope:+.{each.metric.decimals}f}"),
            Cell(_bounds(each.interval, each.metric.decimals)),
            Cell(_p(each.test.p if each.test else None)),
            Cell(_p(each.adjusted)),
            Cell(_both(each.both, each.metric.decimals)),
            Cell(each.outcome if not each.refusal else f"not tested: {each.refusal}"),
        ]
        for each in found
    ]
    if len({each.series for each in found}) > 1:
        rows = [[Cell(each.series or NOTHING), *row] for each, row in zip(found, rows, strict=True)]
        return Table(key, "Differences over model size", ("series", *TURNED), rows, trend_data(found))
    return Table(key, "Differences over model size", TURNED, rows, trend_data(found))


def trend_data(found: Sequence[Trend]) -> pd.DataFrame:
    rows = [
        {
            "task": each.task,
            "series": each.series,
            "arm": each.arm,
            "rival": each.rival,
            "measure": each.metric.key,
            "sizes": len(each.sizes),
            "smallest": min(each.sizes),
            "largest": max(each.sizes),
            "slope_per_tenfold": each.slope,
            "low": each.interval.low if each.interval else None,
            "high": each.interval.high if each.interval else None,
            "p": each.test.p if each.test else None,
            "p_holm": each.adjusted,
            "both_low": each.both.interval()[0] if each.both else None,
            "both_high": each.both.interval()[1] if each.both else None,
            "verdict": each.outcome,
            "refusal": each.refusal,
        }
        for each in found
    ]
    return pd.DataFrame(rows)


# ------------------------------------------------------------------------------------------------------------------- laws


FITTED = (
    *("series", "arm", "quantity", "sizes", "exponent", "95 % (bootstrap)"),
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
                Cell(each.series or "all"),
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
    return Table(key, "Power laws", FITTED, rows, law_data(found))


def law_data(found: Sequence[Law]) -> pd.DataFrame:
    rows = [
        {
            "task": each.task,
            "series": each.series,
            "arm": each.arm,
            "quantity": each.quantity,
            "parameters": size,
            "value": value,
            "left_out_prediction": next((out.predicted for out in each.law.left_out if out.size == size), None),
            "factor": each.law.factor,
            "exponent": each.law.exponent,
            "low": each.law.low,
            "high": each.law.high,
            "refusal": each.law.refusal,
        }
        for each in found
        for size, value in zip(each.law.sizes, each.law.values, strict=True)
    ]
    return pd.DataFrame(rows)


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
    columns = ("model", "arm", "device_hours", "by_hours", "peak_gib", "by_memory", "quality")
    data = [{name: getattr(each, name) for name in columns} | {"measure": each.metric.key} for each in found]
    return Table(key, "Quality and cost", heads, rows, pd.DataFrame(data))


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

"""Which figures the report has, from what was collected.

Chooses and groups; plots.py and scaling_plots.py draw.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from hybrid_scale.pages.parts import Plot
from hybrid_scale.study.report.plots import Look, bars, curves, heat_map, thinned, trade_off
from hybrid_scale.study.report.scaling_plots import differences, fitted, forecast, fronts
from hybrid_scale.study.results.collect import Collected
from hybrid_scale.study.results.comparisons import Comparison
from hybrid_scale.study.results.scaling import Law, Priced
from hybrid_scale.study.results.scores import METRICS, Arm, Metric, Score, final_values

MAP_CAPTION = "mAP in hundredths: queries of one language (rows) against passages of one language (columns). Diagonal: mono."
TOP_CAPTION = (
    "Share, in hundredths, of queries of one language (rows) whose top passage in the union pool is in a language (columns)."
)
LOSS_CAPTION = (
    "Thin lines: single seeds; thick: running mean. Arms score against different pools, so their losses can't be compared "
    "with each other, only with themselves over time."
)
MATRICES = (
    ("map_matrix", "mAP by query and passage language", MAP_CAPTION),
    ("top1_language_matrix", "language of the top passage", TOP_CAPTION),
)


@dataclass(frozen=True)
class Matrices:
    """One kind of language matrix, a heat map an arm."""

    title: str
    caption: str
    plots: tuple[Plot, ...]


@dataclass(frozen=True)
class Panel:
    """Figures of one task, model and data set."""

    label: str
    plots: tuple[Plot, ...]
    matrices: tuple[Matrices, ...]


@dataclass(frozen=True)
class Subject:
    """What the figures of one task are drawn from."""

    collected: Collected
    task: str
    arms: Sequence[Arm]
    metrics: Sequence[Metric]
    start: Mapping[str, Mapping[str, Score]]
    """Scores before the first step, by group."""
    look: Mapping[str, Look]


def panels(subject: Subject, key: str) -> tuple[Panel, ...]:
    """One for each place on the axes `models` and `data`; those without anything to draw left out."""
    result = []
    for position, label in enumerate(dict.fromkeys(arm.panel for arm in subject.arms)):
        name = f"{key}-{position}"
        members = [arm for arm in subject.arms if arm.panel == label]
        result.append(Panel(label, _plots(subject, name, members), _matrices(subject.collected, subject.task, name, label)))
    return tuple(panel for panel in result if panel.plots or panel.matrices)


def _plots(subject: Subject, key: str, found: Sequence[Arm]) -> tuple[Plot, ...]:
    keys = {metric.key for metric in subject.metrics}
    main = METRICS["rank_distance"] if "rank_distance" in keys else subject.metrics[0]
    starts = [scores for group, scores in subject.start.items() if group in {arm.group for arm in found}]
    before = starts[0].get(main.key) if len(starts) == 1 else None
    plots = [trade_off(f"{key}-trade-off", found, subject.look), bars(f"{key}-bars", found, main, subject.look, before)]
    for metric in (METRICS["mono_map"], METRICS["cross_map"]) if "cross_map" in keys else (main,):
        plots.append(_progress(subject, f"{key}-progress-{metric.key}", found[0].panel, metric))
    return tuple(plot for plot in plots if plot is not None)


def _progress(subject: Subject, key: str, panel: str, metric: Metric) -> Plot | None:
    """A metric over the steps at which it was measured; nothing where that was once or twice."""
    values = subject.collected.values
    rows = values[(values["task"] == subject.task) & (values["metric"] == metric.key) & values["language"].isna()]
    rows = rows[rows["doubt"].isna() & rows["step"].notna()]
    rows = rows.sort_values(["run", "step", "final"]).drop_duplicates(["run", "step"], keep="last")
    runs = subject.collected.runs[subject.collected.runs["panel"] == panel]
    table = rows.merge(runs[["run", "arm", "seed"]], on="run")[["arm", "seed", "step", "value"]]
    if table["step"].nunique() < 3:
        return None
    title = f"{metric.label} during training"
    caption = "Thin lines: single seeds; thick: means. Runs that aren't finished are drawn as far as they got."
    table = table.rename(columns={"value": metric.key}).astype({"step": int})
    return curves(key, title, caption, table, metric.key, metric.label, subject.look)


def _matrices(collected: Collected, task: str, key: str, panel: str) -> tuple[Matrices, ...]:
    values = final_values(collected, task)
    values = values[values["panel"] == panel]
    found = (Matrices(title, caption, _matrix_plots(values, name, f"{key}-{name}")) for name, title, caption in MATRICES)
    return tuple(matrices for matrices in found if matrices.plots)


def _matrix_plots(values: pd.DataFrame, name: str, key: str) -> tuple[Plot, ...]:
    """One heat map an arm (mean over its seeds), on one colour scale."""
    rows = values[values["metric"] == name]
    means = rows.groupby(["arm", "language", "passage_language"], sort=False)["value"].mean()
    if means.index.get_level_values("passage_language").nunique() < 2:
        return ()
    limits = (float(means.min()), float(means.max()))
    return tuple(
        heat_map(f"{key}-{position}", f"Arm {arm}", means.loc[arm].unstack(sort=False), limits)
        for position, arm in enumerate(rows["arm"].unique())
    )


def training(collected: Collected, look: Mapping[str, Look]) -> tuple[Plot, ...]:
    """The loss, one figure a panel."""
    if collected.curves.empty:
        return ()
    curve = collected.curves[["run", "step", "loss"]].dropna()
    result = []
    for position, label in enumerate(collected.runs["panel"].unique()):
        runs = collected.runs[collected.runs["panel"] == label]
        parts = [thinned(rows, "loss") for _, rows in curve[curve["run"].isin(runs["run"])].groupby("run", sort=False)]
        if not parts:
            continue
        table = pd.concat(parts).merge(runs[["run", "arm", "seed"]], on="run")[["arm", "seed", "step", "loss"]]
        title = f"Training loss, {label}" if label else "Training loss"
        result.append(curves(f"loss-{position}", title, LOSS_CAPTION, table, "loss", "loss", look))
    return tuple(plot for plot in result if plot is not None)


def by_size(key: str, comparisons: Sequence[Comparison], look: Mapping[str, Look]) -> tuple[Plot, ...]:
    """Differences of one task over size: a figure a measure and rival."""
    kinds = dict.fromkeys((each.metric.key, each.rival) for each in comparisons)
    found = [
        differences(
            f"{key}-difference-{position}",
            [each for each in comparisons if (each.metric.key, each.rival) == kind],
            look,
        )
        for position, kind in enumerate(kinds)
    ]
    return tuple(plot for plot in found if plot is not None)


def over_size(key: str, laws: Sequence[Law], look: Mapping[str, Look]) -> tuple[Plot, ...]:
    """Quantities of one task over size: a figure a quantity."""
    quantities = dict.fromkeys(law.quantity for law in laws)
    found = [
        fitted(f"{key}-law-{position}", [law for law in laws if law.quantity == quantity], look)
        for position, quantity in enumerate(quantities)
    ]
    return tuple(plot for plot in found if plot is not None)


def against_cost(key: str, points: Sequence[Priced], gpu: bool, look: Mapping[str, Look]) -> tuple[Plot, ...]:
    found = (
        fronts(f"{key}-hours", points, "device_hours", "GPU-hours a run" if gpu else "CPU process-hours a run", look),
        fronts(f"{key}-memory", points, "peak_gib", "peak GiB of a rank", look),
    )
    return tuple(plot for plot in found if plot is not None)


def forecasts(runs: pd.DataFrame, look: Mapping[str, Look]) -> tuple[Plot, ...]:
    found = (
        forecast("forecast-time", runs, "predicted_step_seconds", "median_step_seconds", "seconds a step", look),
        forecast("forecast-memory", runs, "predicted_gib", "peak_gib", "GiB allocated on a rank", look),
    )
    return tuple(plot for plot in found if plot is not None)

"""Which figures the report has, from what was collected.

Chooses and groups; plots.py and scaling_plots.py draw.
"""

import itertools
from collections.abc import Mapping, Sequence

import pandas as pd

from hybrid_scale.pages.parts import Plot
from hybrid_scale.study.report.plots import Look, curves, heat_map, thinned
from hybrid_scale.study.report.scaling_plots import differences, fitted, forecast, fronts
from hybrid_scale.study.results.collect import Collected
from hybrid_scale.study.results.comparisons import Comparison
from hybrid_scale.study.results.scaling import Law, Priced
from hybrid_scale.study.results.scores import METRICS, Arm, Metric, crosses_languages, final_values, main_metric

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


def progress(collected: Collected, task: str, key: str, found: Sequence[Arm], look: Mapping[str, Look]) -> tuple[Plot, ...]:
    """What the set's main metrics did during training, for each place on the axes `models` and `data`."""
    keys = ("mono_map", "cross_map") if crosses_languages(found) else (main_metric(found),)
    plots = []
    for position, panel in enumerate(dict.fromkeys(arm.panel for arm in found)):
        for name in keys:
            plots.append(_progress(collected, task, f"{key}-progress-{position}-{name}", panel, METRICS[name], look))
    return tuple(plot for plot in plots if plot is not None)


def matrices(collected: Collected, task: str, key: str, found: Sequence[Arm]) -> tuple[Plot, ...]:
    """Language by language, of the largest model: a heat map for each arm."""
    sized = sorted((arm for arm in found if arm.scores), key=lambda arm: arm.size or 0.0)
    if not sized:
        return ()
    panel = sized[-1].panel
    values = final_values(collected, task)
    values = values[values["panel"] == panel]
    of = f", {panel}" if panel else ""
    plots = (_matrix_plots(values, name, f"{key}-{name}", f"{title}{of}", caption) for name, title, caption in MATRICES)
    return tuple(itertools.chain.from_iterable(plots))


def _progress(collected: Collected, task: str, key: str, panel: str, metric: Metric, look: Mapping[str, Look]) -> Plot | None:
    """A metric over the steps at which it was measured; nothing where that was once or twice."""
    values = collected.values
    rows = values[(values["task"] == task) & (values["metric"] == metric.key) & values["language"].isna()]
    rows = rows[rows["doubt"].isna()].merge(collected.runs[["run", "steps"]], on="run")
    of_last = rows["step"].isna() & rows["final"]
    rows["step"] = rows["step"].astype("float64").mask(of_last, rows["steps"])
    rows = rows.dropna(subset=["step"]).sort_values(["run", "step", "final"]).drop_duplicates(["run", "step"], keep="last")
    runs = collected.runs[collected.runs["panel"] == panel]
    table = rows.merge(runs[["run", "arm", "seed", "flops_a_token"]], on="run")
    table = table[["run", "arm", "seed", "step", "flops_a_token", "value"]].astype({"step": int})
    if table["step"].nunique() < 3:
        return None
    title = f"{metric.label} on {task} during training" + (f", {panel}" if panel else "")
    table = table.rename(columns={"value": metric.key})
    cost = _with_cost(table, collected.curves)
    if cost is None:
        caption = "Thin lines: single seeds; thick: means. Runs that aren't finished are drawn as far as they got."
        return curves(key, title, caption, table[["arm", "seed", "step", metric.key]], metric.key, metric.label, look)
    caption = (
        "Arms at equal cost: real tokens trained on, and above them the operations that their gradients need (forward and "
        "backward, nothing computed again). The axis above stands at the arms' mean for a token; the data have each arm's "
        "own. Thin lines: single seeds; thick: means. Runs that aren't finished are drawn as far as they got."
    )
    flops = cost["training_flops"].sum() / cost["real_tokens"].sum() if cost["training_flops"].notna().all() else None
    columns = ["arm", "seed", "step", "real_tokens", "training_flops", metric.key]
    return curves(key, title, caption, cost[columns], metric.key, metric.label, look, "real_tokens", flops)


def _with_cost(table: pd.DataFrame, logged: pd.DataFrame) -> pd.DataFrame | None:
    """`table` with `real_tokens` and `training_flops` up to each of its steps; None where a step's log doesn't tell."""
    known = logged[["run", "step", "total_real_tokens"]].dropna().drop_duplicates(["run", "step"], keep="last")
    known = known.rename(columns={"total_real_tokens": "real_tokens"}).astype({"step": int, "real_tokens": "float64"})
    joined = table.merge(known, on=["run", "step"], how="left")
    joined.loc[joined["step"] == 0, "real_tokens"] = 0.0
    if joined["real_tokens"].isna().any():
        return None
    return joined.assign(training_flops=joined["real_tokens"] * joined["flops_a_token"])


def _matrix_plots(values: pd.DataFrame, name: str, key: str, title: str, caption: str) -> tuple[Plot, ...]:
    """One heat map an arm (mean over its finished seeds), on one colour scale."""
    rows = values[values["metric"] == name]
    means = rows.groupby(["arm", "language", "passage_language"], sort=False)["value"].mean()
    if means.index.get_level_values("passage_language").nunique() < 2:
        return ()
    limits = (float(means.min()), float(means.max()))
    return tuple(
        heat_map(f"{key}-{position}", f"{arm}: {title}", caption, means.loc[arm].unstack(sort=False), limits)
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
    """Differences of one task over size: a figure for each metric and rival."""
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

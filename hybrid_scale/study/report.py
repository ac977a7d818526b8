"""One study -> `report.html`: a page that needs nothing beside itself.

Chooses what is said and in which order. Scores, findings and figures are computed elsewhere; the page's looks are in
`report.html.j2`.
"""

import datetime
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2
import pandas as pd

from hybrid_scale.runs import RunDirectory, read_json, write_text
from hybrid_scale.study import svg
from hybrid_scale.study.collect import Collected, collect, strangers, write_tables
from hybrid_scale.study.findings import Finding, findings
from hybrid_scale.study.grid import Plan, flat
from hybrid_scale.study.local import clock
from hybrid_scale.study.plots import Look, Plot, bars, curves, heat_map, looks, thinned, trade_off
from hybrid_scale.study.scores import (
    METRICS,
    Arm,
    Metric,
    Score,
    arms,
    crosses_languages,
    final_values,
    headline_metrics,
    tasks,
    untrained,
)

TEMPLATE = Path(__file__).with_name("report.html.j2")

MAP_CAPTION = "mAP in hundredths: queries of one language (rows) against passages of one language (columns). Diagonal: mono."
TOP_CAPTION = (
    "Share, in hundredths, of queries of one language (rows) whose top passage in the union pool is in a language (columns)."
)
LOSS_CAPTION = (
    "Thin lines: single seeds; thick: running mean. Arms score against different pools, so their losses can't be compared "
    "with each other, only with themselves over time."
)


@dataclass(frozen=True)
class Cell:
    text: str
    spread: str = ""
    best: bool = False


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


@dataclass(frozen=True)
class Matrices:
    """One kind of language matrix, a heat map an arm."""

    title: str
    caption: str
    plots: tuple[Plot, ...]


@dataclass(frozen=True)
class Task:
    name: str
    anchor: str
    about: str
    metrics: tuple[Metric, ...]
    groups: tuple[Group, ...]
    plots: tuple[Plot, ...]
    matrices: tuple[Matrices, ...]
    data: pd.DataFrame
    multilingual: bool


def report(plan: Plan) -> Path:
    """Collect the runs, write the tables and the page; returns the page's path."""
    collected = collect(plan)
    write_tables(plan, collected)
    path = plan.directory / "report.html"
    write_text(path, render(plan, collected))
    return path


def render(plan: Plan, collected: Collected) -> str:
    look = looks(plan.arms)
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters["csv_link"] = csv_link
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(
        study=plan.config.study.name,
        source=plan.source,
        directory=str(plan.directory),
        written=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        runs=_run_rows(collected.runs),
        counts=Counter(collected.runs["status"]),
        unfinished=_run_rows(collected.runs[collected.runs["status"] != "done"]),
        checks=plan.checks,
        strangers=strangers(plan),
        seeds=plan.config.seeds,
        tasks=_tasks(plan, collected, look),
        training=_training_plots(collected, look),
        settings=_side_by_side({run.id: flat(_settings(plan, run.id)) for run in plan.runs}),
        manifests=_side_by_side({run.id: _manifest(run.directory) for run in plan.runs}),
        colours=svg.ARM_COLOURS,
    )


def csv_link(table: pd.DataFrame) -> str:
    """The table as a `data:` address."""
    return "data:text/csv;charset=utf-8," + quote(table.to_csv(index=False), safe="")


def _run_rows(runs: pd.DataFrame) -> list[dict[str, Any]]:
    """The runs as plain values; what isn't known is null."""
    rows = [{str(key): None if pd.isna(value) else value for key, value in row.items()} for row in runs.to_dict("records")]
    for row in rows:
        row["time"] = clock(row["training_seconds"]) if row["training_seconds"] is not None else None
    return rows


def _tasks(plan: Plan, collected: Collected, look: Mapping[str, Look]) -> list[Task]:
    """Tasks in several languages, which answer the study's question, come first."""
    found = [_task(plan, collected, name, position, look) for position, name in enumerate(tasks(collected))]
    return sorted(found, key=lambda task: not task.multilingual)


def _task(plan: Plan, collected: Collected, name: str, position: int, look: Mapping[str, Look]) -> Task:
    found = arms(collected, name)
    metrics = headline_metrics(found)
    start = untrained(collected, name)
    key = f"task-{position}"
    return Task(
        name=name,
        anchor=key,
        about=_about(plan, name),
        metrics=metrics,
        groups=_groups(found, metrics, start),
        plots=_task_plots(collected, name, key, found, metrics, start, look),
        matrices=_matrices(collected, name, key),
        data=_means(found),
        multilingual=crosses_languages(found),
    )


def _about(plan: Plan, task: str) -> str:
    """Size of the task, from the first evaluation that tells."""
    for run in plan.runs:
        file = RunDirectory(run.directory).evaluation_file(task)
        if file.exists():
            content = read_json(file)
            languages = content.get("languages") or []
            sizes = [f"{content[key]:,} {key}" for key in ("queries", "passages") if isinstance(content.get(key), int)]
            if languages:
                sizes.append(f"{len(languages)} {'language' if len(languages) == 1 else 'languages'} ({' '.join(languages)})")
            return ", ".join(sizes)
    return ""


def _groups(found: Sequence[Arm], metrics: Sequence[Metric], start: Mapping[str, Mapping[str, Score]]) -> tuple[Group, ...]:
    by_label: dict[str, list[Arm]] = defaultdict(list)
    for arm in found:
        by_label[arm.group].append(arm)
    return tuple(
        Group(label, _headline(members, metrics, start.get(label, {})), tuple(findings(members)))
        for label, members in by_label.items()
    )


def _headline(found: Sequence[Arm], metrics: Sequence[Metric], start: Mapping[str, Score]) -> tuple[Row, ...]:
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
        return Cell("\N{EN DASH}")
    spread = metric.show(score.deviation) if score.deviation is not None and score.extent > 0 else ""
    shown = metric.show(score.mean)
    return Cell(shown, spread, best is not None and shown == metric.show(best))


def _means(found: Sequence[Arm]) -> pd.DataFrame:
    """All metrics of all arms and seeds, for the download below the headline table."""
    rows = [
        {"arm": arm.name, "kind": arm.kind, "seed": seed, "metric": metric, "value": value}
        for arm in found
        for metric, score in arm.scores.items()
        for seed, value in score.by_seed.items()
    ]
    return pd.DataFrame(rows, columns=["arm", "kind", "seed", "metric", "value"])


def _task_plots(
    collected: Collected,
    task: str,
    key: str,
    found: Sequence[Arm],
    metrics: Sequence[Metric],
    start: Mapping[str, Mapping[str, Score]],
    look: Mapping[str, Look],
) -> tuple[Plot, ...]:
    keys = {metric.key for metric in metrics}
    main = METRICS["rank_distance"] if "rank_distance" in keys else metrics[0]
    before = next(iter(start.values())).get(main.key) if len(start) == 1 else None
    plots = [trade_off(f"{key}-trade-off", found, look), bars(f"{key}-bars", found, main, look, before)]
    for metric in (METRICS["mono_map"], METRICS["cross_map"]) if "cross_map" in keys else (main,):
        plots.append(_progress(collected, task, f"{key}-progress-{metric.key}", metric, look))
    return tuple(plot for plot in plots if plot is not None)


def _progress(collected: Collected, task: str, key: str, metric: Metric, look: Mapping[str, Look]) -> Plot | None:
    """A metric over the steps at which it was measured; nothing where that was once or twice."""
    values = collected.values
    rows = values[(values["task"] == task) & (values["metric"] == metric.key) & values["language"].isna()]
    rows = rows.sort_values(["run", "step", "final"]).drop_duplicates(["run", "step"], keep="last")
    table = rows.merge(collected.runs[["run", "arm", "seed"]], on="run")[["arm", "seed", "step", "value"]]
    if table["step"].nunique() < 3:
        return None
    title = f"{metric.label} during training"
    caption = "Thin lines: single seeds; thick: means. Runs that aren't finished are drawn as far as they got."
    table = table.rename(columns={"value": metric.key}).astype({"step": int})
    return curves(key, title, caption, table, metric.key, metric.label, look)


def _matrices(collected: Collected, task: str, key: str) -> tuple[Matrices, ...]:
    values = final_values(collected, task)
    kinds = (
        ("map_matrix", "mAP by query and passage language", MAP_CAPTION),
        ("top1_language_matrix", "language of the top passage", TOP_CAPTION),
    )
    found = (Matrices(title, caption, _matrix_plots(values, name, f"{key}-{name}")) for name, title, caption in kinds)
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


def _training_plots(collected: Collected, look: Mapping[str, Look]) -> tuple[Plot, ...]:
    if collected.curves.empty:
        return ()
    curve = collected.curves[["run", "step", "loss"]].dropna()
    parts = [thinned(rows, "loss") for _, rows in curve.groupby("run", sort=False)]
    table = pd.concat(parts).merge(collected.runs[["run", "arm", "seed"]], on="run")[["arm", "seed", "step", "loss"]]
    plot = curves("loss", "Training loss", LOSS_CAPTION, table, "loss", "loss", look)
    return (plot,) if plot is not None else ()


def _settings(plan: Plan, run_id: str) -> dict[str, Any]:
    run = next(run for run in plan.runs if run.id == run_id)
    directory = RunDirectory(run.directory)
    config = directory.config() if directory.config_file.exists() else run.config
    return config.model_dump(mode="json", exclude={"run"})


def _manifest(directory: Path) -> dict[str, Any]:
    file = RunDirectory(directory).manifest_file
    return flat(read_json(file)) if file.exists() else {}


def _side_by_side(tables: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, list[tuple[str, str]]]]:
    """For each key its values, each with the runs that have it ("" where all do)."""
    result = []
    for key in dict.fromkeys(key for table in tables.values() for key in table):
        by_value: dict[str, list[str]] = defaultdict(list)
        for run, table in tables.items():
            if key in table:
                by_value[_plain(table[key])].append(run)
        everywhere = len(by_value) == 1 and len(next(iter(by_value.values()))) == len(tables)
        result.append((key, [(value, "" if everywhere else ", ".join(runs)) for value, runs in by_value.items()]))
    return result


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_plain, value)) or "none"
    return "none" if value is None else str(value)

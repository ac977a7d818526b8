"""One study -> `report.html`: a page that needs nothing beside itself.

Puts together what others compute, in the order in which it is read: answers, scores, tests, size, cost, figures, runs, method.
The page's looks and its standing text are in `report.html.j2`.
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

from hybrid_scale.errors import HybridScaleError
from hybrid_scale.pages import svg
from hybrid_scale.pages.parts import Plot
from hybrid_scale.runs import RunDirectory, atomic_path, read_json, write_text
from hybrid_scale.statistics import FEWEST_SEEDS, RESAMPLES
from hybrid_scale.study.grid import Plan, PlannedRun, flat
from hybrid_scale.study.report import figures, tables
from hybrid_scale.study.report.plots import Look, looks
from hybrid_scale.study.report.scores_table import Group, headline
from hybrid_scale.study.results import frames
from hybrid_scale.study.results.answers import Answer, answers
from hybrid_scale.study.results.choice import write_chosen
from hybrid_scale.study.results.collect import Collected, collect, strangers, warnings, write_tables
from hybrid_scale.study.results.comparisons import Comparison, cautions, compare
from hybrid_scale.study.results.fits import FARTHEST, FEWEST_SIZES
from hybrid_scale.study.results.primary import Claim, claims, sorted_out
from hybrid_scale.study.results.scaling import Law, Priced, laws, priced
from hybrid_scale.study.results.scores import Metric, arms, crosses_languages, headline_metrics, tasks, untrained
from hybrid_scale.study.results.trends import Trend, trends
from hybrid_scale.study.results.verdicts import ALPHA

TEMPLATE = Path(__file__).with_name("report.html.j2")


@dataclass(frozen=True)
class Judged:
    """What was computed from the tables."""

    claims: list[Claim]
    """The primary family."""
    comparisons: list[Comparison]
    trends: list[Trend]
    laws: list[Law]
    points: list[Priced]

    @classmethod
    def of(cls, plan: Plan, collected: Collected) -> "Judged":
        directories = {run.id: run.directory for run in plan.runs}
        compared = compare(collected, directories, plan.family)
        found = claims(plan.family, collected, compared)
        comparisons = sorted_out(compared, found)
        return cls(found, comparisons, trends(comparisons), laws(collected), priced(collected, directories))


@dataclass(frozen=True)
class Task:
    """One retrieval set's part of the page."""

    name: str
    anchor: str
    about: str
    metrics: tuple[Metric, ...]
    groups: tuple[Group, ...]
    panels: tuple[figures.Panel, ...]
    data: pd.DataFrame
    multilingual: bool
    compared: tables.Table | None
    cautions: tuple[str, ...]
    by_size: tuple[Plot, ...]
    turned: tables.Table | None
    fitted: tables.Table | None
    over_size: tuple[Plot, ...]
    costs: tables.Table | None
    against_cost: tuple[Plot, ...]


def report(plan: Plan) -> Path:
    """Collect the runs, write the tables and the page; returns the page's path."""
    collected = collect(plan)
    judged = Judged.of(plan, collected)
    write_tables(plan, collected)
    for name, table in (
        ("primary.csv", frames.claims_frame(judged.claims)),
        ("comparisons.csv", frames.comparisons_frame(judged.comparisons)),
        ("trends.csv", frames.trends_frame(judged.trends)),
        ("power_laws.csv", frames.laws_frame(judged.laws)),
    ):
        with atomic_path(plan.directory / name) as beside:
            table.to_csv(beside, index=False)
    write_chosen(plan, collected)
    path = plan.directory / "report.html"
    write_text(path, render(plan, collected, judged))
    return path


def render(plan: Plan, collected: Collected, judged: Judged | None = None) -> str:
    judged = judged or Judged.of(plan, collected)
    look = looks(plan.arms)
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters["csv_link"] = csv_link
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    runs = collected.runs
    return template.render(
        study=plan.config.study.name,
        source=plan.source,
        directory=str(plan.directory),
        written=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        runs=tables.plain(runs),
        models=tuple(dict.fromkeys(run.model for run in plan.runs if run.model)),
        counts=Counter(runs["status"]),
        warnings=warnings(runs),
        checks=plan.checks,
        strangers=strangers(plan),
        seeds=plan.config.seeds,
        answers=_answers(runs, judged),
        tasks=_tasks(plan, collected, judged, look),
        family=str(plan.family),
        tests=sum(each.test is not None for each in judged.comparisons),
        slopes=sum(each.test is not None for each in judged.trends),
        limits={"seeds": FEWEST_SEEDS, "sizes": FEWEST_SIZES, "farthest": FARTHEST}
        | {"alpha": ALPHA, "margin": plan.config.study.margin, "resamples": RESAMPLES},
        forecast=tables.forecast_table("forecast", runs),
        forecasts=figures.forecasts(runs, look),
        training=figures.training(collected, look),
        settings=_side_by_side({run.id: _settings(run) for run in plan.runs}),
        manifests=_side_by_side({run.id: _manifest(run.directory) for run in plan.runs}),
        colours=svg.ARM_COLOURS,
    )


def csv_link(table: pd.DataFrame) -> str:
    """The table as a `data:` address."""
    return "data:text/csv;charset=utf-8," + quote(table.to_csv(index=False), safe="")


def _answers(runs: pd.DataFrame, judged: Judged) -> list[Answer]:
    return answers(runs, judged.claims, judged.comparisons, judged.trends, judged.laws, judged.points)


def _tasks(plan: Plan, collected: Collected, judged: Judged, look: Mapping[str, Look]) -> list[Task]:
    """Tasks in several languages, which answer the study's question, come first."""
    found = [_task(plan, collected, judged, name, position, look) for position, name in enumerate(tasks(collected))]
    return sorted(found, key=lambda task: not task.multilingual)


def _task(plan: Plan, collected: Collected, judged: Judged, name: str, position: int, look: Mapping[str, Look]) -> Task:
    found = arms(collected, name)
    metrics = headline_metrics(found)
    start = untrained(collected, name)
    key = f"task-{position}"
    compared = [each for each in judged.comparisons if each.task == name]
    turned = [each for each in judged.trends if each.task == name]
    fitted = [each for each in judged.laws if each.task == name]
    points = [each for each in judged.points if each.task == name]
    gpu = bool(collected.runs["gpu"].any())
    return Task(
        name=name,
        anchor=key,
        about=_about(plan, name),
        metrics=metrics,
        groups=headline(found, metrics, start),
        panels=figures.panels(figures.Subject(collected, name, found, metrics, start, look), key),
        data=frames.means(found),
        multilingual=crosses_languages(found),
        compared=tables.comparison_table(f"{key}-compared", compared) if compared else None,
        cautions=tuple(cautions(compared, found)),
        by_size=figures.by_size(key, compared, look),
        turned=tables.trend_table(f"{key}-turned", turned) if turned else None,
        fitted=tables.law_table(f"{key}-fitted", fitted) if fitted else None,
        over_size=figures.over_size(key, fitted, look),
        costs=tables.cost_table(f"{key}-costs", points, gpu) if points else None,
        against_cost=figures.against_cost(key, points, gpu, look),
    )


def _about(plan: Plan, task: str) -> str:
    """Size of the task, from the first evaluation that tells."""
    for run in plan.runs:
        file = RunDirectory(run.directory).evaluation_file(task)
        content = _readable(file)
        if content:
            languages = content.get("languages") or []
            sizes = [f"{content[key]:,} {key}" for key in ("queries", "passages") if isinstance(content.get(key), int)]
            if languages:
                sizes.append(f"{len(languages)} {'language' if len(languages) == 1 else 'languages'} ({' '.join(languages)})")
            return ", ".join(sizes)
    return ""


def _readable(file: Path) -> dict[str, Any]:
    """Content of a JSON object; nothing where there is none. What is wrong with it was told by `collect`."""
    try:
        content = read_json(file) if file.exists() else {}
    except HybridScaleError:
        return {}
    return content if isinstance(content, dict) else {}


def _settings(run: PlannedRun) -> dict[str, Any]:
    """What the run was started with; before that, or where it can't be read, what is planned."""
    directory = RunDirectory(run.directory)
    try:
        config = directory.config() if directory.config_file.exists() else run.config
    except HybridScaleError:
        config = run.config
    return flat(config.model_dump(mode="json", exclude={"run"}))


def _manifest(directory: Path) -> dict[str, Any]:
    return flat(_readable(RunDirectory(directory).manifest_file))


def _side_by_side(found: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, list[tuple[str, str]]]]:
    """For each key its values, each with the runs that have it ("" where all do)."""
    result = []
    for key in dict.fromkeys(key for table in found.values() for key in table):
        by_value: dict[str, list[str]] = defaultdict(list)
        for run, table in found.items():
            if key in table:
                by_value[_plain(table[key])].append(run)
        everywhere = len(by_value) == 1 and len(next(iter(by_value.values()))) == len(found)
        result.append((key, [(value, "" if everywhere else _some(runs)) for value, runs in by_value.items()]))
    return result


def _some(runs: Sequence[str], most: int = 6) -> str:
    return ", ".join(runs[:most]) + (f" and {len(runs) - most} more" if len(runs) > most else "")


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_plain, value)) or "none"
    return "none" if value is None else str(value)

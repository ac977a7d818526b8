"""One study -> `report.html`: a page that needs nothing beside itself.

Puts together what others compute, in the order in which it is read: the first screen (first.py), then as details
comparisons, size, earlier work's predictions, cost, figures, training, runs, method, provenance. The page's standing
text is in `report.html.j2`.
"""

import datetime
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hybrid_scale.errors import HybridScaleError
from hybrid_scale.pages import svg
from hybrid_scale.pages.page import MOST_BYTES, csv_link, template
from hybrid_scale.pages.parts import MARK, Plot, Table
from hybrid_scale.runs import RunDirectory, atomic_path, read_json, write_text
from hybrid_scale.statistics import FEWEST_SEEDS, RESAMPLES
from hybrid_scale.study.family import BEIR
from hybrid_scale.study.grid import Plan, PlannedRun, development, flat
from hybrid_scale.study.report import figures, predictions, tables, words
from hybrid_scale.study.report.first import first
from hybrid_scale.study.report.plots import Look, looks
from hybrid_scale.study.report.scores_table import Column, scores_table
from hybrid_scale.study.results import frames
from hybrid_scale.study.results.answers import answers
from hybrid_scale.study.results.choice import write_chosen
from hybrid_scale.study.results.collect import Collected, collect, strangers, warnings, write_tables
from hybrid_scale.study.results.comparisons import Comparison, cautions, compare
from hybrid_scale.study.results.fits import FARTHEST, FEWEST_SIZES
from hybrid_scale.study.results.foretold import Foretold, counted, foretold
from hybrid_scale.study.results.primary import Claim, claims, sorted_out
from hybrid_scale.study.results.references import Reference, final_results, in_domain, references
from hybrid_scale.study.results.scaling import Law, Priced, laws, priced
from hybrid_scale.study.results.scores import arms, headline_metrics, tasks
from hybrid_scale.study.results.trends import Trend, trends
from hybrid_scale.study.results.verdicts import ALPHA, Outcome

TEMPLATE = Path(__file__).with_name("report.html.j2")
MOST_ROWS = 60
"""Of a table of comparisons on the page; the others are in its file."""


@dataclass(frozen=True)
class Judged:
    """What was computed from the tables."""

    claims: list[Claim]
    """The primary family."""
    comparisons: list[Comparison]
    trends: list[Trend]
    laws: list[Law]
    points: list[Priced]
    foretold: list[Foretold] = field(default_factory=list)
    """The study's own predictions."""

    @classmethod
    def of(cls, plan: Plan, collected: Collected) -> "Judged":
        directories = {run.id: run.directory for run in plan.runs}
        compared = compare(collected, directories, plan.family)
        found = claims(plan.family, collected, compared)
        comparisons = sorted_out(compared, found)
        expected = foretold(plan.config.predictions, collected, directories)
        return cls(found, comparisons, trends(comparisons), laws(collected), priced(collected, directories), expected)

    def on(self, task: str) -> "Judged":
        """What was computed of one set."""
        return Judged(
            [each for each in self.claims if each.task == task],
            [each for each in self.comparisons if each.task == task],
            [each for each in self.trends if each.task == task],
            [each for each in self.laws if each.task == task],
            [each for each in self.points if each.task == task],
            [each for each in self.foretold if each.task == task],
        )

    @property
    def outcomes(self) -> list[Outcome]:
        return [
            *(each.outcome for each in self.claims),
            *(each.outcome for each in self.comparisons),
            *(each.outcome for each in self.trends),
        ]


@dataclass(frozen=True)
class Task:
    """One retrieval set's part of the details."""

    name: str
    about: str
    scores: Table
    compared: Table | None
    cautions: tuple[str, ...]
    predicted: predictions.Predicted
    turned: Table | None
    fitted: Table | None
    costs: Table | None
    figures: Mapping[str, Sequence[Plot]]
    """Where they stand -> figures; what the page has no room for is taken out of it later."""


def report(plan: Plan) -> Path:
    """Collect the runs, write the tables and the page; returns the page's path."""
    collected = collect(plan)
    judged = Judged.of(plan, collected)
    write_tables(plan, collected)
    for name, table in (
        ("primary.csv", frames.claims_frame(judged.claims)),
        ("predictions.csv", frames.foretold_frame(judged.foretold)),
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
    look, runs = looks(plan.arms), collected.runs
    results = final_results(plan, collected)
    stand_beside, faults = references(plan, collected, results)
    domains = in_domain(results)
    curves = development(plan.config, plan.runs)
    flags = dict.fromkeys(domains, "in-domain") | dict.fromkeys(curves, "development set")
    if collected.beir and (flag := collected.beir.flag(domains)):
        flags[BEIR] = flag
    details = [_task(plan, collected, judged, stand_beside, flags, name, look) for name in _shown(plan, collected)]
    drawn = {f"{where}:{task.name}": plots for task in details for where, plots in task.figures.items()}
    drawn |= {"forecast": figures.forecasts(runs, look), "training": figures.training(collected, look)}
    said = answers(runs, judged.comparisons, judged.trends, judged.laws, judged.points)
    values = {
        "study": plan.config.study.name,
        "source": plan.source,
        "directory": str(plan.directory),
        "written": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "first": first(plan, collected, judged.claims, stand_beside, flags),
        "foretold": tables.foretold_table(judged.foretold) if judged.foretold else None,
        "foretold_counted": counted(judged.foretold),
        "runs": tables.plain(runs),
        "models": tuple(dict.fromkeys(run.model for run in plan.runs if run.model)),
        "counts": Counter(runs["status"]),
        "warnings": warnings(runs),
        "faults": faults,
        "domains": domains,
        "development": [name for name in curves if name in tasks(collected)],
        "checks": plan.checks,
        "strangers": strangers(plan),
        "seeds": plan.config.seeds,
        "answers": {part: [each for each in said if each.part == part] for part in ("comparisons", "size", "cost")},
        "tasks": details,
        "sets": len(tasks(collected)),
        "members": _members(collected),
        "beir": f"{MARK if BEIR in flags else ''} {collected.beir.about}".strip() if collected.beir else "",
        "family": str(plan.family),
        "tests": sum(each.p is not None for each in judged.comparisons),
        "slopes": sum(each.p is not None for each in judged.trends),
        "limits": {"seeds": FEWEST_SEEDS, "sizes": FEWEST_SIZES, "farthest": FARTHEST, "rows": MOST_ROWS}
        | {"alpha": ALPHA, "margin": plan.config.study.margin, "resamples": RESAMPLES},
        "verdicts": tuple(words.of_verdicts(judged.outcomes)),
        "forecast": tables.forecast_table("forecast", runs),
        "settings": _side_by_side({run.id: _settings(run) for run in plan.runs}),
        "manifests": _side_by_side({run.id: _manifest(run.directory) for run in plan.runs}),
        "arm_colours": svg.ARM_COLOURS,
        "size_colours": svg.SIZE_COLOURS,
    }
    return _fitted(values, drawn)


def _fitted(values: Mapping[str, Any], drawn: Mapping[str, Sequence[Plot]]) -> str:
    """The page with as many of the details' figures, in their order, as it has room for."""
    page = template(TEMPLATE)
    room = MOST_BYTES - len(page.render(**values, plots=dict.fromkeys(drawn, ()), left_out=[]).encode())
    kept: dict[str, list[Plot]] = {where: [] for where in drawn}
    left_out = []
    for where, plots in drawn.items():
        for plot in plots:
            needed = len(plot.svg.encode()) + len(csv_link(plot.data)) + 2 * len(plot.caption) + 1000
            if needed < room:
                room -= needed
                kept[where].append(plot)
            else:
                left_out.append(plot.title)
    return page.render(**values, plots=kept, left_out=left_out)


def _shown(plan: Plan, collected: Collected) -> list[str]:
    """Sets with details of their own: those in several languages first, without the members of BEIR."""
    members = _members(collected)
    found = [task for task in tasks(collected) if task not in members]
    across = set(collected.values.loc[collected.values["metric"] == "cross_map", "task"])
    return sorted(found, key=lambda task: task not in across)


def _members(collected: Collected) -> list[str]:
    """Sets of BEIR where there is a mean over them: their comparisons are in the file alone. NQ stands beside the mean."""
    return [task for name, task in collected.beir.tasks.items() if name != "nq"] if collected.beir else []


def _task(
    plan: Plan,
    collected: Collected,
    judged: Judged,
    stand_beside: Sequence[Reference],
    flags: Mapping[str, str],
    name: str,
    look: Mapping[str, Look],
) -> Task:
    found = arms(collected, name)
    metrics = headline_metrics(found)
    key = "set-" + str(tasks(collected).index(name))
    here = judged.on(name)
    gpu = bool(collected.runs["gpu"].any())
    mark = MARK if name in flags else ""
    columns = [Column(name, metric, flags.get(name, "")) for metric in metrics]
    return Task(
        name=name,
        about=collected.beir.about if collected.beir and name == BEIR else _about(plan, name),
        scores=scores_table(f"{key}-scores", f"Scores on {name}", columns, {name: found}, stand_beside),
        compared=_compared(plan, key, here.comparisons, mark) if here.comparisons else None,
        cautions=tuple(cautions(here.comparisons, found)),
        predicted=predictions.predicted(name, found),
        turned=tables.trend_table(f"{key}-turned", here.trends, mark) if here.trends else None,
        fitted=tables.law_table(f"{key}-fitted", here.laws, mark) if here.laws else None,
        costs=tables.cost_table(f"{key}-costs", here.points, gpu, mark) if here.points else None,
        figures={
            "size": figures.by_size(key, here.comparisons, look),
            "laws": figures.over_size(key, here.laws, look),
            "cost": figures.against_cost(key, here.points, gpu, look),
            "progress": figures.progress(collected, name, key, found, look),
            "matrices": figures.matrices(collected, name, key, found),
        },
    )


def _compared(plan: Plan, key: str, every: Sequence[Comparison], mark: str) -> Table:
    """As many rows as the page shows: where there are more, those of the primary family's arm first."""
    first = every if len(every) <= MOST_ROWS else sorted(every, key=lambda each: each.arm != plan.family.arm)
    return tables.comparison_table(f"{key}-compared", first[:MOST_ROWS], every, mark)


def _about(plan: Plan, task: str) -> str:
    """Size of the set, from the first evaluation that tells."""
    for run in plan.runs:
        file = RunDirectory(run.directory).evaluation_file(task)
        content = _readable(file)
        if content:
            languages = content.get("languages") or []
            sizes = [f"{content[key]:,} {key}" for key in ("queries", "passages") if isinstance(content.get(key), int)]
            if languages:
                sizes.append(f"{len(languages)} {'language' if len(languages) == 1 else 'languages'} ({' '.join(languages)})")
            scored = content.get("protocol") or {}
            if lengths := content.get("text_lengths"):
                sizes.append(f"texts cut at {lengths['max_query_tokens']} / {lengths['max_passage_tokens']} tokens")
            return "; ".join(filter(None, (", ".join(sizes), f"scored by the protocol {scored['name']}" if scored else "")))
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
        some = list(by_value.items())[:MOST_VALUES]
        lines = [(value, "" if everywhere else _some(runs)) for value, runs in some]
        if len(by_value) > MOST_VALUES:
            lines.append((f"{len(by_value) - MOST_VALUES} more values", "each run's own file has them"))
        result.append((key, lines))
    return result


MOST_VALUES = 12
"""Of one key in the tables of settings and manifests."""


def _some(runs: Sequence[str], most: int = 6) -> str:
    return ", ".join(runs[:most]) + (f" and {len(runs) - most} more" if len(runs) > most else "")


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_plain, value)) or "none"
    return "none" if value is None else str(value)

"""Run directories -> tidy tables: the runs, their evaluations, their training curves.

Every run of the plan appears, whatever became of it: what can't be read or contradicts itself is told with its reason, and no
other run suffers. Knows neither how runs are started nor how results are shown.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from hybrid_scale.config import RunConfig
from hybrid_scale.errors import HybridScaleError, RunError, describe
from hybrid_scale.runs import RunDirectory, atomic_path, read_json
from hybrid_scale.study.evaluation import failures
from hybrid_scale.study.grid import Plan, PlannedRun
from hybrid_scale.study.groups import groups
from hybrid_scale.study.jobs.state import read_status
from hybrid_scale.study.results.beir import BeirMean, beir_mean, mean_rows
from hybrid_scale.study.results.evaluations import AGAIN, VALUE_COLUMNS, evaluation_rows
from hybrid_scale.study.results.usage import COST_COLUMNS, cost

CURVE_COLUMNS = ("run", "step", "total_real_tokens", "loss", "learning_rate", "gradient_norm", "seconds")
NUMBERS = ("alpha", "size", "lora_rank", *(name for name, kind in COST_COLUMNS.items() if kind is float))
"""Columns of `runs` that are float64 even where no run has one."""
CHANGED = (
    "started with other settings than the study file has now; shown as it was started, beside runs of the same settings alone"
)
TEXTS = ("model", "data", "reason", "notes", "device", "not_predicted")
"""Columns of `runs` that are strings even where no run has one."""


@dataclass(frozen=True)
class Collected:
    runs: pd.DataFrame
    """One row a run: identity, status with reason, notes, key settings, measured and predicted cost (usage.COST_COLUMNS)."""
    values: pd.DataFrame
    """One row a measured value (VALUE_COLUMNS). `language` is null for a mean over languages; `passage_language` is set in
    the matrices alone; `final` tells the evaluation of the finished model from those during training; `protocol` is the name of
    that by which it was scored (protocols.py), `beir` of the set of BEIR that the task is (null: none); `cut` the tokens at which
    queries and passages were cut; `chance_level` is what a random order would score (null: not stated); `doubt` says why a value
    must not count (null: nothing speaks against it)."""
    curves: pd.DataFrame
    """One row a logged step (CURVE_COLUMNS)."""
    beir: BeirMean | None = None
    """What the task `beir` is the mean of; None: there is no such task."""


@dataclass
class _Read:
    """What a run directory holds; `broken` what couldn't be read, `notes` what a reader has to know."""

    config: RunConfig
    status: dict[str, Any] = field(default_factory=dict)
    manifest: dict[str, Any] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    values: list[dict[str, Any]] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def fingerprint(self) -> str:
        """Of the training data; "" where the run hasn't noted it."""
        data = self.manifest.get("data")
        return str(data.get("fingerprint") or "") if isinstance(data, dict) else ""


def collect(plan: Plan) -> Collected:
    """Read every run of the plan. What is wrong with a run is in its row: `status` "broken" with its `reason`, or `notes`."""
    found = [_read(plan, run) for run in plan.runs]
    _doubt_other_data(found)
    _doubt_others(found, "protocol", "runs are compared under one protocol, and most results of {} were scored by {}")
    _doubt_others(found, "cut", "runs are compared at one length of texts (query/passage), and most results of {} state {}")
    labels = groups(plan, [read.config for read in found])
    rows = [_run_row(plan, run, read, group, series) for run, read, (group, series) in zip(plan.runs, found, labels, strict=True)]
    values = [row for read in found for row in read.values]
    mean = beir_mean(values, {row["run"] for row in rows if row["status"] == "done"})
    values += mean_rows(values, mean) if mean else []
    curves = [
        {"run": run.id, **{column: record.get(column) for column in CURVE_COLUMNS[1:]}}
        for run, read in zip(plan.runs, found, strict=True)
        for record in read.metrics
    ]
    return Collected(
        pd.DataFrame(rows).astype(dict.fromkeys(NUMBERS, "float64") | dict.fromkeys(TEXTS, "string")),
        pd.DataFrame(values, columns=list(VALUE_COLUMNS)).astype(
            {"step": "Int64", "final": "boolean", "value": "float64", "chance_level": "float64"}
        ),
        pd.DataFrame(curves, columns=list(CURVE_COLUMNS)),
        mean,
    )


def tidy(collected: Collected) -> pd.DataFrame:
    """The long table: each value with its run's identity and settings; a run without values keeps one row."""
    return collected.runs.merge(collected.values, on="run", how="left")


def write_tables(plan: Plan, collected: Collected) -> tuple[Path, Path]:
    """Write `study.csv` and `study.parquet`; returns their paths."""
    table = tidy(collected)
    csv, parquet = plan.directory / "study.csv", plan.directory / "study.parquet"
    with atomic_path(csv) as beside:
        table.to_csv(beside, index=False)
    with atomic_path(parquet) as beside:
        table.to_parquet(beside, index=False)
    return csv, parquet


def strangers(plan: Plan) -> list[str]:
    """Folders among the runs that the study file doesn't list (any more)."""
    home = plan.directory / "runs"
    known = {run.id for run in plan.runs}
    return sorted(path.name for path in home.iterdir() if path.is_dir() and path.name not in known) if home.is_dir() else []


# ---------------------------------------------------------------------------------------------------------------- one run


def _read(plan: Plan, run: PlannedRun) -> _Read:
    directory = RunDirectory(run.directory)
    read = _Read(run.config)
    if directory.config_file.exists():
        read.config = _or(read.broken, directory.config, run.config)
    read.status = _or(read.broken, lambda: read_status(directory), {})
    read.metrics = _or(read.broken, directory.metrics, [])
    if read.metrics and (torn := directory.torn_metrics()):
        read.notes.append(f"{torn} of the lines in {directory.metrics_file.name} are torn and don't count")
    elif not read.metrics and directory.metrics_file.exists() and read.status.get("status") == "done":
        read.broken.append(
            describe(str(directory.metrics_file), "no record of a step", "a finished run must have logged its steps")
        )
    if directory.manifest_file.exists():
        read.manifest = _or(read.broken, lambda: _manifest(directory), {})
    for file in sorted(directory.evaluations.glob("*.json")):
        read.values += _or(read.notes, lambda file=file: evaluation_rows(run.id, file, read.notes), [])  # type: ignore[misc]
    read.notes += list(_missing(plan, run, read))
    return read


def _doubt_other_data(found: Sequence[_Read]) -> None:
    """Runs of one training folder whose content isn't that of most of them: their values don't count, and it is said."""
    prints: dict[str, Counter[str]] = defaultdict(Counter)
    for read in found:
        if read.fingerprint:
            prints[read.config.data.train][read.fingerprint] += 1
    for read in found:
        usual = prints[read.config.data.train].most_common(1)
        if read.fingerprint and read.fingerprint != usual[0][0]:
            doubt = (
                f"trained on other data than {usual[0][1]} runs of {read.config.data.train} (fingerprint {read.fingerprint[:8]}"
            )
            doubt += f" for {usual[0][0][:8]}); its results don't count"
            read.notes.append(doubt)
            read.values = [{**row, "doubt": row["doubt"] or doubt} for row in read.values]


def _doubt_others(found: Sequence[_Read], column: str, rule: str) -> None:
    """Results of one set that were made in another way than most of them: they are numbers of something else.

    `column` of the values tells the way; `rule` says to a person what it is, of the set and the usual way.
    """
    ways: dict[str, Counter[str]] = defaultdict(Counter)
    for read in found:
        for task, way in {(row["task"], row[column]) for row in read.values if not row["doubt"]}:
            ways[task][way] += 1
    for read in found:
        for task in dict.fromkeys(row["task"] for row in read.values):
            usual = ways[task].most_common(1)
            others = [row for row in read.values if row["task"] == task and not row["doubt"] and row[column] != usual[0][0]]
            if others:
                doubt = describe(task, f"{column} {others[0][column]}", rule.format(task, usual[0][0]), AGAIN)
                read.notes.append(doubt)
                read.values = [{**row, "doubt": doubt} if row in others else row for row in read.values]


def _or(faults: list[str], reader: Callable[[], Any], otherwise: Any) -> Any:
    """What `reader` returns; where it fails, `otherwise`, with the reason added to `faults`."""
    try:
        return reader()
    except (HybridScaleError, OSError, UnicodeDecodeError) as error:
        faults.append(str(error))
        return otherwise


def _manifest(directory: RunDirectory) -> dict[str, Any]:
    content = read_json(directory.manifest_file)
    if not isinstance(content, dict):
        raise RunError(describe(str(directory.manifest_file), content, "an object is expected"))
    return content


def _missing(plan: Plan, run: PlannedRun, read: _Read) -> Iterator[str]:
    """What a finished run lacks."""
    if read.status.get("status") != "done":
        return
    wanted = dict.fromkeys(Path(name).name for name in (*read.config.data.scored, *plan.config.evaluate))
    present = {row["task"] for row in read.values if row["final"]}
    failed = _or(read.notes, lambda: failures(RunDirectory(run.directory)), {})
    for task in wanted:
        if task not in present and not any(f"{task}.json" in note for note in read.notes):
            yield f"not evaluated on {task}" + (f" ({failed[task]})" if task in failed else "")
    last = read.metrics[-1]["step"] if read.metrics else 0
    if last + read.config.training.log_every_steps <= read.config.training.max_steps:
        yield f"done, but its log ends at step {last} of {read.config.training.max_steps}"


def _run_row(plan: Plan, run: PlannedRun, read: _Read, group: str, series: str) -> dict[str, Any]:
    status = "broken" if read.broken else read.status["status"]
    return {
        "study": plan.config.study.name,
        "model": run.model,
        "data": run.data,
        "arm": run.arm,
        "seed": run.seed,
        "run": run.id,
        "status": status,
        "reason": "; ".join(read.broken) or read.status.get("reason"),
        "notes": "; ".join(read.notes) or None,
        "changed": read.config.model_dump(exclude={"run"}) != run.config.model_dump(exclude={"run"}),
        "panel": run.panel,
        "group": group,
        "series": series,
        **_settings(read.config),
        **cost(plan, run, read.config, read.manifest, read.metrics),
    }


def _settings(config: RunConfig) -> dict[str, Any]:
    sampler, model, training = config.sampler, config.model, config.training
    return {
        "kind": sampler.arm,
        "alpha": sampler.alpha if sampler.arm == "hybrid" else None,
        "composition": sampler.composition,
        "global_batch": sampler.global_batch,
        "pool_rows": sampler.pool_rows,
        "negatives_a_row": config.negatives_a_row,
        "max_steps": training.max_steps,
        "base": model.base,
        "dtype": model.dtype,
        "quantization": model.quantization,
        "lora_rank": model.lora.rank if model.lora else None,
        "engine": training.engine,
        "learning_rate": config.optimizer.learning_rate,
        "temperature": config.loss.temperature,
        "train_data": config.data.train,
    }


# ------------------------------------------------------------------------------------------------------------- what is told


def warnings(runs: pd.DataFrame) -> Sequence[tuple[str, str]]:
    """(run, what is wrong with it) for each run whose numbers are missing, or must be read with care."""
    told = runs[(runs["status"] != "done") | runs["notes"].notna() | runs["changed"]]
    return [(str(row["run"]), _said(row)) for row in told.to_dict("records")]


def _said(row: Mapping[Any, Any]) -> str:
    parts = [] if row["status"] == "done" else [f"{row['status']} at step {row['steps']} of {row['max_steps']}"]
    parts += [str(row[key]).rstrip(".") for key in ("reason", "notes") if isinstance(row[key], str) and row[key]]
    parts += [CHANGED] if row["changed"] else []
    return ". ".join(parts)

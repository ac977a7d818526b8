"""Run directories -> tidy tables: the runs, their evaluations, their training curves.

Every run of the plan appears, whatever became of it. Knows neither how runs are started nor how results are shown.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from hybrid_scale.config import RunConfig
from hybrid_scale.errors import RunError, describe
from hybrid_scale.runs import RunDirectory, atomic_path, read_json
from hybrid_scale.study.grid import Plan, PlannedRun, flat

VALUE_COLUMNS = ("run", "task", "step", "final", "metric", "language", "passage_language", "value")
CURVE_COLUMNS = ("run", "step", "loss", "learning_rate", "gradient_norm", "seconds")
MATRICES = ("map_matrix", "top1_language_matrix")

NO_PART_IN_THE_SCIENCE = {
    *("sampler.arm", "sampler.alpha", "sampler.composition", "sampler.draws", "sampler.window_steps"),
    *("sampler.mono_block_rows", "sampler.allow_same", "sampler.conflicts"),
    *("model.attention_implementation", "model.gradient_checkpointing", "loss.max_logits"),
    *("training.engine", "training.deepspeed", "training.passes", "training.max_tokens_per_micro_batch"),
    *("training.max_tokens_per_embedding_batch", "training.max_kept_tokens", "training.offload_activations"),
    *("training.shard_group", "training.gpu_memory_gib", "training.log_every_steps", "training.save_every_steps"),
    *("training.keep_checkpoints", "training.evaluate_every_steps", "training.trackers", "training.keep_best"),
    *("training.stop_at", "training.stop_minutes_before", "training.rank_timeout_seconds"),
    *("evaluation.top_k", "evaluation.store_embeddings"),
}
"""What defines an arm, or changes cost and bookkeeping only. Runs that differ in nothing else may be compared by arm."""


@dataclass(frozen=True)
class Collected:
    runs: pd.DataFrame
    """One row a run: identity, status, key settings, cost."""
    values: pd.DataFrame
    """One row a measured value (VALUE_COLUMNS). `language` is null for a mean over languages; `passage_language` is set in
    the matrices alone; `final` tells the evaluation of the finished model from those during training."""
    curves: pd.DataFrame
    """One row a logged step (CURVE_COLUMNS)."""


def collect(plan: Plan) -> Collected:
    """Read every run of the plan. Raises RunError on a file that breaks its format."""
    configs = [_config(run) for run in plan.runs]
    groups = _groups(configs)
    rows = [
        _run_row(plan.config.study.name, run, config, group)
        for run, config, group in zip(plan.runs, configs, groups, strict=True)
    ]
    values = [row for run in plan.runs for row in _value_rows(run)]
    curves = [row for run in plan.runs for row in _curve_rows(run)]
    return Collected(
        pd.DataFrame(rows),
        pd.DataFrame(values, columns=list(VALUE_COLUMNS)).astype({"step": "Int64", "final": "boolean", "value": "float64"}),
        pd.DataFrame(curves, columns=list(CURVE_COLUMNS)),
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


def _config(run: PlannedRun) -> RunConfig:
    """What the run was started with; before that, what is planned."""
    directory = RunDirectory(run.directory)
    return directory.config() if directory.config_file.exists() else run.config


def _groups(configs: Sequence[RunConfig]) -> list[str]:
    """For each run, the settings besides its arm that not all runs share; runs of one group may be compared by arm."""
    tables = [flat(config.model_dump(mode="json", exclude={"run"})) for config in configs]
    keys = dict.fromkeys(key for table in tables for key in table if key not in NO_PART_IN_THE_SCIENCE)
    varied = [key for key in keys if len({json.dumps(table.get(key)) for table in tables}) > 1]
    return [", ".join(f"{key} = {json.dumps(table.get(key), ensure_ascii=False)}" for key in varied) for table in tables]


def _run_row(study: str, run: PlannedRun, config: RunConfig, group: str) -> dict[str, Any]:
    directory = RunDirectory(run.directory)
    status = directory.status()
    metrics = directory.metrics()
    return {
        "study": study,
        "arm": run.arm,
        "seed": run.seed,
        "run": run.id,
        "status": status["status"],
        "reason": status.get("reason"),
        "changed": config.model_dump(exclude={"run"}) != run.config.model_dump(exclude={"run"}),
        "group": group,
        **_settings(config),
        **_cost(metrics),
    }


def _settings(config: RunConfig) -> dict[str, Any]:
    sampler, model, training = config.sampler, config.model, config.training
    return {
        "kind": sampler.arm,
        "alpha": sampler.alpha if sampler.arm == "hybrid" else None,
        "composition": sampler.composition,
        "global_batch": sampler.global_batch,
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


def _cost(metrics: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Steps reached and what they took. `seconds` of unlogged steps are taken to be like those of the logged ones."""
    steps = metrics[-1]["step"] if metrics else 0
    seconds = [float(record["seconds"]) for record in metrics if isinstance(record.get("seconds"), int | float)]
    peaks = [float(record["peak_gib"]) for record in metrics if isinstance(record.get("peak_gib"), int | float)]
    return {
        "steps": steps,
        "step_seconds": sum(seconds) / len(seconds) if seconds else None,
        "training_seconds": sum(seconds) / len(seconds) * steps if seconds else None,
        "peak_gib": max(peaks, default=None),
    }


def _curve_rows(run: PlannedRun) -> Iterator[dict[str, Any]]:
    for record in RunDirectory(run.directory).metrics():
        yield {"run": run.id, **{column: record.get(column) for column in CURVE_COLUMNS[1:]}}


def _value_rows(run: PlannedRun) -> Iterator[dict[str, Any]]:
    for file in sorted(RunDirectory(run.directory).evaluations.glob("*.json")):
        content = read_json(file)
        try:
            final = not file.name.endswith(f".step-{content['step']}.json")
            about = {"run": run.id, "task": content["task"], "step": content["step"], "final": final}
            rows = [{**about, **row} for row in _measured(content)]
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise RunError(describe(str(file), error, "not an evaluation file", "Evaluate the run again.")) from None
        yield from rows


def _measured(content: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for metric, value in content["metrics"].items():
        yield _value(metric, value)
    for metric, by_language in (content.get("by_language") or {}).items():
        for language, value in by_language.items():
            yield _value(metric, value, language)
    for name in MATRICES:
        if matrix := content.get(name):
            for of_query, row in zip(matrix["query_languages"], matrix["values"], strict=True):
                for of_passage, value in zip(matrix["passage_languages"], row, strict=True):
                    yield _value(name, value, of_query, of_passage)


def _value(metric: str, value: float | None, language: str | None = None, passage_language: str | None = None) -> dict[str, Any]:
    return {"metric": metric, "language": language, "passage_language": passage_language, "value": value}

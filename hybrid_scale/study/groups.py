"""Which runs may be compared by arm, and which of these comparisons belong to one series over model sizes.

Looks at settings alone; knows no result.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from hybrid_scale.config import RunConfig
from hybrid_scale.study.grid import Plan, PlannedRun, flat

OF_THE_ARM = {
    *("sampler.arm", "sampler.alpha", "sampler.composition", "sampler.draws", "sampler.window_steps"),
    *("sampler.allow_same", "sampler.conflicts"),
}
COST_ONLY = {"model.attention_implementation", "model.gradient_checkpointing", "loss.max_logits"}
IN_THE_SCIENCE = {"training.max_steps", "evaluation.embedding_dtype"}
"""Of `training` and `evaluation`; the rest of them changes cost and bookkeeping only (runs.FREE)."""


def _compared(key: str, unequal_negatives: bool) -> bool:
    """Whether runs that differ in this setting may not be compared by arm."""
    if key == "sampler.pool_rows":  # decides how many negatives a row meets
        return not unequal_negatives
    if key.startswith(("training.", "evaluation.")):
        return key in IN_THE_SCIENCE
    return key not in OF_THE_ARM and key not in COST_ONLY


def groups(plan: Plan, configs: Sequence[RunConfig]) -> list[tuple[str, str]]:
    """For each run (group, series). Runs of one group differ by arm and seed only; those of a series by model as well.

    A group is named by its place on the axes `models` and `data`, then by every setting in which it differs from others and
    which that place doesn't explain: what an arm sets besides its batches, or what the run was really started with.
    """
    unequal = plan.config.study.unequal_negatives and not plan.config.pool_rows
    tables = [flat(config.model_dump(mode="json", exclude={"run"})) for config in configs]
    planned = [flat(run.config.model_dump(mode="json", exclude={"run"})) for run in plan.runs]
    keys = dict.fromkeys(key for table in tables for key in table if _compared(key, unequal))
    varied = [key for key in keys if len({json.dumps(table.get(key)) for table in tables}) > 1]
    of_axes = {kind: _set_by(plan, kind) for kind in ("models", "data")}
    labels = []
    for run, table, own in zip(plan.runs, tables, planned, strict=True):
        rest = [key for key in varied if key in table and (table[key] != own.get(key) or not _explained(run, key, of_axes))]
        said = [f"{key} = {json.dumps(table[key], ensure_ascii=False)}" for key in rest]
        model = [f"model {run.model}"] if run.model else []
        data = [f"data {run.data}"] if run.data else []
        labels.append((", ".join([*model, *data, *said]), ", ".join([*data, *said])))
    return labels


def _set_by(plan: Plan, kind: str) -> set[str]:
    """Keys that any value of the axis sets."""
    axis: Sequence[Any] = getattr(plan.config, kind)
    return {key for value in axis for key in value.set}


def _explained(run: PlannedRun, key: str, of_axes: Mapping[str, set[str]]) -> bool:
    """Whether the run's place on an axis says what its value of `key` is; a key may be set as a whole section."""
    places = {"models": run.model, "data": run.data}
    return any(
        places[kind] is not None and any(key == given or key.startswith(f"{given}.") for given in keys)
        for kind, keys in of_axes.items()
    )

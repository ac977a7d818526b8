"""Which runs may be compared by arm, and which of these comparisons belong to one series over model sizes.

Looks at settings alone; knows no result.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from hybrid_scale.config import RunConfig
from hybrid_scale.study.grid import Plan, PlannedRun, flat

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


def groups(plan: Plan, configs: Sequence[RunConfig]) -> list[tuple[str, str]]:
    """For each run (group, series). Runs of one group differ by arm and seed only; those of a series by model as well.

    A group is named by its place on the axes `models` and `data`, then by every setting in which it differs from others and
    which that place doesn't explain: what an arm sets besides its batches, or what the run was really started with.
    """
    tables = [flat(config.model_dump(mode="json", exclude={"run"})) for config in configs]
    planned = [flat(run.config.model_dump(mode="json", exclude={"run"})) for run in plan.runs]
    keys = dict.fromkeys(key for table in tables for key in table if key not in NO_PART_IN_THE_SCIENCE)
    varied = [key for key in keys if len({json.dumps(table.get(key)) for table in tables}) > 1]
    of_axes = {kind: _set_by(plan, kind) for kind in ("models", "data")}
    labels = []
    for run, table, own in zip(plan.runs, tables, planned, strict=True):
        rest = [key for key in varied if table.get(key) != own.get(key) or not _explained(run, key, of_axes)]
        said = [f"{key} = {json.dumps(table.get(key), ensure_ascii=False)}" for key in rest]
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

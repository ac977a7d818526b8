"""What a run cost and what the planner says that it costs: memory of one rank, seconds a step, device-hours.

Measured: from `metrics.jsonl` and the manifest. Predicted: `planner.plan_run` on the run's own machines; where they aren't known,
or are CPUs, the reason. Starts nothing, needs no torch.
"""

import re
import statistics
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from hybrid_scale.config import RunConfig
from hybrid_scale.errors import HybridScaleError, ModelError
from hybrid_scale.planning.architecture import find
from hybrid_scale.planning.costs import count
from hybrid_scale.planning.forecast import RunPlan
from hybrid_scale.planning.hardware import Cluster, Gpu
from hybrid_scale.planning.hardware import named_by_driver as gpu_named
from hybrid_scale.planning.planner import as_planned, plan_run
from hybrid_scale.planning.speed import attention_flops, step_flops
from hybrid_scale.study.estimate import COSTLESS
from hybrid_scale.study.grid import Plan, PlannedRun

COST_COLUMNS = {
    **{"size": float, "steps": int, "step_seconds": float, "median_step_seconds": float, "training_seconds": float},
    **{"peak_gib": float, "ranks": int, "device": str, "gpu": bool, "device_hours": float},
    **{"flops_a_token": float},
    **{"predicted_gib": float, "predicted_step_seconds": float, "predicted_device_hours": float, "not_predicted": str},
}
"""Columns that `cost` fills. `size`: weights of the encoder; `peak_gib`: largest on the logging rank, allocated (GPU) or resident
(CPU); `flops_a_token`: operations that the gradient of a real token needs, whatever the schedule computes again;
`predicted_gib`: the planner's lines without CUDA's own memory and without what the allocator holds in reserve."""

UNSEEN = ("allocator (reserved over allocated)", "CUDA and NCCL")
"""Lines of the planner that `max_memory_allocated` doesn't hold."""


def cost(
    plan: Plan, run: PlannedRun, config: RunConfig, manifest: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Values of COST_COLUMNS; null where not known."""
    ranks = manifest.get("world_size")
    ranks = ranks if isinstance(ranks, int) and ranks > 0 else run.resources.ranks
    device = str(manifest["device"]) if manifest.get("device") else None
    found = measured(metrics)
    hours = None if found["training_seconds"] is None else found["training_seconds"] * ranks / 3600
    gpu, why = _gpu(plan, run, device)
    predicted, why = _predicted(as_planned(config, manifest), run, gpu, ranks) if gpu else (None, why)
    return {
        "size": size(config.model.base),
        **found,
        "ranks": ranks,
        "device": device,
        "gpu": is_gpu(device) if device else bool(run.resources.gpus_per_node),
        "device_hours": hours,
        "flops_a_token": flops_a_token(config, metrics),
        "predicted_gib": allocated_gib(predicted) if predicted else None,
        "predicted_step_seconds": predicted.seconds.total if predicted else None,
        "predicted_device_hours": predicted.gpu_hours if predicted else None,
        "not_predicted": why,
    }


def measured(metrics: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Steps reached and what they took. `seconds` of unlogged steps are taken to be like those of the logged ones."""
    steps = metrics[-1]["step"] if metrics else 0
    seconds = [float(record["seconds"]) for record in metrics if isinstance(record.get("seconds"), int | float)]
    peaks = [float(record["peak_gib"]) for record in metrics if isinstance(record.get("peak_gib"), int | float)]
    return {
        "steps": steps,
        "step_seconds": statistics.fmean(seconds) if seconds else None,
        "median_step_seconds": statistics.median(seconds) if seconds else None,
        "training_seconds": statistics.fmean(seconds) * steps if seconds else None,
        "peak_gib": max(peaks, default=None),
    }


def flops_a_token(config: RunConfig, metrics: Sequence[Mapping[str, Any]]) -> float | None:
    """Of training, without recomputation, with attention at the run's mean length of texts (planning/speed.py: step_flops).

    None where the base isn't known, or no step tells its texts.
    """
    known = [record for record in metrics if isinstance(record.get("texts"), int) and record.get("real_tokens")]
    if not known:
        return None
    length = sum(record["real_tokens"] for record in known) / sum(record["texts"] for record in known)
    try:
        architecture = find(config.model.base)
        adapters = count(architecture, config.model).adapter
    except (ModelError, OSError, ValueError):
        return None
    attention = attention_flops(architecture, length, config.model.attention == "causal")
    frozen = config.model.lora is not None
    return step_flops(architecture.linear, adapters, attention, 1.0, checkpointing=False, frozen=frozen)


@lru_cache
def size(base: str) -> float | None:
    """Weights of the encoder `base`, None where neither a config.json nor the table knows it."""
    try:
        return float(find(base).encoder)
    except (ModelError, OSError, ValueError):
        return None


def is_gpu(device: str | None) -> bool:
    """Whether the manifest names a GPU: NVIDIA's driver puts its maker's name first."""
    return device is not None and bool(re.search(r"nvidia|geforce|tesla|rtx|amd instinct", device.lower()))


def allocated_gib(plan: RunPlan) -> float:
    return sum(value for name, value in plan.lines.items() if name not in UNSEEN) / 2**30


def _gpu(plan: Plan, run: PlannedRun, device: str | None) -> tuple[Gpu | None, str | None]:
    """The run's GPU, from its manifest or, before its start, from the study's site; else why there is none."""
    if device is None and not run.resources.gpus_per_node:
        return None, "CPU processes: the planner knows GPUs alone"
    if device is not None and not is_gpu(device):
        return None, f"{device}: the planner knows GPUs alone"
    name = device or (plan.config.site.gpu_type if plan.config.site else None)
    if name is None:
        return None, "not started, and the study names no site.gpu_type"
    gpu = gpu_named(name)
    return gpu, None if gpu else f"{name} isn't in the planner's table"


def _predicted(config: RunConfig, run: PlannedRun, gpu: Gpu, ranks: int) -> tuple[RunPlan | None, str | None]:
    in_a_node = min(ranks, run.resources.gpus_per_node or ranks)
    if ranks % in_a_node:
        return None, f"{ranks} ranks aren't whole nodes of {in_a_node}"
    return _planned(config.model_dump_json(exclude=COSTLESS), Cluster(gpu, ranks // in_a_node, in_a_node), config)  # type: ignore[arg-type]


_PLANS: dict[tuple[str, Cluster], tuple[RunPlan | None, str | None]] = {}


def _planned(key: str, cluster: Cluster, config: RunConfig) -> tuple[RunPlan | None, str | None]:
    """Runs that differ in nothing that costs anything are planned once."""
    if (key, cluster) not in _PLANS:
        try:
            _PLANS[key, cluster] = (plan_run(config, cluster), None)
        except (HybridScaleError, OSError) as error:
            _PLANS[key, cluster] = (None, str(error))
    return _PLANS[key, cluster]

"""What is settled before the first step, and said aloud: token budgets, the shard group, the derived numbers of a run.

Collective where it says so. Loads no weights.
"""

import math
from dataclasses import dataclass

import numpy as np

from hybrid_scale import dist, gpu
from hybrid_scale.config import RunConfig, dump_config
from hybrid_scale.errors import ConfigError, describe
from hybrid_scale.model.acceptance import accept
from hybrid_scale.model.load import DTYPES, count_parameters
from hybrid_scale.planning.costs import MemoryNeed, ParameterCounts, memory_need, static_bytes
from hybrid_scale.planning.forecast import RunPlan, Texts, mean_tokens
from hybrid_scale.planning.hardware import Cluster, Gpu, of_device
from hybrid_scale.planning.planner import explain, resolve
from hybrid_scale.planning.zero import place, read_zero
from hybrid_scale.train.batches import TrainingData, open_training_data, plan_step
from hybrid_scale.train.engine import shard_group, zero_stage

GPUS_PER_NODE = 8
"""Assumed by `--dry-run`, which can't ask a launcher."""


@dataclass(frozen=True)
class Settled:
    """A run's config without anything left open, and how that came about."""

    config: RunConfig
    plan: RunPlan | None
    """The planner's, where token budgets were left to it."""
    counts: ParameterCounts
    group: int | None
    """Ranks that share one copy of the weights; None: the DeepSpeed JSON says."""


def settle(config: RunConfig, data: TrainingData, seen: Gpu | None, world: int, gpus_per_node: int) -> Settled:
    """What the config leaves open, for the smallest GPU `seen`. Raises ConfigError: nothing fits."""
    counts = count_parameters(config.model)
    plan = plan_budgets(config, data, counts, seen, world, gpus_per_node)
    config = plan.config if plan else config
    return Settled(config, plan, counts, choose_shard_group(config, data, counts, world, gpus_per_node))


def announcement(settled: Settled, data: TrainingData, world: int) -> str:
    """What a run says before its first step."""
    chosen = [explain(settled.plan)] if settled.plan else []
    return "\n".join([*chosen, describe_run(settled, data, world)])


def choose_shard_group(
    config: RunConfig, data: TrainingData, counts: ParameterCounts, world: int, gpus_per_node: int
) -> int | None:
    """Ranks that share one copy of the weights, where the config leaves it open; None: the DeepSpeed JSON says."""

    def need() -> MemoryNeed:
        return memory_need(config, counts, data.shape, world, read_zero(config, data.shape.hidden))

    return shard_group(config, need, world, gpus_per_node)


def seen_gpu(config: RunConfig) -> Gpu | None:
    """The smallest GPU of all ranks, as its driver reports it; None: nothing is left to the planner. Collective.

    Raises ConfigError where a rank has no GPU and the config states no memory.
    """
    training = config.training
    if not training.planned:
        return None
    stated, held = training.gpu_memory_gib, gpu.total_bytes()
    found = dist.gather_objects((gpu.name() or "processor", held if stated is None else stated * 2**30))
    if any(memory is None for _, memory in found):
        rule = f"training.{training.planned[0]}: auto needs a GPU's memory and there is no GPU here"
        remedy = "State the memory of the GPUs that will train (on CPUs: of a rank), or a number of tokens."
        raise ConfigError(describe("training.gpu_memory_gib", None, rule, remedy))
    return of_device(*min(found, key=lambda one: float(one[1])))


def plan_budgets(
    config: RunConfig, data: TrainingData, counts: ParameterCounts, seen: Gpu | None, world: int, gpus_per_node: int
) -> RunPlan | None:
    """The planner's choice of the token budgets that the config leaves open; None: it leaves none. Raises ConfigError: no fit."""
    if seen is None:
        return None
    node = math.gcd(world, gpus_per_node)
    limits = config.data.max_query_tokens, config.data.max_passage_tokens
    query, passage = map(mean_tokens, (data.query_lengths, data.passage_lengths), limits)
    cluster, texts = Cluster(seen, world // node, node), Texts(query, passage, f"measured: {config.data.train}")
    return resolve(config, cluster, texts, data.shape, counts)


def describe_run(settled: Settled, data: TrainingData, world: int) -> str:
    """The derived numbers of a run, for a person: batches, micro-batches, parameters, bytes."""
    config, counts, group = settled.config, settled.counts, settled.group
    first = [plan_step(data, config, world, step) for step in range(min(5, config.training.max_steps))]
    stage = zero_stage(config, group, world)
    size = static_bytes(counts, DTYPES[config.model.dtype].itemsize, world, stage, group)
    real = sum(step.plan.real_tokens for step in first)
    described = data.sampler.describe()
    lines = {
        **{key: value for key, value in described.items() if not isinstance(value, dict)},
        **{f"{name} pool": value for name, value in described["pools"].items()},  # type: ignore[attr-defined]
        "negatives a row": _negatives(config),
        "steps per epoch": described["steps per epoch of each stream"],
        **({"DeepSpeed JSON": place(config)} if config.training.engine == "deepspeed" else {}),
        "ranks, ZeRO stage, ranks that share a copy": f"{world}, {stage}, {group or (world if stage == 3 else 1)}",
        "micro-batches a rank and schedule, first steps": [f"{step.plan.rounds} {step.plan.schedule}" for step in first],
        "tokens a step (real), first steps": round(real / len(first)),
        "padding, first steps": f"{1 - real / sum(step.plan.padded_tokens for step in first):.1%}",
        "lock-step efficiency, first steps": f"{real / sum(step.plan.lockstep_tokens for step in first):.1%}",
        "tokens embedded twice, first steps": f"{sum(s.plan.recomputed_tokens for s in first) / real:.1%}",
        "a text's tokens": data.encoder.layout(),
        "texts cut to the limit": _cut_share(config, data),
        "parameters": f"{counts.total:,} ({counts.quantised:,} in 4 bits), {counts.trained:,} trained",
        **{f"bytes a rank: {name}": f"{value:,.0f}" for name, value in size.items()},
    }
    return "\n".join(f"  {key:<48} {value}" for key, value in lines.items())


def _negatives(config: RunConfig) -> str:
    most = "up to " if config.sampler.conflicts == "mask" or config.loss.false_negative_margin is not None else ""
    return f"{most}{config.negatives_a_row:,}"


def _cut_share(config: RunConfig, data: TrainingData) -> str:
    cut = {
        "queries": float(np.mean(data.query_lengths == config.data.max_query_tokens)),
        "passages": float(np.mean(data.passage_lengths == config.data.max_passage_tokens)),
    }
    return ", ".join(f"{name} {share:.1%}" for name, share in cut.items())


def dry_run(config: RunConfig, world: int) -> str:
    """Resolved config and derived numbers; opens the data, loads no weights."""
    notes = accept(config, weights=False)
    data = open_training_data(config, world)
    settled = settle(config, data, seen_gpu(config), world, min(world, GPUS_PER_NODE))
    return "\n".join([dump_config(settled.config), *notes, announcement(settled, data, world)])

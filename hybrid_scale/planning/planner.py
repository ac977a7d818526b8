"""The choices of a run on a cluster: as its config says, the fastest settings that fit, or the nearest change that would.

The trainer resolves token budgets that its config leaves to the planner with `resolve`, plans ask `plan_run` for the same answer.
Starts nothing, needs no torch.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from hybrid_scale.config import RunConfig, TokenBudget
from hybrid_scale.errors import ConfigError, describe
from hybrid_scale.planning.architecture import Architecture
from hybrid_scale.planning.costs import ParameterCounts, shard_groups
from hybrid_scale.planning.forecast import Forecaster, RunPlan, Texts, gib
from hybrid_scale.planning.hardware import GPUS, Cluster
from hybrid_scale.planning.search import BUDGETS, Search
from hybrid_scale.planning.speed import CALIBRATION, Calibration
from hybrid_scale.planning.zero import Zero

MOST_NODES = 64


def plan_run(config: RunConfig, cluster: Cluster, texts: Texts | None = None, calibration: Calibration = CALIBRATION) -> RunPlan:
    """The run as its config and DeepSpeed JSON say, with what they leave open as the trainer chooses it.

    Whether it fits is in the plan, not an error. Raises ModelError (no shape for `model.base`) and ConfigError (no DeepSpeed
    JSON, a group that doesn't divide the ranks, a batch smaller than the ranks).
    """
    return _as_configured(Forecaster(config, _asked(config, cluster), texts, calibration))


def resolve(config: RunConfig, cluster: Cluster, texts: Texts, shape: Architecture, counts: ParameterCounts) -> RunPlan:
    """`plan_run` for a trainer, which knows its texts and its model itself. Raises ConfigError where nothing fits."""
    plan = _as_configured(Forecaster(config, _asked(config, cluster), texts, shape=shape, counted=counts))
    if not plan.fits:
        key = config.training.planned[0] if config.training.planned else "shard_group"
        found = nearest_fit(config, cluster, texts, shape, counts)
        remedy = f"It fits with {found[0]}: {' '.join(found[1].settings())}." if found else "Use more or larger GPUs."
        raise ConfigError(describe(f"training.{key}", "auto", str(plan.problem), remedy))
    return plan


def best_run(
    config: RunConfig,
    cluster: Cluster,
    texts: Texts | None = None,
    calibration: Calibration = CALIBRATION,
    shape: Architecture | None = None,
    counts: ParameterCounts | None = None,
) -> RunPlan | None:
    """The fastest plan that fits: shard group (with hpZ), micro-batch, kept tokens, schedule, checkpointing. None: none fits.

    Everything that changes the result of training stays: model, data, batch, steps. Nothing is offloaded.
    """
    forecaster = Forecaster(config, cluster, texts, calibration, shape, counts)
    forecaster.check()
    forecaster = replace(forecaster, sharing=Zero(None, None, forecaster.zero.buffers))
    return Search(forecaster, BUDGETS, _all_places(config, cluster), (False, True)).best()


def explain(plan: RunPlan) -> str:
    """What was chosen, for which machines and texts, and what it is expected to need: one line a part."""
    training, once = plan.config.training, plan.kept / plan.rounds
    largest = sorted(((size, name) for name, size in plan.lines.items()), reverse=True)[:3]
    kept = training.max_kept_tokens or training.max_tokens_per_micro_batch
    rounds = f"{plan.rounds} micro-batch{'es' if plan.rounds > 1 else ''} a step"
    sharing = f"weights shared by {plan.group} GPUs" if plan.stage == 3 else "a copy of the weights on each GPU"
    return "\n  ".join(
        (
            f"planned for {plan.cluster}, mean query {plan.texts.query:.0f} and passage {plan.texts.passage:.0f} tokens:",
            f"tokens: {training.max_tokens_per_micro_batch:,} a micro-batch, graphs of {kept:,} kept,"
            f" {training.max_tokens_per_embedding_batch:,} without gradients; {sharing}",
            f"memory: {gib(plan.memory)} of {gib(plan.limit)}, most for"
            f" {', '.join(f'{name} {gib(size)}' for size, name in largest)}",
            f"schedule: {plan.schedule}, {rounds}; {once:.0%} of the tokens go through the model once, the fastest that fits",
        )
    )


def for_manifest(plan: RunPlan) -> dict[str, Any]:
    """What a plan chose of `training.*`, and for what."""
    training, texts = plan.config.training, plan.texts
    return {
        "settings": {**{name: getattr(training, name) for name in BUDGETS}, "shard_group": training.shard_group},
        "cluster": str(plan.cluster),
        "text_tokens": {"query": texts.query, "passage": texts.passage},
        "predicted_bytes": plan.memory,
        "usable_bytes": plan.limit,
        "schedule": plan.schedule,
    }


def as_planned(config: RunConfig, manifest: Mapping[str, Any]) -> RunConfig:
    """The config of a run with the settings that its manifest says were chosen when it started, if any."""
    chosen = (manifest.get("planned") or {}).get("settings")
    if not config.training.planned or not isinstance(chosen, dict):
        return config
    known = {name: chosen[name] for name in (*BUDGETS, "shard_group") if name in chosen}
    return config.model_copy(update={"training": config.training.model_copy(update={**known, "planned": ()})})


def nearest_fit(
    config: RunConfig,
    cluster: Cluster,
    texts: Texts | None = None,
    shape: Architecture | None = None,
    counts: ParameterCounts | None = None,
) -> tuple[str, RunPlan] | None:
    """What would have to change for the run to fit, least first: its settings, 4-bit weights, more nodes, another GPU.

    A run that offloads goes on doing so where smaller budgets are enough.
    """
    forecaster = Forecaster(config, cluster, texts, shape=shape, counted=counts)
    if forecaster.zero.offloads_weights or forecaster.zero.offloads_optimizer:
        offloaded = _with_budgets(forecaster, BUDGETS)
        if offloaded.fits:
            return "smaller token budgets", offloaded
    for change, settings, machines in _changes(config, cluster):
        same = settings.model.quantization == config.model.quantization
        plan = best_run(settings, machines, texts, shape=shape, counts=counts if same else None)
        if plan is not None:
            return change, plan
    return None


def _changes(config: RunConfig, cluster: Cluster) -> Iterator[tuple[str, RunConfig, Cluster]]:
    yield "other settings", config, cluster
    if config.model.quantization == "none" and config.model.lora is not None:
        nf4 = config.model_copy(update={"model": config.model.model_copy(update={"quantization": "nf4"})})
        yield "model.quantization=nf4", nf4, cluster
    nodes = cluster.nodes * 2
    while nodes <= MOST_NODES and nodes * cluster.gpus_per_node <= config.sampler.global_batch:
        yield f"{nodes} nodes", config, replace(cluster, nodes=nodes)
        nodes *= 2
    for gpu in sorted(GPUS.values(), key=lambda gpu: gpu.memory):
        if gpu.memory > cluster.gpu.memory:
            yield f"a {gpu.name} ({gib(gpu.memory)})", config, replace(cluster, gpu=gpu)


def _asked(config: RunConfig, cluster: Cluster) -> Cluster:
    """The cluster with the memory that the config states for what it leaves open."""
    training, stated = config.training, config.training.gpu_memory_gib
    if stated is None or not (training.planned or training.shard_group == "auto"):
        return cluster
    return replace(cluster, gpu=replace(cluster.gpu, memory=stated * 2**30))


def _as_configured(forecaster: Forecaster) -> RunPlan:
    forecaster.check()
    if not forecaster.config.training.planned:
        return forecaster.plan(forecaster.config, *_stage_and_group(forecaster))
    return _with_budgets(forecaster, forecaster.config.training.planned)


def _with_budgets(forecaster: Forecaster, budgets: tuple[TokenBudget, ...]) -> RunPlan:
    """Open budgets, and with them a shard group that is open too, on the machines that a trainer sees.

    It doesn't see the interconnect: the choice is made for the built-in one, so that it is the same whatever is planned for.
    """
    config, cluster = forecaster.config, forecaster.cluster
    places = (_stated_place(forecaster),) if _place_is_stated(forecaster) else _all_places(config, cluster)
    seen = Cluster(cluster.gpu, cluster.nodes, cluster.gpus_per_node)
    search = Search(replace(forecaster, cluster=seen), budgets, places, (config.model.gradient_checkpointing,))
    chosen = search.best() or search.least()
    training = chosen.config.training
    if config.training.shard_group == "auto":
        training = training.model_copy(update={"shard_group": chosen.group})
    group = ("shard_group",) if config.training.shard_group == "auto" else ()
    plan = forecaster.plan(chosen.config.model_copy(update={"training": training}), chosen.stage, chosen.group)
    return replace(plan, planned=(*config.training.planned, *group))


def _all_places(config: RunConfig, cluster: Cluster) -> tuple[tuple[int, int], ...]:
    """ZeRO stage and shard group, smallest group first."""
    if config.training.engine == "plain":
        return ((0, 1),)
    return tuple((2 if group == 1 else 3, group) for group in shard_groups(cluster.world, cluster.gpus_per_node))


def _place_is_stated(forecaster: Forecaster) -> bool:
    return forecaster.zero.stage is not None or forecaster.config.training.shard_group != "auto"


def _stated_place(forecaster: Forecaster) -> tuple[int, int]:
    """ZeRO stage and shard group that JSON and config state."""
    asked, zero, world = forecaster.config.training.shard_group, forecaster.zero, forecaster.cluster.world
    if zero.stage is not None and asked is not None:
        rule = f"{forecaster.config.training.deepspeed} states stage {zero.stage} itself"
        remedy = "Use ds_configs/zero_auto.json, or leave training.shard_group out."
        raise ConfigError(describe("training.shard_group", asked, rule, remedy))
    if zero.stage is not None:
        return zero.stage, (zero.group or world) if zero.stage == 3 else 1
    if not isinstance(asked, int):
        rule = f'{forecaster.config.training.deepspeed} leaves "stage" to it'
        raise ConfigError(describe("training.shard_group", asked, rule, "Set a number of GPUs, or auto."))
    if world % asked:
        divisors = ", ".join(str(group) for group in shard_groups(world, forecaster.cluster.gpus_per_node))
        remedy = f"Set training.shard_group=auto, or one of {divisors}."
        raise ConfigError(describe("training.shard_group", asked, f"must divide the {world} ranks", remedy))
    return (2 if asked == 1 else 3), asked


def _stage_and_group(forecaster: Forecaster) -> tuple[int, int]:
    """As the trainer resolves them; where "auto" fits nothing, all GPUs share (which fits best or shows what lacks)."""
    if _place_is_stated(forecaster):
        return _stated_place(forecaster)
    places = _all_places(forecaster.config, forecaster.cluster)
    return next((place for place in places if forecaster.memory(forecaster.config, *place) <= forecaster.limit), places[-1])

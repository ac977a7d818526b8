"""The choices of a run on a cluster: as its config says, the fastest settings that fit, or the nearest change that would.

The trainer resolves `training.shard_group: auto` with the same memory functions (`costs`). Starts nothing, needs no torch.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from hybrid_scale.config import RunConfig
from hybrid_scale.errors import ConfigError, describe
from hybrid_scale.planning.costs import shard_groups
from hybrid_scale.planning.forecast import Forecaster, RunPlan, Texts, gib
from hybrid_scale.planning.hardware import GPUS, Cluster
from hybrid_scale.planning.speed import CALIBRATION, Calibration

GRAIN = 256
"""Tokens by which the micro-batches that are tried differ."""
SMALL = 4096
"""Tokens below which published runs are slower than the formulas say (Qwen at 256 to 1,024: up to half): not chosen if there is
a choice."""
MOST_NODES = 64


def plan_run(config: RunConfig, cluster: Cluster, texts: Texts | None = None, calibration: Calibration = CALIBRATION) -> RunPlan:
    """The run as its config and DeepSpeed JSON say. Whether it fits is in the plan, not an error.

    Raises ModelError (no shape for `model.base`) and ConfigError (no DeepSpeed JSON, a group that doesn't divide the ranks, a
    batch smaller than the ranks).
    """
    forecaster = Forecaster(config, cluster, texts, calibration)
    forecaster.check()
    return forecaster.plan(config, *_stage_and_group(forecaster))


def best_run(
    config: RunConfig, cluster: Cluster, texts: Texts | None = None, calibration: Calibration = CALIBRATION
) -> RunPlan | None:
    """The fastest plan that fits: shard group (with hpZ), micro-batch, kept tokens, schedule, checkpointing. None: none fits.

    Everything that changes the result of training stays: model, data, batch, steps.
    """
    search = _Search(Forecaster(config, cluster, texts, calibration))
    search.forecaster.check()
    return search.best()


def nearest_fit(config: RunConfig, cluster: Cluster, texts: Texts | None = None) -> tuple[str, RunPlan] | None:
    """What would have to change for the run to fit, least first: its settings, 4-bit weights, more nodes, another GPU."""
    for change, settings, machines in _changes(config, cluster):
        plan = best_run(settings, machines, texts)
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


def _stage_and_group(forecaster: Forecaster) -> tuple[int, int]:
    """As the trainer resolves them; where "auto" fits nothing, all GPUs share (which fits best or shows what lacks)."""
    config, zero, world = forecaster.config, forecaster.zero, forecaster.cluster.world
    asked = config.training.shard_group
    if zero.stage is not None:
        return zero.stage, (zero.group or world) if zero.stage == 3 else 1
    if asked is None:
        rule = f'{config.training.deepspeed} leaves "stage" to it'
        raise ConfigError(describe("training.shard_group", None, rule, "Set a number of GPUs, or auto."))
    if isinstance(asked, int):
        if world % asked:
            raise ConfigError(describe("training.shard_group", asked, f"must divide the {world} ranks"))
        return (2 if asked == 1 else 3), asked
    for group in shard_groups(world, forecaster.cluster.gpus_per_node):
        stage = 2 if group == 1 else 3
        if forecaster.memory(config, stage, group) <= forecaster.limit:
            return stage, group
    return (3 if world > 1 else 2), world


@dataclass(frozen=True)
class _Search:
    """Settings of one run, tried one after another."""

    forecaster: Forecaster

    @property
    def config(self) -> RunConfig:
        return self.forecaster.config

    def best(self) -> RunPlan | None:
        found = [self.forecaster.plan(*candidate) for candidate in self._candidates()]
        large = [plan for plan in found if plan.config.training.max_tokens_per_micro_batch >= min(SMALL, plan.tokens)]
        return min(large or found, key=lambda plan: (plan.seconds.total, plan.group, plan.memory), default=None)

    def _candidates(self) -> Iterator[tuple[RunConfig, int, int]]:
        """For each group, with and without checkpointing: large and smaller micro-batches, the rest of the memory kept."""
        tokens = self.forecaster.tokens(self.config)
        longest = max(self.config.data.max_query_tokens, self.config.data.max_passage_tokens)
        plain = self.config.training.engine == "plain"
        for group in [1] if plain else shard_groups(self.forecaster.cluster.world, self.forecaster.cluster.gpus_per_node):
            stage = 0 if plain else 2 if group == 1 else 3
            for checkpointing in (False, True):
                most = self._largest(self._even(checkpointing), stage, group, tokens, longest)
                if most is None:
                    continue
                for size in sorted({most, *(s for s in (16384, 8192, 4096) if longest <= s < most)}):
                    kept = self._largest(self._keeping(size, checkpointing), stage, group, tokens, size)
                    if kept is not None:
                        yield self._widest_embedding(self._with(size, kept, checkpointing), stage, group), stage, group

    def _even(self, checkpointing: bool) -> Callable[[int], RunConfig]:
        return lambda size: self._with(size, size, checkpointing)

    def _keeping(self, micro_batch: int, checkpointing: bool) -> Callable[[int], RunConfig]:
        return lambda kept: self._with(micro_batch, kept, checkpointing)

    def _with(self, micro_batch: int, kept: int, checkpointing: bool) -> RunConfig:
        longest = max(self.config.data.max_query_tokens, self.config.data.max_passage_tokens)
        training = self.config.training.model_copy(
            update={
                "max_tokens_per_micro_batch": micro_batch,
                "max_kept_tokens": kept,
                "max_tokens_per_embedding_batch": max(micro_batch, longest),
            }
        )
        model = self.config.model.model_copy(update={"gradient_checkpointing": checkpointing})
        return self.config.model_copy(update={"training": training, "model": model})

    def _largest(self, config_of: Callable[[int], RunConfig], stage: int, group: int, tokens: float, least: int) -> int | None:
        """The largest number of tokens, up to what a rank executes in a step, whose config fits; None: not even `least`."""
        low, high = math.ceil(least / GRAIN), math.ceil(max(tokens * 1.02, least) / GRAIN)

        def fits(steps: int) -> bool:
            return self.forecaster.memory(config_of(steps * GRAIN), stage, group) <= self.forecaster.limit

        if not fits(low):
            return None
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if fits(middle) else (low, middle - 1)
        return low * GRAIN

    def _widest_embedding(self, config: RunConfig, stage: int, group: int) -> RunConfig:
        """The pass without gradients in as few micro-batches as the memory of the pass with gradients allows."""
        start = config.training.max_tokens_per_embedding_batch
        memory = self.forecaster.memory(config, stage, group)
        best = config
        for factor in (8, 4, 2):
            training = config.training.model_copy(update={"max_tokens_per_embedding_batch": start * factor})
            wider = config.model_copy(update={"training": training})
            if self.forecaster.memory(wider, stage, group) <= max(memory, self.forecaster.limit):
                best = wider
                break
        return best

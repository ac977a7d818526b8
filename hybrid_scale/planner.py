"""A run's config + a cluster -> memory by line, schedule, seconds a step, GPU-hours; and the settings that fit and are fastest.

No torch, no network, no data but the length tables of a prepared directory, if it is there. The trainer resolves
`training.shard_group: auto` with the same memory functions (`costs`). Refuses to start anything.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from hybrid_scale.architecture import Architecture, find
from hybrid_scale.config import RunConfig
from hybrid_scale.costs import (
    DTYPE_BYTES,
    MASTER_BYTES,
    RESERVE,
    ParameterCounts,
    Widths,
    ZeroBuffers,
    count,
    gathered_bytes,
    memory_lines,
    memory_need,
    shard_groups,
)
from hybrid_scale.errors import ConfigError, describe
from hybrid_scale.hardware import GPUS, Cluster
from hybrid_scale.speed import CALIBRATION, Calibration, Seconds, Work, attention_flops, step_flops, step_seconds

EFFICIENCY = {True: 0.98, False: 0.9}
"""Real over executed tokens of a rank in lock-step, packed and padded: .983 to .999 on XQuAD-R (benchmarks/padding.py); padded
micro-batches of sorted texts pad by a tenth."""
GRAIN = 256
"""Tokens by which the micro-batches that are tried differ."""
SMALL = 4096
"""Tokens below which published runs are slower than the formulas say (Qwen at 256 to 1,024: up to half): not chosen if there is
a choice."""
MOST_NODES = 64
FLOAT32_RATE = 1 / 16
"""Of the bfloat16 rate: 19.5 of 312 TFLOP/s on an A100."""


@dataclass(frozen=True)
class Texts:
    """Mean tokens of a query and a passage, prompt and end token included, and where they come from."""

    query: float
    passage: float
    source: str


@dataclass(frozen=True)
class Zero:
    """What a DeepSpeed JSON says."""

    stage: int | None
    """None: "auto"."""
    group: int | None
    """hpZ group; None: "auto" or none."""
    buffers: ZeroBuffers
    offloads: bool


@dataclass(frozen=True)
class RunPlan:
    """One run on one cluster, as its config says."""

    config: RunConfig
    architecture: Architecture
    counts: ParameterCounts
    cluster: Cluster
    texts: Texts
    stage: int
    group: int
    lines: dict[str, float]
    """Bytes of one GPU."""
    rounds: int
    """Micro-batches of a rank and step."""
    kept: int
    """Of them, those whose graphs are kept: they go through the model once."""
    tokens: float
    """Executed by a rank in a step."""
    work: Work
    seconds: Seconds
    notes: tuple[str, ...]

    @property
    def limit(self) -> float:
        """Bytes of a GPU that a plan may use."""
        return self.cluster.gpu.memory * (1 - RESERVE)

    @property
    def memory(self) -> float:
        return sum(self.lines.values())

    @property
    def fits(self) -> bool:
        return self.memory <= self.limit

    @property
    def schedule(self) -> str:
        return "direct" if self.kept == self.rounds else "kept" if self.kept else "two_pass"

    @property
    def hpz(self) -> bool:
        return self.stage == 3 and 1 < self.group < self.cluster.world

    @property
    def hours(self) -> float:
        """Of training; loading, evaluation and checkpoints not counted."""
        return self.seconds.total * self.config.training.max_steps / 3600

    @property
    def gpu_hours(self) -> float:
        return self.hours * self.cluster.world

    @property
    def cost(self) -> float | None:
        return None if self.cluster.price is None else self.gpu_hours * self.cluster.price

    @property
    def problem(self) -> str | None:
        """Why it does not fit: the need, what there is, and the lines that take most."""
        if self.fits:
            return None
        top = sorted(((size, name) for name, size in self.lines.items()), reverse=True)[:3]
        lines = ", ".join(f"{name} {gib(size)}" for size, name in top)
        return (
            f"does not fit: needs {gib(self.memory)} of {gib(self.limit)} usable on a {self.cluster.gpu.name}, most for {lines}"
        )

    def settings(self) -> list[str]:
        """The choices as `key=value` for launch/train.py."""
        training = self.config.training
        engine = [] if training.engine == "plain" else ["training.deepspeed=ds_configs/zero_auto.json"]
        engine += [] if training.engine == "plain" else [f"training.shard_group={self.group}"]
        return [
            *engine,
            f"training.max_tokens_per_micro_batch={training.max_tokens_per_micro_batch}",
            f"training.max_kept_tokens={training.max_kept_tokens or training.max_tokens_per_micro_batch}",
            f"training.max_tokens_per_embedding_batch={training.max_tokens_per_embedding_batch}",
            f"model.gradient_checkpointing={str(self.config.model.gradient_checkpointing).lower()}",
        ]


def gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"


def plan_run(config: RunConfig, cluster: Cluster, texts: Texts | None = None, calibration: Calibration = CALIBRATION) -> RunPlan:
    """The run as its config and DeepSpeed JSON say. Whether it fits is in the plan, not an error.

    Raises ModelError (no shape for `model.base`) and ConfigError (no DeepSpeed JSON, a group that doesn't divide the ranks, a
    batch smaller than the ranks).
    """
    return _Planner(config, cluster, texts, calibration).as_configured()


def best_run(
    config: RunConfig, cluster: Cluster, texts: Texts | None = None, calibration: Calibration = CALIBRATION
) -> RunPlan | None:
    """The fastest plan that fits: shard group (with hpZ), micro-batch, kept tokens, schedule, checkpointing. None: none fits.

    Everything that changes the result of training stays: model, data, batch, steps.
    """
    return _Planner(config, cluster, texts, calibration).best()


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


def read_zero(config: RunConfig) -> Zero:
    """What the run's DeepSpeed JSON says of memory. Raises ConfigError: no such file, not JSON."""
    if config.training.engine == "plain":
        return Zero(0, 1, ZeroBuffers(), False)
    path = Path(config.training.deepspeed)
    if not path.is_file():
        raise ConfigError(describe("training.deepspeed", str(path), "no such file", "Plan from the repository's root."))
    try:
        zero = json.loads(path.read_text(encoding="utf-8")).get("zero_optimization", {})
    except json.JSONDecodeError as error:
        raise ConfigError(describe(str(path), str(error), "not JSON")) from None
    sizes = ZeroBuffers(
        live=_number(zero, "stage3_max_live_parameters", 1e9),
        prefetch=_number(zero, "stage3_prefetch_bucket_size", 5e7),
        reduce=_number(zero, "reduce_bucket_size", 5e8),
    )
    stage, group = zero.get("stage", 0), zero.get("zero_hpz_partition_size", 1)
    offloads = any(zero.get(key, {}).get("device", "none") != "none" for key in ("offload_param", "offload_optimizer"))
    return Zero(None if stage == "auto" else int(stage), None if group in ("auto", 1) else int(group), sizes, offloads)


def _number(zero: dict[str, Any], key: str, default: float) -> float:
    """A size, or DeepSpeed's default where the JSON is silent or says "auto"."""
    value = zero.get(key, default)
    return default if value == "auto" else float(value)


def text_lengths(config: RunConfig, query: float | None = None, passage: float | None = None) -> Texts:
    """Mean tokens of the run's texts: as given, from the length tables of the prepared data, or else their limits."""
    limits = config.data.max_query_tokens, config.data.max_passage_tokens
    if query is not None and passage is not None:
        return Texts(min(query, limits[0]), min(passage, limits[1]), "as given")
    folders = sorted(Path(config.data.train).glob("lengths/*"), key=lambda path: path.stat().st_mtime)
    tables = [folder for folder in folders if all((folder / f"{name}.npy").is_file() for name in ("queries", "passages"))]
    if not tables:
        source = f"no length tables in {config.data.train}: every text as long as its limit, an upper bound"
        return Texts(query or limits[0], passage or limits[1], source)
    means = [
        float(np.minimum(np.load(tables[-1] / f"{name}.npy", mmap_mode="r")[:1_000_000], limit).mean())
        for name, limit in zip(("queries", "passages"), limits, strict=True)
    ]
    return Texts(query or means[0], passage or means[1], f"measured: {tables[-1]}")


@dataclass(frozen=True)
class _Planner:
    """What stays the same while settings are tried."""

    config: RunConfig
    cluster: Cluster
    given: Texts | None
    calibration: Calibration

    @cached_property
    def architecture(self) -> Architecture:
        return find(self.config.model.base)

    @cached_property
    def counts(self) -> ParameterCounts:
        return count(self.architecture, self.config.model)

    @cached_property
    def zero(self) -> Zero:
        return read_zero(self.config)

    @cached_property
    def texts(self) -> Texts:
        return self.given or text_lengths(self.config)

    def as_configured(self) -> RunPlan:
        self._check()
        stage, group = self._stage_and_group()
        return self.plan(self.config, stage, group)

    def _check(self) -> None:
        batch, world = self.config.sampler.global_batch, self.cluster.world
        if batch < world:
            raise ConfigError(
                describe("sampler.global_batch", batch, f"{world} ranks need at least a row each", "Use fewer GPUs.")
            )

    def _stage_and_group(self) -> tuple[int, int]:
        """As the trainer resolves them; where "auto" fits nothing, all GPUs share (which fits best or shows what lacks)."""
        zero, asked, world = self.zero, self.config.training.shard_group, self.cluster.world
        if zero.stage is not None:
            return zero.stage, (zero.group or world) if zero.stage == 3 else 1
        if asked is None:
            rule = f'{self.config.training.deepspeed} leaves "stage" to it'
            raise ConfigError(describe("training.shard_group", None, rule, "Set a number of GPUs, or auto."))
        if isinstance(asked, int):
            if world % asked:
                raise ConfigError(describe("training.shard_group", asked, f"must divide the {world} ranks"))
            return (2 if asked == 1 else 3), asked
        for group in shard_groups(world, self.cluster.gpus_per_node):
            stage = 2 if group == 1 else 3
            if self.memory(self.config, stage, group) <= self._limit:
                return stage, group
        return (3 if world > 1 else 2), world

    @property
    def _limit(self) -> float:
        return self.cluster.gpu.memory * (1 - RESERVE)

    def lines(self, config: RunConfig, stage: int, group: int) -> dict[str, float]:
        need = memory_need(config, self.counts, Widths.of(self.architecture), self.cluster.world, self.zero.buffers)
        return memory_lines(need, self.cluster.world, stage, group)

    def memory(self, config: RunConfig, stage: int, group: int) -> float:
        return sum(self.lines(config, stage, group).values())

    # -------------------------------------------------------------------------------------------------------------- one plan

    def plan(self, config: RunConfig, stage: int, group: int) -> RunPlan:
        tokens = self._tokens(config)
        rounds, kept = self._rounds(config, tokens)
        work = self._work(config, stage, group, tokens, rounds, kept)
        seconds = step_seconds(work, self.cluster, self._calibration(config))
        return RunPlan(
            *(config, self.architecture, self.counts, self.cluster, self.texts, stage, group),
            *(self.lines(config, stage, group), rounds, kept, tokens, work, seconds, self._notes(config)),
        )

    def _tokens(self, config: RunConfig) -> float:
        """Executed by a rank in a step."""
        passages = 1 + config.sampler.hard_negatives
        row = self.texts.query + passages * self.texts.passage
        return config.sampler.global_batch * row / self.cluster.world / EFFICIENCY[config.model.packed]

    @staticmethod
    def _rounds(config: RunConfig, tokens: float) -> tuple[int, int]:
        """Micro-batches of a rank, and how many of them keep their graphs (`data.partition`)."""
        training = config.training
        rounds = max(1, math.ceil(tokens / training.max_tokens_per_micro_batch))
        allowed = training.max_kept_tokens or training.max_tokens_per_micro_batch
        kept = 0 if training.passes == "two_pass" else min(rounds, int(allowed / (tokens / rounds) + 1e-9))
        return rounds, kept

    def _work(self, config: RunConfig, stage: int, group: int, tokens: float, rounds: int, kept: int) -> Work:
        model, counts = config.model, self.counts
        twice = tokens * (1 - kept / rounds)
        length = self.texts.passage
        embedding_passes = math.ceil(twice / config.training.max_tokens_per_embedding_batch)
        passes = 2 * rounds + embedding_passes
        unpacked = (3 if model.gradient_checkpointing else 2) * rounds + embedding_passes
        lora = model.lora is not None
        flops = step_flops(
            self.architecture.linear,
            counts.adapter,
            attention_flops(self.architecture, length, model.attention == "causal"),
            tokens,
            twice,
            model.gradient_checkpointing,
            frozen=lora,
        )
        texts = config.sampler.global_batch * (2 + config.sampler.hard_negatives)
        exchanged = texts * self.architecture.hidden * (DTYPE_BYTES[config.loss.exchange] + 4)
        exchanged += 2 * counts.trained * MASTER_BYTES
        sharded = stage == 3 and group > 1
        weights = gathered_bytes(counts, DTYPE_BYTES[model.dtype])
        return Work(flops, unpacked * counts.quantised, passes * weights if sharded else 0.0, group, exchanged)

    def _calibration(self, config: RunConfig) -> Calibration:
        if config.model.dtype == "bfloat16":
            return self.calibration
        shares = {name: share * FLOAT32_RATE for name, share in self.calibration.utilisation.items()}
        return Calibration(shares, self.calibration.other * FLOAT32_RATE, self.calibration.link)

    def _notes(self, config: RunConfig) -> tuple[str, ...]:
        notes = [f"text lengths {self.texts.source}"]
        if self.zero.offloads:
            notes.append("offload isn't modelled: the lines are those of a run without it, the time is too short")
        if config.training.offload_activations:
            notes.append("the time to move kept activations to the host and back isn't counted")
        if config.model.dtype != "bfloat16":
            notes.append(f"{config.model.dtype}: a sixteenth of the bfloat16 rate is assumed")
        if self.cluster.gpu.generation not in self.calibration.utilisation:
            notes.append(f"no published run on a {self.cluster.gpu.name}: {self.calibration.other:.0%} of its rate is assumed")
        if self.architecture.family == "gemma2" and config.model.attention_implementation == "eager":
            notes.append("eager attention with soft caps needs more than the activations counted here")
        return tuple(notes)

    # --------------------------------------------------------------------------------------------------------- the best plan

    def best(self) -> RunPlan | None:
        self._check()
        found = [self.plan(*candidate) for candidate in self._candidates()]
        large = [plan for plan in found if plan.config.training.max_tokens_per_micro_batch >= min(SMALL, plan.tokens)]
        return min(large or found, key=lambda plan: (plan.seconds.total, plan.group, plan.memory), default=None)

    def _candidates(self) -> Iterator[tuple[RunConfig, int, int]]:
        """For each group, with and without checkpointing: large and smaller micro-batches, the rest of the memory kept."""
        tokens = self._tokens(self.config)
        longest = max(self.config.data.max_query_tokens, self.config.data.max_passage_tokens)
        plain = self.config.training.engine == "plain"
        for group in [1] if plain else shard_groups(self.cluster.world, self.cluster.gpus_per_node):
            stage = 0 if plain else 2 if group == 1 else 3
            for checkpointing in (False, True):
                most = self._largest(lambda size, on=checkpointing: self._with(size, size, on), stage, group, tokens, longest)
                if most is None:
                    continue
                for size in sorted({most, *(s for s in (16384, 8192, 4096) if longest <= s < most)}):
                    kept = self._largest(lambda k, s=size, on=checkpointing: self._with(s, k, on), stage, group, tokens, size)
                    if kept is not None:
                        yield self._widest_embedding(self._with(size, kept, checkpointing), stage, group), stage, group

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

    def _largest(self, config_of: Any, stage: int, group: int, tokens: float, least: int) -> int | None:
        """The largest number of tokens, up to what a rank executes in a step, whose config fits; None: not even `least`."""
        low, high = math.ceil(least / GRAIN), math.ceil(max(tokens * 1.02, least) / GRAIN)

        def fits(steps: int) -> bool:
            return self.memory(config_of(steps * GRAIN), stage, group) <= self._limit

        if not fits(low):
            return None
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if fits(middle) else (low, middle - 1)
        return low * GRAIN

    def _widest_embedding(self, config: RunConfig, stage: int, group: int) -> RunConfig:
        """The pass without gradients in as few micro-batches as the memory of the pass with gradients allows."""
        start = config.training.max_tokens_per_embedding_batch
        memory = self.memory(config, stage, group)
        best = config
        for factor in (8, 4, 2):
            training = config.training.model_copy(update={"max_tokens_per_embedding_batch": start * factor})
            wider = config.model_copy(update={"training": training})
            if self.memory(wider, stage, group) <= max(memory, self._limit):
                best = wider
                break
        return best

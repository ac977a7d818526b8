"""One run with given settings on a given cluster: memory by line, schedule, work, seconds a step, GPU-hours. Chooses nothing.

No torch, no network, no data but the length tables of a prepared directory, if it is there.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from hybrid_scale.config import RunConfig
from hybrid_scale.errors import ConfigError, describe
from hybrid_scale.planning.architecture import Architecture, find
from hybrid_scale.planning.costs import (
    ALLOCATOR,
    DTYPE_BYTES,
    GRADIENT_BYTES,
    MASTER_BYTES,
    RESERVE,
    STAGING_LINE,
    MemoryNeed,
    ParameterCounts,
    count,
    gathered_bytes,
    host_lines,
    memory_lines,
    memory_need,
    saved_by_token,
)
from hybrid_scale.planning.hardware import Cluster
from hybrid_scale.planning.speed import CALIBRATION, Calibration, Seconds, Work, attention_flops, step_flops, step_seconds
from hybrid_scale.planning.zero import Zero, place, read_zero

EFFICIENCY = {True: 0.98, False: 0.9}
"""Real over executed tokens of a rank in lock-step, packed and padded: .983 to .999 on XQuAD-R (benchmarks/padding.py); padded
micro-batches of sorted texts pad by a tenth."""
FLOAT32_RATE = 1 / 16
"""Of the bfloat16 rate: 19.5 of 312 TFLOP/s on an A100."""


@dataclass(frozen=True)
class Texts:
    """Mean tokens of a query and a passage, prompt and end token included, and where they come from."""

    query: float
    passage: float
    source: str


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
    host: dict[str, float]
    """Bytes of a node's host memory: what its ranks offload."""
    rounds: int
    """Micro-batches of a rank and step."""
    kept: int
    """Of them, those whose graphs are kept: they go through the model once."""
    tokens: float
    """Executed by a rank in a step."""
    work: Work
    seconds: Seconds
    notes: tuple[str, ...]
    planned: tuple[str, ...] = ()
    """Of the settings, those that the config leaves to the planner."""

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
        engine = ["training.deepspeed=ds_configs/zero_auto.json", f"training.shard_group={self.group}"]
        if self.work.fetched or self.work.updated:  # offloads, as its JSON says
            engine = [f"training.deepspeed={training.deepspeed}"]
        engine = [] if training.engine == "plain" else engine
        return [
            *engine,
            f"training.max_tokens_per_micro_batch={training.max_tokens_per_micro_batch}",
            f"training.max_kept_tokens={training.max_kept_tokens or training.max_tokens_per_micro_batch}",
            f"training.max_tokens_per_embedding_batch={training.max_tokens_per_embedding_batch}",
            f"model.gradient_checkpointing={str(self.config.model.gradient_checkpointing).lower()}",
        ]


def gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"


def text_lengths(config: RunConfig, query: float | None = None, passage: float | None = None) -> Texts:
    """Mean tokens of the run's texts: as given, from the length tables of the prepared data, or else their limits.

    `source` says which; where there are tables of several tokenizers or prompts, the newest are read.
    """
    limits = config.data.max_query_tokens, config.data.max_passage_tokens
    for key, given in (("--query-tokens", query), ("--passage-tokens", passage)):
        if given is not None and not (math.isfinite(given) and given >= 1):
            raise ConfigError(describe(key, given, "a text has at least its end token", "State a mean length in tokens."))
    query, passage = (None if n is None else min(n, limit) for n, limit in zip((query, passage), limits, strict=True))
    if query is not None and passage is not None:
        return Texts(query, passage, "as given")
    folders = sorted(Path(config.data.train).glob("lengths/*"), key=lambda path: path.stat().st_mtime)
    tables = [folder for folder in folders if all((folder / f"{name}.npy").is_file() for name in ("queries", "passages"))]
    if not tables:
        others = "every text" if query is passage else "passages" if query else "queries"
        source = f"assumed: {others} as long as the limit (no length tables in {config.data.train}), an upper bound"
        return Texts(query or limits[0], passage or limits[1], source)
    means = [
        mean_tokens(np.load(tables[-1] / f"{name}.npy", mmap_mode="r"), limit)
        for name, limit in zip(("queries", "passages"), limits, strict=True)
    ]
    return Texts(query or means[0], passage or means[1], f"measured: {tables[-1]}")


def mean_tokens(lengths: np.ndarray, limit: int) -> float:
    """Of the first million texts, cut at `limit`."""
    return float(np.minimum(lengths[:1_000_000], limit).mean())


@dataclass(frozen=True)
class Forecaster:
    """A run's model, data and cluster, which stay the same while settings are tried.

    Raises ModelError (no shape for `model.base`) and ConfigError (no DeepSpeed JSON, a batch smaller than the ranks).
    """

    config: RunConfig
    cluster: Cluster
    given: Texts | None = None
    calibration: Calibration = CALIBRATION
    shape: Architecture | None = None
    """Where it is known already (the trainer's); None: found by `model.base`."""
    counted: ParameterCounts | None = None
    """The same."""
    sharing: Zero | None = None
    """Instead of what the run's DeepSpeed JSON says."""

    @cached_property
    def architecture(self) -> Architecture:
        return self.shape or find(self.config.model.base)

    @cached_property
    def counts(self) -> ParameterCounts:
        return self.counted or count(self.architecture, self.config.model)

    @cached_property
    def zero(self) -> Zero:
        return self.sharing or read_zero(self.config, self.architecture.hidden)

    @cached_property
    def texts(self) -> Texts:
        return self.given or text_lengths(self.config)

    @cached_property
    def random(self) -> bool:
        """Whether the model draws random numbers, so that passes without gradients take the micro-batches as they are."""
        lora = self.config.model.lora
        return self.architecture.dropout or (lora is not None and lora.dropout > 0)

    def check(self) -> None:
        batch, world = self.config.sampler.global_batch, self.cluster.world
        if batch < world:
            rule = f"{world} ranks need at least a row each"
            raise ConfigError(describe("sampler.global_batch", batch, rule, "Use fewer GPUs."))

    @property
    def limit(self) -> float:
        """Bytes of a GPU that a plan may use."""
        return self.cluster.gpu.memory * (1 - RESERVE)

    def lines(self, config: RunConfig, stage: int, group: int) -> dict[str, float]:
        return memory_lines(self._need(config), self.cluster.world, stage, group)

    def _need(self, config: RunConfig) -> MemoryNeed:
        return memory_need(config, self.counts, self.architecture, self.cluster.world, self.zero)

    def memory(self, config: RunConfig, stage: int, group: int) -> float:
        return sum(self.lines(config, stage, group).values())

    def plan(self, config: RunConfig, stage: int, group: int) -> RunPlan:
        """What happens with these settings; whether it fits is in the plan, not an error."""
        tokens = self.tokens(config)
        rounds, kept = self._rounds(config, tokens)
        work = self._work(config, stage, group, tokens, rounds, kept)
        seconds = step_seconds(work, self.cluster, self._calibration(config))
        lines, host = self.lines(config, stage, group), host_lines(self._need(config), self.cluster.world, stage)
        return RunPlan(
            *(config, self.architecture, self.counts, self.cluster, self.texts, stage, group, lines),
            host={name: size * self.cluster.gpus_per_node for name, size in host.items()},
            rounds=rounds,
            kept=kept,
            tokens=tokens,
            work=work,
            seconds=seconds,
            notes=self._notes(config, lines, host),
        )

    def tokens(self, config: RunConfig) -> float:
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
        """Weights are gathered once forward and once backward a micro-batch, and once a pass without gradients (counted:
        benchmarks/traffic.py); 4-bit ones are unpacked as often, and once more where checkpointing forwards again."""
        model, counts = config.model, self.counts
        twice = tokens * (1 - kept / rounds)
        length = self.texts.passage
        alone = tokens / rounds if self.random else config.training.max_tokens_per_embedding_batch
        embedding_passes = math.ceil(twice / alone - 1e-9)
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
        saved = tokens * kept / rounds * saved_by_token(config, self.architecture) if config.training.offload_activations else 0.0
        updated = counts.trained / self.cluster.world if self.zero.offloads_optimizer else 0.0
        return Work(
            *(flops, unpacked * counts.quantised, passes * weights if sharded else 0.0, group, exchanged),
            fetched=passes * weights / self.cluster.world if self.zero.offloads_weights and stage == 3 else 0.0,
            swapped=2 * saved + updated * (GRADIENT_BYTES + MASTER_BYTES),
            updated=updated,
        )

    def _calibration(self, config: RunConfig) -> Calibration:
        if config.model.dtype == "bfloat16":
            return self.calibration
        shares = {name: share * FLOAT32_RATE for name, share in self.calibration.utilisation.items()}
        return Calibration(shares, self.calibration.other * FLOAT32_RATE, self.calibration.link)

    def _notes(self, config: RunConfig, lines: dict[str, float], host: dict[str, float]) -> tuple[str, ...]:
        notes = [f"text lengths {self.texts.source}"]
        longest, positions = max(config.data.max_query_tokens, config.data.max_passage_tokens), self.architecture.positions
        if positions is not None and longest > positions:
            name = self.architecture.name
            notes.append(
                f"texts of up to {longest:,} tokens: {name} was made for {positions:,} positions; lower data.max_*_tokens"
            )
        if config.training.engine == "deepspeed" and not Path(config.training.deepspeed).is_file():
            notes.append(f"DeepSpeed JSON: {place(config)}")
        if host:
            notes.append(
                "offload has low confidence: two published runs bound its memory (FSDP, 70B), none its time; PCIe at 60 % and the"
                " CPU's update are assumed. Pinned host memory is allocated in powers of two: up to twice the lines"
            )
        if staging := lines.get(STAGING_LINE):
            least = sum(lines.values()) - staging * ALLOCATOR
            notes.append(f"offloaded weights: {gib(least)} if nothing is staged, {gib(sum(lines.values()))} is an upper bound")
        if self.zero.offloads_optimizer and config.model.lora is not None:
            tiny = sum(host.get(name, 0.0) for name in ("trained weights", "gradients", "Adam moments"))
            notes.append(f"offload_optimizer saves {gib(tiny)} of a GPU: the optimiser of adapters is tiny")
        if config.model.dtype != "bfloat16":
            notes.append(f"{config.model.dtype}: a sixteenth of the bfloat16 rate is assumed")
        if self.cluster.gpu.generation not in self.calibration.utilisation:
            notes.append(f"no published run on a {self.cluster.gpu.name}: {self.calibration.other:.0%} of its rate is assumed")
        if self.architecture.family == "gemma2" and config.model.attention_implementation == "eager":
            notes.append("eager attention with soft caps needs more than the activations counted here")
        return tuple(notes)

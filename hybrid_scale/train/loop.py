"""The loop: batch, plan, step, log, save if due, stop if agreed. Knows no dataset format and no metric."""

import math
import resource
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hybrid_scale import dist
from hybrid_scale.config import RunConfig
from hybrid_scale.data.partition import LENGTH_TOKENS, Budget, Plan, partition
from hybrid_scale.data.prepared import Pairs
from hybrid_scale.data.sampler import GlobalBatch, HybridSampler
from hybrid_scale.data.text import TextEncoder
from hybrid_scale.errors import ConfigError, RunError, describe
from hybrid_scale.planning.architecture import Architecture
from hybrid_scale.planning.speed import attention_flops
from hybrid_scale.runs import RunDirectory
from hybrid_scale.train.checkpoint import Checkpoints
from hybrid_scale.train.engine import Engine
from hybrid_scale.train.failure import Failure, describe_failure, names_of, ranks_of, texts_of, write_failure
from hybrid_scale.train.gradcache import MicroBatch, NotFinite, Share, forward_backward
from hybrid_scale.train.guard import GradientGuard, MovementGuard
from hybrid_scale.train.loss import Targets
from hybrid_scale.train.schedule import learning_rate
from hybrid_scale.train.stop import Agreed, StopRequest
from hybrid_scale.train.watch import Watch


@dataclass(frozen=True)
class TrainingData:
    """Pairs, their sampler, the token lengths of their texts, and the shape of the model that reads them."""

    pairs: Pairs
    sampler: HybridSampler
    encoder: TextEncoder
    query_lengths: np.ndarray
    passage_lengths: np.ndarray
    shape: Architecture


@dataclass(frozen=True)
class Step:
    """A global batch, and who embeds what of it."""

    batch: GlobalBatch
    plan: Plan


def budget(config: RunConfig, shape: Architecture) -> Budget:
    """What one rank may execute at once."""
    training, lora = config.training, config.model.lora
    random = shape.dropout or (lora is not None and lora.dropout > 0)
    kept = training.max_kept_tokens or training.max_tokens_per_micro_batch
    return Budget(
        micro_batch=training.max_tokens_per_micro_batch,
        kept=0 if training.passes == "two_pass" else kept,
        # A pass that draws random numbers (dropout) is replayed micro-batch by micro-batch.
        embedding=None if random else training.max_tokens_per_embedding_batch,
        packed=config.model.packed,
        quadratic=attention_flops(shape, 1, config.model.attention == "causal") / (2 * shape.linear),
        length_tokens=LENGTH_TOKENS if config.model.attention_implementation == "packed" else 0.0,
    )


def plan_step(data: TrainingData, config: RunConfig, world: int, step: int) -> Step:
    """What step `step` will do on `world` ranks. No communication: the same answer everywhere."""
    batch = data.sampler.batch(step)
    lengths = np.concatenate([data.query_lengths[batch.queries], data.passage_lengths[batch.passages]]).astype(np.int64)
    limits = budget(config, data.shape)
    plan = partition(lengths, world, limits)
    if config.training.passes == "direct" and plan.schedule != "direct":
        tokens = int(plan.executed.max(axis=0).sum())
        rule = f"step {step} needs the graphs of {tokens} tokens at once, {limits.kept} are allowed"
        raise ConfigError(describe("training.passes", "direct", rule, "Use auto, or raise training.max_kept_tokens."))
    return Step(batch, plan)


def build_share(data: TrainingData, step: Step, rank: int) -> Share:
    """Tokens of the texts that `rank` embeds, on the CPU. A micro-batch without texts gets a dummy of one token."""
    plan = step.plan
    texts = plan.micro_batches[rank]
    flat = np.concatenate(texts)
    encoded = dict(zip(flat.tolist(), _encode(data, step.batch, flat), strict=True))

    def collate(numbers: np.ndarray) -> MicroBatch:
        return data.encoder.collate([encoded[n] for n in numbers.tolist()] or [[data.encoder.end]])

    micro_batches = [collate(numbers) for numbers in texts]
    joined = [np.concatenate(texts[rounds.start : rounds.stop]) for rounds in plan.embedding_batches]
    alone = [len(rounds) == 1 for rounds in plan.embedding_batches]
    return Share(
        micro_batches,
        [len(numbers) for numbers in texts],
        [
            micro_batches[rounds.start] if one else collate(numbers)
            for rounds, one, numbers in zip(plan.embedding_batches, alone, joined, strict=True)
        ],
        [len(numbers) for numbers in joined],
    )


def _encode(data: TrainingData, batch: GlobalBatch, texts: np.ndarray) -> list[list[int]]:
    """Token ids of texts given by number, queries before passages in number."""
    queries = len(batch.queries)
    is_query = texts < queries
    of_query = data.pairs.queries.column("text", batch.queries[texts[is_query]])
    of_passage = data.pairs.passages.column("text", batch.passages[texts[~is_query] - queries])
    encoded = {
        True: iter(data.encoder.encode("query", of_query) if of_query else []),
        False: iter(data.encoder.encode("passage", of_passage) if of_passage else []),
    }
    return [next(encoded[bool(query)]) for query in is_query]


class Ahead:
    """Plans and tokenises the next step in a thread while the current one computes. No communication happens there."""

    def __init__(self, data: TrainingData, config: RunConfig, world: int, rank: int):
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="next-step")
        self.make = lambda number: self._make(data, config, world, rank, number)
        self.pending: tuple[int, Future[tuple[Step, Share, float]]] | None = None

    def get(self, number: int, last: int) -> tuple[Step, Share, float]:
        """Step `number`, its share and the seconds they took; starts on the following one up to `last`."""
        if self.pending is None or self.pending[0] != number:
            self.pending = (number, self.pool.submit(self.make, number))
        made = self.pending[1].result()
        self.pending = (number + 1, self.pool.submit(self.make, number + 1)) if number < last else None
        return made

    @staticmethod
    def _make(data: TrainingData, config: RunConfig, world: int, rank: int, number: int) -> tuple[Step, Share, float]:
        started = time.monotonic()
        step = plan_step(data, config, world, number)
        share = build_share(data, step, rank)
        return step, share, time.monotonic() - started


@dataclass
class Trainer:
    """One run in progress. `evaluate(step)`, `save_weights(folder)` and `track(values, step)` are handed in."""

    config: RunConfig
    run: RunDirectory
    data: TrainingData
    engine: Engine
    evaluate: Callable[[int], None]
    checkpoints: Checkpoints
    save_weights: Callable[[Path], None]
    track: Callable[[dict[str, float], int], None]
    stop: StopRequest
    watch: Watch
    _started: float = field(default_factory=time.monotonic)
    _saving: float = 0.0

    def __post_init__(self) -> None:
        self.ahead = Ahead(self.data, self.config, dist.world_size(), dist.rank())
        self.gradients = GradientGuard(self.engine.trained)
        self.movement: MovementGuard | None = MovementGuard(self.engine.trained)

    def train(self, first_step: int) -> bool:
        """Steps first_step .. max_steps - 1. True when the run is complete, False when it was asked to stop."""
        training = self.config.training
        self._started = time.monotonic()
        for step in range(first_step, training.max_steps):
            record = self._one_step(step)
            done = step + 1
            self.watch.at(done, "logging")
            if done % training.log_every_steps == 0 or done == training.max_steps:
                self._log(record, first_step)
            agreed = self.stop.agreed(self.checkpoints.failed())
            if agreed is Agreed.FAIL:
                self.checkpoints.finish()  # raises, everywhere
            if agreed is Agreed.STOP or self._save_due(done):
                self._save(done)
            if agreed is Agreed.STOP and done < training.max_steps:
                self.checkpoints.finish()
                return False
            if self._evaluation_due(done):
                self.watch.at(done, "evaluation")
                self.evaluate(done)
                self.checkpoints.judge(done, done)
        self.watch.at(training.max_steps, "checkpoint")
        self.checkpoints.finish()
        return True

    def _evaluation_due(self, done: int) -> bool:
        every = self.config.training.evaluate_every_steps
        return bool(every) and done % (every or 1) == 0 and done < self.config.training.max_steps

    def _save_due(self, done: int) -> bool:
        training = self.config.training
        regular = training.save_every_steps is not None and done % training.save_every_steps == 0
        judged = training.keep_best is not None and self._evaluation_due(done)
        return regular or judged or done == training.max_steps

    def _save(self, done: int) -> None:
        started = time.monotonic()
        self.watch.at(done, "checkpoint")
        self.checkpoints.save(done)
        self._saving = time.monotonic() - started

    def _one_step(self, number: int) -> dict[str, Any]:
        """One optimiser step; returns its record for `metrics.jsonl`."""
        clock = [time.monotonic()]
        self.watch.at(number + 1, "data")
        step, share, prepared = self.ahead.get(number, last=self.config.training.max_steps - 1)
        clock.append(time.monotonic())
        self.watch.at(number + 1, "gradient")
        loss = self._gradient(number, step, share.to(dist.device()))
        clock.append(time.monotonic())
        self.watch.at(number + 1, "update")
        rate = learning_rate(number, self.config.optimizer, self.config.training.max_steps)
        norm = self.engine.step(rate)
        if self.movement is not None and rate > 0.0:
            self.movement.check()
            self.movement = None
        clock.append(time.monotonic())
        seconds = dict(zip(("data_wait", "gradient", "update"), np.diff(clock).round(4).tolist(), strict=True))
        plan = step.plan
        saving, self._saving = self._saving, 0.0
        return {
            "step": number + 1,
            "loss": loss,
            "learning_rate": rate,
            "gradient_norm": norm,
            "pairs": len(step.batch.row_text),
            "pools": list(step.batch.pools),
            "texts": len(plan.lengths),
            "real_tokens": plan.real_tokens,
            "padded_tokens": plan.padded_tokens,
            "lockstep_tokens": plan.lockstep_tokens,
            "lockstep_efficiency": round(plan.real_tokens / plan.lockstep_tokens, 4),
            "micro_batches": plan.rounds,
            "schedule": plan.schedule,
            "recomputed_tokens": plan.recomputed_tokens,
            "seconds": round(clock[-1] - clock[0], 4),
            "seconds_by_phase": {**seconds, "data_ahead": round(prepared, 4), "checkpoint_before": round(saving, 4)},
            "peak_gib": round(peak_gib(), 4),
        }

    def _gradient(self, number: int, step: Step, share: Share) -> float:
        """Loss and accumulated gradient, both finite on every rank, or a RunError on every rank."""
        targets = Targets.of(step.batch, dist.device())
        offload = self.config.training.offload_activations
        try:
            loss = forward_backward(self.engine, share, step.plan, targets, self.config.loss, offload)
        except NotFinite as error:
            raise self._failed(number, step, Failure("embeddings", ranks_of(step.plan, error.texts), error.texts, [])) from None
        bad = self.gradients.not_finite()
        if bad or not math.isfinite(loss):
            ranks = list(bad) or list(range(dist.world_size()))
            names = sorted({name for held in dist.gather_objects(bad.get(dist.rank(), [])) for name in held})
            failure = Failure("gradients" if bad else "loss", ranks, texts_of(step.plan, ranks), names)
            raise self._failed(number, step, failure)
        return loss

    def _failed(self, number: int, step: Step, failure: Failure) -> RunError:
        """Keeps what is needed to compute the step again; the error to raise. Collective."""
        folder = self.run.failures / f"step_{number + 1:08d}"
        names = names_of(self.data.pairs, step.batch, failure.texts)
        self.save_weights(folder / "adapter")
        dist.first_rank_does(lambda: write_failure(folder, failure, number, dist.world_size(), names))
        return describe_failure(failure, number + 1, names, folder)

    def _log(self, record: dict[str, Any], first_step: int) -> None:
        """Metrics file, trackers and the progress line, on rank 0."""
        if dist.rank() != 0:
            return
        self.run.append_metrics(record)
        self.track(
            {key: record[key] for key in ("loss", "learning_rate", "gradient_norm", "seconds", "peak_gib")}, record["step"]
        )
        done, total = record["step"], self.config.training.max_steps
        elapsed = time.monotonic() - self._started
        left = elapsed / (done - first_step) * (total - done)
        print(
            f"step {done}/{total}  loss {record['loss']:.4f}  lr {record['learning_rate']:.2e}"
            f"  {record['pairs'] / record['seconds']:.0f} pairs/s  {record['real_tokens'] / record['seconds']:.0f} tokens/s"
            f"  {record['schedule']}  lock-step efficiency {record['lockstep_efficiency']:.2f}"
            f"  left {left // 60:.0f}:{left % 60:02.0f}",
            file=sys.stderr,
            flush=True,
        )


def peak_gib() -> float:
    """Largest memory of this rank so far, GiB: allocated on the GPU, or resident on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

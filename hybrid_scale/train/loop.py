"""The loop: batch, plan, step, log, save if due, stop if agreed. Knows no dataset format and no metric."""

import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from hybrid_scale import dist
from hybrid_scale.config import RunConfig
from hybrid_scale.data.partition import Plan, partition
from hybrid_scale.data.records import Pairs
from hybrid_scale.data.sampler import GlobalBatch, HybridSampler
from hybrid_scale.data.text import TextEncoder
from hybrid_scale.errors import ConfigError, describe
from hybrid_scale.runs import RunDirectory
from hybrid_scale.train.engine import Engine
from hybrid_scale.train.gradcache import Share, forward_backward
from hybrid_scale.train.loss import Targets
from hybrid_scale.train.schedule import learning_rate
from hybrid_scale.train.stop import StopRequest


@dataclass(frozen=True)
class TrainingData:
    """Pairs, their sampler, and the token lengths of their texts."""

    pairs: Pairs
    sampler: HybridSampler
    encoder: TextEncoder
    query_lengths: np.ndarray
    passage_lengths: np.ndarray


@dataclass(frozen=True)
class Step:
    """A global batch, who embeds what, and whether one pass is enough."""

    batch: GlobalBatch
    plan: Plan
    direct: bool


def plan_step(data: TrainingData, config: RunConfig, world: int, step: int) -> Step:
    """What step `step` will do on `world` ranks. No communication: the same answer everywhere."""
    batch = data.sampler.batch(step)
    lengths = np.concatenate([data.query_lengths[batch.queries], data.passage_lengths[batch.passages]]).astype(np.int64)
    training = config.training
    plan = partition(lengths, world, training.max_tokens_per_micro_batch)
    if training.passes == "direct" and plan.rounds > 1:
        raise ConfigError(
            describe(
                "training.passes",
                "direct",
                f"step {step} needs {plan.rounds} micro-batches a rank",
                "Use auto, or raise training.max_tokens_per_micro_batch.",
            )
        )
    return Step(batch, plan, direct=plan.rounds == 1 and training.passes != "two_pass")


def build_share(data: TrainingData, step: Step, rank: int, device: torch.device) -> Share:
    """Tokens of the texts that `rank` embeds. A micro-batch without texts gets a dummy of one token."""
    queries = len(step.batch.queries)
    micro_batches, counts = [], []
    for texts in step.plan.micro_batches[rank]:
        rows = _encode(data, step.batch, texts, queries) if len(texts) else [[data.encoder.end]]
        micro_batches.append({name: tensor.to(device) for name, tensor in data.encoder.collate(rows).items()})
        counts.append(len(texts))
    return Share(micro_batches, counts)


def _encode(data: TrainingData, batch: GlobalBatch, texts: np.ndarray, queries: int) -> list[list[int]]:
    is_query = texts < queries
    of_query = data.pairs.queries.column("text", batch.queries[texts[is_query]])
    of_passage = data.pairs.passages.column("text", batch.passages[texts[~is_query] - queries])
    encoded = {
        True: iter(data.encoder.encode("query", of_query) if of_query else []),
        False: iter(data.encoder.encode("passage", of_passage) if of_passage else []),
    }
    return [next(encoded[bool(query)]) for query in is_query]


@dataclass
class Trainer:
    """One run in progress. `evaluate(step)`, `save(step)` and `track(values, step)` are handed in by the door."""

    config: RunConfig
    run: RunDirectory
    data: TrainingData
    engine: Engine
    evaluate: Callable[[int], None]
    save: Callable[[int], None]
    track: Callable[[dict[str, float], int], None]
    stop: StopRequest
    _started: float = field(default_factory=time.monotonic)

    def train(self, first_step: int) -> bool:
        """Steps first_step .. max_steps - 1. True when the run is complete, False when it was asked to stop."""
        training = self.config.training
        self._started = time.monotonic()
        for step in range(first_step, training.max_steps):
            record = self._one_step(step)
            done = step + 1
            if done % training.log_every_steps == 0 or done == training.max_steps:
                self._log(record, first_step)
            stopping = self.stop.agreed()
            due = training.save_every_steps and done % training.save_every_steps == 0
            if due or stopping or done == training.max_steps:
                self.save(done)
            if stopping and done < training.max_steps:
                return False
            if training.evaluate_every_steps and done % training.evaluate_every_steps == 0 and done < training.max_steps:
                self.evaluate(done)
        return True

    def _one_step(self, number: int) -> dict[str, Any]:
        """One optimiser step; returns its record for `metrics.jsonl`."""
        clock = [time.monotonic()]
        step = plan_step(self.data, self.config, dist.world_size(), number)
        share = build_share(self.data, step, dist.rank(), dist.device())
        targets = Targets.of(step.batch, dist.device())
        clock.append(time.monotonic())
        loss = forward_backward(self.engine, share, step.plan, targets, self.config.loss, step.direct)
        clock.append(time.monotonic())
        rate = learning_rate(number, self.config.optimizer, self.config.training.max_steps)
        norm = self.engine.step(rate)
        clock.append(time.monotonic())
        seconds = dict(zip(("data", "gradient", "update"), np.diff(clock).round(4).tolist(), strict=True))
        return {
            "step": number + 1,
            "loss": loss,
            "learning_rate": rate,
            "gradient_norm": norm,
            "pairs": len(step.batch.row_text),
            "pools": list(step.batch.pools),
            "texts": len(step.plan.lengths),
            "real_tokens": step.plan.real_tokens,
            "padded_tokens": step.plan.padded_tokens,
            "lockstep_tokens": step.plan.lockstep_tokens,
            "micro_batches": step.plan.rounds,
            "passes": 1 if step.direct else 2,
            "seconds": round(clock[-1] - clock[0], 4),
            "seconds_by_phase": seconds,
            "peak_gib": round(peak_gib(), 4),
        }

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
            f"  padding {1 - record['real_tokens'] / record['padded_tokens']:.0%}  left {left // 60:.0f}:{left % 60:02.0f}",
            file=sys.stderr,
            flush=True,
        )


def peak_gib() -> float:
    """Largest memory of this rank so far, GiB: allocated on the GPU, or resident on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

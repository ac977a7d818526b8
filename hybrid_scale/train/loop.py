"""The loop: batch, plan, step, log, save if due. Knows no dataset format and no metric, nor how a run is stopped (stop.py)."""

import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hybrid_scale import dist, gpu
from hybrid_scale.config import RunConfig
from hybrid_scale.errors import RunError
from hybrid_scale.runs import RunDirectory
from hybrid_scale.train.batches import Ahead, Step, TrainingData, real_tokens
from hybrid_scale.train.checkpoint import Checkpoints
from hybrid_scale.train.engine import Engine
from hybrid_scale.train.failure import Failure, describe_failure, names_of, ranks_of, texts_of, write_failure
from hybrid_scale.train.gradcache import NotFinite, Share, forward_backward
from hybrid_scale.train.guard import GradientGuard, MovementGuard
from hybrid_scale.train.loss import Targets
from hybrid_scale.train.schedule import learning_rate
from hybrid_scale.train.stop import Agreed, StopRequest
from hybrid_scale.train.watch import Watch

RATES = ("pairs", "real_tokens", "seconds")
"""Of a step's record: summed between two lines of progress, which say the rates."""


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
    _tokens: int = 0
    """Real tokens of all steps up to now, on rank 0, also of those before this start."""
    _since_logged: list[float] = field(default_factory=lambda: [0.0] * len(RATES))

    def __post_init__(self) -> None:
        self.ahead = Ahead(self.data, self.config, dist.world_size(), dist.rank())
        self.gradients = GradientGuard(self.engine.trained)
        self.movement: MovementGuard | None = MovementGuard(self.engine.trained)

    def train(self, first_step: int) -> int:
        """Steps first_step .. max_steps - 1; returns max_steps."""
        training = self.config.training
        self._started = time.monotonic()
        self.stop.stands(first_step)
        self._tokens = self._tokens_before(first_step) if dist.rank() == 0 else 0
        for step in range(first_step, training.max_steps):
            record = self._one_step(step)
            self._since_logged = [a + record[key] for a, key in zip(self._since_logged, RATES, strict=True)]
            done = step + 1
            self.watch.at(done, "logging")
            self._tokens += record["real_tokens"]
            if done % training.log_every_steps == 0 or done == training.max_steps or self._evaluation_due(done):
                self._log(record, first_step)
            if self._save_due(done):
                self._save(done)
            self.checkpoints.mark()
            self.stop.stands(done)
            if self._evaluation_due(done):
                self.watch.at(done, "evaluation")
                self.evaluate(done)
                self.checkpoints.judge(done, done)
        self.watch.at(training.max_steps, "checkpoint")
        self.checkpoints.finish()
        return training.max_steps

    def _tokens_before(self, first_step: int) -> int:
        """Real tokens of the steps before: the log's, and those of the batches since its last line."""
        logged = [(record["step"], record["total_real_tokens"]) for record in self.run.metrics() if "total_real_tokens" in record]
        known, tokens = max((line for line in logged if line[0] <= first_step), default=(0, 0))
        return int(tokens) + sum(real_tokens(self.data, step) for step in range(known, first_step))

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
        gpu.forget_peak()
        self.watch.at(number + 1, "data")
        step, share, prepared = self.ahead.get(number, last=self.config.training.max_steps - 1)
        clock.append(time.monotonic())
        self.watch.at(number + 1, "gradient")
        loss = self._gradient(number, step, share.to(dist.device()))
        self._agree_to_move()
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
            "peak_gib": round(gpu.peak_bytes() / 2**30, 4),
        }

    def _agree_to_move(self) -> None:
        """All ranks go on to the update; or the process ends, as a rank was asked to stop; or a checkpoint failed (RunError)."""
        if self.stop.agreed(self.checkpoints.failed()) is Agreed.FAIL:
            self.checkpoints.finish()  # raises, everywhere

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
        self.run.append_metrics({**record, "total_real_tokens": self._tokens})
        self.track(
            {key: record[key] for key in ("loss", "learning_rate", "gradient_norm", "seconds", "peak_gib")}, record["step"]
        )
        done, total = record["step"], self.config.training.max_steps
        elapsed = time.monotonic() - self._started
        left = elapsed / (done - first_step) * (total - done)
        pairs, tokens, seconds = self._since_logged
        self._since_logged = [0.0] * len(RATES)
        print(
            f"step {done}/{total}  loss {record['loss']:.4f}  lr {record['learning_rate']:.2e}"
            f"  {pairs / seconds:.0f} pairs/s  {tokens / seconds:.0f} tokens/s"
            f"  {record['schedule']}  lock-step efficiency {record['lockstep_efficiency']:.2f}"
            f"  left {left // 60:.0f}:{left % 60:02.0f}",
            file=sys.stderr,
            flush=True,
        )

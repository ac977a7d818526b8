"""A config -> a trained run directory: opens the data, builds the engine, resumes, trains, and keeps the status true.

Knows no metric: what evaluates a model is handed in by the door.
"""

import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from hybrid_scale import dist
from hybrid_scale.base_files import fetch
from hybrid_scale.checkpoints import resume_point
from hybrid_scale.config import RunConfig, dump_config
from hybrid_scale.data.text import TextEncoder
from hybrid_scale.errors import ConfigError, describe
from hybrid_scale.model.acceptance import accept
from hybrid_scale.model.embedder import Embedder
from hybrid_scale.model.load import load_embedder
from hybrid_scale.runs import RunDirectory, write_json
from hybrid_scale.train import checkpoint, resume
from hybrid_scale.train.batches import open_training_data
from hybrid_scale.train.checkpoint import Checkpoints
from hybrid_scale.train.engine import Engine, make_accelerator, make_engine, read_deepspeed_config, zero_stage
from hybrid_scale.train.loop import Trainer
from hybrid_scale.train.manifest import manifest
from hybrid_scale.train.settle import Settled, announcement, seen_gpu, settle
from hybrid_scale.train.stop import StopRequest, deadline
from hybrid_scale.train.watch import Watch

Evaluate = Callable[[RunConfig, RunDirectory, TextEncoder, Engine, int | None], None]


def train(config: RunConfig, evaluate: Evaluate) -> bool:
    """Train to the end (True) or to an agreed stop (False). The run directory says which, and why if it failed."""
    if config.training.engine == "deepspeed" and not dist.launched():
        started = f"; this one was started by {by}" if (by := dist.alone_by()) else ""
        rule = f"DeepSpeed needs a launcher that starts ranks, even for one process{started}"
        remedy = "Use `accelerate launch --use_deepspeed ... launch/train.py` without --cpu, or training.engine=plain."
        raise ConfigError(describe("training.engine", "deepspeed", rule, remedy))
    run = RunDirectory(config.run.directory)
    stop = StopRequest(deadline(config.training))
    dist.first_rank_does(lambda: run.create(config, continuing=True))
    stop.install()
    keeper = Keeper(run)
    watch = Watch(config.training.rank_timeout_seconds, keeper.end)
    watch.start()
    first = dist.rank() == 0  # asked now: at the end the process group is gone
    try:
        finished, asked = _train(config, run, evaluate, stop, watch, keeper)
    except BaseException as error:
        lost = watch.explain(error)
        if lost is None:
            watch.stop()
        keeper.end(f"{type(error).__name__}: {error}" if lost is None else f"RankLost: {lost}", lost is None or watch.writes())
        if lost is None:
            raise
        raise lost from error
    done = finished == config.training.max_steps
    if first and done:
        run.set_status("done", step=finished)
    elif first:
        run.set_status("preempted", step=finished, reason=asked)
        print(f"stopped after step {finished}: {asked}; the same command goes on from there", file=sys.stderr, flush=True)
    return done


class Keeper:
    """Leaves the run directory in order when the run ends early: a checkpoint being written is finished, the status says why."""

    def __init__(self, run: RunDirectory):
        self.run = run
        self.checkpoints: Checkpoints | None = None

    def end(self, reason: str, writes: bool) -> None:
        if self.checkpoints is not None:
            self.checkpoints.close()
        if writes:
            with suppress(FileNotFoundError):  # where nobody can tell who lives, several ranks write the same
                self.run.set_status("failed", reason=reason)


def _train(
    config: RunConfig, run: RunDirectory, evaluate: Evaluate, stop: StopRequest, watch: Watch, keeper: Keeper
) -> tuple[int, str]:
    """Steps finished, and who asked for a stop and why ("": nobody). The process group has ended."""
    started, world = time.monotonic(), dist.world_size()
    if dist.rank() == 0:
        run.set_status("running", world_size=world)
    fetch(config.model)
    dist.first_rank_does(lambda: say("\n".join(accept(config))))
    data = open_training_data(config, world)
    seen = seen_gpu(config)
    settled = dist.first_rank_does(lambda: settle(config, data, seen, world, dist.local_world_size()))
    dist.first_rank_does(lambda: say(announcement(settled, data, world)))
    facts = resume.facts_of(config, data.pairs.fingerprint)
    resumed = resume_point(run)
    first_step = resume.check(resumed, config, facts) if resumed else 0
    forced = resume.forced(resumed, config, facts) if resumed else []
    dist.first_rank_does(lambda: run.adopt(config))

    embedder, accelerator, engine = _build(settled, run, resumed)
    if resumed:
        resume.load_optimizer(resumed, engine)
        say(f"continuing after step {first_step} from {resumed}")
    if forced:
        say("\n  ".join([f"warning: training.resume_despite: the run goes on after step {first_step} over", *forced]))
    if dist.rank() == 0:
        write_json(run.manifest_file, manifest(run, config, data, settled.plan, first_step, forced))
    accelerator.init_trackers(config.run.name, {"config": dump_config(settled.config)})

    def evaluate_now(step: int | None) -> None:
        embedder.eval()  # no dropout
        evaluate(settled.config, run, data.encoder, engine, step)
        embedder.train()

    checkpoints = keeper.checkpoints = Checkpoints(run, engine, embedder, facts, config)
    trainer = Trainer(
        settled.config,
        run,
        data,
        engine,
        evaluate=evaluate_now,
        checkpoints=checkpoints,
        save_weights=lambda folder: checkpoint.save_weights(folder, engine, embedder),
        track=lambda values, step: accelerator.log(values, step=step),
        stop=stop,
        watch=watch,
    )
    if config.evaluation.before_training and first_step == 0:
        evaluate_now(0)
    finished = trainer.train(first_step)
    if finished == config.training.max_steps:
        watch.at(finished, "evaluation")
        evaluate_now(None)
        checkpoints.judge(finished, None)
        say(f"done in {time.monotonic() - started:.0f} s: {run.path}")
    asked = ", ".join(f"{reason} on rank {rank}" for rank, reason in enumerate(dist.gather_objects(stop.reason())) if reason)
    watch.stop()
    dist.barrier()  # the store that watches read may end with rank 0
    accelerator.end_training()
    return finished, asked


def _build(settled: Settled, run: RunDirectory, resumed: Path | None) -> tuple[Embedder, Any, Engine]:
    """The model, with the trained weights of a checkpoint, and the engine that trains it."""
    config, group = settled.config, settled.group
    torch.manual_seed(config.run.seed + dist.rank())
    # Before Accelerate: a ZeRO-3 launch makes transformers load into shards, which trained weights can't be put into.
    sharded = zero_stage(config, group) == 3 and dist.world_size() > 1
    shards = read_deepspeed_config(config, group) if sharded else None
    embedder = load_embedder(config.model, config.run.seed, resumed / "adapter" if resumed else None, shards)
    accelerator = make_accelerator(config, run.path, group)
    engine = make_engine(config, accelerator, embedder)
    dist.share_timeout()  # with the groups that DeepSpeed made
    return embedder, accelerator, engine


def say(text: str) -> None:
    if text and dist.rank() == 0:
        print(text, file=sys.stderr, flush=True)

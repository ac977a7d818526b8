"""A config -> a trained run directory: opens the data, builds the engine, resumes, trains, and keeps the status true.

Knows no metric: what evaluates a model is handed in by the door.
"""

import os
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import torch

from hybrid_scale import dist
from hybrid_scale.base_files import fetch
from hybrid_scale.checkpoints import complete, resume_point
from hybrid_scale.config import RunConfig, dump_config
from hybrid_scale.data.text import TextEncoder, limits_of_run
from hybrid_scale.errors import ConfigError, HybridScaleError, describe, explain
from hybrid_scale.model.acceptance import accept
from hybrid_scale.model.embedder import Embedder
from hybrid_scale.model.load import load_embedder
from hybrid_scale.runs import RunDirectory, read_json, write_json
from hybrid_scale.signals import EXIT_CODE, LISTENER, NOTICE, REQUESTS
from hybrid_scale.train import checkpoint, resume
from hybrid_scale.train.batches import open_training_data
from hybrid_scale.train.checkpoint import Checkpoints
from hybrid_scale.train.engine import Engine, make_accelerator, make_engine, read_deepspeed_config, zero_stage
from hybrid_scale.train.loop import Trainer
from hybrid_scale.train.manifest import manifest
from hybrid_scale.train.settle import Settled, announcement, seen_gpu, settle
from hybrid_scale.train.stop import StopRequest, deadline, too_short_for
from hybrid_scale.train.watch import EXIT_CODE as LOST
from hybrid_scale.train.watch import RankLost, Watch

ABORTED = 130
"""Exit code of a run that a second Ctrl-C ended before its state was saved, as shells count it."""
Evaluate = Callable[[RunConfig, RunDirectory, TextEncoder, Engine, int | None], None]


def train(config: RunConfig, evaluate: Evaluate) -> None:
    """Train to the end. The run directory says so, or why it failed. A run that was done before is left as it is, and said to be.

    Where a rank is asked to stop, a thread saves and ends the process instead, with exit code signals.EXIT_CODE, or ABORTED.
    """
    if config.training.engine == "deepspeed" and not dist.launched():
        started = f"; this one was started by {by}" if (by := dist.alone_by()) else ""
        rule = f"DeepSpeed needs a launcher that starts ranks, even for one process{started}"
        remedy = "Use `accelerate launch --use_deepspeed ... launch/train.py` without --cpu, or training.engine=plain."
        raise ConfigError(describe("training.engine", "deepspeed", rule, remedy))
    run = RunDirectory(config.run.directory)
    dist.first_rank_does(lambda: run.create(config, continuing=True))
    if dist.first_rank_does(lambda: is_finished(run, config)):
        say(f"{run.path}: all {config.training.max_steps} steps of this run and its evaluation are done; nothing is left to do")
        return
    stop = StopRequest(deadline(config.training, say=say))
    here = LISTENER.start((*REQUESTS, NOTICE))  # launch/train.py has done so, before it loaded the libraries
    try:
        _train_or_say_why(config, run, evaluate, stop)
    finally:
        if here:
            LISTENER.stop()


def is_finished(run: RunDirectory, config: RunConfig) -> bool:
    """Whether nothing is left of this run: trained to its last step and scored on every set, as its status says."""
    status = run.status()
    if status["status"] != "done" or status.get("step", 0) < config.training.max_steps or not complete(run):
        return False
    return all(_is_scored(run.evaluation_file(Path(directory).name), config) for directory in config.data.scored)


def _is_scored(file: Path, config: RunConfig) -> bool:
    """Whether the file is there, and says that its texts were cut where the config cuts them.

    An older version's result doesn't say it: its texts were cut where the training's are.
    """
    if not file.is_file():
        return False
    lengths = read_json(file).get("text_lengths") or {}
    return all(lengths.get(f"max_{role}_tokens") == most for role, most in limits_of_run(config).items())


def _train_or_say_why(config: RunConfig, run: RunDirectory, evaluate: Evaluate, stop: StopRequest) -> None:
    first = dist.rank() == 0  # asked now: at the end the process group is gone
    if first:
        run.set_status("running", world_size=dist.world_size())
    keeper = Keeper(run, stop)
    watch = keeper.watch = Watch(config.training.rank_timeout_seconds, keeper.end)
    watch.start()
    stop.start(keeper.stopped)
    LISTENER.hear(keeper.heard)
    try:
        _train(config, run, evaluate, stop, watch, keeper)
    except BaseException as error:
        stop.close()
        explained = keeper.failed(error)
        if explained is error:
            raise
        raise explained from error
    if first:
        run.set_status("done", step=config.training.max_steps)


class Keeper:
    """Leaves the run directory in order when the run ends early: a checkpoint being written is finished, the status says why."""

    watch: Watch

    def __init__(self, run: RunDirectory, stop: StopRequest):
        self.run, self.stop = run, stop
        self.checkpoints: Checkpoints | None = None
        self.accelerator: Any = None

    def end(self, reason: str, writes: bool) -> None:
        if self.checkpoints is not None:
            self.checkpoints.close()
        if writes:
            with suppress(FileNotFoundError):  # where nobody can tell who lives, several ranks write the same
                self.run.set_status("failed", reason=reason)

    def failed(self, error: BaseException) -> BaseException:
        """After an error of this rank: the status says why, the others know. Returns what is to be said: it, or a RankLost."""
        lost = self.watch.explain(error)
        if lost is None:
            self.watch.stop()
            self.end(f"{type(error).__name__}: {error}", writes=True)
            return error
        self.end(f"RankLost: {lost}", self.watch.writes())
        return lost

    def heard(self, number: int) -> None:
        """A signal, in its listener's thread: a stop; Ctrl-C once more ends what isn't being saved, a third time that too."""
        self.stop.heard(number)
        if self.stop.repeated > 1 or (self.stop.repeated and not self.stop.ending):
            if dist.rank() == 0:
                reason = f"aborted by Ctrl-C before the state was saved; the same command goes on after step {self._on_disk()}"
                self.run.set_status("failed", reason=reason)
                say(reason)
            os._exit(ABORTED)

    def stopped(self, steps: int | None) -> NoReturn:
        """In the stop's thread: save the state after `steps` steps (None: nothing was trained yet), say so, end the process."""
        code = EXIT_CODE
        try:
            self.watch.ends()
            if self.checkpoints is not None and steps is not None:
                self.checkpoints.save_last(steps)
            self.stop.leave_together(lambda: self._say_stopped(self._on_disk() if steps is None else steps))
        except BaseException as error:
            code = said(self.failed(error))
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def _say_stopped(self, step: int) -> None:
        self.run.set_status("preempted", step=step, reason=self.stop.why)
        say(f"stopped after step {step}: {self.stop.why}; the same command goes on from there")
        for tracker in self.accelerator.trackers if self.accelerator else ():
            tracker.finish()

    def _on_disk(self) -> int:
        """Steps finished at the newest checkpoint."""
        folders = complete(self.run)
        return int(folders[-1].name.removeprefix("step_")) if folders else 0


def said(error: BaseException) -> int:
    """Say what ended this process; its exit code, as launch/train.py has it."""
    if isinstance(error, RankLost):
        print(f"error: rank {dist.rank()}: {error}", file=sys.stderr, flush=True)
        return LOST
    if isinstance(error, HybridScaleError | OSError):
        print(f"error: rank {dist.rank()}: {explain(error)}", file=sys.stderr, flush=True)
        return 2
    traceback.print_exception(error)
    return 1


def _train(config: RunConfig, run: RunDirectory, evaluate: Evaluate, stop: StopRequest, watch: Watch, keeper: Keeper) -> None:
    """From data to the last evaluation; afterwards the process group has ended."""
    started, world = time.monotonic(), dist.world_size()
    fetch(config.model)
    dist.first_rank_does(lambda: say("\n".join(accept(config))))
    data = open_training_data(config, world)
    seen = seen_gpu(config)
    settled = dist.first_rank_does(lambda: settle(config, data, seen, world, dist.local_world_size()))
    dist.first_rank_does(lambda: say(announcement(settled, data, world)))
    if short := too_short_for(settled.counts.trained):
        say(short)
    facts = resume.facts_of(config, data.pairs.fingerprint, data.sampler.repetitions)
    resumed = resume_point(run)
    first_step = resume.check(resumed, config, facts) if resumed else 0
    forced = resume.forced(resumed, config, facts) if resumed else []
    dist.first_rank_does(lambda: run.adopt(config))
    if torn := dist.first_rank_does(lambda: run.rewind_metrics(first_step)):
        say(f"warning: {run.metrics_file}: {torn} torn lines, left by a start that was killed or a full disk, were left out")

    embedder, accelerator, engine = _build(settled, run, resumed)
    if resumed:
        resume.load_optimizer(resumed, engine)
        say(f"continuing after step {first_step} from {resumed}")
    if forced:
        say("\n  ".join([f"warning: training.resume_despite: the run goes on after step {first_step} over", *forced]))
    if dist.rank() == 0:
        write_json(run.manifest_file, manifest(run, config, data, settled.plan, first_step, forced))
    accelerator.init_trackers(config.run.name, {"config": dump_config(settled.config)})
    keeper.accelerator = accelerator

    def evaluate_now(step: int | None) -> None:
        embedder.eval()  # no dropout
        evaluate(settled.config, run, data.encoder, engine, step)
        embedder.train()

    checkpoints = keeper.checkpoints = Checkpoints(run, engine, embedder, facts, config, first_step)
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
    watch.at(finished, "evaluation")
    evaluate_now(None)
    checkpoints.judge(finished, None)
    stop.agreed()  # from here on no rank is asked any more
    stop.close()
    say(f"done in {time.monotonic() - started:.0f} s: {run.path}")
    watch.stop()
    dist.barrier()  # the store that watches read may end with rank 0
    accelerator.end_training()


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

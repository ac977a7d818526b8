"""Save in the background, prune, keep the best. Knows neither an engine's inside nor what a run must agree on.

A step waits for a copy of the rank's own share (`snapshot`); gathering, hashing and writing happen in a thread of each rank. A
checkpoint is written beside its place, made durable and renamed. Its last file, COMPLETE, holds the SHA-256 of every other
one; a folder that disagrees with it is not a checkpoint. `checkpoints/best` points at the folder that scored best so far.
"""

import os
import shutil
import threading
import time
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file

from hybrid_scale import dist
from hybrid_scale.checkpoints import COMPLETE, best, complete, folder_name, sha256_of
from hybrid_scale.config import RunConfig
from hybrid_scale.errors import HybridScaleError, RunError, describe
from hybrid_scale.model.embedder import Embedder
from hybrid_scale.model.export import save_trained
from hybrid_scale.runs import RunDirectory, read_json, readable, write_json
from hybrid_scale.train.engine import Engine
from hybrid_scale.train.snapshot import Snapshot, State

WHOLE, IN_PROGRESS, FAILED = range(3)
"""States of a rank's part; the largest of all ranks is that of the checkpoint."""
ASKED_SECONDS = 1.0
"""How often ranks that wait for a checkpoint ask each other how it stands."""
GATHER_SECONDS = 10.0
"""For how long a run that ends early lets a checkpoint be gathered, for which every other rank must be alive."""
LOWER_IS_BETTER = ("rank_distance", "rank_distance_normalised")


# ------------------------------------------------------------------------------------------------------------------ writing


class Checkpoints:
    """The checkpoints of a run in progress, written in a thread of each rank while training goes on, one at a time.

    Methods are collective where nothing else is said. Make it before the first step.
    """

    def __init__(
        self, run: RunDirectory, engine: Engine, embedder: Embedder, facts: dict[str, Any], config: RunConfig, first_step: int = 0
    ):
        self.run, self.embedder, self.facts = run, embedder, facts
        self.saved = first_step
        """Steps finished at the latest checkpoint, one in progress included; 0: there is nothing to save yet."""
        self.keep, self.criterion = config.training.keep_checkpoints, config.training.keep_best
        self.snapshot, self.side = Snapshot(engine), dist.SideGroup()
        self.pending: Future[dict[str, float]] | None = None
        self.written: list[dict[str, float]] = []
        """Of each checkpoint on this rank: `step`, and seconds since `save` was called: `waited` until it returned, `seconds`
        until it was whole on disk (on other ranks than 0: until their part was handed over)."""
        self._waited = 0.0
        self._thread: threading.Thread | None = None
        self._writing = threading.Event()

    def save(self, step: int) -> None:
        """Copy this rank's share of the state after `step` finished steps; everything else happens in the background.

        Waits for the checkpoint before, whose RunError is raised on every rank.
        """
        started = time.monotonic()
        self.finish()
        self.snapshot.mark()
        self.snapshot.copy()
        self.saved = step
        self.pending, self._writing = Future(), threading.Event()
        given = (step, started, self.pending, self._writing)
        self._thread = threading.Thread(target=self._work, args=given, name="checkpoint", daemon=True)
        self._thread.start()
        self._waited = time.monotonic() - started

    def mark(self) -> None:
        """A step has ended: what `save_last` saves is the state as it is now. Not collective."""
        self.snapshot.mark()

    def save_last(self, step: int) -> None:
        """Make sure of a checkpoint of the state at `Snapshot.mark`, after `step` finished steps, and wait until it is whole.

        For a thread beside the training, in which every rank calls it while the training stands between two updates. Raises
        what was raised in making it, on the rank where it was.
        """
        pending = self.pending
        if self._thread is not None:
            self._thread.join()
        if pending is not None and pending.done():
            pending.result()
        if self.saved != step:
            self.snapshot.copy()
            self.saved, last = step, Future[dict[str, float]]()
            self._work(step, time.monotonic(), last, threading.Event())
            last.result()

    def _work(self, step: int, started: float, pending: "Future[dict[str, float]]", writing: threading.Event) -> None:
        try:
            state = self.snapshot.whole(self.side)
            writing.set()
            if state is not None:
                write(self.run.checkpoints / folder_name(step), self.embedder, state, {"step": step, **self.facts})
            seconds = time.monotonic() - started
            if state is not None:
                prune(self.run, self.keep)
            pending.set_result({"step": step, "seconds": seconds})
        except Exception as error:
            pending.set_exception(error)

    def failed(self) -> bool:
        """Whether the checkpoint in progress has failed by now, on this rank. Not collective."""
        return self.pending is not None and self.pending.done() and self.pending.exception() is not None

    def finish(self) -> None:
        """Wait for the checkpoint in progress. Raises its RunError on every rank."""
        if self.pending is None:  # on all ranks or on none
            return
        while (state := dist.max_int(self._state())) == IN_PROGRESS:
            wait([self.pending], ASKED_SECONDS)  # no longer: where a rank fails, the others may wait for its part for good
        if state == FAILED:
            dist.together(self._raise)
        self.written.append({**self.pending.result(), "waited": self._waited})
        self.pending = None

    def _state(self) -> int:
        assert self.pending is not None
        return FAILED if self.failed() else WHOLE if self.pending.done() else IN_PROGRESS

    def _raise(self) -> None:
        """This rank's failure, if it has one, as a RunError."""
        error = self.pending.exception() if self.pending is not None and self.pending.done() else None
        if error is None:
            return
        if isinstance(error, HybridScaleError) or dist.is_lost_connection(error):
            raise error  # of a lost rank: the watch says which
        said = f"{type(error).__name__}: {error}"
        raise RunError(describe("checkpoint", said, f"rank {dist.rank()} could not make its part")) from error

    def close(self) -> None:
        """Let a checkpoint that is being written be finished, whatever becomes of it. Not collective.

        One that is still being gathered gets GATHER_SECONDS: another rank may have gone.
        """
        if self._thread is not None:
            self._thread.join(GATHER_SECONDS)
            if self._writing.is_set():
                self._thread.join()

    def judge(self, step: int, evaluated: int | None) -> None:
        """After an evaluation of the weights of `step`: point `best` at their checkpoint if none scored better.

        `evaluated`: the step in the evaluation's file name. Raises RunError when `training.keep_best` names nothing in it.
        """
        if self.criterion is not None:
            criterion = self.criterion
            self.finish()
            dist.first_rank_does(lambda: _judge(self.run, criterion, step, evaluated))


def save_weights(folder: Path, engine: Engine, embedder: Embedder) -> None:
    """The trained weights alone, as in a checkpoint's `adapter/`. Collective."""
    weights = engine.weights(keep=dist.rank() == 0)
    dist.first_rank_does(lambda: save_trained(embedder, weights, folder))


def write(folder: Path, embedder: Embedder, state: State, facts: dict[str, Any]) -> None:
    """Write a checkpoint whole or not at all; `facts` become its trainer.json.

    Raises RunError with the system's reason (a full disk, say).
    """
    beside = folder.with_name(f".{folder.name}.part")
    try:
        shutil.rmtree(beside, ignore_errors=True)
        (beside / "engine").mkdir(parents=True)
        save_trained(embedder, state.weights, beside / "adapter")
        save_file(state.moments, beside / "engine" / "moments.safetensors")
        save_file(state.random, beside / "engine" / "random.safetensors")
        write_json(beside / "trainer.json", facts)
        readable(beside)
        _seal(beside)
        _remove(folder)  # a damaged one: training goes on from the newest whole checkpoint, so a whole one isn't written again
        os.replace(beside, folder)
        _sync(folder.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(beside, ignore_errors=True)
        free = shutil.disk_usage(folder.parent).free if folder.parent.is_dir() else 0
        rule = f"the checkpoint could not be written ({free / 2**20:.1f} MiB are free there)"
        remedy = "Older checkpoints are untouched; make room and start the same command again."
        raise RunError(describe(str(folder), str(error), rule, remedy)) from error


def _seal(folder: Path) -> None:
    """Make every file durable, then COMPLETE: lines of `sha256sum`, after their number."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    for path in [*paths, *(path for path in folder.rglob("*") if path.is_dir()), folder]:
        _sync(path)
    lines = [f"{sha256_of(path)}  {path.relative_to(folder).as_posix()}" for path in paths]
    (folder / COMPLETE).write_text("\n".join([f"# {len(lines)} files", *lines, ""]), encoding="utf-8")
    _sync(folder / COMPLETE)
    _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(folder: Path) -> None:
    (folder / COMPLETE).unlink(missing_ok=True)  # first, so that a half removed folder is not taken for a checkpoint
    shutil.rmtree(folder, ignore_errors=True)


def prune(run: RunDirectory, keep: int) -> None:
    """Remove all but the `keep` newest folders and the one that `best` names, and what failed writes left behind."""
    chosen = best(run)
    for folder in complete(run)[:-keep]:
        if folder != chosen:
            _remove(folder)
    for left in [*run.checkpoints.glob(".step_*.part"), *run.checkpoints.glob(".step_*.damaged")]:
        shutil.rmtree(left, ignore_errors=True)


# --------------------------------------------------------------------------------------------------------------------- best


def _judge(run: RunDirectory, criterion: str, step: int, evaluated: int | None) -> None:
    """Write the pointer if this evaluation is the best, or the folder of the best is gone. A tie stays with the older."""
    name, _, metric = criterion.partition(":")
    path = run.evaluation_file(name, evaluated)
    metrics = read_json(path)["metrics"] if path.is_file() else {}
    value = metrics.get(metric)
    if value is None:
        known = sorted(key for key, number in metrics.items() if number is not None) or "no such evaluation"
        raise RunError(describe("training.keep_best", criterion, f"{path} has no such metric", f"Found there: {known}."))
    sign = -1.0 if metric in LOWER_IS_BETTER else 1.0
    if best(run) is None or sign * value > sign * read_json(run.checkpoints / "best")["value"]:
        write_json(run.checkpoints / "best", {"folder": folder_name(step), "step": step, "metric": criterion, "value": value})

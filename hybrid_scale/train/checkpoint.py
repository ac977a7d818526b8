"""Save in the background, verify, load, prune. Knows the engine's methods, not what is behind them.

A checkpoint is written beside its place, made durable and renamed. Its last file, COMPLETE, holds the SHA-256 of every other
one; a folder that disagrees with it is not a checkpoint. `checkpoints/best` points at the folder that scored best so far.
"""

import hashlib
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from transformers.utils.hub import cached_file

from hybrid_scale import dist
from hybrid_scale.config import ModelSettings, RunConfig, validate
from hybrid_scale.errors import RunError, describe
from hybrid_scale.model.embedder import Embedder
from hybrid_scale.model.export import save_trained
from hybrid_scale.runs import RunDirectory, barred, read_json, write_json
from hybrid_scale.train.engine import Engine

COMPLETE = "COMPLETE"
WHOLE_BYTES = 16 * 2**20
"""Files of a base model up to this size are hashed whole, larger ones by samples."""
SAMPLES, SAMPLE_BYTES = 64, 2**16
LOWER_IS_BETTER = ("rank_distance", "rank_distance_normalised")


# ------------------------------------------------------------------------------------------------------------------ writing


@dataclass(frozen=True)
class State:
    """What a checkpoint holds, in host memory of rank 0."""

    step: int
    weights: dict[str, torch.Tensor]
    moments: dict[str, torch.Tensor]
    random: dict[str, torch.Tensor]
    facts: dict[str, Any]


class Checkpoints:
    """The checkpoints of a run in progress: rank 0 writes one in a thread while training goes on. Methods are collective."""

    def __init__(self, run: RunDirectory, engine: Engine, embedder: Embedder, facts: dict[str, Any], config: RunConfig):
        self.run, self.engine, self.embedder, self.facts = run, engine, embedder, facts
        self.keep, self.criterion = config.training.keep_checkpoints, config.training.keep_best
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.pending: Future[float] | None = None
        self.written: list[dict[str, float]] = []
        """Seconds of each checkpoint, on rank 0: `waited` in `save` (for the write before, and to gather), `written`."""
        self._waited, self._step = 0.0, 0

    def save(self, step: int) -> None:
        """Copy the state after `step` finished steps to rank 0's memory; write it, then prune, in the background.

        Raises RunError on every rank where the checkpoint before could not be written.
        """
        started = time.monotonic()
        self.finish()
        state = gather(self.engine, step, {"step": step, **self.facts})
        if dist.rank() == 0:
            self.pending = self.thread.submit(self._write, state)
        self._step, self._waited = step, time.monotonic() - started

    def _write(self, state: State) -> float:
        started = time.monotonic()
        write(self.run.checkpoints / folder_name(state.step), self.embedder, state)
        prune(self.run, self.keep)
        return time.monotonic() - started

    def failed(self) -> bool:
        """Whether a write has failed by now, on this rank. Not collective."""
        return self.pending is not None and self.pending.done() and self.pending.exception() is not None

    def finish(self) -> None:
        """Wait for the write in progress. Raises its RunError on every rank."""
        dist.first_rank_does(self._join)

    def _join(self) -> None:
        pending, self.pending = self.pending, None
        if pending is not None:
            self.written.append({"step": self._step, "waited": self._waited, "written": pending.result()})

    def close(self) -> None:
        """Let a write in progress end, whatever becomes of it. Not collective."""
        self.thread.shutdown(wait=True)

    def judge(self, step: int, evaluated: int | None) -> None:
        """After an evaluation of the weights of `step`: point `best` at their checkpoint if none scored better.

        `evaluated`: the step in the evaluation's file name. Raises RunError when `training.keep_best` names nothing in it.
        """
        if self.criterion is not None:
            criterion = self.criterion
            self.finish()
            dist.first_rank_does(lambda: _judge(self.run, criterion, step, evaluated))


def folder_name(step: int) -> str:
    return f"step_{step:08d}"


def gather(engine: Engine, step: int, facts: dict[str, Any]) -> State:
    """The state of all ranks, whole on rank 0 and empty on the others. Collective."""
    first = dist.rank() == 0
    weights, moments = engine.weights(keep=first), engine.moments(keep=first)
    random = {"cpu": dist.gather_arrays(torch.get_rng_state().numpy()[None, :])}
    if torch.cuda.is_available():
        random["cuda"] = dist.gather_arrays(torch.cuda.get_rng_state().numpy()[None, :])
    states = {f"{kind}_{rank}": torch.from_numpy(a[0].copy()) for kind, arrays in random.items() for rank, a in enumerate(arrays)}
    return State(step, weights, moments, states, facts)


def save_weights(folder: Path, engine: Engine, embedder: Embedder) -> None:
    """The trained weights alone, as in a checkpoint's `adapter/`. Collective."""
    weights = engine.weights(keep=dist.rank() == 0)
    dist.first_rank_does(lambda: save_trained(embedder, weights, folder))


def write(folder: Path, embedder: Embedder, state: State) -> None:
    """Write a checkpoint whole or not at all. Raises RunError with the system's reason (a full disk, say)."""
    beside = folder.with_name(f".{folder.name}.part")
    try:
        shutil.rmtree(beside, ignore_errors=True)
        (beside / "engine").mkdir(parents=True)
        save_trained(embedder, state.weights, beside / "adapter")
        save_file(state.moments, beside / "engine" / "moments.safetensors")
        save_file(state.random, beside / "engine" / "random.safetensors")
        write_json(beside / "trainer.json", state.facts)
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
    lines = [f"{_sha256(path)}  {path.relative_to(folder).as_posix()}" for path in paths]
    (folder / COMPLETE).write_text("\n".join([f"# {len(lines)} files", *lines, ""]), encoding="utf-8")
    _sync(folder / COMPLETE)
    _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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


def best(run: RunDirectory) -> Path | None:
    """The folder that `checkpoints/best` names, if it is there."""
    pointer = run.checkpoints / "best"
    if not pointer.is_file():
        return None
    try:
        folder = run.checkpoints / read_json(pointer)["folder"]
    except (KeyError, TypeError):
        raise RunError(describe(str(pointer), pointer.read_text(), "it names no folder", "Remove or mend it.")) from None
    return folder if (folder / COMPLETE).is_file() else None


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


# ------------------------------------------------------------------------------------------------------------------ reading


def complete(run: RunDirectory) -> list[Path]:
    """Folders with COMPLETE, oldest first; not verified."""
    found = [path for path in run.checkpoints.glob("step_*") if re.fullmatch(r"step_\d+", path.name)]
    return sorted(path for path in found if (path / COMPLETE).is_file())


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None where every file is what COMPLETE says."""
    try:
        first, *lines = (folder / COMPLETE).read_text(encoding="utf-8").splitlines()
        if first != f"# {len(lines)} files" or not lines:
            return f"{COMPLETE} lists {len(lines)} files where its first line reads {first!r}"
        for line in lines:
            digest, _, name = line.partition("  ")
            if not (folder / name).is_file():
                return f"{name} is missing"
            if _sha256(folder / name) != digest:
                return f"{name} ({(folder / name).stat().st_size} bytes) is not what was written: another SHA-256"
    except FileNotFoundError:
        return f"{COMPLETE} is missing"
    except (OSError, ValueError) as error:  # UnicodeDecodeError and an empty COMPLETE are ValueErrors
        return f"{COMPLETE} can't be read: {error}"
    return None


def latest(run: RunDirectory) -> Path | None:
    """The newest whole checkpoint, verified on rank 0; says which newer folders are not whole, and why. Collective."""
    found: Path | None = dist.first_rank_does(lambda: _latest(run))
    return found


def _latest(run: RunDirectory) -> Path | None:
    for folder in _newest_first(run):
        reason = damage(folder)
        if reason is None:
            return folder
        print(f"warning: {folder} is no checkpoint: {reason}. Trying the one before it.", file=sys.stderr, flush=True)
    return None


def _newest_first(run: RunDirectory) -> list[Path]:
    return sorted((path for path in run.checkpoints.glob("step_*") if re.fullmatch(r"step_\d+", path.name)), reverse=True)


def resume_point(run: RunDirectory) -> Path | None:
    """`latest`, for a run that goes on: newer folders, all damaged, are set aside so that they count for nothing. Collective.

    Raises RunError where there are checkpoints and none is whole: only a person may throw a run away.
    """

    def find() -> Path | None:
        found, folders = _latest(run), _newest_first(run)
        if found is None and folders:
            reasons = "; ".join(f"{folder.name}: {damage(folder)}" for folder in folders)
            remedy = "Restore a copy, or remove that folder to start from the beginning."
            raise RunError(describe(str(run.checkpoints), len(folders), f"no checkpoint there is whole ({reasons})", remedy))
        for folder in folders:
            if folder == found:
                break
            aside = folder.with_name(f".{folder.name}.damaged")
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(folder, aside)
        return found

    found: Path | None = dist.first_rank_does(find)
    return found


def facts_of(config: RunConfig, fingerprint: str) -> dict[str, Any]:
    """What a checkpoint remembers of its run, to be compared on resume. Collective."""
    return {
        "world_size": dist.world_size(),
        "data": {"directory": config.data.train, "fingerprint": fingerprint},
        "config": config.model_dump(mode="json"),
        "model": dist.first_rank_does(lambda: model_digests(config.model)),
    }


def check(folder: Path, config: RunConfig, facts: Mapping[str, Any]) -> int:
    """Steps finished at a checkpoint. Raises RunError that names each difference between its run and this one.

    Differences in a part of the run that `training.resume_despite` names are allowed; so are settings that can't change the
    curve (`runs.barred`).
    """
    trainer = read_json(folder / "trainer.json")
    before = validate(RunConfig, trainer["config"], str(folder / "trainer.json"))
    found, now = trainer["data"], facts["data"]
    differences = {
        "config": barred(before, config),
        "data": []
        if found["fingerprint"] == now["fingerprint"]
        else [f"data fingerprint: {found['fingerprint']} ({found['directory']}) -> {now['fingerprint']} ({now['directory']})"],
        "model": [
            f"model {name}: {trainer['model'].get(name, 'absent')} -> {facts['model'].get(name, 'absent')}"
            for name in sorted(trainer["model"].keys() | facts["model"].keys())
            if trainer["model"].get(name) != facts["model"].get(name)
        ],
    }
    refused = [part for part, lines in differences.items() if lines and part not in config.training.resume_despite]
    if refused:
        lines = "\n  ".join(line for part in refused for line in differences[part])
        raise RunError(
            f"{folder} belongs to another run:\n  {lines}\n"
            f"Restore that, choose another run.directory, or go on with training.resume_despite=[{', '.join(refused)}]."
        )
    return int(trainer["step"])


def model_digests(settings: ModelSettings) -> dict[str, str]:
    """`SIZE:SHA256` of each file that defines the base model: small files whole, weights by 64 samples of 64 KiB."""
    config = Path(str(cached_file(settings.base, "config.json", revision=settings.revision)))
    files = [path for path in sorted(config.parent.iterdir()) if path.suffix in (".json", ".safetensors", ".bin", ".model")]
    return {path.name: f"{path.stat().st_size}:{_sampled(path)}" for path in files}


def _sampled(path: Path) -> str:
    size, digest = path.stat().st_size, hashlib.sha256()
    if size <= WHOLE_BYTES:
        return _sha256(path)[:16]
    with open(path, "rb") as file:
        for start in np.linspace(0, size - SAMPLE_BYTES, SAMPLES).astype(np.int64).tolist():
            file.seek(start)
            digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()[:16]


class _Tensors(Mapping[str, torch.Tensor]):
    """The tensors of a file, read one at a time."""

    def __init__(self, path: Path):
        self.file = safe_open(path, framework="pt")

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor = self.file.get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.file.keys())

    def __len__(self) -> int:
        return len(self.file.keys())


def load_optimizer(folder: Path, engine: Engine) -> None:
    """Adam's moments and this rank's random state (kept where the number of ranks is the same)."""
    engine.load_moments(_Tensors(folder / "engine" / "moments.safetensors"))
    states = load_file(folder / "engine" / "random.safetensors")
    if sum(name.startswith("cpu_") for name in states) == dist.world_size():
        torch.set_rng_state(states[f"cpu_{dist.rank()}"])
        with suppress(KeyError):  # saved without a GPU
            if torch.cuda.is_available():
                torch.cuda.set_rng_state(states[f"cuda_{dist.rank()}"])

"""Save, find the latest complete one, load, prune. Knows the engine's six methods, not what is behind them.

A checkpoint is written beside its place and renamed; COMPLETE is its last file.
"""

import hashlib
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from hybrid_scale import dist
from hybrid_scale.config import RunConfig, dump_config
from hybrid_scale.errors import RunError
from hybrid_scale.model.embedder import Embedder
from hybrid_scale.model.export import save_trained
from hybrid_scale.runs import RunDirectory, read_json, write_json
from hybrid_scale.train.engine import Engine


def config_digest(config: RunConfig) -> str:
    return hashlib.sha256(dump_config(config).encode()).hexdigest()[:16]


def save(run: RunDirectory, engine: Engine, embedder: Embedder, step: int, facts: dict[str, Any], keep: int) -> None:
    """Write `checkpoints/step_N` after `step` finished steps, and remove all but the `keep` newest. Collective."""
    weights, moments = engine.weights(), engine.moments()
    random_states = dist.gather_arrays(torch.get_rng_state().numpy()[None, :])
    folder = run.checkpoints / f"step_{step:08d}"
    dist.first_rank_does(lambda: _write(folder, embedder, weights, moments, random_states, {"step": step, **facts}))
    dist.first_rank_does(lambda: _prune(run, keep))


def save_weights(folder: Path, engine: Engine, embedder: Embedder) -> None:
    """The trained weights alone, as in a checkpoint's `adapter/`. Collective."""
    weights = engine.weights()
    dist.first_rank_does(lambda: save_trained(embedder, weights, folder))


def _write(
    folder: Path,
    embedder: Embedder,
    weights: dict[str, torch.Tensor],
    moments: dict[str, torch.Tensor],
    random_states: list[np.ndarray],
    trainer: dict[str, Any],
) -> None:
    beside = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(beside, ignore_errors=True)
    (beside / "engine").mkdir(parents=True)
    save_trained(embedder, weights, beside / "adapter")
    save_file(moments, beside / "engine" / "moments.safetensors")
    states = {f"rank_{rank}": torch.from_numpy(state[0].copy()) for rank, state in enumerate(random_states)}
    save_file(states, beside / "engine" / "random.safetensors")
    write_json(beside / "trainer.json", trainer)
    for path in beside.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
    (beside / "COMPLETE").touch()
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(beside, folder)


def complete(run: RunDirectory) -> list[Path]:
    """Folders with COMPLETE, oldest first."""
    found = [path for path in run.checkpoints.glob("step_*") if re.fullmatch(r"step_\d+", path.name)]
    return sorted(path for path in found if (path / "COMPLETE").is_file())


def latest(run: RunDirectory) -> Path | None:
    folders = complete(run)
    return folders[-1] if folders else None


def _prune(run: RunDirectory, keep: int) -> None:
    for folder in complete(run)[:-keep]:
        shutil.rmtree(folder)


def check(folder: Path, config: RunConfig, fingerprint: str) -> int:
    """Steps finished at a checkpoint. Raises RunError when it belongs to other data or another config."""
    trainer = read_json(folder / "trainer.json")
    for what, found, now in (
        ("data fingerprint", trainer["data"], fingerprint),
        ("config digest", trainer["config"], config_digest(config)),
    ):
        if found != now:
            raise RunError(f"{folder}: {what} is {found}, this run's is {now}. Start a new run.directory.")
    return int(trainer["step"])


def load_optimizer(folder: Path, engine: Engine) -> None:
    """Adam's moments and this rank's random state (kept where the number of ranks is the same)."""
    engine.load_moments(load_file(folder / "engine" / "moments.safetensors"))
    states = load_file(folder / "engine" / "random.safetensors")
    if len(states) == dist.world_size():
        torch.set_rng_state(states[f"rank_{dist.rank()}"])

"""What a checkpoint must agree on with the run that goes on from it, and how its optimiser state is put back.

Knows neither how a checkpoint is written nor which one is the latest.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from hybrid_scale import dist, gpu
from hybrid_scale.config import RunConfig, validate
from hybrid_scale.errors import RunError, describe
from hybrid_scale.model.digests import agreed_digests, changes
from hybrid_scale.runs import barred, read_json
from hybrid_scale.train.engine import Engine


def facts_of(config: RunConfig, fingerprint: str, repetitions: int = 0) -> dict[str, Any]:
    """What a checkpoint remembers of its run, to be compared on resume. Collective.

    `fingerprint`: of the training data; `repetitions`: cross pairs that the sampler leaves out because others equal them.
    """
    return {
        "world_size": dist.world_size(),
        "data": {"directory": config.data.train, "fingerprint": fingerprint, "repetitions_left_out": repetitions},
        "config": config.model_dump(mode="json"),
        "model": agreed_digests(config.model),
    }


def check(folder: Path, config: RunConfig, facts: Mapping[str, Any]) -> int:
    """Steps finished at a checkpoint. Raises RunError that names each difference between its run and this one.

    Differences in a part of the run that `training.resume_despite` names are allowed (`forced` lists them); so are settings
    that can't change the curve (`runs.barred`).
    """
    found = _differences(folder, config, facts)
    refused = [part for part in found if part not in config.training.resume_despite]
    if refused:
        lines = "\n  ".join(line for part in refused for line in found[part])
        raise RunError(
            f"{folder} belongs to another run:\n  {lines}\n"
            f"Restore that, choose another run.directory, or go on with training.resume_despite=[{', '.join(refused)}]."
        )
    return int(read_json(folder / "trainer.json")["step"])


def forced(folder: Path, config: RunConfig, facts: Mapping[str, Any]) -> list[str]:
    """The differences that `training.resume_despite` lets a run go on over, one a line: `part: what: before -> now`."""
    return [f"{part}: {line}" for part, lines in _differences(folder, config, facts).items() for line in lines]


def _differences(folder: Path, config: RunConfig, facts: Mapping[str, Any]) -> dict[str, list[str]]:
    """Part of the run -> what differs in it, parts without a difference left out."""
    trainer = read_json(folder / "trainer.json")
    if lacking := [name for name in ("step", "config", "data", "model") if name not in trainer]:
        rule = f"an older version wrote this checkpoint, without {', '.join(lacking)}"
        remedy = "Go on with that version, or start in another run.directory."
        raise RunError(describe(str(folder / "trainer.json"), sorted(trainer), rule, remedy))
    before = validate(RunConfig, trainer["config"], str(folder / "trainer.json"))
    differences = {
        "config": barred(before, config),
        "data": _data_differences(trainer["data"], facts["data"]),
        "model": changes(trainer["model"], facts["model"]),
    }
    return {part: lines for part, lines in differences.items() if lines}


def _data_differences(found: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    if found["fingerprint"] != now["fingerprint"]:
        return [f"data fingerprint: {found['fingerprint']} ({found['directory']}) -> {now['fingerprint']} ({now['directory']})"]
    before, after = (each.get("repetitions_left_out", 0) for each in (found, now))  # an earlier version left none out
    return [] if before == after else [f"cross pairs left out because others equal them: {before:,} -> {after:,}"]


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
        gpu.set_random_state(states.get(f"cuda_{dist.rank()}"))  # None: saved without a GPU

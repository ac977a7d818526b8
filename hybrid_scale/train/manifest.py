"""`manifest.json`: where, by which code and on what data a run was started."""

import platform
import socket
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hybrid_scale import dist, gpu
from hybrid_scale.config import RunConfig
from hybrid_scale.planning.forecast import RunPlan
from hybrid_scale.planning.planner import for_manifest
from hybrid_scale.runs import RunDirectory, read_json
from hybrid_scale.train.batches import TrainingData

PACKAGES = ("torch", "deepspeed", "accelerate", "transformers", "peft", "bitsandbytes")


def manifest(
    run: RunDirectory, config: RunConfig, data: TrainingData, plan: RunPlan | None, first_step: int, forced: list[str]
) -> dict[str, Any]:
    """What the file says of this start: `plan` is the planner's where it chose, `forced` what the run goes on over."""
    despite = forced_before(run) + ([{"after_step": first_step, "differences": forced}] if forced else [])
    chosen = {"planned": for_manifest(plan)} if plan else {}
    return started(config, data) | chosen | ({"resumed_despite": despite} if despite else {})


def started(config: RunConfig, data: TrainingData) -> dict[str, Any]:
    """Where, by which code and on what data this process runs."""
    return {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "host": socket.gethostname(),
        "world_size": dist.world_size(),
        "device": gpu.name() or platform.processor() or platform.machine(),
        "commit": commit(Path(__file__).parents[2]),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
        "data": {"directory": config.data.train, "fingerprint": data.pairs.fingerprint},
        "batches": {**data.sampler.describe(), "negatives a row": config.negatives_a_row},
    }


def commit(checkout: Path) -> str | None:
    """The commit of a checkout, `-dirty` behind it where tracked files were changed; None: no checkout, or no git."""
    if not (checkout / ".git").exists():  # or git would answer for a repository around it
        return None
    command = ["git", "-C", str(checkout), *["describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def forced_before(run: RunDirectory) -> list[dict[str, Any]]:
    """What earlier starts of this run went on over, by `training.resume_despite`."""
    return list(read_json(run.manifest_file).get("resumed_despite", [])) if run.manifest_file.is_file() else []

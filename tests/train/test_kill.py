"""Real processes, killed: every restart goes on from the last whole checkpoint, and the end is what it would have been."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from hybrid_scale.config import RunConfig
from hybrid_scale.runs import RunDirectory
from tests.train.kills import Campaign, losses
from tests.train.setup import make_config, write_inputs, zero

STEPS = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("kill"))


def config_of(folder: Path, place: Path, **sections: dict[str, Any]) -> RunConfig:
    """ZeRO-3, NF4, LoRA with dropout, a checkpoint every second step, three kept."""
    training = {
        **{"engine": "deepspeed", "deepspeed": zero(3, folder), "max_steps": STEPS, "max_tokens_per_micro_batch": 512},
        **{"save_every_steps": 2, "keep_checkpoints": 3, "rank_timeout_seconds": 60.0},
    }
    model = {"quantization": "nf4", "lora": {"rank": 4, "dropout": 0.1}}
    sections = {"model": model, **sections}
    return make_config(folder, run={"directory": str(place)}, training=training, **sections)


def adapter(run: RunDirectory) -> dict[str, np.ndarray]:
    return load_file(run.checkpoints / f"step_{STEPS:08d}" / "adapter" / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def whole(folder: Path) -> RunDirectory:
    """The same run, undisturbed."""
    campaign = Campaign(config_of(folder, folder / "whole"), random.Random(0))
    campaign.finish()
    return campaign.run


def test_kills_and_damage_change_nothing(folder, tmp_path, whole):
    """One event of each kind on two ranks; then every loss of every start and the adapter are those of the undisturbed run."""
    campaign = Campaign(config_of(folder, tmp_path / "run"), random.Random(2), exact=True)
    for kind in ("terminate", "flip", "kill one", "full", "kill in a write", "truncate"):
        campaign.event(kind)
    campaign.finish()
    assert losses(campaign.run) == losses(whole)
    assert list(losses(whole)) == list(range(1, STEPS + 1))
    for name, weight in adapter(campaign.run).items():
        assert np.array_equal(weight, adapter(whole)[name]), name


def test_killed_runs_go_on_with_other_ranks(folder, tmp_path):
    """2 -> 1 -> 4 ranks, killed between: the curve of two ranks, to float32 rounding."""
    model = {"model": {"quantization": "nf4", "lora": {"rank": 4}}}
    straight = Campaign(config_of(folder, tmp_path / "straight", **model), random.Random(0))
    straight.finish()
    campaign = Campaign(config_of(folder, tmp_path / "run", **model), random.Random(3), exact=True)
    campaign.event("kill all", 2)
    campaign.event("kill all", 1)
    campaign.finish(4)
    before, after = losses(straight.run), {r["step"]: r["loss"] for r in campaign.run.metrics()}
    assert list(after) == list(before)
    assert list(after.values()) == pytest.approx(list(before.values()), abs=5e-5)

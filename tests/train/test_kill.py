"""Real processes, killed: every restart goes on from the last whole checkpoint, and the end is what it would have been."""

import os
import random
import re
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from hybrid_scale import dist
from hybrid_scale.config import RunConfig
from hybrid_scale.runs import RunDirectory
from hybrid_scale.train.watch import Watch
from tests.ranks import RanksFailed, run_ranks
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
        **{"save_every_steps": 2, "keep_checkpoints": 3, "rank_timeout_seconds": 30.0},
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
    campaign = Campaign(config_of(folder, tmp_path / "run"), random.Random(2))
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
    campaign = Campaign(config_of(folder, tmp_path / "run", **model), random.Random(3))
    campaign.event("kill all", 2)
    campaign.event("kill all", 1)
    campaign.finish(4)
    before, after = losses(straight.run), {r["step"]: r["loss"] for r in campaign.run.metrics()}
    assert list(after) == list(before)
    assert list(after.values()) == pytest.approx(list(before.values()), abs=5e-5)


# ------------------------------------------------------------------------------------------------------ heartbeats, no training


def watched(how: str, folder: str) -> None:
    """Two ranks; one does `how`, the other waits for it in a collective for good."""
    dist.start()
    out = Path(folder) / f"rank{dist.rank()}"

    def ending(reason: str, writes: bool) -> None:
        out.write_text(f"{writes} {reason}")

    watch = Watch(3.0, ending)
    watch.start()
    watch.at(7, "data")
    dist.barrier()
    if dist.rank() == (0 if how == "stop 0" else 1):
        if how.startswith("stop"):
            while any(note.get("step") != 7 for note in watch.known):
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGSTOP)
        if how == "fail":
            watch.explain(ValueError("its own error"))
        time.sleep(60)
    watch.at(7, "gradient")
    dist.barrier()


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("stop 0", r"True RankLost: rank 0 \(host \S+\)(: step 7| or the store that it keeps has not been heard of for \d+ s)"),
        ("stop 1", r"True RankLost: rank 1 \(host \S+\)(: step 7 has been in its phase 'data'| has not been heard of for \d+ s)"),
        ("hang", r"True RankLost: rank 1 \(host \S+\): step 7 has been in its phase 'data' for \d+ s"),
        ("fail", r"True RankLost: rank 1 \(host \S+\) failed: ValueError: its own error"),
    ],
)
def test_a_rank_that_stands_still_is_named(tmp_path, how, said):
    """A suspended rank is silent and stays in its phase: which of the two is noticed first is a matter of the moment."""
    with pytest.raises(RanksFailed, match="exit code 4"):
        run_ranks(watched, 2, how, str(tmp_path), timeout=50)
    assert re.match(said, (tmp_path / ("rank1" if how == "stop 0" else "rank0")).read_text())

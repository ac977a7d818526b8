"""Groups of GPUs that share one copy of the weights: what the settings ask of DeepSpeed, and that training stays the same.

Four real ranks. The DeepSpeed JSON is ds_configs/zero_auto.json with element counts for a model of 32 hidden units: weights are
shared, prefetched and let go, adapters stay.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hybrid_scale import dist
from hybrid_scale.config import RunConfig
from hybrid_scale.errors import ConfigError
from hybrid_scale.model.load import load_embedder
from hybrid_scale.planning.costs import MemoryNeed, ParameterCounts
from hybrid_scale.train.batches import build_share, open_training_data, plan_step
from hybrid_scale.train.engine import make_accelerator, make_engine, read_deepspeed_config, shard_group, zero_stage
from hybrid_scale.train.gradcache import forward_backward
from hybrid_scale.train.loss import Targets
from tests.ranks import ROOT, run_ranks
from tests.train.setup import make_config, write_inputs
from tests.train.test_step import SCHEDULES, check, distance, nonzero_adapter

STEPS = 4
AUTO = ROOT / "ds_configs" / "zero_auto.json"
SMALL = {
    "reduce_bucket_size": 1000,
    "stage3_prefetch_bucket_size": 600,
    "stage3_param_persistence_threshold": 200,  # an adapter has 64 to 384 weights: some stay, some don't
    "stage3_max_live_parameters": 3000,  # a layer has 2,304 elements
    "stage3_max_reuse_distance": 5000,
    "overlap_comm": False,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = write_inputs(tmp_path_factory.mktemp("groups"))
    tree = json.loads(AUTO.read_text())
    tree["zero_optimization"].update(SMALL)
    (place / "auto.json").write_text(json.dumps(tree))
    return place


def sections(folder: Path, group: int | str | None, schedule: str = "kept") -> dict[str, dict[str, Any]]:
    auto = {"engine": "deepspeed", "deepspeed": str(folder / "auto.json"), "shard_group": group}
    model = {"quantization": "nf4", "gradient_checkpointing": True}
    return {"model": model, "training": {**(auto if group else {}), **SCHEDULES[schedule]}}


@pytest.mark.parametrize("group", [1, 2, 4])
def test_gradients_equal_dense(folder, group):
    """NF4 + LoRA on four ranks, several graphs kept, against one dense process."""
    ran, rounds = check(folder, 4, **sections(folder, group))
    assert ran == "kept"
    assert rounds > 2


def steps_on_this_rank(tree: str) -> dict[str, Any]:
    """Some optimiser steps with an evaluation pass between them: losses, how the trained weights moved, how ZeRO shares."""
    config = RunConfig.model_validate_json(tree)
    dist.start()
    data = open_training_data(config, dist.world_size())
    embedder = load_embedder(config.model, config.run.seed)
    nonzero_adapter(embedder)
    engine: Any = make_engine(config, make_accelerator(config, Path(config.run.directory)), embedder)
    start, losses, evaluated = engine.weights(), [], []
    for number in range(STEPS):
        step = plan_step(data, config, dist.world_size(), number)
        share = build_share(data, step, dist.rank())
        losses.append(forward_backward(engine, share, step.plan, Targets.of(step.batch, dist.device()), config.loss))
        engine.step(1e-3)
        embedder.eval()
        with torch.no_grad():
            evaluated.append(engine.embed(data.encoder.collate([[5, 6, 7], [8, 9]])).numpy())
        embedder.train()
    moved = {name: (weight - start[name]).numpy() for name, weight in engine.weights().items()}
    base = next(p for name, p in embedder.named_parameters() if "base_layer" in name)
    second = getattr(base, "ds_secondary_tensor", None)
    shares = (getattr(engine, "stage", 0), None if second is None else base.ds_numel / second.numel())
    return {"losses": losses, "moved": moved, "evaluated": np.stack(evaluated), "shares": shares, "rounds": step.plan.rounds}


@pytest.fixture(scope="module")
def reference(folder) -> dict[str, Any]:
    """The same steps by one plain process."""
    tree = make_config(folder, **sections(folder, None)).model_dump_json()
    return run_ranks(steps_on_this_rank, 1, tree)[0]


@pytest.mark.parametrize(("group", "shares"), [(1, (2, None)), (2, (3, 2.0)), (4, (3, None))])
def test_training_equals_a_plain_process(folder, reference, group, shares):
    """Weights that stay on the ranks or in the group are those of the last update: losses and passes agree step by step."""
    tree = make_config(folder, **sections(folder, group)).model_dump_json()
    for result in run_ranks(steps_on_this_rank, 4, tree):
        assert result["shares"] == shares
        assert result["losses"] == pytest.approx(reference["losses"], rel=2e-5)
        assert np.abs(result["evaluated"] - reference["evaluated"]).max() < 2e-5
        for name, moved in result["moved"].items():
            assert distance(moved, reference["moved"][name]) < 1e-3, name
    assert np.abs(np.diff(reference["evaluated"], axis=0)).max() > 1e-2


# Settings


def filled(folder: Path, group: int | str, world: int, resolved: int | None = None) -> tuple[int, int]:
    config = make_config(folder, **sections(folder, group))
    zero = read_deepspeed_config(config, resolved, world)["zero_optimization"]
    assert zero_stage(config, resolved, world) == zero["stage"]
    return zero["stage"], zero["zero_hpz_partition_size"]


def test_group_fills_stage_and_hpz(folder):
    assert filled(folder, 1, 8) == (2, 1)
    assert filled(folder, 2, 8) == (3, 2)
    assert filled(folder, 8, 8) == (3, 1)
    assert filled(folder, 1, 1) == (2, 1)
    assert filled(folder, "auto", 16, resolved=4) == (3, 4)


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({"shard_group": None}, "training.shard_group: found None; .*auto.json leaves"),
        ({"shard_group": 3}, "training.shard_group: found 3; must divide the 8 ranks"),
        ({"shard_group": 16}, "training.shard_group: found 16; must divide the 8 ranks"),
        ({"shard_group": 2, "deepspeed": "ds_configs/zero3.json"}, "found 2; ds_configs/zero3.json states stage 3 itself"),
    ],
)
def test_contradictions_are_refused(folder, monkeypatch, training, message):
    monkeypatch.chdir(ROOT)
    config = make_config(folder, training={"engine": "deepspeed", "deepspeed": str(folder / "auto.json"), **training})
    with pytest.raises(ConfigError, match=message):
        read_deepspeed_config(config, None, 8)


@pytest.mark.parametrize("zero", [{"stage": 3}, {"zero_hpz_partition_size": 2}])
def test_half_an_auto_is_refused(folder, zero):
    tree = json.loads((folder / "auto.json").read_text())
    tree["zero_optimization"].update(zero)
    path = folder / "half.json"
    path.write_text(json.dumps(tree))
    config = make_config(folder, training={"engine": "deepspeed", "deepspeed": str(path), "shard_group": 2})
    with pytest.raises(ConfigError, match='both are "auto" or none is'):
        read_deepspeed_config(config, None, 8)


def need() -> MemoryNeed:
    """Llama-3.1-70B with 4096 tokens of activations."""
    return MemoryNeed(ParameterCounts(68_451_000_000, 1_051_000_000, 207_100_000), 2, 4096 * 1.982e6)


def test_auto_asks_the_stated_memory(folder):
    for gib, expected in ((80, 1), (40, 2), (24, 8)):
        config = make_config(folder, training={**sections(folder, "auto")["training"], "gpu_memory_gib": gib})
        assert shard_group(config, need, 16, 8) == expected


def test_auto_without_a_gpu_needs_its_memory(folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"training.gpu_memory_gib: found None; .*no GPU here"):
        shard_group(make_config(folder, **sections(folder, "auto")), need, 16, 8)


def test_nothing_is_computed_where_nothing_is_auto(folder):
    def fail() -> MemoryNeed:
        raise AssertionError

    assert shard_group(make_config(folder, **sections(folder, 2)), fail, 8, 8) == 2
    assert shard_group(make_config(folder, **sections(folder, None)), fail, 8, 8) is None
    stated = make_config(folder, training={"engine": "deepspeed", "deepspeed": str(ROOT / "ds_configs" / "zero3.json")})
    assert shard_group(stated, fail, 8, 8) is None
    assert zero_stage(stated) == 3

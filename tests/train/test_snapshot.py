"""A rank's share, copied at one moment and put together later, against what DeepSpeed or the optimiser says at that moment."""

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from hybrid_scale import dist
from hybrid_scale.config import RunConfig
from hybrid_scale.model.load import load_embedder
from hybrid_scale.train.engine import DeepSpeedEngine, make_accelerator, make_engine, read_deepspeed_config, zero_stage
from hybrid_scale.train.snapshot import Place, Snapshot
from tests.ranks import run_ranks
from tests.train.setup import make_config, write_inputs, zero

BATCH = {"input_ids": torch.arange(1, 31).remainder(23)[None], "lengths": torch.tensor([14, 3, 9, 4])}


def one_step(engine: Any) -> None:
    embeddings = engine.embed(BATCH)
    weight = torch.randn(embeddings.shape, generator=torch.Generator().manual_seed(dist.rank()))
    engine.backward((embeddings * weight).sum(), last=True)
    engine.step(0.01)


def abandoned_step(engine: Any) -> None:
    """A gradient and random numbers, without the update that was to follow."""
    engine.backward(engine.embed(BATCH).sum() + torch.rand(3).sum(), last=False)


def as_the_engine_says(engine: Any) -> dict[str, torch.Tensor]:
    """Trained weights and moments by `KIND.NAME`, whole on every rank: DeepSpeed's own readers, or the optimiser's state."""
    found = {}
    for name, parameter in engine.trained.items():
        if isinstance(engine, DeepSpeedEngine):
            from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

            found[f"weights.{name}"] = safe_get_full_fp32_param(parameter)
            found |= {f"{key}.{name}": safe_get_full_optimizer_state(parameter, key) for key in ("exp_avg", "exp_avg_sq")}
        else:
            found[f"weights.{name}"] = parameter.detach()
            found |= {f"{key}.{name}": engine.optimizer.state[parameter][key] for key in ("exp_avg", "exp_avg_sq")}
    return {name: tensor.detach().clone() for name, tensor in found.items()}


def on_this_rank(tree: str) -> list[str] | None:
    """Two steps, a copy, two more steps while a thread puts the copy together; what differs from the moment of the copy."""
    config = RunConfig.model_validate_json(tree)
    dist.start()
    shards = read_deepspeed_config(config) if zero_stage(config) == 3 else None
    embedder = load_embedder(config.model, config.run.seed, None, shards if config.model.lora else None)
    engine = make_engine(config, make_accelerator(config, Path(config.run.directory)), embedder)
    snapshot, side, states = Snapshot(engine), dist.SideGroup(), []
    for _ in range(2):  # buffers are used again
        one_step(engine)
        torch.manual_seed(dist.rank())
        snapshot.mark()
        abandoned_step(engine)
        snapshot.copy()
        expected = as_the_engine_says(engine)
        thread = threading.Thread(target=lambda: states.append(snapshot.whole(side)))
        thread.start()
        one_step(engine)
        thread.join()
        later = as_the_engine_says(engine)
    state = states[-1]
    if state is None:
        return None
    found = {**{f"weights.{name}": tensor for name, tensor in state.weights.items()}, **state.moments}
    assert float(found.pop("step")) == 3
    assert sorted(found) == sorted(expected)
    for rank in range(dist.world_size()):
        torch.manual_seed(rank)
        assert torch.equal(state.random[f"cpu_{rank}"], torch.get_rng_state())
    moved = [name for name in expected if not torch.equal(later[name], expected[name])]
    assert len(moved) == len(expected), "the steps behind changed too little to prove anything"
    return [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("snapshot"))


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_copy_is_the_state_of_its_moment(folder, stage, lora):
    """Three ranks, so that no tensor is shared out evenly."""
    training = {"engine": "deepspeed", "deepspeed": zero(stage, folder)} if stage else {}
    model = {"lora": {"rank": 3}} if lora else {"lora": None}
    config = make_config(folder, training=training, model=model)
    assert run_ranks(on_this_rank, 3, config.model_dump_json()) == [[], None, None]


def test_places_by_hand():
    """Five elements over three rows, two of each row from column 1; then the same end to end."""
    rows = torch.tensor([[9.0, 1, 2], [9, 3, 4], [9, 5, 0]])
    assert Place(0, 1, 2, (5, 1), in_every_row=True).take(rows).tolist() == [[1], [2], [3], [4], [5]]
    assert Place(0, 2, 4, (2, 2), in_every_row=False).take(rows).tolist() == [[2, 9], [3, 4]]

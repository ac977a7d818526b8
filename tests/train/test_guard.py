"""Faults put into one rank: all ranks stop together before the update, say where, and leave what a replay needs."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from hybrid_scale import dist
from hybrid_scale.config import RunConfig
from hybrid_scale.errors import RunError
from hybrid_scale.runs import RunDirectory
from hybrid_scale.train import run as run_module
from hybrid_scale.train.batches import open_training_data
from hybrid_scale.train.replay import replay
from hybrid_scale.train.run import train
from tests.ranks import run_ranks
from tests.train.setup import make_config, write_inputs, zero
from tests.train.test_step import dense_gradients, gradient_of_step, nonzero_adapter

FAULTY_RANK = 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("guard"))


def train_with_fault(tree: str, fault: str) -> str:
    """Train with a fault in the second step on one rank, or a step that updates nothing; the error's text."""
    config = RunConfig.model_validate_json(tree)
    dist.start()
    make_engine = run_module.make_engine

    def make_faulty(*arguments: Any) -> Any:
        engine: Any = make_engine(*arguments)
        if fault == "no update":
            engine.step = lambda rate: 1.0
        elif fault and dist.rank() == FAULTY_RANK:
            break_engine(engine, fault)
        return engine

    run_module.make_engine = make_faulty  # type: ignore[assignment]
    try:
        train(config, lambda *arguments: None)
    except RunError as error:
        return str(error)
    return "no error"


def break_engine(engine: Any, fault: str) -> None:
    steps = [0]
    step, embed = engine.step, engine.embed

    def counted(rate: float) -> float:
        steps[0] += 1
        return step(rate)

    def embed_one_infinite(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        embedded = embed(batch)
        factor = torch.ones(len(embedded), 1)
        factor[0] = float("inf") if steps[0] == 1 else 1.0
        return embedded * factor

    engine.step = counted
    if fault == "embeddings":
        engine.embed = embed_one_infinite
    else:
        first = next(iter(engine.trained.values()))
        first.register_hook(lambda gradient: gradient * (float("nan") if steps[0] == 1 else 1.0))


@pytest.mark.parametrize("engine", ["plain", "zero3"])
@pytest.mark.parametrize("fault", ["embeddings", "gradients"])
def test_a_number_that_is_not_finite_stops_all_ranks(folder, tmp_path, fault, engine):
    training = {"save_every_steps": 1, "keep_checkpoints": 9, "max_steps": 3, "max_tokens_per_micro_batch": 100_000}
    if engine == "zero3":
        training |= {"engine": "deepspeed", "deepspeed": zero(3, tmp_path)}
    config = make_config(folder, run={"directory": str(tmp_path / "run")}, training=training)
    errors = run_ranks(train_with_fault, 2, config.model_dump_json(), fault)
    assert errors[0] == errors[1]
    assert f"step 2: {fault} not finite on rank {FAULTY_RANK}" in errors[0]
    run = RunDirectory(config.run.directory)
    assert [record["step"] for record in run.metrics()] == [1]
    assert run.status()["status"] == "failed"
    kept = run.failures / "step_00000002"
    batch = json.loads((kept / "batch.json").read_text())
    assert (batch["step"], batch["world_size"], batch["what"], batch["ranks"]) == (1, 2, fault, [FAULTY_RANK])
    assert batch["rows"][0] in errors[0]
    if fault == "embeddings":
        assert len(batch["rows"]) == 1
    else:
        assert batch["parameters"] == ["backbone.base_model.model.layers.0.self_attn.q_proj.lora_A.default.weight"]
        assert len(batch["rows"]) > 5
    weights = load_file(kept / "adapter" / "adapter_model.safetensors")
    before = load_file(run.checkpoints / "step_00000001" / "adapter" / "adapter_model.safetensors")
    for name, weight in weights.items():
        assert np.array_equal(weight, before[name])
    plain = config.model_copy(update={"training": config.training.model_copy(update={"engine": "plain"})})
    assert "everything is finite" in replay(plain, kept)


def test_a_replay_finds_the_weight_that_is_not_finite(folder, tmp_path):
    """A NaN in the kept adapter (the fault is in the weights, not in a device): every text is named."""
    config = make_config(folder, run={"directory": str(tmp_path / "run")})
    run_ranks(train_with_fault, 2, config.model_dump_json(), "embeddings")
    kept = RunDirectory(config.run.directory).failures / "step_00000002"
    weights = load_file(kept / "adapter" / "adapter_model.safetensors")
    next(iter(weights.values()))[:] = np.nan
    save_file(weights, kept / "adapter" / "adapter_model.safetensors")
    assert "texts are not finite:\nquery row" in replay(config, kept)


def test_an_adapter_that_never_moves_stops_the_run(folder, tmp_path):
    config = make_config(folder, run={"directory": str(tmp_path / "run")})
    errors = run_ranks(train_with_fault, 2, config.model_dump_json(), "no update")
    assert all("none of the 28 trained tensors moved" in error for error in errors)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_every_adapter_tensor_moves_under_cached_gradients(folder, tmp_path, stage):
    """Two passes, several micro-batches: the case in which a well-known trainer logs a loss and updates nothing."""
    training = {"engine": "deepspeed", "deepspeed": zero(stage, tmp_path), "passes": "two_pass", "save_every_steps": 1}
    training |= {"max_tokens_per_micro_batch": 96, "max_steps": 3, "keep_checkpoints": 9}
    config = make_config(folder, run={"directory": str(tmp_path / "run")}, training=training)
    assert run_ranks(train_with_fault, 2, config.model_dump_json(), "") == ["no error"] * 2
    run = RunDirectory(config.run.directory)
    saved = [load_file(run.checkpoints / f"step_{step:08d}" / "adapter" / "adapter_model.safetensors") for step in (1, 3)]
    assert len(saved[0]) == 28
    for name, weight in saved[0].items():
        assert np.abs(saved[1][name] - weight).max() > 1e-5, name


def clipped_update(tree: str) -> tuple[float, dict[str, np.ndarray]]:
    """Norm that the engine reports and the weights after one step."""
    config = RunConfig.model_validate_json(tree)
    dist.start()
    data = open_training_data(config, dist.world_size())
    embedder = run_module.load_embedder(config.model, config.run.seed)
    nonzero_adapter(embedder)
    engine: Any = run_module.make_engine(config, run_module.make_accelerator(config, Path(config.run.directory)), embedder)
    gradient_of_step(config, data, engine)
    norm = engine.step(config.optimizer.learning_rate)
    return norm, {name: weight.numpy() for name, weight in engine.weights().items()}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_clipping_equals_the_dense_norm(folder, tmp_path, stage):
    """With a large epsilon AdamW's first step is -rate * gradient / epsilon: a wrong clipping factor would show."""
    training = {} if stage == 0 else {"engine": "deepspeed", "deepspeed": zero(stage, tmp_path)}
    optimizer = {"max_gradient_norm": 0.05, "epsilon": 1e3, "learning_rate": 1.0, "weight_decay": 0.0}
    config = make_config(folder, training=training, optimizer=optimizer)
    embedder = run_module.load_embedder(config.model, config.run.seed)
    nonzero_adapter(embedder)
    _, gradients = dense_gradients(config)
    dense = float(torch.sqrt(sum((g**2).sum() for g in gradients.values())))
    assert dense > 0.1
    for norm, weights in run_ranks(clipped_update, 2, config.model_dump_json()):
        assert norm == pytest.approx(dense, rel=1e-5)
        for name, parameter in embedder.named_parameters():
            if parameter.requires_grad:
                update = gradients[name].double() * (0.05 / dense)
                expected = parameter.detach().double() - update / (update.abs() + 1e3)
                moved, wanted = weights[name] - parameter.detach().numpy(), (expected - parameter.detach().double()).numpy()
                assert np.abs(moved - wanted).max() < 2e-8, name

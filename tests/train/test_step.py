"""The distributed step against one process that embeds the whole batch at once and lets autograd do the rest.

Tolerance: a relative norm of 1e-5 per tensor, float32 everywhere. Sums are taken in another order (padding, micro-batches,
ranks) and a temperature of 0.05 enlarges each rounding of a score 20 times; 3e-6 is measured. In bfloat16 DeepSpeed's own
one-rank gradient is already 1 % off (its hooks change the order of sums), so that equality is tested in float32 only.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hybrid_scale import dist
from hybrid_scale.config import RunConfig
from hybrid_scale.model.embedder import Embedder
from hybrid_scale.model.load import load_embedder
from hybrid_scale.train.engine import make_accelerator, make_engine
from hybrid_scale.train.gradcache import forward_backward
from hybrid_scale.train.loop import TrainingData, build_share, plan_step
from hybrid_scale.train.loss import Targets
from hybrid_scale.train.run import open_training_data
from tests.ranks import run_ranks
from tests.train.setup import make_config, write_inputs, zero

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("step"))


def nonzero_adapter(embedder: Embedder) -> None:
    """LoRA's B starts at zero and would hide A's gradient: give every trained weight the same values on every rank."""
    generator = torch.Generator().manual_seed(5)
    for parameter in embedder.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)


def dense_gradients(config: RunConfig, data: TrainingData) -> tuple[float, dict[str, torch.Tensor]]:
    """All texts in one padded batch, the loss by cross entropy on a masked matrix, one backward."""
    embedder = load_embedder(config.model, config.run.seed)
    nonzero_adapter(embedder)
    batch = data.sampler.batch(0)
    rows = data.encoder.encode("query", data.pairs.queries.column("text", batch.queries))
    rows += data.encoder.encode("passage", data.pairs.passages.column("text", batch.passages))
    embeddings = embedder(**data.encoder.collate(rows))
    scores = embeddings[torch.from_numpy(batch.row_text)] @ embeddings[torch.from_numpy(batch.column_text)].T
    row_pool = np.repeat(np.arange(len(batch.pools)), np.diff(batch.row_offsets))
    column_pool = np.repeat(np.arange(len(batch.pools)), np.diff(batch.column_offsets))
    allowed = (row_pool[:, None] == column_pool) & (batch.row_family[:, None] != batch.column_family)
    allowed[np.arange(len(row_pool)), batch.row_column] = True
    logits = (scores / config.loss.temperature).masked_fill(~torch.from_numpy(allowed), float("-inf"))
    loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(batch.row_column))
    loss.backward()
    return float(loss.detach()), {name: p.grad for name, p in embedder.named_parameters() if p.requires_grad}


def distance(found: np.ndarray, expected: np.ndarray) -> float:
    """Norm of the difference over the norm of what is expected."""
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def step_on_this_rank(tree: str) -> tuple[float, dict[str, np.ndarray], int]:
    """One step's loss and whole gradients on this rank, and its number of micro-batches."""
    config = RunConfig.model_validate_json(tree)
    dist.start()
    data = open_training_data(config, dist.world_size())
    embedder = load_embedder(config.model, config.run.seed)
    nonzero_adapter(embedder)
    engine: Any = make_engine(config, make_accelerator(config, Path(config.run.directory)), embedder)
    step = plan_step(data, config, dist.world_size(), 0)
    share = build_share(data, step, dist.rank(), dist.device())
    loss = forward_backward(engine, share, step.plan, Targets.of(step.batch, dist.device()), config.loss, step.direct)
    if config.training.engine == "plain":
        gradients = {name: p.grad for name, p in engine.trained.items()}
    else:
        from deepspeed.utils import safe_get_full_grad

        gradients = {name: safe_get_full_grad(p) for name, p in engine.trained.items()}
    return loss, {name: g.float().numpy().copy() for name, g in gradients.items()}, step.plan.rounds


def check(folder: Path, world: int, **sections: dict[str, Any]) -> int:
    """Assert that every rank's loss and gradients equal the dense ones; returns the number of micro-batches."""
    config = make_config(folder, **sections)
    expected_loss, expected = dense_gradients(config, open_training_data(config, 1))
    results = run_ranks(step_on_this_rank, world, config.model_dump_json(), timeout=120)
    for loss, gradients, _ in results:
        assert loss == pytest.approx(expected_loss, rel=TOLERANCE)
        assert gradients.keys() == expected.keys()
        for name, gradient in gradients.items():
            assert distance(gradient, expected[name].numpy()) < TOLERANCE, name
    assert max(float(g.abs().max()) for g in expected.values()) > 0.01
    return results[0][2]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_two_pass_equals_dense(folder, world):
    assert check(folder, world, training={"max_tokens_per_micro_batch": 96}) > 1


@pytest.mark.parametrize("world", [1, 2, 4])
def test_direct_equals_dense(folder, world):
    assert check(folder, world, training={"max_tokens_per_micro_batch": 100_000}) == 1


@pytest.mark.parametrize("arm", ["mono", "cross", "mixed"])
def test_every_arm_equals_dense(folder, arm):
    check(folder, 2, sampler={"arm": arm})


def test_more_micro_batches_than_texts_are_filled_with_dummies(folder):
    """4 ranks, 2 rows: some ranks have nothing to embed, all call the engine equally often."""
    check(
        folder, 4, sampler={"global_batch": 4, "arm": "cross", "mono_block_rows": 4}, training={"max_tokens_per_micro_batch": 64}
    )


@pytest.mark.parametrize(
    ("stage", "world", "quantization", "checkpointing"),
    [(3, 2, "nf4", True), (3, 4, "nf4", False), (3, 2, "none", False), (2, 2, "nf4", False), (1, 2, "none", False)],
)
def test_deepspeed_equals_dense(folder, stage, world, quantization, checkpointing):
    """ZeRO-3 + NF4 + LoRA, two passes of several micro-batches, against the dense model of one process."""
    rounds = check(
        folder,
        world,
        model={"quantization": quantization, "gradient_checkpointing": checkpointing},
        training={"engine": "deepspeed", "deepspeed": zero(stage, folder), "max_tokens_per_micro_batch": 96},
    )
    assert rounds > 1


def test_dropout_is_replayed(folder):
    """With LoRA dropout the two passes must draw the same masks: two-pass equals direct on one process, bit for bit of seeds."""
    trees = [
        make_config(
            folder,
            model={"lora": {"rank": 4, "dropout": 0.3}, "gradient_checkpointing": False},
            training={"passes": passes, "max_tokens_per_micro_batch": 100_000},
        ).model_dump_json()
        for passes in ("direct", "two_pass")
    ]
    (direct,), (two_pass,) = (run_ranks(seeded_step, 1, tree) for tree in trees)
    assert direct[0] == pytest.approx(two_pass[0], rel=TOLERANCE)
    for name, gradient in direct[1].items():
        assert distance(gradient, two_pass[1][name]) < TOLERANCE, name


def seeded_step(tree: str) -> tuple[float, dict[str, np.ndarray], int]:
    dist.start()
    torch.manual_seed(11)
    generator = torch.random.get_rng_state()
    config = RunConfig.model_validate_json(tree)
    data = open_training_data(config, 1)
    embedder = load_embedder(config.model, config.run.seed)
    nonzero_adapter(embedder)
    engine: Any = make_engine(config, make_accelerator(config, Path(config.run.directory)), embedder)
    torch.random.set_rng_state(generator)
    step = plan_step(data, config, 1, 0)
    share = build_share(data, step, 0, dist.device())
    loss = forward_backward(engine, share, step.plan, Targets.of(step.batch, dist.device()), config.loss, step.direct)
    return loss, {name: p.grad.numpy().copy() for name, p in engine.trained.items()}, step.plan.rounds


def test_ds_configs_are_filled_from_the_run(folder):
    from hybrid_scale.errors import ConfigError
    from hybrid_scale.train.engine import read_deepspeed_config

    config = make_config(
        folder, training={"engine": "deepspeed", "deepspeed": zero(3, folder)}, optimizer={"max_gradient_norm": 0.7}
    )
    assert read_deepspeed_config(config)["gradient_clipping"] == 0.7
    stated = Path(config.training.deepspeed)
    tree = json.loads(stated.read_text())
    other = folder / "other.json"
    for value, message in ((1.0, "the run config says 0.7"), (None, "must be stated")):
        other.write_text(json.dumps({**tree, "gradient_clipping": value}))
        broken = make_config(
            folder, training={"engine": "deepspeed", "deepspeed": str(other)}, optimizer={"max_gradient_norm": 0.7}
        )
        with pytest.raises(ConfigError, match=message):
            read_deepspeed_config(broken)

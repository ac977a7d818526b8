"""The distributed step against one process that embeds the whole batch at once and lets autograd do the rest.

Tolerance: a relative norm of 1e-5 per tensor, float32 everywhere. Sums are taken in another order (padding, micro-batches,
ranks) and a temperature of 0.05 enlarges each rounding of a score 20 times; 3e-6 is measured. In bfloat16 DeepSpeed's own
one-rank gradient is already 1 % off (its hooks change the order of sums), so that equality is tested in float32 only.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Starcoder2Config, Starcoder2Model

from hybrid_scale import dist
from hybrid_scale.config import RunConfig
from hybrid_scale.data.partition import Plan
from hybrid_scale.model.embedder import Embedder
from hybrid_scale.model.load import load_embedder
from hybrid_scale.train.batches import TrainingData, build_share, open_training_data, plan_step
from hybrid_scale.train.engine import make_accelerator, make_engine
from hybrid_scale.train.gradcache import forward_backward
from hybrid_scale.train.loss import Targets
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


def dense_gradients(config: RunConfig) -> tuple[float, dict[str, torch.Tensor]]:
    """All texts in one padded batch with plain attention, the loss by cross entropy on a masked matrix, one backward."""
    attention = "sdpa" if config.model.dtype == "float64" else "eager"  # transformers' eager softmax is float32 at most
    padded = config.model.model_copy(update={"attention_implementation": attention, "gradient_checkpointing": False})
    config = config.model_copy(update={"model": padded})
    data = open_training_data(config, 1)
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


def gradients_of(engine: Any) -> dict[str, np.ndarray]:
    """Whole gradients on this rank, whatever the engine."""
    if hasattr(engine, "zero"):
        from deepspeed.utils import safe_get_full_grad

        return {name: safe_get_full_grad(p).float().numpy().copy() for name, p in engine.trained.items()}
    return {name: p.grad.numpy().copy() for name, p in engine.trained.items()}


def step_on_this_rank(tree: str) -> tuple[float, dict[str, np.ndarray], str, int]:
    """One step's loss and whole gradients on this rank, its schedule and number of micro-batches."""
    config = RunConfig.model_validate_json(tree)
    dist.start()
    data = open_training_data(config, dist.world_size())
    embedder = load_embedder(config.model, config.run.seed)
    nonzero_adapter(embedder)
    engine: Any = make_engine(config, make_accelerator(config, Path(config.run.directory)), embedder)
    loss, plan = gradient_of_step(config, data, engine)
    return loss, gradients_of(engine), plan.schedule, plan.rounds


def gradient_of_step(config: RunConfig, data: TrainingData, engine: Any) -> tuple[float, Plan]:
    """Accumulate the gradient of step 0 in the engine."""
    step = plan_step(data, config, dist.world_size(), 0)
    share = build_share(data, step, dist.rank())
    targets = Targets.of(step.batch, dist.device())
    return forward_backward(engine, share, step.plan, targets, config.loss, config.training.offload_activations), step.plan


def check(folder: Path, world: int, tolerance: float = TOLERANCE, **sections: dict[str, Any]) -> tuple[str, int]:
    """Assert that every rank's loss and gradients equal the dense ones; returns schedule and number of micro-batches."""
    config = make_config(folder, **sections)
    expected_loss, expected = dense_gradients(config)
    results = run_ranks(step_on_this_rank, world, config.model_dump_json())
    for loss, gradients, _, _ in results:
        assert loss == pytest.approx(expected_loss, rel=tolerance)
        assert gradients.keys() == expected.keys()
        for name, gradient in gradients.items():
            assert distance(gradient, expected[name].numpy()) < tolerance, name
    assert max(float(g.abs().max()) for g in expected.values()) > 0.01
    return results[0][2], results[0][3]


SCHEDULES = {
    "direct": {"max_tokens_per_micro_batch": 96, "max_kept_tokens": 100_000, "passes": "direct"},
    "one_micro_batch": {"max_tokens_per_micro_batch": 100_000},
    "kept": {"max_tokens_per_micro_batch": 64, "max_kept_tokens": 128},
    "two_pass": {"max_tokens_per_micro_batch": 96, "passes": "two_pass", "max_tokens_per_embedding_batch": 200},
}


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_equals_dense(folder, schedule, world):
    ran, rounds = check(folder, world, training=SCHEDULES[schedule])
    assert ran == ("direct" if schedule == "one_micro_batch" else schedule)
    assert (rounds == 1) == (schedule == "one_micro_batch")


@pytest.mark.parametrize("schedule", ["direct", "kept", "two_pass"])
def test_padded_execution_equals_dense(folder, schedule):
    ran, _ = check(folder, 2, model={"attention_implementation": "sdpa"}, training=SCHEDULES[schedule])
    assert ran == schedule


@pytest.mark.parametrize("schedule", ["direct", "kept", "two_pass"])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_float64_equals_dense_to_twelve_digits(folder, schedule, world):
    """On a decoder with torch's own LayerNorm: the RMSNorm of Llama and its kin computes in float32."""
    model = {"base": write_starcoder(folder), "dtype": "float64", "gradient_checkpointing": schedule == "kept"}
    check(folder, world, 1e-12, model=model, training=SCHEDULES[schedule])


def write_starcoder(folder: Path) -> str:
    """A random StarCoder 2 (LayerNorm, rotary positions, shared keys) with the tokenizer of `folder/model`."""
    place = folder / "starcoder"
    if not place.exists():
        shutil.copytree(folder / "model", place)
        shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        vocabulary = json.loads((place / "config.json").read_text())["vocab_size"]
        dropouts = dict.fromkeys(("attention_dropout", "residual_dropout", "embedding_dropout"), 0.0)
        torch.manual_seed(0)
        config = Starcoder2Config(vocab_size=vocabulary, num_key_value_heads=2, initializer_range=0.1, **shape, **dropouts)
        Starcoder2Model(config).save_pretrained(place)
    return str(place)


@pytest.mark.parametrize("arm", ["mono", "cross", "mixed"])
def test_every_arm_equals_dense(folder, arm):
    check(folder, 2, sampler={"arm": arm})


def test_scheduled_batches_equal_dense(folder):
    check(folder, 2, sampler={"composition": "scheduled", "pool_rows": 16})


def test_masked_conflicts_and_hard_negatives_equal_dense(tmp_path):
    """Rows of one family in a pool (masked), two hard negatives a row, and passages that several rows share."""
    write_inputs(tmp_path, negatives=3)
    check(tmp_path, 2, sampler={"conflicts": "mask", "hard_negatives": 2, "arm": "cross"}, training=SCHEDULES["kept"])


def test_more_micro_batches_than_texts_are_filled_with_dummies(folder):
    """4 ranks, 2 rows: some ranks have nothing to embed, all call the engine equally often."""
    sampler = {"global_batch": 4, "arm": "cross", "pool_rows": 4}
    check(folder, 4, sampler=sampler, training={"max_tokens_per_micro_batch": 64})


@pytest.mark.parametrize(
    ("stage", "world", "quantization", "checkpointing", "schedule"),
    [
        (3, 2, "nf4", True, "two_pass"),
        (3, 2, "nf4", True, "kept"),
        (3, 4, "nf4", False, "direct"),
        (3, 2, "none", False, "kept"),
        (2, 2, "nf4", False, "kept"),
        (2, 2, "none", True, "two_pass"),
        (1, 2, "none", False, "two_pass"),
        (1, 2, "nf4", True, "direct"),
    ],
)
def test_deepspeed_equals_dense(folder, stage, world, quantization, checkpointing, schedule):
    """Several micro-batches under ZeRO against the dense model of one process (the same NF4 weights, where quantised)."""
    ran, rounds = check(
        folder,
        world,
        model={"quantization": quantization, "gradient_checkpointing": checkpointing},
        training={"engine": "deepspeed", "deepspeed": zero(stage, folder), **SCHEDULES[schedule]},
    )
    assert ran == schedule
    assert rounds > 1


@pytest.mark.parametrize("checkpointing", [False, True])
def test_offloaded_activations_equal_dense(folder, checkpointing):
    check(folder, 1, model={"gradient_checkpointing": checkpointing}, training={**SCHEDULES["kept"], "offload_activations": True})


def test_bfloat16_exchange_is_close(folder):
    """Embeddings rounded to bfloat16 (8 bits) for the loss: it moves by less than 1 %, the gradient keeps its direction."""
    config = make_config(folder, loss={"temperature": 0.05, "exchange": "bfloat16"})
    expected_loss, expected = dense_gradients(config)
    ((loss, gradients, _, _),) = run_ranks(step_on_this_rank, 1, config.model_dump_json())
    flat = [np.concatenate([g[name].ravel() for name in sorted(g)]) for g in (gradients, expected)]
    assert loss == pytest.approx(expected_loss, rel=0.01)
    assert loss != expected_loss
    assert flat[0] @ flat[1] / np.linalg.norm(flat[0]) / np.linalg.norm(flat[1]) > 0.999


@pytest.mark.parametrize("schedule", ["kept", "two_pass"])
def test_dropout_is_replayed(folder, schedule):
    """LoRA dropout: texts that go through the model twice meet the same masks, so the gradient is that of one pass with them."""
    trees = [
        make_config(
            folder, model={"lora": {"rank": 4, "dropout": 0.3}, "gradient_checkpointing": False}, training=SCHEDULES[kind]
        ).model_dump_json()
        for kind in (schedule, "direct")
    ]
    trees[1] = trees[1].replace('"max_tokens_per_micro_batch":96', f'"max_tokens_per_micro_batch":{tokens_of(schedule)}')
    (found,) = run_ranks(seeded_step, 1, trees[0])
    (expected,) = run_ranks(seeded_step, 1, trees[1], found[4])
    (other,) = run_ranks(seeded_step, 1, trees[1])
    assert (found[2], expected[2], found[3]) == (schedule, "direct", expected[3])
    assert found[0] == pytest.approx(expected[0], rel=TOLERANCE)
    for name, gradient in expected[1].items():
        assert distance(found[1][name], gradient) < TOLERANCE, name
    if schedule == "kept":  # the order of the first passes differs, so without the recorded states other masks are drawn
        assert other[0] != expected[0]


def tokens_of(schedule: str) -> int:
    return int(SCHEDULES[schedule]["max_tokens_per_micro_batch"])  # type: ignore[call-overload]


def seeded_step(tree: str, states: dict[int, torch.Tensor] | None = None) -> tuple[Any, ...]:
    """As `step_on_this_rank`, on one process and from one random state; also the state before each micro-batch's first pass.

    `states` sets those instead.
    """
    dist.start()
    config = RunConfig.model_validate_json(tree)
    data = open_training_data(config, 1)
    embedder = load_embedder(config.model, config.run.seed)
    nonzero_adapter(embedder)
    engine: Any = make_engine(config, make_accelerator(config, Path(config.run.directory)), embedder)
    embed, seen = engine.embed, {}

    def recorded(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        key = hash(tuple(batch["input_ids"].flatten().tolist()))
        if states is not None:
            torch.set_rng_state(states[key])
        seen.setdefault(key, torch.get_rng_state())
        return embed(batch)

    engine.embed = recorded
    torch.manual_seed(11)
    loss, plan = gradient_of_step(config, data, engine)
    return loss, gradients_of(engine), plan.schedule, plan.rounds, seen


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

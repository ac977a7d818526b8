"""Work per real token, counted by torch: the promise of the plan in FLOPs."""

from pathlib import Path

import pytest
from torch.utils.flop_counter import FlopCounterMode

from hybrid_scale import dist
from hybrid_scale.model.load import load_embedder
from hybrid_scale.model.shape import read_shape
from hybrid_scale.model.tiny import write_model
from hybrid_scale.train.batches import build_share, open_training_data, plan_step
from hybrid_scale.train.engine import PlainEngine
from hybrid_scale.train.gradcache import forward_backward
from hybrid_scale.train.loss import Targets
from tests.train.setup import make_config, write_inputs


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wide enough that a rank-2 adapter adds little (2.3 % of the weights) and short texts make attention cheap."""
    folder = write_inputs(tmp_path_factory.mktemp("cost"))
    write_model(folder / "model", 400, hidden=256, layers=2, heads=4)
    return folder


@pytest.mark.parametrize(
    ("passes", "checkpointing", "expected"),
    [("direct", False, 4.0), ("direct", True, 6.0), ("two_pass", False, 6.0), ("two_pass", True, 8.0)],
)
def test_flops_per_real_token(folder, passes, checkpointing, expected):
    """Forward 2P, gradient of activations 2P, recomputed forward 2P, first pass 2P; adapters and attention add a little.

    Without checkpointing the first layer's q, k and v need no gradient of their input: a little less.
    """
    model = {"lora": {"rank": 2}, "gradient_checkpointing": checkpointing}
    config = make_config(folder, model=model, training={"passes": passes, "max_tokens_per_micro_batch": 100_000})
    data = open_training_data(config, 1)
    engine = PlainEngine(load_embedder(config.model, 0), config.optimizer)
    step = plan_step(data, config, 1, 0)
    share, targets = build_share(data, step, 0), Targets.of(step.batch, dist.device())
    with FlopCounterMode(display=False) as counter:
        forward_backward(engine, share, step.plan, targets, config.loss)
    per_token = counter.get_total_flops() / step.plan.real_tokens / read_shape(config.model).linear
    assert expected - 0.2 < per_token < expected + 0.4


def test_shape_counts_linear_weights(folder):
    config = make_config(folder)
    backbone = load_embedder(config.model.model_copy(update={"lora": None}), 0).backbone
    linear = sum(m.weight.numel() for m in backbone.modules() if type(m).__name__ == "Linear")
    assert read_shape(config.model).linear == linear

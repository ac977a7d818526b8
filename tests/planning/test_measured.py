"""Lines of a plan against the bytes that this process really holds: weights, quantisation, gradients, moments, the loss."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Params4bit
from torch import nn

from hybrid_scale import dist
from hybrid_scale.config import LossSettings
from hybrid_scale.model.load import count_parameters, load_embedder
from hybrid_scale.model.shape import read_shape
from hybrid_scale.model.tiny import write_model
from hybrid_scale.planning.costs import DTYPE_BYTES, count, loss_bytes, static_bytes
from hybrid_scale.train.batches import build_share, open_training_data, plan_step
from hybrid_scale.train.engine import PlainEngine
from hybrid_scale.train.gradcache import forward_backward
from hybrid_scale.train.loss import Targets, contrastive_loss
from tests.planning.test_trace import Storages
from tests.train.setup import make_config, write_inputs


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """256 wide, 768 inside, 2 layers: its 4-bit weights are whole blocks of 64 x 256."""
    place = write_inputs(tmp_path_factory.mktemp("measured"))
    write_model(place / "model", 400, hidden=256, layers=2, heads=4)
    return place


def states(module: nn.Module) -> Iterator[Any]:
    return (p.quant_state for p in module.parameters() if isinstance(p, Params4bit))


@pytest.mark.parametrize("model", [{"quantization": "nf4", "dtype": "bfloat16"}, {"dtype": "bfloat16"}, {"lora": None}])
def test_bytes_of_a_replica_that_trains(folder: Path, model: dict[str, Any]) -> None:
    """One rank, no ZeRO: every line is the sum of the tensors that it stands for, after a real step."""
    config = make_config(folder, model=model)
    counts = count_parameters(config.model)
    assert counts == count(read_shape(config.model), config.model)
    lines = static_bytes(counts, DTYPE_BYTES[config.model.dtype], 1, 0)
    data, embedder = open_training_data(config, 1), load_embedder(config.model, 0)
    engine = PlainEngine(embedder, config.optimizer)
    step = plan_step(data, config, 1, 0)
    forward_backward(engine, build_share(data, step, 0), step.plan, Targets.of(step.batch, dist.device()), config.loss)
    packed = [p for p in embedder.parameters() if isinstance(p, Params4bit)]
    frozen = [p for p in embedder.parameters() if not p.requires_grad and not isinstance(p, Params4bit)]
    assert sum(p.nbytes for p in packed) == lines["4-bit weights"]
    assert sum(p.nbytes for p in frozen) == lines["frozen weights"]
    assert sum(p.nbytes for p in engine.trained.values()) == lines["trained weights"]
    assert sum(p.grad.nbytes for p in engine.trained.values() if p.grad is not None) == lines["gradients"]
    tables = sum(s.absmax.nbytes + s.state2.absmax.nbytes for s in states(embedder))
    assert tables == pytest.approx(lines["quantisation state (replicated)"], rel=1e-6)
    engine.step(1e-3)
    moments = [state[name] for state in engine.optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    assert sum(m.nbytes for m in moments) == lines["Adam moments"]


@pytest.mark.parametrize(("rows", "max_logits", "consecutive"), [(512, 2**15, False), (512, 2**30, False), (128, 2**15, True)])
def test_bytes_of_the_loss(rows: int, max_logits: int, consecutive: bool) -> None:
    """512 rows with a hard negative each, 64 wide, one pool: most storage alive above the embeddings, against the two lines.

    Consecutive passages aren't copied, which the plan doesn't count on.
    """
    batch, columns, size = 512, 1024, 64
    generator = torch.Generator().manual_seed(0)
    embeddings = nn.functional.normalize(torch.randn(batch + columns, size, generator=generator))
    order = torch.arange(columns) if consecutive else torch.randperm(columns, generator=generator)
    number = torch.arange(batch)
    targets = Targets(
        row_offsets=[0, batch],
        column_offsets=[0, columns],
        row_text=number,
        row_column=number,
        row_family=number,
        column_text=batch + order,
        column_family=torch.arange(columns),
        column_is_hard=torch.arange(columns) >= batch,
    )
    none = nn.Module()
    with Storages(none) as storages:
        contrastive_loss(embeddings, targets, range(rows), LossSettings(max_logits=max_logits))
    lines = loss_bytes(batch + columns, columns, rows, size, max_logits, 4)
    formula = lines["loss"] + lines["gathered embeddings"] - embeddings.nbytes
    copies = 2 * columns * size * 4 if consecutive else 0
    assert storages.peak < 1.02 * formula
    assert storages.peak > 0.9 * (formula - copies)

"""The self-test of a cluster: good ranks pass it, and each kind of damage is found and named."""

from typing import Any
from unittest import mock

import pytest
import torch

from hybrid_scale import dist
from hybrid_scale.errors import RunError
from hybrid_scale.model import packing
from hybrid_scale.train import selftest
from hybrid_scale.train.engine import DeepSpeedEngine
from tests.ranks import run_ranks

LAUNCHED = {"ACCELERATE_USE_DEEPSPEED": "true"}


def sum_too_much(joined: torch.Tensor) -> torch.Tensor:
    """A reduce-scatter that is wrong on rank 1."""
    own = joined.new_empty(len(joined) // dist.world_size(), *joined.shape[1:])
    dist.c10d.reduce_scatter_tensor(own, joined)
    return own + dist.rank()


def blind_layout(lengths: torch.Tensor, causal: bool, device: torch.device) -> Any:
    """Texts end to end that see all of themselves."""
    return make_layout(lengths, False, device)


def scaled_backward(self: DeepSpeedEngine, surrogate: torch.Tensor, last: bool) -> None:
    backward(self, surrogate * 1.01, last)


make_layout, backward = packing.make_layout, DeepSpeedEngine.backward
DAMAGE: dict[str, tuple[Any, str, Any]] = {
    "none": (selftest, "VOCABULARY", selftest.VOCABULARY),
    "collectives": (dist, "sum_rows", sum_too_much),
    "attention": (packing, "make_layout", blind_layout),
    "a step of QLoRA under ZeRO-3": (DeepSpeedEngine, "backward", scaled_backward),
}


def report_of(damage: str) -> str:
    dist.start()
    with mock.patch.object(*DAMAGE[damage]):
        try:
            return selftest.report()
        except RunError as error:
            return f"refused\n{error}"


@pytest.mark.parametrize("damage", DAMAGE)
def test_ranks_find_what_is_damaged(damage):
    said = run_ranks(report_of, 2, damage, environment=LAUNCHED)
    assert said[0] == said[1]
    lines = said[0].splitlines()
    wrong = [line for line in lines if line.startswith("WRONG")]
    if damage == "none":
        assert sum(line.startswith("good ") for line in lines) == 7
        assert wrong == []
        assert "2 ranks over gloo" in said[0]
    else:
        assert lines[0] == "refused"
        assert wrong != []
        assert all(line.startswith(f"WRONG {damage}") for line in wrong)
    if damage == "collectives":  # rank 0's part is right, and the fault names the rank and the types
        assert "rank 1: collectives: reduce-scatter of torch.float32, reduce-scatter of torch.bfloat16" in said[0]
        assert "rank 0: collectives" not in said[0]


def test_other_weights_than_the_cpus_are_found(monkeypatch):
    shares = iter([torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([1.0, 2.0, 3.0, 5.0])])
    monkeypatch.setattr(selftest, "round_trip", lambda weights: next(shares))
    found = selftest.four_bits()
    assert (found.good, found.said) == (False, "2.5e-01 of them differ from the CPU's")


def test_one_process_leaves_the_step_out(tmp_path, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert selftest.zero3_step(tmp_path).said == "left out: start this with accelerate launch"

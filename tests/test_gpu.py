"""What differs on a GPU, without one: order and arguments of the calls, and whole steps on a pretended device against the CPU."""

import ast
import os
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from hybrid_scale import dist, gpu
from hybrid_scale.config import RunConfig
from hybrid_scale.errors import RunError
from hybrid_scale.model.embedder import Embedder
from hybrid_scale.model.load import load_embedder
from hybrid_scale.train.batches import TrainingData, build_share, open_training_data, plan_step
from hybrid_scale.train.engine import PlainEngine
from hybrid_scale.train.gradcache import forward_backward
from hybrid_scale.train.loss import Targets
from hybrid_scale.train.snapshot import Snapshot
from tests.pretend_gpu import GPU_NAME, OnGpu, move, pretended_gpu, register
from tests.ranks import run_ranks
from tests.train.setup import make_config, write_inputs

ROOT = Path(__file__).resolve().parent.parent


# --------------------------------------------------------------------------------------------------------- taking a GPU


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A machine of two GPUs that writes down what it is asked; settings of torch are put back."""
    asked: list[Any] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda number: asked.append(("set_device", number)))
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "1")
    cudnn, precision = torch.backends.cuda.cudnn_sdp_enabled(), torch.get_float32_matmul_precision()
    yield asked  # type: ignore[misc]
    torch.backends.cuda.enable_cudnn_sdp(cudnn)
    torch.set_float32_matmul_precision(precision)


def test_taking_a_gpu(cuda):
    torch.set_float32_matmul_precision("high")
    gpu.take(1)
    assert cuda == [("set_device", 1)]
    assert torch.get_float32_matmul_precision() == "highest"
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert os.environ["NVIDIA_TF32_OVERRIDE"] == "0"
    assert gpu.device() == torch.device("cuda", 1)


def test_more_processes_than_gpus_are_refused(cuda):
    with pytest.raises(RunError, match=r"local rank: found 2; this process sees 2 GPUs"):
        gpu.take(2)
    assert cuda == []


def test_only_our_gpu_is_seeded(cuda):
    """torch's default would ask every visible GPU for its state, which opens a context there."""
    with mock.patch.object(torch.random, "fork_rng") as fork, gpu.seeded(7):
        pass
    assert fork.call_args.kwargs == {"devices": [1]}


def test_seeded_numbers():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    with gpu.seeded(7):
        inside = torch.rand(2)
    assert torch.equal(torch.rand(2), expected)
    assert torch.equal(inside, torch.rand(2, generator=torch.Generator().manual_seed(7)))


def test_the_gpu_is_ours_before_nccl_starts(cuda, monkeypatch):
    launcher = {"RANK": "9", "LOCAL_RANK": "1", "WORLD_SIZE": "16", "MASTER_ADDR": "node0", "MASTER_PORT": "29500"}
    for name, value in {**launcher, "HS_EXPECT_WORLD": "1"}.items():
        monkeypatch.setenv(name, value)
    with (
        mock.patch.object(dist.c10d, "init_process_group") as init,
        mock.patch.object(dist.c10d.distributed_c10d, "_set_pg_timeout") as limit,
    ):
        init.side_effect = lambda *args, **named: cuda.append((args, named["device_id"]))
        dist.start()
    assert cuda == [("set_device", 1), (("nccl",), torch.device("cuda", 1))]
    assert init.call_args.kwargs["timeout"].total_seconds() == 1800
    assert limit.call_args.args[0].total_seconds() == 24 * 3600


@pytest.mark.parametrize("error", [None, RunError("x"), ZeroDivisionError("x")])
def test_leaving_nccl(cuda, error):
    """After an error, told to the user or not, the group isn't flushed: other ranks never join what this one has begun."""

    def work():
        if error is not None:
            raise error

    with (
        mock.patch.object(dist, "start"),
        mock.patch.object(dist, "_say_once"),
        mock.patch.object(dist.c10d, "is_initialized", return_value=True),
        mock.patch.object(dist.c10d, "destroy_process_group") as leave,
        mock.patch.object(dist.c10d.distributed_c10d, "_abort_process_group") as abort,
        suppress(ZeroDivisionError),
    ):
        dist.run_door(work)
    assert (leave.called, abort.called) == (error is None, error is not None)


# ------------------------------------------------------------------------------------------------------------ out of memory


class FullGpu:
    """An engine whose GPU is full at the call with this number."""

    def __init__(self, engine: PlainEngine, full_at: tuple[str, int]):
        self.engine, self.full_at = engine, full_at
        self.calls = {"embed": 0, "backward": 0}

    def _call(self, name: str, *args: Any) -> Any:
        self.calls[name] += 1
        if (name, self.calls[name]) == self.full_at:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...")
        return getattr(self.engine, name)(*args)

    def embed(self, batch: Any) -> torch.Tensor:
        return self._call("embed", batch)

    def backward(self, surrogate: torch.Tensor, last: bool) -> None:
        self._call("backward", surrogate, last)


@pytest.mark.parametrize(
    ("passes", "full_at", "setting"),
    [
        ("two_pass", ("embed", 1), "training.max_tokens_per_embedding_batch"),
        ("auto", ("embed", 1), "training.max_kept_tokens or training.max_tokens_per_micro_batch"),
        ("auto", ("backward", 1), "training.max_tokens_per_micro_batch"),
    ],
)
def test_a_full_gpu_names_the_setting_to_lower(tmp_path, passes, full_at, setting):
    config = make_config(write_inputs(tmp_path), training={"passes": passes, "max_kept_tokens": 10_000})
    data = open_training_data(config, 1)
    engine = FullGpu(PlainEngine(load_embedder(config.model, 1), config.optimizer), full_at)
    step = plan_step(data, config, 1, 0)
    with pytest.raises(RunError, match=f"out of GPU memory while .*CUDA out of memory. Lower {setting} "):
        forward_backward(engine, build_share(data, step, 0), step.plan, Targets.of(step.batch, dist.device()), config.loss)  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------------------- pretended device


def what_the_pretended_gpu_refuses() -> list[str]:
    said = []
    with pretended_gpu(world=2):
        ours, host = torch.ones(3, 2, device=GPU_NAME), torch.ones(3, 2)
        for attempt in (
            lambda: ours + host,
            lambda: ours.index_select(0, torch.tensor([1])),
            lambda: ours.numpy(),
            lambda: dist.sum_(host),
            lambda: dist.sum_(ours.T),
            lambda: dist.sum_(ours.to(torch.int16)),
            lambda: dist.gather_rows(host, [3, 3]),
        ):
            try:
                attempt()
                said.append("nothing")
            except (RuntimeError, TypeError, ValueError) as error:
                said.append(str(error))
    return said


def test_the_pretended_gpu_is_strict():
    """A stand-in that took everything would prove nothing."""
    [said] = run_ranks(what_the_pretended_gpu_refuses, 1)
    expected = ["one device", "one device", "numpy", "host memory", "contiguous", "no type for torch.int16", "host memory"]
    assert [part in message for part, message in zip(expected, said, strict=True)] == [True] * len(expected), said


def collectives_on_two_ranks() -> tuple[dict[str, Any], list[str]]:
    with pretended_gpu(world=2) as nccl:
        rows = torch.arange(6.0).view(3, 2).to(gpu.device())
        found = {
            "max": dist.max_int(3),
            "flags": dist.flags(True),
            "gathered": dist.gather_rows(rows.T.contiguous(), [2, 2]).tolist(),
            "joined": dist.join_rows(rows, 4).tolist(),
            "summed": dist.sum_rows(rows[:2]).tolist(),
            "broadcast": dist.broadcast_(rows.to(torch.uint8)).tolist(),
            "arrays": [array.tolist() for array in dist.gather_arrays(np.arange(3)[::-1])],
            "mask": [array.tolist() for array in dist.gather_arrays(np.array([True, False]))],
            "sums": dist.sum_array(np.array([[1.5], [2.0]])).tolist(),
        }
    return found, nccl.calls


def test_collectives_hand_nccl_what_it_takes():
    [(found, calls)] = run_ranks(collectives_on_two_ranks, 1)
    assert found == {
        "max": 3,
        "flags": [True, False],  # this rank's flag alone is set, and the sum doubles it
        "gathered": [[0, 2, 4], [1, 3, 5]] * 2,
        "joined": [[0, 1], [2, 3], [4, 5], [0, 0]] * 2,
        "summed": [[0, 2]],
        "broadcast": [[0, 1], [2, 3], [4, 5]],
        "arrays": [[2, 1, 0]] * 2,
        "mask": [[True, False]] * 2,
        "sums": [[3.0], [4.0]],
    }
    assert len(calls) == 9


STEPS = {
    "two passes, packed": ({}, {"passes": "two_pass"}),
    "kept, packed, checkpointed": ({"gradient_checkpointing": True}, {"max_kept_tokens": 256}),
    "direct, padded": ({"attention_implementation": "sdpa"}, {"max_kept_tokens": 10_000}),
    "bidirectional mean, packed": ({"attention": "bidirectional", "pooling": "mean"}, {"max_kept_tokens": 10_000}),
    "bidirectional weighted mean, padded": (
        {"attention": "bidirectional", "pooling": "weighted_mean", "attention_implementation": "sdpa"},
        {"passes": "two_pass"},
    ),
    "dropout": ({"lora": {"rank": 4, "dropout": 0.3}}, {"passes": "two_pass"}),
}


def one_step(config: RunConfig, data: TrainingData, embedder: Embedder) -> tuple[float, dict[str, Any], dict[str, Any]]:
    """Loss, gradients, and Adam's moments as a checkpoint takes them after an update, on the device that there is.

    All in host memory. Weights aren't compared: the first update turns rounding of a gradient near zero into its whole length.
    """
    engine = PlainEngine(embedder, config.optimizer)
    step = plan_step(data, config, 1, 0)
    torch.manual_seed(5)
    targets = Targets.of(step.batch, dist.device())
    loss = forward_backward(engine, build_share(data, step, 0).to(dist.device()), step.plan, targets, config.loss)
    gradients = {name: parameter.grad.cpu() for name, parameter in engine.trained.items() if parameter.grad is not None}
    snapshot = Snapshot(engine)
    engine.step(1e-3)
    snapshot.copy()
    state = snapshot.whole(dist.SideGroup())
    assert state is not None
    assert all(torch.equal(state.weights[name], parameter.detach().cpu()) for name, parameter in engine.trained.items())
    return loss, gradients, state.moments


def adapted(config: RunConfig) -> Embedder:
    """With adapters that do something, so that every one of their tensors has a gradient."""
    embedder = load_embedder(config.model, 1)
    with torch.no_grad():
        for name, parameter in embedder.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.linspace(-0.1, 0.1, parameter.numel()).sin().view_as(parameter))
    return embedder


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """Norm of the difference over the norm."""
    return float((one - other).norm() / one.norm())


def steps_on_both(folder: Path) -> dict[str, dict[str, Any]]:
    register()
    found = {}
    for name, (model, training) in STEPS.items():
        config = make_config(folder, model={**model, "dtype": "float64"}, training=training, loss={"false_negative_margin": 0.1})
        data = open_training_data(config, 1)
        loss, gradients, state = one_step(config, data, adapted(config))
        moved = adapted(config)
        with pretended_gpu() as nccl:
            move(moved)
            loss_there, gradients_there, state_there = one_step(config, data, moved)
        found[name] = {
            "loss": abs(loss - loss_there),
            "missing": len(gradients.keys() ^ gradients_there.keys()) + len(state.keys() ^ state_there.keys()),
            "gradients": max(distance(gradients[key], gradients_there[key]) for key in gradients),
            "moments": max(distance(state[key], state_there[key]) for key in state),
            "on the host": all(type(tensor) is torch.Tensor for tensor in state_there.values()),
            "collectives": set(nccl.calls),
        }
    return found


def test_steps_on_a_device_equal_those_on_the_cpu(tmp_path):
    """No tensor of a step, of the loss or of a checkpoint is on the wrong device; the numbers differ by the grouping of texts."""
    [found] = run_ranks(steps_on_both, 1, write_inputs(tmp_path), timeout=300)
    for name, result in found.items():
        assert result["missing"] == 0, name
        assert result["on the host"], name
        assert result["loss"] < 1e-9, name
        assert result["gradients"] < 1e-9, name
        assert result["moments"] < 1e-9, name
        assert {"all_gather_into_tensor", "reduce_scatter_tensor", "all_reduce"} <= result["collectives"], name


def four_bits_on_both() -> list[tuple[bool, bool]]:
    """(on the device, equal to the CPU's): stored weights, each part of the state, weights again, as a product takes them."""
    from bitsandbytes.functional import dequantize_4bit

    from hybrid_scale.model.nf4 import Slot, compress_scales, make_state, quantize_range

    slot = Slot("weight", (96, 64), four_bit=True)
    weights = torch.randn(96 * 64, generator=torch.Generator().manual_seed(0)).bfloat16()

    def tensors() -> list[torch.Tensor]:
        packed, scales = quantize_range(lambda a, b: weights[a:b].to(dist.device()), slot.weights, 0, slot.stored)
        state = make_state(slot, torch.bfloat16, *compress_scales(scales))
        held = [state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
        return [packed, *held, dequantize_4bit(packed.view(slot.stored_shape), state)]

    on_cpu = tensors()
    with pretended_gpu():
        there = tensors()
        return [(isinstance(b, OnGpu), torch.equal(a, b.cpu())) for a, b in zip(on_cpu, there, strict=True)]


def test_four_bit_weights_and_their_state_are_made_on_the_device():
    assert run_ranks(four_bits_on_both, 1) == [[(True, True)] * 7]


# -------------------------------------------------------------------------------------------------------------- one module


def test_one_module_asks_torch_cuda():
    named = set()
    for path in sorted([*ROOT.glob("hybrid_scale/**/*.py"), *ROOT.glob("launch/**/*.py")]):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and node.attr == "cuda" and ast.unparse(node) == "torch.cuda":
                named.add(path.relative_to(ROOT).as_posix())
    assert named == {"hybrid_scale/gpu.py"}

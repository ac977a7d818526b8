"""A 70B traced on one core under torch's fake tensors, forward and backward, against the formulas that plan it; and our own
embedder with real tensors, small.

Traced at depths 2 and 4 and extrapolated: every layer is alike, so weights, operations and bytes are linear in depth (checked
at depth 3). 2,048 tokens in 4 texts, LoRA on all linear layers, bfloat16. A fake tensor has a shape and a storage size, no data.
"""

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from transformers import AutoModel, LlamaConfig

from hybrid_scale.model.load import load_embedder
from hybrid_scale.model.shape import read_shape
from hybrid_scale.model.tiny import write_model
from hybrid_scale.planning.architecture import KNOWN
from hybrid_scale.planning.costs import DTYPE_BYTES, activation_bytes
from hybrid_scale.planning.speed import attention_flops, step_flops
from tests.train.setup import make_config, write_inputs

LLAMA = KNOWN["llama-3.1-70b"]
TEXTS, LENGTH = 4, 512
TOKENS = TEXTS * LENGTH
RANK = 16


@dataclass(frozen=True)
class Traced:
    """What a pass over `TOKENS` costs at one depth."""

    base: int
    adapters: int
    flops: float
    peak: float
    """Most bytes of storage alive at once that aren't parameters."""


class Storages(TorchDispatchMode):
    """Bytes of every storage that an operation makes, until it is freed."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.own = {t.untyped_storage()._cdata for t in [*module.parameters(), *module.buffers()]}
        self.alive: dict[int, int] = {}
        self.now = self.peak = 0

    def _add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.own or key in self.alive:
            return
        self.alive[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.now -= self.alive.pop(key, 0)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self._add, result)
        return result


def skeleton(layers: int, checkpointing: bool) -> tuple[nn.Module, FakeTensorMode]:
    """The real Llama with PEFT's real adapters; built on meta, then every parameter made a fake CPU tensor."""
    config = LlamaConfig(
        vocab_size=LLAMA.vocabulary,
        hidden_size=LLAMA.hidden,
        intermediate_size=LLAMA.intermediate,
        num_hidden_layers=layers,
        num_attention_heads=LLAMA.heads,
        num_key_value_heads=LLAMA.key_value_heads,
        use_cache=False,
        attn_implementation="sdpa",
    )
    with torch.device("meta"):
        model = AutoModel.from_config(config, dtype=torch.bfloat16)
    lora = LoraConfig(r=RANK, target_modules="all-linear")
    adapted: Any = get_peft_model(model, lora, autocast_adapter_dtype=False)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake:
        for module in adapted.modules():
            for name, parameter in list(module._parameters.items()):
                if parameter is not None:
                    empty = torch.empty(parameter.shape, dtype=torch.bfloat16)
                    module._parameters[name] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
            for name, buffer in list(module._buffers.items()):
                module._buffers[name] = None if buffer is None else torch.empty(buffer.shape, dtype=buffer.dtype)
    if checkpointing:
        # Non-reentrant: reentrant checkpointing keeps more alive under fake tensors than it does with real ones.
        adapted.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    adapted.enable_input_require_grads()
    return adapted.train(), fake


def step(model: nn.Module, gradients: bool) -> None:
    ids = torch.zeros(TEXTS, LENGTH, dtype=torch.long)
    with torch.set_grad_enabled(gradients):
        hidden = model(input_ids=ids).last_hidden_state
        if gradients:
            nn.functional.normalize(hidden[:, -1].float(), dim=-1).sum().backward()


@contextmanager
def counting_attention() -> Iterator[FlopCounterMode]:
    """FlopCounterMode, which knows attention on GPUs alone, told of the CPU's kernels (both products whole, as on GPUs)."""
    forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    with FlopCounterMode(display=False, custom_mapping={forward: _forward_flops, backward: _backward_flops}) as counter:
        yield counter


def _forward_flops(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _backward_flops(gradient: Any, query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return 2 * sdpa_flop_count(query, key, value)  # four products; that which a flash kernel repeats isn't counted


@cache
def trace(layers: int, checkpointing: bool = True, gradients: bool = True) -> Traced:
    """Operations and memory in a pass each: a FLOP counter keeps recomputed activations alive."""
    model, fake = skeleton(layers, checkpointing)
    base = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    adapters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    gc.collect()
    with fake:
        with Storages(model) as storages:
            step(model, gradients)
        peak = storages.peak
        with counting_attention() as counter:
            step(model, gradients)
    return Traced(base, adapters, counter.get_total_flops(), peak)


def at_depth(layers: int, **kind: bool) -> Traced:
    """Depths 2 and 4 extended to `layers`."""
    two, four = trace(2, **kind), trace(4, **kind)

    def extend(name: str) -> Any:
        a, b = getattr(two, name), getattr(four, name)
        return a + (b - a) * (layers - 2) // 2

    return Traced(extend("base"), extend("adapters"), extend("flops"), extend("peak"))


def test_depth_is_linear() -> None:
    assert at_depth(3) == trace(3)


def test_weights_of_a_70b_are_exact() -> None:
    traced = at_depth(80)
    assert traced.base == LLAMA.encoder
    assert traced.adapters == LLAMA.lora(RANK)


@pytest.mark.parametrize("checkpointing", [True, False])
def test_operations_of_a_70b(checkpointing: bool) -> None:
    """To a thousandth. Without checkpointing no gradient reaches the inputs of the first layer's adapters: they need none."""
    traced = at_depth(80, checkpointing=checkpointing)
    attention = attention_flops(LLAMA, LENGTH, causal=False)
    formula = step_flops(LLAMA.linear, LLAMA.lora(RANK), attention, TOKENS, checkpointing=checkpointing)
    assert formula == pytest.approx(traced.flops, rel=1e-3)


def test_operations_of_a_pass_without_gradients() -> None:
    """What a token embedded twice costs more."""
    once, twice = (step_flops(LLAMA.linear, LLAMA.lora(RANK), attention_flops(LLAMA, LENGTH, False), 0, n) for n in (0, TOKENS))
    assert twice - once == pytest.approx(at_depth(80, gradients=False).flops, rel=1e-3)


@pytest.mark.parametrize(("checkpointing", "gigabytes"), [(True, 3.80), (False, 65.1)])
def test_activations_of_a_70b(checkpointing: bool, gigabytes: float) -> None:
    """To 3 %; the absolute size pins the trace itself."""
    traced = at_depth(80, checkpointing=checkpointing)
    formula = activation_bytes(LLAMA, TOKENS, TOKENS, 0, checkpointing=checkpointing)
    assert traced.peak == pytest.approx(gigabytes * 1e9, rel=0.01)
    assert formula == pytest.approx(traced.peak, rel=0.03)


def test_activations_without_gradients() -> None:
    traced = at_depth(80, gradients=False)
    assert activation_bytes(LLAMA, 0, 0, TOKENS) == pytest.approx(traced.peak, rel=0.03)


# Our own embedder, real tensors: packed attention, reentrant checkpointing, adapters that follow the activations


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = write_inputs(tmp_path_factory.mktemp("memory"))
    write_model(place / "model", 400, hidden=512, layers=4, heads=8)
    return place


@pytest.mark.parametrize(
    ("model", "gradients", "tolerance"),
    [
        ({}, True, 0.03),
        ({"quantization": "nf4"}, True, 0.03),
        ({"dtype": "float32"}, True, 0.03),
        ({"gradient_checkpointing": False}, True, 0.05),
        ({"quantization": "nf4"}, False, 0.03),
        ({"attention_implementation": "sdpa"}, True, 0.03),
    ],
)
def test_activations_of_our_embedder(folder: Path, model: dict[str, Any], gradients: bool, tolerance: float) -> None:
    """16 texts of 128 tokens, 512 wide, 4 layers."""
    settings = {"dtype": "bfloat16", "gradient_checkpointing": True, "lora": {"rank": 4}, **model}
    config = make_config(folder, model=settings).model
    embedder, shape = load_embedder(config, 0), read_shape(config)
    ids = torch.arange(TOKENS).remainder(300) + 3
    if config.packed:
        batch = {"input_ids": ids[None], "lengths": torch.full((16,), TOKENS // 16)}
    else:
        batch = {"input_ids": ids.view(16, -1), "attention_mask": torch.ones(16, TOKENS // 16, dtype=torch.long)}
    gc.collect()
    with Storages(embedder) as storages, torch.set_grad_enabled(gradients):
        embeddings = embedder(**batch)
        if gradients:
            embeddings.sum().backward()
    tokens = (TOKENS, TOKENS, 0) if gradients else (0, 0, TOKENS)
    formula = activation_bytes(shape, *tokens, DTYPE_BYTES[config.dtype], config.gradient_checkpointing)
    assert formula == pytest.approx(storages.peak, rel=tolerance)

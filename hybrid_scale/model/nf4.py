"""Weights in 4 bits: their form, the slots of a model that hold them, how a part of one is quantised, bitsandbytes' objects.

A 4-bit weight of n elements is stored as n / 4 elements of bfloat16 (packed) and a state: one byte a block of 64 elements, one
float32 a 256 blocks. Knows no file and no rank.
"""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # a missing optional CPU kernel, said at import

import bitsandbytes as bnb  # noqa: E402
from bitsandbytes import functional as bnb_functional  # noqa: E402
from torch import nn  # noqa: E402
from transformers import BitsAndBytesConfig  # noqa: E402

STORAGE = torch.bfloat16
"""Type in which packed weights are stored: ZeRO-3 counts elements in its buffers, 2 bytes each as for bfloat16 weights."""
PER_STORED = 4
"""4-bit weights in one stored element."""
BLOCK = 64
NESTED_BLOCK = 256
CHUNK = 1 << 22
"""Weights quantised at once: bitsandbytes' CPU kernel takes 14 bytes of temporaries a weight (58 MB)."""
QuantState = bnb_functional.QuantState
STATE_FACTS = "quant_state.bitsandbytes__nf4"
"""What bitsandbytes calls the tensor that holds a state's sizes and types, as JSON."""


def nf4(dtype: torch.dtype) -> BitsAndBytesConfig:
    """The one form of 4-bit weights in this project; `dtype` is that of the products."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=STORAGE,
    )


@dataclass(frozen=True)
class Slot:
    """A weight of the model as it will be held."""

    name: str
    shape: tuple[int, ...]
    """As the model computes with it."""
    four_bit: bool

    @property
    def weights(self) -> int:
        return math.prod(self.shape)

    @property
    def stored(self) -> int:
        """Elements that ZeRO-3 shares out."""
        return self.weights // PER_STORED if self.four_bit else self.weights

    @property
    def stored_shape(self) -> tuple[int, ...]:
        return (self.stored, 1) if self.four_bit else self.shape

    @property
    def blocks(self) -> int:
        return -(-self.weights // BLOCK)

    def state(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Names (after the weight's), types and shapes of the tensors that make up the state of a 4-bit weight."""
        if not self.four_bit:
            return {}
        return {
            "absmax": (torch.uint8, (self.blocks,)),
            "nested_absmax": (torch.float32, (-(-self.blocks // NESTED_BLOCK),)),
            "nested_quant_map": (torch.float32, (256,)),
            "quant_map": (torch.float32, (16,)),
        }


def slots_of(model: nn.Module) -> list[Slot]:
    """The weights of a skeleton, in its order."""
    four_bit = {id(m.weight) for m in model.modules() if isinstance(m, bnb.nn.Linear4bit)}
    return [Slot(name, tuple(p.shape), id(p) in four_bit) for name, p in model.named_parameters()]


# -------------------------------------------------------------------------------------------------------- quantisation

Read = Callable[[int, int], torch.Tensor]
"""Elements [start, stop) of a flattened tensor, in the model's type on this rank's device."""


def quantize_range(read: Read, weights: int, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Stored elements [start, stop) of a 4-bit weight, and the scales (float32) of all blocks that they touch.

    Blocks are quantised by themselves, so that a part is bit for bit what it would be in the whole.
    """
    first = start * PER_STORED // BLOCK * BLOCK
    last = min(-(-stop * PER_STORED // BLOCK) * BLOCK, weights)
    parts = [_quantize_chunk(read(at, min(at + CHUNK, last))) for at in range(first, last, CHUNK)]
    if not parts:
        nothing = read(0, 0)
        return nothing.to(STORAGE), nothing.float()
    packed = torch.cat([part for part, _ in parts])
    skipped = start - first // PER_STORED
    return packed[skipped : skipped + stop - start], torch.cat([scales for _, scales in parts])


def _quantize_chunk(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    packed, state = bnb_functional.quantize_4bit(
        values, blocksize=BLOCK, compress_statistics=False, quant_type="nf4", quant_storage=STORAGE
    )
    return packed.reshape(-1), state.absmax


def compress_scales(scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Double quantisation of a weight's scales: a byte each, a float32 a 256 of them, and their mean (2305.14314, section 3)."""
    offset = scales.mean()
    compressed, state = bnb_functional.quantize_blockwise(scales - offset, blocksize=NESTED_BLOCK)
    return compressed, state.absmax, offset


def make_state(slot: Slot, dtype: torch.dtype, absmax: torch.Tensor, nested: torch.Tensor, offset: torch.Tensor) -> QuantState:
    """bitsandbytes' description of a 4-bit weight from what `compress_scales` gave."""
    device = absmax.device
    return QuantState(
        absmax=absmax,
        shape=torch.Size(slot.shape),
        dtype=dtype,
        blocksize=BLOCK,
        code=bnb_functional.get_4bit_type("nf4", device=device),
        quant_type="nf4",
        offset=offset,
        state2=QuantState(absmax=nested, code=dynamic_map(device), blocksize=NESTED_BLOCK, dtype=torch.float32),
    )


def round_trip(weights: torch.Tensor) -> torch.Tensor:
    """Weights [n], n a multiple of BLOCK, quantised and back, in their type and on their device."""
    slot = Slot("weight", (len(weights) // BLOCK, BLOCK), four_bit=True)
    packed, scales = quantize_range(lambda start, stop: weights[start:stop], slot.weights, 0, slot.stored)
    state = make_state(slot, weights.dtype, *compress_scales(scales))
    return bnb_functional.dequantize_4bit(packed.view(slot.stored_shape), state).flatten()


def dynamic_map(device: torch.device) -> torch.Tensor:
    """The code of the second quantisation, as `quantize_blockwise` takes it."""
    return bnb_functional.quantize_blockwise(torch.zeros(1, device=device), blocksize=NESTED_BLOCK)[1].code


# ------------------------------------------------------------------------------------------------- bitsandbytes' objects


def owner_of(model: nn.Module, slot: Slot) -> tuple[nn.Module, str]:
    """The module that holds a weight, and the weight's name in it."""
    path, _, leaf = slot.name.rpartition(".")
    return model.get_submodule(path), leaf


def four_bit_parameter(model: nn.Module, slot: Slot) -> bnb.nn.Params4bit:
    """An empty 4-bit weight in its place."""
    owner, leaf = owner_of(model, slot)
    parameter = bnb.nn.Params4bit(
        torch.empty(0, dtype=STORAGE),
        requires_grad=False,
        blocksize=BLOCK,
        compress_statistics=True,
        quant_type="nf4",
        quant_storage=STORAGE,
        module=owner,  # type: ignore[arg-type]
        bnb_quantized=True,
    )
    owner._parameters[leaf] = parameter
    return parameter


def set_state(parameter: bnb.nn.Params4bit, state: QuantState) -> None:
    parameter.quant_state = state
    parameter.module.quant_state = state


def read_state(stored: dict[str, torch.Tensor], device: torch.device) -> QuantState:
    """The state of a weight from the tensors stored beside it, named as `Slot.state` and `STATE_FACTS`."""
    return QuantState.from_dict(stored, device=device)

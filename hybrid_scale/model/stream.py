"""A frozen base model straight into the ZeRO-3 shares of its ranks: no rank ever holds the whole of it, not even in 4 bits.

Two sources: an ordinary safetensors checkpoint, of which each rank reads and quantises what it keeps, and a folder that
`quantize` wrote once, of which each rank reads its bytes. Uses private attributes of DeepSpeed, which is pinned for that. Knows
no adapter, no optimiser and no config file of a run.

W ranks. Stored elements of a weight are shared out, the state of a 4-bit one is whole on every rank.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from hybrid_scale import dist
from hybrid_scale.base_files import locate
from hybrid_scale.config import ModelSettings
from hybrid_scale.model.base import is_multimodal
from hybrid_scale.model.nf4 import (
    BLOCK,
    CHUNK,
    NESTED_BLOCK,
    PER_STORED,
    STATE_FACTS,
    STORAGE,
    QuantState,
    Read,
    Slot,
    compress_scales,
    dynamic_map,
    four_bit_parameter,
    make_state,
    owner_of,
    quantize_range,
    read_state,
    set_state,
    slots_of,
)
from hybrid_scale.model.quantize import read_manifest
from hybrid_scale.model.skeleton import fill_buffers, make_skeleton, why_not
from hybrid_scale.model.weight_files import Checkpoint, Progress, match_names, reader, say

# --------------------------------------------------------------------------------------------------------------- shares


@dataclass(frozen=True)
class Cut:
    """Elements [start, stop) of a flattened tensor, held in `length` elements, the rest of them zeros."""

    start: int
    stop: int
    length: int


def cut(numel: int, parts: int, part: int) -> Cut:
    """How ZeRO-3 shares out a tensor: equal lengths, padding at the end."""
    length = -(-numel // parts)
    start = min(part * length, numel)
    return Cut(start, min(start + length, numel), length)


def share_bytes(slots: Iterable[Slot], dtype: torch.dtype, world: int) -> dict[str, int]:
    """Bytes on each rank after a load, by kind, and the largest that one weight needs besides while it is quantised."""
    slots = list(slots)
    packed = sum(cut(s.stored, world, 0).length * STORAGE.itemsize for s in slots if s.four_bit)
    states = [math.prod(shape) * kind.itemsize for s in slots for kind, shape in s.state().values()]
    return {
        "4-bit weights": packed,
        "other weights": sum(cut(s.stored, world, 0).length * dtype.itemsize for s in slots if not s.four_bit),
        "quantisation state": sum(states),
        "largest weight in passing": max((_passing(s, world, dtype) for s in slots if s.four_bit), default=0),
    }


def _passing(slot: Slot, world: int, dtype: torch.dtype) -> int:
    """Scales of one weight in float32 (own, padded, of all ranks), and a chunk with the kernel's temporaries."""
    chunk = min(CHUNK, -(-slot.weights // world) + BLOCK)
    return 2 * 4 * slot.blocks + 14 * chunk + chunk * dtype.itemsize


# ----------------------------------------------------------------------------------------------------------- DeepSpeed


def without_compiled_op() -> None:
    """Keep DeepSpeed from compiling a C++ op for inference on a CPU: a killed build hangs every later start."""
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


class Converter:
    """Makes ZeRO-3 parameters out of this rank's part of a weight alone. DeepSpeed 0.19.8's private attributes."""

    def __init__(self, settings: dict[str, Any]):
        import deepspeed

        without_compiled_op()
        self.zero = deepspeed.zero.Init(config_dict_or_path=settings, enabled=False)
        if self.zero.mem_efficient_linear:
            # DeepSpeed replaces torch's linear where it shares out weights itself, and not where it finds them shared. Autograd
            # would keep each gathered weight otherwise; and biases are added after rounding, so that results depend on it.
            self.zero._enable_mem_efficient_linear()

    def adopt(self, parameter: nn.Parameter, shape: tuple[int, ...], part: Callable[[int, int], torch.Tensor]) -> None:
        """Turn an empty parameter into a shared one of `shape`; `part(start, stop)` gives flattened elements of it.

        Under hpZ `part` is asked twice, the second time for the group's copy.
        """
        zero, dtype = self.zero, parameter.dtype
        numel = math.prod(shape)
        # One element in the shape of all: DeepSpeed takes shape and count from it, and binds its methods.
        parameter.data = torch.empty((), dtype=dtype, device=zero.local_device).expand(shape)
        zero._convert_to_deepspeed_param(parameter)
        ours = cut(numel, zero.dp_world_size, zero.rank)
        parameter.ds_tensor = self._hold(ours, dtype, part)  # type: ignore[attr-defined]
        parameter.ds_numel_aligned = ours.length * zero.dp_world_size  # type: ignore[attr-defined]
        if zero.zero_param_process_group is not None:
            length = ours.length * zero.dp_world_size // zero.num_ranks_in_param_group
            start = min(length * zero.rank_in_group, numel)
            second = Cut(start, min(start + length, numel), length)
            parameter.ds_secondary_tensor = self._hold(second, dtype, part)  # type: ignore[attr-defined]
        self._empty(parameter)

    def _hold(self, ours: Cut, dtype: torch.dtype, part: Callable[[int, int], torch.Tensor]) -> torch.Tensor:
        from deepspeed.accelerator import get_accelerator
        from deepspeed.runtime.swap_tensor.partitioned_param_swapper import PartitionedParamStatus

        held = torch.zeros(ours.length, dtype=dtype, device=self.zero.remote_device)
        if self.zero.pin_memory:
            held = get_accelerator().pin_memory(held)
        held[: ours.stop - ours.start] = part(ours.start, ours.stop)
        held.ds_numel = ours.length  # type: ignore[attr-defined]
        held.status = PartitionedParamStatus.AVAILABLE  # type: ignore[attr-defined]
        held.final_location = None  # type: ignore[attr-defined]
        return held

    def _empty(self, parameter: nn.Parameter) -> None:
        from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

        parameter.data = torch.empty(0, dtype=parameter.dtype, device=self.zero.local_device)
        parameter.ds_status = ZeroParamStatus.NOT_AVAILABLE  # type: ignore[attr-defined]


# --------------------------------------------------------------------------------------------------------------- loading


def load_sharded(
    settings: ModelSettings, config: PretrainedConfig, attention: str, deepspeed: dict[str, Any]
) -> PreTrainedModel | None:
    """The backbone of `settings`, frozen, every weight a ZeRO-3 parameter of which this rank holds ceil(n / W) elements.

    `deepspeed`: the JSON of the run without "auto"; the process group exists. Collective. None, and the reason said, where the
    architecture must be loaded by transformers. Raises ModelError on every rank: see `Checkpoint` and `match_names`.
    """
    four_bit, dtype = settings.quantization == "nf4", getattr(torch, settings.dtype)
    model = make_skeleton(config, dtype, attention, four_bit, settings.trust_remote_code)
    written = read_manifest(locate(settings)) is not None
    foreign = hasattr(config, "quantization_config") and not written
    reason = "it was quantised elsewhere" if foreign else why_not(model) or _why_not_with(deepspeed)
    if reason:
        say(f"{settings.base}: loaded whole on every rank, then shared: {reason}.")
        return None
    checkpoint, names = dist.together(lambda: _open(settings, model, written))
    _fill(model, checkpoint, names, written, Converter(deepspeed))
    fill_buffers(model, dist.device())
    return model.eval()


def _why_not_with(deepspeed: dict[str, Any]) -> str | None:
    zero = deepspeed["zero_optimization"]
    if (zero.get("offload_param") or {}).get("device") == "nvme":
        return "DeepSpeed keeps its weights on NVMe"
    if zero.get("zero_quantized_weights") or zero.get("zero_quantized_nontrainable_weights"):
        return "DeepSpeed quantises its weights"
    return None


def _open(settings: ModelSettings, model: PreTrainedModel, written: bool) -> tuple[Checkpoint, dict[str, str]]:
    checkpoint = Checkpoint(locate(settings))
    return checkpoint, match_names(model, checkpoint, written, is_multimodal(settings))


def _fill(model: PreTrainedModel, checkpoint: Checkpoint, names: dict[str, str], written: bool, converter: Converter) -> None:
    dtype, device = model.dtype, dist.device()
    slots = checkpoint.in_order(slots_of(model), names)
    progress = Progress("loading", sum(slot.stored * (STORAGE if slot.four_bit else dtype).itemsize for slot in slots))
    code = dynamic_map(device)
    for slot in slots:
        name = names[slot.name]
        if not slot.four_bit:
            _fill_plain(model, slot, converter, reader(checkpoint, name, dtype, device), dtype)
        elif written:
            _fill_written(model, slot, converter, checkpoint, names)
        else:
            _fill_quantised(model, slot, converter, reader(checkpoint, name, dtype, device), code)
        progress.add(slot.stored * (STORAGE if slot.four_bit else dtype).itemsize)
    checkpoint.close()


def _fill_plain(model: nn.Module, slot: Slot, converter: Converter, read: Read, dtype: torch.dtype) -> None:
    owner, leaf = owner_of(model, slot)
    parameter = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
    owner._parameters[leaf] = parameter
    converter.adopt(parameter, slot.shape, read)


def _fill_quantised(model: PreTrainedModel, slot: Slot, converter: Converter, read: Read, code: torch.Tensor) -> None:
    parameter = four_bit_parameter(model, slot)
    scales: list[torch.Tensor] = []

    def part(start: int, stop: int) -> torch.Tensor:
        packed, of_blocks = quantize_range(read, slot.weights, start, stop)
        scales.append(of_blocks)
        return packed

    converter.adopt(parameter, slot.stored_shape, part)
    set_state(parameter, _agree_on_state(slot, model.dtype, scales[0], code))


def _fill_written(model: nn.Module, slot: Slot, converter: Converter, checkpoint: Checkpoint, names: dict[str, str]) -> None:
    parameter = four_bit_parameter(model, slot)
    converter.adopt(parameter, slot.stored_shape, lambda start, stop: checkpoint.read(names[slot.name], start, stop))
    keys = [*slot.state(), STATE_FACTS]
    stored = {key: checkpoint.whole(names[f"{slot.name}.{key}"]) for key in keys}
    set_state(parameter, read_state(stored, dist.device()))


def _agree_on_state(slot: Slot, dtype: torch.dtype, own: torch.Tensor, code: torch.Tensor) -> QuantState:
    """Each rank's scales -> the state of the whole weight, computed on rank 0 alone: equal everywhere by construction."""
    world, rank = dist.world_size(), dist.rank()
    ends = [-(-cut(slot.stored, world, r).stop * PER_STORED // BLOCK) for r in range(world)]
    ends[-1] = slot.blocks
    starts = [0, *ends[:-1]]
    # A block across two ranks counts for the first of them.
    mine = own[len(own) - (ends[rank] - starts[rank]) :] if ends[rank] > starts[rank] else own[:0]
    scales = dist.gather_rows(mine.contiguous(), [end - start for start, end in zip(starts, ends, strict=True)])
    nested = -(-slot.blocks // NESTED_BLOCK)
    if rank == 0:
        absmax, small, offset = compress_scales(scales)
        sent = torch.cat([small.view(torch.uint8), offset.reshape(1).view(torch.uint8), absmax])
    else:
        sent = torch.empty(4 * (nested + 1) + slot.blocks, dtype=torch.uint8, device=own.device)
    del scales
    dist.broadcast_(sent)
    floats = sent[: 4 * (nested + 1)].clone().view(torch.float32)
    absmax = sent[4 * (nested + 1) :].clone()
    state = make_state(slot, dtype, absmax, floats[:-1].clone(), floats[-1].clone())
    state.state2.code = code
    return state

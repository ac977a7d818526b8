"""A frozen base model straight into the ZeRO-3 shares of its ranks: no rank ever holds the whole of it, not even in 4 bits.

Two sources: an ordinary safetensors checkpoint, of which each rank reads and quantises what it keeps, and a folder that
`quantise` wrote once, of which each rank reads its bytes. Uses private attributes of DeepSpeed (pinned for that) and the names of
transformers' modules. Knows no adapter, no optimiser and no config file of a run.

W ranks. A 4-bit weight of n elements is stored as n / 4 elements of bfloat16 (packed) and a state: one byte a block of 64
elements, one float32 a 256 blocks. Packed elements are shared out, the state is whole on every rank.
"""

import copy
import hashlib
import json
import logging
import math
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # a missing optional CPU kernel, said at import

import bitsandbytes as bnb  # noqa: E402
from bitsandbytes import functional as bnb_functional  # noqa: E402
from safetensors import SafetensorError, safe_open  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from torch import nn  # noqa: E402
from transformers import AutoConfig, AutoModel, BitsAndBytesConfig, PretrainedConfig, PreTrainedModel  # noqa: E402
from transformers.conversion_mapping import get_model_conversion_mapping  # noqa: E402
from transformers.integrations.bitsandbytes import replace_with_bnb_linear  # noqa: E402
from transformers.modeling_utils import set_quantized_state  # noqa: E402
from transformers.quantizers.base import HfQuantizer  # noqa: E402
from transformers.utils.hub import cached_file, get_checkpoint_shard_files  # noqa: E402

from hybrid_scale import dist  # noqa: E402
from hybrid_scale.config import ModelSettings  # noqa: E402
from hybrid_scale.errors import ModelError, describe  # noqa: E402
from hybrid_scale.runs import read_json, write_json  # noqa: E402

STORAGE = torch.bfloat16
"""Type in which packed weights are stored: ZeRO-3 counts elements in its buffers, 2 bytes each as for bfloat16 weights."""
PER_STORED = 4
"""4-bit weights in one stored element."""
BLOCK = 64
NESTED_BLOCK = 256
CHUNK = 1 << 22
"""Weights quantised at once: bitsandbytes' CPU kernel takes 14 bytes of temporaries a weight (58 MB)."""
MANIFEST = "quantised.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
FILE_BYTES = 2 << 30
"""Size at which `quantise` begins a new file, which it holds in memory until it is written."""
QUIET_SECONDS = 10.0
LISTED = 5


def nf4(dtype: torch.dtype) -> BitsAndBytesConfig:
    """The one form of 4-bit weights in this project; `dtype` is that of the products."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=STORAGE,
    )


def _say(text: str) -> None:
    if dist.rank() == 0:
        print(text, file=sys.stderr, flush=True)


# --------------------------------------------------------------------------------------------------------------- layout


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


def slots_of(model: nn.Module) -> list[Slot]:
    """The weights of a skeleton, in its order."""
    four_bit = {id(m.weight) for m in model.modules() if isinstance(m, bnb.nn.Linear4bit)}
    return [Slot(name, tuple(p.shape), id(p) in four_bit) for name, p in model.named_parameters()]


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


# ------------------------------------------------------------------------------------------------------------- skeleton


def make_skeleton(
    config: PretrainedConfig, dtype: torch.dtype, attention: str, four_bit: bool, trust_remote_code: bool = False
) -> PreTrainedModel:
    """The model without storage (the `meta` device), its linear layers replaced as transformers would replace them."""
    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"), set_quantized_state():  # which keeps transformers from DeepSpeed's own construction
        model: PreTrainedModel = AutoModel.from_config(
            config, dtype=dtype, attn_implementation=attention, trust_remote_code=trust_remote_code
        )
    if four_bit:
        quantisation = nf4(dtype)
        kept = HfQuantizer.get_modules_to_not_convert(model, None, list(model._keep_in_fp32_modules or ()))
        replace_with_bnb_linear(model, kept, quantisation)
        model.is_loaded_in_4bit = True  # type: ignore[assignment]
        model.config.quantization_config = quantisation
    return model.requires_grad_(False)


def why_not(model: PreTrainedModel) -> str | None:
    """Why this architecture must be loaded by transformers, whole on every rank; None where it can be streamed."""
    if get_model_conversion_mapping(model, add_legacy=False):
        return "transformers renames or merges its weights"
    if model._keep_in_fp32_modules_strict:
        return "some of its weights stay in float32"
    if set(model.state_dict()) - {name for name, _ in model.named_parameters()}:
        return "its checkpoints hold more than parameters, or one parameter twice"
    if any(slot.four_bit and slot.weights % PER_STORED for slot in slots_of(model)):
        return f"a linear layer's weights don't fill whole stored elements of {PER_STORED}"
    return None


def _fill_buffers(model: PreTrainedModel, device: torch.device) -> None:
    """Compute what no checkpoint holds (rotary frequencies, Gemma's scale), each as its model's initialisation does."""
    for parameter in model.parameters():
        parameter._is_hf_initialized = True  # type: ignore[attr-defined]
    sentinels = {}
    for path, module in model.named_modules():
        missing = [name for name, buffer in module._buffers.items() if buffer is not None and buffer.is_meta]
        for name in missing:
            sentinels[f"{path}.{name}"] = module._buffers[name] = _sentinel(module._buffers[name], device)
        if missing:
            with torch.no_grad():
                model._init_weights(module)
    left = [name for name, buffer in sentinels.items() if torch.equal(_bits(buffer), _bits(_sentinel(buffer, device)))]
    if left:
        raise ModelError(f"{type(model).__name__}: nothing computes the buffers {left[:LISTED]} ({len(left)}).")


def _sentinel(like: torch.Tensor | None, device: torch.device) -> torch.Tensor:
    assert like is not None
    value = float("nan") if like.is_floating_point() else torch.iinfo(like.dtype).max if like.dtype != torch.bool else True
    return torch.full(like.shape, value, dtype=like.dtype, device=device)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


# ----------------------------------------------------------------------------------------------------------- checkpoint


class Checkpoint:
    """The safetensors files of a model, opened one at a time. Headers are read at once, weights when asked for.

    Raises ModelError: no such files, or one that isn't what its header says (a download cut short).
    """

    def __init__(self, base: str, revision: str | None = None):
        self.base = base
        self.files = _weight_files(base, revision)
        self.where: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.types: dict[str, str] = {}
        self._open: tuple[Path, Any] | None = None
        for path in self.files:
            file = self._file(path)
            for name in file.keys():  # noqa: SIM118 (not a dictionary)
                held = file.get_slice(name)
                self.where[name], self.shapes[name], self.types[name] = path, tuple(held.get_shape()), held.get_dtype()

    def _file(self, path: Path) -> Any:
        if self._open is None or self._open[0] != path:
            self._open = None  # lets the old one's mapping go first
            try:
                self._open = (path, safe_open(path, "pt"))
            except (OSError, SafetensorError) as error:
                rule = f"a whole safetensors file is expected here: {error}"
                raise ModelError(describe("model.base", str(path), rule, "Copy or download it again.")) from None
        return self._open[1]

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Elements [start, stop) of a flattened tensor; no more than the rows that hold them are touched."""
        held = self._file(self.where[name]).get_slice(name)
        shape = self.shapes[name]
        row = math.prod(shape[1:])
        if start >= stop:
            return torch.empty(0, dtype=held[:0].dtype)
        first = start // row
        rows = held[first : -(-stop // row)]
        return rows.reshape(-1)[start - first * row : stop - first * row]

    def whole(self, name: str) -> torch.Tensor:
        """A small tensor with memory of its own."""
        tensor: torch.Tensor = self._file(self.where[name]).get_tensor(name)
        return tensor.clone()

    def in_order(self, slots: Iterable[Slot], names: dict[str, str]) -> list[Slot]:
        """Slots file by file."""
        return sorted(slots, key=lambda slot: str(self.where[names[slot.name]]))

    def close(self) -> None:
        self._open = None


def _weight_files(base: str, revision: str | None) -> list[Path]:
    try:
        single = cached_file(base, SINGLE, revision=revision, _raise_exceptions_for_missing_entries=False)
        if single is not None:
            return [Path(single)]
        index = cached_file(base, INDEX, revision=revision, _raise_exceptions_for_missing_entries=False)
        if index is None:
            raise OSError(f"it holds neither {SINGLE} nor {INDEX}")
        return [Path(path) for path in get_checkpoint_shard_files(base, index, revision=revision)[0]]
    except (OSError, ValueError) as error:
        raise ModelError(describe("model.base", base, f"its weights can't be found: {error}")) from None


def match_names(model: PreTrainedModel, checkpoint: Checkpoint, written: bool) -> dict[str, str]:
    """Name in the model -> name in the files, for every tensor that will be read. `written`: by `quantise`.

    Checkpoints of causal language models call the backbone `model.` and hold an `lm_head.weight`, which nothing here uses.
    Raises ModelError listing what is missing, unexpected or of another shape.
    """
    expected: dict[str, tuple[int, ...] | None] = {}
    for slot in slots_of(model):
        expected[slot.name] = slot.stored_shape if written else slot.shape
        if written and slot.four_bit:
            expected.update({f"{slot.name}.{key}": shape for key, (_, shape) in slot.state().items()})
            expected[f"{slot.name}.quant_state.bitsandbytes__nf4"] = None
    names, unexpected, head = _sort_names(checkpoint, set(expected), f"{model.base_model_prefix}.")
    embedding = next((n for n, p in model.named_parameters() if p is model.get_input_embeddings().weight), None)
    if head and embedding and embedding not in names and model.config.get_text_config().tie_word_embeddings:
        names[embedding], head = head, None
    missing = sorted(set(expected) - set(names))
    shapes = {name: (checkpoint.shapes[names[name]], shape) for name, shape in expected.items() if name in names and shape}
    wrong = [f"{name} {list(found)} instead of {list(shape)}" for name, (found, shape) in shapes.items() if found != shape]
    _refuse_names(checkpoint.base, missing, unexpected, wrong)
    if head:
        _say(f"{checkpoint.base}: {head} isn't used: embeddings are taken before it.")
    return names


def _sort_names(checkpoint: Checkpoint, expected: set[str], prefix: str) -> tuple[dict[str, str], list[str], str | None]:
    """Names found by name in the model, names nobody expects, and the name of the language model's head if there is one."""
    names: dict[str, str] = {}
    unexpected, head = [], None
    for name in checkpoint.where:
        short = name.removeprefix(prefix)
        if short in expected and short not in names:
            names[short] = name
        elif name == "lm_head.weight":
            head = name
        elif not re.search(r"rotary_emb\.inv_freq$", name):  # older checkpoints hold it; it is computed
            unexpected.append(name)
    return names, unexpected, head


def _refuse_names(base: str, missing: list[str], unexpected: list[str], wrong: list[str]) -> None:
    kinds = {"missing": missing, "unexpected": sorted(unexpected), "of another shape": wrong}
    found = [f"{len(names)} {kind}: {', '.join(names[:LISTED])}" for kind, names in kinds.items() if names]
    if found:
        listed = "; ".join(found)
        raise ModelError(f"{base}: its weights don't fit its config.json (names up to {LISTED} of each kind): {listed}.")


# --------------------------------------------------------------------------------------------------------- quantisation

Read = Callable[[int, int], torch.Tensor]
"""Elements [start, stop) of a flattened tensor, in the model's type on this rank's device."""


def quantise_range(read: Read, weights: int, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Stored elements [start, stop) of a 4-bit weight, and the scales (float32) of all blocks that they touch.

    Blocks are quantised by themselves, so that a part is bit for bit what it would be in the whole.
    """
    first = start * PER_STORED // BLOCK * BLOCK
    last = min(-(-stop * PER_STORED // BLOCK) * BLOCK, weights)
    parts = [_quantise_chunk(read(at, min(at + CHUNK, last))) for at in range(first, last, CHUNK)]
    if not parts:
        nothing = read(0, 0)
        return nothing.to(STORAGE), nothing.float()
    packed = torch.cat([part for part, _ in parts])
    skipped = start - first // PER_STORED
    return packed[skipped : skipped + stop - start], torch.cat([scales for _, scales in parts])


def _quantise_chunk(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    packed, state = bnb_functional.quantize_4bit(
        values, blocksize=BLOCK, compress_statistics=False, quant_type="nf4", quant_storage=STORAGE
    )
    return packed.reshape(-1), state.absmax


def compress_scales(scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Double quantisation of a weight's scales: a byte each, a float32 a 256 of them, and their mean (2305.14314, section 3)."""
    offset = scales.mean()
    compressed, state = bnb_functional.quantize_blockwise(scales - offset, blocksize=NESTED_BLOCK)
    return compressed, state.absmax, offset


def make_state(
    slot: Slot, dtype: torch.dtype, absmax: torch.Tensor, nested: torch.Tensor, offset: torch.Tensor
) -> bnb_functional.QuantState:
    """bitsandbytes' description of a 4-bit weight from what `compress_scales` gave."""
    device = absmax.device
    return bnb_functional.QuantState(
        absmax=absmax,
        shape=torch.Size(slot.shape),
        dtype=dtype,
        blocksize=BLOCK,
        code=bnb_functional.get_4bit_type("nf4", device=device),
        quant_type="nf4",
        offset=offset,
        state2=bnb_functional.QuantState(absmax=nested, code=_dynamic_map(device), blocksize=NESTED_BLOCK, dtype=torch.float32),
    )


def _dynamic_map(device: torch.device) -> torch.Tensor:
    """The code of the second quantisation, as `quantize_blockwise` takes it."""
    return bnb_functional.quantize_blockwise(torch.zeros(1, device=device), blocksize=NESTED_BLOCK)[1].code


def _agree_on_state(slot: Slot, dtype: torch.dtype, own: torch.Tensor, code: torch.Tensor) -> bnb_functional.QuantState:
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


# ----------------------------------------------------------------------------------------------------------- DeepSpeed


class Converter:
    """Makes ZeRO-3 parameters out of this rank's part of a weight alone. DeepSpeed 0.19.8's private attributes."""

    def __init__(self, settings: dict[str, Any]):
        import deepspeed
        import deepspeed.ops

        # A C++ op for inference that DeepSpeed would compile on a CPU; a killed build hangs every later start.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
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
    written = read_manifest(settings.base, settings.revision) is not None
    foreign = hasattr(config, "quantization_config") and not written
    reason = "it was quantised elsewhere" if foreign else why_not(model) or _why_not_with(deepspeed)
    if reason:
        _say(f"{settings.base}: loaded whole on every rank, then shared: {reason}.")
        return None
    checkpoint, names = dist.together(lambda: _open(settings, model, written))
    _fill(model, checkpoint, names, written, Converter(deepspeed))
    _fill_buffers(model, dist.device())
    return model.eval()


def _why_not_with(deepspeed: dict[str, Any]) -> str | None:
    zero = deepspeed["zero_optimization"]
    if (zero.get("offload_param") or {}).get("device") == "nvme":
        return "DeepSpeed keeps its weights on NVMe"
    if zero.get("zero_quantized_weights") or zero.get("zero_quantized_nontrainable_weights"):
        return "DeepSpeed quantises its weights"
    return None


def _open(settings: ModelSettings, model: PreTrainedModel, written: bool) -> tuple[Checkpoint, dict[str, str]]:
    checkpoint = Checkpoint(settings.base, settings.revision)
    return checkpoint, match_names(model, checkpoint, written)


def _fill(model: PreTrainedModel, checkpoint: Checkpoint, names: dict[str, str], written: bool, converter: Converter) -> None:
    dtype, device = model.dtype, dist.device()
    slots = checkpoint.in_order(slots_of(model), names)
    progress = Progress("loading", sum(slot.stored * (STORAGE if slot.four_bit else dtype).itemsize for slot in slots))
    code = _dynamic_map(device)
    for slot in slots:
        name = names[slot.name]
        if not slot.four_bit:
            _fill_plain(model, slot, converter, _reader(checkpoint, name, dtype, device), dtype)
        elif written:
            _fill_written(model, slot, converter, checkpoint, names)
        else:
            _fill_quantised(model, slot, converter, _reader(checkpoint, name, dtype, device), code)
        progress.add(slot.stored * (STORAGE if slot.four_bit else dtype).itemsize)
    checkpoint.close()


def _reader(checkpoint: Checkpoint, name: str, dtype: torch.dtype, device: torch.device) -> Read:
    return lambda start, stop: checkpoint.read(name, start, stop).to(device=device, dtype=dtype)


def _fill_plain(model: nn.Module, slot: Slot, converter: Converter, read: Read, dtype: torch.dtype) -> None:
    owner, leaf = _owner(model, slot)
    parameter = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
    owner._parameters[leaf] = parameter
    converter.adopt(parameter, slot.shape, read)


def _fill_quantised(model: PreTrainedModel, slot: Slot, converter: Converter, read: Read, code: torch.Tensor) -> None:
    parameter = _four_bit(model, slot)
    scales: list[torch.Tensor] = []

    def part(start: int, stop: int) -> torch.Tensor:
        packed, of_blocks = quantise_range(read, slot.weights, start, stop)
        scales.append(of_blocks)
        return packed

    converter.adopt(parameter, slot.stored_shape, part)
    _set_state(parameter, _agree_on_state(slot, model.dtype, scales[0], code))


def _fill_written(model: nn.Module, slot: Slot, converter: Converter, checkpoint: Checkpoint, names: dict[str, str]) -> None:
    parameter = _four_bit(model, slot)
    converter.adopt(parameter, slot.stored_shape, lambda start, stop: checkpoint.read(names[slot.name], start, stop))
    keys = [*slot.state(), "quant_state.bitsandbytes__nf4"]
    stored = {key: checkpoint.whole(names[f"{slot.name}.{key}"]) for key in keys}
    _set_state(parameter, bnb_functional.QuantState.from_dict(stored, device=dist.device()))


def _owner(model: nn.Module, slot: Slot) -> tuple[nn.Module, str]:
    path, _, leaf = slot.name.rpartition(".")
    return model.get_submodule(path), leaf


def _four_bit(model: nn.Module, slot: Slot) -> bnb.nn.Params4bit:
    owner, leaf = _owner(model, slot)
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


def _set_state(parameter: bnb.nn.Params4bit, state: bnb_functional.QuantState) -> None:
    parameter.quant_state = state
    parameter.module.quant_state = state


class Progress:
    """Bytes done, rate and time left, on rank 0 every ten seconds; nothing for what takes less."""

    def __init__(self, verb: str, total: int, now: Callable[[], float] = time.monotonic):
        self.verb, self.total, self.done, self.now = verb, total, 0, now
        self.started = self.said = now()

    def add(self, amount: int) -> None:
        self.done += amount
        now = self.now()
        if now - self.said >= QUIET_SECONDS:
            self.said = now
            rate = self.done / (now - self.started)
            left = (self.total - self.done) / rate
            done, total = self.done / 1e9, self.total / 1e9
            _say(f"{self.verb}: {done:.1f} of {total:.1f} GB, {rate / 1e6:.0f} MB/s, {left:.0f} s left")


# --------------------------------------------------------------------------------------------------------- written once


def read_manifest(base: str, revision: str | None = None) -> dict[str, Any] | None:
    """What `quantise` noted beside its weights; None for any other model."""
    try:
        path = cached_file(
            base,
            MANIFEST,
            revision=revision,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    except (OSError, ValueError):
        return None  # whoever reads the model says what is wrong with it
    return None if path is None else dict(read_json(Path(path)))


def _form(dtype: str) -> dict[str, Any]:
    """What the stored bytes depend on."""
    storage = str(STORAGE).removeprefix("torch.")
    return {"quant_type": "nf4", "double_quant": True, "blocksize": BLOCK, "storage": storage, "dtype": dtype}


def check_written(settings: ModelSettings) -> None:
    """Raise ModelError where `model.base` was written by `quantise` for other settings than these."""
    manifest = read_manifest(settings.base, settings.revision)
    if manifest is None:
        return
    if settings.quantization != "nf4":
        rule = f"{settings.base} holds 4-bit weights"
        raise ModelError(describe("model.quantization", settings.quantization, rule, "Set nf4, or name the model it came from."))
    found, wanted = manifest["quantisation"], _form(settings.dtype)
    differences = _differences(found, wanted)
    if differences:
        rule = f"its weights were written for other settings: {differences}"
        raise ModelError(
            describe("model.base", settings.base, rule, "Write it again with launch/quantize.py, or change model.*.")
        )


def _differences(found: dict[str, Any], wanted: dict[str, Any]) -> str:
    keys = [key for key in {**found, **wanted} if found.get(key) != wanted.get(key)]
    return ", ".join(f"{key} {found.get(key)} there, {wanted.get(key)} wanted" for key in keys)


def quantise(base: str, out: Path, dtype: str, revision: str | None = None, content: bool = False) -> dict[str, Any]:
    """Write the 4-bit form of a model to `out`, a tensor at a time, as transformers would save it; returns the manifest.

    `dtype` is the `model.dtype` it will be used with, `content` adds a hash of all source bytes. `out` appears when it is
    complete. Raises ModelError: the source can't be read, or `out` holds something else.
    """
    folder = _local(base, revision)
    manifest = {"quantisation": _form(dtype), "source": source_digest(folder, content), "versions": _versions()}
    if out.exists() and any(out.iterdir()):
        _check_existing(out, manifest)
        return manifest
    beside = out.with_name(f".{out.name}.part")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    _write_weights(folder, beside, getattr(torch, dtype))
    for path in folder.iterdir():
        if path.suffix in (".json", ".txt", ".model", ".jinja", ".py") and path.name not in (INDEX, "config.json"):
            shutil.copyfile(path, beside / path.name)
    write_json(beside / MANIFEST, manifest)
    if out.exists():
        out.rmdir()
    os.replace(beside, out)
    return manifest


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("torch", "transformers", "bitsandbytes", "safetensors")}


def _local(base: str, revision: str | None) -> Path:
    if Path(base).is_dir():
        return Path(base)
    from huggingface_hub import snapshot_download

    patterns = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.py"]
    try:
        return Path(snapshot_download(base, revision=revision, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        raise ModelError(describe("model.base", base, f"it can't be found: {error}")) from None


def _check_existing(out: Path, manifest: dict[str, Any]) -> None:
    before = read_manifest(str(out))
    if before is None:
        raise ModelError(describe("out", str(out), "it exists and isn't a quantised model", "Name another folder."))
    for key in ("quantisation", "source"):
        if differences := _differences(before[key], manifest[key]):
            raise ModelError(
                describe("out", str(out), f"it was written from another {key}: {differences}", "Name another folder.")
            )


def source_digest(folder: Path, content: bool = False) -> dict[str, Any]:
    """A fingerprint of a checkpoint: names, shapes, types, file sizes, config and index; with `content` of every byte."""
    checkpoint = Checkpoint(str(folder))
    listed = [(name, checkpoint.shapes[name], checkpoint.types[name], path.name) for name, path in checkpoint.where.items()]
    sizes = [(path.name, path.stat().st_size) for path in checkpoint.files]
    digest = hashlib.sha256(json.dumps([sorted(listed), sorted(sizes)]).encode())
    for name in ("config.json", INDEX):
        if (folder / name).exists():
            digest.update((folder / name).read_bytes())
    facts: dict[str, Any] = {"digest": digest.hexdigest(), "bytes": sum(size for _, size in sizes)}
    if content:
        whole = hashlib.sha256()
        for path in sorted(checkpoint.files):
            with open(path, "rb") as file:
                whole.update(hashlib.file_digest(file, "sha256").digest())
        facts["content"] = whole.hexdigest()
    return facts


def _write_weights(folder: Path, out: Path, dtype: torch.dtype) -> None:
    try:
        config = AutoConfig.from_pretrained(folder)
        model = make_skeleton(config, dtype, "eager", four_bit=True)
    except (OSError, ValueError) as error:
        raise ModelError(describe("model.base", str(folder), f"the model can't be built: {error}")) from None
    if hasattr(config, "quantization_config"):
        raise ModelError(describe("model.base", str(folder), "it is quantised already", "Name the model it came from."))
    if reason := why_not(model):
        raise ModelError(describe("model.base", str(folder), f"it can't be written in 4 bits here: {reason}"))
    checkpoint = Checkpoint(str(folder))
    names = match_names(model, checkpoint, written=False)
    slots = checkpoint.in_order(slots_of(model), names)
    progress = Progress("quantising", sum(slot.weights for slot in slots) * 2)
    writer = _Writer(out)
    for slot in slots:
        writer.add(dict(_tensors(slot, _reader(checkpoint, names[slot.name], dtype, dist.device()), dtype)))
        progress.add(slot.weights * 2)
    writer.finish()
    config_file = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    write_json(out / "config.json", {**config_file, "quantization_config": nf4(dtype).to_dict()})


def _tensors(slot: Slot, read: Read, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """What is stored of one weight, on the CPU."""
    if not slot.four_bit:
        yield slot.name, read(0, slot.weights).reshape(slot.shape).cpu().clone()
        return
    packed, scales = quantise_range(read, slot.weights, 0, slot.stored)
    yield slot.name, packed.reshape(slot.stored_shape).cpu()
    for key, tensor in make_state(slot, dtype, *compress_scales(scales)).as_dict(packed=True).items():
        yield f"{slot.name}.{key}", tensor.cpu().clone()


class _Writer:
    """Safetensors files of about FILE_BYTES and their index."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.held: dict[str, torch.Tensor] = {}
        self.where: dict[str, str] = {}
        self.bytes = self.total = self.files = 0

    def add(self, tensors: dict[str, torch.Tensor]) -> None:
        size = sum(tensor.nbytes for tensor in tensors.values())
        if self.held and self.bytes + size > FILE_BYTES:
            self.flush()
        self.held.update(tensors)
        self.bytes += size
        self.total += size

    def flush(self) -> None:
        self.files += 1
        name = f"model-{self.files:05d}.safetensors"
        save_file(self.held, self.folder / name, metadata={"format": "pt"})
        self.where.update(dict.fromkeys(self.held, name))
        self.held, self.bytes = {}, 0

    def finish(self) -> None:
        self.flush()
        write_json(self.folder / INDEX, {"metadata": {"total_size": self.total}, "weight_map": self.where})

"""An adapter added to its base, tensor by tensor, and weights written as safetensors files: no model is ever held whole.

Knows no tokenizer and no folder layout beyond the weight files.
"""

import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.utils.hub import cached_file

from hybrid_scale.config import LoraSettings, ModelSettings
from hybrid_scale.errors import ModelError, describe
from hybrid_scale.model.trained import MergeInto, Trained

PEFT_PREFIX = "base_model.model."


@dataclass(frozen=True)
class _Stored:
    """One tensor of a safetensors file."""

    path: Path
    name: str

    def read(self) -> torch.Tensor:
        # Opened anew for each tensor: an open map keeps every page that was read in memory.
        with safe_open(self.path, framework="pt") as file:
            return file.get_tensor(self.name)


def merged_weights(trained: Trained, skeleton: Any, into: MergeInto = "original") -> Iterator[tuple[str, torch.Tensor]]:
    """The backbone's weights under its own names, one at a time; adapted ones in float32, W + (alpha / rank) B A.

    `skeleton`: the backbone without storage. Raises ModelError: weights of the backbone that the base lacks, adapter
    tensors that belong to none, `nf4` for a run that wasn't trained on it.
    """
    settings = trained.config.model
    if into == "nf4" and settings.quantization != "nf4":
        raise ModelError(describe("--merge-into", into, f"the run was trained with quantization: {settings.quantization}"))
    stored = _stored_weights(trained, skeleton)
    adapter = _stored_adapter(trained, skeleton) if settings.lora else {}
    quantised = _quantised_modules(skeleton) if into == "nf4" else set()

    def merge() -> Iterator[tuple[str, torch.Tensor]]:
        for name, entry in stored.items():
            weight, module = entry.read(), name.removesuffix(".weight")
            if not weight.is_floating_point():
                raise ModelError(describe(name, str(weight.dtype), "the base must hold floating-point weights"))
            if module in quantised:
                weight = _through_nf4(weight, settings)
            if module in adapter and name.endswith(".weight"):
                assert settings.lora is not None
                weight = _add_adapter(name, weight, adapter[module], settings.lora, _module(skeleton, module))
            yield name, weight

    return merge()


def _stored_weights(trained: Trained, skeleton: Any) -> dict[str, _Stored]:
    """The backbone's weights by its own names: those of the base, or the trained ones where there is no adapter."""
    known = skeleton.state_dict().keys()
    stored = {}
    for entry in _base_tensors(trained.config.model):
        name = entry.name if entry.name in known else entry.name.removeprefix(f"{skeleton.base_model_prefix}.")
        if name in known:
            stored[name] = entry
    if trained.config.model.lora is None:
        stored |= {entry.name: entry for entry in _tensors(trained.weights / "model.safetensors")}
    missing = sorted(dict(skeleton.named_parameters()).keys() - stored.keys())
    unknown = sorted(stored.keys() - known)
    if missing or unknown:
        found = f"{len(missing)} missing {missing[:5]}, {len(unknown)} unknown {unknown[:5]}"
        raise ModelError(
            describe("model.base", trained.config.model.base, f"weights don't fit {type(skeleton).__name__}: {found}")
        )
    return stored


def _base_tensors(settings: ModelSettings) -> Iterator[_Stored]:
    """Every tensor of the base's checkpoint; fetches it where it isn't on disk."""

    def find(name: str, needed: bool) -> Path | None:
        try:
            path = cached_file(settings.base, name, revision=settings.revision, _raise_exceptions_for_missing_entries=needed)
        except OSError as error:
            raise ModelError(describe("model.base", settings.base, f"its weights can't be had: {error}")) from None
        return Path(path) if path else None

    index = find("model.safetensors.index.json", needed=False)
    files = ["model.safetensors"]
    if index is not None:
        files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    for name in files:
        path = find(name, needed=True)
        assert path is not None
        yield from _tensors(path)


def _tensors(path: Path) -> list[_Stored]:
    with safe_open(path, framework="pt") as file:
        return [_Stored(path, name) for name in file.keys()]  # noqa: SIM118 (a handle, not a mapping)


def _stored_adapter(trained: Trained, skeleton: Any) -> dict[str, dict[str, _Stored]]:
    """Module -> its A and B. Raises ModelError listing the tensors that belong to no weight of the backbone."""
    adapter: dict[str, dict[str, _Stored]] = {}
    unmatched = []
    weights = {name.removesuffix(".weight") for name, _ in skeleton.named_parameters() if name.endswith(".weight")}
    for entry in _tensors(trained.weights / "adapter_model.safetensors"):
        found = re.fullmatch(rf"{re.escape(PEFT_PREFIX)}(.+)\.lora_([AB])\.weight", entry.name)
        if found and found[1] in weights:
            adapter.setdefault(found[1], {})[found[2]] = entry
        else:
            unmatched.append(entry.name)
    unmatched += [f"{module}: only {'A' if 'A' in pair else 'B'}" for module, pair in adapter.items() if len(pair) < 2]
    if unmatched:
        rule = f"{len(unmatched)} tensors of the adapter belong to no weight of {type(skeleton).__name__}"
        raise ModelError(f"{trained.weights}: {rule}: {', '.join(unmatched)}.")
    return adapter


def _module(skeleton: Any, name: str) -> nn.Module:
    module: nn.Module = skeleton.get_submodule(name)
    return module


def _quantised_modules(skeleton: Any) -> set[str]:
    """The linear layers that transformers loads in 4 bits."""
    kept = set(get_keys_to_not_convert(skeleton))
    return {name for name, module in skeleton.named_modules() if isinstance(module, nn.Linear) and name not in kept}


def _through_nf4(weight: torch.Tensor, settings: ModelSettings) -> torch.Tensor:
    """A weight as the 4-bit model multiplies with it: NF4 in blocks of 64, double quantisation, from `model.dtype`."""
    import bitsandbytes.functional as bnb  # seconds, and needed for this alone

    wide = weight.to(getattr(torch, settings.dtype))
    packed, state = bnb.quantize_4bit(wide, blocksize=64, compress_statistics=True, quant_type="nf4")
    return bnb.dequantize_4bit(packed, state)


def _add_adapter(
    name: str, weight: torch.Tensor, pair: dict[str, _Stored], lora: LoraSettings, module: nn.Module
) -> torch.Tensor:
    """W [out, in] + (alpha / rank) B [out, rank] A [rank, in] in float32 (2106.09685); a Conv1D holds W [in, out]."""
    delta = pair["B"].read().float() @ pair["A"].read().float()
    delta = delta.T if isinstance(module, Conv1D) else delta
    if delta.shape != weight.shape:
        raise ModelError(
            describe(name, tuple(delta.shape), f"the adapter was trained on a base with another shape than {tuple(weight.shape)}")
        )
    return delta.mul_(lora.alpha / lora.rank).add_(weight)


def write_weights(weights: Iterable[tuple[str, torch.Tensor]], folder: Path, dtype: torch.dtype, shard_bytes: int) -> None:
    """safetensors files of at most `shard_bytes` (one tensor may be more), and their index where there are several."""
    places: dict[str, int] = {}
    shard: dict[str, torch.Tensor] = {}
    held = total = count = 0

    def flush() -> None:
        nonlocal count, held
        save_file(shard, folder / f"{count}.part", metadata={"format": "pt"})
        places.update(dict.fromkeys(shard, count))
        shard.clear()
        count, held = count + 1, 0

    for name, weight in weights:
        rounded = weight.to(dtype).contiguous()
        if shard and held + rounded.nbytes > shard_bytes:
            flush()
        shard[name] = rounded
        held, total = held + rounded.nbytes, total + rounded.nbytes
    flush()
    names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)] if count > 1 else ["model.safetensors"]
    for number, name in enumerate(names):
        os.replace(folder / f"{number}.part", folder / name)
    if count > 1:
        index = {"metadata": {"total_size": total}, "weight_map": {name: names[place] for name, place in places.items()}}
        text = json.dumps(index, indent=2) + "\n"
        (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")

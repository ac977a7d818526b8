"""An adapter added to its base, tensor by tensor, and weights written as safetensors files: no model is ever held whole.

Knows no tokenizer and no folder layout beyond the weight files.
"""

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import get_keys_to_not_convert

from hybrid_scale.base_files import locate
from hybrid_scale.config import LoraSettings, ModelSettings
from hybrid_scale.errors import ModelError, describe
from hybrid_scale.model.trained import MergeInto, Trained
from hybrid_scale.model.weight_files import Checkpoint, text_prefix

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
    _check_covered(trained, stored, adapter)
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


def _check_covered(trained: Trained, stored: Mapping[str, _Stored], adapter: Iterable[str]) -> None:
    """Raises ModelError where the weights that adapters belong to aren't in the base's files one by one."""
    apart = sorted(module for module in adapter if f"{module}.weight" not in stored)
    if apart:
        listed = ", ".join(apart[:3])
        rule = f"{len(apart)} adapted weights ({listed}) lie in its files in another form, to which nothing can be added"
        raise ModelError(describe("model.base", trained.config.model.base, rule, "Use --format adapter."))


def _stored_weights(trained: Trained, skeleton: Any) -> dict[str, _Stored]:
    """The backbone's weights by the names they are written under: those of the base, or the trained ones without an adapter.

    Tensors that transformers renames or puts together while it loads (experts) keep their names in the files, less the prefix.
    """
    settings = trained.config.model
    known = skeleton.state_dict().keys()
    checkpoint = Checkpoint(locate(settings))
    prefix, renamed = text_prefix(skeleton, checkpoint.where), _renamer(skeleton)
    stored, covered = {}, set()
    for whole, path in checkpoint.where.items():
        name = whole if whole in known else whole.removeprefix(prefix)
        target = name if name in known else renamed(name)
        if target in known:
            stored[name] = _Stored(path, whole)
            covered.add(target)
    if settings.lora is None:
        own = {entry.name: entry for entry in _tensors(trained.weights / "model.safetensors")}
        stored, covered = {name: entry for name, entry in stored.items() if renamed(name) not in own} | own, covered | own.keys()
    missing = sorted(dict(skeleton.named_parameters()).keys() - covered)
    unknown = sorted(covered - known)
    if missing or unknown:
        found = f"{len(missing)} missing {missing[:5]}, {len(unknown)} unknown {unknown[:5]}"
        raise ModelError(describe("model.base", settings.base, f"weights don't fit {type(skeleton).__name__}: {found}"))
    return stored


def _renamer(skeleton: Any) -> Callable[[str], str]:
    """Name in the files, without prefix -> the model's name for the tensor that it goes into."""
    mapping = get_model_conversion_mapping(skeleton, add_legacy=False)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    return lambda name: rename_source_key(name, renamings, converters)[0]


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

"""A base model in 4 bits, written once: as files that every later load takes its bytes from. One tensor at a time.

Knows no rank's share and no config file of a run.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from hybrid_scale import dist
from hybrid_scale.base_files import INDEX, locate
from hybrid_scale.config import ModelSettings
from hybrid_scale.errors import ModelError, describe
from hybrid_scale.model.base import is_multimodal, raw_config, read_config
from hybrid_scale.model.nf4 import BLOCK, STORAGE, Read, Slot, compress_scales, make_state, nf4, quantize_range, slots_of
from hybrid_scale.model.skeleton import make_skeleton, why_not
from hybrid_scale.model.weight_files import Checkpoint, Progress, match_names, reader
from hybrid_scale.runs import read_json, readable, write_json

MANIFEST = "quantised.json"
FILE_BYTES = 2 << 30
"""Size at which `quantize` begins a new file, which it holds in memory until it is written."""


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """What `quantize` noted beside its weights; None for any other model."""
    path = folder / MANIFEST
    return dict(read_json(path)) if path.is_file() else None


def _form(dtype: str) -> dict[str, Any]:
    """What the stored bytes depend on."""
    storage = str(STORAGE).removeprefix("torch.")
    return {"quant_type": "nf4", "double_quant": True, "blocksize": BLOCK, "storage": storage, "dtype": dtype}


def check_written(settings: ModelSettings) -> None:
    """Raise ModelError where `model.base` was written by `quantize` for other settings than these."""
    manifest = read_manifest(locate(settings, weights=False))
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


def quantize(base: str, out: Path, dtype: str, revision: str | None = None, content: bool = False) -> dict[str, Any]:
    """Write the 4-bit form of a model to `out`, a tensor at a time, as transformers would save it; returns the manifest.

    `dtype` is the `model.dtype` it will be used with, `content` adds a hash of all source bytes. `out` appears when it is
    complete. Raises ModelError: the source can't be read, or `out` holds something else.
    """
    source = ModelSettings(base=base, revision=revision)
    folder = locate(source)
    manifest = {"quantisation": _form(dtype), "source": source_digest(folder, content), "versions": _versions()}
    if out.exists() and any(out.iterdir()):
        _check_existing(out, manifest)
        return manifest
    beside = out.with_name(f".{out.name}.part")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    _write_weights(source, folder, beside, getattr(torch, dtype))
    for path in folder.iterdir():
        if path.suffix in (".json", ".txt", ".model", ".jinja") and path.name not in (INDEX, "config.json"):
            shutil.copyfile(path, beside / path.name)
    write_json(beside / MANIFEST, manifest)
    readable(beside)
    if out.exists():
        out.rmdir()
    os.replace(beside, out)
    return manifest


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("torch", "transformers", "bitsandbytes", "safetensors")}


def _check_existing(out: Path, manifest: dict[str, Any]) -> None:
    before = read_manifest(out)
    if before is None:
        raise ModelError(describe("out", str(out), "it exists and isn't a quantised model", "Name another folder."))
    for key in ("quantisation", "source"):
        if differences := _differences(before[key], manifest[key]):
            raise ModelError(
                describe("out", str(out), f"it was written from another {key}: {differences}", "Name another folder.")
            )


def source_digest(folder: Path, content: bool = False) -> dict[str, Any]:
    """A fingerprint of a checkpoint: names, shapes, types, file sizes, config and index; with `content` of every byte."""
    checkpoint = Checkpoint(folder)
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


def _write_weights(source: ModelSettings, folder: Path, out: Path, dtype: torch.dtype) -> None:
    config = read_config(source)
    try:
        model = make_skeleton(config, dtype, "eager", four_bit=True)
    except (OSError, ValueError) as error:
        raise ModelError(describe("model.base", str(folder), f"the model can't be built: {error}")) from None
    if hasattr(config, "quantization_config"):
        raise ModelError(describe("model.base", str(folder), "it is quantised already", "Name the model it came from."))
    if reason := why_not(model):
        raise ModelError(describe("model.base", str(folder), f"it can't be written in 4 bits here: {reason}"))
    checkpoint = Checkpoint(folder)
    names = match_names(model, checkpoint, written=False, multimodal=is_multimodal(source))
    slots = checkpoint.in_order(slots_of(model), names)
    progress = Progress("quantising", sum(slot.weights for slot in slots) * 2)
    writer = _Writer(out)
    for slot in slots:
        writer.add(dict(_tensors(slot, reader(checkpoint, names[slot.name], dtype, dist.device()), dtype)))
        progress.add(slot.weights * 2)
    writer.finish()
    own = raw_config(source)
    text = {**config.to_dict(), "architectures": [type(model).__name__]} if is_multimodal(source) else own
    write_json(out / "config.json", {**text, "quantization_config": nf4(dtype).to_dict()})


def _tensors(slot: Slot, read: Read, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """What is stored of one weight, on the CPU."""
    if not slot.four_bit:
        yield slot.name, read(0, slot.weights).reshape(slot.shape).cpu().clone()
        return
    packed, scales = quantize_range(read, slot.weights, 0, slot.stored)
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

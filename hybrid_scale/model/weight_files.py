"""The safetensors files of a model: which tensor lies where, parts of it read when asked for, names matched with the model's.

Knows no rank's share; what it says, it says once, on rank 0.
"""

import math
import re
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

from hybrid_scale import dist
from hybrid_scale.base_files import INDEX, SINGLE, read_index
from hybrid_scale.errors import ModelError, describe
from hybrid_scale.model.nf4 import STATE_FACTS, Read, Slot, slots_of

QUIET_SECONDS = 10.0
COMPARED_ELEMENTS = 4096
"""Of each tensor, at its start and at its end, where a folder holds its weights twice."""
LISTED = 5


def say(*texts: str) -> None:
    """Each text as a line, on rank 0."""
    for text in texts if dist.rank() == 0 else ():
        print(text, file=sys.stderr, flush=True)


class Checkpoint:
    """The safetensors files of a model's folder, opened one at a time. Headers are read at once, weights when asked for.

    Raises ModelError: no such files, one that isn't what its header says (a download cut short), or two sets of other weights.
    """

    def __init__(self, folder: Path, files: list[Path] | None = None):
        self.base = str(folder)
        self.files = weight_files(folder) if files is None else files
        self.where: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.types: dict[str, str] = {}
        self._open: tuple[Path, Any] | None = None
        for path in self.files:
            file = self._file(path)
            for name in file.keys():  # noqa: SIM118 (not a dictionary)
                held = file.get_slice(name)
                self.where[name], self.shapes[name], self.types[name] = path, tuple(held.get_shape()), held.get_dtype()
        if files is None and self.files == [folder / SINGLE] and (folder / INDEX).is_file():
            self._compare(Checkpoint(folder, _shards(folder)))

    def _file(self, path: Path) -> Any:
        if self._open is None or self._open[0] != path:
            self._open = None  # lets the old one's mapping go first
            try:
                self._open = (path, safe_open(path, "pt"))
            except (OSError, SafetensorError) as error:
                rule = f"a whole safetensors file is expected here: {error}"
                raise ModelError(describe("model.base", str(path), rule, "Copy or download it again.")) from None
        return self._open[1]

    def _compare(self, shards: "Checkpoint") -> None:
        """Raises ModelError where the shards that an index lists aren't the weights of the single file beside them."""
        if shards.shapes == self.shapes and shards.types == self.types and all(self._agrees(shards, n) for n in self.shapes):
            return
        rule = f"{SINGLE} and the files of {INDEX} hold different weights, and nobody can tell which are meant"
        raise ModelError(describe("model.base", self.base, rule, "Remove one of the two sets."))

    def _agrees(self, other: "Checkpoint", name: str) -> bool:
        """Whether a tensor starts and ends alike in two checkpoints."""
        size = math.prod(self.shapes[name])
        ends = ((0, min(size, COMPARED_ELEMENTS)), (max(0, size - COMPARED_ELEMENTS), size))
        return all(self.read(name, *end).equal(other.read(name, *end)) for end in ends)

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


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights: `model.safetensors`, or those of the index. Raises ModelError: some are missing."""
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if not (folder / INDEX).is_file():
        others = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".gguf"))
        rule = f"its weights can't be found: it holds neither {SINGLE} nor {INDEX}"
        remedy = f"Convert {others[0]} to safetensors." if others else "Copy or download it again."
        raise ModelError(describe("model.base", str(folder), rule, remedy))
    return _shards(folder)


def _shards(folder: Path) -> list[Path]:
    paths = [folder / name for name in sorted(set(read_index(folder / INDEX).values()))]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        rule = f"its weights can't be found: {len(missing)} of {len(paths)} files are missing ({', '.join(missing[:LISTED])})"
        raise ModelError(describe("model.base", str(folder), rule, "Copy or download them again."))
    return paths


def text_prefix(model: PreTrainedModel, names: Iterable[str]) -> str:
    """What stands before the names of the text model in the files: `model.` of a causal language model, `language_model.model.`
    or `model.language_model.` of one for pictures and texts. Told by the name of the embedding table.
    """
    usual = f"{model.base_model_prefix}."
    anchor = embedding_name(model)
    found = {name.removesuffix(anchor) for name in names if name == anchor or name.endswith(f".{anchor}")} if anchor else set()
    return found.pop() if len(found) == 1 and not found & {"", usual} else usual


def embedding_name(model: PreTrainedModel) -> str | None:
    """The model's name for its embedding table."""
    return next((name for name, p in model.named_parameters() if p is model.get_input_embeddings().weight), None)


def match_names(model: PreTrainedModel, checkpoint: Checkpoint, written: bool, multimodal: bool = False) -> dict[str, str]:
    """Name in the model -> name in the files, for every tensor that will be read. `written`: by `quantize`.

    Checkpoints of causal language models call the backbone `model.` and hold an `lm_head.weight`, which nothing here uses; those
    of `multimodal` ones hold more than the text model.
    Raises ModelError listing what is missing, unexpected or of another shape.
    """
    expected: dict[str, tuple[int, ...] | None] = {}
    for slot in slots_of(model):
        expected[slot.name] = slot.stored_shape if written else slot.shape
        if written and slot.four_bit:
            expected.update({f"{slot.name}.{key}": shape for key, (_, shape) in slot.state().items()})
            expected[f"{slot.name}.{STATE_FACTS}"] = None
    prefix = text_prefix(model, checkpoint.where)
    names, unexpected, head = _sort_names(checkpoint, set(expected), prefix)
    if multimodal:
        unexpected = [name for name in unexpected if name.startswith(prefix)]
    embedding = embedding_name(model)
    if head and embedding and embedding not in names and model.config.get_text_config().tie_word_embeddings:
        names[embedding], head = head, None
    missing = sorted(set(expected) - set(names))
    shapes = {name: (checkpoint.shapes[names[name]], shape) for name, shape in expected.items() if name in names and shape}
    wrong = [f"{name} {list(found)} instead of {list(shape)}" for name, (found, shape) in shapes.items() if found != shape]
    _refuse_names(checkpoint.base, missing, unexpected, wrong)
    if head:
        say(f"{checkpoint.base}: {head} isn't used: embeddings are taken before it.")
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


def reader(checkpoint: Checkpoint, name: str, dtype: torch.dtype, device: torch.device) -> Read:
    """Reads parts of one tensor, in `dtype`, on `device`."""
    return lambda start, stop: checkpoint.read(name, start, stop).to(device=device, dtype=dtype)


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
            say(f"{self.verb}: {done:.1f} of {total:.1f} GB, {rate / 1e6:.0f} MB/s, {left:.0f} s left")

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
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from hybrid_scale import dist
from hybrid_scale.errors import ModelError, describe
from hybrid_scale.model.nf4 import STATE_FACTS, Read, Slot, slots_of

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
QUIET_SECONDS = 10.0
LISTED = 5


def say(text: str) -> None:
    if dist.rank() == 0:
        print(text, file=sys.stderr, flush=True)


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
    """Name in the model -> name in the files, for every tensor that will be read. `written`: by `quantize`.

    Checkpoints of causal language models call the backbone `model.` and hold an `lm_head.weight`, which nothing here uses.
    Raises ModelError listing what is missing, unexpected or of another shape.
    """
    expected: dict[str, tuple[int, ...] | None] = {}
    for slot in slots_of(model):
        expected[slot.name] = slot.stored_shape if written else slot.shape
        if written and slot.four_bit:
            expected.update({f"{slot.name}.{key}": shape for key, (_, shape) in slot.state().items()})
            expected[f"{slot.name}.{STATE_FACTS}"] = None
    names, unexpected, head = _sort_names(checkpoint, set(expected), f"{model.base_model_prefix}.")
    embedding = next((n for n, p in model.named_parameters() if p is model.get_input_embeddings().weight), None)
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

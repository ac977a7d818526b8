"""What is exported, and how: a checkpoint's weights with their config, texts and scores; type and target of a merge.

Descriptions only: nothing is read or written here.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from transformers import PreTrainedTokenizerBase

from hybrid_scale.config import RunConfig

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SHARD_BYTES = 1_000_000_000
Format = Literal["adapter", "sentence-transformers", "merged"]
FORMATS: tuple[Format, ...] = ("adapter", "sentence-transformers", "merged")
MergeInto = Literal["original", "nf4"]


class Texts(Protocol):
    """Text -> token ids, as in training but for the lengths, which are the evaluation's (`data.text.for_evaluation`)."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase: ...
    @property
    def prompts(self) -> Mapping[Any, str]: ...
    @property
    def max_tokens(self) -> Mapping[Any, int]: ...
    @property
    def begin(self) -> tuple[int, ...]: ...
    @property
    def ends(self) -> tuple[int, ...]: ...
    def encode(self, role: Any, texts: Sequence[str]) -> list[list[int]]: ...


@dataclass(frozen=True)
class Trained:
    """A checkpoint and what a reader of its model card wants to know."""

    config: RunConfig
    weights: Path
    """The checkpoint's `adapter/`: PEFT's layout, or `model.safetensors` without LoRA."""
    step: int
    texts: Texts
    base_name: str | None = None
    """The base's name on the Hub where `model.base` is a folder; null: `model.base` itself."""
    languages: tuple[str, ...] = ()
    fingerprint: str | None = None
    """Of the training data."""
    scores: tuple[dict[str, Any], ...] = ()
    """Results as in `eval/SET.json`: `task` and `metrics` {name: value or null} are read."""
    license: str = "other"

    @property
    def base(self) -> str:
        return self.base_name or self.config.model.base

    @property
    def public_base(self) -> str | None:
        """The base's Hub id; None for a folder, whose path means nothing elsewhere."""
        return None if Path(self.base).exists() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", self.base) else self.base


@dataclass(frozen=True)
class Merging:
    """How weights are written: their type, the bytes a shard may hold, and what the adapter is added to."""

    dtype: str
    """A key of DTYPES."""
    shard_bytes: int = SHARD_BYTES
    into: MergeInto = "original"
    """`nf4`: to the 4-bit weights it was trained on, dequantised."""

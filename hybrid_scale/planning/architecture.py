"""Shapes of decoders: from a config.json, or from a table of well-known models; how many weights of each kind they have.

No torch, no transformers, no network: a login node can plan with it. Knows nothing of bytes, GPUs or time.
"""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from hybrid_scale.errors import ModelError, describe, nearest

Biases = Literal["none", "qkv", "attention"]


@dataclass(frozen=True)
class Family:
    """What config.json leaves unsaid of a model type, as transformers 5 builds it."""

    norms: int = 2
    """Norms of the hidden width in each layer."""
    head_norms: bool = False
    """A norm of one head's width for queries and one for keys in each layer."""
    biases: Biases = "none"
    tied: bool = False
    """Where config.json doesn't say."""
    head_size: int | None = None
    """Where config.json doesn't say; None: hidden / heads."""


FAMILIES = {
    "llama": Family(),
    "mistral": Family(),
    "qwen2": Family(biases="qkv"),
    "qwen3": Family(head_norms=True, head_size=128),
    "gemma": Family(tied=True, head_size=256),
    "gemma2": Family(norms=4, tied=True, head_size=256),
    "gemma3_text": Family(norms=4, head_norms=True, tied=True, head_size=256),
}
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Architecture:
    """A decoder with grouped-query attention and a gated MLP in every layer."""

    name: str
    family: str
    layers: int
    hidden: int
    heads: int
    key_value_heads: int
    head_size: int
    intermediate: int
    vocabulary: int
    tied: bool = False
    """The language head, where there is one, is the embedding table."""
    biases: Biases = "none"
    dropout: bool = False
    """It draws random numbers while it trains (that of adapters is a setting of the run)."""
    positions: int | None = None
    """Longest text that it was made for, in tokens; None: not known."""

    @property
    def traits(self) -> Family:
        """Those of a type that isn't in FAMILIES are Llama's."""
        return FAMILIES.get(self.family, Family())

    @property
    def attention_width(self) -> int:
        return self.heads * self.head_size

    @property
    def key_value_width(self) -> int:
        return self.key_value_heads * self.head_size

    @property
    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """(inputs, outputs) of the linear layers of one decoder layer, by transformers' names."""
        h, i, a, kv = self.hidden, self.intermediate, self.attention_width, self.key_value_width
        return dict(zip(LINEARS, ((h, a), (h, kv), (h, kv), (a, h), (h, i), (h, i), (i, h)), strict=True))

    @property
    def linear(self) -> int:
        """Weights of all linear layers, biases and language head left out."""
        return self.layers * sum(inputs * outputs for inputs, outputs in self.linear_shapes.values())

    @property
    def largest_linear(self) -> int:
        return max(inputs * outputs for inputs, outputs in self.linear_shapes.values())

    @property
    def embedding(self) -> int:
        return self.vocabulary * self.hidden

    @property
    def head(self) -> int:
        """Weights of a language head of its own; an embedder has none."""
        return 0 if self.tied else self.embedding

    @property
    def small(self) -> int:
        """Norms and biases."""
        family, shapes = self.traits, self.linear_shapes
        biased = {"none": (), "qkv": LINEARS[:3], "attention": LINEARS[:4]}[self.biases]
        per_layer = family.norms * self.hidden + sum(shapes[name][1] for name in biased)
        per_layer += 2 * self.head_size if family.head_norms else 0
        return self.layers * per_layer + self.hidden

    @property
    def encoder(self) -> int:
        """All weights of the model without a language head, which is what an embedder loads."""
        return self.linear + self.embedding + self.small

    @property
    def total(self) -> int:
        """All weights of the causal language model: the published size."""
        return self.encoder + self.head

    def lora(self, rank: int, targets: tuple[str, ...] | Literal["all-linear"] = "all-linear") -> int:
        """Weights of adapters: rank x (inputs + outputs) of each adapted layer (2106.09685). Raises ModelError: unknown layer."""
        shapes = self.linear_shapes
        if targets == "all-linear":
            return self.layers * rank * sum(map(sum, shapes.values()))
        for target in targets:
            if target.rpartition(".")[2] not in shapes:
                raise ModelError(describe("model.lora.targets", target, "no linear layer of this name", nearest(target, shapes)))
        return self.layers * rank * sum(sum(shapes[target.rpartition(".")[2]]) for target in targets)


def from_config(config: Mapping[str, Any], name: str, strict: bool = True) -> Architecture:
    """A config.json's content -> Architecture.

    Raises ModelError: a key is missing, or (`strict`) another model type; without `strict` such a type is taken for a decoder
    built like Llama's, which its numbers may not be.
    """
    text = config.get("text_config") or config
    kind = text.get("model_type", config.get("model_type"))
    kind = "gemma3_text" if kind == "gemma3" else kind
    if strict and kind not in FAMILIES:
        remedy = f"Plannable: {', '.join(FAMILIES)}."
        raise ModelError(describe(f"{name}: model_type", kind, "the planner has no shape for this type", remedy))
    family = FAMILIES.get(kind, Family())
    try:
        hidden, heads = int(text["hidden_size"]), int(text["num_attention_heads"] if strict else _heads(text))
        return Architecture(
            name=name,
            family=str(kind),
            layers=int(text["num_hidden_layers"]),
            hidden=hidden,
            heads=heads,
            key_value_heads=int(text.get("num_key_value_heads") or heads),
            head_size=int(text.get("head_dim") or family.head_size or hidden // heads),
            intermediate=int(text["intermediate_size"] if strict else _intermediate(text, hidden)),
            vocabulary=int(text["vocab_size"]),
            tied=bool(text.get("tie_word_embeddings", config.get("tie_word_embeddings", family.tied))),
            biases="attention" if text.get("attention_bias") and kind != "qwen2" else family.biases,
            dropout=_has_dropout(text),
            positions=positions_of(text),
        )
    except KeyError as error:
        remedy = "Is it the config.json of the model itself?"
        raise ModelError(describe(f"{name}: config.json", sorted(text), f"{error} is missing", remedy)) from None


def _heads(text: Mapping[str, Any]) -> int:
    """1 for a type without attention heads (Mamba, RWKV)."""
    return int(text.get("num_attention_heads") or 1)


def _intermediate(text: Mapping[str, Any], hidden: int) -> int:
    """Width inside the MLP, by whatever name a type gives it, the mean where its layers differ (Gemma 3n).

    Four times the hidden size where its config.json says nothing.
    """
    named = (text.get(key) for key in ("intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner"))
    width = next((width for width in named if width), 4 * hidden)
    return sum(width) // len(width) if isinstance(width, list | tuple) else int(width)


def positions_of(text: Mapping[str, Any]) -> int | None:
    """The longest text that a model was made for, in tokens, by whatever name a type gives it; None: it has no limit."""
    named = (text.get(key) for key in ("max_position_embeddings", "n_positions", "max_seq_len"))
    return next((int(most) for most in named if isinstance(most, int) and most > 0), None)


FOLLOWING = ("longrope", "dynamic")
"""Kinds of rotary factors that follow the longest text of a forward pass."""


def following_rotary(text: Mapping[str, Any]) -> tuple[str, int] | None:
    """Kind and limit of rotary factors that change for a whole micro-batch once one text is longer; None: there are none."""
    settings = text.get("rope_parameters") or text.get("rope_scaling") or {}
    for rope in [one for one in settings.values() if isinstance(one, dict)] or [settings]:  # of each kind of layer, or of all
        kind = rope.get("rope_type", rope.get("type"))
        if kind in FOLLOWING:
            original = rope.get("original_max_position_embeddings") or text.get("original_max_position_embeddings")
            return kind, int((original if kind == "longrope" else None) or text["max_position_embeddings"])
    return None


def longest_text(text: Mapping[str, Any]) -> int | None:
    """The longest text that a model takes, in tokens: its positions, and where its rotary factors stay. None: it has no limit."""
    following = following_rotary(text)
    limits = [most for most in (positions_of(text), following[1] if following else None) if most is not None]
    return min(limits, default=None)


def _has_dropout(config: Mapping[str, Any]) -> bool:
    values = [value for name, value in config.items() if "dropout" in name or "pdrop" in name]
    return any(isinstance(value, float) and value > 0 for value in values)


def find(base: str) -> Architecture:
    """Shape of `model.base`: a folder with config.json, a snapshot in the hub's cache, or a model of the table.

    Raises ModelError when it is none of them.
    """
    for path in (Path(base) / "config.json", *_cached(base)):
        if path.is_file():
            try:
                return from_config(json.loads(path.read_text(encoding="utf-8")), base)
            except json.JSONDecodeError as error:
                raise ModelError(describe(str(path), str(error), "not JSON")) from None
    found = KNOWN.get(_key(base))
    if found is None:
        rule = "no folder with a config.json, not in the hub's cache, and not a model of the table"
        remedy = f"{nearest(_key(base), KNOWN)} Or give a folder with its config.json."
        raise ModelError(describe("model.base", base, rule, remedy))
    return replace(found, name=base)


def _cached(base: str) -> list[Path]:
    """config.json files of a hub id in the local cache, newest first."""
    home = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
    folder = Path(os.environ.get("HF_HUB_CACHE", home / "hub")) / f"models--{base.replace('/', '--')}" / "snapshots"
    return sorted(folder.glob("*/config.json"), key=lambda path: path.stat().st_mtime, reverse=True)


def _key(name: str) -> str:
    """`meta-llama/Meta-Llama-3.1-70B-Instruct` -> `llama-3.1-70b`."""
    last = name.rstrip("/").rpartition("/")[2].lower().removeprefix("meta-")
    return re.sub(r"(-(instruct|base|chat|it|pt|hf|\d{4}|bnb-4bit))+$", "", last)


Row = tuple[int, int, int, int, int, int, int]


def _table() -> dict[str, Architecture]:
    """Name: layers, hidden, heads, key-value heads, head size, intermediate, vocabulary (rows of the table, padding included).

    From the models' config.json files; their weights add up to the published sizes (tests/planning/test_architecture.py).
    """
    rows: dict[str, dict[str, Row]] = {
        "llama": {
            "llama-2-7b": (32, 4096, 32, 32, 128, 11008, 32000),
            "llama-2-13b": (40, 5120, 40, 40, 128, 13824, 32000),
            "llama-2-70b": (80, 8192, 64, 8, 128, 28672, 32000),
            "llama-3-8b": (32, 4096, 32, 8, 128, 14336, 128256),
            "llama-3-70b": (80, 8192, 64, 8, 128, 28672, 128256),
            "llama-3.1-8b": (32, 4096, 32, 8, 128, 14336, 128256),
            "llama-3.1-70b": (80, 8192, 64, 8, 128, 28672, 128256),
            "llama-3.1-405b": (126, 16384, 128, 8, 128, 53248, 128256),
            "llama-3.2-1b": (16, 2048, 32, 8, 64, 8192, 128256),
            "llama-3.2-3b": (28, 3072, 24, 8, 128, 8192, 128256),
            "llama-3.3-70b": (80, 8192, 64, 8, 128, 28672, 128256),
        },
        "mistral": {
            "mistral-7b-v0.1": (32, 4096, 32, 8, 128, 14336, 32000),
            "mistral-7b-v0.2": (32, 4096, 32, 8, 128, 14336, 32000),
            "mistral-7b-v0.3": (32, 4096, 32, 8, 128, 14336, 32768),
            "mistral-nemo": (40, 5120, 32, 8, 128, 14336, 131072),
            "mistral-small-24b": (40, 5120, 32, 8, 128, 32768, 131072),
            "mistral-large": (88, 12288, 96, 8, 128, 28672, 32768),
        },
        "qwen2": {
            "qwen2.5-0.5b": (24, 896, 14, 2, 64, 4864, 151936),
            "qwen2.5-1.5b": (28, 1536, 12, 2, 128, 8960, 151936),
            "qwen2.5-3b": (36, 2048, 16, 2, 128, 11008, 151936),
            "qwen2.5-7b": (28, 3584, 28, 4, 128, 18944, 152064),
            "qwen2.5-14b": (48, 5120, 40, 8, 128, 13824, 152064),
            "qwen2.5-32b": (64, 5120, 40, 8, 128, 27648, 152064),
            "qwen2.5-72b": (80, 8192, 64, 8, 128, 29568, 152064),
        },
        "qwen3": {
            "qwen3-0.6b": (28, 1024, 16, 8, 128, 3072, 151936),
            "qwen3-1.7b": (28, 2048, 16, 8, 128, 6144, 151936),
            "qwen3-4b": (36, 2560, 32, 8, 128, 9728, 151936),
            "qwen3-8b": (36, 4096, 32, 8, 128, 12288, 151936),
            "qwen3-14b": (40, 5120, 40, 8, 128, 17408, 151936),
            "qwen3-32b": (64, 5120, 64, 8, 128, 25600, 151936),
        },
        "gemma2": {
            "gemma-2-2b": (26, 2304, 8, 4, 256, 9216, 256000),
            "gemma-2-9b": (42, 3584, 16, 8, 256, 14336, 256000),
            "gemma-2-27b": (46, 4608, 32, 16, 128, 36864, 256000),
        },
        "gemma3_text": {
            "gemma-3-270m": (18, 640, 4, 1, 256, 2048, 262144),
            "gemma-3-1b": (26, 1152, 4, 1, 256, 6912, 262144),
            "gemma-3-4b": (34, 2560, 8, 4, 256, 10240, 262208),
            "gemma-3-12b": (48, 3840, 16, 8, 256, 15360, 262208),
            "gemma-3-27b": (62, 5376, 32, 16, 128, 21504, 262208),
        },
    }
    tied = ("llama-3.2", "qwen2.5-0.5b", "qwen2.5-1.5b", "qwen2.5-3b", "qwen3-0.6b", "qwen3-1.7b", "qwen3-4b", "gemma")
    short = {"llama-2-": 4096, "llama-3-": 8192, "gemma-2-": 8192}  # all others: 32,768 positions or more
    return {
        name: Architecture(
            name,
            family,
            *row,
            tied=name.startswith(tied),
            biases=FAMILIES[family].biases,
            positions=next((most for start, most in short.items() if name.startswith(start)), None),
        )
        for family, models in rows.items()
        for name, row in models.items()
    }


KNOWN = _table()
"""Models by short name, Gemma 3 from 4B on without its vision part."""

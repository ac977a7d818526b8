"""Prompts, tokenizer, token-length tables, collation. Knows no batch composition and no model.

A text becomes: the begin tokens that the tokenizer itself puts, prompt + text, the end tokens. These are `model.end_token` where
the config names one, else those that the tokenizer itself puts, else the `eos_token`. A published embedding model was trained
with its tokenizer's own: Qwen3-Embedding ends texts with `<|endoftext|>`, which isn't its `eos_token`. The cut for length is made
before the end tokens, so that last-token pooling always reads the last of them.

Training and evaluation cut at lengths of their own: `load_text_encoder` gives the training's encoder, `for_evaluation` makes the
evaluation's of it.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from hybrid_scale.base_files import code_revision, locate
from hybrid_scale.config import EVALUATION_TOKENS, EvaluationSettings, ModelSettings, RunConfig
from hybrid_scale.data.prepared import TextTable
from hybrid_scale.errors import ModelError, describe
from hybrid_scale.planning.architecture import longest_text
from hybrid_scale.runs import atomic_path

Role = Literal["query", "passage"]
CHUNK = 4096


@dataclass(frozen=True)
class TextEncoder:
    """Text -> token ids, by role."""

    tokenizer: PreTrainedTokenizerBase
    prompts: dict[Role, str]
    max_tokens: dict[Role, int]
    begin: tuple[int, ...]
    ends: tuple[int, ...]
    """At least one."""
    digest: str
    """Names everything that a token length depends on."""
    packed: bool
    """How `collate` lays texts out: end to end, or padded."""
    rows: int | None = None
    """Rows of the model's embedding table, where the tokenizer has ids beyond them; None: it has none."""
    longest: int | None = None
    """Tokens of the longest text that the model takes; None: not known, or any."""

    @property
    def end(self) -> int:
        """The last token of every text, which last-token pooling reads."""
        return self.ends[-1]

    def layout(self) -> str:
        """What a text becomes, for a person, with a word where the tokenizer by itself ends texts otherwise."""
        begin, ends = (" ".join(map(str, self.tokenizer.convert_ids_to_tokens(list(ids)))) for ids in (self.begin, self.ends))
        own = own_tokens(self.tokenizer)[1]
        theirs = " ".join(map(str, self.tokenizer.convert_ids_to_tokens(list(own)))) or "nothing"
        note = "as the tokenizer itself does" if own == self.ends else f"the tokenizer itself ends texts with {theirs}"
        return " ".join(part for part in (begin, "text", ends, f"({note})") if part)

    def encode(self, role: Role, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, at most `max_tokens[role]` of them, the last ones always the end tokens.

        Raises ModelError where a text holds a token that has no row in the model's embedding table.
        """
        room = self.max_tokens[role] - len(self.begin) - len(self.ends)
        prompted = [self.prompts[role] + text for text in texts]
        ids = self.tokenizer(prompted, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        encoded = [[*self.begin, *row[:room], *self.ends] for row in ids]
        if self.rows is not None:
            for text, row in zip(texts, encoded, strict=True):
                refuse_outside(self.tokenizer, self.rows, row, f"text {text[:40]!r}")
        return encoded

    def collate(self, rows: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
        """A micro-batch, on the CPU, in the order given; all int64.

        Packed: `input_ids` [1, T], the texts end to end, and `lengths` [B], which stays on the CPU.
        Padded: `input_ids` and `attention_mask` [B, L], padded on the right with the end token.
        """
        lengths = np.fromiter(map(len, rows), np.int64, len(rows))
        tokens = np.fromiter(chain.from_iterable(rows), np.int64, int(lengths.sum()))
        if self.packed:
            return {"input_ids": torch.from_numpy(tokens).unsqueeze(0), "lengths": torch.from_numpy(lengths)}
        mask = np.arange(lengths.max()) < lengths[:, None]
        ids = np.full(mask.shape, self.end, np.int64)
        ids[mask] = tokens
        return {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask.astype(np.int64))}


def load_text_encoder(config: RunConfig) -> TextEncoder:
    """The tokenizer of `model.base` with the run's prompts. Raises ModelError: no tokenizer, no or unknown end token."""
    settings = config.model
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            locate(settings, weights=False),
            trust_remote_code=settings.trust_remote_code,
            code_revision=code_revision(settings),
        )
    except (OSError, ValueError) as error:
        said = " ".join(str(error).split())
        raise ModelError(describe("model.base", settings.base, f"no tokenizer can be loaded from it: {said}")) from None
    shape = _shape(settings)
    encoder = make_text_encoder(tokenizer, config, shape.get("vocab_size"))
    return replace(encoder, longest=longest_text(shape))


def _shape(settings: ModelSettings) -> dict[str, Any]:
    """The base's config.json as transformers reads it; empty where there is none, as beside a tokenizer alone."""
    folder = locate(settings, weights=False)
    if not (folder / "config.json").is_file():
        return {}
    code = {"trust_remote_code": settings.trust_remote_code, "code_revision": code_revision(settings)}
    try:
        shape: dict[str, Any] = AutoConfig.from_pretrained(folder, **code).get_text_config().to_dict()
    except (OSError, ValueError) as error:
        said = " ".join(str(error).split())
        raise ModelError(describe("model.base", settings.base, f"its config.json can't be read: {said}")) from None
    return shape


def for_evaluation(encoder: TextEncoder, settings: EvaluationSettings) -> TextEncoder:
    """The same encoder with the lengths at which an evaluation cuts. Raises ModelError: no room beside prompt and end tokens."""
    changed = replace(encoder, max_tokens=evaluation_limits(settings, encoder.longest))
    refuse_no_room(changed, "evaluation")
    return replace(changed, digest=_digest_of(changed))


def evaluation_limits(settings: EvaluationSettings, longest: int | None) -> dict[Role, int]:
    """At how many tokens an evaluation cuts. `longest`: tokens of the longest text that the base takes; None: any."""
    most = EVALUATION_TOKENS if longest is None else min(EVALUATION_TOKENS, longest)
    return {"query": settings.max_query_tokens or most, "passage": settings.max_passage_tokens or most}


def limits_of_run(config: RunConfig) -> dict[Role, int]:
    """The same of a run, by the config.json of its base. Raises ModelError: it can't be read."""
    return evaluation_limits(config.evaluation, longest_text(_shape(config.model)))


def refuse_no_room(encoder: TextEncoder, section: str) -> None:
    """Raises ModelError where a text would be its prompt, begin and end tokens alone. `section` of the config: the lengths'."""
    for role, limit in encoder.max_tokens.items():
        prompt = encoder.tokenizer(encoder.prompts[role], add_special_tokens=False)["input_ids"]
        fixed = len(encoder.begin) + len(prompt) + len(encoder.ends)
        if limit <= fixed:
            rule = f"prompt, begin and end tokens alone take {fixed} tokens"
            raise ModelError(describe(f"{section}.max_{role}_tokens", limit, rule, "Raise it, or shorten the prompt."))


def refuse_outside(tokenizer: PreTrainedTokenizerBase, rows: int, ids: Sequence[int], where: str) -> None:
    """Raises ModelError where an id has no row in an embedding table of `rows`."""
    largest = max(ids, default=0)
    if largest >= rows:
        token = tokenizer.convert_ids_to_tokens(largest)
        rule = f"its id is {largest:,} and the embedding has {rows:,} rows (the tokenizer has {len(tokenizer):,} tokens)"
        remedy = "Enlarge the embedding of the base (resize_token_embeddings), or use its own tokenizer."
        raise ModelError(describe(where, token, rule, remedy))


def make_text_encoder(tokenizer: PreTrainedTokenizerBase, config: RunConfig, rows: int | None = None) -> TextEncoder:
    """See `load_text_encoder`; `rows` of the model's embedding table, None: not known."""
    settings = config.model
    prompts: dict[Role, str] = {"query": settings.query_prompt, "passage": settings.passage_prompt}
    limits: dict[Role, int] = {"query": config.data.max_query_tokens, "passage": config.data.max_passage_tokens}
    begin, own = own_tokens(tokenizer)
    ends = own if own and settings.end_token is None else (_end_token(tokenizer, settings.end_token),)
    outside = rows is not None and max(tokenizer.get_vocab().values()) >= rows
    if rows is not None and outside:
        refuse_outside(tokenizer, rows, begin, "the begin tokens")
        refuse_outside(tokenizer, rows, ends, "model.end_token")
        for role, prompt in prompts.items():
            refuse_outside(tokenizer, rows, tokenizer(prompt, add_special_tokens=False)["input_ids"], f"model.{role}_prompt")
    encoder = TextEncoder(tokenizer, prompts, limits, begin, ends, "", settings.packed, rows if outside else None)
    refuse_no_room(encoder, "data")
    return replace(encoder, digest=_digest_of(encoder))


def _end_token(tokenizer: PreTrainedTokenizerBase, asked: str | None) -> int:
    token = asked if asked is not None else tokenizer.eos_token
    if token is None:
        raise ModelError(
            describe(
                "model.end_token",
                None,
                "the tokenizer has no eos_token, and last-token pooling needs an end token",
                "Name a token of its vocabulary.",
            )
        )
    number = tokenizer.get_vocab().get(str(token))
    if number is None:
        raise ModelError(describe("model.end_token", token, "not a token of the vocabulary", "Name one that is."))
    return int(number)


def own_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The special tokens that this tokenizer by itself puts before and behind a text. Raises ModelError: they can't be told."""
    bare, whole = (list(tokenizer("a", add_special_tokens=special)["input_ids"]) for special in (False, True))
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return tuple(whole[:start]), tuple(whole[start + len(bare) :])
    rule = "its begin and end tokens must stand before and behind the tokens of the text"
    raise ModelError(
        describe("tokenizer", tokenizer.convert_ids_to_tokens(whole), rule, "Take a tokenizer whose template does so.")
    )


def _digest(tokenizer: PreTrainedTokenizerBase, *settings: object) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256((state + repr(settings)).encode()).hexdigest()[:16]


def _digest_of(encoder: TextEncoder) -> str:
    rows = [] if encoder.rows is None else [encoder.rows]
    return _digest(encoder.tokenizer, encoder.prompts, encoder.max_tokens, encoder.begin, _named(encoder.ends), *rows)


def role_digest(encoder: TextEncoder, role: Role) -> str:
    """Names everything that the token ids of a text of this role depend on."""
    return _digest(encoder.tokenizer, encoder.prompts[role], encoder.max_tokens[role], encoder.begin, _named(encoder.ends))


def _named(ends: tuple[int, ...]) -> int | tuple[int, ...]:
    """In a digest a single end token stands alone, as in those of earlier versions."""
    return ends[0] if len(ends) == 1 else ends


def length_table(folder: Path, name: str, texts: TextTable, role: Role, encoder: TextEncoder) -> np.ndarray:
    """Token length of every text [len(texts)] int32, after cutting; computed once, then memory-mapped.

    Kept under `folder/lengths/DIGEST/NAME.npy`.
    """
    path = folder / "lengths" / encoder.digest / f"{name}.npy"
    if not path.is_file():
        parts = [
            np.array([len(ids) for ids in encoder.encode(role, texts.column("text", np.arange(at, min(at + CHUNK, len(texts)))))])
            for at in range(0, len(texts), CHUNK)
        ]
        with atomic_path(path) as beside, open(beside, "wb") as file:
            np.save(file, np.concatenate(parts).astype(np.int32))
    return np.load(path, mmap_mode="r")


def write_length_tables(folder: Path, encoder: TextEncoder) -> dict[str, dict[str, float]]:
    """Length tables of a prepared directory; returns mean, longest and share of cut texts per table."""
    tables: dict[str, Role] = {"queries": "query", "passages": "passage", "corpus": "passage"}
    summary: dict[str, dict[str, float]] = {}
    for name, role in tables.items():
        if (folder / f"{name}.arrow").is_file():
            lengths = length_table(folder, name, TextTable(folder / f"{name}.arrow"), role, encoder)
            summary[name] = {
                "mean": round(float(lengths.mean()), 1),
                "longest": int(lengths.max()),
                "at_limit": round(float((lengths == encoder.max_tokens[role]).mean()), 4),
            }
    return summary

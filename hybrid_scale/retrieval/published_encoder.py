"""Any encoder that sentence-transformers can open, as vectors of a retrieval set: a folder or a Hub id.

A sentence-transformers model keeps its own pooling, normalisation and prompts (`encode_query`, `encode_document`); a plain
Hugging Face encoder is pooled by `pooling` (mean when not said). Prompts given here replace the model's own.
Each rank encodes its slice of the corpus on its own device. Knows no measure. Needs sentence-transformers (extra `eval`).

Shapes: Q queries, P passages, n of them on this rank, D dimensions.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hybrid_scale import dist
from hybrid_scale.data.prepared import RetrievalSet, TextTable
from hybrid_scale.errors import ModelError, describe

POOLINGS = ("mean", "cls", "lasttoken", "max")
TEXTS_AT_ONCE = 8192
E5 = re.compile(r"(^|[-_/.])e5([-_/.]|$)", re.IGNORECASE)
"""Names of encoders of the E5 family, which were trained with `query: ` and `passage: ` and whose folders hold no prompts."""
E5_PROMPTS = {"query": "query: ", "passage": "passage: "}


@dataclass(frozen=True)
class EncoderOptions:
    """How texts become vectors. None: as the model says."""

    model: str
    query_prompt: str | None = None
    passage_prompt: str | None = None
    pooling: str | None = None
    normalise: bool = True
    max_tokens: int | None = None
    batch: int = 32
    revision: str | None = None

    @property
    def name(self) -> str:
        """A folder name: the last part of the path or id."""
        return Path(self.model).name


class Encoder:
    """The model, on this rank's device. Raises ModelError: it can't be opened, an unknown pooling."""

    def __init__(self, options: EncoderOptions):
        self.options = options
        self.model = _load(options)
        if options.max_tokens:
            self.model.max_seq_length = options.max_tokens

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the vectors, as the model finally has it."""
        own = dict(self.model.prompts)
        given = {"query": self.options.query_prompt, "passage": self.options.passage_prompt}
        prompts = {role: own.get(role, own.get("document") if role == "passage" else None) for role in given}
        prompts |= {role: prompt for role, prompt in given.items() if prompt is not None}
        modules = [type(module).__name__ for module in self.model]
        return {
            **{"model": self.options.model, "revision": self.options.revision, "prompts": prompts, "modules": modules},
            **{"pooling": self.options.pooling, "normalise": self.options.normalise},
            **{"max_tokens": self.model.max_seq_length, "dimensions": self.model.get_embedding_dimension()},
        }

    def missing_prompts(self) -> str | None:
        """What to say of an E5 encoder without its prompts; None where they are given, or it is another encoder."""
        inner = str(getattr(getattr(self.model[0], "auto_model", None), "name_or_path", ""))
        paths = [Path(self.options.model), Path(inner)]
        # The last part, and what a cache of the Hub names models--USER--NAME; other folders above may have any name.
        names = [part for path in paths for part in path.parts if part == path.name or part.startswith("models--")]
        if not any(map(E5.search, names)):
            return None
        used = self.settings["prompts"]
        wanted = {role: text for role, text in E5_PROMPTS.items() if not used[role]}
        if any(re.search("instruct|mistral", name, re.IGNORECASE) for name in names):
            wanted.pop("passage", None)  # its instruction stands before queries alone
        if not wanted:
            return None
        options = " ".join(f"--{role}-prompt {text!r}" for role, text in wanted.items())
        rule = "encoders of the E5 family must get the prompts they were trained with, else they score several points lower"
        return describe(f"encoder {self.options.model}", f"no prompt of {' and '.join(wanted)}", rule, f"Give {options}.")

    def queries(self, texts: list[str]) -> np.ndarray:
        """float32 [len(texts), D]"""
        return self._encode(self.model.encode_query, texts, self.options.query_prompt)

    def passages(self, texts: list[str]) -> np.ndarray:
        return self._encode(self.model.encode_document, texts, self.options.passage_prompt)

    def _encode(self, encode: Any, texts: list[str], prompt: str | None) -> np.ndarray:
        if not texts:
            return np.zeros((0, self.model.get_embedding_dimension()), np.float32)
        given = {} if prompt is None else {"prompt": prompt}
        options = {"batch_size": self.options.batch, "normalize_embeddings": self.options.normalise, "show_progress_bar": False}
        return np.asarray(encode(texts, **options, **given), np.float32)


def encode_set(task: RetrievalSet, encoder: Encoder) -> tuple[np.ndarray, np.ndarray, Iterator[np.ndarray]]:
    """Vectors of all queries [Q, D] on every rank; of this rank's passages the numbers [n], and the vectors block by block.

    Collective. Texts are taken and encoded `TEXTS_AT_ONCE` at a time; encoders sort by length inside such a block.
    """
    mine = _slice(len(task.queries))
    queries = np.concatenate(dist.gather_arrays(np.concatenate(list(_blocks(task.queries, mine, encoder.queries)))))
    passages = _slice(len(task.corpus))
    return queries, passages, _blocks(task.corpus, passages, encoder.passages)


def _blocks(table: TextTable, rows: np.ndarray, encode: Callable[[list[str]], np.ndarray]) -> Iterator[np.ndarray]:
    """At least one block, be it empty."""
    for start in range(0, max(1, len(rows)), TEXTS_AT_ONCE):
        yield encode(table.column("text", rows[start : start + TEXTS_AT_ONCE]))


def _slice(rows: int) -> np.ndarray:
    first, end = (rows * part // dist.world_size() for part in (dist.rank(), dist.rank() + 1))
    return np.arange(first, end)


def _load(options: EncoderOptions) -> Any:
    if options.pooling is not None and options.pooling not in POOLINGS:
        raise ModelError(describe("pooling", options.pooling, f"must be one of {', '.join(POOLINGS)}"))
    try:
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    except ImportError:
        rule, remedy = "published encoders are run by it", "pip install .[eval]"
        raise ModelError(describe("encoder", "no sentence-transformers", rule, remedy)) from None
    device = str(dist.device())
    try:
        model = SentenceTransformer(options.model, device=device, revision=options.revision)
        if options.pooling is None:
            return model
        transformer = model[0]
        assert isinstance(transformer, Transformer)
        pooled = [transformer, Pooling(transformer.get_embedding_dimension(), options.pooling)]
        return SentenceTransformer(
            modules=pooled, device=device, prompts={role: text for role, text in model.prompts.items() if text is not None}
        )
    except (OSError, ValueError) as error:
        remedy = "Give a folder or a Hub id of an encoder."
        raise ModelError(describe(f"encoder {options.model}", str(error), "can't be opened", remedy)) from error

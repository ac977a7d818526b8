"""A model of ours as `mteb` 2 wants an encoder, so that `mteb.evaluate(encoder, tasks)` runs its tasks on it directly.

Retrieval's queries get the query prompt and its documents the passage prompt; tasks without roles (similarity, clustering,
classification) use the query prompt. Vectors are unit vectors, scores inner products.
Knows no training and no measure. One process; needs mteb (extra `eval`).

Shapes: n texts, D dimensions.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hybrid_scale import dist
from hybrid_scale.config import RunConfig
from hybrid_scale.data.text import Role, TextEncoder, for_evaluation, load_text_encoder
from hybrid_scale.errors import ModelError, describe
from hybrid_scale.model.load import load_embedder
from hybrid_scale.retrieval.encode import Embed
from hybrid_scale.retrieval.published_encoder import Encoder, EncoderOptions

Encode = Callable[[Role, list[str]], np.ndarray]
"""Texts in a role -> unit vectors float32 [n, D]."""


class MtebEncoder:
    """mteb's EncoderProtocol. `name` is ORGANISATION/NAME, as mteb files results; `facts` go into its metadata of the model."""

    def __init__(self, encode: Encode, name: str, revision: str, **facts: Any):
        self._encode = encode
        self.mteb_model_meta = model_meta(name, revision, facts)

    def encode(
        self,
        inputs: Iterable[dict[str, Any]],
        *,
        task_metadata: Any = None,
        hf_split: str = "",
        hf_subset: str = "",
        prompt_type: Any = None,
        **kwargs: Any,
    ) -> np.ndarray:
        """Vectors [n, D] of the texts of all batches; `prompt_type` tells documents. Raises ModelError: no texts in them."""
        texts: list[str] = []
        for batch in inputs:
            if "text" not in batch:
                raise ModelError(describe("mteb task", sorted(batch), "this model embeds text", "Choose tasks on text."))
            texts += batch["text"]
        return self._encode("passage" if getattr(prompt_type, "value", prompt_type) == "document" else "query", texts)

    def similarity(self, embeddings1: Any, embeddings2: Any) -> torch.Tensor:
        """Inner products of all pairs: [n, m]."""
        return _matrix(embeddings1) @ _matrix(embeddings2).T

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> torch.Tensor:
        """Inner products row by row: [n]."""
        return (_matrix(embeddings1) * _matrix(embeddings2)).sum(-1)


def _matrix(vectors: Any) -> torch.Tensor:
    given = torch.as_tensor(np.asarray(vectors) if not isinstance(vectors, torch.Tensor) else vectors).float()
    return given[None] if given.ndim == 1 else given


def model_meta(name: str, revision: str, facts: dict[str, Any]) -> Any:
    """mteb's record of a model. Raises ModelError: mteb isn't installed, or a name without an organisation."""
    try:
        from mteb.models.model_meta import ModelMeta, ScoringFunction
    except ImportError:
        raise ModelError(describe("mteb", "not installed", "its tasks need it", "pip install .[eval]")) from None
    if name.count("/") != 1:
        raise ModelError(describe("model name", name, "mteb files results under ORGANISATION/NAME"))
    known = {"similarity_fn_name": ScoringFunction.COSINE, "framework": ["PyTorch"], "use_instructions": True}
    return ModelMeta.create_empty({"name": name, "revision": revision, **known, **facts})


def from_config(config: RunConfig, adapter: Path | None, name: str, revision: str) -> MtebEncoder:
    """The base model of a run, with the trained weights in `adapter` (a checkpoint's folder) where given, on this device."""
    embedder = load_embedder(config.model, config.run.seed, adapter).to(dist.device()).eval()
    encoder = for_evaluation(load_text_encoder(config), config.evaluation)
    tokens = config.training.max_tokens_per_embedding_batch

    def encode(role: Role, texts: list[str]) -> np.ndarray:
        return embed_texts(encoder, lambda batch: embedder(**batch), role, texts, tokens)

    return MtebEncoder(encode, name, revision, max_tokens=encoder.max_tokens["passage"])


def from_exported(folder: str, name: str, revision: str, **options: Any) -> MtebEncoder:
    """An exported model, or any that sentence-transformers opens; `options` as in EncoderOptions."""
    model = Encoder(EncoderOptions(folder, **options))

    def encode(role: Role, texts: list[str]) -> np.ndarray:
        return model.queries(texts) if role == "query" else model.passages(texts)

    return MtebEncoder(encode, name, revision, max_tokens=model.settings["max_tokens"], embed_dim=model.settings["dimensions"])


def embed_texts(encoder: TextEncoder, embed: Embed, role: Role, texts: Sequence[str], max_tokens: int) -> np.ndarray:
    """Unit vectors float32 [n, D] in the order given, longest texts first, at most `max_tokens` tokens (or one text) a batch."""
    rows = encoder.encode(role, texts)
    order = sorted(range(len(rows)), key=lambda number: -len(rows[number]))
    vectors: list[np.ndarray] = []
    start = 0
    while start < len(order):
        size = max(1, max_tokens // len(rows[order[start]]))
        batch = encoder.collate([rows[number] for number in order[start : start + size]])
        with torch.no_grad():
            found = embed({name: tensor if name == "lengths" else tensor.to(dist.device()) for name, tensor in batch.items()})
        vectors.append(found.float().cpu().numpy())
        start += size
    joined = np.concatenate(vectors)
    result = np.empty_like(joined)
    result[order] = joined
    return result

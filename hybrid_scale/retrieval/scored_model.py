"""A run's model, or its untrained base, as vectors of retrieval sets kept on disk.

Knows no measure, and of a checkpoint only its trained weights.
"""

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from hybrid_scale import dist
from hybrid_scale.base_files import fetch
from hybrid_scale.checkpoints import digest_of_weights
from hybrid_scale.config import RunConfig
from hybrid_scale.data.prepared import RetrievalSet
from hybrid_scale.data.text import load_text_encoder
from hybrid_scale.model.acceptance import accept
from hybrid_scale.model.digests import agreed_digests, check_trained_on
from hybrid_scale.model.embedder import Embedder
from hybrid_scale.model.load import load_embedder
from hybrid_scale.model.weight_files import say
from hybrid_scale.retrieval.encode import Encoding, encode_stored
from hybrid_scale.retrieval.index import Shard
from hybrid_scale.retrieval.vectors import open_stored
from hybrid_scale.runs import RunDirectory


class ScoredModel:
    """Loaded on this rank's device when the first text is embedded, once for all sets.

    `checkpoint`: whose trained weights; None: the base as it is. `home`: where stores of embeddings lie, by default the run's.
    """

    def __init__(self, config: RunConfig, checkpoint: Path | None = None, home: Path | None = None):
        self.config, self.checkpoint = config, checkpoint
        self.point = checkpoint.name if checkpoint else "base"
        self.home = home or RunDirectory(config.run.directory).embeddings
        fetch(config.model)
        dist.first_rank_does(lambda: say(*accept(config)))
        self.facts = self._facts(agreed_digests(config.model))
        self.encoder = load_text_encoder(config)

    def _facts(self, base: dict[str, str]) -> dict[str, Any]:
        """What names the weights and how they are used, as JSON: files of the base, SHA-256 of what was trained, pooling, ..."""
        settings = self.config.model
        if self.checkpoint and (warning := check_trained_on(self.checkpoint, self.config, base)):
            dist.first_rank_does(lambda: say(warning))
        trained = digest_of_weights(self.checkpoint) if self.checkpoint else None
        used = ("quantization", "dtype", "attention", "pooling", "end_token")
        return {"base": base, "trained": trained, **{name: getattr(settings, name) for name in used}}

    @cached_property
    def embedder(self) -> Embedder:
        adapter = self.checkpoint / "adapter" if self.checkpoint else None
        return load_embedder(self.config.model, self.config.run.seed, adapter).to(dist.device()).eval()

    def vectors(self, task: RetrievalSet, store: Path, memory_gib: float | None) -> tuple[np.ndarray, Shard]:
        """Vectors of all queries [Q, D] and of this rank's share of the corpus, by a replica of the model on each rank.

        Stored in `store`, of which finished parts are used again. `memory_gib`: for a rank's vectors; None: as the config says.
        """
        tokens, settings = self.config.training.max_tokens_per_embedding_batch, self.config.evaluation

        def encoding(dtype: str) -> Encoding:
            return Encoding(self.facts, self.encoder, lambda batch: self.embedder(**batch), tokens, dtype)

        queries = encode_stored(task, "query", store / "queries", encoding("float32"))
        corpus = encode_stored(task, "passage", store / "corpus", encoding(settings.embedding_dtype))
        return open_stored(queries, corpus, task, memory_gib or settings.shard_memory_gib, checked=True)

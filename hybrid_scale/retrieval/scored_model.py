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
from hybrid_scale.data.text import for_evaluation, load_text_encoder
from hybrid_scale.model.acceptance import accept
from hybrid_scale.model.digests import agreed_digests, check_trained_on
from hybrid_scale.model.embedder import Embedder
from hybrid_scale.model.load import load_embedder
from hybrid_scale.model.weight_files import say
from hybrid_scale.retrieval.encode import Encoding, encode_stored
from hybrid_scale.retrieval.index import Shard
from hybrid_scale.retrieval.lengths import at_limit_in, budget_of, text_lengths
from hybrid_scale.retrieval.vectors import open_stored
from hybrid_scale.runs import RunDirectory


class ScoredModel:
    """Loaded on this rank's device when the first text is embedded, once for all sets.

    `checkpoint`: whose trained weights; None: the base as it is. `home`: where stores of embeddings lie, by default the run's.
    """

    def __init__(self, config: RunConfig, checkpoint: Path | None = None, home: Path | None = None):
        self.config, self.checkpoint = config, checkpoint
        self.home = home or RunDirectory(config.run.directory).embeddings
        fetch(config.model)
        dist.first_rank_does(lambda: say(*accept(config)))
        self.facts = self._facts(agreed_digests(config.model))
        self.encoder = for_evaluation(load_text_encoder(config), config.evaluation)
        limits = self.encoder.max_tokens
        self.point = f"{checkpoint.name if checkpoint else 'base'}-q{limits['query']}-p{limits['passage']}"
        """Folder of its stores: a checkpoint, and the lengths at which texts are cut."""

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

    def vectors(self, task: RetrievalSet, store: Path, memory_gib: float | None) -> tuple[np.ndarray, Shard, dict[str, Any]]:
        """Vectors of all queries [Q, D] and of this rank's share of the corpus, by a replica of the model on each rank; and the
        `text_lengths` of the result.

        Stored in `store`, of which finished parts are used again. `memory_gib`: for a rank's vectors; None: as the config says.
        """
        settings = self.config.evaluation
        tokens = budget_of(self.encoder, self.config.training.max_tokens_per_embedding_batch)

        def encoding(dtype: str) -> Encoding:
            return Encoding(self.facts, self.encoder, lambda batch: self.embedder(**batch), tokens, dtype)

        queries = encode_stored(task, "query", store / "queries", encoding("float32"))
        corpus = encode_stored(task, "passage", store / "corpus", encoding(settings.embedding_dtype))
        opened = open_stored(queries, corpus, task, memory_gib or settings.shard_memory_gib, checked=True)
        return *opened, text_lengths(self.encoder, at_limit_in(queries), at_limit_in(corpus))

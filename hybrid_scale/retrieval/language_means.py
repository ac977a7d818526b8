"""A model's vectors once more, with the mean of each language taken away: what alignment costs nothing to train.

Training must beat it (2004.05484 measures the bias that it removes), so it is scored beside the model, from the same vectors.
Fitted on the set's own corpus and queries, each apart, without judgments (language_removal.py). Knows no model.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from hybrid_scale import dist
from hybrid_scale.data.prepared import RetrievalSet
from hybrid_scale.retrieval.evaluate import evaluate, languages_of
from hybrid_scale.retrieval.index import Shard
from hybrid_scale.retrieval.language_removal import LANGUAGE_MEAN, Removal, fit_and_remove
from hybrid_scale.retrieval.spill import Spill

KEY = "without_language_means"
"""Of a result: `{"metrics": {...}}` of the vectors with means subtracted."""


@contextmanager
def without_languages(
    task: RetrievalSet, queries: np.ndarray, shard: Shard, removal: Removal, spill: Spill
) -> Iterator[tuple[np.ndarray, Shard]]:
    """Query vectors [Q, D] and a shard whose languages were taken out, valid inside the `with` block. Collective."""
    names, query_language = languages_of(task, task.queries)
    passage_names, passage_language = languages_of(task, task.corpus)
    numbers = shard.numbers
    changed = np.concatenate(list(fit_and_remove(queries, query_language, len(names), removal, shared=False)))
    blocks = fit_and_remove(shard.vectors, passage_language[numbers], len(passage_names), removal, shared=True)
    with spill:
        yield changed, dist.together(lambda: spill.extend(blocks).shard(numbers))


def without_language_means(
    task: RetrievalSet,
    queries: np.ndarray,
    shard: Shard,
    top_k: int,
    memory_gib: float,
    folder: Path,
    drop_own_id: bool | None = None,
) -> dict[str, Any]:
    """{KEY: {"metrics": ...}} of query vectors [Q, D] and this rank's shard of the corpus. Collective.

    The changed vectors lie in `folder` where they exceed `memory_gib`. Raises what `evaluate` raises.
    """
    name = lambda row: f"passage {task.corpus.column('id', shard.numbers[row : row + 1])[0]!r}"  # noqa: E731
    spill = Spill(len(shard.numbers), "float32", memory_gib * 2**30, folder, name)
    with without_languages(task, queries, shard, Removal(LANGUAGE_MEAN), spill) as (changed, moved):
        return {KEY: {"metrics": evaluate(task, changed, moved, top_k, drop_own_id=drop_own_id)["metrics"]}}

"""Language bias of a multilingual ranking: does the language of a passage decide where it lands?

Two measures: how far apart the translations of one answer are ranked, and whose language comes first. Less bias isn't always
wanted; report these beside accuracy, not instead of it.
Knows no score and no passage; needs numpy only.

PEER (2405.00978) is left out on purpose. It tests per query whether the ranks of the relevant passages differ between languages
(Kruskal-Wallis). With one relevant passage per language, as in XQuAD-R and MLQA-R, every group holds one rank, all orders
give the same statistic, and the value is a constant of the number of languages (.4405 for eleven): it would say nothing.

Shapes: Q queries, J relevant passages.
"""

import numpy as np

from hybrid_scale.retrieval.metrics import RelevantRanks


def rank_distance(query: np.ndarray, rank: np.ndarray, language: np.ndarray, queries: int) -> np.ndarray:
    """Largest minus smallest rank of a query's relevant passages in the pool of all languages: float64 [Q].

    `query`, `rank` and `language` (of the passage) are [J]. NaN for queries whose relevant passages are in fewer than two
    languages: nothing parallel to compare. Divided by the pool's size - 1 it lies between 0 and 1.
    """
    relevant = RelevantRanks(query, rank, queries)
    distinct = np.unique(np.stack([query, language]), axis=1)[0] if len(query) else np.zeros(0, np.int64)
    parallel = np.bincount(distinct.astype(np.int64), minlength=queries) >= 2
    distance = np.full(queries, np.nan)
    first = relevant.first[parallel]
    distance[parallel] = relevant.rank[first + relevant.count[parallel] - 1] - relevant.rank[first]
    return distance


def top_language_shares(query_language: np.ndarray, top_language: np.ndarray, queries: int, passages: int) -> np.ndarray:
    """Row x: the share of each language among the first results of the queries in language x. [`queries`, `passages`] languages.

    `query_language` [Q] and `top_language` [Q] are language numbers; rows sum to 1, and are NaN for a language without queries.
    """
    counts = np.bincount(query_language * passages + top_language, minlength=queries * passages).reshape(queries, passages)
    totals = counts.sum(1, keepdims=True)
    return np.divide(counts, totals, out=np.full(counts.shape, np.nan), where=totals > 0)

"""Language bias of a multilingual ranking: does the language of a passage decide where it lands?

How far apart the translations of one answer are ranked, whose language comes first, and how likely ranks like these are when
language plays no part. Less bias isn't always wanted; report these beside accuracy, not instead of it.
Knows no score and no passage; needs numpy and scipy only.

Shapes: Q queries, J relevant passages.
"""

import numpy as np
from scipy.special import chdtrc

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


def peer(query: np.ndarray, rank: np.ndarray, language: np.ndarray, queries: int, grade: np.ndarray) -> np.ndarray:
    """Probability of equal expected rank (PEER, 2405.00978): float64 [Q], 1 when language plays no part, near 0 when it decides.

    Per query and relevance level, Kruskal and Wallis' H on the ranks of the level's passages grouped by language,
    H = (N - 1) sum_l n_l (mean_l - mean)^2 / sum (rank - mean)^2, and the probability of such an H or a larger one (chi squared
    with one degree of freedom fewer than languages; an approximation for few passages a language). The mean over the query's
    positive levels, which the paper leaves to the user to weigh; not over level 0. `query`, `rank`, `language` and `grade` are
    [J]; ranks are those of the full ranking. NaN where a query has no level with passages in two languages, one of them twice:
    the value would be a constant (see `peer_refusal`).
    """
    total, levels = np.zeros(queries), np.zeros(queries)
    for level in np.unique(grade):
        there = grade == level
        values = _equal_rank_probability(query[there], np.asarray(rank[there], np.float64), language[there], queries)
        total += np.nan_to_num(values)
        levels += ~np.isnan(values)
    return np.divide(total, levels, out=np.full(queries, np.nan), where=levels > 0)


def peer_refusal(query: np.ndarray, language: np.ndarray, grade: np.ndarray) -> str | None:
    """Why PEER says nothing on these judged pairs [J], or None.

    With one relevant passage a language, as in XQuAD-R and MLQA-R, every group holds one rank, H is N - 1 whatever the order,
    and PEER a constant of the number of languages (.4405 for eleven).
    """
    _, size = np.unique(np.stack([query, grade, language]), axis=1, return_counts=True)
    if (size > 1).any():
        return None
    return "no query has two equally relevant passages in one language: PEER would be a constant of the number of languages"


def _equal_rank_probability(query: np.ndarray, rank: np.ndarray, language: np.ndarray, queries: int) -> np.ndarray:
    """[Q] of one relevance level; NaN with fewer than two languages or one passage in each."""
    groups, group = np.unique(np.stack([query, language]), axis=1, return_inverse=True)
    size, owner = np.bincount(group), groups[0]
    number = np.bincount(query, minlength=queries)
    mean = _ratio(np.bincount(query, weights=rank, minlength=queries), number)
    of_group = np.bincount(group, weights=rank) / size
    between = np.bincount(owner, weights=size * (of_group - mean[owner]) ** 2, minlength=queries)
    within = np.bincount(query, weights=(rank - mean[query]) ** 2, minlength=queries)
    languages = np.bincount(owner, minlength=queries)
    valid = (languages >= 2) & (number > languages)
    values = np.full(queries, np.nan)
    values[valid] = chdtrc(languages[valid] - 1, ((number - 1) * _ratio(between, within))[valid])
    return values


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    return np.divide(above, below, out=np.full(len(above), np.nan), where=below > 0)

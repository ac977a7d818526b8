"""What a random order of the candidates scores: the exact expectation of each metric of metrics.py for single queries.

Every order of a query's `candidates` [Q] is equally likely. A relevant passage with an infinite rank (the corpus lacks it) stays
unfound and counts among the relevant ones, as in the metrics. Below, n: candidates, r: relevant passages that can be found,
R: all relevant ones. One relevant passage stands at each place with probability 1 / n; given one at place i, each of the others
stands before it with probability (i - 1) / (n - 1). Knows no language; needs numpy and scipy only.
"""

import numpy as np
from scipy.special import digamma

from hybrid_scale.retrieval.metrics import RelevantRanks


def average_precision(relevant: RelevantRanks, candidates: np.ndarray) -> np.ndarray:
    """r / (R n) sum_i (1 + (i - 1) (r - 1) / (n - 1)) / i = r / (R n) (H_n + (r - 1) (n - H_n) / (n - 1)): [Q]."""
    n, r = candidates.astype(np.float64), _findable(relevant)
    harmonic = digamma(n + 1) + np.euler_gamma
    others = np.divide((r - 1) * (n - harmonic), n - 1, out=np.zeros_like(n), where=n > 1)
    return relevant.divide(r / n * (harmonic + others), relevant.count)


def reciprocal_rank(relevant: RelevantRanks, candidates: np.ndarray, cut: int) -> np.ndarray:
    """Sum over i <= `cut` of P(the first relevant passage is at i) / i: [Q]."""
    n, r = candidates.astype(np.float64), _findable(relevant)
    none_yet, total = np.ones_like(n), np.zeros_like(n)
    for i in range(1, cut + 1):
        left = n - i + 1
        here = np.divide(r, left, out=np.zeros_like(n), where=left > 0)
        total += none_yet * here / i
        none_yet *= np.clip(1 - here, 0, 1)
    return relevant.divide(total, np.ones(relevant.queries))


def recall(relevant: RelevantRanks, candidates: np.ndarray, cut: int) -> np.ndarray:
    """r / R min(cut / n, 1): [Q]."""
    return relevant.divide(_findable(relevant) * np.minimum(cut / candidates, 1), relevant.count)


def success_at_1(relevant: RelevantRanks, candidates: np.ndarray) -> np.ndarray:
    """r / n: [Q]."""
    return relevant.divide(_findable(relevant) / candidates, np.ones(relevant.queries))


def ndcg(relevant: RelevantRanks, candidates: np.ndarray, cut: int) -> np.ndarray:
    """Mean grade of a place times its summed discounts, over the ideal gain: [Q]."""
    discounts = np.concatenate([[0.0], np.cumsum(1 / np.log2(1 + np.arange(1, cut + 1)))])
    gain = relevant.total(np.where(np.isfinite(relevant.rank), relevant.grade, 0)) / candidates
    best_first = relevant.grade[np.lexsort((-relevant.grade, relevant.query))]
    ideal = np.where(relevant.place <= cut, best_first / np.log2(1 + relevant.place), 0.0)
    return relevant.divide(gain * discounts[np.minimum(candidates, cut)], relevant.total(ideal))


def rank_distance(relevant: RelevantRanks, candidates: np.ndarray) -> np.ndarray:
    """Largest minus smallest of r places drawn from n: (r - 1) (n + 1) / (r + 1): [Q]."""
    r = _findable(relevant)
    return relevant.divide((r - 1) * (candidates + 1) / (r + 1), np.ones(relevant.queries))


def _findable(relevant: RelevantRanks) -> np.ndarray:
    return relevant.total(np.isfinite(relevant.rank))

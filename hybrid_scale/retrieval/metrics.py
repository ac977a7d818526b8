"""Measures of retrieval from the ranks of the relevant passages, as trec_eval defines them.

Every measure returns one float64 a query [Q]. A query that was judged but has no relevant passage scores 0, as in trec_eval;
one that nobody judged has NaN (`mean` leaves it out). A relevant passage that was not retrieved has rank infinity and earns
nothing; it still counts among the relevant ones.
Knows no score, no passage and no language; needs numpy only.

Shapes: Q queries, J judged pairs with a positive grade.
"""

import numpy as np


class RelevantRanks:
    """Relevant passages of Q queries: `query` [J], `rank` [J] from 1, `grade` [J] > 0 (1 when left out).

    `topics` [Q]: whether the query was judged at all, be it with grades of 0 alone; None: only those with a relevant passage.
    Stored by query, then rank. `place` [J] numbers a query's relevant passages 1, 2, ... in that order.
    """

    def __init__(
        self,
        query: np.ndarray,
        rank: np.ndarray,
        queries: int,
        grade: np.ndarray | None = None,
        topics: np.ndarray | None = None,
    ):
        grade = np.ones(len(query)) if grade is None else np.asarray(grade, np.float64)
        rank = np.asarray(rank, np.float64)
        if not len(query) == len(rank) == len(grade) or (grade <= 0).any() or not (rank >= 1).all():
            raise ValueError("one query, one rank from 1 and one positive grade per relevant passage")
        order = np.lexsort((rank, query))
        self.queries = queries
        self.query = np.asarray(query, np.int64)[order]
        self.rank = rank[order]
        self.grade = grade[order]
        self.count = np.bincount(self.query, minlength=queries)
        self.topics = self.count > 0 if topics is None else topics
        self.first = np.cumsum(self.count) - self.count
        self.place = np.arange(len(query)) - self.first[self.query] + 1

    def total(self, values: np.ndarray) -> np.ndarray:
        """Sum over each query's relevant passages: [J] -> [Q]."""
        return np.bincount(self.query, weights=values, minlength=self.queries)

    def divide(self, values: np.ndarray, by: np.ndarray) -> np.ndarray:
        """[Q] / [Q]; where a query has no relevant passage, 0 if it was judged, else NaN."""
        return np.divide(values, by, out=np.where(self.topics, 0.0, np.nan), where=self.count > 0)


def mean(values: np.ndarray) -> float:
    """Mean over the queries that have a value; NaN when none has."""
    valid = values[~np.isnan(values)]
    return float(valid.mean()) if len(valid) else float("nan")


def average_precision(relevant: RelevantRanks) -> np.ndarray:
    """Precision at the rank of each relevant passage, summed, over the number of all relevant passages (`map`)."""
    return relevant.divide(relevant.total(relevant.place / relevant.rank), relevant.count)


def reciprocal_rank(relevant: RelevantRanks, cut: float = np.inf) -> np.ndarray:
    """1 / rank of the first relevant passage, 0 when it lies beyond `cut` (`recip_rank`)."""
    first = (relevant.place == 1) & (relevant.rank <= cut)
    return relevant.divide(relevant.total(first / relevant.rank), np.ones(relevant.queries))


def recall(relevant: RelevantRanks, cut: int) -> np.ndarray:
    """Relevant passages at rank <= `cut` over all relevant ones (`recall_CUT`)."""
    return relevant.divide(relevant.total(relevant.rank <= cut), relevant.count)


def success(relevant: RelevantRanks, cut: int) -> np.ndarray:
    """1 when any relevant passage is at rank <= `cut`, else 0 (`success_CUT`; LAReQA's R@1 with cut 1)."""
    return relevant.divide(relevant.total((relevant.place == 1) & (relevant.rank <= cut)), np.ones(relevant.queries))


def ndcg(relevant: RelevantRanks, cut: int) -> np.ndarray:
    """Sum of grade / log2(1 + rank) at rank <= `cut`, over that of the best possible order (`ndcg_cut_CUT`)."""
    gain = np.where(relevant.rank <= cut, relevant.grade / np.log2(1 + relevant.rank), 0.0)
    best_first = relevant.grade[np.lexsort((-relevant.grade, relevant.query))]
    ideal = np.where(relevant.place <= cut, best_first / np.log2(1 + relevant.place), 0.0)
    return relevant.divide(relevant.total(gain), relevant.total(ideal))

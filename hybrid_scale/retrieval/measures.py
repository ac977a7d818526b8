"""Ranks of judged passages -> every number of an evaluation, and the table of single queries behind them.

A *pool* is the set of passages that a query is ranked against: the *union* is the whole corpus, a *language pool* its passages
of one language. Gradings of 0 or below count as not relevant.

Over all judged queries, in the union pool:
    ndcg@10  recall@100  mrr@10  mrr@100 (Mr. TyDi's)  map   as in metrics.py; `map` over the full ranking
    r@1                  share of queries whose first result is relevant
When the corpus has several languages also, with XQ a query language and XC a passage language (SCIENCE: the paper's measures):
    mono_map, mono_r@1   queries of XQ in the pool of XC = XQ: mean over its queries, then over languages
    cross_map, cross_r@1 the same over ordered pairs XQ != XC
    multi_map            queries of XQ in the union, mean over its queries, then over XQ
    multi_r@10           share of a query's relevant passages among the first ten of the union, averaged likewise
    rank_distance        see bias.py, in the union, averaged likewise; rank_distance_normalised divides by pool size - 1
    peer                 see bias.py, averaged likewise; left out, with the reason in `refused`, where it would be a constant
As `trec_eval -c`: a query whose judgments are all 0 scores 0 in the union pool (`queries_without_relevant` counts those), a
query without any judgment is left out (`queries_without_judgment`). In a language pool a (query, XC) pair without a relevant
passage is skipped, as in LAReQA, and counted in `skipped_pairs`. A number that nothing was averaged into is null.
Knows no score, no text and no file.

Shapes: Q queries, J judged pairs with a positive grade, X query languages, C passage languages.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from hybrid_scale.retrieval import bias, metrics
from hybrid_scale.retrieval.metrics import RelevantRanks

Measure = Callable[[RelevantRanks], np.ndarray]

UNION_MEASURES: dict[str, Measure] = {
    "ndcg@10": lambda relevant: metrics.ndcg(relevant, 10),
    "recall@100": lambda relevant: metrics.recall(relevant, 100),
    "mrr@10": lambda relevant: metrics.reciprocal_rank(relevant, 10),
    "mrr@100": lambda relevant: metrics.reciprocal_rank(relevant, 100),
    "map": metrics.average_precision,
    "r@1": lambda relevant: metrics.success(relevant, 1),
}
LANGUAGE_POOL_MEASURES: dict[str, Measure] = {"map": UNION_MEASURES["map"], "r@1": UNION_MEASURES["r@1"]}
PER_QUERY_MEASURES: dict[str, Measure] = {**UNION_MEASURES, "recall@10": lambda relevant: metrics.recall(relevant, 10)}
UNION = "union"
"""The pool of all languages, in the table of single queries."""


@dataclass(frozen=True)
class Judged:
    """What the measures need: languages as numbers, judged pairs, and how many passages of each language beat them."""

    query_languages: list[str]
    passage_languages: list[str]
    query_language: np.ndarray
    """[Q]"""
    query: np.ndarray
    """[J]"""
    language: np.ndarray
    """[J] of the judged passage; -1: unknown, as the corpus has several languages and lacks this passage"""
    grade: np.ndarray
    """[J]"""
    above: np.ndarray
    """[J, C]"""
    found: np.ndarray
    """[J] whether the passage is in the ranking at all: a run file may end before it, a rule may drop it"""
    topics: np.ndarray | None = None
    """[Q] whether the query was judged, be it with grades of 0 alone; None: all were"""

    @property
    def ranks(self) -> np.ndarray:
        """[J] in the union; infinity where not found."""
        return np.where(self.found, 1.0 + self.above.sum(1), np.inf)

    def union(self) -> RelevantRanks:
        """A judged query without a relevant passage counts 0 here, and nowhere else."""
        topics = np.ones(len(self.query_language), bool) if self.topics is None else self.topics
        return RelevantRanks(self.query, self.ranks, len(self.query_language), self.grade, topics)

    def topic_counts(self) -> dict[str, int]:
        """Queries that count 0 (judged, nothing relevant), and queries that are left out (not judged)."""
        judged = len(self.query_language) if self.topics is None else int(self.topics.sum())
        return {
            "queries_without_relevant": judged - len(np.unique(self.query)),
            "queries_without_judgment": len(self.query_language) - judged,
        }

    def language_pool(self, language: int) -> RelevantRanks:
        if len(self.passage_languages) == 1:
            return self.union()
        there = self.language == language
        ranks = np.where(self.found, 1.0 + self.above[:, language], np.inf)
        return RelevantRanks(self.query[there], ranks[there], len(self.query_language), self.grade[there])

    def union_values(self) -> dict[str, np.ndarray]:
        """Measures of single queries that look at the languages of the union pool: each [Q]. `peer` only where it says something.

        Both need the whole ranking: NaN everywhere when a judged passage isn't found.
        """
        if not self.found.all() or len(self.passage_languages) < 2:
            nothing = np.full(len(self.query_language), np.nan)
            return {"rank_distance": nothing}
        given = (self.query, self.ranks, self.language, len(self.query_language))
        values = {"rank_distance": bias.rank_distance(*given)}
        if bias.peer_refusal(self.query, self.language, self.grade) is None:
            values["peer"] = bias.peer(*given, self.grade)
        return values


# -------------------------------------------------------------------------------------------------------------- averages


def summarise(judged: Judged, passages: int | None) -> dict[str, Any]:
    """`metrics`, `by_language`, `map_matrix`, `skipped_pairs`, `refused`. `passages`: size of the corpus, None: unknown."""
    union = judged.union()
    per_query = {name: measure(union) for name, measure in UNION_MEASURES.items()}
    overall = {name: metrics.mean(values) for name, values in per_query.items()}
    by_language = {name: _by_language(judged, values) for name, values in per_query.items()}
    matrices = {
        name: np.stack([_by_language(judged, measure(judged.language_pool(c))) for c in range(len(judged.passage_languages))], 1)
        for name, measure in LANGUAGE_POOL_MEASURES.items()
    }
    refused: dict[str, str] = {}
    if len(judged.passage_languages) > 1:
        by_language |= _multilingual(judged, union, matrices, passages)
        multilingual = {name: metrics.mean(values) for name, values in by_language.items() if name not in overall}
        multilingual |= {f"cross_{name}": _cross(judged, matrix) for name, matrix in matrices.items()}
        overall |= multilingual
        refused = _refused(judged)
    pairs = len(judged.query_language) * len(judged.passage_languages)
    return {
        "metrics": {name: _number(value) for name, value in overall.items()},
        "by_language": {name: dict(zip(judged.query_languages, map(_number, v), strict=True)) for name, v in by_language.items()},
        "map_matrix": matrix(judged, matrices["map"]),
        "skipped_pairs": pairs - len(np.unique(np.stack([judged.query, judged.language])[:, judged.language >= 0], axis=1).T),
        "refused": refused,
    }


def _multilingual(
    judged: Judged, union: RelevantRanks, matrices: dict[str, np.ndarray], passages: int | None
) -> dict[str, np.ndarray]:
    """Values by query language [X] of the measures of a corpus in several languages; all but cross_* average to their metric."""
    same = _same_language(judged)
    values = {"multi_map": metrics.average_precision(union), "multi_r@10": metrics.recall(union, 10), **judged.union_values()}
    values["rank_distance_normalised"] = values["rank_distance"] / (passages - 1 if passages else np.nan)
    result = {name: _by_language(judged, value) for name, value in values.items()}
    for name, cells in matrices.items():
        result[f"mono_{name}"] = np.array([metrics.mean(row[own]) for row, own in zip(cells, same, strict=True)])
        result[f"cross_{name}"] = np.array([metrics.mean(row[~own]) for row, own in zip(cells, same, strict=True)])
    return result


def _refused(judged: Judged) -> dict[str, str]:
    """Measure -> why it isn't given."""
    refused = {}
    if not judged.found.all():
        missing = f"{int((~judged.found).sum())} relevant passages are not in the ranking"
        refused = {"rank_distance": f"needs the whole ranking: {missing}", "peer": f"needs the whole ranking: {missing}"}
    reason = bias.peer_refusal(judged.query, judged.language, judged.grade)
    return {**refused, "peer": reason} if reason is not None else refused


def _cross(judged: Judged, cells: np.ndarray) -> float:
    """Mean over ordered pairs: where pairs are missing it isn't the mean over query languages."""
    return metrics.mean(cells[~_same_language(judged)])


def _same_language(judged: Judged) -> np.ndarray:
    """[X, C] whether query and passage language are one."""
    return np.array(judged.query_languages)[:, None] == np.array(judged.passage_languages)[None, :]


def _by_language(judged: Judged, values: np.ndarray) -> np.ndarray:
    """Mean over the queries of each query language: [Q] -> [X]."""
    return np.array([metrics.mean(values[judged.query_language == x]) for x in range(len(judged.query_languages))])


def _number(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


def matrix(judged: Judged, values: np.ndarray) -> dict[str, Any]:
    """A value per query and passage language [X, C] as JSON."""
    return {
        "query_languages": judged.query_languages,
        "passage_languages": judged.passage_languages,
        "values": [[_number(value) for value in row] for row in values],
    }


# --------------------------------------------------------------------------------------------------------- single queries


def per_query(judged: Judged, ids: Sequence[str], groups: Sequence[str], first: np.ndarray | None) -> pa.Table:
    """One row per query and pool in which it has a relevant passage; in the pool `union`, one row for every query.

    Columns: query (its id), query_lang, group (parallel question: the unit to resample by), pool (`union` or a passage
    language), relevant (how many), the measures of PER_QUERY_MEASURES; in the union pool also rank_distance, peer (only where
    it isn't refused) and first_lang, the language of the first result (`first` [Q], -1: none). Null: not defined there.
    Every average of `summarise` is a mean over rows of this table.
    """
    queries = np.arange(len(judged.query_language))
    extra = judged.union_values()
    tables = [_pool_table(judged, UNION, judged.union(), queries, ids, groups, extra, first)]
    if len(judged.passage_languages) > 1:
        for c, language in enumerate(judged.passage_languages):
            pool = judged.language_pool(c)
            tables.append(_pool_table(judged, language, pool, queries[pool.count > 0], ids, groups, dict.fromkeys(extra), None))
    return pa.concat_tables(tables)


def _pool_table(
    judged: Judged,
    name: str,
    pool: RelevantRanks,
    rows: np.ndarray,
    ids: Sequence[str],
    groups: Sequence[str],
    extra: Mapping[str, np.ndarray | None],
    first: np.ndarray | None,
) -> pa.Table:
    nothing = np.full(len(judged.query_language), np.nan)
    values = {key: measure(pool) for key, measure in PER_QUERY_MEASURES.items()}
    values |= {key: nothing if value is None else value for key, value in extra.items()}
    languages = judged.passage_languages
    columns = {
        "query": pa.array([ids[row] for row in rows], pa.string()),
        "query_lang": pa.array([judged.query_languages[judged.query_language[row]] for row in rows], pa.string()),
        "group": pa.array([groups[row] for row in rows], pa.string()),
        "pool": pa.array([name] * len(rows), pa.string()),
        "relevant": pa.array(pool.count[rows], pa.int64()),
        **{key: pa.array(value[rows], pa.float64(), from_pandas=True) for key, value in values.items()},
        "first_lang": pa.array([None if first is None or first[row] < 0 else languages[first[row]] for row in rows], pa.string()),
    }
    return pa.table(columns)

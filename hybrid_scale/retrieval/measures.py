"""Ranks of judged passages -> every number of an evaluation, and the table of single queries behind them.

A *pool* is the set of passages that a query is ranked against: the *union* is the whole corpus, a *language pool* its passages
of one language. Gradings of 0 or below count as not relevant.

The set's protocol (protocols.py) says which of these numbers a result gives:
    ndcg@10  recall@100  mrr@10  mrr@100  map   as in metrics.py; `map` over the full ranking
    r@1                  share of queries whose first result is relevant
        over all judged queries, in the union pool; where the protocol says `own language`, in the pool of the
        query's language, mean over its queries, then over languages. Then KEY_median, for the headline metrics, is the median
        over languages, and `union` beside `metrics` holds what the union pool would give (no metric of the set).
When the protocol says `by language` also, with XQ a query language and XC a passage language (2408.10536):
    mono_map, mono_r@1   queries of XQ in the pool of XC = XQ: mean over its queries, then over languages
    cross_map, cross_r@1 the same over ordered pairs XQ != XC
    multi_map            queries of XQ in the union, mean over its queries, then over XQ
    multi_r@10           share of a query's relevant passages among the first ten of the union, averaged likewise
    rank_distance        see bias.py, in the union, averaged likewise; rank_distance_normalised divides by pool size - 1
    peer                 see bias.py, averaged likewise; left out, with the reason in `refused`, where it would be a constant
`chance` beside `metrics` holds what these numbers would be on average if every pool were in random order (chance.py).
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

from hybrid_scale.protocols import Protocol
from hybrid_scale.retrieval import bias, chance, metrics
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
EXPECTED: dict[str, Callable[[RelevantRanks, np.ndarray], np.ndarray]] = {
    "ndcg@10": lambda relevant, candidates: chance.ndcg(relevant, candidates, 10),
    "recall@100": lambda relevant, candidates: chance.recall(relevant, candidates, 100),
    "mrr@10": lambda relevant, candidates: chance.reciprocal_rank(relevant, candidates, 10),
    "mrr@100": lambda relevant, candidates: chance.reciprocal_rank(relevant, candidates, 100),
    "map": chance.average_precision,
    "r@1": chance.success_at_1,
}
"""UNION_MEASURES of a random order of so many candidates [Q]."""
PER_QUERY_MEASURES: dict[str, Measure] = {**UNION_MEASURES, "recall@10": lambda relevant: metrics.recall(relevant, 10)}
UNION = "union"
"""The pool of all languages, in the table of single queries."""
MEDIAN = "_median"
UNION_NOTE = "not the set's protocol: mean over all queries, each against the passages of all languages"


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

    def own_pool(self) -> RelevantRanks:
        """Of every query in the pool of its own language. A passage that the corpus lacks counts there as not found.

        A judged query without a relevant passage counts 0, one whose relevant passages are all in other languages is left out.
        """
        own = self.own_language()[self.query_language[self.query]]
        there = (own >= 0) & ((self.language == own) | (self.language < 0))
        above = np.take_along_axis(self.above[there], own[there, None], 1)[:, 0]
        ranks = np.where(self.found[there], 1.0 + above, np.inf)
        asked = self.own_language()[self.query_language] >= 0
        asked &= True if self.topics is None else self.topics
        elsewhere = np.setdiff1d(self.query, self.query[there])  # their relevant passages are all in other languages
        asked[elsewhere] = False
        return RelevantRanks(self.query[there], ranks, len(self.query_language), self.grade[there], asked)

    def own_language(self) -> np.ndarray:
        """[X] number of each query language among the passage languages, -1 where the corpus lacks it."""
        number = {language: at for at, language in enumerate(self.passage_languages)}
        return np.array([number.get(language, -1) for language in self.query_languages], np.int64)

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


def summarise(judged: Judged, sizes: np.ndarray | None, protocol: Protocol) -> dict[str, Any]:
    """`protocol`, `metrics`, `by_language`, `map_matrix`, `refused`, `skipped_pairs` or `union`, and `chance` (see above).

    `sizes`: passages of each language [C], None: unknown; then there is no `chance`.
    """
    passages = None if sizes is None else int(sizes.sum())
    numbers = _own_language(judged, protocol) if protocol.pools == "own language" else _in_union(judged, passages, protocol)
    expected = (
        {} if sizes is None else {"chance": {key: _number(value) for key, value in _chance(judged, sizes, protocol).items()}}
    )
    return {
        "protocol": protocol.facts(),
        **numbers,
        "metrics": {name: _number(value) for name, value in numbers["metrics"].items()},
        "by_language": {
            name: dict(zip(judged.query_languages, map(_number, v), strict=True)) for name, v in numbers["by_language"].items()
        },
        "map_matrix": matrix(judged, _language_pools(judged)["map"]),
        **expected,
    }


def _chance(judged: Judged, sizes: np.ndarray, protocol: Protocol) -> dict[str, float]:
    """Metric -> its expectation when each pool is in random order, averaged as the metric is."""
    if protocol.pools == "own language":
        own, candidates = judged.own_pool(), sizes[judged.own_language()[judged.query_language]]
        return {name: metrics.mean(_by_language(judged, measure(own, candidates))) for name, measure in EXPECTED.items()}
    union, everything = judged.union(), np.full(len(judged.query_language), sizes.sum())
    values = {name: metrics.mean(measure(union, everything)) for name, measure in EXPECTED.items()}
    if protocol.pools != "by language":
        return values
    for name in LANGUAGE_POOL_MEASURES:
        pools = [(judged.language_pool(c), np.full_like(everything, size)) for c, size in enumerate(sizes)]
        cells = np.stack([_by_language(judged, EXPECTED[name](*pool)) for pool in pools], 1)
        mono = [metrics.mean(row[own]) for row, own in zip(cells, _same_language(judged), strict=True)]
        values |= {f"mono_{name}": metrics.mean(np.array(mono)), f"cross_{name}": _cross(judged, cells)}
    distance = chance.rank_distance(union, everything)
    distance[np.isnan(judged.union_values()["rank_distance"])] = np.nan  # the queries that have one
    single = {"multi_map": chance.average_precision(union, everything), "multi_r@10": chance.recall(union, everything, 10)}
    single |= {"rank_distance": distance, "rank_distance_normalised": distance / (everything - 1)}
    return values | {name: metrics.mean(_by_language(judged, value)) for name, value in single.items()}


def _own_language(judged: Judged, protocol: Protocol) -> dict[str, Any]:
    """Every query in the pool of its language: mean over the queries of a language, then mean and median over languages."""
    own, union = judged.own_pool(), judged.union()
    by_language = {name: _by_language(judged, measure(own)) for name, measure in UNION_MEASURES.items()}
    overall = {name: metrics.mean(values) for name, values in by_language.items()}
    medians = [name for name in protocol.headline if name.endswith(MEDIAN)]
    overall |= {name: _median(by_language[name.removesuffix(MEDIAN)]) for name in medians}
    beside = {name: _number(metrics.mean(measure(union))) for name, measure in UNION_MEASURES.items()}
    return {"metrics": overall, "by_language": by_language, "refused": {}, "union": {"what": UNION_NOTE, "metrics": beside}}


def _median(values: np.ndarray) -> float:
    valid = values[~np.isnan(values)]
    return float(np.median(valid)) if len(valid) else math.nan


def _in_union(judged: Judged, passages: int | None, protocol: Protocol) -> dict[str, Any]:
    """Over all queries in the union pool; where the protocol goes by language, also mono, cross and multi."""
    union = judged.union()
    per_query = {name: measure(union) for name, measure in UNION_MEASURES.items()}
    overall = {name: metrics.mean(values) for name, values in per_query.items()}
    by_language = {name: _by_language(judged, values) for name, values in per_query.items()}
    refused: dict[str, str] = {}
    if protocol.pools == "by language":
        matrices = _language_pools(judged)
        by_language |= _multilingual(judged, union, matrices, passages)
        multilingual = {name: metrics.mean(values) for name, values in by_language.items() if name not in overall}
        multilingual |= {f"cross_{name}": _cross(judged, matrix) for name, matrix in matrices.items()}
        overall |= multilingual
        refused = _refused(judged)
    pairs = len(judged.query_language) * len(judged.passage_languages)
    known = np.stack([judged.query, judged.language])[:, judged.language >= 0]
    skipped = pairs - len(np.unique(known, axis=1).T)
    return {"metrics": overall, "by_language": by_language, "skipped_pairs": skipped, "refused": refused}


def _language_pools(judged: Judged) -> dict[str, np.ndarray]:
    """Measure -> its mean over the queries of each language in each language pool [X, C]."""
    pools = [judged.language_pool(c) for c in range(len(judged.passage_languages))]
    return {
        name: np.stack([_by_language(judged, measure(pool)) for pool in pools], 1)
        for name, measure in LANGUAGE_POOL_MEASURES.items()
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


def per_query(
    judged: Judged, ids: Sequence[str], groups: Sequence[str], first: np.ndarray | None, protocol: Protocol
) -> pa.Table:
    """One row per query and pool in which it has a relevant passage; in the pool `union`, one row for every query.

    Columns: query (its id), query_lang, group (parallel question: the unit to resample by), pool (`union` or a passage
    language), relevant (how many), the measures of PER_QUERY_MEASURES; in the union pool also rank_distance, peer (only where
    it isn't refused) and first_lang, the language of the first result (`first` [Q], -1: none). Null: not defined there.
    Under a protocol of `own language` the only other pool is that of the query's language (pool = query_lang), with a row for
    every judged query.
    Every average of `summarise` is a mean over rows of this table.
    """
    queries = np.arange(len(judged.query_language))
    extra = judged.union_values()
    nothing = dict.fromkeys(extra)
    tables = [_pool_table(judged, UNION, judged.union(), queries, ids, groups, extra, first)]
    if protocol.pools == "own language":
        own = judged.own_pool()
        for x, language in enumerate(judged.query_languages):
            rows = queries[(judged.query_language == x) & own.topics]
            tables.append(_pool_table(judged, language, own, rows, ids, groups, nothing, None))
    elif len(judged.passage_languages) > 1:
        for c, language in enumerate(judged.passage_languages):
            pool = judged.language_pool(c)
            tables.append(_pool_table(judged, language, pool, queries[pool.count > 0], ids, groups, nothing, None))
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

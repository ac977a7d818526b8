"""Score one retrieval set: vectors in, one dictionary of numbers out (JSON, the same on every rank).

A *pool* is the set of passages that a query is ranked against: the *union* is the whole corpus, a *language pool* its passages
of one language. Ranks are exact at any depth (index.count_above); ties go to the passage that comes first in the corpus.
Knows no model and no text; gradings of 0 or below count as not relevant.

Over all queries with a relevant passage, in the union pool:
    ndcg@10  recall@100  mrr@10  map   as in metrics.py; `map` over the full ranking
    r@1                  share of queries whose first result is relevant
When the corpus has several languages also, with XQ a query language and XC a passage language (SCIENCE: the paper's measures):
    mono_map, mono_r@1   queries of XQ in the pool of XC = XQ: mean over its queries, then over languages
    cross_map, cross_r@1 the same over ordered pairs XQ != XC
    multi_map            queries of XQ in the union, mean over its queries, then over XQ
    multi_r@10           share of a query's relevant passages among the first ten of the union, averaged likewise
    rank_distance        see bias.py, in the union, averaged likewise; rank_distance_normalised divides by pool size - 1
A (query, XC) pair without a relevant passage is skipped and counted in `skipped_pairs`; a query without any is counted in
`queries_without_relevant`. A number that nothing was averaged into is null.

Shapes: Q queries, J judged pairs with a positive grade, X query languages, C passage languages.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hybrid_scale import dist
from hybrid_scale.data.records import RetrievalSet, TextTable
from hybrid_scale.errors import RunError, describe
from hybrid_scale.retrieval import bias, metrics
from hybrid_scale.retrieval.index import Shard, count_above, search
from hybrid_scale.retrieval.metrics import RelevantRanks
from hybrid_scale.runs import atomic_path

Measure = Callable[[RelevantRanks], np.ndarray]

UNION_MEASURES: dict[str, Measure] = {
    "ndcg@10": lambda relevant: metrics.ndcg(relevant, 10),
    "recall@100": lambda relevant: metrics.recall(relevant, 100),
    "mrr@10": lambda relevant: metrics.reciprocal_rank(relevant, 10),
    "map": metrics.average_precision,
    "r@1": lambda relevant: metrics.success(relevant, 1),
}
LANGUAGE_POOL_MEASURES: dict[str, Measure] = {"map": UNION_MEASURES["map"], "r@1": UNION_MEASURES["r@1"]}


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
    """[J] of the judged passage"""
    grade: np.ndarray
    """[J]"""
    above: np.ndarray
    """[J, C]"""

    def union(self) -> RelevantRanks:
        return RelevantRanks(self.query, 1 + self.above.sum(1), len(self.query_language), self.grade)

    def language_pool(self, language: int) -> RelevantRanks:
        there = self.language == language
        ranks = 1 + self.above[there, language]
        return RelevantRanks(self.query[there], ranks, len(self.query_language), self.grade[there])


def evaluate(
    task: RetrievalSet, query_vectors: np.ndarray, shard: Shard, top_k: int = 100, run_file: Path | None = None
) -> dict[str, Any]:
    """All measures of `task` for these vectors. All ranks call it, each with all queries [Q, D] and its own shard.

    `top_k` results a query are searched as well: they give the top-1 languages and the optional TREC `run_file`, and they are
    compared with the counted ranks. Raises RunError when the two disagree (broken arithmetic), DataError as index.py does.
    """
    query_languages, query_language = _languages(task, task.queries)
    passage_languages, passage_language = _languages(task, task.corpus)
    qrels = task.qrels[task.qrels[:, 2] > 0]
    above = count_above(query_vectors, shard, qrels[:, 0], qrels[:, 1], passage_language[shard.numbers], len(passage_languages))
    judged = Judged(
        query_languages, passage_languages, query_language, qrels[:, 0], passage_language[qrels[:, 1]], qrels[:, 2], above
    )
    scores, numbers = search(query_vectors, shard, top_k)
    _check_agreement(numbers, qrels, 1 + above.sum(1))
    if run_file is not None:
        dist.first_rank_does(lambda: write_run(run_file, task, scores, numbers))
    top = bias.top_language_shares(query_language, passage_language[numbers[:, 0]], len(query_languages), len(passage_languages))
    return _facts(task, judged) | _scores(judged, len(task.corpus)) | {"top1_language_matrix": _matrix(judged, top)}


def _languages(task: RetrievalSet, table: TextTable) -> tuple[list[str], np.ndarray]:
    """The languages that occur in a table, in the task's order, and the number of each row's."""
    codes = pc.index_in(table.table.column("lang"), value_set=pa.array(task.languages, pa.large_string()))
    present, numbers = np.unique(codes.to_numpy(), return_inverse=True)
    return [task.languages[code] for code in present], numbers


def _check_agreement(numbers: np.ndarray, qrels: np.ndarray, rank: np.ndarray) -> None:
    """Counting and searching take different paths to the same order: a judged passage of rank r is result r."""
    listed = rank <= numbers.shape[1]
    wrong = int((numbers[qrels[listed, 0], rank[listed] - 1] != qrels[listed, 1]).sum())
    if wrong:
        rule = "search and counting must give them the same rank"
        raise RunError(
            describe("evaluation", f"{wrong} passages", rule, "This is a defect of the software or the GPU: report it.")
        )


def _facts(task: RetrievalSet, judged: Judged) -> dict[str, Any]:
    return {
        "task": task.name,
        "queries": len(task.queries),
        "passages": len(task.corpus),
        "languages": task.languages,
        "fingerprint": task.fingerprint,
        "queries_without_relevant": len(task.queries) - len(np.unique(judged.query)),
    }


def _scores(judged: Judged, passages: int) -> dict[str, Any]:
    """`metrics`, `by_language`, `map_matrix`, `skipped_pairs`."""
    union = judged.union()
    per_query = {name: measure(union) for name, measure in UNION_MEASURES.items()}
    overall = {name: metrics.mean(values) for name, values in per_query.items()}
    by_language = {name: _by_language(judged, values) for name, values in per_query.items()}
    matrices = {
        name: np.stack([_by_language(judged, measure(judged.language_pool(c))) for c in range(len(judged.passage_languages))], 1)
        for name, measure in LANGUAGE_POOL_MEASURES.items()
    }
    if len(judged.passage_languages) > 1:
        by_language |= _multilingual(judged, union, matrices, passages)
        multilingual = {name: metrics.mean(values) for name, values in by_language.items() if name not in overall}
        multilingual |= {f"cross_{name}": _cross(judged, matrix) for name, matrix in matrices.items()}
        overall |= multilingual
    pairs = len(judged.query_language) * len(judged.passage_languages)
    return {
        "metrics": {name: _number(value) for name, value in overall.items()},
        "by_language": {name: dict(zip(judged.query_languages, map(_number, v), strict=True)) for name, v in by_language.items()},
        "map_matrix": _matrix(judged, matrices["map"]),
        "skipped_pairs": pairs - len(np.unique(np.stack([judged.query, judged.language]), axis=1).T),
    }


def _multilingual(judged: Judged, union: RelevantRanks, matrices: dict[str, np.ndarray], passages: int) -> dict[str, np.ndarray]:
    """Values by query language [X] of the measures of a corpus in several languages; all but cross_* average to their metric."""
    same = _same_language(judged)
    distance = bias.rank_distance(judged.query, 1 + judged.above.sum(1), judged.language, len(judged.query_language))
    values = {"multi_map": metrics.average_precision(union), "multi_r@10": metrics.recall(union, 10)}
    values |= {"rank_distance": distance, "rank_distance_normalised": distance / (passages - 1)}
    result = {name: _by_language(judged, value) for name, value in values.items()}
    for name, matrix in matrices.items():
        result[f"mono_{name}"] = np.array([metrics.mean(row[own]) for row, own in zip(matrix, same, strict=True)])
        result[f"cross_{name}"] = np.array([metrics.mean(row[~own]) for row, own in zip(matrix, same, strict=True)])
    return result


def _cross(judged: Judged, matrix: np.ndarray) -> float:
    """Mean over ordered pairs: where pairs are missing it isn't the mean over query languages."""
    return metrics.mean(matrix[~_same_language(judged)])


def _same_language(judged: Judged) -> np.ndarray:
    """[X, C] whether query and passage language are one."""
    return np.array(judged.query_languages)[:, None] == np.array(judged.passage_languages)[None, :]


def _by_language(judged: Judged, values: np.ndarray) -> np.ndarray:
    """Mean over the queries of each query language: [Q] -> [X]."""
    return np.array([metrics.mean(values[judged.query_language == x]) for x in range(len(judged.query_languages))])


def _number(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


def _matrix(judged: Judged, values: np.ndarray) -> dict[str, Any]:
    return {
        "query_languages": judged.query_languages,
        "passage_languages": judged.passage_languages,
        "values": [[_number(value) for value in row] for row in values],
    }


def write_run(path: Path, task: RetrievalSet, scores: np.ndarray, numbers: np.ndarray) -> None:
    """A TREC run: `query Q0 passage rank score hybrid_scale`, a line a result. Scorers that sort it break ties their way."""
    query_ids = task.queries.column("id")
    with atomic_path(path) as beside, open(beside, "w", encoding="utf-8") as file:
        for query, row_scores, row_numbers in zip(query_ids, scores, numbers, strict=True):
            ids = task.corpus.column("id", row_numbers)
            for rank, (passage, score) in enumerate(zip(ids, row_scores, strict=True), start=1):
                file.write(f"{query} Q0 {passage} {rank} {score:.9g} hybrid_scale\n")

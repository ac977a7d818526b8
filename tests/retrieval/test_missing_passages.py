"""Judged passages that the corpus lacks, as in BEIR's ArguAna: relevant, never found. Against pytrec_eval and by hand."""

import math
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import pytrec_eval

from hybrid_scale.data.prepared import RetrievalSet
from hybrid_scale.data.records import Judgment, Passage, Query, Record
from hybrid_scale.data.writing import write_retrieval
from hybrid_scale.retrieval.baselines.run import bm25
from hybrid_scale.retrieval.evaluate import evaluate, evaluate_run_file
from hybrid_scale.retrieval.index import Shard
from hybrid_scale.retrieval.tradeoff import run as tradeoff
from hybrid_scale.retrieval.trec import read_qrels, score_files, write_qrels

GRADES = {
    "q0": {"d0": 1, "gone": 2, "lost": 1},
    "q1": {"lost": 1},
    "q2": {"d2": 1, "d3": 2, "zero": 0},
    "q3": {"d9": 1},
}
"""`gone`, `lost` and `zero` aren't in the corpus d0 ... d11."""
TEXTS = ("tea leaves", "hard stone", "cold water", "warm milk")


@pytest.fixture
def task(tmp_path: Path) -> RetrievalSet:
    return made(tmp_path / "set", ["en"] * 12)


def made(folder: Path, languages: list[str]) -> RetrievalSet:
    records: list[Record] = [Passage("c", f"d{n}", languages[n], f"{TEXTS[n % 4]} {n}") for n in range(12)]
    records += [Query("q", f"q{n}", "en", text, f"q{n}") for n, text in enumerate(TEXTS)]
    records += [Judgment("j", query, name, grade) for query, row in GRADES.items() for name, grade in row.items()]
    write_retrieval(records, folder, {"name": "test"})
    return RetrievalSet(folder)


def whole(seed: int = 0) -> tuple[np.ndarray, Shard]:
    rng = np.random.default_rng(seed)
    queries, corpus = (rng.integers(-9, 9, (rows, 16)).astype(np.float32) for rows in (4, 12))
    return queries, Shard(np.arange(12), corpus)


def theirs(queries: np.ndarray, corpus: np.ndarray) -> dict[str, float]:
    """Means over all four queries by pytrec_eval, the ranking by a plain stable sort."""
    orders = [np.argsort(-row, kind="stable") for row in queries @ corpus.T]
    run = {f"q{n}": {f"d{p}": -float(place) for place, p in enumerate(order)} for n, order in enumerate(orders)}
    names = {"ndcg@10": "ndcg_cut_10", "map": "map", "recall@100": "recall_100", "r@1": "success_1"}
    values = pytrec_eval.RelevanceEvaluator(GRADES, {"ndcg_cut.10", "map", "recall.100", "success.1"}).evaluate(run)
    assert len(values) == 4
    return {ours: float(np.mean([row[name] for row in values.values()])) for ours, name in names.items()}


@pytest.mark.parametrize("seed", range(3))
def test_metrics_are_trec_evals(task: RetrievalSet, tmp_path: Path, seed: int) -> None:
    queries, shard = whole(seed)
    expected = theirs(queries, shard.vectors[:])
    result = evaluate(task, queries, shard, top_k=12, run_file=tmp_path / "a.run", per_query_file=tmp_path / "a.parquet")
    write_qrels(tmp_path / "qrels.txt", task)
    by_files = score_files(tmp_path / "a.run", tmp_path / "qrels.txt")[0]
    for found in (result, evaluate_run_file(task, tmp_path / "a.run"), by_files):
        assert {name: found["metrics"][name] for name in expected} == pytest.approx(expected, abs=1e-12)
        assert (found["queries"], found["queries_without_relevant"]) == (4, 0)
    assert result["map_matrix"]["values"] == [[pytest.approx(expected["map"])]]
    rows = {row["query"]: row for row in pq.read_table(tmp_path / "a.parquet").to_pylist()}
    assert {name: row["relevant"] for name, row in rows.items()} == {"q0": 3, "q1": 1, "q2": 2, "q3": 1}
    assert rows["q1"]["ndcg@10"] == rows["q1"]["map"] == rows["q1"]["recall@100"] == 0.0
    assert rows["q0"]["recall@100"] == pytest.approx(1 / 3)


def test_written_judgments_are_the_published_ones(task: RetrievalSet, tmp_path: Path) -> None:
    write_qrels(tmp_path / "qrels.txt", task)
    lines = read_qrels(tmp_path / "qrels.txt")
    read: dict[str, dict[str, int]] = {}
    for query, passage, grade in zip(lines.query, lines.passage, lines.value, strict=True):
        read.setdefault(lines.query_ids[query], {})[lines.passage_ids[passage]] = int(grade)
    assert read == GRADES


def test_several_languages_count_them_in_the_union_alone(tmp_path: Path) -> None:
    """A passage that isn't there has no language, so no language pool holds it."""
    task = made(tmp_path / "two", ["en", "de"] * 6)
    queries, shard = whole()
    result = evaluate(task, queries, shard, per_query_file=tmp_path / "a.parquet")
    assert result["metrics"]["map"] == pytest.approx(theirs(queries, shard.vectors[:])["map"])
    rows = pq.read_table(tmp_path / "a.parquet").to_pylist()
    assert {(row["query"], row["pool"], row["relevant"]) for row in rows} == {
        *(("q0", "union", 3), ("q1", "union", 1), ("q2", "union", 2), ("q3", "union", 1)),
        *(("q0", "en", 1), ("q2", "en", 1), ("q2", "de", 1), ("q3", "de", 1)),
    }
    assert "3 relevant passages are not in the ranking" in result["refused"]["rank_distance"]
    assert result["skipped_pairs"] == 4  # of 4 queries x 2 languages; q1's one passage is in neither


def test_bm25_counts_them(task: RetrievalSet, tmp_path: Path) -> None:
    """Each query's own words rank its passages first, so by hand: q0 finds 1 of grades 1, 2, 1; q1 nothing."""
    found = bm25(task, tmp_path / "bm25.parquet")
    rows = {row["query"]: row for row in pq.read_table(tmp_path / "bm25.parquet").to_pylist()}
    assert rows["q1"]["ndcg@10"] == 0.0
    rank = next(rank for rank in range(1, 4) if rows["q0"]["mrr@10"] == pytest.approx(1 / rank))
    ideal = 2 + 1 / math.log2(3) + 1 / math.log2(4)
    assert rows["q0"]["ndcg@10"] == pytest.approx(1 / math.log2(1 + rank) / ideal)
    assert rows["q0"]["map"] == pytest.approx(1 / rank / 3)
    assert found["metrics"]["ndcg@10"] == pytest.approx(np.mean([row["ndcg@10"] for row in rows.values()]))


def test_the_index_study_counts_them(task: RetrievalSet) -> None:
    queries, shard = whole()
    bench = tradeoff.set_up(task, queries, shard, tradeoff.Options(k=12))
    expected = theirs(queries, shard.vectors[:])
    assert float(np.mean(bench.exact["ndcg@10"])) == pytest.approx(expected["ndcg@10"])
    assert float(np.mean(bench.exact["map@12"])) == pytest.approx(expected["map"])

"""Every measure of single queries against pytrec_eval, ir_measures and loops, to 1e-12, over shards and ranks; PEER; own ids.

Vectors are small integers: many passages tie, and copies of one passage lie in several shards.
"""

import math
from pathlib import Path
from typing import Any

import ir_measures
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import pytrec_eval
from hypothesis import given, settings
from hypothesis import strategies as st
from ir_measures import RR
from scipy.stats import chi2

from hybrid_scale import dist
from hybrid_scale.data.prepared import RetrievalSet
from hybrid_scale.data.records import Judgment, Passage, Query, Record
from hybrid_scale.data.writing import write_retrieval
from hybrid_scale.protocols import ONE_LANGUAGE
from hybrid_scale.retrieval.bias import peer, peer_refusal
from hybrid_scale.retrieval.evaluate import evaluate, judge, languages_of, outcome, own_passages, positive, without
from hybrid_scale.retrieval.index import Shard, count_in_shard, judged_keys, search_shards
from hybrid_scale.retrieval.measures import per_query
from hybrid_scale.retrieval.vectors import open_embeddings
from hybrid_scale.runs import write_json
from tests.ranks import run_ranks
from tests.retrieval.worlds import vectors, write_embeddings, write_task

EXACT = {"rel": 0.0, "abs": 1e-12}
THEIRS = {
    "ndcg@10": "ndcg_cut_10",
    "recall@10": "recall_10",
    "recall@100": "recall_100",
    "map": "map",
    "r@1": "success_1",
}


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> RetrievalSet:
    return write_task(tmp_path_factory.mktemp("oracles") / "many", groups=70)


def heavy(task: RetrievalSet) -> tuple[np.ndarray, np.ndarray]:
    """Vectors of which a third are copies; the last queries score every passage 0."""
    queries, corpus = vectors(task)
    rng = np.random.default_rng(8)
    copies = rng.permutation(len(corpus))[: len(corpus) // 3]
    corpus[copies] = corpus[rng.integers(0, len(corpus), len(copies))]
    queries[-3:] = 0
    return queries, corpus


def runs_and_qrels(task: RetrievalSet, pool: str | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Full rankings of a pool by a plain sort, as pytrec_eval takes them: score = -rank, so that nothing ties there."""
    queries, corpus = heavy(task)
    scores = queries.astype(float) @ corpus.astype(float).T
    ids, names = task.corpus.column("id"), task.queries.column("id")
    inside = [p for p, lang in enumerate(task.corpus.column("lang")) if pool in (None, lang)]
    order = [sorted(inside, key=lambda p, q=q: (-scores[q, p], p)) for q in range(len(queries))]
    run = {names[q]: {ids[p]: -float(rank) for rank, p in enumerate(row, start=1)} for q, row in enumerate(order)}
    qrels: dict[str, dict[str, int]] = {}
    judged = task.qrels if pool is None else positive(task)  # in a language pool a query without a relevant passage is skipped
    for query, passage, grade in judged.tolist():
        if passage in set(inside):
            qrels.setdefault(names[query], {})[ids[passage]] = grade
    return run, qrels


def by_shards(task: RetrievalSet, shards: int, k: int, out: Path) -> dict[str, Any]:
    """The evaluation of passages dealt at random to shards within one process."""
    queries, corpus = heavy(task)
    owner = np.random.default_rng(shards).integers(0, shards, len(corpus))
    parts = [Shard(rows, corpus[rows]) for rows in (np.flatnonzero(owner == s) for s in range(shards))]
    names, language = languages_of(task, task.corpus)
    pairs = positive(task)
    wanted = judged_keys(queries, Shard(np.arange(len(corpus)), corpus), pairs[:, 0], pairs[:, 1])
    above = sum(count_in_shard(queries, part, pairs[:, 0], wanted, language[part.numbers], len(names)) for part in parts)
    assert isinstance(above, np.ndarray)
    scores, numbers = search_shards(queries, parts, k)
    return outcome(task, judge(task, above), scores, numbers, out)


@pytest.fixture(scope="module")
def one(task: RetrievalSet, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], pd.DataFrame]:
    out = tmp_path_factory.mktemp("one") / "one.parquet"
    return by_shards(task, 1, 10, out), pq.read_table(out).to_pandas()


@pytest.mark.parametrize("pool", [None, "de", "sw"])
def test_single_queries_equal_pytrec_eval_and_ir_measures(task: RetrievalSet, one: Any, pool: str | None) -> None:
    run, qrels = runs_and_qrels(task, pool)
    rows = one[1][one[1].pool == (pool or "union")].set_index("query")
    theirs = pytrec_eval.RelevanceEvaluator(qrels, {"ndcg_cut.10", "recall.10,100", "map", "success.1"}).evaluate(run)
    reciprocal = {m.query_id: m.value for m in ir_measures.iter_calc([RR @ 10], qrels, run)}
    assert set(rows.index) == set(theirs) == set(qrels)
    assert (rows.relevant == 0).sum() == (pool is None)  # it counts 0, as there
    for query, values in theirs.items():
        assert rows.relevant[query] == sum(grade > 0 for grade in qrels[query].values())
        for ours, name in THEIRS.items():
            assert rows.loc[query, ours] == pytest.approx(values[name], **EXACT)
        assert rows.loc[query, "mrr@10"] == pytest.approx(reciprocal[query], **EXACT)


def test_the_table_gives_every_average_again(task: RetrievalSet, one: Any) -> None:
    result, rows = one
    union, pools = rows[rows.pool == "union"], rows[rows.pool != "union"]
    own = pools[pools.pool == pools.query_lang]
    other = pools[pools.pool != pools.query_lang]
    again = {name: union[name].mean() for name in ("ndcg@10", "recall@100", "mrr@10", "mrr@100", "map", "r@1")}
    for name in ("map", "r@1"):
        again[f"mono_{name}"] = own.groupby("query_lang")[name].mean().mean()
        again[f"cross_{name}"] = other.groupby(["query_lang", "pool"])[name].mean().mean()
    for name, column in (("multi_map", "map"), ("multi_r@10", "recall@10"), ("rank_distance", "rank_distance")):
        again[name] = union.groupby("query_lang")[column].mean().mean()
    again["rank_distance_normalised"] = again["rank_distance"] / (len(task.corpus) - 1)
    assert result["metrics"] == {name: pytest.approx(value, **EXACT) for name, value in again.items()}
    matrix = result["top1_language_matrix"]
    shares = pd.crosstab(union.query_lang, union.first_lang, normalize="index")
    expected = shares.reindex(index=matrix["query_languages"], columns=matrix["passage_languages"], fill_value=0)
    np.testing.assert_allclose(matrix["values"], expected)
    assert union.set_index("query").group["de:q3"] == "g3"


@pytest.mark.parametrize("shards", [2, 3, 4, 8])
def test_any_number_of_shards_gives_the_same_files(task: RetrievalSet, one: Any, shards: int, tmp_path: Path) -> None:
    assert by_shards(task, shards, 10, tmp_path / "t.parquet") == one[0]
    pd.testing.assert_frame_equal(pq.read_table(tmp_path / "t.parquet").to_pandas(), one[1])


def on_ranks(data: Path, embeddings: Path, out: Path) -> dict[str, Any]:
    dist.start()
    task = RetrievalSet(data)
    _, shard = open_embeddings(embeddings, task)
    queries, corpus = heavy(task)
    return evaluate(task, queries, Shard(shard.numbers, corpus[shard.numbers]), 10, None, out)


def test_any_number_of_ranks_gives_the_same_files(task: RetrievalSet, one: Any, tmp_path: Path) -> None:
    write_embeddings(tmp_path / "vectors", task)  # who holds which rows
    for world in (2, 4):
        out = tmp_path / f"{world}.parquet"
        assert run_ranks(on_ranks, world, task.directory, tmp_path / "vectors", out) == [one[0]] * world
        pd.testing.assert_frame_equal(pq.read_table(out).to_pandas(), one[1])


# ------------------------------------------------------------------------------------------------------------------ PEER


def peer_by_hand(query: np.ndarray, rank: np.ndarray, language: np.ndarray, grade: np.ndarray, wanted: int) -> float:
    """The mean over relevance levels of the chi-squared tail of Kruskal and Wallis' H on ranks, by loops."""
    values = []
    for level in sorted(set(grade[query == wanted])):
        here = (query == wanted) & (grade == level)
        groups = [rank[here & (language == code)].astype(float) for code in sorted(set(language[here]))]
        ranks = np.concatenate(groups)
        if len(groups) > 1 and len(ranks) > len(groups):
            between = sum(len(g) * (g.mean() - ranks.mean()) ** 2 for g in groups)
            h = (len(ranks) - 1) * between / ((ranks - ranks.mean()) ** 2).sum()
            values.append(chi2.sf(h, len(groups) - 1))
    return float(np.mean(values)) if values else math.nan


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 60))
def test_peer_equals_a_loop(seed: int, pairs: int) -> None:
    rng = np.random.default_rng(seed)
    query, language, grade = rng.integers(0, 4, pairs), rng.integers(0, 3, pairs), rng.integers(1, 3, pairs)
    rank = rng.permutation(500)[:pairs] + 1
    values = peer(query, rank, language, 5, grade)
    for wanted in range(5):
        assert values[wanted] == pytest.approx(peer_by_hand(query, rank, language, grade, wanted), nan_ok=True, **EXACT)


def test_peer_by_hand_and_its_refusal() -> None:
    """Ranks 1 2 against 3 4: mean 2.5, groups 1.5 and 3.5; H = 3 * (2 + 2) / 5 = 2.4."""
    query, rank, language = np.zeros(4, int), np.array([1, 2, 3, 4]), np.array([0, 0, 1, 1])
    assert peer(query, rank, language, 1, np.ones(4))[0] == pytest.approx(chi2.sf(2.4, 1))
    assert peer_refusal(query, language, np.ones(4)) is None
    eleven = np.zeros(11, int), np.arange(11)
    refusal = peer_refusal(*eleven, np.ones(11))
    assert refusal is not None
    assert "constant" in refusal
    assert np.isnan(peer(eleven[0], np.random.default_rng(0).permutation(11) + 1, eleven[1], 1, np.ones(11))).all()
    assert chi2.sf(10, 10) == pytest.approx(0.4405, abs=5e-5)  # what it would always be there


def test_peer_is_refused_or_given_by_the_pool(task: RetrievalSet, one: Any, tmp_path: Path) -> None:
    assert "constant" in one[0]["refused"]["peer"]
    assert "peer" not in one[0]["metrics"]
    assert "peer" not in one[1].columns
    records: list[Record] = [Passage("t", f"{lang}{n}", lang, f"{lang}{n}") for lang in ("en", "de") for n in range(6)]
    records += [Query("t", "q0", "en", "one", "g0"), Query("t", "q1", "de", "two", "g1")]
    records += [Judgment("t", q, f"{lang}{n}", 1) for q in ("q0", "q1") for lang in ("en", "de") for n in (0, 3, 4)]
    write_retrieval(records, tmp_path / "set", {"name": "test"})
    pool = RetrievalSet(tmp_path / "set")
    draw = np.random.default_rng(0).standard_normal
    queries, corpus = draw((2, 4)).astype(np.float32), draw((12, 4)).astype(np.float32)
    result = evaluate(pool, queries, Shard(np.arange(12), corpus), 5, None, tmp_path / "t.parquet")
    assert result["refused"] == {}
    order = np.argsort(-(queries.astype(float) @ corpus.T), axis=1)
    rank = np.argsort(order, axis=1) + 1
    pairs = positive(pool)
    language = pairs[:, 1] // 6
    expected = [peer_by_hand(pairs[:, 0], rank[pairs[:, 0], pairs[:, 1]], language, np.ones(12), q) for q in (0, 1)]
    assert result["metrics"]["peer"] == pytest.approx(np.mean(expected))
    table = pq.read_table(tmp_path / "t.parquet").to_pandas()
    assert table[table.pool == "union"].peer.tolist() == pytest.approx(expected)


# --------------------------------------------------------------------------------------------------------------- own ids


def test_own_ids_are_dropped_as_beir_does(tmp_path: Path) -> None:
    """Queries a, c and z: a and c are also passages; a is its own relevant passage, which then can't be found."""
    records: list[Record] = [Passage("t", name, "en", name) for name in "abcdefgh"]
    records += [Query("t", name, "en", f"{name}?", name) for name in "acz"]
    records += [Judgment("t", "a", "a", 1), Judgment("t", "a", "d", 2), Judgment("t", "c", "b", 1), Judgment("t", "z", "c", 1)]
    manifest = write_retrieval(records, tmp_path / "set", {"name": "test"})
    write_json(tmp_path / "set" / "manifest.json", {**manifest, "drop_own_id": True})
    task = RetrievalSet(tmp_path / "set")
    assert own_passages(task).tolist() == [0, 2, -1]
    queries, corpus = np.random.default_rng(1).standard_normal((2, 8, 3)).astype(np.float32)
    queries = corpus[[0, 2, 4]] + 0.1 * queries[:3]  # own passages come first
    scores = queries.astype(float) @ corpus.T.astype(float)
    names = task.corpus.column("id")
    run = {q: {p: float(s) for p, s in zip(names, row, strict=True) if p != q} for q, row in zip("acz", scores, strict=True)}
    qrels = {"a": {"a": 1, "d": 2}, "c": {"b": 1}, "z": {"c": 1}}
    theirs = pytrec_eval.RelevanceEvaluator(qrels, {"ndcg_cut.10", "map", "recall.100"}).evaluate(run)
    shard = Shard(np.arange(8), corpus)
    for k in (3, 8):
        result = evaluate(task, queries, shard, k, tmp_path / "t.run")
        for ours, name in (("ndcg@10", "ndcg_cut_10"), ("map", "map"), ("recall@100", "recall_100")):
            assert result["metrics"][ours] == pytest.approx(np.mean([v[name] for v in theirs.values()]), **EXACT)
        assert result["own_ids_dropped"] == 2
        lines = [line.split() for line in (tmp_path / "t.run").read_text().splitlines()]
        assert all(query != passage for query, _, passage, *_ in lines)
        assert [sum(line[0] == q for line in lines) for q in "acz"] == [min(k, 7), min(k, 7), k]
    kept = evaluate(task, queries, shard, 3, drop_own_id=False)
    assert "own_ids_dropped" not in kept
    assert kept["metrics"]["recall@100"] == 1.0


def test_results_without_own_passages() -> None:
    numbers = np.array([[4, 2, 7], [1, 5, 3]])
    scores = np.array([[9.0, 8.0, 7.0], [6.0, 5.0, 4.0]], np.float32)
    left, places = without(scores, numbers, np.array([2, -1]), 2)
    assert places.tolist() == [[4, 7], [1, 5]]
    assert left.tolist() == [[9, 7], [6, 5]]
    left, places = without(scores, numbers, np.array([7, 0]), 3)
    assert places.tolist() == [[4, 2, -1], [1, 5, 3]]
    assert left[0, 2] == -np.inf


def test_per_query_of_a_set_without_multilingual_pools(tmp_path: Path) -> None:
    task = write_task(tmp_path / "mono", languages=("en",))
    queries = len(task.queries)
    above = np.zeros((len(positive(task)), 1), np.int64)
    table = per_query(judge(task, above), task.queries.column("id"), task.queries.column("group"), None, ONE_LANGUAGE)
    assert set(table.column("pool").to_pylist()) == {"union"}
    assert table.num_rows == queries
    assert table.column("rank_distance").null_count == queries

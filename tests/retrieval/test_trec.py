"""TREC files: what we write is read again, foreign runs score as trec_eval scores them, bad lines are named."""

import gzip
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import pytrec_eval

from hybrid_scale.data.prepared import RetrievalSet
from hybrid_scale.data.records import Judgment, Passage, Query, Record
from hybrid_scale.data.writing import write_retrieval
from hybrid_scale.errors import DataError
from hybrid_scale.retrieval.evaluate import evaluate, evaluate_run_file
from hybrid_scale.retrieval.index import Shard
from hybrid_scale.retrieval.trec import check_ids, read_qrels, read_run, score_files, write_qrels
from launch.evaluate import main
from tests.retrieval.worlds import vectors, write_task

THEIRS = {"ndcg@10": "ndcg_cut_10", "recall@100": "recall_100", "map": "map", "r@1": "success_1"}


@pytest.fixture
def task(tmp_path: Path) -> RetrievalSet:
    return write_task(tmp_path / "little")


def evaluated(task: RetrievalSet, run: Path, k: int) -> dict[str, object]:
    queries, corpus = vectors(task)
    return evaluate(task, queries, Shard(np.arange(len(corpus)), corpus), k, run)


def test_a_whole_run_read_again_gives_every_number(task: RetrievalSet, tmp_path: Path) -> None:
    result = evaluated(task, tmp_path / "all.run", len(task.corpus))
    again = evaluate_run_file(task, tmp_path / "all.run", "rank", tmp_path / "t.parquet")
    for key in ("metrics", "by_language", "map_matrix", "queries", "fingerprint", "refused"):
        assert again[key] == result[key]
    assert (again["run"], again["queries_without_results"]) == ("all.run", 0)
    assert pq.read_table(tmp_path / "t.parquet").num_rows > len(task.queries)


def test_a_cut_run_finds_less_and_gives_no_rank_distance(task: RetrievalSet, tmp_path: Path) -> None:
    full = evaluated(task, tmp_path / "cut.run", 10)["metrics"]
    cut = evaluate_run_file(task, tmp_path / "cut.run", "rank")
    assert isinstance(full, dict)
    assert cut["metrics"]["ndcg@10"] == full["ndcg@10"]
    assert cut["metrics"]["mrr@10"] == full["mrr@10"]
    assert cut["metrics"]["multi_r@10"] == full["multi_r@10"]
    assert cut["metrics"]["map"] < full["map"]
    assert cut["metrics"]["rank_distance"] is None
    assert "needs the whole ranking: " in cut["refused"]["rank_distance"]


def foreign(task: RetrievalSet, path: Path) -> dict[str, dict[str, float]]:
    """A run with crowded scores, lines in no order, and without two of the queries."""
    rng = np.random.default_rng(6)
    ids, run = task.corpus.column("id"), {}
    for query in task.queries.column("id")[:-2]:
        chosen = rng.permutation(len(ids))[:20]
        run[query] = {ids[p]: float(s) for p, s in zip(chosen, rng.integers(0, 4, 20) + 1e-9 * rng.random(20), strict=True)}
    lines = [f"{q}\tQ0  {p} {rng.integers(99)} {score!r} them\n" for q, row in run.items() for p, score in row.items()]
    path.write_text("".join(lines[at] for at in rng.permutation(len(lines))))
    return run


def judgments(task: RetrievalSet) -> dict[str, dict[str, int]]:
    queries, passages = task.queries.column("id"), task.corpus.column("id")
    qrels: dict[str, dict[str, int]] = {}
    for query, passage, grade in task.qrels.tolist():
        qrels.setdefault(queries[query], {})[passages[passage]] = grade
    return qrels


def test_a_foreign_run_scores_as_trec_eval_does(task: RetrievalSet, tmp_path: Path) -> None:
    """Scores equal as float32 tie, and the higher id comes first; queries that the run lacks count 0."""
    run, qrels = foreign(task, tmp_path / "their.run"), judgments(task)
    theirs = pytrec_eval.RelevanceEvaluator(qrels, {"ndcg_cut.10", "recall.100", "map", "success.1"}).evaluate(run)
    relevant = [query for query, row in qrels.items() if any(grade > 0 for grade in row.values())]
    assert len(set(relevant) - set(run)) == 1
    write_qrels(tmp_path / "q.txt", task)
    results = {
        "prepared": evaluate_run_file(task, tmp_path / "their.run"),
        "qrels": score_files(tmp_path / "their.run", tmp_path / "q.txt")[0],
    }
    for ours, name in THEIRS.items():
        expected = sum(theirs[q][name] for q in relevant if q in theirs) / len(relevant)
        for result in results.values():
            assert result["metrics"][ours] == pytest.approx(expected, rel=0, abs=1e-12)
    assert results["qrels"]["queries_without_results"] == results["prepared"]["queries_without_results"] == 2


def test_qrels_come_back(task: RetrievalSet, tmp_path: Path) -> None:
    write_qrels(tmp_path / "q.txt", task)
    lines = read_qrels(tmp_path / "q.txt")
    read = {}
    for query, passage, grade in zip(lines.query, lines.passage, lines.value, strict=True):
        read.setdefault(lines.query_ids[query], {})[lines.passage_ids[passage]] = int(grade)
    assert read == judgments(task)


def test_gzip_and_order_by_rank(tmp_path: Path) -> None:
    with gzip.open(tmp_path / "a.run.gz", "wt") as file:
        file.write("q Q0 b 2 0.5 x\nq Q0 c 3 0.5 x\nq Q0 a 1 0.5 x\n")
    by_rank, by_score = (read_run(tmp_path / "a.run.gz", order) for order in ("rank", "score"))  # type: ignore[arg-type]
    assert [by_rank.passage_ids[p] for p in by_rank.passage] == ["a", "b", "c"]
    assert [by_score.passage_ids[p] for p in by_score.passage] == ["c", "b", "a"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("en:q0 Q0 en:p0 1 0.5\n", r"x\.run:1: found .*; a line reads QUERY Q0 PASSAGE RANK SCORE TAG"),
        ("en:q0 Q0 en:p0 1 high t\n", r"x\.run:1: found 'high'; not a finite number"),
        ("en:q0 Q0 en:p0 1 0.5 t\n\nen:q0 Q0 en:p1 2 nan t\n", r"x\.run:3: found 'nan'"),
        ("en:q0 Q0 en:p0 1 0.5 t\nen:q0 Q0 en:p0 2 0.4 t\n", "found 'en:q0 en:p0'; this query has this passage twice"),
        ("\n", r"x\.run: found 'no line'; a run holds results"),
        ("alien Q0 en:p0 1 0.5 t\n", "queries: found 'alien'; 1 ids that 'little' doesn't hold"),
        ("en:q0 Q0 alien 1 0.5 t\n", "passages: found 'alien'; 1 ids that 'little' doesn't hold"),
    ],
)
def test_what_is_wrong_with_a_run_is_named(task: RetrievalSet, tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "x.run").write_text(text)
    with pytest.raises(DataError, match=message):
        evaluate_run_file(task, tmp_path / "x.run")


def test_qrels_of_another_set_and_judged_twice_are_refused(task: RetrievalSet, tmp_path: Path) -> None:
    (tmp_path / "x.run").write_text("en:q0 Q0 en:p0 1 0.5 t\n")
    (tmp_path / "q.txt").write_text("other 0 en:p0 1\n")
    with pytest.raises(DataError, match=r"found 'en:q0'; none of them is judged in .*q\.txt"):
        score_files(tmp_path / "x.run", tmp_path / "q.txt")
    (tmp_path / "q.txt").write_text("en:q0 0 en:p0 1\nen:q0 0 en:p0 0\n")
    with pytest.raises(DataError, match="this query has this passage twice"):
        score_files(tmp_path / "x.run", tmp_path / "q.txt")
    (tmp_path / "q.txt").write_text("en:q0 0 en:p0 0\n")
    with pytest.raises(DataError, match=r"q\.txt: found '1 judgments'; one above 0 is needed"):
        score_files(tmp_path / "x.run", tmp_path / "q.txt")
    (tmp_path / "q.txt").write_text("en:q0 0 en:p0 1\nen:q0 0 en:p1 1.5\n")
    with pytest.raises(DataError, match=r"q\.txt:2: found '1\.5'; a grade is a whole number"):
        score_files(tmp_path / "x.run", tmp_path / "q.txt")
    (tmp_path / "q.txt").write_text("en:q0 en:p0 1\n")
    with pytest.raises(DataError, match="a line reads QUERY 0 PASSAGE GRADE"):
        score_files(tmp_path / "x.run", tmp_path / "q.txt")


def test_the_door_scores_runs_with_and_without_a_set(
    task: RetrievalSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    foreign(task, run := tmp_path / "their.run")
    qrels, out = tmp_path / "q.txt", tmp_path / "out.json"
    assert main([str(task.directory), "--run-in", str(run), "--out", str(out), "--qrels-out", str(qrels)]) == 0
    with_set = json.loads(out.read_text())
    assert main(["--run-in", str(run), "--qrels", str(qrels), "--out", str(out)]) == 0
    without_set = json.loads(out.read_text())
    assert all(without_set["metrics"][name] == with_set["metrics"][name] for name in without_set["metrics"])
    assert pq.read_table(tmp_path / "out.parquet").num_rows == len(task.queries)
    assert "their.run: 18 queries" in capsys.readouterr().out
    for wrong in (["--run-in", str(run)], [str(task.directory), "--run-in", str(run), "--qrels", str(qrels)]):
        with pytest.raises(SystemExit):
            main([*wrong, "--out", str(out)])


def test_a_querys_own_passage_leaves_a_run_by_the_sets_rule(tmp_path: Path) -> None:
    """BEIR's rule holds for results of other systems too: q's own passage is at rank 1, the relevant one then at rank 1."""
    records: list[Record] = [Passage("t", name, "en", f"text {name}") for name in ("q", "a", "b")]
    records += [Query("t", "q", "en", "text q", "q"), Judgment("t", "q", "a", 1)]
    write_retrieval(records, tmp_path / "set", {"name": "test"})
    (tmp_path / "x.run").write_text("q Q0 q 1 0.9 t\nq Q0 a 2 0.8 t\nq Q0 b 3 0.7 t\n")
    (tmp_path / "q.txt").write_text("q 0 a 1\n")
    plain = evaluate_run_file(RetrievalSet(tmp_path / "set"), tmp_path / "x.run")
    assert (plain["metrics"]["map"], "own_ids_dropped" in plain) == (0.5, False)
    manifest = json.loads((tmp_path / "set" / "manifest.json").read_text())
    (tmp_path / "set" / "manifest.json").write_text(json.dumps({**manifest, "drop_own_id": True}))
    dropped = evaluate_run_file(RetrievalSet(tmp_path / "set"), tmp_path / "x.run")
    assert (dropped["metrics"]["map"], dropped["own_ids_dropped"]) == (1.0, 1)
    assert score_files(tmp_path / "x.run", tmp_path / "q.txt")[0]["metrics"]["map"] == 0.5
    assert score_files(tmp_path / "x.run", tmp_path / "q.txt", drop_own_id=True)[0]["metrics"]["map"] == 1.0


def test_ids_with_white_space_can_not_go_to_trec_files(tmp_path: Path) -> None:
    records: list[Record] = [Passage("t", "a b", "en", "text"), Query("t", "q", "en", "text", "q"), Judgment("t", "q", "a b", 1)]
    write_retrieval(records, tmp_path / "set", {"name": "test"})
    with pytest.raises(DataError, match="set: passage id: found 'a b'; 1 ids hold white space"):
        check_ids(RetrievalSet(tmp_path / "set"))

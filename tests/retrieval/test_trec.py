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
        expected = sum(values[name] for values in theirs.values()) / len(qrels)
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
    with pytest.raises(DataError, match="set: passage id: found 'a b'; 1 ids that TREC files can't hold"):
        check_ids(RetrievalSet(tmp_path / "set"))


ODD_IDS = ("IPCC\u00a0report", "5830#0", "a\u3000b", "a\u2028b", "a\u0085b", "a\x1cb", "Ärger", "#1")
"""White space of Unicode, separators of lines and a comment's sign inside ids: for trec_eval, which is C, they're letters."""


def test_ids_come_back_and_score_as_in_trec_eval(tmp_path: Path) -> None:
    """Passages from best to worst; queries n judge passage n. MAP by hand: the mean of 1 / (n + 1)."""
    queries = [f"q{name}" for name in ODD_IDS]
    records: list[Record] = [
        *(Passage("t", name, "en", f"text {name}") for name in ODD_IDS),
        *(Query("t", name, "en", "text", name) for name in queries),
        *(Judgment("t", name, ODD_IDS[n], 1) for n, name in enumerate(queries)),
    ]
    write_retrieval(records, tmp_path / "set", {"name": "test"})
    task = RetrievalSet(tmp_path / "set")
    check_ids(task)
    vectors = np.linspace(1, 0.5, len(ODD_IDS), dtype=np.float32)[:, None]
    shard = Shard(np.arange(len(ODD_IDS)), vectors)
    result = evaluate(task, np.ones((len(ODD_IDS), 1), np.float32), shard, 10, tmp_path / "a.run")
    write_qrels(tmp_path / "a.qrels", task)
    by_hand = sum(1 / (n + 1) for n in range(len(ODD_IDS))) / len(ODD_IDS)
    again = score_files(tmp_path / "a.run", tmp_path / "a.qrels")[0]
    for found in (result, again, evaluate_run_file(task, tmp_path / "a.run")):
        assert found["metrics"]["map"] == pytest.approx(by_hand, abs=1e-12)
    assert sorted(read_run(tmp_path / "a.run").passage_ids) == sorted(ODD_IDS)


def test_a_query_id_that_would_be_a_comment_is_refused(tmp_path: Path) -> None:
    records: list[Record] = [Passage("t", "#p", "en", "x"), Query("t", "#q", "en", "x", "q"), Judgment("t", "#q", "#p", 1)]
    write_retrieval(records, tmp_path / "set", {"name": "test"})
    with pytest.raises(DataError, match="set: query id: found '#q'; 1 ids that TREC files can't hold"):
        check_ids(RetrievalSet(tmp_path / "set"))


def test_comments_and_more_columns_are_read_as_trec_eval_reads_them(tmp_path: Path) -> None:
    """`#` begins a comment at the start of a line alone; what follows the tag of a run is ignored."""
    (tmp_path / "a.run").write_text("# made by hand\nq Q0 d#1 1 2.0 tag and more\n  # indented\n\nq\tQ0\td2\v2\f1.0 tag\r\n")
    (tmp_path / "a.qrels").write_text("# judged twice\nq 0 d#1 0\n# q 0 d#1 1\nq 0 d2 1\n")
    assert read_run(tmp_path / "a.run").passage_ids == ["d#1", "d2"]
    assert score_files(tmp_path / "a.run", tmp_path / "a.qrels")[0]["metrics"]["map"] == 0.5
    (tmp_path / "a.qrels").write_text("q 0 d#1 0 more\n")
    with pytest.raises(DataError, match=r"a\.qrels:1: found 'q 0 d#1 0 more'; a line reads QUERY 0 PASSAGE GRADE"):
        read_qrels(tmp_path / "a.qrels")


def test_topics_without_a_relevant_passage_count_zero(tmp_path: Path) -> None:
    """Means as `trec_eval -c`: over all topics of the qrels. a: 1; b: nothing relevant; c: not in the run; d: 1 / 2."""
    (tmp_path / "x.run").write_text("a Q0 p 1 2 t\nb Q0 p 1 2 t\nd Q0 o 1 2 t\nd Q0 p 2 1 t\ne Q0 p 1 2 t\n")
    (tmp_path / "x.qrels").write_text("a 0 p 1\nb 0 p 0\nb 0 o -1\nc 0 p 1\nd 0 p 2\n")
    found, table = score_files(tmp_path / "x.run", tmp_path / "x.qrels")
    assert found["metrics"]["map"] == found["metrics"]["mrr@10"] == pytest.approx(1.5 / 4, abs=1e-15)
    assert found["metrics"]["r@1"] == 0.25
    counts = ("queries", "queries_without_relevant", "queries_without_results", "queries_without_judgment")
    assert [found[key] for key in counts] == [4, 1, 1, 1]
    assert dict(zip(table["query"].to_pylist(), table["map"].to_pylist(), strict=True)) == {"a": 1, "b": 0, "c": 0, "d": 0.5}


def test_a_prepared_sets_means_leave_out_what_nobody_judged(tmp_path: Path) -> None:
    """Query a finds its passage, b has judgments of 0 alone, c none at all: as trec_eval's mean over the topics a and b."""
    records: list[Record] = [
        *(Passage("t", name, "en", f"text {name}") for name in "po"),
        *(Query("t", name, "en", f"text {name}", name) for name in "abc"),
        *(Judgment("t", "a", "p", 1), Judgment("t", "b", "o", 0)),
    ]
    write_retrieval(records, tmp_path / "set", {"name": "test"})
    task = RetrievalSet(tmp_path / "set")
    shard = Shard(np.arange(2), np.array([[1.0], [0.5]], np.float32))
    found = evaluate(task, np.ones((3, 1), np.float32), shard, per_query_file=tmp_path / "t.parquet")
    assert (found["metrics"]["map"], found["map_matrix"]["values"]) == (0.5, [[0.5]])
    assert (found["queries_without_relevant"], found["queries_without_judgment"]) == (1, 1)
    assert pq.read_table(tmp_path / "t.parquet")["ndcg@10"].to_pylist() == [1.0, 0.0, None]


def miracl(tmp_path: Path, languages: tuple[str, ...]) -> RetrievalSet:
    names = [(lang, name) for lang in languages for name in ("1#0", "2#0")]
    records: list[Record] = [
        *(Passage("t", f"{lang}:{name}", lang, f"text {name} {lang}") for lang, name in names),
        *(Query("t", f"{lang}:7", lang, f"text {lang}", f"{lang}:7") for lang in languages),
        *(Judgment("t", f"{lang}:7", f"{lang}:2#0", 1) for lang in languages),
    ]
    write_retrieval(records, tmp_path / "-".join(languages), {"name": "miracl"})
    return RetrievalSet(tmp_path / "-".join(languages))


def test_ids_are_those_of_the_publisher(tmp_path: Path) -> None:
    """MIRACL's runs and qrels say `7` and `2#0`; a prepared set in one language reads and writes that, and its own form."""
    task = miracl(tmp_path, ("sw",))
    write_qrels(tmp_path / "q.txt", task)
    assert (tmp_path / "q.txt").read_text() == "7 0 2#0 1\n"
    for query, prefix in (("7", ""), ("sw:7", "sw:")):
        (tmp_path / "x.run").write_text("".join(f"{query} Q0 {prefix}{n}#0 {n} {3 - n} t\n" for n in (1, 2)))
        assert evaluate_run_file(task, tmp_path / "x.run")["metrics"]["map"] == 0.5
    several = miracl(tmp_path, ("sw", "te"))
    write_qrels(tmp_path / "several.txt", several)
    assert (tmp_path / "several.txt").read_text() == "sw:7 0 sw:2#0 1\nte:7 0 te:2#0 1\n"
    (tmp_path / "x.run").write_text("7 Q0 1#0 1 1 t\n")
    with pytest.raises(DataError, match=r"queries: found '7'; 1 ids that 'sw-te' doesn't hold. Its ids are such as 'sw:7'\."):
        evaluate_run_file(several, tmp_path / "x.run")

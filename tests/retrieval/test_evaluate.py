"""Evaluation of a small multilingual task against plain loops, pytrec_eval, other numbers of ranks, and as a command."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytrec_eval

from hybrid_scale import dist
from hybrid_scale.data.prepared import RetrievalSet
from hybrid_scale.errors import RunError
from hybrid_scale.retrieval import evaluate as module
from hybrid_scale.retrieval.evaluate import evaluate
from hybrid_scale.retrieval.index import Shard
from hybrid_scale.retrieval.vectors import open_embeddings
from launch.evaluate import main
from tests.ranks import run_ranks
from tests.retrieval.worlds import vectors, write_embeddings, write_task


class Loops:
    """The measures by plain loops over a fully sorted list of each query."""

    def __init__(self, task: RetrievalSet):
        queries, corpus = vectors(task)
        self.query_lang, self.passage_lang = task.queries.column("lang"), task.corpus.column("lang")
        self.languages = task.languages
        self.relevant: dict[int, dict[int, int]] = {}
        for query, passage, grade in task.qrels:
            if grade > 0:
                self.relevant.setdefault(int(query), {})[int(passage)] = int(grade)
        scores = queries @ corpus.astype(np.float32).T  # small integers: exact
        self.ranking = [np.lexsort((np.arange(len(corpus)), -row)).tolist() for row in scores]

    def ranks(self, query: int, pool: str | None = None) -> list[int]:
        """Sorted ranks of the relevant passages in the union, or in a language pool."""
        order = [p for p in self.ranking[query] if pool is None or self.passage_lang[p] == pool]
        return [place for place, p in enumerate(order, start=1) if p in self.relevant.get(query, {})]

    def over(self, lang: str | None, measure: Any, pool: str | None = None, nothing: float | None = None) -> float:
        """Mean of a measure of the ranks over the queries of a language; `nothing` of a query without any, None: left out."""
        chosen = [q for q in range(len(self.ranking)) if lang in (None, self.query_lang[q])]
        values = [measure(ranks) for q in chosen if (ranks := self.ranks(q, pool))]
        values += [nothing for q in chosen if nothing is not None and not self.ranks(q, pool)]
        return float(np.mean(values)) if values else math.nan


def ap(ranks: list[int]) -> float:
    return float(np.mean([place / rank for place, rank in enumerate(ranks, start=1)]))


def first(ranks: list[int]) -> float:
    return float(ranks[0] == 1)


@pytest.fixture
def task(tmp_path: Path) -> RetrievalSet:
    return write_task(tmp_path / "little")


def whole(task: RetrievalSet) -> tuple[np.ndarray, Shard]:
    queries, corpus = vectors(task)
    return queries, Shard(np.arange(len(corpus)), corpus)


def test_multilingual_measures_equal_loops(task: RetrievalSet) -> None:
    result, loops = evaluate(task, *whole(task), top_k=5), Loops(task)
    languages = task.languages
    pairs = [(x, c) for x in languages for c in languages]
    found = result["metrics"]
    for name, measure in (("map", ap), ("r@1", first)):
        cells = {(x, c): loops.over(x, measure, c) for x, c in pairs}
        assert found[f"mono_{name}"] == pytest.approx(np.mean([cells[x, x] for x in languages]))
        assert found[f"cross_{name}"] == pytest.approx(np.mean([cells[x, c] for x, c in pairs if x != c]))
        assert found[name] == pytest.approx(loops.over(None, measure, nothing=0))
        if name == "map":
            expected = [[cells[x, c] for c in languages] for x in languages]
            np.testing.assert_allclose(result["map_matrix"]["values"], expected)
            assert result["by_language"]["cross_map"]["en"] == pytest.approx(np.mean([cells["en", c] for c in ("de", "sw")]))
    ten = lambda ranks: np.mean([rank <= 10 for rank in ranks])  # noqa: E731
    assert found["multi_map"] == pytest.approx(np.mean([loops.over(x, ap, nothing=0) for x in languages]))
    assert found["multi_r@10"] == pytest.approx(np.mean([loops.over(x, ten, nothing=0) for x in languages]))
    distance = np.mean([loops.over(x, np.ptp) for x in languages])
    assert found["rank_distance"] == pytest.approx(distance)
    assert found["rank_distance_normalised"] == pytest.approx(distance / 35)
    assert result["by_language"]["multi_map"] == {x: pytest.approx(loops.over(x, ap, nothing=0)) for x in languages}


def test_union_measures_equal_pytrec_eval(task: RetrievalSet) -> None:
    found, loops = evaluate(task, *whole(task))["metrics"], Loops(task)
    run = {f"{q}": {f"{p}": -float(place) for place, p in enumerate(order)} for q, order in enumerate(loops.ranking)}
    qrels: dict[str, dict[str, int]] = {}
    for query, passage, grade in task.qrels.tolist():
        qrels.setdefault(f"{query}", {})[f"{passage}"] = grade
    theirs = pytrec_eval.RelevanceEvaluator(qrels, {"ndcg_cut.10", "recall.100", "map"}).evaluate(run)
    for ours, name in (("ndcg@10", "ndcg_cut_10"), ("recall@100", "recall_100"), ("map", "map")):
        assert found[ours] == pytest.approx(np.mean([values[name] for values in theirs.values()]))
    assert found["mrr@100"] == pytest.approx(loops.over(None, lambda ranks: 1 / ranks[0] if ranks[0] <= 100 else 0, nothing=0))
    assert found["mrr@10"] == pytest.approx(loops.over(None, lambda ranks: 1 / ranks[0] if ranks[0] <= 10 else 0, nothing=0))


def test_facts_counts_and_matrices(task: RetrievalSet) -> None:
    result = evaluate(task, *whole(task))
    assert (result["task"], result["queries"], result["passages"], result["languages"]) == ("little", 18, 36, ["en", "de", "sw"])
    assert result["fingerprint"] == task.fingerprint
    assert (result["queries_without_relevant"], result["queries_without_judgment"]) == (1, 0)
    assert result["skipped_pairs"] == 3 + 3  # group 0 in sw for each query language, the last query in each
    top = result["top1_language_matrix"]
    assert top["query_languages"] == top["passage_languages"] == ["en", "de", "sw"]
    loops = Loops(task)
    own = [loops.passage_lang[loops.ranking[q][0]] == "en" for q in range(18) if loops.query_lang[q] == "en"]
    assert top["values"][0][0] == pytest.approx(np.mean(own))
    json.dumps(result, allow_nan=False)


def test_one_language_has_no_multilingual_measures(tmp_path: Path) -> None:
    task = write_task(tmp_path / "mono", languages=("en",))
    result = evaluate(task, *whole(task))
    assert list(result["metrics"]) == ["ndcg@10", "recall@100", "mrr@10", "mrr@100", "map", "r@1"]
    assert result["map_matrix"]["values"] == [[pytest.approx(result["metrics"]["map"])]]


def test_a_language_pair_without_judgments_is_null(tmp_path: Path) -> None:
    task = write_task(tmp_path / "one", groups=1)  # group 0 has no passage in sw, the query in sw no judgment
    result = evaluate(task, *whole(task))
    assert result["map_matrix"]["values"][2] == [None, None, None]
    assert [row[2] for row in result["map_matrix"]["values"]] == [None, None, None]
    assert result["by_language"]["mono_map"]["sw"] is None
    assert result["metrics"]["mono_map"] is not None


def test_search_and_counting_that_disagree_are_reported(task: RetrievalSet, monkeypatch: pytest.MonkeyPatch) -> None:
    real = module.search
    monkeypatch.setattr(module, "search", lambda *given: (real(*given)[0], real(*given)[1][:, ::-1]))
    with pytest.raises(RunError, match="search and counting must give them the same rank"):
        evaluate(task, *whole(task), top_k=36)


def evaluated(data: Path, embeddings: Path, run_file: Path) -> dict[str, Any]:
    dist.start()
    task = RetrievalSet(data)
    result = evaluate(task, *open_embeddings(embeddings, task), top_k=7, run_file=run_file)
    dist.stop()
    return result


def test_any_number_of_ranks_gives_the_same(task: RetrievalSet, tmp_path: Path) -> None:
    embeddings = write_embeddings(tmp_path / "vectors", task)
    expected = evaluate(task, *whole(task), top_k=7, run_file=tmp_path / "one.run")
    for world in (2, 4):
        assert run_ranks(evaluated, world, task.directory, embeddings, tmp_path / "many.run") == [expected] * world
        assert (tmp_path / "many.run").read_text() == (tmp_path / "one.run").read_text()
    lines = [line.split() for line in (tmp_path / "one.run").read_text().splitlines()]
    assert len(lines) == 18 * 7
    best = task.corpus.column("id")[Loops(task).ranking[0][0]]
    assert lines[0][:4] == ["en:q0", "Q0", best, "1"]


def test_the_door_writes_json_and_a_summary(task: RetrievalSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    embeddings, out = write_embeddings(tmp_path / "vectors", task), tmp_path / "new" / "out.json"
    assert main([str(task.directory), "--embeddings", str(embeddings), "--out", str(out)]) == 0
    written = json.loads(out.read_text())
    assert written.pop("similarity") == "inner_product"
    assert written.pop("passage_lengths") == pytest.approx([2**0.5, 8**0.5])
    assert written.pop("text_lengths") is None, "nobody knows where given vectors' texts were cut"
    assert written == evaluate(task, *whole(task))
    shown = capsys.readouterr().out
    assert "little: 18 queries, 36 passages, 3 languages" in shown
    assert "mono_map" in shown
    assert "6 skipped pairs" in shown


def test_the_door_reports_errors_and_exits_with_2(task: RetrievalSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(task.directory), "--embeddings", str(tmp_path), "--out", str(tmp_path / "out.json")]) == 2
    assert "queries.npy: found 'no such file'" in capsys.readouterr().err

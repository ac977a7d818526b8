"""Each set is scored by its benchmark's protocol: worked by hand, against ir_measures, and in the tables that studies read."""

import json
import math
from pathlib import Path
from typing import Any

import ir_measures
import numpy as np
import pytest
from ir_measures import RR, R, nDCG

from hybrid_scale import protocols
from hybrid_scale.data.prepared import RetrievalSet
from hybrid_scale.data.records import Judgment, Passage, Query, Record
from hybrid_scale.data.sources import domains
from hybrid_scale.data.writing import write_retrieval
from hybrid_scale.protocols import BEIR, LAREQA, MIRACL, MR_TYDI, OWN_LANGUAGE, PROTOCOLS, protocol_of
from hybrid_scale.retrieval.baselines.run import bm25
from hybrid_scale.retrieval.evaluate import evaluate, evaluate_run_file, protocol
from hybrid_scale.retrieval.index import Shard
from hybrid_scale.study.results.queries import contradiction, macro_mean, read_queries

EXACT: dict[str, Any] = {"rel": 0, "abs": 1e-12}
LOG3, LOG6 = math.log2(3), math.log2(6)


def write_set(folder: Path, records: list[Record], evaluation: str | None) -> RetrievalSet:
    write_retrieval(records, folder, {"name": "test", "evaluation": evaluation})
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "evaluation": evaluation}))
    return RetrievalSet(folder)


def two_languages(folder: Path, evaluation: str | None) -> tuple[RetrievalSet, np.ndarray, Shard]:
    """Two English questions, one in Swahili. A coordinate of a passage is its score for that question."""
    scores = {"en:a": (4, 3, 8), "en:b": (3, 2, 1), "en:c": (1, 4, 2), "sw:x": (5, 5, 9), "sw:y": (2, 6, 7)}
    relevant = {"en:0": ("en:a",), "en:1": ("en:b", "en:c"), "sw:2": ("sw:y",)}
    records: list[Record] = [Passage("t", name, name[:2], f"text {name}") for name in scores]
    records += [Query("t", name, name[:2], f"question {name}", name) for name in relevant]
    records += [Judgment("t", query, passage, 1) for query, passages in relevant.items() for passage in passages]
    task = write_set(folder, records, evaluation)
    corpus = np.array([scores[name] for name in task.corpus.column("id")], np.float32)
    queries = np.eye(3, dtype=np.float32)[[int(name[3:]) for name in task.queries.column("id")]]
    return task, queries, Shard(np.arange(5), corpus)


def test_miracl_in_two_languages_by_hand(tmp_path: Path) -> None:
    """Own corpus: a is 1st; c 1st and b 3rd; y 2nd. In the union: a 2nd; c 3rd and b 5th; y 3rd."""
    task, queries, shard = two_languages(tmp_path / "miracl", "miracl")
    result = evaluate(task, queries, shard, per_query_file=tmp_path / "t.parquet")
    english = (1 + (1 + 1 / 2) / (1 + 1 / LOG3)) / 2
    swahili = 1 / LOG3
    assert result["by_language"]["ndcg@10"] == {"en": pytest.approx(english, **EXACT), "sw": pytest.approx(swahili, **EXACT)}
    assert result["metrics"]["ndcg@10"] == pytest.approx((english + swahili) / 2, **EXACT)
    assert result["metrics"]["ndcg@10_median"] == pytest.approx((english + swahili) / 2, **EXACT)
    assert result["metrics"]["mrr@10"] == pytest.approx((1 + 1 / 2) / 2, **EXACT)
    assert result["metrics"]["recall@100"] == 1.0
    union = (1 / LOG3 + (1 / 2 + 1 / LOG6) / (1 + 1 / LOG3) + 1 / 2) / 3
    assert result["union"]["metrics"]["ndcg@10"] == pytest.approx(union, **EXACT)
    assert "not the set's protocol" in result["union"]["what"]
    assert result["protocol"] == MIRACL.facts()
    assert result["evaluation"] == "miracl"
    assert not {"mono_map", "cross_map", "multi_map", "rank_distance"} & set(result["metrics"])
    assert "skipped_pairs" not in result
    single = read_queries(tmp_path / "t.parquet")
    values = single.values("ndcg@10")
    assert values is not None
    assert sorted(zip(values["query"], values["pool"], strict=True)) == [("en:0", "en"), ("en:1", "en"), ("sw:2", "sw")]
    assert contradiction(result, single, "x.json") is None
    wrong = {**result, "metrics": {**result["metrics"], "ndcg@10": union}}
    assert "a file was changed" in str(contradiction(wrong, single, "x.json"))


def test_the_same_set_as_one_of_beir_or_unknown(tmp_path: Path) -> None:
    """The table decides: over queries in the union for a set of BEIR; unknown, by its judgments, as MIRACL."""
    beir = evaluate(*two_languages(tmp_path / "beir", "beir/scifact"))
    union = (1 / LOG3 + (1 / 2 + 1 / LOG6) / (1 + 1 / LOG3) + 1 / 2) / 3
    assert beir["metrics"]["ndcg@10"] == pytest.approx(union, **EXACT)
    assert (beir["protocol"]["name"], "union" in beir, "mono_map" in beir["metrics"]) == ("beir", False, False)
    unknown = evaluate(*two_languages(tmp_path / "unknown", None))
    assert unknown["protocol"] == OWN_LANGUAGE.facts()
    assert "as MIRACL" in unknown["protocol"]["source"]
    assert unknown["metrics"] == evaluate(*two_languages(tmp_path / "miracl", "miracl"))["metrics"]


def many(folder: Path, languages: tuple[str, ...] = ("ar", "bn", "fi", "te", "zh")) -> tuple[RetrievalSet, np.ndarray, Shard]:
    """Questions and corpora of unequal size in five languages, graded 0 and 1 as MIRACL's; scores that tie.

    Nothing that was judged answers the second question of a language: it counts 0.
    """
    chance = np.random.default_rng(11)
    records: list[Record] = []
    for number, lang in enumerate(languages):
        passages = [f"{lang}:p{n}" for n in range(40 + 35 * number)]
        records += [Passage("t", name, lang, f"text {name}") for name in passages]
        for n in range(3 + 4 * number):
            records.append(Query("t", f"{lang}:q{n}", lang, f"question {lang} {n}", f"{lang}:q{n}"))
            judged = chance.permutation(passages)[: 2 + n % 9]
            records += [Judgment("t", f"{lang}:q{n}", str(name), int(at % 3 == 0 and n != 1)) for at, name in enumerate(judged)]
    chance.shuffle(records)
    records.sort(key=lambda record: isinstance(record, Judgment))
    task = write_set(folder, records, "mr_tydi")
    queries = chance.integers(-2, 3, (len(task.queries), 4)).astype(np.float32)
    corpus = chance.integers(-2, 3, (len(task.corpus), 4)).astype(np.float16)
    return task, queries, Shard(np.arange(len(corpus)), corpus)


def by_ir_measures(task: RetrievalSet, queries: np.ndarray, corpus: np.ndarray, lang: str) -> dict[str, float]:
    """The means of one language by another library, from a plain sort of that language's corpus."""
    names, ids = task.queries.column("id"), task.corpus.column("id")
    inside = [p for p, of in enumerate(task.corpus.column("lang")) if of == lang]
    scores = queries.astype(float) @ corpus.astype(float).T
    run: dict[str, dict[str, float]] = {}
    for q, of in enumerate(task.queries.column("lang")):
        if of == lang:
            order = sorted(inside, key=lambda p, q=q: (-scores[q, p], p))
            run[names[q]] = {ids[p]: -float(rank) for rank, p in enumerate(order, start=1)}
    qrels: dict[str, dict[str, int]] = {}
    for query, passage, grade in task.qrels.tolist():
        if names[query] in run:
            qrels.setdefault(names[query], {})[ids[passage]] = grade
    found = ir_measures.calc_aggregate([nDCG @ 10, R @ 100, RR @ 100], qrels, run)
    return {"ndcg@10": found[nDCG @ 10], "recall@100": found[R @ 100], "mrr@100": found[RR @ 100]}


def test_own_language_equals_ir_measures_language_by_language(tmp_path: Path) -> None:
    task, queries, shard = many(tmp_path / "mr_tydi")
    result = evaluate(task, queries, shard, per_query_file=tmp_path / "t.parquet")
    assert isinstance(shard.vectors, np.ndarray)
    theirs = {lang: by_ir_measures(task, queries, shard.vectors, lang) for lang in task.languages}
    for metric in ("ndcg@10", "recall@100", "mrr@100"):
        for lang, values in theirs.items():
            assert result["by_language"][metric][lang] == pytest.approx(values[metric], **EXACT)
        assert result["metrics"][metric] == pytest.approx(np.mean([v[metric] for v in theirs.values()]), **EXACT)
        single = read_queries(tmp_path / "t.parquet").values(metric)
        assert single is not None
        assert macro_mean(single) == pytest.approx(result["metrics"][metric], **EXACT)
    for metric in ("mrr@100", "recall@100"):
        median = np.median([v[metric] for v in theirs.values()])
        assert result["metrics"][f"{metric}_median"] == pytest.approx(median, **EXACT)
    assert result["protocol"]["headline"][:2] == ["mrr@100", "recall@100"]
    assert result["union"]["metrics"]["mrr@100"] < result["metrics"]["mrr@100"]


def test_a_run_file_holds_the_best_of_each_querys_language(tmp_path: Path) -> None:
    task, queries, shard = many(tmp_path / "mr_tydi")
    result = evaluate(task, queries, shard, top_k=200, run_file=tmp_path / "x.run")
    lines = [line.split() for line in (tmp_path / "x.run").read_text().splitlines()]
    assert all(query[:2] == passage[:2] for query, _, passage, *_ in lines)
    size = {lang: task.corpus.column("lang").count(lang) for lang in task.languages}
    assert len(lines) == sum(min(200, size[lang]) for lang in task.queries.column("lang"))
    again = evaluate_run_file(task, tmp_path / "x.run", "rank")
    for key in ("metrics", "by_language", "protocol"):
        assert again[key] == result[key]


def test_bm25_counts_words_of_the_querys_language_alone(tmp_path: Path) -> None:
    """`casa` is rare in the Italian corpus and frequent in the Spanish one: one index of both would put i1 first."""
    records: list[Record] = [Passage("t", f"s{n}", "es", f"casa {word}") for n, word in enumerate(["uno", "dos", "tres", "sol"])]
    records += [Passage("t", "i0", "it", "casa mare"), Passage("t", "i1", "it", "sol mare"), Passage("t", "i2", "it", "mare")]
    records += [Query("t", "q", "it", "casa sol", "q"), Judgment("t", "q", "i0", 1)]
    own = bm25(write_set(tmp_path / "own", records, "miracl"), tmp_path / "own.parquet")
    union = bm25(write_set(tmp_path / "union", records, "beir/nq"), tmp_path / "union.parquet")
    assert own["baseline"]["fitted_on"] == "the corpus of each language"
    assert "union" not in own
    assert own["metrics"]["mrr@10"] == 1.0  # i0 and i1 tie, the lower number goes first
    assert union["metrics"]["mrr@10"] < 1.0


def test_the_table_names_every_known_set_and_real_metrics(tmp_path: Path) -> None:
    assert set(PROTOCOLS) == set(domains.IN_DOMAIN_OF)
    assert {name for name in domains.IN_DOMAIN_OF if name.startswith("beir/")} == {f"beir/{n}" for n in protocols.BEIR_SETS}
    task, queries, shard = many(tmp_path / "set")
    given: dict[str, Any] = evaluate(task, queries, shard)["metrics"]
    assert set(MR_TYDI.headline) <= set(given)
    assert protocol(task) is MR_TYDI


@pytest.mark.parametrize(
    ("evaluation", "languages", "crosses", "expected"),
    [
        ("miracl", 1, False, "miracl"),
        ("xquad_r", 11, True, "lareqa"),
        ("xquad_r", 1, False, "one language"),
        ("belebele", 3, True, "several languages"),
        ("nq", 1, False, "beir"),
        (None, 1, False, "one language"),
        (None, 1, True, "one language"),
        (None, 2, False, "own language"),
        ("a stranger", 2, True, "several languages"),
    ],
)
def test_which_protocol(evaluation: str | None, languages: int, crosses: bool, expected: str) -> None:
    assert protocol_of({"evaluation": evaluation}, languages, crosses).name == expected


def test_members_of_beirs_mean() -> None:
    assert [protocols.beir_member(name) for name in ("beir/scifact", "nq", "scifact", "miracl", "beir/x", None)] == [
        *("scifact", "nq", None, None, None, None)
    ]
    assert (BEIR.headline[0], LAREQA.headline[0]) == ("ndcg@10", "mono_map")

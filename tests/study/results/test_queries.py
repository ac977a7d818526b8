from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from pyarrow import parquet

from hybrid_scale.errors import RunError
from hybrid_scale.protocols import SEVERAL_LANGUAGES
from hybrid_scale.retrieval.measures import Judged, per_query, summarise
from hybrid_scale.runs import RunDirectory
from hybrid_scale.study.results.queries import CUTS, clusters, contradiction, macro_mean, read_queries
from tests.study.fabricate import means_of, save_queries, single_queries

GAIN = (0.02, 0.0, 0.01)


def judged(questions: int = 12) -> Judged:
    """Random ranks of three languages; some judged pairs are missing, so that languages have unequal counts."""
    chance = np.random.default_rng(2)
    languages = ["ar", "de", "en"]
    pairs = [(q, c) for q in range(3 * questions) for c in range(3) if chance.random() < 0.8]
    query, language = (np.array(column) for column in zip(*pairs, strict=True))
    above = chance.integers(0, 30, (len(pairs), 3))
    query_language = np.arange(3 * questions) % 3
    return Judged(
        languages, languages, query_language, query, language, np.ones(len(pairs), int), above, np.ones(len(pairs), bool)
    )


def test_every_measure_is_that_of_the_evaluation(tmp_path: Path) -> None:
    """The evaluation's own averages (retrieval.measures) from its own table of single queries."""
    found = judged()
    ids = [f"q{n}" for n in range(len(found.query_language))]
    table = per_query(found, ids, [str(n // 3) for n in range(len(ids))], None, SEVERAL_LANGUAGES)
    path = tmp_path / "x.parquet"
    parquet.write_table(table, path)
    queries, stated = read_queries(path), summarise(found, np.array([30, 30, 30]), SEVERAL_LANGUAGES)["metrics"]
    assert set(CUTS) <= set(stated)
    for key in CUTS:
        values = queries.values(key)
        assert values is not None
        mine = clusters(values)
        assert mine is not None
        assert mine.estimate == pytest.approx(stated[key], abs=1e-12), key
        assert macro_mean(values) == pytest.approx(stated[key], abs=1e-12), key
    assert contradiction({"metrics": stated}, queries, "x.json") is None


def test_a_set_in_parts_is_the_mean_over_its_parts(tmp_path: Path) -> None:
    """By hand: forum a has mean .5 over two queries, forum b .2 over one; the set scores .35, not .4."""
    rows = [("a", "a/1", 0.75), ("a", "a/2", 0.25), ("b", "b/1", 0.2)]
    table = pd.DataFrame(rows, columns=["part", "query", "ndcg@10"]).assign(query_lang="en", pool="union", relevant=1)
    queries = read_queries(save_queries(RunDirectory(tmp_path), "x", table.assign(group=table["query"])))
    values = queries.values("ndcg@10")
    assert values is not None
    whole = clusters(values)
    assert whole is not None
    assert (whole.estimate, macro_mean(values)) == (pytest.approx(0.35), pytest.approx(0.35))
    assert contradiction({"metrics": {"ndcg@10": 0.35}}, queries, "x.json") is None
    assert "its single queries say 0.35" in str(contradiction({"metrics": {"ndcg@10": 0.4}}, queries, "x.json"))


def test_means_are_those_of_loops(tmp_path: Path) -> None:
    table = single_queries(10, 7, GAIN, seed=1)
    queries = read_queries(save_queries(RunDirectory(tmp_path), "x", table))
    for key, expected in means_of(table).items():
        values = queries.values(key)
        assert values is not None
        mine = clusters(values)
        assert mine is not None
        assert len(mine) == 10
        assert mine.estimate == pytest.approx(expected, abs=1e-12)
    assert queries.values("no such measure") is None


def test_a_mean_that_was_changed_is_found(tmp_path: Path) -> None:
    table = single_queries(10, 7, GAIN, seed=1)
    queries = read_queries(save_queries(RunDirectory(tmp_path), "x", table, fingerprint="abc"))
    means = means_of(table)
    assert contradiction({"metrics": means, "fingerprint": "abc"}, queries, "x.json") is None
    changed = {**means, "cross_map": means["cross_map"] + 0.001}
    assert "x.json says cross_map" in (contradiction({"metrics": changed}, queries, "x.json") or "")
    assert "different sets" in (contradiction({"metrics": means, "fingerprint": "other"}, queries, "x.json") or "")


@pytest.mark.parametrize("kind", ["not parquet", "other columns"])
def test_another_file_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x.parquet"
    if kind == "not parquet":
        path.write_text("query,value", encoding="utf-8")
    else:
        pd.DataFrame({"query": ["a"], "map": [0.5]}).to_parquet(path)
    with pytest.raises(RunError, match="not a Parquet file" if kind == "not parquet" else "query_lang, group, pool missing"):
        read_queries(path)

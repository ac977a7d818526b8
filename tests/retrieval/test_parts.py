"""Sets in parts: every door gives one result, the mean over the parts of means over their queries, and one table that says so."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from pyarrow import parquet

from hybrid_scale.data.prepared import RetrievalSet
from hybrid_scale.data.records import Judgment, Passage, Query, Record
from hybrid_scale.data.sources.beir_sets import FORUMS
from hybrid_scale.data.writing import write_retrieval
from hybrid_scale.errors import DataError
from hybrid_scale.retrieval.parts import join_tables, mean_of, one_set, open_sets
from launch import baselines, evaluate, prepare, tradeoff
from tests.retrieval.worlds import write_embeddings, write_task

PARTS = ("gis", "tex")
MEASURES = ("ndcg@10", "recall@100", "mrr@10", "map", "r@1")


def write_part(directory: Path, groups: int, whole: str | None = "forums") -> RetrievalSet:
    """A prepared set that names its whole; another number of queries in each, so that a mean over queries is another number."""
    task = write_task(directory, groups=groups)
    path = directory / "manifest.json"
    more = {"part_of": whole, "part": directory.name} if whole else {}
    path.write_text(json.dumps({**json.loads(path.read_text()), **more}))
    return RetrievalSet(task.directory)


@pytest.fixture
def forums(tmp_path: Path) -> Path:
    """Two parts of one whole, and their vectors in `vectors`."""
    for part, groups in zip(PARTS, (3, 7), strict=True):
        write_embeddings(tmp_path / "vectors" / part, write_part(tmp_path / "forums" / part, groups))
    return tmp_path / "forums"


def table_means(file: Path) -> dict[str, float]:
    """Of the union pool: a mean over parts of means over rows."""
    table: pd.DataFrame = parquet.read_table(file).to_pandas()
    assert table["query"].str.startswith(tuple(f"{part}/" for part in PARTS)).all()
    assert not table[table["pool"] == "union"]["query"].duplicated().any()
    return {name: float(table[table["pool"] == "union"].groupby("part")[name].mean().mean()) for name in MEASURES}


def test_given_vectors_of_a_set_in_parts(forums: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out" / "forums.json"
    assert evaluate.main([str(forums), "--embeddings", str(tmp_path / "vectors"), "--out", str(out)]) == 0
    whole = json.loads(out.read_text())
    single: dict[str, Any] = {}
    for part in PARTS:
        one = tmp_path / f"{part}.json"
        assert evaluate.main([str(forums / part), "--embeddings", str(tmp_path / "vectors" / part), "--out", str(one)]) == 0
        single[part] = json.loads(one.read_text())
    assert whole["task"] == "forums"
    assert whole["parts"] == {part: result["metrics"] for part, result in single.items()}
    for name, value in whole["metrics"].items():
        assert value == pytest.approx(np.mean([result["metrics"][name] for result in single.values()]), abs=1e-15)
    assert whole["queries"] == 9 + 21
    assert whole["queries_without_relevant"] == 2
    weighted = np.average([result["metrics"]["map"] for result in single.values()], weights=[8, 20])
    assert abs(weighted - whole["metrics"]["map"]) > 1e-3, "this world can't tell the mean over parts from that over queries"
    assert table_means(out.with_suffix(".parquet")) == pytest.approx({name: whole["metrics"][name] for name in MEASURES})
    facts = parquet.read_schema(out.with_suffix(".parquet")).metadata
    assert (facts[b"task"], facts[b"fingerprint"].decode()) == (b"forums", whole["fingerprint"])
    assert sorted(path.name for path in out.parent.iterdir()) == ["forums.json", "forums.parquet"]
    assert "forums: 30 queries, 60 passages" in capsys.readouterr().out


def test_baselines_on_a_set_in_parts(forums: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = write_task(tmp_path / "plain")
    given = [str(forums), str(plain.directory), "--out", str(tmp_path / "out"), "--bm25", "--remove", "language_mean"]
    embeddings = ["--embeddings", str(tmp_path / "vectors"), str(write_embeddings(tmp_path / "plain-vectors", plain))]
    assert baselines.main([*given, *embeddings]) == 0
    assert capsys.readouterr().out.count("\n") == 2 + 2 * 2
    for name in ("bm25", "vectors", "vectors+language_mean"):
        folder = tmp_path / "out" / name / "eval"
        whole = json.loads((folder / "forums.json").read_text())
        assert (list(whole["parts"]), whole["baseline"]["name"]) == (list(PARTS), name)
        assert whole["metrics"]["map"] == pytest.approx(np.mean([part["map"] for part in whole["parts"].values()]), abs=1e-15)
        assert table_means(folder / "forums.parquet") == pytest.approx({key: whole["metrics"][key] for key in MEASURES})
    assert baselines.main([*given, *embeddings]) == 2
    assert "results are never overwritten" in capsys.readouterr().err


def test_a_value_that_a_part_lacks_is_missing_in_the_whole() -> None:
    part = {"task": "a", "fingerprint": "x", "languages": ["en"], "queries": 2, "metrics": {"map": 0.5, "peer": None}}
    whole = mean_of("w", [part, {**part, "task": "b", "metrics": {"map": 0.25, "peer": 0.5}}])
    assert whole["metrics"] == {"map": 0.375, "peer": None}
    assert whole["fingerprint"] != mean_of("w", [part, part])["fingerprint"]


def test_folders_that_are_no_set_in_parts(forums: Path, tmp_path: Path) -> None:
    assert [task.name for task in open_sets(forums)] == list(PARTS)
    assert [task.name for task in open_sets(forums / "gis")] == ["gis"]
    with pytest.raises(DataError, match=r"a set in parts.*one set only.*Name one of its parts"):
        one_set(forums, "one set only")
    write_part(forums / "other", 2, None)
    with pytest.raises(DataError, match="must be parts of one whole"):
        open_sets(forums)
    with pytest.raises(DataError, match=r"no manifest\.json"):
        open_sets(tmp_path / "nothing")
    for part in FORUMS[1:]:
        (tmp_path / "cqadupstack").mkdir(exist_ok=True)
        (tmp_path / "cqadupstack" / part).mkdir()
        manifest = {"format": 1, "kind": "retrieval", "fingerprint": "x", "languages": [], "part_of": "cqadupstack", "part": part}
        for name in ("corpus.arrow", "queries.arrow", "qrels.npy"):
            (tmp_path / "cqadupstack" / part / name).write_bytes((forums / "gis" / name).read_bytes())
        (tmp_path / "cqadupstack" / part / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=r"found '11 parts'.*missing: android"):
        open_sets(tmp_path / "cqadupstack")


def test_what_needs_a_single_set_says_so(forums: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    vectors = str(tmp_path / "vectors")
    given = [str(forums), "--embeddings", vectors, "--out", str(tmp_path / "o.json")]
    assert evaluate.main([*given, "--run-file", str(tmp_path / "x.run")]) == 2
    assert "a set in parts" in capsys.readouterr().err
    assert tradeoff.main([vectors, str(forums), "--out", str(tmp_path / "study")]) == 2
    assert "a set in parts" in capsys.readouterr().err
    assert not (tmp_path / "study").exists()


def test_cqadupstack_is_prepared_at_once_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = tmp_path / "raw"
    for part in FORUMS:
        (raw / part / "qrels").mkdir(parents=True)
        (raw / part / "corpus.jsonl").write_text(json.dumps({"_id": "1", "title": "", "text": f"about {part}"}) + "\n")
        (raw / part / "queries.jsonl").write_text(json.dumps({"_id": "q", "text": part}) + "\n")
        (raw / part / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq\t1\t1\n")
    (raw / "wordpress" / "qrels" / "test.tsv").rename(tmp_path / "kept.tsv")
    out = tmp_path / "cqadupstack"
    given = ["beir_set", "--option", "name=cqadupstack", "--path", str(raw), "--out", str(out)]
    assert prepare.main(given) == 2
    assert "test.tsv" in capsys.readouterr().err
    with pytest.raises(DataError, match="missing: wordpress"):
        open_sets(out)
    (tmp_path / "kept.tsv").rename(raw / "wordpress" / "qrels" / "test.tsv")
    assert prepare.main(given) == 0
    assert capsys.readouterr().out.count("is there, kept") == 11
    tasks = open_sets(out)
    assert [task.name for task in tasks] == sorted(FORUMS)
    assert {task.manifest["evaluation"] for task in tasks} == {"beir/cqadupstack"}
    assert prepare.main([*given[:-1], str(out / "gis")]) == 2
    assert "comes in 12 parts" in capsys.readouterr().err


def test_parts_that_have_no_folder_are_told_before_one_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder of one set must not be taken for each of the twelve."""
    (tmp_path / "raw" / "gis").mkdir(parents=True)
    (tmp_path / "raw" / "corpus.jsonl").write_text('{"_id": "1", "text": "x"}\n')
    given = ["beir_set", "--option", "name=cqadupstack", "--path", str(tmp_path / "raw"), "--out", str(tmp_path / "out")]
    assert prepare.main(given) == 2
    assert "missing: android, english, gaming, mathematica" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_set_without_a_relevant_passage_is_refused(tmp_path: Path) -> None:
    records: list[Record] = [Passage("t", "p", "en", "x"), Query("t", "q", "en", "x", "q"), Judgment("t", "q", "p", 0)]
    write_retrieval(records, tmp_path / "set", {"name": "test"})
    with pytest.raises(DataError, match="set: found '1 judgments, none above 0'"):
        open_sets(tmp_path / "set")


def test_tables_are_joined_whole_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        join_tables(tmp_path / "w.parquet", ["a"])
    assert not list(tmp_path.iterdir())

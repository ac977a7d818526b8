"""A model's vectors without the means of their languages: equal to the baseline of that name, and a cure where it should be."""

from pathlib import Path

import numpy as np
import pytest

from hybrid_scale.data.prepared import RetrievalSet
from hybrid_scale.data.records import Judgment, Passage, Query, Record
from hybrid_scale.data.writing import write_retrieval
from hybrid_scale.retrieval.baselines.run import Room, Vectors, without_language
from hybrid_scale.retrieval.evaluate import evaluate
from hybrid_scale.retrieval.index import Shard
from hybrid_scale.retrieval.language_means import KEY, without_language_means
from hybrid_scale.retrieval.language_removal import LANGUAGE_MEAN, Removal
from hybrid_scale.retrieval.lengths import UNCUT
from hybrid_scale.retrieval.parts import mean_of
from hybrid_scale.runs import RunDirectory, read_json, write_json
from hybrid_scale.study.results.collect import collect
from hybrid_scale.study.results.references import final_results, references
from tests.study.fabricate import SCORES, fabricated

GROUPS = 12


@pytest.fixture
def task(tmp_path: Path) -> RetrievalSet:
    names = [(group, lang) for group in range(GROUPS) for lang in ("en", "de")]
    records: list[Record] = [Passage("t", f"{lang}:{g}", lang, f"text {g} {lang}") for g, lang in names]
    records += [Query("t", f"{lang}:{g}", lang, f"question {g} {lang}", f"g{g}") for g, lang in names]
    records += [Judgment("t", f"{lang}:{g}", f"{other}:{g}", 1) for g, lang in names for other in ("en", "de")]
    write_retrieval(records, tmp_path / "set", {"name": "toy"})
    return RetrievalSet(tmp_path / "set")


def vectors(task: RetrievalSet, ids: list[str]) -> np.ndarray:
    """A direction for each group, and a far larger one for each language: only one's own language is near."""
    rows = np.zeros((len(ids), GROUPS + 2), np.float32)
    for row, name in enumerate(ids):
        lang, group = name.split(":")
        rows[row, int(group)] = 1.0
        rows[row, GROUPS + ("en", "de").index(lang)] = 3.0
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_a_language_offset_is_taken_away_as_the_baseline_does(task: RetrievalSet, tmp_path: Path) -> None:
    queries = vectors(task, task.queries.column("id"))
    shard = Shard(np.arange(len(task.corpus)), vectors(task, task.corpus.column("id")), str)
    plain = evaluate(task, queries, shard, 10)["metrics"]
    moved = without_language_means(task, queries, shard, 10, 1.0, tmp_path)[KEY]["metrics"]
    assert plain["mono_map"] == moved["mono_map"] == moved["multi_map"] == moved["cross_map"] == 1.0
    assert plain["multi_map"] < 0.7, "all passages of one's own language stand first"
    given = Vectors("model", queries, shard, {}, UNCUT)
    baseline = without_language(task, lambda _: tmp_path / "x.parquet", given, Removal(LANGUAGE_MEAN), Room(2.0**30, tmp_path))
    assert moved == baseline["metrics"]


def test_a_set_in_parts_has_the_mean() -> None:
    parts = [
        {"task": name, "fingerprint": name, "languages": ["en"], "metrics": {"map": 0.1}, KEY: {"metrics": {"map": value}}}
        for name, value in (("a", 0.2), ("b", 0.4))
    ]
    assert mean_of("whole", parts)[KEY]["metrics"]["map"] == pytest.approx(0.3)


def test_a_study_shows_them_beside_its_arms(tmp_path: Path) -> None:
    """The untrained base must be beaten; a finished arm after the correction stands beside it, and counts for nothing."""
    plan = fabricated(tmp_path, SCORES, seeds=[0, 1])
    for run in plan.runs:
        directory = RunDirectory(run.directory)
        for step, value in ((0, 0.6), (None, 0.7 + run.seed / 10)):
            file = directory.evaluation_file("xquad_r", step)
            content = read_json(file)
            write_json(file, content | {KEY: {"metrics": {"mono_map": value, "peer": None}}})
    collected = collect(plan)
    found, _ = references(plan, collected, final_results(plan, collected))
    moved = {each.name: each for each in found if "language means" in each.name}
    assert moved["untrained base, language means subtracted"].scores == {("xquad_r", "mono_map"): pytest.approx(0.6)}
    assert not moved["untrained base, language means subtracted"].trained
    assert moved["hybrid, language means subtracted"].scores == {("xquad_r", "mono_map"): pytest.approx(0.75)}
    assert moved["hybrid, language means subtracted"].trained
    for run in plan.runs:
        if (run.arm, run.seed) == ("hybrid", 1):
            file = RunDirectory(run.directory).evaluation_file("xquad_r")
            write_json(file, read_json(file) | {"protocol": {"name": "unheard of", "pools": "union"}})
    collected = collect(plan)
    found, _ = references(plan, collected, final_results(plan, collected))
    doubted = next(each for each in found if each.name == "hybrid, language means subtracted")
    assert doubted.scores == {("xquad_r", "mono_map"): pytest.approx(0.7)}, (
        "a result that doesn't count doesn't count here either"
    )

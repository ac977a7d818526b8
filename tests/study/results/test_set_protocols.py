"""A set's columns are those of the protocol that its results state; what was scored otherwise doesn't count, and is told."""

from pathlib import Path
from typing import Any

import pytest

from hybrid_scale.protocols import BEIR, LAREQA, MIRACL, MR_TYDI, Protocol
from hybrid_scale.runs import RunDirectory, write_json
from hybrid_scale.study.grid import Plan, plan_study
from hybrid_scale.study.results.collect import Collected, collect, tidy
from hybrid_scale.study.results.comparisons import compare
from hybrid_scale.study.results.references import final_results, references
from hybrid_scale.study.results.scores import arms, headline_metrics
from tests.study.fabricate import start, write_study

ARMS = [{"name": arm, "set": {"sampler.arm": arm}} for arm in ("mono", "cross", "hybrid")]
EVERY = ("ndcg@10", "recall@100", "mrr@10", "mrr@100", "map", "r@1", "ndcg@10_median", "recall@100_median", "mrr@100_median")


def result(task: str, protocol: Protocol | None, score: float = 0.4, languages: tuple[str, ...] = ("bn", "sw")) -> dict[str, Any]:
    """Every metric is `score` and a little more, one after the other."""
    content: dict[str, Any] = {"task": task, "step": None, "languages": list(languages), "fingerprint": "f00d"}
    content |= {"metrics": {key: score + n / 100 for n, key in enumerate(EVERY)}}
    return content | ({"protocol": protocol.facts()} if protocol else {})


def study(folder: Path, results: dict[str, dict[str, Any]]) -> tuple[Plan, Collected]:
    """Finished runs, one of each arm, with the result given for it."""
    plan = plan_study(write_study(folder, arms=ARMS, seeds=[0], overrides={"training.max_steps": 2}))
    for run in plan.runs:
        directory = start(run, 2)
        if run.arm in results:
            write_json(directory.evaluation_file(results[run.arm]["task"]), results[run.arm])
        directory.set_status("done")
    return plan, collect(plan)


def notes(collected: Collected, arm: str) -> str:
    return str(collected.runs.set_index("arm").loc[arm, "notes"])


@pytest.mark.parametrize(
    ("task", "protocol", "labels"),
    [
        ("mr_tydi", MR_TYDI, ["MRR@100", "recall@100", "MRR@100, median", "recall@100, median"]),
        ("miracl", MIRACL, ["nDCG@10", "recall@100", "nDCG@10, median", "recall@100, median"]),
        ("scifact", BEIR, ["nDCG@10", "recall@100", "MRR@10", "mAP"]),
    ],
)
def test_the_columns_are_those_of_the_stated_protocol(tmp_path: Path, task: str, protocol: Protocol, labels: list[str]) -> None:
    plan, collected = study(tmp_path, {arm: result(task, protocol) for arm in ("mono", "cross", "hybrid")})
    assert [metric.label for metric in headline_metrics(arms(collected, task))] == labels
    table = tidy(collected)
    assert set(table.loc[table["task"] == task, "protocol"]) == {protocol.name}
    compared = {each.metric.label for each in compare(collected, {run.id: run.directory for run in plan.runs})}
    assert compared == set(labels[:2])


@pytest.mark.parametrize("task", ["miracl", "mr_tydi", "a_set_in_two_languages"])
def test_a_result_of_an_older_version_in_the_union_doesnt_count(tmp_path: Path, task: str) -> None:
    _, collected = study(tmp_path, {"mono": result(task, None), "cross": result(task, MIRACL), "hybrid": result(task, MIRACL)})
    mono, cross, _ = arms(collected, task)
    assert (dict(mono.scores), cross.scores["ndcg@10"].mean) == ({}, 0.4)
    said = notes(collected, "mono")
    assert f"{task}.json: found 'no protocol'; the protocol" in said
    assert "It doesn't count: delete it and evaluate the run again." in said
    assert f"{task}.json" not in notes(collected, "cross")


def test_older_results_count_where_the_union_is_the_protocol(tmp_path: Path) -> None:
    """One language, or judgments across languages: the numbers are the same as before."""
    across = result("xquad_r", None)
    across["metrics"] |= {"mono_map": 0.5, "cross_map": 0.4, "multi_map": 0.3}
    older = {"mono": result("nq", None, languages=("en",)), "cross": across, "hybrid": result("miracl", None, languages=("sw",))}
    _, collected = study(tmp_path, older)
    assert arms(collected, "nq")[0].protocol == BEIR.name
    assert arms(collected, "xquad_r")[0].protocol == LAREQA.name
    assert all(arms(collected, task)[n].scores for n, task in enumerate(("nq", "xquad_r", "miracl")))


def test_runs_scored_under_two_protocols_arent_compared(tmp_path: Path) -> None:
    results = {"mono": result("x", MIRACL), "cross": result("x", MIRACL), "hybrid": result("x", BEIR, 0.7)}
    plan, collected = study(tmp_path, results)
    assert [bool(arm.scores) for arm in arms(collected, "x")] == [True, True, False]
    assert compare(collected, {run.id: run.directory for run in plan.runs}) == []
    rule = "runs are compared under one protocol, and most results of x were scored by miracl"
    assert f"x: found 'protocol beir'; {rule}" in notes(collected, "hybrid")


def test_a_protocol_that_isnt_known_or_has_other_pools_doesnt_count(tmp_path: Path) -> None:
    new, old = result("x", MIRACL), result("x", MIRACL)
    new["protocol"]["name"], old["protocol"]["pools"] = "later", "union"
    _, collected = study(tmp_path, {"mono": new, "cross": old})
    assert [bool(arm.scores) for arm in arms(collected, "x")] == [False] * 3
    assert "found 'later'; must be a protocol that this version knows" in notes(collected, "mono")
    assert "found 'union'; the pools of the protocol miracl must be: own language" in notes(collected, "cross")


@pytest.mark.parametrize("protocol", [None, BEIR])
def test_a_baseline_under_another_protocol_doesnt_stand_beside(tmp_path: Path, protocol: Protocol | None) -> None:
    plan, collected = study(tmp_path, {arm: result("miracl", MIRACL) for arm in ("mono", "cross", "hybrid")})
    for name, rule in (("right", MIRACL), ("wrong", protocol)):
        file = RunDirectory(plan.directory / "baselines" / name).evaluation_file("miracl")
        file.parent.mkdir(parents=True)
        write_json(file, result("miracl", rule, 0.2) | {"baseline": {"name": name}})
    found, faults = references(plan, collected, final_results(plan, collected))
    assert [each.name for each in found] == ["right"]
    assert len(faults) == 1
    assert faults[0].startswith("baselines/wrong: miracl.json")

"""BEIR's mean against loops over made queries, and a direct formula for its error."""

import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from hybrid_scale.protocols import BEIR, BEIR_SETS, beir_member
from hybrid_scale.runs import write_json
from hybrid_scale.study.grid import Plan, PlannedRun, plan_study
from hybrid_scale.study.report.first import first
from hybrid_scale.study.results.beir import BeirMean, joined
from hybrid_scale.study.results.collect import Collected, collect
from hybrid_scale.study.results.comparisons import compare
from hybrid_scale.study.results.crossed import crossed
from hybrid_scale.study.results.primary import claims
from hybrid_scale.study.results.references import final_results, references
from hybrid_scale.study.results.scaling import priced
from hybrid_scale.study.results.scores import arms
from tests.study.fabricate import Known, save_queries, start, write_study

PARTS = tuple(f"forum-{n}" for n in range(12))
SIZES = {"scifact": 7, "nq": 5, "fever": 4, "cqadupstack": 0}
"""Queries of each set; a forum has one or two."""
SMALL, LARGE = "7b", "72b"


def queries_of(name: str) -> list[tuple[str, str]]:
    """(part, query)"""
    if name != "cqadupstack":
        return [("", f"q{n}") for n in range(SIZES[name])]
    return [(part, f"{part}/q{n}") for number, part in enumerate(PARTS) for n in range(1 + number % 2)]


def value(run: PlannedRun, name: str, number: int) -> float:
    """Of one query; hybrid is the better one at the large size, by another difference for each query."""
    base = 0.3 + 0.05 * (number % 4) + 0.01 * SIZES[name] + 0.001 * run.seed * (run.model == SMALL)
    gain = (0.02 + 0.004 * (number % 3) + 0.02 * (name == "nq")) * (run.arm == "hybrid")
    return base + gain * (2 if run.model == LARGE else 1)


def score(run: PlannedRun, name: str) -> float:
    """The set's own mean: over the queries, or over CQADupStack's forums of theirs."""
    by_part: dict[str, list[float]] = {}
    for number, (part, _) in enumerate(queries_of(name)):
        by_part.setdefault(part, []).append(value(run, name, number))
    return statistics.fmean(statistics.fmean(found) for found in by_part.values())


def finish(run: PlannedRun, names: Sequence[str]) -> None:
    directory = start(run, 2)
    for name in names:
        rows = [
            {"query": query, "group": query, "query_lang": "en", "pool": "union", "relevant": 1, "ndcg@10": value(run, name, n)}
            | ({"part": part} if part else {})
            for n, (part, query) in enumerate(queries_of(name))
        ]
        save_queries(directory, name, pd.DataFrame(rows))
        content = {"task": name, "step": None, "evaluation": f"beir/{name}", "languages": ["en"], "fingerprint": "f00d"}
        content |= {"protocol": BEIR.facts(), "metrics": {"ndcg@10": score(run, name)}}
        content |= {"parts": {part: {} for part in PARTS}} if name == "cqadupstack" else {}
        write_json(directory.evaluation_file(name), content)
    directory.set_status("done")


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Known:
    """Two sizes, two arms, three seeds, four sets of BEIR, of which one run lacks FEVER."""
    folder = tmp_path_factory.mktemp("beir")
    axis = [{"name": name, "set": {"model.base": f"Qwen/Qwen2.5-{name.upper()}"}} for name in (SMALL, LARGE)]
    made = [{"name": arm, "set": {"sampler.arm": arm}} for arm in ("mono", "hybrid")]
    base = {"data": {"train": "data/pairs"}, "sampler": {"global_batch": 64}, "training": {"max_steps": 2}}
    base |= {"model": {"base": "Qwen/Qwen3-0.6B", "dtype": "float32"}}
    changes = {"models": axis, "arms": made, "seeds": [0, 1, 2], "base": base}
    plan = plan_study(write_study(folder, **changes, evaluate=[f"data/beir/{name}" for name in SIZES]))
    for number, run in enumerate(plan.runs):
        finish(run, [name for name in SIZES if name != "fever" or number])
    return Known.of(plan)


def mean_of(plan: Plan, arm: str, model: str, seed: int) -> float:
    run = next(run for run in plan.runs if (run.arm, run.model, run.seed) == (arm, model, seed))
    return statistics.fmean(score(run, name) for name in ("scifact", "nq", "cqadupstack"))


def of_arm(collected: Collected, name: str, model: str) -> dict[int, float]:
    (arm,) = (arm for arm in arms(collected, "beir") if (arm.name, arm.model) == (name, model))
    return dict(arm.scores["ndcg@10"].by_seed)


def test_it_is_the_mean_over_the_sets_that_every_run_has(study: Known) -> None:
    mean = study.collected.beir
    assert mean is not None
    assert mean == BeirMean({name: name for name in ("cqadupstack", "nq", "scifact")}, {"fever": (study.plan.runs[0].id,)})
    for arm in ("mono", "hybrid"):
        for model in (SMALL, LARGE):
            wanted = {seed: pytest.approx(mean_of(study.plan, arm, model, seed), abs=1e-12) for seed in (0, 1, 2)}
            assert of_arm(study.collected, arm, model) == wanted


def test_by_hand() -> None:
    """Sets of 2 and 3 queries; per query .1 .3 and .2 .5 .8: means .2 and .5, together .35.

    s^2 = .02 and .09; the variance of the mean is (.02 / 2 + .09 / 3) / 4 = .01, so its error is .1.
    """
    made = {"a": pd.Series([0.1, 0.3]) / 2, "b": pd.Series([0.2, 0.5, 0.8]) / 3}
    shares = joined({name: pd.DataFrame(dict.fromkeys(range(3), column)) for name, column in made.items()})
    assert shares is not None
    both = crossed(shares.to_numpy().T)
    assert both is not None
    assert (both.estimate, both.error) == (pytest.approx(0.35), pytest.approx(0.1))
    assert joined({"a": pd.DataFrame({0: [0.1]}), "b": pd.DataFrame({0: [0.1, 0.2]})}) is None


def test_its_error_is_that_of_a_bootstrap_within_sets() -> None:
    """Queries drawn anew within each set: sets are fixed, however far their scores lie apart."""
    random = np.random.default_rng(5)
    sets = {str(n): random.normal(0.2 * n, 0.1 * (n + 1), size) for n, size in enumerate((30, 80, 400))}
    shares = joined({name: pd.DataFrame(dict.fromkeys(range(3), v / len(v))) for name, v in sets.items()})
    assert shares is not None
    both = crossed(shares.to_numpy().T)
    drawn = np.mean([v[random.integers(0, len(v), (4000, len(v)))].mean(1) for v in sets.values()], axis=0)
    assert both is not None
    assert both.error == pytest.approx(drawn.std(), rel=0.05)
    assert both.estimate == pytest.approx(np.mean([v.mean() for v in sets.values()]))


def test_the_claim_is_the_paired_difference_of_the_means_and_its_change(study: Known) -> None:
    assert ("beir", "ndcg@10") in study.plan.family.metrics
    found = {claim.kind: claim for claim in study.claims if claim.task == "beir"}

    def difference(model: str) -> float:
        return statistics.fmean(mean_of(study.plan, "hybrid", model, s) - mean_of(study.plan, "mono", model, s) for s in range(3))

    larger, change = found["difference"], found["change"]
    assert larger.estimate == pytest.approx(difference(LARGE), abs=1e-12)
    assert change.estimate == pytest.approx(difference(LARGE) - difference(SMALL), abs=1e-12)
    assert larger.both is not None
    assert (larger.both.seeds, larger.both.questions) == (3, 5 + 7 + 18)
    # by the stratified formula; at the large size nothing varies with the seed, so the seeds add nothing
    run = {arm: next(r for r in study.plan.runs if (r.arm, r.model, r.seed) == (arm, LARGE, 0)) for arm in ("hybrid", "mono")}
    variance = 0.0
    for name in ("scifact", "nq"):
        values = [value(run["hybrid"], name, n) - value(run["mono"], name, n) for n in range(SIZES[name])]
        variance += statistics.variance(values) / len(values) / 9
    by_part: dict[str, list[float]] = {}
    for n, (part, _) in enumerate(queries_of("cqadupstack")):
        by_part.setdefault(part, []).append(value(run["hybrid"], "cqadupstack", n) - value(run["mono"], "cqadupstack", n))
    weighted = [(v - statistics.fmean(part)) / (12 * len(part)) for part in by_part.values() for v in part]
    variance += 18 / 17 * sum(each**2 for each in weighted) / 9
    assert larger.both.error == pytest.approx(variance**0.5, rel=1e-9)


def test_points_of_cost_have_intervals_on_it_as_well(study: Known) -> None:
    points = [each for each in priced(study.collected, {run.id: run.directory for run in study.plan.runs}) if each.task == "beir"]
    assert len(points) == 4
    for point in points:
        assert point.interval is not None
        assert point.interval.estimate == pytest.approx(point.quality, abs=1e-12)


def test_a_baseline_has_the_mean_over_the_same_sets_or_none(study: Known) -> None:
    for name, sets in (("whole", SIZES), ("lacking", ("nq", "fever"))):
        home = study.plan.directory / "baselines" / name / "eval"
        home.mkdir(parents=True)
        for number, task in enumerate(sets):
            content = {
                "task": task,
                "metrics": {"ndcg@10": 0.1 * (number + 1)},
                "baseline": {"name": name},
                "fingerprint": "f00d",
            }
            write_json(home / f"{task}.json", content | {"languages": ["en"], "protocol": BEIR.facts()})
    found, faults = references(study.plan, study.collected, final_results(study.plan, study.collected))
    assert faults == []
    scores = {each.name: each.scores.get(("beir", "ndcg@10")) for each in found}
    assert scores == {"whole": pytest.approx((0.1 + 0.2 + 0.4) / 3), "lacking": None}


def test_the_report_says_of_what_it_is_the_mean(study: Known) -> None:
    mean = study.collected.beir
    assert mean is not None
    run = study.plan.runs[0].id
    left = f"left out, as every run must have the same sets: fever (not scored for {run})"
    assert mean.about == f"beir is the plain mean over 3 of BEIR's 15 public sets: cqadupstack, nq, scifact; {left}"
    verdicts = first(study.plan, study.collected, study.claims, [], {"beir": mean.flag({})}).verdicts
    assert verdicts is not None
    assert [row.cells[0].detail for row in verdicts.rows] == ["beir, 3 of 15 sets", "nq"]


def test_how_much_of_beir_it_is_and_what_is_in_domain() -> None:
    whole = BeirMean({name: name for name in BEIR_SETS})
    assert (whole.count, whole.flag({}), whole.flag({"nq": ("nq",), "xquad_r": ()})) == ("", "", "1 in-domain")
    assert "all 15 public sets of BEIR" in whole.about
    assert BeirMean({"nq": "nq", "quora": "quora"}).flag({"nq": ()}) == "2 of 15 sets, 1 in-domain"


def test_one_forum_or_another_set_is_no_part_of_it() -> None:
    assert beir_member("beir/cqadupstack", 12) == "cqadupstack"
    assert [beir_member(name) for name in ("beir/cqadupstack", "beir/bioasq", "xquad_r", None, "scifact")] == [None] * 5
    assert beir_member("nq") == "nq"


def test_one_set_has_no_mean(tmp_path: Path) -> None:
    plan = plan_study(write_study(tmp_path, seeds=[0], evaluate=["data/beir/scifact"], overrides={"training.max_steps": 2}))
    for run in plan.runs:
        finish(run, ["scifact"])
    collected = collect(plan)
    assert collected.beir is None
    assert [name for name, _ in plan.family.metrics if name == "beir"] == []
    assert claims(plan.family, collected, compare(collected, {run.id: run.directory for run in plan.runs}, plan.family))

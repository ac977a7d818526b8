"""The primary family on a fabricated study whose truth is known, and on single claims made by hand."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from hybrid_scale.runs import RunDirectory, read_json, write_json
from hybrid_scale.statistics import seed_spread
from hybrid_scale.study.family import Family
from hybrid_scale.study.grid import Plan
from hybrid_scale.study.results.collect import collect
from hybrid_scale.study.results.comparisons import Comparison, compare
from hybrid_scale.study.results.crossed import SeedChance, crossed
from hybrid_scale.study.results.primary import Claim, claims, combined, contrast, sorted_out
from hybrid_scale.study.results.scores import METRICS
from hybrid_scale.study.results.trends import Trend, trends
from hybrid_scale.study.results.verdicts import Level, margin_of, verdict
from tests.study.fabricate import TRUE_GAINS, Known, scaled


def judged(plan: Plan) -> tuple[list[Claim], list[Comparison]]:
    known = Known.of(plan)
    return known.claims, known.comparisons


@pytest.fixture(scope="module")
def truth(known: Known) -> tuple[list[Claim], list[Comparison]]:
    return known.claims, known.comparisons


def test_the_verdicts_say_exactly_the_known_truth(truth: tuple[list[Claim], list[Comparison]]) -> None:
    """An effect at 7B that vanishes at 72B, some that stay, some that are null: of each, both claims."""
    said = {(c.task, c.metric.key, c.rival, c.kind): c.outcome for c in truth[0]}
    words = {0: "equivalent", 1: "better", -1: "worse"}
    expected = {}
    for (task, metric, rival), (small, large) in TRUE_GAINS.items():
        expected[task, metric, rival, "difference"] = words[int(np.sign(large))]
        expected[task, metric, rival, "change"] = words[int(np.sign(large - small))]
    assert said == expected
    assert set(expected.values()) == {"equivalent", "better", "worse"}
    for claim in truth[0]:
        small, large = TRUE_GAINS[claim.task, claim.metric.key, claim.rival]
        assert claim.interval is not None
        assert claim.estimate == pytest.approx(large - small if claim.kind == "change" else large, abs=0.004)
        assert claim.models == (("7b", "72b") if claim.kind == "change" else ("72b",))


def test_a_change_is_the_difference_of_both_differences(truth: tuple[list[Claim], list[Comparison]]) -> None:
    for claim in truth[0]:
        if claim.kind == "change":
            first, second = claim.differences
            assert first is not None
            assert second is not None
            assert claim.estimate == pytest.approx(second - first, abs=1e-12)


def test_what_is_claimed_stands_in_the_comparisons_with_the_same_verdict(truth: tuple[list[Claim], list[Comparison]]) -> None:
    found, comparisons = truth
    primary = [each for each in comparisons if each.family == "primary"]
    assert len(primary) == 8
    for each in primary:
        (claim,) = [
            c for c in found if (c.kind, c.task, c.metric.key, c.rival) == ("difference", each.task, each.metric.key, each.rival)
        ]
        assert (each.model, each.arm) == ("72b", "hybrid-0.5")
        assert (each.adjusted, each.outcome, each.p) == (claim.adjusted, claim.outcome, claim.p)
    rest = [each for each in comparisons if each.family == "exploratory"]
    assert len(rest) == 3 * 2 * 7 * 6 - 8
    assert all(each.adjusted is not None and each.p is not None and each.adjusted >= each.p for each in rest)


def test_an_effect_that_ends_at_7b_is_no_straight_line(truth: tuple[list[Claim], list[Comparison]]) -> None:
    found = {(t.task, t.metric.key, t.rival): t for t in trends(truth[1]) if t.arm == "hybrid-0.5"}
    assert found["xquad_r", "mono_map", "cross"].outcome == "no straight line"
    assert found["nq", "ndcg@10", "cross"].outcome == "no straight line"
    for key in ("cross_map", "multi_map"):
        assert found["xquad_r", key, "mono"].outcome == "not shown"


# ------------------------------------------------------------------------------------------------------------ made by hand


def test_two_seeds_judge_no_claim_and_explore_these_runs(tmp_path: Path) -> None:
    found, comparisons = judged(scaled(tmp_path, models=["0.5B", "7B"], seeds=[0, 1], questions=10))
    assert len(found) == 3 * 2 * 2
    assert {claim.outcome for claim in found} == {"not judged"}
    assert {claim.refusal for claim in found} == {"2 seeds of both arms; at least 3 are needed to know the chance of training"}
    assert {each.outcome for each in comparisons if each.family == "primary"} == {"not judged"}
    explored = {each.outcome for each in comparisons if each.family == "exploratory"}
    assert "better in these runs" in explored
    assert not explored & {"better", "worse", "equivalent"}


def test_a_size_that_isnt_finished_leaves_its_claims_in_the_family(tmp_path: Path) -> None:
    plan = scaled(tmp_path, models=["0.5B", "7B"], questions=10)
    for run in plan.runs:
        if run.model == "7B" and run.arm == "mono":
            RunDirectory(run.directory).set_status("failed", reason="x")
    found, _ = judged(plan)
    silent = [claim for claim in found if claim.rival == "mono"]
    assert {claim.outcome for claim in silent} == {"not judged"}
    assert silent[0].refusal == "no seed of hybrid and mono has finished with mono mAP on xquad_r at 7B"
    tested = [claim for claim in found if claim.rival == "cross"]
    largest = min(tested, key=lambda claim: claim.p or 1.0)
    assert largest.p is not None
    assert largest.adjusted == pytest.approx(12 * largest.p), "the six untested ones count"


def line(size: float, cells: np.ndarray, chance: SeedChance | None = None) -> Comparison:
    """A comparison with `cells` [questions, seeds] as its shares."""
    spread = seed_spread(cells.sum(0).tolist())
    table = pd.DataFrame(cells, index=[f"q{n}" for n in range(len(cells))])
    facts = ("x", f"model {size:g}", "", f"{size:g}", size, "hybrid", "mono", "mono", METRICS["ndcg@10"], spread)
    return Comparison(*facts, chance=chance, parts=table)


def test_a_contrast_pairs_questions_and_seeds() -> None:
    """Both sizes share what is hard and their seeds: the change is 0.3 in each cell, so nothing is left to chance."""
    random = np.random.default_rng(0)
    cells = random.normal(0, 1, (20, 3)) / 20
    first, second = line(7e9, cells), line(70e9, (cells + 0.3 / 20)[::-1])
    assert second.parts is not None
    second = replace(second, parts=second.parts.set_axis([f"q{n}" for n in range(19, -1, -1)]))
    both, refusal = contrast([first, second], np.array([-1.0, 1.0]))
    assert both is not None
    assert (both.estimate, refusal) == (pytest.approx(0.3), "")
    assert both.error == pytest.approx(0, abs=1e-12)
    alone = crossed(cells.T)
    assert alone is not None
    assert alone.error > 0.05


def test_what_cant_be_contrasted_says_why() -> None:
    cells = np.random.default_rng(1).normal(0, 1, (6, 3))
    here, there = line(7e9, cells), line(70e9, cells)
    assert there.parts is not None
    minus = np.array([-1.0, 1.0])
    assert combined([here, replace(there, parts=None, refusal="no table")], minus) == (None, "no table")
    other = replace(there, parts=there.parts.rename({"q0": "other"}))
    assert combined([here, other], minus) == (None, "the sizes answered different questions")
    later = replace(there, parts=there.parts.set_axis([3, 4, 5], axis=1))
    assert combined([here, later], minus) == (None, "no seed is finished at every size")
    two = replace(there, parts=there.parts[[0, 1]])
    assert contrast([here, two], minus)[1].startswith("2 seeds of both arms")


def over_sizes(differences: list[float], noise: float, seed: int) -> Trend:
    """A trend over 0.5 to 72B with these differences, 80 questions, three seeds."""
    random = np.random.default_rng(seed)
    sizes = [0.5e9, 1.5e9, 3e9, 7e9, 14e9, 32e9, 72e9]
    members = [
        line(size, (value + random.normal(0, noise, (80, 3))) / 80, SeedChance(2 * noise**2 / 80, 12.0))
        for size, value in zip(sizes, differences, strict=True)
    ]
    return trends(members)[0]


def test_data_that_are_flat_from_3b_on_have_no_slope() -> None:
    """The line alone says "moves against": it falls before 3B only."""
    for seed in range(10):
        found = over_sizes([0.05, 0.035, 0.02, 0.02, 0.02, 0.02, 0.02], 0.01, seed)
        assert found.both is not None
        assert found.both.p < 0.001
        assert found.slope < 0
        assert found.outcome == "no straight line"


def test_a_straight_line_is_called_bent_as_seldom_as_alpha_says() -> None:
    straight = [0.03 - 0.01 * np.log10(size / 3) for size in (0.5, 1.5, 3, 7, 14, 32, 72)]
    found = [over_sizes(straight, 0.02, seed) for seed in range(100)]
    assert sum(each.bent for each in found) <= 100 * 0.05 + 3 * 2.2
    assert sum(each.outcome == "worse" for each in found) > 75


# ----------------------------------------------------------------------------------------------------------- verdicts


def test_a_margin_is_a_share_of_the_rivals_score_and_none_near_chance() -> None:
    assert margin_of([Level(0.72, 0.70, None, 1.0)], 0.01) == pytest.approx(0.007)
    assert margin_of([Level(0.72, 0.70, None, 1.0), Level(0.6, 0.5, None, 1.0)], 0.01) == pytest.approx(0.006)
    assert margin_of([Level(0.0041, 0.0039, None, 1.0)], 0.01) is None, "a random model"
    assert margin_of([Level(0.5, 0.05, None, 1.0)], 0.01) is None
    assert margin_of([Level(0.30, 0.31, 0.25, 1.0)], 0.01) is None, "0.1 of the way from .25 to 1 is .325"
    assert margin_of([Level(0.33, 0.34, 0.25, 1.0)], 0.01) == pytest.approx(0.0034)
    assert margin_of([Level(290.0, 300.0, 8000.0, 0.0)], 0.01) == pytest.approx(3.0)
    assert margin_of([Level(7500.0, 300.0, 8000.0, 0.0)], 0.01) is None
    assert margin_of([Level(290.0, 300.0, None, 0.0)], 0.01) is None, "chance isn't known"
    assert margin_of([], 0.01) is None


def test_chance_is_what_the_results_state(tmp_path: Path) -> None:
    """The same scores: by chance .1 a margin is 1 % of the rival's; where chance is nearly as high, nothing is equivalent. A
    metric whose chance no result states is taken to start at 0, as in results of earlier versions."""
    plan = scaled(tmp_path, models=["7B"], questions=8)
    for run in plan.runs:
        file = RunDirectory(run.directory).evaluation_file("xquad_r")
        content = read_json(file)
        almost = content["metrics"]["cross_map"] - 0.01
        write_json(file, content | {"chance": {"mono_map": 0.1, "cross_map": almost if run.arm == "hybrid" else 0.1}})
    found = compare(collect(plan), {run.id: run.directory for run in plan.runs}, Family(margin=0.01))
    levels = {each.metric.key: (each.level, each.margin) for each in found}
    for key, chance in (("mono_map", 0.1), ("multi_map", None)):
        level, margin = levels[key]
        assert level is not None
        assert level.chance == chance
        assert margin == pytest.approx(0.01 * level.rival)
    assert levels["cross_map"][1] is None


@pytest.mark.parametrize(
    ("gain", "p", "within", "these", "word"),
    [
        (0.1, 0.05, None, False, "better"),
        (-0.1, 0.01, None, False, "worse"),
        (0.1, 0.01, 0.01, False, "better"),
        (0.1, 0.06, 0.05, False, "equivalent"),
        (0.1, 0.06, 0.06, False, "not shown"),
        (0.1, 0.06, None, False, "not shown"),
        (0.1, None, 0.01, False, "not judged"),
        (0.1, 0.01, None, True, "better in these runs"),
        (-0.1, 0.01, None, True, "worse in these runs"),
        (0.1, 0.06, 0.01, True, "not shown"),
    ],
)
def test_one_word_for_each_verdict(gain: float, p: float | None, within: float | None, these: bool, word: str) -> None:
    assert verdict(gain, p, within, these) == word


def test_a_study_without_a_family_explores_everything(tmp_path: Path) -> None:
    plan = scaled(tmp_path, models=["7B"], questions=8)
    collected = collect(plan)
    refused = Family(refusal="no arm of the type hybrid")
    compared = compare(collected, {run.id: run.directory for run in plan.runs}, refused)
    assert claims(refused, collected, compared) == []
    assert {each.family for each in sorted_out(compared, [])} == {"exploratory"}
    assert str(refused) == "no primary family: no arm of the type hybrid; every result is exploratory"

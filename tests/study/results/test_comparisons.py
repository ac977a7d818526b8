from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from hybrid_scale.runs import RunDirectory, read_json, write_json
from hybrid_scale.statistics import Clusters, bootstrap, cluster, seed_spread, sign_flip_test
from hybrid_scale.study.grid import Plan
from hybrid_scale.study.results.collect import collect
from hybrid_scale.study.results.comparisons import Comparison, cautions, compare, uncompared, with_tests
from hybrid_scale.study.results.crossed import clusters_of
from hybrid_scale.study.results.pairing import linear
from hybrid_scale.study.results.scores import METRICS, arms
from tests.study.fabricate import SCORES, fabricated, means_of, save_queries, scaled, single_queries


def compared(plan: Plan) -> list[Comparison]:
    return compare(collect(plan), {run.id: run.directory for run in plan.runs})


def one(found: list[Comparison], rival: str, metric: str, model: str) -> Comparison:
    (each,) = [c for c in found if (c.rival, c.metric.key, c.model) == (rival, metric, model)]
    return each


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    return scaled(tmp_path_factory.mktemp("study"), models=["0.5B", "7B"], questions=12)


@pytest.fixture(scope="module")
def found(study: Plan) -> list[Comparison]:
    return compared(study)


def by_question(arm: str, model: str) -> np.ndarray:
    """Cross mAP of each question by loops: the mean over language pairs, all of which each question has; seed 0."""
    gain = {"cross": (0.0, 0.03, 0.04), "hybrid": (0.02, 0.06, 0.05)}[arm]
    seeds = []
    for seed in (0,):
        table = single_queries(12, float(model.rstrip("B")), gain, seed)
        rows = table[(table["pool"] != "union") & (table["pool"] != table["query_lang"])]
        seeds.append([float(rows[rows["group"] == str(question)]["map"].mean()) for question in range(12)])
    return np.mean(seeds, axis=0)


def test_every_size_rival_and_measure_is_compared(found: list[Comparison]) -> None:
    keys = [(c.model, c.rival, c.metric.key) for c in found]
    measures = ("mono_map", "cross_map", "multi_map", "rank_distance")
    assert keys == [(model, rival, key) for model in ("0.5B", "7B") for rival in ("mono", "cross") for key in measures]
    assert {c.arm for c in found} == {"hybrid"}
    assert [c.size for c in found[::8]] == [pytest.approx(0.494e9, rel=0.01), pytest.approx(7.07e9, rel=0.01)]


def test_with_one_seed_the_test_is_that_of_scipy_over_questions(tmp_path: Path) -> None:
    """Twelve questions: 4,096 sign patterns, all tried by both."""
    ours, theirs = by_question("hybrid", "7B"), by_question("cross", "7B")
    each = one(compared(scaled(tmp_path, models=["7B"], seeds=[0], questions=12)), "cross", "cross_map", "7B")
    assert each.difference == pytest.approx(np.mean(ours - theirs), abs=1e-12)
    expected = stats.permutation_test((ours - theirs,), np.mean, permutation_type="samples", n_resamples=np.inf)
    assert each.test is not None
    assert each.interval is not None
    assert (each.test.exact, each.test.clusters, each.test.p) == (True, 12, pytest.approx(expected.pvalue))
    drawn = stats.bootstrap((ours - theirs,), np.mean, n_resamples=9_999, rng=1).confidence_interval
    width = drawn.high - drawn.low
    assert each.interval.method == "bca"
    assert (each.interval.low, each.interval.high) == (
        pytest.approx(drawn.low, abs=0.06 * width),
        pytest.approx(drawn.high, abs=0.06 * width),
    )


def test_with_three_seeds_p_holds_questions_and_seeds(found: list[Comparison]) -> None:
    each = one(found, "cross", "cross_map", "7B")
    assert each.both is not None
    assert each.test is None
    assert each.p == each.both.p
    assert each.interval is not None
    assert (each.interval.low, each.interval.high, each.interval.method) == (*each.both.interval(), "crossed")
    assert each.chance is not None
    assert each.chance.freedom == 6, "three arms of three seeds"
    assert {c.family for c in found} == {"exploratory"}
    assert {c.outcome for c in found} == {"not judged"}, "nothing is adjusted yet"


def test_seeds_are_paired(study: Plan, found: list[Comparison]) -> None:
    each = one(found, "mono", "multi_map", "0.5B")
    runs = {run.id: run for run in study.runs}
    values = {
        (arm, seed): read_json(RunDirectory(runs[f"0.5B.{arm}.seed-{seed}"].directory).evaluation_file("xquad_r"))["metrics"]
        for arm in ("hybrid", "mono")
        for seed in (0, 1, 2)
    }
    expected = [values["hybrid", seed]["multi_map"] - values["mono", seed]["multi_map"] for seed in (0, 1, 2)]
    assert each.seeds == seed_spread(expected)
    assert each.seeds.count == 3


def test_one_stratum_gives_the_same_bootstrap_and_test() -> None:
    chance = np.random.default_rng(0)
    values, questions, pairs = chance.normal(0.01, 0.1, 240), np.repeat(np.arange(40), 6), np.tile(np.arange(6), 40)
    full = cluster(values, questions, pairs)
    short = linear(full)
    assert short.sums.shape == (40, 1)
    assert short.estimate == pytest.approx(full.estimate, abs=1e-15)
    whole, quick = bootstrap(full), bootstrap(short)
    assert (quick.low, quick.high) == (pytest.approx(whole.low, abs=1e-12), pytest.approx(whole.high, abs=1e-12))
    assert sign_flip_test(short).p == sign_flip_test(full).p


def test_unequal_strata_are_left_as_they_are() -> None:
    values = cluster(np.array([1.0, 2, 3]), ["a", "a", "b"], ["x", "y", "x"])
    assert linear(values) is values


MEANS = Comparison("x", "", "", "m", None, "hybrid", "mono", "mono", METRICS["mono_map"], seed_spread([0.01, 0.02, 0.03]))


def constant(value: float, spread: float, count: int = 30) -> Clusters:
    return cluster(value + spread * np.resize([1.0, -1.0], count), np.arange(count))


@pytest.mark.parametrize(
    ("value", "spread", "outcome"),
    [(0.02, 0.01, "better in these runs"), (-0.02, 0.01, "worse in these runs"), (0.0001, 0.001, "not shown")],
)
def test_one_seed_speaks_of_these_runs_and_of_no_claim(value: float, spread: float, outcome: str) -> None:
    each = with_tests(replace(MEANS, seeds=seed_spread([value])), constant(value, spread))
    assert each.p == each.test.p if each.test else None
    each = replace(each, adjusted=each.p)
    assert each.outcome == outcome
    primary = replace(each, family="primary")
    assert primary.outcome == "not judged"
    assert primary.reason == "1 seed of both arms; at least 3 are needed to know the chance of training"


def test_lower_is_better_for_rank_distance() -> None:
    each = with_tests(replace(MEANS, metric=METRICS["rank_distance"], seeds=seed_spread([-20.0])), constant(-20, 5))
    assert replace(each, adjusted=0.001).outcome == "better in these runs"


def test_missing_tables_leave_the_means_and_say_so(tmp_path: Path) -> None:
    found = compared(fabricated(tmp_path, SCORES))
    assert {c.outcome for c in found} == {"not judged"}
    assert {c.reason for c in found} == {c.refusal for c in found}
    assert "no table of single queries for hybrid.seed-0, mono.seed-0, hybrid.seed-1" in found[0].refusal
    assert found[0].difference == pytest.approx((0.7977 - 0.7918) * 1.001)
    assert found[0].seeds.count == 2
    said = cautions(found)
    assert sum("no table" in text for text in said) == 2
    assert "8 of 8 comparisons rest on 2 seeds: at least 3 are needed" in said[-1]


@pytest.mark.parametrize("trouble", ["other set", "other queries", "broken"])
def test_tables_that_cant_be_paired_are_refused(tmp_path: Path, trouble: str) -> None:
    plan = scaled(tmp_path, models=["7B"], seeds=[0], questions=8)
    directory = RunDirectory(plan.runs[0].directory)
    table = single_queries(8 if trouble != "other queries" else 9, 7, (0.02, 0, 0), 0)
    file = save_queries(directory, "xquad_r", table, "beef" if trouble == "other set" else "f00d")
    stated = read_json(directory.evaluation_file("xquad_r"))
    write_json(directory.evaluation_file("xquad_r"), {key: value for key, value in stated.items() if key != "fingerprint"})
    if trouble == "broken":
        file.write_bytes(b"PAR1")
    found = compared(plan)
    if trouble == "other queries":  # the means are then not those of the table: the run has no part in anything
        assert {c.rival for c in found} == {"cross"}
        return
    against_mono, against_cross = found[0], found[4]
    rule = {"other set": "different versions of the set", "broken": "not a Parquet file"}[trouble]
    assert rule in against_mono.refusal
    assert against_cross.test is not None


def test_a_seed_that_one_arm_lacks_is_told_and_the_rest_is_compared(tmp_path: Path) -> None:
    plan = scaled(tmp_path, models=["7B"], questions=8)
    (lost,) = (run for run in plan.runs if run.id == "7B.mono.seed-1")
    RunDirectory(lost.directory).set_status("failed", reason="x")
    found = compared(plan)
    assert [(c.rival, c.seeds.count, c.alone) for c in found] == [("mono", 2, (1,))] * 4 + [("cross", 3, ())] * 4
    assert found[0].test is not None
    assert found[0].both is None, "two seeds are too few"
    assert "left out: hybrid minus mono (model 7B) without seed 1" in cautions(found)[0]
    for run in plan.runs:
        if run.arm == "mono":
            RunDirectory(run.directory).set_status("failed", reason="x")
    collected = collect(plan)
    assert uncompared(arms(collected, "xquad_r")) == ["hybrid minus mono (model 7B)"]
    assert {c.rival for c in compared(plan)} == {"cross"}


def test_a_difference_within_the_chance_of_seeds_is_called_so(tmp_path: Path) -> None:
    """Every question agrees within each seed, but seeds go apart by ten times as much."""
    plan = scaled(tmp_path, models=["7B"], questions=20)
    for run in plan.runs:
        if run.arm == "hybrid":
            table = single_queries(20, 7, (0.02, 0.02 + 0.06 * (run.seed - 0.5), 0.05), run.seed)
            directory = RunDirectory(run.directory)
            save_queries(directory, "xquad_r", table)
            content = read_json(directory.evaluation_file("xquad_r")) | {"metrics": means_of(table)}
            write_json(directory.evaluation_file("xquad_r"), content)
    each = one(compared(plan), "mono", "cross_map", "7B")
    assert each.parts is not None
    assert sign_flip_test(clusters_of(each.parts.mean(axis=1).to_numpy())).p < 0.001, "the questions agree"
    assert each.p is not None
    assert each.p > 0.1, "the seeds don't"


def test_tables_in_another_order_are_paired_by_query(tmp_path: Path) -> None:
    plan = scaled(tmp_path, models=["7B"], questions=6)
    before = compared(plan)
    file = RunDirectory(plan.runs[4].directory).evaluation_file("xquad_r").with_suffix(".parquet")
    save_queries(RunDirectory(plan.runs[4].directory), "xquad_r", pd.read_parquet(file).sample(frac=1, random_state=0))
    after = compared(plan)
    assert [(c.difference, c.outcome) for c in after] == [(c.difference, c.outcome) for c in before]
    for ours, theirs in zip(after, before, strict=True):
        assert ours.p == pytest.approx(theirs.p)
        assert ours.interval is not None
        assert theirs.interval is not None
        assert (ours.interval.low, ours.interval.high) == pytest.approx((theirs.interval.low, theirs.interval.high))
        pd.testing.assert_frame_equal(ours.parts, theirs.parts)

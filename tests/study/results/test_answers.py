from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from hybrid_scale.runs import RunDirectory, read_json, write_json
from hybrid_scale.statistics import Interval, bootstrap, seed_spread
from hybrid_scale.statistics import Test as Paired
from hybrid_scale.study.grid import Plan
from hybrid_scale.study.results.answers import Answer, answers, in_words
from hybrid_scale.study.results.collect import collect
from hybrid_scale.study.results.comparisons import Comparison
from hybrid_scale.study.results.crossed import Crossed
from hybrid_scale.study.results.fits import power_law
from hybrid_scale.study.results.pairing import linear
from hybrid_scale.study.results.queries import clusters, read_queries
from hybrid_scale.study.results.scaling import Law, Priced, laws, priced
from hybrid_scale.study.results.scores import METRICS
from hybrid_scale.study.results.trends import trends
from tests.study.fabricate import means_of, save_queries, scaled, single_queries

NO_RUNS = pd.DataFrame(columns=["gpu", "predicted_step_seconds", "median_step_seconds", "predicted_gib", "peak_gib"])


def comparison(
    model: str, size: float, difference: float, p: float | None, seeds: int = 3, metric: str = "cross_map"
) -> Comparison:
    spread = seed_spread([difference - 0.001, difference, difference + 0.001][:seeds])
    means = Comparison("set", f"model {model}", "", model, size, "hybrid", "mono", "mono", METRICS[metric], spread)
    if p is None:
        return replace(means, refusal="no table")
    interval = Interval(difference, difference - 0.01, difference + 0.01, 0.95, 50, "bca")
    both = Crossed(difference, 0.005, 20.0, seeds, 50) if seeds > 2 else None
    return replace(means, interval=interval, test=Paired(difference, p / 2, 50, False), adjusted=p, both=both)


def said(
    comparisons: list[Comparison] | None = None,
    found: list[Law] | None = None,
    points: list[Priced] | None = None,
) -> list[Answer]:
    return answers(NO_RUNS, comparisons or [], trends(comparisons or []), found or [], points or [])


def test_how_often_hybrid_wins_is_counted() -> None:
    three = [comparison("a", 1e9, 0.03, 0.001), comparison("b", 2e9, -0.02, 0.01), comparison("c", 4e9, 0.001, 0.8)]
    size, trade = said(three)
    assert trade.topic == "Hybrid against mono on set, 3 pairs of arms over 3 models"
    assert trade.points == ("cross mAP: better in 1 of 3, worse in 1 of 3, not shown in 1 of 3 (-0.0200 to +0.0300)",)
    assert "exploratory, p < 0.05 after Benjamini-Hochberg" in trade.caution
    assert size.topic == "Over the sizes, on set"
    assert size.points == (
        "hybrid minus mono, cross mAP: not judged, -0.0482 for ten times the parameters "
        "(+0.0300 [+0.0200, +0.0400] at 1 B, +0.0010 [-0.0090, +0.0110] at 4 B)",
    )


def test_few_seeds_are_said() -> None:
    (one,) = said([comparison("a", 1e9, 0.03, 0.001, seeds=1)])
    assert one.points == ("cross mAP: better in these runs (+0.0290 [+0.0200, +0.0400])",)
    assert "All rest on fewer than 3 seeds" in one.caution


def test_what_wasnt_tested_is_called_so() -> None:
    (one,) = said([comparison("a", 1e9, -20.0, None, metric="rank_distance")])
    assert one.points == ("rank distance: not judged (-20.0)",)
    two = said([comparison("a", 1e9, 0.03, None), comparison("b", 2e9, -0.03, None)])[1]
    assert two.points == ("cross mAP: difference -0.0300 to +0.0300, 1 of 2 in hybrid's favour, not judged",)


def test_an_exponent_is_said_with_its_interval_or_refused_with_its_reason() -> None:
    sizes = [1e9, 2e9, 4e9, 8e9, 16e9]
    good = Law("set", "", "hybrid", "error", power_law(sizes, [0.5 * size**-0.25 for size in sizes]))
    few = Law("set", "", "mono", "error", power_law(sizes[:3], [0.3, 0.2, 0.1]))
    (answer,) = said(found=[good, few])
    assert answer.points == ("error of hybrid: exponent 0.25 [0.25, 0.25]", "1 of 2 fits say nothing and are refused")
    assert said(found=[few])[0].points == ("No exponent is stated: 3 sizes; an exponent needs at least 4",)


def test_the_front_is_named() -> None:
    base = Priced("set", "7B", "a", METRICS["multi_map"], 0.5, None, 1.0, None, "on the front")
    points = [base, replace(base, arm="b", quality=0.6, device_hours=2.0), replace(base, arm="c", by_hours="overlaps the front")]
    (answer,) = said(points=points)
    assert answer.points == (
        "Best multi mAP for its CPU process-hours: a (0.5000 for 1), b (0.6000 for 2)",
        "1 of the 1 others can't be told from that front",
    )
    assert answer.caution == "3 of 3 points have no interval."


def test_the_planners_error_is_the_median_over_runs() -> None:
    columns = {"predicted_step_seconds": [1.0, 1.2, 0.5], "median_step_seconds": [1.0] * 3}
    runs = pd.DataFrame({"gpu": [True] * 3, **columns, "predicted_gib": [9.0, 10.0, 12.0], "peak_gib": [10.0] * 3})
    (answer,) = answers(runs, [], [], [], [])
    assert answer.points == ("The planner's seconds a step were off by 20% (median of 3 runs), its memory by 10%",)


@pytest.mark.parametrize(
    ("size", "words"), [(8030261248, "8.03 B"), (494e6, "494 M"), (836992, "837 k"), (12, "12"), (70.6e9, "70.6 B")]
)
def test_sizes_in_words(size: float, words: str) -> None:
    assert in_words(size) == words


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    return scaled(tmp_path_factory.mktemp("study"), models=["0.5B", "1.5B", "7B", "72B"], seeds=[0], questions=8)


def test_laws_are_fitted_to_the_means_of_each_arm(study: Plan) -> None:
    collected = collect(study)
    found = laws(collected)
    assert len(found) == 3 * 4
    gap = next(law for law in found if law.arm == "mono" and law.quantity.startswith("gap"))
    table = collected.values[collected.values["final"] & collected.values["language"].isna()].merge(collected.runs, on="run")
    mono = table[(table["arm"] == "mono")].pivot_table(index="size", columns="metric", values="value")
    assert gap.law.values == pytest.approx(tuple(mono["mono_map"] - mono["cross_map"]))
    assert gap.law.sizes == tuple(mono.index)


def test_costs_and_places_of_a_study(study: Plan) -> None:
    found = priced(collect(study), {run.id: run.directory for run in study.runs})
    assert [(each.model, each.arm) for each in found][:4] == [
        ("0.5B", "mono"),
        ("0.5B", "cross"),
        ("0.5B", "hybrid"),
        ("1.5B", "mono"),
    ]
    # equal cost within a model, and hybrid is best by construction: .05 above mono, .01 above cross
    assert {each.by_hours for each in found if each.arm == "hybrid"} == {"on the front"}
    assert "on the front" not in {each.by_hours for each in found if each.arm != "hybrid"}
    first = found[0]
    assert first.device_hours == pytest.approx((0.5 + 0.4 * 0.5) * 20 * 8 / 3600)
    assert first.peak_gib == pytest.approx(1.0 + 0.9 * 0.5)
    values = read_queries(study.runs[0].directory / "eval" / "xquad_r.parquet").values("multi_map")
    assert values is not None
    questions = clusters(values)
    assert questions is not None
    own = bootstrap(linear(questions))
    assert first.interval is not None
    assert (first.interval.low, first.interval.high) == (pytest.approx(own.low), pytest.approx(own.high))


@pytest.mark.parametrize(("less", "place"), [(0.02, "behind the front"), (0.0003, "overlaps the front")])
def test_a_front_is_judged_by_the_paired_difference(tmp_path: Path, less: float, place: str) -> None:
    """Marginal intervals hold how hard questions are and overlap both times; the difference on each question tells."""
    plan = scaled(tmp_path, models=["7B"], questions=30)
    for run in plan.runs:
        if run.arm != "hybrid":
            table = single_queries(30, 7, (0.02, 0.06, 0.05 - less if run.arm == "mono" else 0.0), run.seed)
            save_queries(RunDirectory(run.directory), "xquad_r", table)
            content = read_json(RunDirectory(run.directory).evaluation_file("xquad_r")) | {"metrics": means_of(table)}
            write_json(RunDirectory(run.directory).evaluation_file("xquad_r"), content)
    found = {each.arm: each for each in priced(collect(plan), {run.id: run.directory for run in plan.runs})}
    other, best = sorted((found["mono"], found["hybrid"]), key=lambda each: each.quality)
    assert best.interval is not None
    assert other.interval is not None
    assert other.interval.high > best.interval.low, "the intervals overlap"
    assert (best.by_hours, other.by_hours) == ("on the front", place)

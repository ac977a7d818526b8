"""Numbers of a report against the same from its Parquet tables by pandas and scipy, with none of the project's statistics."""

import html
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from hybrid_scale.runs import read_json
from hybrid_scale.study.grid import Plan
from hybrid_scale.study.report.page import report
from tests.study.fabricate import scaled

SIZES = {"0.5B": 0.494e9, "1.5B": 1.54e9, "7B": 7.07e9, "32B": 32.5e9}
KEY = ["model", "rival", "measure"]


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    plan = scaled(tmp_path_factory.mktemp("study"), models=list(SIZES), questions=14, seeds=(0, 1, 2))
    report(plan)
    return plan


def cells(study: Plan) -> pd.DataFrame:
    """Each parallel question's value of each measure, run by run."""
    rows = []
    for run in study.runs:
        table = pd.read_parquet(run.directory / "eval" / "xquad_r.parquet")
        union, own = table["pool"] == "union", table["pool"] == table["query_lang"]
        chosen = {"mono_map": ("map", own), "cross_map": ("map", ~own & ~union), "multi_map": ("map", union)}
        for measure, (column, which) in {**chosen, "rank_distance": ("rank_distance", union)}.items():
            by_question = table[which].groupby("group")[column].mean()  # every question has every language: plain means are macro
            about = {"model": run.model, "arm": run.arm, "seed": run.seed, "measure": measure}
            rows.append(by_question.rename("value").reset_index().assign(**about))
    return pd.concat(rows)


@pytest.fixture(scope="module")
def differences(study: Plan) -> pd.DataFrame:
    """Hybrid minus rival by model, rival, measure, seed and question."""
    wide = cells(study).pivot_table(index=["model", "measure", "seed", "group"], columns="arm", values="value")
    found = [(wide["hybrid"] - wide[rival]).rename("value").reset_index().assign(rival=rival) for rival in ("mono", "cross")]
    return pd.concat(found)


def table(study: Plan, name: str) -> pd.DataFrame:
    return pd.read_csv(study.directory / name)


def benjamini_hochberg(p: pd.Series) -> pd.Series:
    """Smallest of n p / rank from here on."""
    ordered, adjusted, least = p.sort_values(ascending=False), {}, 1.0
    for rank, (index, value) in zip(range(len(p), 0, -1), ordered.items(), strict=True):
        least = min(least, len(p) / rank * value)
        adjusted[index] = least
    return pd.Series(adjusted).reindex(p.index)


def two_way(cell: pd.DataFrame, of_seeds: float, freedom: float) -> tuple[float, float, float]:
    """95 % of questions and seeds, and p; `cell`: rows are questions, columns seeds; variance of a seed's mean from all arms.

    Three arms of three seeds: 6 degrees of freedom, too few for Satterthwaite's approximation, so the test has no more.
    """
    questions, seeds = cell.shape
    mean = cell.to_numpy().mean()
    rest = cell.sub(cell.mean(axis=1), axis=0).sub(cell.mean(axis=0), axis=1) + mean
    square_questions, square_seeds = seeds * cell.mean(axis=1).var(ddof=1), questions * cell.mean(axis=0).var(ddof=1)
    square_rest = float((rest**2).to_numpy().sum() / ((questions - 1) * (seeds - 1)))
    square_seeds = max(square_seeds, questions * of_seeds)
    square = max(square_questions + square_seeds - square_rest, square_questions, square_seeds)
    if freedom > 10:
        satterthwaite = square_questions**2 / (questions - 1) + square_seeds**2 / freedom
        satterthwaite += square_rest**2 / ((questions - 1) * (seeds - 1))
        freedom = max(square**2 / satterthwaite, min(freedom, questions - 1))
    error = (square / questions / seeds) ** 0.5
    low, high = stats.t.interval(0.95, freedom, mean, error)
    return float(low), float(high), float(2 * stats.t.sf(abs(mean) / error, freedom))


def of_seeds(study: Plan) -> pd.Series:
    """Variance of the difference of two arms between seeds, by model and measure, from the means of all arms."""
    means = cells(study).groupby(["model", "measure", "arm", "seed"])["value"].mean()
    variances: pd.Series = 2 * means.groupby(["model", "measure", "arm"]).var(ddof=1).groupby(["model", "measure"]).mean()
    return variances


def test_differences_tests_and_intervals(study: Plan, differences: pd.DataFrame) -> None:
    stated, variances = table(study, "comparisons.csv").set_index(KEY), of_seeds(study)
    assert len(stated) == len(SIZES) * 2 * 4
    for key, rows in differences.groupby(KEY):
        line = stated.loc[key]
        cell = rows.pivot_table(index="group", columns="seed", values="value")
        by_question = cell.mean(axis=1).to_numpy()
        assert line["difference"] == pytest.approx(by_question.mean(), abs=1e-12)
        assert (line["questions"], line["seeds"]) == (14, 3)
        spread = stats.t.interval(0.95, 2, cell.mean().mean(), stats.sem(cell.mean()))
        assert (line["seeds_low"], line["seeds_high"]) == (pytest.approx(spread[0]), pytest.approx(spread[1]))
        expected = two_way(cell, variances[key[0], key[2]], 6)
        assert (line["low"], line["high"], line["p"]) == tuple(map(pytest.approx, expected))
        assert line["chance"] == "questions and seeds"
    explored = stated[stated["family"] == "exploratory"]
    expected = benjamini_hochberg(explored["p"])
    pd.testing.assert_series_equal(explored["p_adjusted"], expected, check_names=False)


def test_the_primary_family(study: Plan, differences: pd.DataFrame) -> None:
    """At the largest size, and the change from the smallest: Holm over all twelve, whose p hold questions and seeds."""
    stated, variances = table(study, "primary.csv"), of_seeds(study)
    assert len(stated) == 2 * 3 * 2
    expected = []
    for line in stated.to_dict("records"):
        rows = differences[(differences["rival"] == line["rival"]) & (differences["measure"] == line["metric"])]
        wide = rows.pivot_table(index="group", columns=["model", "seed"], values="value")
        larger, smaller = (variances[model, line["metric"]] for model in ("32B", "0.5B"))
        if line["claim"] == "difference":
            cell, chance = wide["32B"], (larger, 6)
        else:
            cell = wide["32B"] - wide["0.5B"]
            chance = (larger + smaller, (larger + smaller) ** 2 / (larger**2 / 6 + smaller**2 / 6))
        assert line["estimate"] == pytest.approx(cell.to_numpy().mean())
        low, high, p = two_way(cell, *chance)
        assert (line["low"], line["high"], line["p"]) == (pytest.approx(low), pytest.approx(high), pytest.approx(p))
        expected.append(p)
    order, adjusted, worst = np.argsort(expected), np.empty(12), 0.0
    for rank, place in enumerate(order):
        worst = max(worst, min(1.0, (12 - rank) * expected[place]))
        adjusted[place] = worst
    assert stated["p_holm"].tolist() == pytest.approx(adjusted.tolist())


def test_verdicts_follow_from_the_numbers(study: Plan) -> None:
    both = [*table(study, "comparisons.csv").to_dict("records"), *table(study, "primary.csv").to_dict("records")]
    for line in both:
        change = line.get("difference", line.get("estimate"))
        adjusted = line.get("p_adjusted", line.get("p_holm"))
        gain = -change if line.get("measure") == "rank_distance" else change
        if adjusted <= 0.05:
            assert line["verdict"] == ("better" if gain > 0 else "worse")
        else:
            assert line["verdict"] in ("not shown", "equivalent")
        within = line.get("p_equivalent_adjusted", line.get("p_equivalent_holm"))
        assert (line["verdict"] == "equivalent") == (adjusted > 0.05 and within <= 0.05)


def cell_of(rows: pd.DataFrame, sizes: pd.Series, degree: int) -> pd.DataFrame:
    """Highest coefficient of each question's and seed's polynomial over log10(parameters), by numpy's own fit."""
    wide = rows.pivot_table(index="model", columns=["group", "seed"], values="value")
    x = np.log10(sizes[wide.index].astype(float))
    return pd.Series(np.polyfit(x, wide.to_numpy(), degree)[0], index=wide.columns).unstack("seed")


def test_slopes_over_size(study: Plan, differences: pd.DataFrame) -> None:
    stated, variances = table(study, "trends.csv").set_index(["rival", "measure"]), of_seeds(study)
    sizes = table(study, "comparisons.csv").groupby("model")["parameters"].first()
    assert {name: round(sizes[name] / size, 1) for name, size in SIZES.items()} == dict.fromkeys(SIZES, 1.0)
    for key, rows in differences.groupby(["rival", "measure"]):
        line = stated.loc[key]
        means = rows.groupby("model")["value"].mean()
        fit = stats.linregress(np.log10(sizes[means.index].astype(float)), means)
        assert line["slope_per_tenfold"] == pytest.approx(fit.slope, abs=1e-12)
        cell = cell_of(rows, sizes, 1)
        x = np.log10(sizes[means.index].astype(float))
        weights = (x - x.mean()) / ((x - x.mean()) ** 2).sum()
        bends = cell_of(rows, sizes, 2)
        parabola = np.linalg.inv(np.vander(x, 3).T @ np.vander(x, 3)) @ np.vander(x, 3).T
        squares = np.array([variances[model, key[1]] for model in means.index]) * parabola[0] ** 2
        expected = two_way(bends, squares.sum(), squares.sum() ** 2 / (squares**2 / 6).sum())
        assert line["p_curvature"] == pytest.approx(expected[2])
        shares = np.array([weights[model] ** 2 * variances[model, key[1]] for model in means.index])
        expected = two_way(cell, shares.sum(), shares.sum() ** 2 / (shares**2 / 6).sum())
        assert (line["low"], line["high"], line["p"]) == tuple(map(pytest.approx, expected))
    expected = benjamini_hochberg(stated["p"])
    pd.testing.assert_series_equal(stated["p_adjusted"], expected, check_names=False)


def test_power_laws(study: Plan) -> None:
    stated = table(study, "power_laws.csv")
    means = cells(study).groupby(["arm", "measure", "model"])["value"].mean()
    for (arm, quantity), rows in stated.groupby(["arm", "quantity"]):
        measure = re.search(r"(mono|cross|multi) mAP$", quantity)
        assert measure is not None
        values = 1 - means[arm, f"{measure[1]}_map"][list(SIZES)]
        if quantity.startswith("gap"):
            values = means[arm, "mono_map"][list(SIZES)] - means[arm, "cross_map"][list(SIZES)]
        assert rows["value"].tolist() == pytest.approx(values.tolist())
        if (values > 0).all():
            fit = stats.linregress(np.log(rows["parameters"]), np.log(values))
            assert rows["exponent"].iloc[0] == pytest.approx(-fit.slope)
            refused = bool(rows["refusal"].iloc[0] == rows["refusal"].iloc[0] and rows["refusal"].iloc[0])
            assert refused or rows["low"].iloc[0] <= -fit.slope <= rows["high"].iloc[0]


def test_the_page_shows_these_numbers(study: Plan) -> None:
    page = re.sub(r"\s+", " ", html.unescape((study.directory / "report.html").read_text(encoding="utf-8")))
    for line in table(study, "comparisons.csv").to_dict("records"):
        places = 1 if line["measure"] == "rank_distance" else 4
        assert f"[{line['low']:+.{places}f}, {line['high']:+.{places}f}]" in page
    scores = cells(study).groupby(["arm", "measure", "model", "seed"])["value"].mean()
    for (arm, measure, model), seeds in scores.groupby(["arm", "measure", "model"]):
        if measure.endswith("_map"):
            assert f"{seeds.mean():.4f}" in page, (arm, measure, model)
    for run in study.runs:
        stored = read_json(run.directory / "eval" / "xquad_r.json")["metrics"]
        assert stored["cross_map"] == pytest.approx(scores[run.arm, "cross_map", run.model, run.seed])
    files = {path.name for path in Path(study.directory).iterdir()}
    assert {"comparisons.csv", "trends.csv", "power_laws.csv", "study.csv", "study.parquet", "report.html"} <= files

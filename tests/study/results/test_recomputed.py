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


def flips(values: np.ndarray) -> float:
    """p of the sign-flip test: the share of resamples at least as far from 0, here of all or of 40,000."""
    signs = np.random.default_rng(5).choice([-1.0, 1.0], (40_000, len(values)))
    return float((np.abs(signs @ values) >= abs(values.sum()) - 1e-12).mean())


def holm(p: pd.Series) -> pd.Series:
    """Largest of (n - rank) p so far, at most 1."""
    ordered, adjusted, worst = p.sort_values(), {}, 0.0
    for rank, (index, value) in enumerate(ordered.items()):
        worst = max(worst, (len(p) - rank) * value)
        adjusted[index] = min(1.0, worst)
    return pd.Series(adjusted).reindex(p.index)


def two_way(cell: pd.DataFrame) -> tuple[float, float]:
    """95 % of questions and seeds; `cell`: rows are questions, columns seeds."""
    questions, seeds = cell.shape
    mean = cell.to_numpy().mean()
    rest = cell.sub(cell.mean(axis=1), axis=0).sub(cell.mean(axis=0), axis=1) + mean
    square_questions, square_seeds = seeds * cell.mean(axis=1).var(ddof=1), questions * cell.mean(axis=0).var(ddof=1)
    square_rest = float((rest**2).to_numpy().sum() / ((questions - 1) * (seeds - 1)))
    whole = square_questions + square_seeds - square_rest
    freedom = whole**2 / (
        square_questions**2 / (questions - 1) + square_seeds**2 / (seeds - 1) + square_rest**2 / ((questions - 1) * (seeds - 1))
    )
    largest = max((whole, freedom), (square_questions, questions - 1), (square_seeds, seeds - 1))
    low, high = stats.t.interval(0.95, largest[1], mean, (largest[0] / questions / seeds) ** 0.5)
    return float(low), float(high)


def test_differences_tests_and_intervals(study: Plan, differences: pd.DataFrame) -> None:
    stated = table(study, "comparisons.csv").set_index(KEY)
    assert len(stated) == len(SIZES) * 2 * 4
    for key, rows in differences.groupby(KEY):
        line = stated.loc[key]
        cell = rows.pivot_table(index="group", columns="seed", values="value")
        by_question = cell.mean(axis=1).to_numpy()
        assert line["difference"] == pytest.approx(by_question.mean(), abs=1e-12)
        assert (line["questions"], line["seeds"]) == (14, 3)
        assert line["p"] == pytest.approx(flips(by_question), abs=0.01)
        spread = stats.t.interval(0.95, 2, cell.mean().mean(), stats.sem(cell.mean()))
        assert (line["seeds_low"], line["seeds_high"]) == (pytest.approx(spread[0]), pytest.approx(spread[1]))
        assert (line["both_low"], line["both_high"]) == tuple(map(pytest.approx, two_way(cell)))
        drawn = stats.bootstrap((by_question,), np.mean, n_resamples=4_999, rng=2).confidence_interval
        width = drawn.high - drawn.low
        assert (line["low"], line["high"]) == (
            pytest.approx(drawn.low, abs=0.1 * width),
            pytest.approx(drawn.high, abs=0.1 * width),
        )
    pd.testing.assert_series_equal(stated["p_holm"], holm(stated["p"]), check_names=False)


def test_verdicts_follow_from_the_numbers(study: Plan) -> None:
    for line in table(study, "comparisons.csv").to_dict("records"):
        gain = -line["difference"] if line["measure"] == "rank_distance" else line["difference"]
        if line["p_holm"] <= 0.05:
            sure = line["both_low"] > 0 or line["both_high"] < 0
            assert line["verdict"] == (("better" if gain > 0 else "worse") if sure else "these seeds only")
        else:
            assert line["verdict"] in ("not shown", "equivalent")


def test_slopes_over_size(study: Plan, differences: pd.DataFrame) -> None:
    stated = table(study, "trends.csv").set_index(["rival", "measure"])
    sizes = table(study, "comparisons.csv").groupby("model")["parameters"].first()
    assert {name: round(sizes[name] / size, 1) for name, size in SIZES.items()} == dict.fromkeys(SIZES, 1.0)
    for key, rows in differences.groupby(["rival", "measure"]):
        line = stated.loc[key]
        means = rows.groupby("model")["value"].mean()
        fit = stats.linregress(np.log10(sizes[means.index].astype(float)), means)
        assert line["slope_per_tenfold"] == pytest.approx(fit.slope, abs=1e-12)
        cell = pd.DataFrame(
            {
                seed: of_seed.pivot_table(index="group", columns="model", values="value").apply(
                    lambda row: stats.linregress(np.log10(sizes[row.index].astype(float)), row).slope, axis=1
                )
                for seed, of_seed in rows.groupby("seed")
            }
        )
        assert line["p"] == pytest.approx(flips(cell.mean(axis=1).to_numpy()), abs=0.01)
        assert (line["both_low"], line["both_high"]) == tuple(map(pytest.approx, two_way(cell)))
    pd.testing.assert_series_equal(stated["p_holm"], holm(stated["p"]), check_names=False)


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
        for low, high in (("low", "high"), ("both_low", "both_high")):
            assert f"[{line[low]:+.{places}f}, {line[high]:+.{places}f}]" in page
    scores = cells(study).groupby(["arm", "measure", "model", "seed"])["value"].mean()
    for (arm, measure, model), seeds in scores.groupby(["arm", "measure", "model"]):
        if measure.endswith("_map"):
            assert f"{seeds.mean():.4f}" in page, (arm, measure, model)
    for run in study.runs:
        stored = read_json(run.directory / "eval" / "xquad_r.json")["metrics"]
        assert stored["cross_map"] == pytest.approx(scores[run.arm, "cross_map", run.model, run.seed])
    files = {path.name for path in Path(study.directory).iterdir()}
    assert {"comparisons.csv", "trends.csv", "power_laws.csv", "study.csv", "study.parquet", "report.html"} <= files

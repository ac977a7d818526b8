"""The null simulation of `benchmarks/null.py` in short: studies without any difference say that there is none."""

import gc
import json
import re
from collections.abc import Iterator

import pytest
from scipy import stats

from benchmarks.null import World, limit, row
from tests.test_floors import ROOT


@pytest.fixture(autouse=True)
def cheap_collections() -> Iterator[None]:
    """statsmodels collects garbage in each Holm correction, which takes long with all test modules loaded."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.parametrize("seed_sd", [0.0, 0.004, 0.008])
def test_studies_without_a_difference_claim_none(seed_sd: float) -> None:
    """20 studies of 36 false claims: more than 4 with a claim have a chance of 0.003 where the error is 0.05."""
    found = row(World(seed_sd), studies=20, seed=3)
    assert found["now_family_wise"] * 20 <= stats.binom.ppf(0.997, 20, 0.05)
    assert found["false_equivalence_family_wise"] * 20 <= stats.binom.ppf(0.997, 20, 0.05)
    if seed_sd == 0.008:
        assert found["before_family_wise"] > 0.5, "the rule before claimed a difference in most studies"


def test_the_page_shows_what_was_measured() -> None:
    measured = json.loads((ROOT / "benchmarks/results/null.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs/statistics.md").read_text(encoding="utf-8")
    shown = [re.findall(r"\d\.\d+", line)[1:] for line in page.splitlines() if re.match(r"\| 0\.\d{3}", line)]
    names = ("before", "now", "false_equivalence")
    assert shown == [
        [
            shape.format(found[f"{name}_{what}"])
            for name in names
            for what, shape in (("family_wise", "{:.3f}"), ("a_study", "{:.2f}"))
        ]
        for found in measured["rows"]
    ]
    assert {found["studies"] for found in measured["rows"]} == {300}
    assert f"{limit(300):.3f}" == "0.075"
    assert f"{measured['limit']:.3f}" in page

"""The null simulation of `benchmarks/null.py` in short: studies without any difference say that there is none."""

import gc
from collections.abc import Iterator

import pytest
from scipy import stats

from benchmarks.null import World, row


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

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from statsmodels.regression.mixed_linear_model import MixedLM

from hybrid_scale.statistics import bootstrap, cluster, sign_flip_test, standard_error
from hybrid_scale.study.results.crossed import Crossed, SeedChance, clusters_of, crossed, parts_of


def table(
    seeds: int, questions: int, by_seed: float, by_question: float, rest: float, chance: int = 0, mean: float = 0.0
) -> np.ndarray:
    random = np.random.default_rng(chance)
    cells = mean + by_seed * random.normal(size=(seeds, 1)) + by_question * random.normal(size=(1, questions))
    return (cells + rest * random.normal(size=(seeds, questions))) / questions


def by_hand(parts: np.ndarray) -> tuple[float, float]:
    """Standard error and degrees of freedom by loops over a two-way table without replication."""
    seeds, questions = parts.shape
    cells = [[parts[s][q] * questions for q in range(questions)] for s in range(seeds)]
    rows = [sum(row) / questions for row in cells]
    columns = [sum(cells[s][q] for s in range(seeds)) / seeds for q in range(questions)]
    mean = sum(rows) / seeds
    of_seeds = questions * sum((row - mean) ** 2 for row in rows) / (seeds - 1)
    of_questions = seeds * sum((column - mean) ** 2 for column in columns) / (questions - 1)
    left = sum((cells[s][q] - rows[s] - columns[q] + mean) ** 2 for s in range(seeds) for q in range(questions))
    left /= (seeds - 1) * (questions - 1)
    square = (of_seeds + of_questions - left) / (seeds * questions)
    freedom = (of_seeds + of_questions - left) ** 2 / (
        of_seeds**2 / (seeds - 1) + of_questions**2 / (questions - 1) + left**2 / ((seeds - 1) * (questions - 1))
    )
    return square**0.5, freedom


def test_it_is_the_two_way_table_by_hand() -> None:
    parts = table(12, 30, 0.1, 0.1, 0.05)
    error, freedom = by_hand(parts)
    found = crossed(parts)
    assert found is not None
    assert (found.error, found.freedom) == (pytest.approx(error), pytest.approx(freedom))
    assert found.estimate == pytest.approx(parts.sum(1).mean())
    low, high = found.interval()
    assert high - low == pytest.approx(2 * stats.t.ppf(0.975, freedom) * error)
    assert found.p == pytest.approx(2 * stats.t.sf(abs(found.estimate) / error, freedom))


def test_few_seeds_without_a_pool_have_their_own_degrees_of_freedom() -> None:
    parts = table(4, 30, 0.1, 0.1, 0.05)
    found = crossed(parts)
    assert found is not None
    assert (found.error, found.freedom) == (pytest.approx(by_hand(parts)[0]), 3)


def test_a_mixed_model_finds_the_same_standard_error() -> None:
    """REML of crossed random effects on a balanced table, by statsmodels: an independent way to the same number."""
    parts = table(12, 24, 0.15, 0.1, 0.05, chance=4, mean=0.03)
    cells = pd.DataFrame(parts * 24).rename_axis("seed").melt(var_name="question", ignore_index=False).reset_index()
    chances = {"seed": "0 + C(seed)", "question": "0 + C(question)"}
    model = MixedLM.from_formula("value ~ 1", cells, groups=np.ones(len(cells)), re_formula="0", vc_formula=chances)
    fit = model.fit(reml=True)
    found = crossed(parts)
    assert found is not None
    assert found.estimate == pytest.approx(fit.params["Intercept"], abs=1e-6)
    assert found.error == pytest.approx(fit.bse["Intercept"], rel=1e-3)


def test_equal_seeds_leave_the_chance_of_questions_and_equal_questions_that_of_seeds() -> None:
    same_seeds = np.repeat(table(1, 40, 0.0, 0.1, 0.0), 3, axis=0)
    found = crossed(same_seeds, SeedChance(0.0, 12.0))
    assert found is not None
    plain = stats.ttest_1samp(same_seeds[0] * 40, 0)
    assert found.interval() == tuple(map(pytest.approx, plain.confidence_interval()))
    assert found.p == pytest.approx(plain.pvalue)
    same_questions = np.repeat(table(3, 1, 0.1, 0.0, 0.0), 40, axis=1) / 40
    found = crossed(same_questions)
    assert found is not None
    plain = stats.ttest_1samp(same_questions.sum(1), 0)
    assert found.interval() == tuple(map(pytest.approx, plain.confidence_interval()))
    assert found.p == pytest.approx(plain.pvalue)


def test_the_pool_by_hand() -> None:
    """Arms of 1 2 3, 2 2 5 and a single 9: squares 2 + 6 over 2 + 2 degrees."""
    pool = SeedChance.pooled([[1, 2, 3], [2, 2, 5], [9]])
    assert pool == SeedChance(2.0, 4.0)
    assert pool.of_difference() == SeedChance(4.0, 4.0)
    assert SeedChance.pooled([[1.0], []]) is None
    two = SeedChance.combined([SeedChance(4.0, 4.0), SeedChance(2.0, 6.0)], [-1, 2])
    assert two == SeedChance(12.0, pytest.approx(12**2 / (4**2 / 4 + 8**2 / 6)))
    assert SeedChance.combined([SeedChance(4.0, 4.0), None], [1, 1]) is None
    still = SeedChance.combined([SeedChance(0.0, 4.0), SeedChance(0.0, 6.0)], [1, 1])
    assert still == SeedChance(0.0, 4.0)


def test_the_larger_of_the_pool_and_the_seeds_themselves_counts() -> None:
    parts = table(3, 60, 0.03, 0.02, 0.02)
    own = float(parts.sum(1).var(ddof=1))
    plain, less, more = (crossed(parts, pool) for pool in (None, SeedChance(own / 2, 6.0), SeedChance(own * 4, 6.0)))
    assert plain is not None
    assert less is not None
    assert more is not None
    assert (less.error, less.freedom) == (plain.error, 6)
    assert more.error > 1.5 * plain.error
    assert plain.freedom == 2


def made_up(
    random: np.random.Generator, arms: int, by_seed: float, by_question: float, rest: float
) -> tuple[np.ndarray, SeedChance]:
    """One comparison of equal arms out of `arms`, each of three seeds, 60 questions, with the pool of all of them."""
    level = by_seed * random.normal(size=(arms, 3, 1))
    cells = level + rest * random.normal(size=(arms, 3, 60))
    differences = cells[0] - cells[1] + by_question * random.normal(size=(1, 60))
    pool = SeedChance.pooled(list(cells.mean(2)))
    assert pool is not None
    return differences / 60, pool.of_difference()


@pytest.mark.parametrize("arms", [0, 3, 6])
@pytest.mark.parametrize(("by_seed", "by_question", "rest"), [(0.02, 0.1, 0.1), (0.0, 0.1, 0.1), (0.05, 0.02, 0.05)])
def test_p_keeps_its_level_down_to_where_holm_reads_it(arms: int, by_seed: float, by_question: float, rest: float) -> None:
    """1,200 comparisons of equal arms of three seeds: p <= .05 in 60 of them (standard deviation 7.5), p <= .005 in 6 (2.4)."""
    random, p = np.random.default_rng(arms), []
    for _ in range(1200):
        parts, pool = made_up(random, max(arms, 2), by_seed, by_question, rest)
        found = crossed(parts, pool if arms else None)
        assert found is not None
        p.append(found.p)
    assert (np.array(p) <= 0.05).sum() <= 60 + 3 * 7.5
    assert (np.array(p) <= 0.005).sum() <= 6 + 3 * 2.4
    if arms == 6:
        assert (np.array(p) <= 0.05).sum() >= 20, "nor is it so careful that it says nothing"


def test_the_chance_of_questions_alone_would_claim_a_difference_in_most_studies_of_equal_arms() -> None:
    alone = sum(sign_flip_test(clusters_of(table(3, 60, 0.05, 0.02, 0.05, n).mean(0)), 199).p < 0.05 for n in range(60))
    assert alone > 30


def test_equivalence_is_two_t_tests() -> None:
    found = Crossed(0.001, 0.002, 14.0, 3, 50)
    below, above = stats.t.sf((0.001 + 0.006) / 0.002, 14), stats.t.cdf((0.001 - 0.006) / 0.002, 14)
    assert found.p_within(0.006) == pytest.approx(max(below, above))
    low, high = found.interval(0.9)
    for margin in (0.004, 0.0045, 0.0046, 0.005):
        assert (found.p_within(margin) <= 0.05) == (-margin <= low and high <= margin)
    assert Crossed(0.001, 0.0, 14.0, 3, 50).p_within(0.002) == 0
    assert Crossed(0.003, 0.0, 14.0, 3, 50).p_within(0.002) == 1
    assert (Crossed(0.0, 0.0, 14.0, 3, 50).p, Crossed(0.1, 0.0, 14.0, 3, 50).p) == (1, 0)


def test_few_seeds_or_questions_give_none() -> None:
    assert crossed(table(2, 30, 0.1, 0.1, 0.1)) is None
    assert crossed(table(3, 1, 0.1, 0.1, 0.1)) is None


def test_shares_are_those_of_the_macro_mean() -> None:
    random = np.random.default_rng(1)
    values, questions = random.normal(0.02, 0.1, 200), random.integers(0, 25, 200)
    found = cluster(values, questions, random.integers(0, 4, 200))
    shares = parts_of(found)
    assert shares.sum() == pytest.approx(found.estimate, abs=1e-14)
    again = clusters_of(shares)
    assert again.estimate == pytest.approx(found.estimate, abs=1e-14)
    assert standard_error(again) == pytest.approx(standard_error(found), rel=1e-12)
    whole, quick = bootstrap(found), bootstrap(again)
    width = whole.high - whole.low
    assert (quick.low, quick.high) == (pytest.approx(whole.low, abs=0.1 * width), pytest.approx(whole.high, abs=0.1 * width))


def test_an_interval_that_holds_zero() -> None:
    assert Crossed(0.03, 0.02, 2.0, 3, 50).holds_zero
    assert not Crossed(0.03, 0.001, 2.0, 3, 50).holds_zero

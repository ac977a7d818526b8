"""Statistics against numbers worked out by hand, scipy's own tests where a cluster is one value, and brute force."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from hybrid_scale import statistics
from hybrid_scale.errors import DataError
from hybrid_scale.statistics import (
    bootstrap,
    bootstrap_estimates,
    cluster,
    equivalence_test,
    holm,
    paired,
    seed_spread,
    sign_flip_test,
    standard_error,
)

NUMBERS = st.integers(-20, 20).map(lambda n: n / 10)


def singles(values: list[float] | np.ndarray) -> statistics.Clusters:
    return cluster(np.asarray(values), np.arange(len(values)))


# --------------------------------------------------------------------------------------------------------- clusters


def test_the_estimate_is_the_mean_over_strata_of_their_means() -> None:
    values, questions, languages = np.array([1.0, 3.0, 5.0]), ["a", "b", "a"], ["de", "de", "en"]
    grouped = cluster(values, questions, languages)
    assert grouped.estimate == (2 + 5) / 2
    assert grouped.influence().tolist() == [1 / 4 + 5 / 2, 3 / 4]  # a: half of de's mean over two, all of en's; b: de's rest
    assert cluster(values, questions).estimate == 3


def test_a_query_without_a_value_is_left_out_of_both_systems() -> None:
    grouped = paired(np.array([1, np.nan, 0.5]), np.array([0, 1, np.nan]), ["a", "b", "c"])
    assert (len(grouped), grouped.estimate) == (1, 1)


def test_values_may_be_listed_in_any_order() -> None:
    values, names = np.array([0.1, 0.4, -0.2, 0.3]), np.array(["q1", "q2", "q1", "q3"])
    order = np.array([2, 0, 3, 1])
    assert bootstrap(cluster(values, names)) == bootstrap(cluster(values[order], names[order]))


@pytest.mark.parametrize(
    ("values", "names", "message"),
    [
        ([1.0, 2.0], ["a"], "one cluster and one stratum per value"),
        ([1.0, np.inf], ["a", "b"], "finite numbers"),
        ([np.nan], ["a"], "finite numbers"),
    ],
)
def test_cluster_refuses(values: list[float], names: list[str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        cluster(np.array(values), names)
    with pytest.raises(DataError, match="same queries"):
        paired(np.zeros(2), np.zeros(3), ["a", "b"])


# ------------------------------------------------------------------------------------------------------ sign flipping


def test_sign_flip_by_hand() -> None:
    """1, 2, 3: of the 8 patterns only +++ and --- reach 6. Signs of 1, -1, 2 sum to 4 0 2 and mirrored: |t| >= 2 in 6 of 8."""
    assert sign_flip_test(singles([1, 2, 3])).p == 2 / 8
    assert sign_flip_test(singles([1, -1, 2])).p == 6 / 8
    assert sign_flip_test(singles([0, 0, 0])).p == 1
    assert sign_flip_test(singles([0, 5, 0])).p == 1
    assert sign_flip_test(singles([1, 2, 3, 0, 0])) == statistics.Test(1.2, 2 / 8, 5, True)


def test_a_question_flips_with_all_its_languages() -> None:
    """Four questions in eleven languages, each better everywhere: 4 signs, not 44, so p is 2 / 16."""
    values = np.tile([0.1, 0.2, 0.3, 0.4], 11)
    assert sign_flip_test(cluster(values, np.tile(np.arange(4), 11), np.repeat(np.arange(11), 4))).p == 2 / 16


@settings(max_examples=40, deadline=None)
@given(st.lists(NUMBERS, min_size=2, max_size=8))
def test_exact_p_is_scipys(values: list[float]) -> None:
    expected = stats.permutation_test(
        (np.array(values),), lambda x, axis: np.round(x.sum(axis), 9), permutation_type="samples", n_resamples=10**6
    )
    assert sign_flip_test(singles(values)).p == pytest.approx(min(1.0, expected.pvalue), abs=1e-12)


def test_drawn_p_is_near_the_exact_one_and_repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(3).normal(0.4, 1, 12)
    exact = sign_flip_test(singles(values))
    monkeypatch.setattr(statistics, "EXACT_CLUSTERS", 0)
    drawn = sign_flip_test(singles(values))
    assert exact.exact
    assert not drawn.exact
    assert abs(drawn.p - exact.p) < 4 * math.sqrt(exact.p * (1 - exact.p) / statistics.RESAMPLES)
    assert drawn == sign_flip_test(singles(values))
    assert drawn.p != sign_flip_test(singles(values), seed=1).p


def test_p_is_never_zero_and_blocks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    certain = singles(np.full(300, 0.5) + np.arange(300) / 1e6)
    assert sign_flip_test(certain).p == 1 / 10_000
    noisy = singles(np.random.default_rng(0).normal(0.05, 1, 300))
    whole = sign_flip_test(noisy)
    monkeypatch.setattr(statistics, "CELLS", 3000)
    assert sign_flip_test(noisy) == whole


def test_half_of_the_p_values_of_equal_systems_are_below_one_half() -> None:
    random = np.random.default_rng(5)
    p = [sign_flip_test(singles(random.normal(0, 1, 40)), resamples=499).p for _ in range(200)]
    assert stats.kstest(p, "uniform").pvalue > 0.01


# ---------------------------------------------------------------------------------------------------------- bootstrap


@pytest.mark.parametrize(("shape", "level"), [("normal", 0.95), ("skewed", 0.95), ("skewed", 0.9)])
def test_bca_is_scipys_where_clusters_are_single(shape: str, level: float) -> None:
    random = np.random.default_rng(11)
    values = random.normal(0.1, 1, 60) if shape == "normal" else random.exponential(1, 60) ** 2
    ours = bootstrap(singles(values), level)
    theirs = stats.bootstrap((values,), np.mean, confidence_level=level, n_resamples=9_999, method="BCa", rng=1)
    spread = ours.high - ours.low
    assert ours.method == "bca"
    assert ours.estimate == pytest.approx(values.mean(), abs=1e-12)
    np.testing.assert_allclose([ours.low, ours.high], theirs.confidence_interval, atol=0.04 * spread)
    percentiles = np.quantile(bootstrap_estimates(singles(values)), [(1 - level) / 2, (1 + level) / 2])
    assert shape == "normal" or ours.low > percentiles[0] + 0.02 * spread  # the correction is there: plain percentiles lie lower


def test_resamples_have_the_distribution_of_all_possible_ones() -> None:
    """Three questions, two languages, one value missing: 27 equally likely draws, enumerated."""
    values, questions, languages = np.array([1.0, 2.0, 4.0, 7.0, 11.0]), np.array([0, 1, 2, 0, 1]), np.array([0, 0, 0, 1, 1])
    expected = []
    for draw in itertools.product(range(3), repeat=3):
        means = []
        for language in (0, 1):
            drawn = [values[(questions == g) & (languages == language)] for g in draw]
            if len(joined := np.concatenate(drawn)):
                means.append(joined.mean())
        expected.append(np.mean(means))
    drawn_estimates = np.round(bootstrap_estimates(cluster(values, questions, languages), 50_000), 9)
    found, counts = np.unique(drawn_estimates, return_counts=True)
    possible, weights = np.unique(np.round(expected, 9), return_counts=True)
    assert found.tolist() == possible.tolist()
    assert np.abs(counts / 50_000 - weights / 27).max() < 0.01


def test_translations_add_nothing_when_they_repeat_the_question() -> None:
    values = np.random.default_rng(2).normal(0.2, 1, 80)
    eleven = cluster(np.tile(values, 11), np.tile(np.arange(80), 11), np.repeat(np.arange(11), 80))
    once, repeated = bootstrap(singles(values)), bootstrap(eleven)
    assert (repeated.low, repeated.high) == pytest.approx((once.low, once.high), abs=1e-12)
    assert standard_error(eleven) == pytest.approx(standard_error(singles(values)), abs=1e-12)
    as_if_independent = bootstrap(singles(np.tile(values, 11)))
    assert (once.high - once.low) / (as_if_independent.high - as_if_independent.low) == pytest.approx(math.sqrt(11), rel=0.05)


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    """Skewed values, 40 clusters of 3 correlated ones; 300 trials at 90 %: 270 expected, standard deviation 5.2."""
    random, hits = np.random.default_rng(8), 0
    for _ in range(300):
        values = random.exponential(1, (40, 1)) + random.normal(0, 0.3, (40, 3))
        interval = bootstrap(cluster(values.ravel(), np.repeat(np.arange(40), 3)), 0.9, resamples=999)
        hits += interval.low <= 1 <= interval.high
    assert 245 <= hits <= 290


def test_degenerate_intervals() -> None:
    constant = bootstrap(singles([0.25] * 5))
    assert (constant.low, constant.high, constant.method) == (0.25, 0.25, "constant")
    with pytest.raises(DataError, match="at least two"):
        bootstrap(singles([1.0]))


# --------------------------------------------------------------------------------------------------------------- TOST


def test_equivalence_is_two_t_tests() -> None:
    values = np.random.default_rng(4).normal(0.0005, 0.01, 200)
    found = equivalence_test(singles(values))
    above = stats.ttest_1samp(values, -0.002, alternative="greater")
    below = stats.ttest_1samp(values, 0.002, alternative="less")
    assert found.p == pytest.approx(max(above.pvalue, below.pvalue), rel=1e-9)
    interval = stats.ttest_1samp(values, 0).confidence_interval(0.9)
    assert (found.low, found.high) == pytest.approx(tuple(interval), rel=1e-9)
    assert found.equivalent == (interval.low > -0.002 and interval.high < 0.002)


@settings(max_examples=60, deadline=None)
@given(st.lists(NUMBERS, min_size=2, max_size=10), st.sampled_from([0.1, 0.5, 1.0, 2.0]))
def test_the_verdict_is_that_of_the_interval(values: list[float], margin: float) -> None:
    found = equivalence_test(singles(values), margin)
    if min(abs(found.low + margin), abs(found.high - margin)) > 1e-9:
        assert found.equivalent == (-margin < found.low and found.high < margin)


def test_equivalence_of_equal_and_constant_systems() -> None:
    assert equivalence_test(singles([0.0] * 4)).equivalent
    assert not equivalence_test(singles([0.01] * 4)).equivalent
    with pytest.raises(DataError, match="above 0"):
        equivalence_test(singles([0.0, 1.0]), 0)
    with pytest.raises(DataError, match="at least two"):
        equivalence_test(singles([0.0]))


def test_clustered_standard_error_by_hand() -> None:
    """Questions {1, 1} and {3, 3}: mean 2, parts -2/4 and +2/4 off it, so sqrt(2/1 * (1/4 + 1/4)) = 1."""
    assert standard_error(cluster(np.array([1.0, 1, 3, 3]), [0, 0, 1, 1])) == pytest.approx(1)
    values = np.random.default_rng(0).normal(size=30)
    assert standard_error(singles(values)) == pytest.approx(stats.sem(values), rel=1e-12)


# --------------------------------------------------------------------------------------------------------------- Holm


def test_holm_by_hand() -> None:
    """Sorted .005 .01 .03 .04 times 4 3 2 1 = .02 .03 .06 .04, then never falling."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.5]) == [1, 1]
    assert holm([]) == []
    for wrong in (-0.1, 1.1, math.nan):
        with pytest.raises(DataError, match="between 0 and 1"):
            holm([0.5, wrong])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 100).map(lambda n: n / 100), min_size=1, max_size=6))
def test_holm_is_closed_testing_with_bonferroni(p: list[float]) -> None:
    """By definition: the largest Bonferroni p value of any set of hypotheses that holds this one."""
    subsets = [s for size in range(1, len(p) + 1) for s in itertools.combinations(range(len(p)), size)]
    closed = [max(min(1.0, len(s) * min(p[j] for j in s)) for s in subsets if i in s) for i in range(len(p))]
    assert holm(p) == pytest.approx(closed)


# -------------------------------------------------------------------------------------------------------------- seeds


def test_seed_spread_by_hand() -> None:
    """.1 .2 .3: sd .1, t(.975, 2) = 4.302653, half width .1 * 4.302653 / sqrt(3) = .248414."""
    spread = seed_spread([0.1, 0.2, 0.3])
    assert (spread.mean, spread.sd, spread.count, spread.note) == (pytest.approx(0.2), pytest.approx(0.1), 3, "")
    assert (spread.low, spread.high) == (pytest.approx(0.2 - 0.248414, abs=1e-6), pytest.approx(0.2 + 0.248414, abs=1e-6))


def test_few_seeds_say_so() -> None:
    one, two = seed_spread([0.5]), seed_spread([0.4, 0.6])
    assert (one.sd, one.low, one.high) == (None, None, None)
    assert one.note == "1 seed: at least 3 are needed to tell a difference from chance"
    assert two.note.startswith("2 seeds:")
    assert two.sd == pytest.approx(0.1 * math.sqrt(2))
    for wrong in ([], [math.nan]):
        with pytest.raises(DataError, match="seed"):
            seed_spread(wrong)

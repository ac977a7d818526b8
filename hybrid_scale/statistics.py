"""What a difference between two systems is worth: tests, intervals, corrections, spread over seeds.

The unit of chance is the *cluster*: all values of one parallel question, in every language. A resample keeps or flips a cluster
as a whole, because translations of one question succeed and fail together; treating them as independent makes the standard
error several times too small. A *stratum* is what a macro average averages over (a query language); without strata the
estimate is the plain mean over values.
Every function is deterministic: the same values and seed give the same numbers, in whatever order the values are listed.
Knows no metric, no run and no file; needs numpy, scipy and statsmodels only.

Shapes: N values, G clusters, X strata, B resamples.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats
from statsmodels.stats.multitest import multipletests

from hybrid_scale.errors import DataError, describe

RESAMPLES = 9_999
MARGIN = 0.002
"""Two systems whose means differ by less than this are equivalent for our purposes."""
FEWEST_SEEDS = 3
EXACT_CLUSTERS = 13
"""2^13 = 8,192 sign patterns are fewer than RESAMPLES: all of them are tried."""
CELLS = 2**22
"""Numbers in one working array (32 MiB in float64)."""


@dataclass(frozen=True)
class Clusters:
    """Values summed by cluster and stratum: `sums` and `counts` are float64 [G, X]."""

    sums: np.ndarray
    counts: np.ndarray

    def __len__(self) -> int:
        return len(self.sums)

    @property
    def estimate(self) -> float:
        """Mean over strata of the mean of each stratum's values."""
        return float(macro_mean(self.sums.sum(0), self.counts.sum(0)))

    def influence(self) -> np.ndarray:
        """Each cluster's part of the estimate as it stands: float64 [G], they sum to it."""
        return (self.sums / self.counts.sum(0)).mean(1)


@dataclass(frozen=True)
class Interval:
    """A mean with a bootstrap interval of `level`."""

    estimate: float
    low: float
    high: float
    level: float
    clusters: int
    method: str
    """`bca`; `percentile` where all clusters but one are equal or the like, so that BCa isn't defined; `constant`; `crossed`:
    a t interval of questions and seeds."""


@dataclass(frozen=True)
class Test:
    """A paired difference with its two-sided p value."""

    difference: float
    p: float
    clusters: int
    exact: bool
    """Whether all sign patterns were tried; otherwise p can't be below 1 / (RESAMPLES + 1)."""


@dataclass(frozen=True)
class Equivalence:
    """Two one-sided t tests: is the difference within (-margin, margin)?"""

    difference: float
    low: float
    high: float
    """The interval of level 1 - 2 alpha; it lies within the margins exactly where `equivalent` is true."""
    margin: float
    p: float
    """The larger of both one-sided p values."""
    equivalent: bool
    clusters: int


@dataclass(frozen=True)
class Spread:
    """A value measured with several training seeds. Numbers that need two seeds are None with one."""

    mean: float
    sd: float | None
    low: float | None
    high: float | None
    level: float
    count: int
    note: str
    """Says that there are fewer than FEWEST_SEEDS seeds; else empty."""


# --------------------------------------------------------------------------------------------------------- clusters


def cluster(
    values: np.ndarray, cluster: Sequence[object] | np.ndarray, stratum: Sequence[object] | np.ndarray | None = None
) -> Clusters:
    """Group `values` [N] by `cluster` [N] (a parallel question) and `stratum` [N] (a query language; all one when None).

    NaN values (a query without any relevant passage) are left out. Raises DataError: lengths differ, infinity, no value.
    """
    values = np.asarray(values, np.float64)
    keep = ~np.isnan(values)
    labels = [np.asarray(cluster), np.zeros(len(values), np.int64) if stratum is None else np.asarray(stratum)]
    if values.ndim != 1 or any(label.shape != values.shape for label in labels):
        shapes = [values.shape, *(label.shape for label in labels)]
        raise DataError(describe("values, clusters and strata", shapes, "one cluster and one stratum per value"))
    if np.isinf(values).any() or not keep.any():
        raise DataError(describe("values", "infinity" if np.isinf(values).any() else "no number", "finite numbers are needed"))
    (names, row), (strata, column) = (np.unique(label[keep], return_inverse=True) for label in labels)
    cell, shape = row * len(strata) + column, (len(names), len(strata))
    sums = np.bincount(cell, values[keep], len(names) * len(strata)).reshape(shape)
    return Clusters(sums, np.bincount(cell, minlength=len(names) * len(strata)).reshape(shape).astype(np.float64))


def paired(
    first: np.ndarray,
    second: np.ndarray,
    cluster_of: Sequence[object] | np.ndarray,
    stratum: Sequence[object] | np.ndarray | None = None,
) -> Clusters:
    """Clusters of the differences `first` - `second` [N]; a value that either lacks (NaN) is left out of both."""
    first, second = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if first.shape != second.shape:
        raise DataError(describe("paired values", (first.shape, second.shape), "both systems answer the same queries"))
    return cluster(first - second, cluster_of, stratum)


def macro_mean(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Mean over the strata that have values of their means: [..., X] and [..., X] -> [...]."""
    means = np.divide(sums, counts, out=np.zeros_like(sums), where=counts > 0)
    present = np.maximum((counts > 0).sum(-1), 1)
    return means.sum(-1) / present


# ------------------------------------------------------------------------------------------------------------ tests


def sign_flip_test(differences: Clusters, resamples: int = RESAMPLES, seed: int = 0) -> Test:
    """Two-sided paired permutation test: under the null hypothesis each cluster's difference may as well have the other sign.

    p = (1 + c) / (resamples + 1) with c the resamples at least as extreme (Phipson & Smyth 2010: never 0). With up to
    EXACT_CLUSTERS clusters that differ at all, every sign pattern is tried and p is exact. Equal systems have p = 1. It is
    `scipy.stats.permutation_test` of type `samples`, which needs 30 times as long (1,190 clusters: 1 s).
    """
    parts = differences.influence()
    moving = parts[parts != 0]
    reached = abs(moving.sum()) - 1e-12 * np.abs(moving).sum()  # sums of other orders must tie with the observed one
    exact = len(moving) <= EXACT_CLUSTERS
    patterns = _all_signs(len(moving)) if exact else _random_signs(len(moving), resamples, np.random.default_rng(seed))
    count = sum(int((np.abs(bits @ (2 * moving) - moving.sum()) >= reached).sum()) for bits in patterns)
    p = count / 2 ** len(moving) if exact else (1 + count) / (1 + resamples)
    return Test(differences.estimate, p, len(differences), exact)


def _all_signs(clusters: int) -> Iterator[np.ndarray]:
    """0 for minus and 1 for plus: one float64 [2^clusters, clusters]."""
    yield (np.arange(2**clusters)[:, None] >> np.arange(clusters) & 1).astype(np.float64)


def _random_signs(clusters: int, resamples: int, random: np.random.Generator) -> Iterator[np.ndarray]:
    """Blocks of float64 [some, clusters]; the patterns don't depend on the size of the blocks."""
    width = -(-clusters // 8)
    for rows in _blocks(resamples, clusters):
        yield np.unpackbits(random.integers(0, 256, (rows, width), np.uint8), axis=1, count=clusters).astype(np.float64)


def _blocks(rows: int, width: int) -> Iterator[int]:
    step = max(1, CELLS // max(1, width))
    return (min(step, rows - start) for start in range(0, rows, step))


def equivalence_test(differences: Clusters, margin: float = MARGIN, alpha: float = 0.05) -> Equivalence:
    """TOST (Schuirmann 1987) on the clusters' parts with G - 1 degrees of freedom.

    "Not equivalent" doesn't mean different: with few questions neither can be shown. Raises DataError when `margin` isn't above
    0 or there are fewer than two clusters.
    """
    if not margin > 0:
        raise DataError(describe("margin", margin, "must be above 0"))
    if len(differences) < 2:
        raise DataError(describe("clusters", len(differences), "a variance needs at least two"))
    estimate, error, freedom = differences.estimate, standard_error(differences), len(differences) - 1
    half = float(stats.t.ppf(1 - alpha, freedom)) * error
    if error > 0:
        p = float(max(stats.t.sf((estimate + margin) / error, freedom), stats.t.cdf((estimate - margin) / error, freedom)))
    else:
        p = 0.0 if abs(estimate) < margin else 1.0
    return Equivalence(estimate, estimate - half, estimate + half, margin, p, p < alpha, len(differences))


def standard_error(values: Clusters) -> float:
    """Of the estimate, from the linearised spread of the clusters; with one value each it is sd / sqrt(G)."""
    counts = values.counts.sum(0)
    means = values.sums.sum(0) / counts
    residual = ((values.sums - values.counts * means) / counts).mean(1)
    clusters = len(values)
    return math.sqrt(clusters / (clusters - 1) * float((residual**2).sum()))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment (1979): adjusted p values in the order given; reject where they are <= alpha.

    Controls the chance of a single false claim among all. Raises DataError on a value outside 0 to 1.
    """
    return _adjusted(p_values, "holm")


def benjamini_hochberg(p_values: Sequence[float]) -> list[float]:
    """Step-up adjustment of Benjamini & Hochberg (1995): adjusted p values in the order given.

    Of what is claimed where they are <= alpha, a share of alpha is false in expectation. Raises DataError on a
    value outside 0 to 1.
    """
    return _adjusted(p_values, "fdr_bh")


def _adjusted(p_values: Sequence[float], method: str) -> list[float]:
    p = np.asarray(p_values, np.float64)
    if not ((p >= 0) & (p <= 1)).all():
        raise DataError(describe("p values", p[~((p >= 0) & (p <= 1))].tolist(), "must lie between 0 and 1"))
    if not len(p):
        return []
    return [float(value) for value in multipletests(p, method=method)[1]]


# -------------------------------------------------------------------------------------------------------- intervals


def bootstrap(values: Clusters, level: float = 0.95, resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """BCa interval of the estimate (Efron 1987), clusters drawn with replacement.

    For differences use `paired`. One cluster has no spread: DataError.
    """
    if len(values) < 2:
        raise DataError(describe("clusters", len(values), "an interval needs at least two"))
    facts = (level, len(values))
    drawn = np.sort(bootstrap_estimates(values, resamples, seed))
    if drawn[0] == drawn[-1]:
        return Interval(values.estimate, float(drawn[0]), float(drawn[-1]), *facts, "constant")
    wanted = np.array([(1 - level) / 2, (1 + level) / 2])
    corrected = _bca_levels(wanted, drawn, values)
    method = "percentile" if corrected is None else "bca"
    low, high = np.quantile(drawn, wanted if corrected is None else corrected)
    return Interval(values.estimate, float(low), float(high), *facts, method)


def bootstrap_estimates(values: Clusters, resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """The estimate in each resample: float64 [B]. A stratum that a resample misses altogether is left out of its mean."""
    random, clusters = np.random.default_rng(seed), len(values)
    both = np.concatenate([values.sums, values.counts], axis=1)
    strata = values.sums.shape[1]
    blocks = []
    for rows in _blocks(resamples, clusters):
        chosen = random.integers(0, clusters, (rows, clusters)) + clusters * np.arange(rows)[:, None]
        times = np.bincount(chosen.ravel(), minlength=rows * clusters).reshape(rows, clusters).astype(np.float64)
        totals = times @ both
        blocks.append(macro_mean(totals[:, :strata], totals[:, strata:]))
    return np.concatenate(blocks)


def _bca_levels(wanted: np.ndarray, drawn: np.ndarray, values: Clusters) -> np.ndarray | None:
    """The levels to read off instead of `wanted`; None where they aren't defined (an estimate outside all resamples)."""
    estimate = values.estimate
    slack = 1e-12 * (abs(estimate) + float(np.abs(drawn).max()))  # equal but for the order of addition
    below = (np.sum(drawn < estimate - slack) + np.sum(drawn <= estimate + slack)) / (2 * len(drawn))
    if not 0 < below < 1:
        return None
    bias = stats.norm.ppf(below)
    left_out = macro_mean(values.sums.sum(0) - values.sums, values.counts.sum(0) - values.counts)
    pull = left_out.mean() - left_out
    acceleration = float((pull**3).sum() / (6 * (pull**2).sum() ** 1.5)) if pull.any() else 0.0
    shifted = bias + stats.norm.ppf(wanted)
    return stats.norm.cdf(bias + shifted / (1 - acceleration * shifted))


# ------------------------------------------------------------------------------------------------------------ seeds


def seed_spread(values: Sequence[float], level: float = 0.95) -> Spread:
    """Mean over training seeds with their standard deviation (ddof 1) and t interval.

    This is chance of training, not of questions: neither contains the other. Raises DataError: none, NaN, infinity.
    """
    numbers = np.asarray(values, np.float64)
    if numbers.ndim != 1 or not len(numbers) or not np.isfinite(numbers).all():
        raise DataError(describe("seeds", numbers.tolist(), "one finite value a seed is needed"))
    count, mean = len(numbers), float(numbers.mean())
    note = (
        ""
        if count >= FEWEST_SEEDS
        else f"{count} seed{'s' * (count > 1)}: at least {FEWEST_SEEDS} are needed to tell a difference from chance"
    )
    if count == 1:
        return Spread(mean, None, None, None, level, count, note)
    sd = float(numbers.std(ddof=1))
    half = float(stats.t.ppf((1 + level) / 2, count - 1)) * sd / math.sqrt(count)
    return Spread(mean, sd, mean - half, mean + half, level, count, note)

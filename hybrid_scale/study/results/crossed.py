"""What a difference is worth when both questions and trainings are a sample: two crossed random factors.

Every seed answers every question, so a mean difference moves with the questions drawn, with the seeds drawn
and with both. The variance is that of two-way random effects (Judd, Westfall & Kenny 2012, "Treating stimuli
as a random factor").

Three seeds alone say little of their own variance: with the plain Satterthwaite degrees of freedom, p values
of .0014 (which is where Holm reads 36 of them) occur up to 13 times too often (benchmarks/null.py). So the
variance of seeds is pooled over all arms of one size (`SeedChance`), the larger of the pooled and the
difference's own counts, and where even the pooled one has fewer than RELIABLE degrees of freedom, the test
has no more of them than it. Without a pool it is the t test with S - 1 degrees, which holds its level
whatever the variances are. Knows no arm, no metric and no file.

Shapes: S seeds, G parallel questions.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from hybrid_scale.statistics import FEWEST_SEEDS, Clusters

RELIABLE = 10.0
"""Degrees of freedom of the seeds' variance from which Satterthwaite's approximation holds down to p = .0005."""


@dataclass(frozen=True)
class SeedChance:
    """Variance between training seeds of one seed's value, with the degrees of freedom of that estimate."""

    variance: float
    freedom: float

    @classmethod
    def pooled(cls, scores: Sequence[Sequence[float]]) -> "SeedChance | None":
        """Of one arm's score: over several arms, each with the scores of its seeds. None where no arm has two
        seeds.

        An effect of the seed that all arms share is counted in, although it cancels in their differences.
        """
        known = [np.asarray(values, np.float64) for values in scores if len(values) > 1]
        if not known:
            return None
        freedom = sum(len(values) - 1 for values in known)
        return cls(sum(float(((values - values.mean()) ** 2).sum()) for values in known) / freedom, float(freedom))

    def of_difference(self) -> "SeedChance":
        """Of the difference between two arms with this variance each."""
        return SeedChance(2 * self.variance, self.freedom)

    @classmethod
    def combined(cls, parts: Sequence["SeedChance | None"], weights: Sequence[float]) -> "SeedChance | None":
        """Of a weighted sum of independent values whose variances are estimated apart.

        With Satterthwaite's degrees of freedom. None where a part is None.
        """
        known = [part for part in parts if part is not None]
        if len(known) < len(parts):
            return None
        shares = [weight**2 * part.variance for weight, part in zip(weights, known, strict=True)]
        total = sum(shares)
        spread = sum(share**2 / part.freedom for share, part in zip(shares, known, strict=True))
        return cls(total, total**2 / spread if spread else min(part.freedom for part in known))


@dataclass(frozen=True)
class Crossed:
    """A mean with a standard error that holds the chance of questions and of seeds."""

    estimate: float
    error: float
    freedom: float
    seeds: int
    questions: int

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        half = float(stats.t.ppf((1 + level) / 2, self.freedom)) * self.error
        return self.estimate - half, self.estimate + half

    @property
    def holds_zero(self) -> bool:
        low, high = self.interval()
        return low <= 0 <= high

    @property
    def p(self) -> float:
        """Two-sided, of no difference; 1 where nothing differs at all."""
        if self.error == 0:
            return 1.0 if self.estimate == 0 else 0.0
        return float(2 * stats.t.sf(abs(self.estimate) / self.error, self.freedom))

    def p_within(self, margin: float) -> float:
        """The larger one-sided p of TOST (Schuirmann 1987): small where the difference is shown to lie within
        +-`margin`."""
        if self.error == 0:
            return 0.0 if abs(self.estimate) < margin else 1.0
        below, above = (self.estimate + margin) / self.error, (margin - self.estimate) / self.error
        return float(stats.t.sf(min(below, above), self.freedom))


def parts_of(values: Clusters) -> np.ndarray:
    """Each question's share of the estimate, float64 [G]; they sum to it. Strata that a question lacks count
    at their mean."""
    counts = values.counts.sum(0)
    means = values.sums.sum(0) / counts
    residual = ((values.sums - values.counts * means) / counts).mean(1)
    share: np.ndarray = residual + values.estimate / len(values)
    return share


def clusters_of(parts: np.ndarray) -> Clusters:
    """Shares [G] as clusters of one value each: their mean is the shares' sum."""
    return Clusters(parts[:, None] * len(parts), np.ones((len(parts), 1)))


def crossed(parts: np.ndarray, chance: SeedChance | None = None) -> Crossed | None:
    """Of `parts` [S, G], each row the shares of one seed. `chance`: the variance of one seed's sum, known
    from more than these.

    None below FEWEST_SEEDS seeds or two questions.
    """
    seeds, questions = parts.shape
    if seeds < FEWEST_SEEDS or questions < 2:
        return None
    cells = parts * questions
    of_question, of_seed, total = cells.mean(0), cells.mean(1), float(cells.mean())
    rest = cells - of_question - of_seed[:, None] + total
    by_question = seeds * float(((of_question - total) ** 2).sum()) / (questions - 1)
    by_seed = questions * float(((of_seed - total) ** 2).sum()) / (seeds - 1)
    by_rest = float((rest**2).sum()) / ((seeds - 1) * (questions - 1))
    of_seeds = chance.freedom if chance else seeds - 1.0
    by_seed = max(by_seed, questions * chance.variance) if chance else by_seed
    square = max(by_question + by_seed - by_rest, by_question, by_seed)  # one below that of a factor alone is chance
    freedom = min(of_seeds, questions - 1.0)
    if of_seeds >= RELIABLE:
        squares = ((by_question, questions - 1.0), (by_seed, of_seeds), (by_rest, (seeds - 1.0) * (questions - 1.0)))
        spread = sum(each**2 / degrees for each, degrees in squares)
        freedom = max(freedom, square**2 / spread) if spread else freedom
    return Crossed(total, math.sqrt(square / (seeds * questions)), freedom, seeds, questions)

"""What a difference is worth when both the questions and the trainings are a sample: two crossed random factors.

Every seed answers every question, so a mean difference moves with the questions drawn, with the seeds drawn and with both. The
variance and its Satterthwaite degrees of freedom are those of two-way random effects (Judd, Westfall & Kenny 2012, "Treating
stimuli as a random factor"); with three seeds that differ, few degrees are left and the interval is wide, as it should be.
Knows no arm, no measure and no file.

Shapes: S seeds, G parallel questions.
"""

import math
from dataclasses import dataclass

import numpy as np
from scipy import stats

from hybrid_scale.statistics import FEWEST_SEEDS, Clusters


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


def parts_of(values: Clusters) -> np.ndarray:
    """Each question's share of the estimate, float64 [G]; they sum to it. Strata that a question lacks count at their mean."""
    counts = values.counts.sum(0)
    means = values.sums.sum(0) / counts
    residual = ((values.sums - values.counts * means) / counts).mean(1)
    share: np.ndarray = residual + values.estimate / len(values)
    return share


def clusters_of(parts: np.ndarray) -> Clusters:
    """Shares [G] as clusters of one value each: their mean is the shares' sum."""
    return Clusters(parts[:, None] * len(parts), np.ones((len(parts), 1)))


def crossed(parts: np.ndarray) -> Crossed | None:
    """Of `parts` [S, G], each row the shares of one seed. None below FEWEST_SEEDS seeds or two questions."""
    seeds, questions = parts.shape
    if seeds < FEWEST_SEEDS or questions < 2:
        return None
    cells = parts * questions
    of_question, of_seed, total = cells.mean(0), cells.mean(1), float(cells.mean())
    rest = cells - of_question - of_seed[:, None] + total
    by_question = seeds * float(((of_question - total) ** 2).sum()) / (questions - 1)
    by_seed = questions * float(((of_seed - total) ** 2).sum()) / (seeds - 1)
    by_rest = float((rest**2).sum()) / ((seeds - 1) * (questions - 1))
    square, freedom = max(
        (by_question + by_seed - by_rest, _satterthwaite(by_question, by_seed, by_rest, seeds, questions)),
        (by_question, questions - 1.0),  # an estimate below that of one factor alone is chance
        (by_seed, seeds - 1.0),
    )
    return Crossed(total, math.sqrt(square / (seeds * questions)), freedom, seeds, questions)


def _satterthwaite(by_question: float, by_seed: float, by_rest: float, seeds: int, questions: int) -> float:
    spread = by_question**2 / (questions - 1) + by_seed**2 / (seeds - 1) + by_rest**2 / ((seeds - 1) * (questions - 1))
    return (by_question + by_seed - by_rest) ** 2 / spread if spread else float(questions - 1)

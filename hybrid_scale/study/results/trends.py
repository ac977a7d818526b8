"""How the difference between two arms runs over model size: an exploratory line, and whether it is one.

The slope is least squares of the difference on log10(parameters), so it is the change for ten times the
parameters. Published families flatten near 2B, where one line from 0.5B says "moves" of sizes that don't: so
the curvature is tested, and a slope whose sizes bend isn't stated. What the study claims of size is the
change between two named sizes (primary.py). All sizes answer the same questions with the same seeds, so all
is paired: question by question, seed by seed. The sizes are those of the study, not a sample. Knows no HTML.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from hybrid_scale.statistics import Interval, Test, bootstrap, sign_flip_test
from hybrid_scale.study.results.comparisons import Comparison, interval_of
from hybrid_scale.study.results.crossed import Crossed, clusters_of
from hybrid_scale.study.results.primary import combined, contrast, discoveries
from hybrid_scale.study.results.scores import Metric
from hybrid_scale.study.results.verdicts import ALPHA, Outcome, verdict

FEWEST_TO_BEND = 3


@dataclass(frozen=True)
class Trend:
    """The difference `arm` minus `rival` over the sizes of one series. Always exploratory."""

    task: str
    series: str
    arm: str
    rival: str
    metric: Metric
    sizes: tuple[float, ...]
    differences: tuple[float, ...]
    slope: float
    """Change of the difference for ten times the parameters."""
    both: Crossed | None = None
    test: Test | None = None
    """Below FEWEST_SEEDS seeds: of the questions alone, for these runs."""
    interval: Interval | None = None
    """95 % of questions and seeds; below FEWEST_SEEDS seeds of the questions alone, for these runs."""
    curvature: Crossed | None = None
    """Second-degree coefficient on log10(parameters); None below three sizes or too few seeds."""
    adjusted: float | None = None
    """p after Benjamini-Hochberg over all trends of the study."""
    seeds: int = 0
    """Seeds finished at every size, which alone count."""
    refusal: str = ""

    @property
    def p(self) -> float | None:
        """Of questions and seeds; below FEWEST_SEEDS seeds of questions alone."""
        return self.both.p if self.both else self.test.p if self.test else None

    @property
    def bent(self) -> bool:
        """Whether the differences are shown to bend over the sizes."""
        return self.curvature is not None and self.curvature.p <= ALPHA

    @property
    def outcome(self) -> Outcome:
        """ "better": the difference moves in favour of `arm` with size."""
        if self.bent:
            return "no straight line"
        return verdict(self.slope if self.metric.higher_is_better else -self.slope, self.adjusted, None, self.both is None)


def trends(comparisons: Sequence[Comparison]) -> list[Trend]:
    """One for each task, series, pair of arms and metric with two sizes or more; untested ones carry a
    `refusal`."""
    by_line: dict[tuple[str, ...], list[Comparison]] = {}
    for each in sorted((each for each in comparisons if each.size is not None), key=_size):
        by_line.setdefault(_line(each), []).append(each)
    wanted = dict.fromkeys(map(_line, comparisons))  # in the order in which they are compared
    lines = [by_line[key] for key in wanted if len({each.size for each in by_line.get(key, ())}) > 1]
    found = [_trend(line) for line in lines]
    adjusted = discoveries([math.nan if each.p is None else each.p for each in found])
    return [replace(each, adjusted=p) for each, p in zip(found, adjusted, strict=True)]


def _line(each: Comparison) -> tuple[str, str, str, str, str]:
    return each.task, each.series, each.arm, each.rival, each.metric.key


def _size(each: Comparison) -> float:
    return each.size or math.nan


def _trend(line: Sequence[Comparison]) -> Trend:
    first, weights = line[0], slope_weights([_size(each) for each in line])
    facts = (first.task, first.series, first.arm, first.rival, first.metric)
    differences = tuple(each.difference for each in line)
    means = Trend(*facts, tuple(map(_size, line)), differences, float(weights @ differences))
    parts, refusal = combined(line, weights)
    if parts is None:
        return replace(means, refusal=refusal)
    if parts.shape[1] < 2:
        return replace(means, refusal="one parallel question: no spread")
    questions, seeds = clusters_of(parts.mean(0)), len(parts)
    both, _ = contrast(line, weights)
    if both is None:
        found = replace(means, slope=questions.estimate, interval=bootstrap(questions), test=sign_flip_test(questions))
        return replace(found, seeds=seeds)
    bend = curvature_weights([_size(each) for each in line])
    curvature = contrast(line, bend)[0] if bend is not None else None
    return replace(means, slope=both.estimate, both=both, interval=interval_of(both), curvature=curvature, seeds=seeds)


def slope_weights(sizes: Sequence[float]) -> np.ndarray:
    """w with w @ y the least-squares slope of y on log10(size)."""
    return _weights(sizes, 1)


def curvature_weights(sizes: Sequence[float]) -> np.ndarray | None:
    """w with w @ y the coefficient of log10(size)^2 in the least-squares parabola; None below three different
    sizes."""
    return _weights(sizes, 2) if len(set(sizes)) >= FEWEST_TO_BEND else None


def _weights(sizes: Sequence[float], degree: int) -> np.ndarray:
    """Those of the highest coefficient of the least-squares polynomial of `degree` in log10(size)."""
    x = np.log10(np.asarray(sizes, np.float64))
    weights: np.ndarray = np.linalg.pinv(np.vander(x - x.mean(), degree + 1))[0]
    return weights

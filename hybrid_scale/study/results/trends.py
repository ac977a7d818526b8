"""Does what hybrid batches gain or cost change with model size? The slope of the difference over the sizes of a series.

The slope is least squares of the difference on log10(parameters), so it is the change for ten times the parameters. All sizes
answer the same questions with the same seeds, so it is paired as the differences are: question by question, seed by seed. Its
chance is that of questions and seeds; the sizes are those of the study, not a sample. Knows no HTML.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import pandas as pd

from hybrid_scale.statistics import RESAMPLES, Interval, Test, bootstrap, holm, sign_flip_test
from hybrid_scale.study.results.comparisons import ALPHA, PER_TEST, Comparison
from hybrid_scale.study.results.crossed import Crossed, clusters_of, crossed
from hybrid_scale.study.results.scores import Metric

Direction = Literal["better with size", "worse with size", "these seeds only", "not shown", "not tested"]


@dataclass(frozen=True)
class Trend:
    """The difference `arm` minus `rival` over the sizes of one series."""

    task: str
    series: str
    arm: str
    rival: str
    metric: Metric
    sizes: tuple[float, ...]
    differences: tuple[float, ...]
    slope: float
    """Change of the difference for ten times the parameters."""
    interval: Interval | None = None
    test: Test | None = None
    adjusted: float | None = None
    """p after Holm over all trends of the study."""
    both: Crossed | None = None
    seeds: int = 0
    """Seeds finished at every size, which alone count."""
    refusal: str = ""

    @property
    def outcome(self) -> Direction:
        """In hybrid's eyes: a difference that rises is the better, unless low values are."""
        if self.adjusted is None:
            return "not tested"
        if self.adjusted > ALPHA:
            return "not shown"
        if self.both is not None and self.both.holds_zero:
            return "these seeds only"
        return "better with size" if (self.slope > 0) == self.metric.higher_is_better else "worse with size"


def trends(comparisons: Sequence[Comparison]) -> list[Trend]:
    """One for each task, series, pair of arms and measure with two sizes or more; untested ones carry a `refusal`."""
    by_line: dict[tuple[str, ...], list[Comparison]] = {}
    for each in sorted((each for each in comparisons if each.size is not None), key=_size):
        by_line.setdefault(_line(each), []).append(each)
    wanted = dict.fromkeys(map(_line, comparisons))  # in the order in which they are compared
    lines = [by_line[key] for key in wanted if len({each.size for each in by_line.get(key, ())}) > 1]
    resamples = max(RESAMPLES, PER_TEST * len(lines))
    found = [_trend(line, resamples) for line in lines]
    adjusted = iter(holm([each.test.p for each in found if each.test is not None]))
    return [replace(each, adjusted=next(adjusted)) if each.test is not None else each for each in found]


def _line(each: Comparison) -> tuple[str, str, str, str, str]:
    return each.task, each.series, each.arm, each.rival, each.metric.key


def _size(each: Comparison) -> float:
    return each.size or math.nan


def _trend(line: Sequence[Comparison], resamples: int) -> Trend:
    first, weights = line[0], slope_weights([_size(each) for each in line])
    facts = (first.task, first.series, first.arm, first.rival, first.metric)
    differences = tuple(each.difference for each in line)
    means = Trend(*facts, tuple(map(_size, line)), differences, float(weights @ differences))
    tables = [each.parts for each in line if each.parts is not None]
    if len(tables) < len(line):
        return replace(means, refusal="single queries of a size are missing")
    if any(set(table.index) != set(tables[0].index) for table in tables):
        return replace(means, refusal="the sizes answered different questions")
    seeds = sorted(set.intersection(*({int(seed) for seed in table.columns} for table in tables)))
    if not seeds:
        return replace(means, refusal="no seed is finished at every size")
    parts = _combined(tables, weights, seeds)
    questions = clusters_of(parts.mean(0))
    return replace(
        means,
        slope=questions.estimate,
        interval=bootstrap(questions),
        test=sign_flip_test(questions, resamples),
        both=crossed(parts),
        seeds=len(seeds),
    )


def slope_weights(sizes: Sequence[float]) -> np.ndarray:
    """w with w @ y the least-squares slope of y on log10(size)."""
    x = np.log10(np.asarray(sizes, np.float64))
    centred = x - x.mean()
    weights: np.ndarray = centred / (centred @ centred)
    return weights


def _combined(tables: Sequence[pd.DataFrame], weights: np.ndarray, seeds: Sequence[int]) -> np.ndarray:
    """Shares of the slope [seeds, questions]."""
    questions = tables[0].index
    stacked = np.stack([table.loc[questions, list(seeds)].to_numpy().T for table in tables])
    combined: np.ndarray = np.tensordot(weights, stacked, 1)
    return combined

"""Numbers of a test -> one word, each with one meaning, for every comparison of a study.

Knows no run and no file.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Outcome = Literal[
    "better",
    "worse",
    "equivalent",
    "not shown",
    "not judged",
    "better in these runs",
    "worse in these runs",
    "no straight line",
]
"""better, worse: of the first arm, by an adjusted p over questions and seeds; of a change: moves in its
favour, against it. equivalent: the difference is shown to be smaller than the margin. not shown: neither of
these. not judged: no test, and the reason stands beside it. better, worse in these runs: too few seeds, so it
is a statement on the trained models, not on training. no straight line: the differences bend over the sizes,
so their slope isn't stated."""
Family = Literal["primary", "exploratory"]
"""primary: told before the runs, Holm over all of them. exploratory: everything else, Benjamini-Hochberg."""

ALPHA = 0.05
NEAR_CHANCE = 0.1
"""A score less than this share of the way from chance to the best possible value is near chance."""


@dataclass(frozen=True)
class Level:
    """Where two arms stand on a metric, so that a difference between them can be called small."""

    arm: float
    rival: float
    chance: float | None
    """The metric's expectation under a random order. None: not known; then a metric that rises is taken to
    start at 0."""
    best: float
    """The best possible value: 1, or 0 where lower values are better."""

    @property
    def near_chance(self) -> bool:
        """Whether either arm is so near chance, or worse, that a difference says nothing. True where chance
        isn't known at all."""
        chance = self.chance if self.chance is not None else 0.0
        if chance == self.best:
            return True
        return any((score - chance) / (self.best - chance) < NEAR_CHANCE for score in (self.arm, self.rival))


def margin_of(levels: Sequence[Level], share: float) -> float | None:
    """The largest difference that is none: `share` of the rival's score, averaged over `levels`. None: one is
    near chance."""
    if not levels or any(level.near_chance for level in levels):
        return None
    return share * sum(level.rival for level in levels) / len(levels)


def verdict(gain: float, adjusted: float | None, within: float | None = None, these_runs: bool = False) -> Outcome:
    """`gain`: positive where the first arm is the better one; `adjusted`: p of a difference, None: no test;
    `within`: p of TOST."""
    if adjusted is None:
        return "not judged"
    if adjusted <= ALPHA and gain != 0:
        if these_runs:
            return "better in these runs" if gain > 0 else "worse in these runs"
        return "better" if gain > 0 else "worse"
    return "equivalent" if within is not None and within <= ALPHA and not these_runs else "not shown"

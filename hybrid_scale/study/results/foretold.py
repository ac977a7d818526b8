"""The study's own predictions, written in its file before the runs, held against them.

A prediction is a conjunction of statements on two arms each: one scores better than the other, or at most so many points below
it. Its verdict comes from intervals over questions and seeds (crossed.py):

    holds       every statement's 95 % interval lies on its side. No correction is due: all must hold, and the chance that they
                all seem to where one is false is at most that of the false one (intersection-union test, Berger 1982)
    fails       some statement's interval lies wholly on the other side, at 1 - 0.05 / (number of statements)
    not shown   neither
    not judged  too few seeds, or a run that isn't finished; the reason stands with it

Knows no HTML.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal, get_args

from hybrid_scale.study.results.collect import Collected
from hybrid_scale.study.results.comparisons import Comparison, compare_named, few_seeds
from hybrid_scale.study.results.scores import METRICS, Arm, Metric, arms
from hybrid_scale.study.results.verdicts import ALPHA
from hybrid_scale.study.settings import Prediction

Verdict = Literal["holds", "fails", "not shown", "not judged"]


@dataclass(frozen=True)
class Statement:
    """`arm` scores better than `rival`, or at most `allowed` below it."""

    arm: str
    rival: str
    allowed: float = 0.0


@dataclass(frozen=True)
class Foretold:
    """One prediction on one metric at one size."""

    says: str
    task: str
    metric: Metric
    group: str
    model: str
    statements: tuple[Statement, ...]
    known: Mapping[tuple[str, str], Comparison]

    @property
    def verdict(self) -> Verdict:
        if self.missing:
            return "not judged"
        level = 1 - ALPHA / len(self.statements)
        if any(self._gain(each, level)[1] < -each.allowed for each in self.statements):
            return "fails"
        holds = all(self._gain(each, 1 - ALPHA)[0] > -each.allowed for each in self.statements)
        return "holds" if holds else "not shown"

    @property
    def missing(self) -> str:
        """Why the verdict is "not judged"; else empty."""
        absent = [f"{each.arm} and {each.rival}" for each in self.statements if (each.arm, each.rival) not in self.known]
        if absent:
            return f"no seed of {absent[0]} has finished"
        reasons = (each.refusal or few_seeds(each.seeds.count) for each in self.known.values() if each.both is None)
        return next(reasons, "")

    def numbers(self) -> list[str]:
        """`mono - mixed +0.0312 [+0.0280, +0.0344]`: the difference of each statement with its 95 % interval."""
        shown = []
        for each in self.statements:
            found = self.known.get((each.arm, each.rival))
            if found is not None:
                places = self.metric.decimals
                bounds = f" [{found.interval.low:+.{places}f}, {found.interval.high:+.{places}f}]" if found.interval else ""
                shown.append(f"{each.arm} \N{MINUS SIGN} {each.rival} {found.difference:+.{places}f}{bounds}")
        return shown

    def _gain(self, each: Statement, level: float) -> tuple[float, float]:
        """Interval of the difference, positive where `arm` is the better one."""
        both = self.known[each.arm, each.rival].both
        assert both is not None
        low, high = both.interval(level)
        return (low, high) if self.metric.higher_is_better else (-high, -low)


def statements(prediction: Prediction) -> tuple[Statement, ...]:
    """Of neighbouring groups, each arm of the later one with each of the earlier one."""
    if prediction.within:
        return tuple(Statement(prediction.within.arm, rival, prediction.within.points) for rival in prediction.within.of)
    return tuple(
        Statement(better, worse) for first, then in pairwise(prediction.worst_first) for worse in first for better in then
    )


def foretold(predictions: Sequence[Prediction], collected: Collected, directories: dict[str, Path]) -> list[Foretold]:
    """Every prediction on each of its metrics, at each size at which all its arms are part of the study."""
    found = []
    for prediction in predictions:
        parts = statements(prediction)
        for name in prediction.metrics:
            task, _, key = name.partition(":")
            metric = METRICS[key]
            named = [(each.arm, each.rival) for each in parts]
            compared = compare_named(collected, directories, task, metric, named)
            for group, members in _groups(arms(collected, task)).items():
                if {name for pair in named for name in pair} <= {arm.name for arm in members}:
                    known = {(each.arm, each.rival): each for each in compared if each.group == group}
                    found.append(Foretold(prediction.says, task, metric, group, members[0].model, parts, known))
    return found


def _groups(every: Sequence[Arm]) -> dict[str, list[Arm]]:
    by_group: dict[str, list[Arm]] = {}
    for arm in every:
        by_group.setdefault(arm.group, []).append(arm)
    return by_group


def counted(found: Sequence[Foretold]) -> str:
    """`Of 12 predictions that were written down before the runs: holds 7, fails 2, not shown 3.` Empty where there are none."""
    if not found:
        return ""
    counts = Counter(each.verdict for each in found)
    parts = [f"{verdict} {counts[verdict]}" for verdict in get_args(Verdict) if counts[verdict]]
    several = "predictions that were" if len(found) > 1 else "prediction that was"
    return f"Of {len(found)} {several} written down before the runs: {', '.join(parts)}."

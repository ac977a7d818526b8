"""Hybrid arms against the mono and cross arms, per model size, set and measure: paired by query, with what chance allows.

Chance of questions: differences of single queries, averaged over the seeds that both arms share, clustered by parallel question;
sign-flip p values, Holm over all tests of the study, BCa intervals. Chance of training: the difference of each shared seed, with
its spread. From three seeds on also both at once (crossed.py): what Holm lets stand but that interval doesn't is told as a fact
of these seeds only. Knows no HTML.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import pandas as pd

from hybrid_scale.errors import HybridScaleError
from hybrid_scale.statistics import (
    FEWEST_SEEDS,
    MARGIN,
    RESAMPLES,
    Clusters,
    Interval,
    Spread,
    Test,
    bootstrap,
    equivalence_test,
    holm,
    seed_spread,
    sign_flip_test,
)
from hybrid_scale.study.results.collect import Collected
from hybrid_scale.study.results.crossed import Crossed, crossed
from hybrid_scale.study.results.pairing import Reader, Unpaired, averaged, parts
from hybrid_scale.study.results.scores import METRICS, Arm, Metric, arms, crosses_languages, tasks

Outcome = Literal["better", "worse", "equivalent", "these seeds only", "not shown", "not tested"]

ALPHA = 0.05
PER_TEST = 40
"""Resamples for each test of the study: the least p, 1 / (40 n + 1), stays below ALPHA after Holm multiplies it by n."""
ACROSS_LANGUAGES = ("mono_map", "cross_map", "multi_map", "rank_distance")
IN_ONE_LANGUAGE = ("ndcg@10", "recall@100")
RIVALS = ("mono", "cross")


@dataclass(frozen=True)
class Comparison:
    """`arm` minus `rival` on one measure of one task, both trained on the same base."""

    task: str
    group: str
    series: str
    model: str
    size: float | None
    arm: str
    rival: str
    rival_kind: str
    metric: Metric
    seeds: Spread
    """Differences of the seeds that both have finished."""
    alone: tuple[int, ...] = ()
    """Seeds that only one of both has finished: they have no part in it."""
    interval: Interval | None = None
    test: Test | None = None
    adjusted: float | None = None
    """p after Holm over all tests of the study."""
    both: Crossed | None = None
    """The chance of questions and of seeds at once; None below FEWEST_SEEDS seeds."""
    equivalent: bool = False
    """Within MARGIN of each other by TOST, and by `both` where there is one; for measures between 0 and 1 alone."""
    refusal: str = ""
    """Why nothing is tested; the means stand."""
    parts: pd.DataFrame | None = field(default=None, repr=False, compare=False)
    """Each question's share of the difference (rows: parallel questions; columns: seeds); a column sums to its difference."""

    @property
    def difference(self) -> float:
        return self.seeds.mean

    @property
    def gain(self) -> float:
        """Positive where the hybrid arm is the better one."""
        return self.difference if self.metric.higher_is_better else -self.difference

    @property
    def outcome(self) -> Outcome:
        if self.test is None or self.adjusted is None:
            return "not tested"
        if self.adjusted <= ALPHA:
            if self.both is not None and self.both.holds_zero:
                return "these seeds only"
            return "better" if self.gain > 0 else "worse"
        return "equivalent" if self.equivalent else "not shown"


def compare(collected: Collected, directories: dict[str, Path]) -> list[Comparison]:
    """All comparisons of the study. `directories`: run id -> its directory, for the tables of single queries.

    Where such a table is missing or can't be paired, the comparison has a `refusal` and no test.
    """
    pairs = [pair for task in tasks(collected) for pair in _pairs(task, arms(collected, task))]
    resamples = max(RESAMPLES, PER_TEST * len(pairs))
    found = []
    for (_, _), members in itertools.groupby(pairs, key=lambda pair: (pair.task, pair.hybrid.group)):
        reader = Reader(directories)  # its tables are large: those of one group at a time
        found += [_compared(pair, reader, resamples) for pair in members]
    adjusted = iter(holm([each.test.p for each in found if each.test is not None]))
    return [replace(each, adjusted=next(adjusted)) if each.test is not None else each for each in found]


@dataclass(frozen=True)
class _Pair:
    """Two arms to compare on one measure."""

    task: str
    hybrid: Arm
    rival: Arm
    metric: Metric

    @property
    def seeds(self) -> list[int]:
        ours, theirs = (arm.scores[self.metric.key].by_seed for arm in (self.hybrid, self.rival))
        return sorted(set(ours) & set(theirs))


def _pairs(task: str, every: Sequence[Arm]) -> Iterator[_Pair]:
    """Those with a seed in common, group by group."""
    keys = ACROSS_LANGUAGES if crosses_languages(every) else IN_ONE_LANGUAGE
    for hybrid, rival in _opponents(every):
        for key in keys:
            if key in hybrid.scores and key in rival.scores:
                pair = _Pair(task, hybrid, rival, METRICS[key])
                if pair.seeds:
                    yield pair


def _opponents(every: Sequence[Arm]) -> Iterator[tuple[Arm, Arm]]:
    """Each hybrid arm with each mono and cross arm that differs in batches alone, group by group."""
    for group in dict.fromkeys(arm.group for arm in every):
        members = [arm for arm in every if arm.group == group]
        hybrids, rivals = ([arm for arm in members if arm.kind in kinds] for kinds in (("hybrid",), RIVALS))
        yield from itertools.product(hybrids, rivals)


def _compared(pair: _Pair, reader: Reader, resamples: int) -> Comparison:
    hybrid, rival, key = pair.hybrid, pair.rival, pair.metric.key
    ours, theirs = hybrid.scores[key].by_seed, rival.scores[key].by_seed
    spread = seed_spread([ours[seed] - theirs[seed] for seed in pair.seeds])
    names = (pair.task, hybrid.group, hybrid.series, hybrid.model, hybrid.size, hybrid.name, rival.name, rival.kind)
    means = Comparison(*names, pair.metric, spread, tuple(sorted(set(ours) ^ set(theirs))))
    try:
        runs = [(hybrid.run_of[seed], rival.run_of[seed]) for seed in pair.seeds]
        by_seed = reader.differences(pair.task, runs, key)
        return judged(replace(means, parts=parts(by_seed, pair.seeds)), averaged(by_seed), resamples)
    except (HybridScaleError, Unpaired) as error:
        return replace(means, refusal=str(error).rstrip("."))


def judged(means: Comparison, differences: Clusters, resamples: int) -> Comparison:
    """`means` with interval, test and equivalence, and with both kinds of chance where it has `parts` of enough seeds."""
    if len(differences) < 2:
        return replace(means, refusal="one parallel question: no spread")
    both = crossed(means.parts.to_numpy().T) if means.parts is not None else None
    return replace(
        means,
        interval=bootstrap(differences),
        test=sign_flip_test(differences, resamples),
        both=both,
        equivalent=_equivalent(means.metric, differences, both),
    )


def _equivalent(metric: Metric, differences: Clusters, both: Crossed | None) -> bool:
    if metric.key.startswith("rank_distance") or not equivalence_test(differences, MARGIN, ALPHA).equivalent:
        return False
    low, high = both.interval(1 - 2 * ALPHA) if both else (0.0, 0.0)
    return low > -MARGIN and high < MARGIN


def uncompared(every: Sequence[Arm]) -> list[str]:
    """Pairs of one task, each in words, that no comparison has, because no seed of both is finished."""
    return [
        _pair_in_words(hybrid.name, rival.name, hybrid.group)
        for hybrid, rival in _opponents(every)
        if not seeds_of(hybrid) & seeds_of(rival)
    ]


def _pair_in_words(arm: str, rival: str, group: str) -> str:
    return f"{arm} minus {rival}" + (f" ({group})" if group else "")


def _some(found: Sequence[str], most: int = 4) -> str:
    return ", ".join(found[:most]) + (f" and {len(found) - most} more" if len(found) > most else "")


def seeds_of(arm: Arm) -> set[int]:
    """Seeds with a score that counts."""
    return {seed for score in arm.scores.values() for seed in score.by_seed}


def cautions(comparisons: Sequence[Comparison], every: Sequence[Arm] = ()) -> list[str]:
    """What must be said beside the table of one task with these arms, once each."""
    said = [each.refusal for each in comparisons if each.refusal]
    absent = uncompared(every)
    if absent:
        said.append(f"not compared, as no seed of both arms is finished: {_some(absent)}")
    alone = dict.fromkeys(
        f"{_pair_in_words(each.arm, each.rival, each.group)} without seed {', '.join(map(str, each.alone))}"
        for each in comparisons
        if each.alone
    )
    if alone:
        said.append(f"seeds that only one of both arms has finished are left out: {_some(list(alone))}")
    few = [each for each in comparisons if each.seeds.count < FEWEST_SEEDS]
    if few:
        counts = sorted({each.seeds.count for each in few})
        shown = " or ".join(map(str, counts))
        said.append(
            f"{len(few)} of {len(comparisons)} comparisons rest on {shown} {'seed' if counts == [1] else 'seeds'}: at least "
            f"{FEWEST_SEEDS} are needed to tell a difference from the chance of training, which the tests below don't hold"
        )
    return list(dict.fromkeys(said))

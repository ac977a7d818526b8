"""Arms of a study against each other, per model size, set and metric: paired by query, with what chance
allows.

Hybrid arms against the mono and cross arms, and whatever the primary family names. Differences of single
queries, seed by seed, clustered by parallel question. From FEWEST_SEEDS seeds on the p value is that of
questions and seeds together (crossed.py); with fewer it is that of the questions alone, and speaks of the
trained models only. Which p values are adjusted with which others is decided in primary.py. Knows no HTML.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean

import pandas as pd

from hybrid_scale.errors import HybridScaleError
from hybrid_scale.statistics import FEWEST_SEEDS, Clusters, Interval, Spread, Test, bootstrap, seed_spread, sign_flip_test
from hybrid_scale.study.family import Family
from hybrid_scale.study.results import verdicts
from hybrid_scale.study.results.collect import Collected
from hybrid_scale.study.results.crossed import Crossed, SeedChance, crossed
from hybrid_scale.study.results.pairing import Reader, Unpaired
from hybrid_scale.study.results.scores import METRICS, Arm, Metric, arms, compared_metrics, tasks
from hybrid_scale.study.results.verdicts import Level, Outcome, margin_of, verdict

RIVALS = ("mono", "cross")


@dataclass(frozen=True)
class Comparison:
    """`arm` minus `rival` on one metric of one task, both trained on the same base."""

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
    both: Crossed | None = None
    """The chance of questions and of seeds at once; None below FEWEST_SEEDS seeds."""
    test: Test | None = None
    """Below FEWEST_SEEDS seeds: of the questions alone, for these runs."""
    interval: Interval | None = None
    """95 % of questions and seeds (`crossed`); below FEWEST_SEEDS seeds of the questions alone, for these runs."""
    chance: SeedChance | None = None
    """Variance of one seed's difference, from the seeds of all arms of this model."""
    level: Level | None = None
    margin: float | None = None
    """Differences within it are none; None near chance."""
    family: verdicts.Family = "exploratory"
    adjusted: float | None = None
    """p after Holm over the primary family, or after Benjamini-Hochberg over the exploratory comparisons of
    the study."""
    within: float | None = None
    """p of TOST, adjusted likewise; None where nothing may be called equivalent."""
    refusal: str = ""
    """Why nothing is tested; the means stand."""
    parts: pd.DataFrame | None = field(default=None, repr=False, compare=False)
    """Each question's share of the difference (rows: parallel questions; columns: seeds); a column sums to
    its difference."""

    @property
    def difference(self) -> float:
        return self.seeds.mean

    @property
    def gain(self) -> float:
        """Positive where `arm` is the better one."""
        return self.difference if self.metric.higher_is_better else -self.difference

    @property
    def p(self) -> float | None:
        """Of questions and seeds; below FEWEST_SEEDS seeds of questions alone; None where nothing is tested."""
        return self.both.p if self.both else self.test.p if self.test else None

    @property
    def outcome(self) -> Outcome:
        if self.family == "primary" and self.both is None:
            return "not judged"
        return verdict(self.gain, self.adjusted, self.within, these_runs=self.both is None)

    @property
    def reason(self) -> str:
        """Why the outcome is "not judged"; else empty."""
        if self.outcome != "not judged":
            return ""
        return self.refusal or few_seeds(self.seeds.count)


def few_seeds(count: int) -> str:
    return f"{count} seed{'s' * (count != 1)} of both arms; at least {FEWEST_SEEDS} are needed to know the chance of training"


def compare(collected: Collected, directories: dict[str, Path], family: Family | None = None) -> list[Comparison]:
    """All comparisons of the study, none adjusted yet. `directories`: run id -> its directory, for the tables
    of single queries.

    Where such a table is missing or can't be paired, the comparison has a `refusal` and no test.
    """
    family = family or Family()
    pairs = [pair for task in tasks(collected) for pair in _pairs(task, arms(collected, task), family)]
    found = []
    for (_, _), members in itertools.groupby(pairs, key=lambda pair: (pair.task, pair.hybrid.group)):
        reader = Reader(directories, collected.beir)  # its tables are large: those of one group at a time
        found += [_compared(pair, reader, family.margin) for pair in members]
    return found


@dataclass(frozen=True)
class _Pair:
    """Two arms to compare on one metric."""

    task: str
    hybrid: Arm
    rival: Arm
    metric: Metric
    chance: SeedChance | None
    """Of one arm's score."""

    @property
    def seeds(self) -> list[int]:
        ours, theirs = (arm.scores[self.metric.key].by_seed for arm in (self.hybrid, self.rival))
        return sorted(set(ours) & set(theirs))


def _pairs(task: str, every: Sequence[Arm], family: Family) -> Iterator[_Pair]:
    """Those with a seed in common, group by group."""
    keys = tuple(dict.fromkeys((*compared_metrics(every), *(metric for name, metric in family.metrics if name == task))))
    for hybrid, rival in _opponents(every, family):
        for key in keys:
            if key in hybrid.scores and key in rival.scores:
                pair = _Pair(task, hybrid, rival, METRICS[key], seed_chance(every, hybrid.group, key))
                if pair.seeds:
                    yield pair


def seed_chance(every: Sequence[Arm], group: str, key: str) -> SeedChance | None:
    """Between the seeds of one arm, from all arms of the group."""
    members = [arm for arm in every if arm.group == group and key in arm.scores]
    return SeedChance.pooled([list(arm.scores[key].by_seed.values()) for arm in members])


def compare_named(
    collected: Collected, directories: dict[str, Path], task: str, metric: Metric, named: Sequence[tuple[str, str]]
) -> list[Comparison]:
    """On one metric, each of the pairs (arm, rival) `named`, in every group in which a seed of both is finished; unadjusted."""
    every, reader, found = arms(collected, task), Reader(directories, collected.beir), []
    for group in dict.fromkeys(arm.group for arm in every):
        members = {arm.name: arm for arm in every if arm.group == group and metric.key in arm.scores}
        for ours, theirs in named:
            if ours in members and theirs in members:
                pair = _Pair(task, members[ours], members[theirs], metric, seed_chance(every, group, metric.key))
                found += [_compared(pair, reader, 0.0)] if pair.seeds else []
    return found


def _opponents(every: Sequence[Arm], family: Family) -> Iterator[tuple[Arm, Arm]]:
    """Each hybrid arm with each mono and cross arm that differs in batches alone, and the family's pairs,
    group by group."""
    for group in dict.fromkeys(arm.group for arm in every):
        members = [arm for arm in every if arm.group == group]
        for arm, rival in itertools.product(members, members):
            usual = arm.kind == "hybrid" and rival.kind in RIVALS
            if usual or (arm.name == family.arm and rival.name in family.rivals):
                yield arm, rival


def _compared(pair: _Pair, reader: Reader, margin: float) -> Comparison:
    hybrid, rival, key = pair.hybrid, pair.rival, pair.metric.key
    ours, theirs = hybrid.scores[key].by_seed, rival.scores[key].by_seed
    spread = seed_spread([ours[seed] - theirs[seed] for seed in pair.seeds])
    names = (pair.task, hybrid.group, hybrid.series, hybrid.model, hybrid.size, hybrid.name, rival.name, rival.kind)
    best = 1.0 if pair.metric.higher_is_better else 0.0
    stands, faces = (fmean(scores[seed] for seed in pair.seeds) for scores in (ours, theirs))
    level = Level(stands, faces, hybrid.scores[key].chance, best)
    means = Comparison(
        *names,
        pair.metric,
        spread,
        tuple(sorted(set(ours) ^ set(theirs))),
        chance=pair.chance.of_difference() if pair.chance else None,
        level=level,
        margin=margin_of([level], margin),
    )
    try:
        runs = [(hybrid.run_of[seed], rival.run_of[seed]) for seed in pair.seeds]
        shares, questions = reader.paired(pair.task, runs, key, pair.seeds)
        return with_tests(replace(means, parts=shares), questions)
    except (HybridScaleError, Unpaired) as error:
        return replace(means, refusal=str(error).rstrip("."))


def with_tests(means: Comparison, differences: Clusters) -> Comparison:
    """`means` with a test and an interval: of questions and seeds where it has `parts` of enough seeds, else of the questions."""
    if len(differences) < 2:
        return replace(means, refusal="one parallel question: no spread")
    both = crossed(means.parts.to_numpy().T, means.chance) if means.parts is not None else None
    if both is not None:
        return replace(means, both=both, interval=interval_of(both))
    return replace(means, interval=bootstrap(differences), test=sign_flip_test(differences))


def interval_of(both: Crossed, level: float = 0.95) -> Interval:
    return Interval(both.estimate, *both.interval(level), level, both.questions, "crossed")


def uncompared(every: Sequence[Arm], family: Family | None = None) -> list[str]:
    """Pairs of one task, each in words, that no comparison has, because no seed of both is finished."""
    return [
        _pair_in_words(hybrid.name, rival.name, hybrid.group)
        for hybrid, rival in _opponents(every, family or Family())
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
            f"{FEWEST_SEEDS} are needed to tell a difference from the chance of training, so the tests speak of these runs alone"
        )
    return list(dict.fromkeys(said))

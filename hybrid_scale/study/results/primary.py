"""The claims that a study is for, told before its runs, and what the runs say of each; and what belongs to no
claim.

A claim is a difference between two arms at the largest size, or its change between two sizes: the difference
of differences, paired question by question and seed by seed. The chance of one false claim among all is held
at ALPHA by Holm over p values that hold questions and seeds; so is that of one false equivalence. A claim
that couldn't be tested stays in the family, at p = 1. All other comparisons are exploratory:
Benjamini-Hochberg holds the share of false ones. Knows no HTML.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import pandas as pd

from hybrid_scale.statistics import benjamini_hochberg, holm
from hybrid_scale.study.family import Family
from hybrid_scale.study.results.collect import Collected
from hybrid_scale.study.results.comparisons import Comparison, few_seeds
from hybrid_scale.study.results.crossed import Crossed, SeedChance, crossed
from hybrid_scale.study.results.scores import METRICS, Arm, Metric, arms, compared_metrics, crosses_languages, tasks
from hybrid_scale.study.results.verdicts import Level, Outcome, margin_of, verdict

Kind = Literal["difference", "change"]
"""At the largest size; between two sizes."""


@dataclass(frozen=True)
class Claim:
    """One member of the primary family."""

    kind: Kind
    task: str
    series: str
    arm: str
    rival: str
    metric: Metric
    models: tuple[str, ...]
    """The largest; of a change the smaller and the larger one."""
    sizes: tuple[float | None, ...] = ()
    """Parameters of each of `models`."""
    levels: tuple[Level | None, ...] = ()
    """Mean scores of arm and rival at each of `models`, as far as they are finished."""
    both: Crossed | None = None
    """The difference, or its change, with the chance of questions and seeds together."""
    margin: float | None = None
    """Differences within it are none; None near chance or where it isn't known."""
    adjusted: float | None = None
    """p after Holm over the family; None where there is no test."""
    within: float | None = None
    """p of TOST after Holm over the family; None where nothing may be called equivalent."""
    refusal: str = ""
    """Why there is no test: what the outcome "not judged" rests on."""

    @property
    def differences(self) -> tuple[float | None, ...]:
        """`arm` minus `rival` at each of `models`."""
        return tuple(level.arm - level.rival if level else None for level in self.levels)

    @property
    def estimate(self) -> float | None:
        """The difference, or its change from the first of `models` to the second."""
        if self.both:
            return self.both.estimate
        known = [each for each in self.differences if each is not None]
        if not known or len(known) < len(self.models):
            return None
        return known[-1] - (known[0] if self.kind == "change" else 0.0)

    @property
    def gain(self) -> float | None:
        """The estimate where positive is in favour of `arm`."""
        if self.estimate is None:
            return None
        return self.estimate if self.metric.higher_is_better else -self.estimate

    @property
    def p(self) -> float | None:
        return self.both.p if self.both else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % of questions and seeds, for this claim alone."""
        return self.both.interval() if self.both else None

    @property
    def near_chance(self) -> bool:
        return any(level is not None and level.near_chance for level in self.levels)

    @property
    def outcome(self) -> Outcome:
        """Of a change: "better" moves in favour of `arm` from the smaller to the larger size, "equivalent"
        doesn't move."""
        return verdict(self.gain or 0.0, self.adjusted, self.within)


def claims(family: Family, collected: Collected, comparisons: Sequence[Comparison]) -> list[Claim]:
    """The whole family in its order, tested or not, adjusted over all its members. Empty where the study has
    none."""
    if family.refusal:
        return []
    found = [
        claim for name, metric in _metrics(family, collected) for claim in _claims(family, collected, comparisons, name, metric)
    ]
    return adjusted(found)


def adjusted(found: Sequence[Claim]) -> list[Claim]:
    """Both kinds of p after Holm; an untested claim counts with p = 1."""
    differ = holm([1.0 if claim.p is None else claim.p for claim in found])
    within = holm([claim.both.p_within(claim.margin) if claim.both and claim.margin else 1.0 for claim in found])
    return [
        replace(claim, adjusted=p, within=same if claim.margin else None) if claim.both else claim
        for claim, p, same in zip(found, differ, within, strict=True)
    ]


def _metrics(family: Family, collected: Collected) -> Iterator[tuple[str, str]]:
    if family.metrics:
        yield from family.metrics
        return
    for task in tasks(collected):
        every = arms(collected, task)
        for key in compared_metrics(every)[: 3 if crosses_languages(every) else 1]:
            yield task, key


def _claims(family: Family, collected: Collected, comparisons: Sequence[Comparison], task: str, metric: str) -> Iterator[Claim]:
    """Of one metric: for each series and rival, the difference at the largest size, then the change between
    two sizes."""
    every = arms(collected, task)
    for series in dict.fromkeys(arm.series for arm in every):
        members = [arm for arm in every if arm.series == series and arm.name == family.arm]
        smaller, larger = contrasted(family, members)
        if larger is None:
            continue
        for rival in family.rivals:
            known = {
                each.model: each
                for each in comparisons
                if (each.task, each.series, each.arm, each.rival, each.metric.key) == (task, series, family.arm, rival, metric)
            }
            facts = (task, series, family.arm, rival, METRICS[metric])
            yield difference(facts, larger.model, larger.size, known.get(larger.model))
            if smaller is not None:
                names, sizes = (smaller.model, larger.model), (smaller.size, larger.size)
                yield change(facts, names, sizes, (known.get(smaller.model), known.get(larger.model)), family.margin)


def contrasted(family: Family, members: Sequence[Arm]) -> tuple[Arm | None, Arm | None]:
    """The arm at the smaller and at the larger size of the contrast; None where there is one size only."""
    by_model = {arm.model: arm for arm in members}
    if family.contrast:
        smaller, larger = (by_model.get(name) for name in family.contrast)
        return smaller, larger
    sized = sorted((arm for arm in by_model.values() if arm.size is not None), key=lambda arm: arm.size or 0.0)
    if len({arm.size for arm in sized}) > 1:
        return sized[0], sized[-1]
    return None, next(iter(by_model.values()), None)


Facts = tuple[str, str, str, str, Metric]
"""Of a claim: task, series, arm, rival, metric."""


def difference(facts: Facts, model: str, size: float | None, known: Comparison | None) -> Claim:
    """The claim at one size; `known`: the comparison there, None where no seed of both arms is finished."""
    claim = Claim("difference", *facts, (model,), (size,))
    if known is None:
        return replace(claim, levels=(None,), refusal=_unfinished(facts, [model]))
    claim = replace(claim, levels=(known.level,), margin=known.margin)
    return (
        replace(claim, both=known.both) if known.both else replace(claim, refusal=known.refusal or few_seeds(known.seeds.count))
    )


def change(
    facts: Facts,
    models: tuple[str, str],
    sizes: tuple[float | None, float | None],
    known: tuple[Comparison | None, Comparison | None],
    margin: float,
) -> Claim:
    """The claim of a change from the first to the second of `models`; `margin`: share of the rival's score."""
    levels = tuple(each.level if each else None for each in known)
    claim = Claim("change", *facts, models, sizes, levels)
    first, second = known
    if first is None or second is None:
        return replace(
            claim, refusal=_unfinished(facts, [name for name, each in zip(models, known, strict=True) if each is None])
        )
    both, refusal = contrast([first, second], np.array([-1.0, 1.0]))
    shown = [level for level in levels if level]
    return replace(claim, both=both, refusal=refusal, margin=margin_of(shown, margin) if len(shown) == 2 else None)


def _unfinished(facts: Facts, models: Sequence[str]) -> str:
    task, _, arm, rival, metric = facts
    return f"no seed of {arm} and {rival} has finished with {metric.label} on {task} at {' and '.join(models)}"


# ---------------------------------------------------------------------------------------------------------------- contrasts


def contrast(line: Sequence[Comparison], weights: np.ndarray) -> tuple[Crossed | None, str]:
    """`weights` @ the differences of `line` with both kinds of chance, or why it is not judged."""
    parts, refusal = combined(line, weights)
    if parts is None:
        return None, refusal
    both = crossed(parts, SeedChance.combined([each.chance for each in line], list(map(float, weights))))
    return both, "" if both else few_seeds(len(parts))


def combined(line: Sequence[Comparison], weights: np.ndarray) -> tuple[np.ndarray | None, str]:
    """Shares [S, G] of `weights` @ the differences, of the seeds that all of `line` have; or why there are
    none."""
    tables = [each.parts for each in line if each.parts is not None]
    if len(tables) < len(line):
        return None, next((each.refusal for each in line if each.refusal), "") or "single queries of a size are missing"
    if any(set(table.index) != set(tables[0].index) for table in tables):
        return None, "the sizes answered different questions"
    seeds = sorted(set.intersection(*({int(seed) for seed in table.columns} for table in tables)))
    if not seeds:
        return None, "no seed is finished at every size"
    stacked = np.stack([_cells(table, tables[0].index, seeds) for table in tables])
    return np.tensordot(weights, stacked, 1), ""


def _cells(table: pd.DataFrame, questions: pd.Index, seeds: Sequence[int]) -> np.ndarray:
    cells: np.ndarray = table.loc[questions, list(seeds)].to_numpy().T
    return cells


# --------------------------------------------------------------------------------------------------------------- exploratory


def sorted_out(comparisons: Sequence[Comparison], found: Sequence[Claim]) -> list[Comparison]:
    """Each comparison with its family: those that are a claim have the claim's p, the others theirs after
    Benjamini-Hochberg."""
    by_key = {_key(claim.models[0], claim): claim for claim in found if claim.kind == "difference"}
    rest = [each for each in comparisons if _key(each.model, each) not in by_key]
    explored = {id(each): value for each, value in zip(rest, _explored(rest), strict=True)}
    result = []
    for each in comparisons:
        claim = by_key.get(_key(each.model, each))
        if claim is not None:
            result.append(replace(each, family="primary", adjusted=claim.adjusted, within=claim.within))
        else:
            adjusted, within = explored[id(each)]
            result.append(replace(each, adjusted=adjusted, within=within))
    return result


def _key(model: str, each: Claim | Comparison) -> tuple[str, ...]:
    return each.task, each.series, model, each.arm, each.rival, each.metric.key


def _explored(rest: Sequence[Comparison]) -> list[tuple[float | None, float | None]]:
    """Adjusted p of a difference and of TOST for each; None where there is none."""
    differ = [math.nan if each.p is None else each.p for each in rest]
    within = [each.both.p_within(each.margin) if each.both and each.margin else math.nan for each in rest]
    return list(zip(discoveries(differ), discoveries(within), strict=True))


def discoveries(p_values: Sequence[float]) -> list[float | None]:
    """Benjamini-Hochberg over those that are no NaN; None in place of the others."""
    adjusted = iter(benjamini_hochberg([p for p in p_values if not math.isnan(p)]))
    return [None if math.isnan(p) else next(adjusted) for p in p_values]

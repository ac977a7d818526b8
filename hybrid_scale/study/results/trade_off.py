"""Where each arm stands between monolingual and cross-lingual quality, with what chance allows: the points of the first figure.

A curve joins comparable runs over alpha, the share of monolingual batches: cross (0), hybrid, mono (1). Arms
that have no alpha (mixed pools) stand alone. From FEWEST_SEEDS seeds on an interval holds the chance of questions
and seeds as crossed factors, below that the chance of questions alone. Knows no HTML.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd

from hybrid_scale.errors import HybridScaleError
from hybrid_scale.runs import RunDirectory
from hybrid_scale.statistics import bootstrap
from hybrid_scale.study.results.crossed import clusters_of, crossed
from hybrid_scale.study.results.pairing import parts
from hybrid_scale.study.results.queries import Queries, read_queries
from hybrid_scale.study.results.scores import Arm

MONO, CROSS = "mono_map", "cross_map"
SHARE_OF_KIND = {"cross": 0.0, "mono": 1.0}

Chance = Literal["questions and seeds", "questions", "nothing"]


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds; `low` and `high` are 95 % of what `chance` names, and the mean itself where that is nothing."""

    mean: float
    low: float
    high: float
    chance: Chance


@dataclass(frozen=True)
class Standing:
    """One arm on both axes."""

    arm: Arm
    share: float | None
    """Of monolingual batches; None: not on a curve."""
    mono: Estimate
    cross: Estimate


def standings(task: str, every: Sequence[Arm], directories: Mapping[str, Path]) -> list[Standing]:
    """Of the arms with both metrics. `directories`: run id -> its directory, for the tables of single queries."""
    return list(_standings(task, every, directories))


def _standings(task: str, every: Sequence[Arm], directories: Mapping[str, Path]) -> Iterator[Standing]:
    for arm in every:
        if {MONO, CROSS} <= set(arm.scores):
            tables = _tables(task, arm, directories)
            yield Standing(arm, share_of(arm), _estimate(arm, MONO, tables), _estimate(arm, CROSS, tables))


def share_of(arm: Arm) -> float | None:
    """Of monolingual batches; None: the arm's batches are of another type."""
    return arm.alpha if arm.kind == "hybrid" else SHARE_OF_KIND.get(arm.kind)


def curves(found: Sequence[Standing]) -> list[list[Standing]]:
    """The standings of each group of comparable runs over alpha, cross first; of two arms with one share the first counts.

    A group with a single one of them is a curve of one point. Groups come in the order of their size.
    """
    by_group: dict[str, dict[float, Standing]] = {}
    for each in sorted(found, key=lambda each: each.arm.size or 0.0):
        if each.share is not None:
            by_group.setdefault(each.arm.group, {}).setdefault(each.share, each)
    return [[points[share] for share in sorted(points)] for points in by_group.values()]


def _tables(task: str, arm: Arm, directories: Mapping[str, Path]) -> dict[int, Queries]:
    """Single queries by seed; empty unless every seed has readable ones of the same set. What is wrong was told by `collect`."""
    files = {
        seed: RunDirectory(directories[run]).evaluation_file(task).with_suffix(".parquet") for seed, run in arm.run_of.items()
    }
    try:
        tables = {seed: read_queries(files[seed]) for seed in arm.scores[MONO].by_seed if files[seed].exists()}
    except HybridScaleError:
        return {}
    whole = len(tables) == len(arm.scores[MONO].by_seed) and len({table.fingerprint for table in tables.values()}) == 1
    return tables if whole else {}


def _estimate(arm: Arm, key: str, tables: Mapping[int, Queries]) -> Estimate:
    mean = arm.scores[key].mean
    seeds = [seed for seed in sorted(arm.scores[key].by_seed) if seed in tables]
    values = [tables[seed].values(key) for seed in seeds]
    known = [table.sort_values(["query", "pool"]) for table in values if table is not None and not table["value"].isna().all()]
    if not known or len(known) < len(arm.scores[key].by_seed) or not all(_same_queries(known[0], table) for table in known):
        return Estimate(mean, mean, mean, "nothing")
    shares = parts(known, seeds).to_numpy().T
    both = crossed(shares)
    if both is not None:
        return Estimate(mean, *both.interval(), "questions and seeds")
    interval = bootstrap(clusters_of(np.asarray(shares.mean(0))))
    return Estimate(mean, interval.low, interval.high, "questions")


def _same_queries(first: pd.DataFrame, second: pd.DataFrame) -> bool:
    return all(np.array_equal(first[name].to_numpy(), second[name].to_numpy()) for name in ("query", "pool"))

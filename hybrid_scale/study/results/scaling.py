"""What changes with model size and what it costs: power laws of errors, quality against device-hours and memory.

Chooses the quantities; the arithmetic is in fits.py and pareto.py. Knows no HTML.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

from hybrid_scale.errors import HybridScaleError
from hybrid_scale.runs import RunDirectory
from hybrid_scale.statistics import Interval, bootstrap, sign_flip_test
from hybrid_scale.study.family import BEIR
from hybrid_scale.study.results.beir import joined
from hybrid_scale.study.results.collect import Collected
from hybrid_scale.study.results.comparisons import interval_of, seed_chance
from hybrid_scale.study.results.crossed import SeedChance, clusters_of, crossed, parts_of
from hybrid_scale.study.results.fits import PowerLaw, power_law
from hybrid_scale.study.results.pareto import Place, Point, places
from hybrid_scale.study.results.queries import clusters, read_queries
from hybrid_scale.study.results.scores import METRICS, Arm, Metric, arms, crosses_languages, main_metric, tasks
from hybrid_scale.study.results.verdicts import ALPHA


@dataclass(frozen=True)
class Quantity:
    """Something positive that should shrink with size, from the means of an arm."""

    label: str
    needs: tuple[str, ...]

    def of(self, arm: Arm) -> float | None:
        if not all(key in arm.scores for key in self.needs):
            return None
        first = arm.scores[self.needs[0]].mean
        return 1 - first if len(self.needs) == 1 else first - arm.scores[self.needs[1]].mean


ACROSS_LANGUAGES = (
    Quantity("1 \N{MINUS SIGN} mono mAP", ("mono_map",)),
    Quantity("1 \N{MINUS SIGN} cross mAP", ("cross_map",)),
    Quantity("1 \N{MINUS SIGN} multi mAP", ("multi_map",)),
    Quantity("gap: mono \N{MINUS SIGN} cross mAP", ("mono_map", "cross_map")),
)


def _error_of(metric: Metric) -> Quantity:
    return Quantity(f"1 \N{MINUS SIGN} {metric.label}", (metric.key,))


@dataclass(frozen=True)
class Law:
    """One quantity of one arm over the sizes of a series."""

    task: str
    series: str
    arm: str
    quantity: str
    law: PowerLaw


def laws(collected: Collected) -> list[Law]:
    """A law for each arm that was measured at more than one size; refused ones included. One value a size: the mean of seeds."""
    return [law for task in tasks(collected) for law in _of_task(task, arms(collected, task))]


def _of_task(task: str, every: Sequence[Arm]) -> Iterator[Law]:
    quantities = ACROSS_LANGUAGES if crosses_languages(every) else (_error_of(METRICS[main_metric(every)]),)
    lines = dict.fromkeys((arm.series, arm.name) for arm in every)
    for quantity in quantities:
        for series, name in lines:
            members = [arm for arm in every if (arm.series, arm.name) == (series, name) and arm.size is not None]
            points = {arm.size: value for arm in members if (value := quantity.of(arm)) is not None and arm.size is not None}
            if len(points) > 1:
                yield Law(task, series, name, quantity.label, power_law(list(points), list(points.values())))


@dataclass(frozen=True)
class Priced:
    """An arm of one model: its quality, and what one run of it took (means of finished runs; memory: the largest)."""

    task: str
    model: str
    arm: str
    metric: Metric
    quality: float
    interval: Interval | None
    """Of questions and seeds, below FEWEST_SEEDS seeds of questions alone; None where single queries are missing."""
    device_hours: float | None
    peak_gib: float | None
    by_hours: Place | None = None
    by_memory: Place | None = None
    """Place among all points of the task. "overlaps the front": paired by question and seed, it isn't shown to be
    worse than the best that costs no more."""


def priced(collected: Collected, directories: Mapping[str, Path]) -> list[Priced]:
    """Every evaluated arm of every model with its place on both fronts of its task."""
    return [each for task in tasks(collected) for each in _priced(collected, task, directories)]


@dataclass(frozen=True)
class _Measured:
    """An arm's shares of its mean score by question (rows) and seed (columns); None: single queries are missing."""

    arm: Arm
    shares: pd.DataFrame | None
    chance: SeedChance | None
    """Of one arm's score between seeds, from all arms of the model."""


def _priced(collected: Collected, task: str, directories: Mapping[str, Path]) -> Iterator[Priced]:
    every = [arm for arm in arms(collected, task) if arm.scores]
    metric = METRICS[main_metric(every)]
    done = collected.runs[collected.runs["status"] == "done"]
    measured = [
        _Measured(arm, _shares(collected, task, arm, metric, directories), seed_chance(every, arm.group, metric.key))
        for arm in every
        if metric.key in arm.scores
    ]
    found = [_price(task, each, metric, done) for each in measured]
    hours, memory = (_placed(found, measured, cost) for cost in ("device_hours", "peak_gib"))
    for position, each in enumerate(found):
        yield replace(each, by_hours=hours.get(position), by_memory=memory.get(position))


def _price(task: str, measured: _Measured, metric: Metric, done: pd.DataFrame) -> Priced:
    arm = measured.arm
    rows = done[(done["arm"] == arm.name) & (done["group"] == arm.group)]
    hours, memory = rows["device_hours"].dropna(), rows["peak_gib"].dropna()
    cost = (None if hours.empty else float(hours.mean()), None if memory.empty else float(memory.max()))
    return Priced(task, arm.model, arm.name, metric, arm.scores[metric.key].mean, _interval(measured), *cost)


def _shares(collected: Collected, task: str, arm: Arm, metric: Metric, directories: Mapping[str, Path]) -> pd.DataFrame | None:
    if collected.beir is None or task != BEIR:
        return _shares_of_set(task, arm, metric, directories)
    found = {name: _shares_of_set(member, arm, metric, directories) for name, member in collected.beir.tasks.items()}
    known = {name: table for name, table in found.items() if table is not None}
    return joined(known) if len(known) == len(found) else None


def _shares_of_set(task: str, arm: Arm, metric: Metric, directories: Mapping[str, Path]) -> pd.DataFrame | None:
    columns: dict[int, pd.Series] = {}
    for seed in arm.scores[metric.key].by_seed:
        file = RunDirectory(directories[arm.run_of[seed]]).evaluation_file(task).with_suffix(".parquet")
        try:
            values = read_queries(file).values(metric.key) if file.exists() else None
        except HybridScaleError:
            continue
        known = values.dropna(subset=["value"]) if values is not None else None
        if known is not None and (found := clusters(known)) is not None:
            columns[seed] = pd.Series(parts_of(found), index=np.unique(known["cluster"].to_numpy()))
    return pd.DataFrame(columns).dropna() if columns else None


def _interval(measured: _Measured) -> Interval | None:
    if measured.shares is None or len(measured.shares) < 2:
        return None
    cells = measured.shares.to_numpy().T
    both = crossed(cells, measured.chance)
    return interval_of(both) if both else bootstrap(clusters_of(cells.mean(0)))


def _placed(found: Sequence[Priced], measured: Sequence[_Measured], cost: str) -> dict[int, Place]:
    """Place of each that has this cost, by its position."""
    known = [position for position, each in enumerate(found) if getattr(each, cost) is not None]
    points = [Point(found[n].arm, found[n].quality, getattr(found[n], cost)) for n in known]
    return dict(zip(known, places(points, lambda one, other: _worse(measured[known[one]], measured[known[other]])), strict=True))


def _worse(one: _Measured, other: _Measured) -> bool:
    """Whether `one` is shown to be worse, question by question and seed by seed.

    Where they can't be paired, the means alone have said so.
    """
    if one.shares is None or other.shares is None or set(one.shares.index) != set(other.shares.index):
        return True
    seeds = [seed for seed in one.shares if seed in other.shares]
    if not seeds or len(one.shares) < 2:
        return True
    cells = (one.shares[seeds] - other.shares.loc[one.shares.index, seeds]).to_numpy().T
    same = one.arm.group == other.arm.group and one.chance is not None
    chance = one.chance.of_difference() if same and one.chance else SeedChance.combined([one.chance, other.chance], [1, -1])
    both = crossed(cells, chance)
    p = both.p if both else sign_flip_test(clusters_of(cells.mean(0))).p
    return p <= ALPHA and float(cells.sum()) < 0

"""What changes with model size and what it costs: power laws of errors, quality against device-hours and memory.

Chooses the quantities; the arithmetic is in fits.py and pareto.py. Knows no HTML.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd

from hybrid_scale.errors import HybridScaleError
from hybrid_scale.runs import RunDirectory
from hybrid_scale.statistics import Interval, bootstrap
from hybrid_scale.study.results.collect import Collected
from hybrid_scale.study.results.fits import PowerLaw, power_law
from hybrid_scale.study.results.pairing import linear
from hybrid_scale.study.results.pareto import Place, Point, places
from hybrid_scale.study.results.queries import clusters, read_queries
from hybrid_scale.study.results.scores import METRICS, Arm, Metric, arms, crosses_languages, tasks


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
IN_ONE_LANGUAGE = (Quantity("1 \N{MINUS SIGN} nDCG@10", ("ndcg@10",)),)


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
    quantities = ACROSS_LANGUAGES if crosses_languages(every) else IN_ONE_LANGUAGE
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
    """Of one seed's single queries (the first finished); None where their table is missing."""
    device_hours: float | None
    peak_gib: float | None
    by_hours: Place | None = None
    by_memory: Place | None = None


def priced(collected: Collected, directories: Mapping[str, Path]) -> list[Priced]:
    """Every evaluated arm of every model with its place on both fronts of its task."""
    return [each for task in tasks(collected) for each in _priced(collected, task, directories)]


def _priced(collected: Collected, task: str, directories: Mapping[str, Path]) -> Iterator[Priced]:
    every = [arm for arm in arms(collected, task) if arm.scores]
    metric = METRICS["multi_map" if crosses_languages(every) else "ndcg@10"]
    done = collected.runs[collected.runs["status"] == "done"]
    measured = [arm for arm in every if metric.key in arm.scores]
    found = [_price(task, arm, metric, done, directories) for arm in measured]
    hours, memory = _placed(found, "device_hours"), _placed(found, "peak_gib")
    for position, each in enumerate(found):
        yield replace(each, by_hours=hours.get(position), by_memory=memory.get(position))


def _price(task: str, arm: Arm, metric: Metric, done: pd.DataFrame, directories: Mapping[str, Path]) -> Priced:
    rows = done[(done["arm"] == arm.name) & (done["group"] == arm.group)]
    hours, memory = rows["device_hours"].dropna(), rows["peak_gib"].dropna()
    mean = arm.scores[metric.key].mean
    interval = _interval(task, arm, metric, directories, mean)
    cost = (None if hours.empty else float(hours.mean()), None if memory.empty else float(memory.max()))
    return Priced(task, arm.model, arm.name, metric, mean, interval, *cost)


def _interval(task: str, arm: Arm, metric: Metric, directories: Mapping[str, Path], mean: float) -> Interval | None:
    """As wide as that of the first seed whose single queries are there, around the mean of all seeds."""
    for seed in arm.scores[metric.key].by_seed:
        file = RunDirectory(directories[arm.run_of[seed]]).evaluation_file(task).with_suffix(".parquet")
        try:
            values = read_queries(file).values(metric.key) if file.exists() else None
            found = clusters(values) if values is not None else None
        except HybridScaleError:
            continue
        if found is not None and len(found) > 1:
            own = bootstrap(linear(found))
            moved = mean - own.estimate
            return Interval(mean, own.low + moved, own.high + moved, own.level, own.clusters, own.method)
    return None


def _placed(found: Sequence[Priced], cost: str) -> dict[int, Place]:
    """Place of each that has this cost, by its position."""
    known = [(position, each, getattr(each, cost)) for position, each in enumerate(found) if getattr(each, cost) is not None]
    points = [
        Point(each.arm, each.quality, price, *((each.interval.low, each.interval.high) if each.interval else ()))
        for _, each, price in known
    ]
    return dict(zip([position for position, _, _ in known], places(points), strict=True))

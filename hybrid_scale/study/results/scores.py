"""Collected values -> the mean and spread of each arm over its finished runs.

The one place that decides what counts: runs with status `done`, the evaluation of the finished model, where nothing speaks
against it. Knows no HTML.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import pandas as pd

from hybrid_scale.protocols import BY_NAME, LAREQA, Protocol
from hybrid_scale.study.results.collect import Collected


@dataclass(frozen=True)
class Metric:
    key: str
    label: str
    higher_is_better: bool = True
    decimals: int = 4

    def show(self, value: float) -> str:
        return f"{value:.{self.decimals}f}"


METRICS = {
    metric.key: metric
    for metric in (
        Metric("mono_map", "mono mAP"),
        Metric("cross_map", "cross mAP"),
        Metric("multi_map", "multi mAP"),
        Metric("mono_r@1", "mono R@1"),
        Metric("rank_distance", "rank distance", higher_is_better=False, decimals=1),
        Metric("ndcg@10", "nDCG@10"),
        Metric("recall@100", "recall@100"),
        Metric("mrr@10", "MRR@10"),
        Metric("mrr@100", "MRR@100"),
        Metric("map", "mAP"),
        Metric("cross_r@1", "cross R@1"),
        Metric("multi_r@10", "multi R@10"),
        Metric("rank_distance_normalised", "rank distance / candidates", higher_is_better=False),
        Metric("r@1", "R@1"),
        Metric("ndcg@10_median", "nDCG@10, median"),
        Metric("recall@100_median", "recall@100, median"),
        Metric("mrr@100_median", "MRR@100, median"),
    )
}
MEDIAN = "_median"
"""Ends the key of a median over languages, of which single queries say nothing: it is shown and not compared."""


@dataclass(frozen=True)
class Score:
    """One metric of one arm."""

    by_seed: Mapping[int, float]
    chance: float | None = None
    """The metric's expectation under a random order of the candidates; None: no result states it."""

    @property
    def mean(self) -> float:
        return statistics.fmean(self.by_seed.values())

    @property
    def deviation(self) -> float | None:
        """Standard deviation over seeds (n - 1); null for one seed."""
        return statistics.stdev(self.by_seed.values()) if len(self.by_seed) > 1 else None

    @property
    def extent(self) -> float:
        """Largest minus smallest seed."""
        return max(self.by_seed.values()) - min(self.by_seed.values())


@dataclass(frozen=True)
class Arm:
    """One arm on one task."""

    name: str
    kind: str
    group: str
    """Arms of one group may be compared (groups.py); one of another model is in another group."""
    runs: int
    scores: Mapping[str, Score]
    """Empty where no run of the arm has finished."""
    panel: str = ""
    """Its place on the axes `models` and `data`: arms of one panel are drawn in one figure."""
    series: str = ""
    """Groups of one series differ by model alone."""
    model: str = ""
    """Its name on the axis `models`, or else the base."""
    size: float | None = None
    """Weights of the encoder; None: not known."""
    run_of: Mapping[int, str] = field(default_factory=dict)
    """Seed -> id of the run."""
    alpha: float | None = None
    """Share of monolingual batches of a hybrid arm."""
    protocol: str = ""
    """Name of that by which the task was scored; empty where no result of the study counts."""


def tasks(collected: Collected) -> list[str]:
    return sorted(collected.values["task"].unique())


def arms(collected: Collected, task: str) -> list[Arm]:
    """The study's arms in its order, each once a group, with their scores on `task`."""
    final = final_values(collected, task)
    means = final[final["language"].isna()]
    protocol = next(iter(final["protocol"]), "")
    return [
        replace(_arm(str(name), runs, means[(means["arm"] == name) & (means["group"] == group)]), protocol=protocol)
        for (group, name), runs in collected.runs.groupby(["group", "arm"], sort=False)
    ]


def _arm(name: str, runs: pd.DataFrame, means: pd.DataFrame) -> Arm:
    first = runs.iloc[0]
    model = first["model"] if isinstance(first["model"], str) else first["base"]
    size = None if pd.isna(first["size"]) else float(first["size"])
    run_of = dict(zip(runs["seed"].astype(int), runs["run"], strict=True))
    alpha = None if pd.isna(first["alpha"]) else float(first["alpha"])
    identity = (str(first["kind"]), str(first["group"]), len(runs))
    return Arm(name, *identity, _scores(means), str(first["panel"]), str(first["series"]), str(model), size, run_of, alpha)


def _scores(values: pd.DataFrame) -> dict[str, Score]:
    return {
        str(metric): Score(_by_seed(rows), next(iter(rows["chance_level"].dropna()), None))
        for metric, rows in values.groupby("metric", sort=False)
    }


def _by_seed(rows: pd.DataFrame) -> dict[int, float]:
    return dict(zip(rows["seed"].astype(int), rows["value"], strict=True))


def final_values(collected: Collected, task: str) -> pd.DataFrame:
    """Values of finished models on `task`, with arm and seed; values that don't exist (null) or are in doubt left out."""
    done = collected.runs.loc[collected.runs["status"] == "done", ["run", "arm", "seed", "group", "panel"]]
    values = collected.values
    counted = values[(values["task"] == task) & values["final"] & values["doubt"].isna()]
    return counted.dropna(subset=["value"]).merge(done, on="run")


def untrained(collected: Collected, task: str) -> dict[str, dict[str, Score]]:
    """Group -> metric -> score before the first step, over all runs that measured it (their status doesn't matter)."""
    values = collected.values
    start = values[(values["task"] == task) & (values["step"] == 0) & ~values["final"] & values["language"].isna()]
    start = start[start["doubt"].isna()]
    rows = start.dropna(subset=["value"]).merge(collected.runs[["run", "group"]], on="run")
    result: dict[str, dict[str, Score]] = {}
    for (group, metric), found in rows.groupby(["group", "metric"], sort=False):
        result.setdefault(str(group), {})[str(metric)] = Score(dict(enumerate(found["value"])))
    return result


def headline_metrics(found: Sequence[Arm]) -> tuple[Metric, ...]:
    """The columns of a task's first table: the headline of its protocol, as far as it was measured.

    Where nothing of it was, whatever else was; those of the study's own measures where there is no result yet.
    """
    keys = {key for arm in found for key in arm.scores}
    known = tuple(METRICS[key] for key in protocol_of_arms(found).headline if key in keys or not keys)
    return known or tuple(METRICS.get(key, Metric(key, key)) for key in sorted(keys)[:5])


def protocol_of_arms(found: Sequence[Arm]) -> Protocol:
    """That by which the arms of one task were scored; LAReQA's where no result counts."""
    return BY_NAME[next((arm.protocol for arm in found if arm.protocol), LAREQA.name)]


def compared_metrics(found: Sequence[Arm]) -> tuple[str, ...]:
    """Keys on which arms are compared, the most important first: what the protocol heads, without what has no single queries."""
    if crosses_languages(found):
        return ("mono_map", "cross_map", "multi_map", "rank_distance")
    return tuple(key for key in protocol_of_arms(found).headline if not key.endswith(MEDIAN))[:2]


def main_metric(found: Sequence[Arm]) -> str:
    """The first key of a task in one language; of one that crosses languages, multi mAP, which holds both."""
    return "multi_map" if crosses_languages(found) else compared_metrics(found)[0]


def crosses_languages(found: Sequence[Arm]) -> bool:
    """Whether queries have relevant passages in other languages; the predictions speak of such tasks alone."""
    return protocol_of_arms(found).pools == "by language" and any("cross_map" in arm.scores for arm in found)

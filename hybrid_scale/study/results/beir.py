"""BEIR's mean as a set of its own, `beir`: the plain mean over sets of BEIR, the same ones for every run.

The sets are fixed, so only their queries and the seeds are a sample. It is never called BEIR's score: a report says how many of
the public sets it holds, which, and what was left out because a run lacks it. Knows no test and no file.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from hybrid_scale.protocols import BEIR as PROTOCOL
from hybrid_scale.protocols import BEIR_SETS
from hybrid_scale.study.family import BEIR

FEWEST_SETS = 2
"""The mean of one set is that set."""
MAIN = PROTOCOL.headline[0]


@dataclass(frozen=True)
class BeirMean:
    """What the mean is made of."""

    tasks: Mapping[str, str]
    """Set of BEIR -> the task with its scores, in the order of BEIR_SETS."""
    lacking: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Set of BEIR that some run was scored on, but not these finished ones: it is left out."""

    @property
    def count(self) -> str:
        """`2 of 15 sets`; empty where it is all of them."""
        return "" if len(self.tasks) == len(BEIR_SETS) else f"{len(self.tasks)} of {len(BEIR_SETS)} sets"

    def flag(self, in_domain: Mapping[str, Any]) -> str:
        """What must stand at each of its numbers. `in_domain`: tasks that are."""
        trained = sum(task in in_domain for task in self.tasks.values())
        return ", ".join(filter(None, (self.count, f"{trained} in-domain" if trained else "")))

    @property
    def about(self) -> str:
        """A sentence on what it is the mean of."""
        every = len(self.tasks) == len(BEIR_SETS)
        of = f"all {len(BEIR_SETS)} public sets of BEIR" if every else f"{len(self.tasks)} of BEIR's {len(BEIR_SETS)} public sets"
        shown = [f"{name} (not scored for {_some(runs)})" for name, runs in self.lacking.items()]
        left = f"; left out, as every run must have the same sets: {', '.join(shown)}" if shown else ""
        return f"{BEIR} is the plain mean over {of}: {', '.join(self.tasks)}{left}"


def _some(runs: Sequence[str]) -> str:
    return runs[0] + (f" and {len(runs) - 1} more" if len(runs) > 1 else "")


def beir_mean(values: Sequence[Mapping[str, Any]], done: set[str]) -> BeirMean | None:
    """From rows of VALUE_COLUMNS and the finished runs: the sets on which each of them that has any has a score that counts.

    None: there are fewer than FEWEST_SETS, or a task has that name already.
    """
    if any(row["task"] == BEIR for row in values):
        return None
    scored: dict[str, dict[str, str]] = {}
    for row in values:
        if row["final"] and row["run"] in done and _counts(row) and row["metric"] == MAIN:
            by_name = scored.setdefault(row["run"], {})
            if by_name.get(row["beir"]) != row["beir"]:  # of two tasks of one set the one with its name
                by_name[row["beir"]] = row["task"]
    tasks = {name: task for by_name in scored.values() for name, task in by_name.items()}
    every = [name for name in BEIR_SETS if name in tasks]
    lacking = {name: tuple(run for run, has in scored.items() if has.get(name) != tasks[name]) for name in every}
    shared = {name: tasks[name] for name in every if not lacking[name]}
    left_out = {name: runs for name, runs in lacking.items() if runs}
    return BeirMean(shared, left_out) if len(shared) >= FEWEST_SETS else None


def _counts(row: Mapping[str, Any]) -> bool:
    return bool(row["beir"]) and not row["doubt"] and row["language"] is None and row["value"] is not None


def mean_rows(values: Sequence[Mapping[str, Any]], mean: BeirMean) -> list[dict[str, Any]]:
    """The mean as rows of VALUE_COLUMNS: for each run and step that has a value of every set, metric by metric."""
    of = {task: name for name, task in mean.tasks.items()}
    found: dict[tuple[Any, ...], dict[str, Mapping[str, Any]]] = {}
    for row in values:
        if row["task"] in of and _counts(row) and row["metric"] in PROTOCOL.headline:
            step = None if row["final"] else row["step"]
            found.setdefault((row["run"], row["final"], step, row["metric"]), {})[row["task"]] = row
    nothing = dict.fromkeys(("beir", "language", "passage_language", "doubt"))
    return [
        {"run": run, "task": BEIR, "step": step, "final": final, "protocol": PROTOCOL.name, "metric": metric, **nothing}
        | {key: _mean([row[key] for row in by_task.values()]) for key in ("value", "chance_level")}
        for (run, final, step, metric), by_task in found.items()
        if len(by_task) == len(of)
    ]


def _mean(values: Sequence[float | None]) -> float | None:
    """None where one isn't known."""
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if len(known) == len(values) else None


def joined(by_set: Mapping[str, pd.DataFrame]) -> pd.DataFrame | None:
    """Shares of the mean by query (rows, named SET/QUERY) and seed, from the shares of each set's own estimate.

    A column sums to the mean over sets of that seed. Sets are fixed: only what a query's share differs from the mean of its own
    set is spread. `factor` makes the variance that `crossed.crossed` computes from all queries at once that of the stratified
    mean, which is sets^-2 * sum over sets of s^2 / n (n queries of a set, s^2 their variance).
    None: a set has one query, and no spread, or no seed has all sets.
    """
    sets, queries = len(by_set), sum(map(len, by_set.values()))
    tables = list(by_set.values())
    seeds = [seed for seed in tables[0].columns if all(seed in table for table in tables)]
    if not seeds or any(len(table) < 2 for table in tables):
        return None
    whole = sum(table[seeds].sum() for table in tables) / (sets * queries)
    parts = []
    for name, table in by_set.items():
        factor = math.sqrt(len(table) / (len(table) - 1) * (queries - 1) / queries) / sets
        shares = (table[seeds] - table[seeds].mean()) * factor + whole
        parts.append(shares.set_axis([f"{name}/{query}" for query in table.index]))
    return pd.concat(parts)

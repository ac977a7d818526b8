"""Single queries of two arms -> differences, query by query and seed by seed, with their parallel questions.

What can't be paired is refused with the reason: another set, other queries, a table that is missing. Knows no test.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from hybrid_scale.runs import RunDirectory
from hybrid_scale.statistics import Clusters, cluster
from hybrid_scale.study.family import BEIR
from hybrid_scale.study.results.beir import BeirMean, joined
from hybrid_scale.study.results.crossed import clusters_of, parts_of
from hybrid_scale.study.results.queries import Queries, read_queries


class Unpaired(Exception):
    """Why single queries can't be compared."""


class Reader:
    """Tables of single queries, each read once."""

    def __init__(self, directories: Mapping[str, Path], beir: BeirMean | None = None):
        """`beir`: what the task of that name is the mean of."""
        self.directories, self.beir = directories, beir
        self.tables: dict[Path, Queries] = {}

    def paired(
        self, task: str, pairs: Sequence[tuple[str, str]], key: str, seeds: Sequence[int]
    ) -> tuple[pd.DataFrame, Clusters]:
        """Shares of each seed's difference by parallel question (`parts`), and the questions averaged over the seeds.

        Raises Unpaired and RunError.
        """
        if self.beir is None or task != BEIR:
            by_seed = self.differences(task, pairs, key)
            return parts(by_seed, seeds), averaged(by_seed)
        tables = {name: parts(self.differences(member, pairs, key), seeds) for name, member in self.beir.tasks.items()}
        shares = joined(tables)
        if shares is None:
            raise Unpaired(f"one parallel question in a set of {BEIR}: no spread")
        return shares, clusters_of(shares.to_numpy().mean(1))

    def differences(self, task: str, pairs: Sequence[tuple[str, str]], key: str) -> list[pd.DataFrame]:
        """Our values minus theirs of each pair (seed), all with the same queries in the same order.

        Raises Unpaired and RunError.
        """
        lacking = [run for pair in pairs for run in pair if not self._file(task, run).exists()]
        if lacking:
            shown = ", ".join(dict.fromkeys(lacking))
            raise Unpaired(f"no table of single queries for {shown}: only means are shown")
        tables = [(self._table(task, ours), self._table(task, theirs)) for ours, theirs in pairs]
        if len({table.fingerprint for pair in tables for table in pair}) > 1:
            raise Unpaired("the runs were evaluated on different versions of the set")
        if len({table.pools == "own language" for pair in tables for table in pair}) > 1:
            raise Unpaired("the runs were scored under different protocols")
        differences = [_minus(ours, theirs, key) for ours, theirs in tables]
        return [_in_order_of(differences[0], each, "the seeds answered different queries") for each in differences]

    def _file(self, task: str, run: str) -> Path:
        return RunDirectory(self.directories[run]).evaluation_file(task).with_suffix(".parquet")

    def _table(self, task: str, run: str) -> Queries:
        file = self._file(task, run)
        if file not in self.tables:
            self.tables[file] = read_queries(file)
        return self.tables[file]


def _minus(ours: Queries, theirs: Queries, key: str) -> pd.DataFrame:
    first, second = ours.values(key), theirs.values(key)
    if first is None or second is None or first["value"].isna().all() or second["value"].isna().all():
        raise Unpaired(f"the tables of single queries don't hold {key}")
    rival = _in_order_of(first, second, "the two arms answered different queries")
    return first.assign(value=first["value"].to_numpy() - rival["value"].to_numpy())


def _in_order_of(like: pd.DataFrame, table: pd.DataFrame, rule: str) -> pd.DataFrame:
    """`table` with the queries of `like` in their order, which mostly is its own. Raises Unpaired(rule): it has others."""
    names = ["query", "pool"]
    if len(like) == len(table) and all((like[name].to_numpy() == table[name].to_numpy()).all() for name in names):
        return table
    joined = like[names].merge(table, on=names)
    if not len(joined) == len(like) == len(table):
        raise Unpaired(rule)
    return joined


def averaged(by_seed: Sequence[pd.DataFrame]) -> Clusters:
    """Clusters of the values averaged over the seeds, whose rows are the same queries in the same order."""
    values = np.mean([table["value"].to_numpy() for table in by_seed], axis=0)
    return linear(cluster(values, by_seed[0]["cluster"].to_numpy(), by_seed[0]["stratum"].to_numpy()))


def parts(by_seed: Sequence[pd.DataFrame], seeds: Sequence[int]) -> pd.DataFrame:
    """Shares of each seed's difference by parallel question, of the values that all seeds have."""
    known = np.logical_and.reduce([table["value"].notna().to_numpy() for table in by_seed])
    questions, strata = (by_seed[0][name].to_numpy()[known] for name in ("cluster", "stratum"))
    columns = {
        seed: parts_of(cluster(table["value"].to_numpy()[known], questions, strata))
        for seed, table in zip(seeds, by_seed, strict=True)
    }
    return pd.DataFrame(columns, index=np.unique(questions))


def linear(values: Clusters) -> Clusters:
    """The same clusters in one stratum, where each has a value in every stratum: estimates of all resamples stay the same.

    Then every stratum's mean has the same divisor, so the macro mean is a mean over clusters; 100 times faster on XQuAD-R.
    """
    if not (values.counts == values.counts[:1, :1]).all():
        return values
    means = (values.sums / values.counts).mean(1, keepdims=True)
    return Clusters(means, means * 0 + 1.0)

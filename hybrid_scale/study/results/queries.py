"""Single queries behind an evaluation (`eval/SET.parquet`) -> the values whose average is a measure, by parallel question.

The columns are those that `launch/evaluate.py` writes: query, query_lang, group, pool (`union` or a passage language), relevant,
metrics; `part` where a set comes in parts, whose score is the mean over them. Knows no arm and no test.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import pyarrow as pa
from pyarrow import parquet

from hybrid_scale.errors import RunError, describe
from hybrid_scale.statistics import Clusters, cluster

NAMES = ("query", "query_lang", "group", "pool")
AGREEMENT = 1e-6
"""Between a mean in the JSON file and the mean over its single queries: both are sums of the same float64 numbers."""


ONE_POOL = ("ndcg@10", "recall@100", "mrr@10", "mrr@100", "map", "r@1")
"""Metrics that every set has, each in the pool that its protocol says."""


@dataclass(frozen=True)
class Cut:
    """Which rows and column a measure averages, and over what its macro average goes."""

    column: str
    pool: Literal["union", "own", "other"]
    """The union of all languages; the pool of the query's language; every other language's."""
    stratum: Literal["none", "query language", "language pair"]


CUTS = {
    "mono_map": Cut("map", "own", "query language"),
    "cross_map": Cut("map", "other", "language pair"),
    "multi_map": Cut("map", "union", "query language"),
    "mono_r@1": Cut("r@1", "own", "query language"),
    "cross_r@1": Cut("r@1", "other", "language pair"),
    "multi_r@10": Cut("recall@10", "union", "query language"),
    "rank_distance": Cut("rank_distance", "union", "query language"),
    **{name: Cut(name, "union", "none") for name in ONE_POOL},
}
"""Metric -> where it comes from (the definitions are those of retrieval/measures.py)."""
OWN_LANGUAGE_CUTS = {name: Cut(name, "own", "query language") for name in ONE_POOL}
"""The same where the set's protocol ranks a query in the corpus of its own language (MIRACL, Mr. TyDi; protocols.py)."""


@dataclass(frozen=True)
class Queries:
    """One evaluation's single queries; `fingerprint` tells the prepared set ("" where the file doesn't).

    `pools`: those of the set's protocol; "" in a file of an earlier version, which knew the union only.
    """

    table: pd.DataFrame
    fingerprint: str
    pools: str = ""

    def values(self, key: str) -> pd.DataFrame | None:
        """Columns `query`, `pool`, `cluster`, `stratum`, `value`; None: the measure isn't in the table."""
        cut = (OWN_LANGUAGE_CUTS if self.pools == "own language" else CUTS).get(key)
        if cut is None or cut.column not in self.table:
            return None
        chosen = self.table[_rows(self.table, cut)]
        if chosen.empty:
            return None
        stratum = {
            "none": pd.Series("", index=chosen.index),
            "query language": chosen["query_lang"],
            "language pair": chosen["query_lang"] + ">" + chosen["pool"],
        }[cut.stratum]
        if "part" in chosen:
            stratum = chosen["part"] + "/" + stratum
        named = {"query": chosen["query"], "pool": chosen["pool"], "cluster": chosen["group"], "stratum": stratum}
        return pd.DataFrame({**named, "value": chosen[cut.column].astype("float64")})


def _rows(table: pd.DataFrame, cut: Cut) -> pd.Series:
    union = table["pool"] == "union"
    own = table["pool"] == table["query_lang"]
    return {"union": union, "own": own, "other": ~union & ~own}[cut.pool]


def macro_mean(values: pd.DataFrame) -> float:
    """The estimate of `clusters(values)`, without them: mean over strata of their means; NaN where nothing is defined."""
    return float(values.groupby("stratum", sort=False)["value"].mean().mean())


def clusters(values: pd.DataFrame) -> Clusters | None:
    """Values as `Queries.values` gives them, by parallel question; None where not one is defined."""
    if values["value"].isna().all():
        return None
    return cluster(values["value"].to_numpy(), values["cluster"].to_numpy(), values["stratum"].to_numpy())


def read_queries(path: Path) -> Queries:
    """Raises RunError: not a table of single queries."""
    try:
        table = parquet.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise RunError(describe(str(path), error, "not a Parquet file", "Evaluate the run again.")) from None
    lacking = [name for name in NAMES if name not in table.column_names]
    if lacking:
        raise RunError(describe(str(path), table.column_names, f"{', '.join(lacking)} missing", "Evaluate the run again."))
    facts = table.schema.metadata or {}
    parts = [name for name in ("part",) if name in table.column_names]
    wanted = [*NAMES, *parts, *dict.fromkeys(cut.column for cut in CUTS.values() if cut.column in table.column_names)]
    frame = table.select(wanted).to_pandas()
    return Queries(frame, facts.get(b"fingerprint", b"").decode(), facts.get(b"pools", b"").decode())


def contradiction(content: Mapping[str, Any], queries: Queries, name: str) -> str | None:
    """What speaks against an evaluation file: its means aren't those of its single queries, or the sets differ."""
    fingerprint = content.get("fingerprint")
    if fingerprint and queries.fingerprint and fingerprint != queries.fingerprint:
        return f"{name} and the single queries beside it come from different sets; its means don't count"
    for key, stated in content["metrics"].items():
        values = queries.values(key)
        found = math.nan if values is None else macro_mean(values)
        if stated is None or math.isnan(found):
            continue
        if not abs(found - stated) <= AGREEMENT * max(1.0, abs(stated)):  # an infinite mean agrees with nothing
            shown = f"{name} says {key} {stated:.6g}, its single queries say {found:.6g}"
            return f"{shown}: a file was changed or belongs to another evaluation; its means don't count"
    return None

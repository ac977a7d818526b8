"""Sets that come in parts, such as CQADupStack's twelve forums: a folder of prepared sets, searched one by one, with one result.

    DIR/manifest.json           a set
    DIR/PART/manifest.json      a set in parts: every PART is a prepared set that names one whole (`part_of` in its manifest)

Every metric of the whole is the plain mean over its parts (2104.08663 for CQADupStack), whatever their sizes. In the table of
single queries the column `part` tells the part, and `query` and `group` begin with it: a mean over parts of means over their
rows gives the metrics again.
Knows no model, no vector and no rank.
"""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import parquet

from hybrid_scale.data.prepared import RetrievalSet
from hybrid_scale.data.sources.beir_sets import parts_of
from hybrid_scale.errors import DataError, describe
from hybrid_scale.runs import atomic_path

SUMS = ("queries", "passages", "queries_without_relevant", "queries_without_judgment", "own_ids_dropped", "skipped_pairs")
"""Counts of a result: those of the whole are sums."""

Score = Callable[[RetrievalSet, Path | None], dict[str, Any]]
"""A set and the file for its table of single queries -> its result."""


def is_in_parts(directory: Path | str) -> bool:
    """Whether a folder holds a set in parts rather than a set."""
    return not (Path(directory) / "manifest.json").is_file() and any(Path(directory).glob("*/manifest.json"))


def open_sets(directory: Path | str) -> list[RetrievalSet]:
    """The prepared set of a folder, or those of its parts by name.

    Raises DataError: not prepared, nothing relevant, sets that don't name one whole, parts of a known whole missing.
    """
    if not is_in_parts(directory):
        return [_judged(RetrievalSet(directory))]
    tasks = [_judged(RetrievalSet(path.parent)) for path in sorted(Path(directory).glob("*/manifest.json"))]
    wholes = {task.manifest.get("part_of") for task in tasks}
    if len(wholes) > 1 or None in wholes:
        named = ", ".join(f"{task.name} of {task.manifest.get('part_of')}" for task in tasks[:4])
        rule = "the sets in a folder must be parts of one whole (`part_of`)"
        raise DataError(describe(str(directory), named, rule, "Name one of the sets."))
    missing = sorted(set(parts_of(str(*wholes))) - {str(task.manifest.get("part", task.name)) for task in tasks})
    if missing:
        rule = f"the score of {wholes.pop()} is a mean over all its parts; missing: {', '.join(missing)}"
        raise DataError(describe(str(directory), f"{len(tasks)} parts", rule, "Prepare them beside the others."))
    return tasks


def _judged(task: RetrievalSet) -> RetrievalSet:
    """The set. Raises DataError where nothing can be measured on it."""
    if not (task.qrels[:, 2] > 0).any():
        rule = "a passage that answers a query has a score above 0"
        raise DataError(
            describe(str(task.directory), f"{len(task.qrels)} judgments, none above 0", rule, "Prepare other judgments.")
        )
    return task


def one_set(directory: Path | str, why: str) -> RetrievalSet:
    """The set of a folder. Raises DataError, with `why`, for a set in parts."""
    if is_in_parts(directory):
        raise DataError(describe(str(directory), "a set in parts", why, "Name one of its parts."))
    return _judged(RetrievalSet(directory))


def beside(folder: Path, directory: Path | str, task: RetrievalSet) -> Path:
    """What belongs to `task` in a folder for the whole set in `directory`: a folder of its own where it is a part."""
    return folder / task.name if is_in_parts(directory) else folder


def score_all(directory: Path | str, score: Score, per_query_file: Path | None, write: Callable[..., object]) -> dict[str, Any]:
    """The result of a set, or of a set in parts; `score` is asked for one set after another.

    `write(action)` runs an action on the one rank that writes files.
    """
    tasks = open_sets(directory)
    if not is_in_parts(directory):
        return score(tasks[0], per_query_file)
    results = [score(task, table_of(per_query_file, task.name)) for task in tasks]
    if per_query_file is not None:
        write(lambda: join_tables(per_query_file, [task.name for task in tasks]))
    return mean_of(Path(directory).name, results)


def mean_of(name: str, parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One result from those of the parts; what isn't a number of theirs (`protocol`, ...) is the first part's."""
    metrics = [part["metrics"] for part in parts]
    sums = {key: sum(part[key] for part in parts if key in part) for key in SUMS if any(key in part for part in parts)}
    first: dict[str, Any] = {key: parts[0][key] for key in ("baseline", "in_domain", "protocol", "evaluation") if key in parts[0]}
    prints = "".join(f"{part['task']}:{part['fingerprint']}\n" for part in parts)
    facts: dict[str, Any] = {
        "task": name,
        "parts": {part["task"]: part["metrics"] for part in parts},
        "languages": sorted({language for part in parts for language in part["languages"]}),
        "fingerprint": hashlib.sha256(prints.encode()).hexdigest(),
        "metrics": {metric: _mean([values.get(metric) for values in metrics]) for metric in metrics[0]},
        "by_language": {},
        "refused": {metric: reason for part in parts for metric, reason in part.get("refused", {}).items()},
    }
    if all("chance" in part for part in parts):
        facts["chance"] = {name: _mean([part["chance"].get(name) for part in parts]) for name in parts[0]["chance"]}
    if all("without_language_means" in part for part in parts):
        moved = [part["without_language_means"]["metrics"] for part in parts]
        facts["without_language_means"] = {"metrics": {name: _mean([each.get(name) for each in moved]) for name in moved[0]}}
    if all("text_lengths" in part for part in parts):
        facts["text_lengths"] = _lengths([part["text_lengths"] for part in parts])
    return facts | sums | first


def _lengths(parts: Sequence[dict[str, Any] | None]) -> dict[str, Any] | None:
    """The limits, and sums of counts where all are known; None where limits aren't known, or aren't the same for all."""
    known = [part for part in parts if part is not None]
    limits = {(part["max_query_tokens"], part["max_passage_tokens"]) for part in known}
    if len(known) < len(parts) or len(limits) > 1:
        return None
    counts = {key: [part[key] for part in known] for key in ("queries_at_limit", "passages_at_limit")}
    return known[0] | {key: None if None in found else sum(found) for key, found in counts.items()}


def _mean(values: Sequence[float | None]) -> float | None:
    """None where a part has no value: a mean over the others would be of another set."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if len(known) == len(values) else None


def table_of(per_query_file: Path | None, part: str) -> Path | None:
    """Where the table of a part waits until all are joined."""
    return per_query_file and per_query_file.with_name(f".{per_query_file.stem}.{part}{per_query_file.suffix}")


def join_tables(per_query_file: Path, parts: Sequence[str]) -> None:
    """The tables of the parts become one, with the column `part`."""
    files = [table_of(per_query_file, part) for part in parts]
    tables = [_named(parquet.read_table(file), part) for file, part in zip(files, parts, strict=True)]
    prints = "".join(f"{part}:{_fact(table, 'fingerprint')}\n" for table, part in zip(tables, parts, strict=True))
    facts = {"task": per_query_file.stem, "fingerprint": hashlib.sha256(prints.encode()).hexdigest()}
    facts["pools"] = _fact(tables[0], "pools")
    joined = pa.concat_tables([table.replace_schema_metadata(None) for table in tables])
    with atomic_path(per_query_file) as beside:
        parquet.write_table(joined.replace_schema_metadata(facts), beside)
    for file in files:
        if file is not None:
            file.unlink()


def _named(table: pa.Table, part: str) -> pa.Table:
    for key in ("query", "group"):
        column = pc.binary_join_element_wise(pa.scalar(part), table[key], "/")
        table = table.set_column(table.column_names.index(key), key, column)
    return table.append_column("part", pa.array([part] * len(table), pa.string()))


def _fact(table: pa.Table, key: str) -> str:
    return (table.schema.metadata or {}).get(key.encode(), b"").decode()

"""TREC files: results of queries (run) and judgments (qrels), in and out.

    run     QUERY Q0 PASSAGE RANK SCORE TAG        qrels     QUERY 0 PASSAGE GRADE

Read as trec_eval 10 reads them, also compressed: ASCII white space parts fields, lines that begin with `#` are comments, what
follows the tag of a run is ignored. Ids are those that the publisher of a set gave (`own_prefix`). trec_eval ignores RANK: it
sorts by SCORE (as float32), ties by the passage id, higher ids first. So a file that we wrote can score otherwise there where
scores tie; `order="rank"` reads it as it was ranked.
Knows no vector and no rank of a process.

Shapes: L lines, J judged pairs, C languages.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hybrid_scale.data.files import read_trec
from hybrid_scale.data.prepared import RetrievalSet, TextTable
from hybrid_scale.errors import DataError, describe
from hybrid_scale.protocols import ONE_LANGUAGE as IN_ONE_LANGUAGE
from hybrid_scale.retrieval.measures import Judged, per_query, summarise
from hybrid_scale.runs import atomic_path

Order = Literal["score", "rank"]
ONE_LANGUAGE = "und"
"""Where nothing is known of languages (ISO 639-2: undetermined)."""


@dataclass(frozen=True)
class Lines:
    """The lines of a run, by query, best first; or of qrels, as they stand."""

    query_ids: list[str]
    passage_ids: list[str]
    query: np.ndarray
    """[L] position in `query_ids`"""
    passage: np.ndarray
    """[L] position in `passage_ids`"""
    value: np.ndarray
    """[L] score or grade"""


# ------------------------------------------------------------------------------------------------------------------- out


PREFIXED = ("miracl", "miracl_hard", "mr_tydi")
"""Sources that put `language:` before every id, because two languages may hold the same one."""


def own_prefix(task: RetrievalSet, table: TextTable) -> str:
    """What the source put before the published ids of a table in one language; files leave it out, and may have it.

    Empty in several languages: only with it an id is unique there.
    """
    if task.manifest.get("source", {}).get("name") not in PREFIXED:
        return ""
    ids = table.table.column("id")
    prefix = ids[0].as_py().partition(":")[0] + ":"
    return prefix if pc.all(pc.starts_with(ids, prefix)).as_py() else ""


def check_ids(task: RetrievalSet) -> None:
    """Raise DataError where a TREC file can't hold an id: white space parts its fields, a line from `#` on is a comment."""
    for kind, table, refused in (("query", task.queries, "[ \t\n\v\f\r]|^#|^$"), ("passage", task.corpus, "[ \t\n\v\f\r]|^$")):
        ids = pc.utf8_slice_codeunits(table.table.column("id"), len(own_prefix(task, table)))
        wrong = ids.filter(pc.match_substring_regex(ids, refused))
        if len(wrong):
            rule = (
                f"{len(wrong)} ids that TREC files can't hold: an id must be free of white space, and a query's not begin with #"
            )
            remedy = "Leave the TREC file out, or prepare the set with other ids."
            raise DataError(describe(f"{task.name}: {kind} id", wrong[0].as_py(), rule, remedy))


def write_run(path: Path, task: RetrievalSet, scores: np.ndarray, numbers: np.ndarray) -> None:
    """Results [Q, k] of all queries, a line each; a result with number -1 is none. `.9g` keeps a float32 whole."""
    query_ids, cut = published(task, task.queries), len(own_prefix(task, task.corpus))
    with atomic_path(path) as beside, open(beside, "w", encoding="utf-8") as file:
        for query, row_scores, row_numbers in zip(query_ids, scores, numbers, strict=True):
            ids = task.corpus.column("id", row_numbers[row_numbers >= 0])
            for rank, (passage, score) in enumerate(zip(ids, row_scores, strict=False), start=1):
                file.write(f"{query} Q0 {passage[cut:]} {rank} {score:.9g} hybrid_scale\n")


def write_qrels(path: Path, task: RetrievalSet) -> None:
    """All judgments of a set, grades of 0 and passages that the corpus lacks included."""
    query_ids, cut = published(task, task.queries), len(own_prefix(task, task.corpus))
    with atomic_path(path) as beside, open(beside, "w", encoding="utf-8") as file:
        for start in range(0, len(task.qrels), 2**16):
            some = np.asarray(task.qrels[start : start + 2**16])
            for (query, _, grade), passage in zip(some.tolist(), task.corpus.column("id", some[:, 1]), strict=True):
                file.write(f"{query_ids[query]} 0 {passage[cut:]} {grade}\n")
        for (query, grade), passage in zip(task.missing.tolist(), task.missing_ids, strict=True):
            file.write(f"{query_ids[query]} 0 {passage[cut:]} {grade}\n")


def published(task: RetrievalSet, table: TextTable) -> list[str]:
    """The ids of a table without `own_prefix`."""
    cut = len(own_prefix(task, table))
    return [name[cut:] for name in table.column("id")]


# -------------------------------------------------------------------------------------------------------------------- in


def read_run(path: Path, order: Order = "score") -> Lines:
    """The results of each query, best first. Raises DataError naming the line, a passage that a query has twice, no line."""
    lines = _collect(_fields(path, 6, 4 if order == "score" else 3))
    if not lines.query_ids:
        raise DataError(describe(str(path), "no line", "a run holds results", "Check what should have written it."))
    if order == "score":
        by_id = np.argsort(np.argsort(np.array(lines.passage_ids, dtype=object), kind="stable"), kind="stable")
        sorting = np.lexsort((-by_id[lines.passage], -lines.value.astype(np.float32), lines.query))
    else:
        sorting = np.lexsort((lines.value, lines.query))
    result = Lines(lines.query_ids, lines.passage_ids, lines.query[sorting], lines.passage[sorting], lines.value[sorting])
    _refuse_twice(result, path)
    return result


def read_qrels(path: Path) -> Lines:
    """Judgments. Raises DataError naming the line, a pair that is judged twice, no judgment above 0."""
    lines = _collect(_fields(path, 4, 3))
    _refuse_twice(lines, path)
    if not (lines.value > 0).any():
        raise DataError(describe(str(path), f"{len(lines.value)} judgments", "one above 0 is needed", "Take other qrels."))
    return lines


def _fields(path: Path, columns: int, value: int) -> Iterator[tuple[str, str, float]]:
    """Query, passage and number of each line."""
    for where, line, fields in read_trec(path):
        if len(fields) < columns or (columns == 4 and len(fields) > 4):
            shape = "QUERY Q0 PASSAGE RANK SCORE TAG" if columns == 6 else "QUERY 0 PASSAGE GRADE"
            raise DataError(describe(where, line, f"a line reads {shape}"))
        try:
            number = float(fields[value])
        except ValueError:
            number = float("nan")
        if not np.isfinite(number):
            raise DataError(describe(where, fields[value], "not a finite number"))
        if columns == 4 and number != int(number):
            raise DataError(describe(where, fields[value], "a grade is a whole number", "As trec_eval reads it."))
        yield fields[0], fields[2], number


def _collect(fields: Iterator[tuple[str, str, float]]) -> Lines:
    queries: dict[str, int] = {}
    passages: dict[str, int] = {}
    rows = [(queries.setdefault(q, len(queries)), passages.setdefault(p, len(passages)), value) for q, p, value in fields]
    columns = np.array(rows, np.float64).reshape(-1, 3).T
    return Lines(list(queries), list(passages), columns[0].astype(np.int64), columns[1].astype(np.int64), columns[2])


def without_own_ids(lines: Lines) -> tuple[Lines, int]:
    """The results whose passage id isn't the query's id (BEIR's rule), and how many were taken out."""
    number = {name: at for at, name in enumerate(lines.passage_ids)}
    own = np.array([number.get(name, -1) for name in lines.query_ids], np.int64)
    kept = own[lines.query] != lines.passage
    rows = (lines.query[kept], lines.passage[kept], lines.value[kept])
    return Lines(lines.query_ids, lines.passage_ids, *rows), int((~kept).sum())


def _refuse_twice(lines: Lines, path: Path) -> None:
    pairs = lines.query * max(1, len(lines.passage_ids)) + lines.passage
    values, counts = np.unique(pairs, return_counts=True)
    if (counts > 1).any():
        query, passage = divmod(int(values[counts > 1][0]), len(lines.passage_ids))
        found = f"{lines.query_ids[query]} {lines.passage_ids[passage]}"
        raise DataError(describe(str(path), found, "this query has this passage twice", "Keep one of the lines."))


def numbers_of(ids: list[str], table: TextTable, where: str, task: RetrievalSet) -> np.ndarray:
    """Row of each id, with or without `own_prefix`, in a table of the set. Raises DataError with ids that it doesn't hold."""
    given, known = pa.array(ids, pa.large_string()), table.table.column("id")
    found = pc.index_in(given, value_set=known)
    if prefix := own_prefix(task, table):
        whole = pc.binary_join_element_wise(pa.scalar(prefix, pa.large_string()), given, pa.scalar("", pa.large_string()))
        found = pc.coalesce(found, pc.index_in(whole, value_set=known))
    unknown = given.filter(pc.is_null(found))
    if len(unknown):
        shown = ", ".join(unknown.slice(0, 3).to_pylist())
        rule, remedy = f"{len(unknown)} ids that '{task.name}' doesn't hold", f"Its ids are such as '{known[0].as_py()}'."
        raise DataError(describe(where, shown, rule, remedy))
    numbers: np.ndarray = found.to_numpy(zero_copy_only=False).astype(np.int64)
    return numbers


# ----------------------------------------------------------------------------------------------------------------- score


def ranks_in(
    query: np.ndarray, passage: np.ndarray, language: np.ndarray, languages: int, wanted_query: np.ndarray, wanted: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Where judged passages stand in listed results: passages of each language above them [J, C], and whether listed [J].

    `query` and `passage` [L] are the results, by query and best first; `language` is that of each passage number.
    """
    span = int(max(passage.max(initial=0), wanted.max(initial=0))) + 1
    start = np.zeros(int(max(query.max(initial=0), wanted_query.max(initial=0))) + 1, np.int64)
    first = np.flatnonzero(np.r_[True, query[1:] != query[:-1]]) if len(query) else np.zeros(0, np.int64)
    start[query[first]] = first
    listed = query * span + passage
    order = np.argsort(listed)
    place = np.minimum(np.searchsorted(listed, wanted_query * span + wanted, sorter=order), max(0, len(listed) - 1))
    if not len(listed):
        return np.zeros((len(wanted), languages), np.int64), np.zeros(len(wanted), bool)
    line = order[place]
    found = listed[line] == wanted_query * span + wanted
    above = np.zeros((len(wanted), languages), np.int64)
    for code in range(languages):
        before = np.r_[0, np.cumsum(language[passage] == code)]
        above[:, code] = np.where(found, before[line] - before[start[wanted_query]], 0)
    return above, found


def score_files(run: Path, qrels: Path, order: Order = "score", drop_own_id: bool = False) -> tuple[dict[str, Any], pa.Table]:
    """The measures of a run by a qrels file, and the table of single queries. Nothing is known of languages.

    `drop_own_id`: see `without_own_ids`. As `trec_eval -c`: over all queries of the qrels, 0 for those that the run lacks or
    that have no relevant passage. Raises DataError as the readers do, and where no query of the run is judged.
    """
    results, judgments = read_run(run, order), read_qrels(qrels)
    results, dropped = without_own_ids(results) if drop_own_id else (results, 0)
    query_number = {name: number for number, name in enumerate(judgments.query_ids)}
    passage_number = {name: number for number, name in enumerate(judgments.passage_ids)}
    beyond = len(passage_number)  # unjudged passages: each a number of its own behind the judged ones
    queries = np.array([query_number.get(name, -1) for name in results.query_ids], np.int64)
    passages = np.array([passage_number.get(name, beyond + at) for at, name in enumerate(results.passage_ids)], np.int64)
    known = queries[results.query] >= 0
    if not known.any():
        found = ", ".join(results.query_ids[:3])
        raise DataError(describe(f"{run}: queries", found, f"none of them is judged in {qrels}", "Take the qrels of this set."))
    query, passage = queries[results.query][known], passages[results.passage][known]
    by_query = np.argsort(query, kind="stable")
    relevant = judgments.value > 0
    wanted = judgments.query[relevant], judgments.passage[relevant]
    languages = np.zeros(beyond + len(results.passage_ids), np.int64)
    above, there = ranks_in(query[by_query], passage[by_query], languages, 1, *wanted)
    nothing = np.zeros(len(judgments.query_ids), np.int64)
    grades = judgments.value[relevant]
    judged = Judged([ONE_LANGUAGE], [ONE_LANGUAGE], nothing, wanted[0], nothing[wanted[0]], grades, above, there)
    facts = {
        "run": run.name,
        "qrels": qrels.name,
        "queries": len(nothing),
        "queries_without_relevant": judged.topic_counts()["queries_without_relevant"],
        "queries_without_results": len(nothing) - len(np.unique(query)),
        "queries_without_judgment": int((queries < 0).sum()),
        **({"own_ids_dropped": dropped} if drop_own_id else {}),
    }
    table = per_query(judged, judgments.query_ids, judgments.query_ids, None, IN_ONE_LANGUAGE)
    return facts | summarise(judged, None, IN_ONE_LANGUAGE), table

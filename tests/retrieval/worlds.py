"""A small retrieval set in several languages, its vectors, and the same on disk: shared by the tests of evaluation."""

from pathlib import Path

import numpy as np

from hybrid_scale.data.prepared import RetrievalSet
from hybrid_scale.data.records import Judgment, Passage, Query, Record
from hybrid_scale.data.writing import write_retrieval
from hybrid_scale.retrieval.store import decode, encode

DIMENSIONS = 8


def write_task(directory: Path, languages: tuple[str, ...] = ("en", "de", "sw"), groups: int = 6) -> RetrievalSet:
    """Query g in each language; passages g in each, and as many that answer nothing. Not all pairs are judged:
    group 0 lacks its last language, and the last query has no judgment. Group 1 has graded passages."""
    records: list[Record] = []
    for lang in languages:
        for group in range(groups):
            records.append(Query("here", f"{lang}:q{group}", lang, f"question {group} {lang}", f"g{group}"))
            records.append(Passage("here", f"{lang}:p{group}", lang, f"answer {group} {lang}"))
            records.append(Passage("here", f"{lang}:x{group}", lang, f"other {group} {lang}"))
    for query_lang in languages:
        for group in range(groups):
            for lang in languages:
                last = query_lang == languages[-1] and group == groups - 1
                if not last and not (group == 0 and lang == languages[-1]):
                    grade = 2 if group == 1 and lang == languages[0] else 1
                    records.append(Judgment("here", f"{query_lang}:q{group}", f"{lang}:p{group}", grade))
            records.append(Judgment("here", f"{query_lang}:q{group}", f"{languages[0]}:x{group}", 0))
    write_retrieval(records, directory, {"name": "test"})
    return RetrievalSet(directory)


def vectors(task: RetrievalSet) -> tuple[np.ndarray, np.ndarray]:
    """Queries and corpus: few distinct values, so that many scores tie."""
    rng = np.random.default_rng(4)
    draw = lambda rows: rng.integers(-1, 2, (rows, DIMENSIONS))  # noqa: E731
    return draw(len(task.queries)).astype(np.float32), draw(len(task.corpus)).astype(np.float16)


def write_embeddings(directory: Path, task: RetrievalSet) -> Path:
    """The same vectors as given embeddings, rows in another order."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, table, matrix in zip(("queries", "corpus"), (task.queries, task.corpus), vectors(task), strict=True):
        order = np.random.default_rng(9).permutation(len(table))
        np.save(directory / f"{name}.npy", matrix[order])
        (directory / f"{name}_ids.txt").write_text("".join(f"{id_}\n" for id_ in table.column("id", order)), encoding="utf-8")
    return directory


def rounded(vectors: np.ndarray, dtype: str) -> np.ndarray:
    """float32 vectors as a store of that type gives them back."""
    return decode(encode(vectors, dtype), dtype)

"""Where a set stands without our training: BM25, published encoders, given vectors, and vectors without their language.

Every baseline writes what `evaluate.evaluate` gives, with `baseline` = {name, kind, settings, fitted_on} beside it, to
OUT/NAME/eval/SET.json and the values of single queries to SET.parquet: the layout of a run directory's results. A set in parts
(parts.py) gives one result.
In memory stay: all queries; a rank's passages up to a budget (beyond it they are read from disk); BM25's index.
Knows no file format but that.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hybrid_scale import dist
from hybrid_scale.data.prepared import RetrievalSet
from hybrid_scale.errors import DataError, describe
from hybrid_scale.retrieval.baselines.bm25 import Bm25, Tokenizer, rank_by_scores
from hybrid_scale.retrieval.evaluate import (
    drops_own_id,
    evaluate,
    first_languages,
    judge,
    languages_of,
    own_passages,
    positive,
    protocol,
    tabulate,
    write_per_query,
)
from hybrid_scale.retrieval.index import Shard
from hybrid_scale.retrieval.language_means import without_languages
from hybrid_scale.retrieval.language_removal import Removal
from hybrid_scale.retrieval.lengths import UNCUT, text_lengths_of
from hybrid_scale.retrieval.parts import is_in_parts, join_tables, mean_of, open_sets, table_of
from hybrid_scale.retrieval.published_encoder import Encoder, encode_set
from hybrid_scale.retrieval.spill import Spill
from hybrid_scale.retrieval.vectors import Similarity, open_embeddings, passage_lengths
from hybrid_scale.runs import RunDirectory, atomic_path, write_json, write_text

TOP_K = 100
ROWS_AT_ONCE = 16_384


@dataclass(frozen=True)
class Vectors:
    """Vectors of a set: all queries, this rank's passages, where they come from."""

    name: str
    queries: np.ndarray
    shard: Shard
    settings: dict[str, Any]
    text_lengths: dict[str, Any] | None
    """At how many tokens the texts were cut (lengths.py); None: not known."""


@dataclass(frozen=True)
class Room:
    """Where a rank's vectors go: memory up to so many bytes, beyond it a temporary folder inside `folder`."""

    memory_bytes: float
    folder: Path

    def spill(self, task: RetrievalSet, numbers: np.ndarray) -> Spill:
        """For float32 vectors of the passages `numbers` [n]."""
        name = lambda row: f"passage {task.corpus.column('id', numbers[row : row + 1])[0]!r}"  # noqa: E731
        return Spill(len(numbers), "float32", self.memory_bytes, self.folder, name)


# ------------------------------------------------------------------------------------------------------------- results

Table = Callable[[str], Path]
"""Name of a baseline -> the file for its table of single queries."""
Results = Iterator[dict[str, Any]]


def result_file(out: Path, name: str, directory: Path) -> Path:
    """Where the result of baseline `name` on the set in `directory` is written."""
    return RunDirectory(out / name).evaluation_file(Path(directory).name)


def check_results(out: Path, names: Sequence[str], directories: Sequence[Path]) -> None:
    """Raises DataError: a result would be written twice, or is there already. To be asked before anything is computed."""
    files = [result_file(out, name, directory) for directory in directories for name in names]
    twice = [file for file in files if files.count(file) > 1]
    if twice:
        raise DataError(
            describe(str(twice[0]), "two results", "baselines and sets are told by their folders' names", "Rename one.")
        )
    there = next((file for file in files if file.exists()), None)
    if there is not None:
        raise DataError(describe(str(there), "a file", "results are never overwritten", "Choose another --out."))


def results_on(directory: Path, out: Path, make: Callable[[RetrievalSet, Table], Results]) -> Results:
    """What `make` gives for the set in a folder, written; for a set in parts, what it gives for all parts. Collective."""
    tasks = open_sets(directory)
    parts: dict[str, list[dict[str, Any]]] = {}
    for task in tasks:
        for result in make(task, lambda name, task=task: _table(out, name, directory, task)):  # type: ignore[misc]
            if is_in_parts(directory):
                parts.setdefault(result["baseline"]["name"], []).append(result)
            else:
                yield _written(out, directory, result)
    for name, found in parts.items():
        table = result_file(out, name, directory).with_suffix(".parquet")
        dist.first_rank_does(lambda table=table: join_tables(table, [task.name for task in tasks]))
        yield _written(out, directory, mean_of(Path(directory).name, found))


def _table(out: Path, name: str, directory: Path, task: RetrievalSet) -> Path:
    whole = result_file(out, name, directory).with_suffix(".parquet")
    return table_of(whole, task.name) or whole if is_in_parts(directory) else whole


def _written(out: Path, directory: Path, result: dict[str, Any]) -> dict[str, Any]:
    path = result_file(out, result["baseline"]["name"], directory)
    dist.first_rank_does(lambda: write_json(path, result))
    return result


# ------------------------------------------------------------------------------------------------------------- lexical


def bm25(task: RetrievalSet, table: Path, tokenizer: Tokenizer | None = None) -> dict[str, Any]:
    """BM25's result. Collective, but one rank works."""
    result: dict[str, Any] = dist.first_rank_does(lambda: _bm25(task, table, tokenizer))
    return result


def _bm25(task: RetrievalSet, table: Path, tokenizer: Tokenizer | None) -> dict[str, Any]:
    by_language = protocol(task).pools == "own language"
    index = Bm25(task, tokenizer, by_language)
    languages, language = languages_of(task, task.corpus)
    qrels, drop = positive(task), drops_own_id(task)
    own = own_passages(task) if drop else np.full(len(task.queries), -1)
    above, scores, numbers = rank_by_scores(index.scores, qrels, language, len(languages), own, TOP_K)
    numbers[np.isneginf(scores)] = -1
    judged = judge(task, above, own[qrels[:, 0]] != qrels[:, 1])
    first = first_languages(task, numbers)
    write_per_query(table, task, judged, first)
    dropped = {"own_ids_dropped": int((own >= 0).sum())} if drop else {}
    baseline = {"name": "bm25", "kind": "bm25", "settings": index.tokenizer.settings}
    baseline["fitted_on"] = "the corpus of each language" if by_language else "the corpus"
    result = {**tabulate(task, judged, first), **dropped, "text_lengths": UNCUT, "baseline": baseline}
    result.pop("union", None)  # each index knows one language: there is no order of the union
    return result


# --------------------------------------------------------------------------------------------------------------- dense


def given(directory: Path, task: RetrievalSet, name: str, room: Room, similarity: Similarity = "inner_product") -> Vectors:
    """Vectors of a folder as `vectors.py` describes it."""
    queries, shard = open_embeddings(directory, task, room.memory_bytes / 2**30, similarity)
    settings = {"similarity": similarity, "passage_lengths": passage_lengths(directory)}
    lengths = dist.first_rank_does(lambda: text_lengths_of(directory))
    return Vectors(name, queries, shard, {"embeddings": str(directory), **settings}, lengths)


@contextmanager
def encoded(task: RetrievalSet, encoder: Encoder, room: Room) -> Iterator[Vectors]:
    """Vectors that a published encoder gives, valid inside the `with` block. Collective."""
    queries, numbers, blocks = encode_set(task, encoder)
    with room.spill(task, numbers) as spill:
        shard = dist.together(lambda: spill.extend(blocks).shard(numbers))
        most = encoder.settings["max_tokens"]
        limits = {"max_query_tokens": most, "max_passage_tokens": most, "queries_at_limit": None, "passages_at_limit": None}
        yield Vectors(encoder.options.name, queries, shard, encoder.settings, limits)


def dense_results(
    task: RetrievalSet, table: Table, vectors: Vectors, kind: str, removals: Sequence[Removal], room: Room
) -> Results:
    """The result of the vectors as they are, then after each removal. Collective."""
    baseline = {"name": vectors.name, "kind": kind, "settings": vectors.settings, "fitted_on": None}
    lengths = {"text_lengths": vectors.text_lengths}
    yield _evaluated(task, table, vectors.queries, vectors.shard, baseline) | lengths
    for removal in removals:
        yield without_language(task, table, vectors, removal, room)


def without_language(task: RetrievalSet, table: Table, vectors: Vectors, removal: Removal, room: Room) -> dict[str, Any]:
    """The result of vectors whose language was taken out. Collective."""
    names, query_language = languages_of(task, task.queries)
    passage_names, passage_language = languages_of(task, task.corpus)
    baseline = {
        "name": without(vectors.name, removal),
        "kind": removal.method,
        "settings": {**vectors.settings, "directions": removal.directions if removal.method == "lir" else None},
        "fitted_on": {
            "what": "vectors and languages of this set's own corpus and queries, each apart; no judgments (transductive)",
            "passages": dict(zip(passage_names, np.bincount(passage_language).tolist(), strict=True)),
            "queries": dict(zip(names, np.bincount(query_language).tolist(), strict=True)),
        },
    }
    spill = room.spill(task, vectors.shard.numbers)
    with without_languages(task, vectors.queries, vectors.shard, removal, spill) as (queries, shard):
        return _evaluated(task, table, queries, shard, baseline) | {"text_lengths": vectors.text_lengths}


def without(name: str, removal: Removal) -> str:
    """The name of the baseline `name` after a removal."""
    return f"{name}+{removal.name}"


def _evaluated(task: RetrievalSet, table: Table, queries: np.ndarray, shard: Shard, baseline: dict[str, Any]) -> dict[str, Any]:
    return evaluate(task, queries, shard, TOP_K, per_query_file=table(baseline["name"])) | {"baseline": baseline}


# ------------------------------------------------------------------------------------------------------------- vectors


def save_vectors(directory: Path, task: RetrievalSet, vectors: Vectors) -> None:
    """The folder that `vectors.open_embeddings` reads, float16. One rank only: DataError otherwise."""
    if dist.world_size() != 1:
        raise DataError(describe("saved vectors", f"{dist.world_size()} ranks", "one process writes them", "Start one process."))
    directory.mkdir(parents=True, exist_ok=True)
    for kind, table, rows, numbers in (
        ("corpus", task.corpus, vectors.shard.vectors, vectors.shard.numbers),
        ("queries", task.queries, vectors.queries, np.arange(len(task.queries))),
    ):
        with atomic_path(directory / f"{kind}.npy") as beside:
            stored = np.lib.format.open_memmap(beside, "w+", np.float16, (len(numbers), rows.shape[1]))
            for start in range(0, len(numbers), ROWS_AT_ONCE):
                stored[start : start + ROWS_AT_ONCE] = rows[start : start + ROWS_AT_ONCE]
            del stored
        write_text(directory / f"{kind}_ids.txt", "".join(f"{name}\n" for name in table.column("id", numbers)))

"""Where a set stands without our training: BM25, published encoders, given vectors, and vectors without their language.

Every baseline gives the dictionary that `evaluate.evaluate` gives, with `baseline` = {name, kind, settings, fitted_on} beside it,
at OUT/NAME/eval/SET.json: the layout of a run directory's results.
Knows no file format but that.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hybrid_scale import dist
from hybrid_scale.data.records import RetrievalSet, TextTable
from hybrid_scale.errors import DataError, describe
from hybrid_scale.retrieval import bias, measures
from hybrid_scale.retrieval.baselines_bm25 import Bm25, Tokenizer, rank_by_scores
from hybrid_scale.retrieval.baselines_encoder import Encoder, encode_set
from hybrid_scale.retrieval.baselines_languages import Removal, fit_and_remove
from hybrid_scale.retrieval.evaluate import evaluate
from hybrid_scale.retrieval.index import Shard
from hybrid_scale.retrieval.vectors import open_embeddings
from hybrid_scale.runs import RunDirectory, atomic_path, write_json, write_text

TOP_K = 100


@dataclass(frozen=True)
class Vectors:
    """Vectors of a set: all queries, this rank's passages, where they come from."""

    name: str
    queries: np.ndarray
    shard: Shard
    settings: dict[str, Any]


def result_file(out: Path, name: str, task: str) -> Path:
    return RunDirectory(out / name).evaluation_file(task)


# ------------------------------------------------------------------------------------------------------------- lexical


def bm25(task: RetrievalSet, tokenizer: Tokenizer | None = None) -> dict[str, Any]:
    """BM25's result. Not collective: call it on one rank."""
    index = Bm25(task, tokenizer)
    query_languages, query_language = languages_of(task, task.queries)
    passage_languages, passage_language = languages_of(task, task.corpus)
    qrels = np.asarray(task.qrels)[np.asarray(task.qrels)[:, 2] > 0]
    own = own_passages(task)
    above, _, numbers = rank_by_scores(index.scores, qrels, passage_language, len(passage_languages), own, TOP_K)
    judged = measures.Judged(
        query_languages=query_languages,
        passage_languages=passage_languages,
        query_language=query_language,
        query=qrels[:, 0],
        language=passage_language[qrels[:, 1]],
        grade=qrels[:, 2],
        above=above,
        found=own[qrels[:, 0]] != qrels[:, 1],
    )
    first = passage_language[numbers[:, 0]]
    top = bias.top_language_shares(query_language, first, len(query_languages), len(passage_languages))
    return {
        "task": task.name,
        "queries": len(task.queries),
        "passages": len(task.corpus),
        "languages": task.languages,
        "fingerprint": task.fingerprint,
        "queries_without_relevant": len(task.queries) - len(np.unique(qrels[:, 0])),
        **measures.summarise(judged, len(task.corpus)),
        "top1_language_matrix": measures.matrix(judged, top),
        "baseline": {"name": "bm25", "kind": "bm25", "settings": index.tokenizer.settings, "fitted_on": "the corpus"},
    }


def languages_of(task: RetrievalSet, table: TextTable) -> tuple[list[str], np.ndarray]:
    """The languages that occur in a table, in the task's order, and the number of each row's."""
    codes = pc.index_in(table.table.column("lang"), value_set=pa.array(task.languages, pa.large_string()))
    present, numbers = np.unique(codes.to_numpy(), return_inverse=True)
    return [task.languages[code] for code in present], numbers


def own_passages(task: RetrievalSet) -> np.ndarray:
    """The passage that carries a query's own id, -1 where none does or where the set doesn't drop it: int64 [Q]."""
    if not task.manifest.get("drop_own_id", False):
        return np.full(len(task.queries), -1)
    found = pc.index_in(task.queries.table.column("id"), value_set=task.corpus.table.column("id"))
    return pc.fill_null(found, -1).to_numpy().astype(np.int64)


# --------------------------------------------------------------------------------------------------------------- dense


def given(directory: Path, task: RetrievalSet) -> Vectors:
    """Vectors of a folder as `vectors.py` describes it, named after it."""
    queries, shard = open_embeddings(directory, task)
    return Vectors(directory.name, queries, shard, {"embeddings": str(directory)})


def encoded(task: RetrievalSet, encoder: Encoder) -> Vectors:
    """Vectors that a published encoder gives. Collective."""
    queries, numbers, passages = encode_set(task, encoder)
    return Vectors(encoder.options.name, queries, Shard(numbers, passages), encoder.settings)


def dense(task: RetrievalSet, vectors: Vectors, kind: str) -> dict[str, Any]:
    """The result of vectors as they are. Collective."""
    baseline = {"name": vectors.name, "kind": kind, "settings": vectors.settings, "fitted_on": None}
    return {**evaluate(task, vectors.queries, vectors.shard, TOP_K), "baseline": baseline}


def without_language(task: RetrievalSet, vectors: Vectors, removal: Removal) -> dict[str, Any]:
    """The result of vectors whose language was taken out. Collective."""
    names, query_language = languages_of(task, task.queries)
    queries = fit_and_remove(vectors.queries, query_language, len(names), removal, shared=False)
    passage_names, passage_language = languages_of(task, task.corpus)
    mine = passage_language[vectors.shard.numbers]
    passages = fit_and_remove(np.asarray(vectors.shard.vectors[:]), mine, len(passage_names), removal, shared=True)
    baseline = {
        "name": f"{vectors.name}+{removal.name}",
        "kind": removal.method,
        "settings": {**vectors.settings, "directions": removal.directions if removal.method == "lir" else None},
        "fitted_on": {
            "what": "vectors and languages of this set's own corpus and queries, each apart; no judgments (transductive)",
            "passages": dict(zip(passage_names, np.bincount(passage_language).tolist(), strict=True)),
            "queries": dict(zip(names, np.bincount(query_language).tolist(), strict=True)),
        },
    }
    return {**evaluate(task, queries, Shard(vectors.shard.numbers, passages), TOP_K), "baseline": baseline}


def dense_results(task: RetrievalSet, vectors: Vectors, kind: str, removals: Sequence[Removal]) -> Iterator[dict[str, Any]]:
    """The vectors as they are, then after each removal. Collective."""
    yield dense(task, vectors, kind)
    for removal in removals:
        yield without_language(task, vectors, removal)


# ------------------------------------------------------------------------------------------------------------- writing


def save(out: Path, result: dict[str, Any]) -> Path:
    """Write one result where a study finds it. Raises DataError: another result of this name and set is there."""
    path = result_file(out, result["baseline"]["name"], result["task"])
    if path.exists():
        raise DataError(describe(str(path), "a file", "results are never overwritten", "Choose another --out."))
    write_json(path, result)
    return path


def save_vectors(directory: Path, task: RetrievalSet, vectors: Vectors) -> None:
    """The folder that `vectors.open_embeddings` reads, float16. One rank only: DataError otherwise."""
    if dist.world_size() != 1:
        raise DataError(describe("saved vectors", f"{dist.world_size()} ranks", "one process writes them", "Start one process."))
    passages = (task.corpus, np.asarray(vectors.shard.vectors[:]), vectors.shard.numbers)
    queries = (task.queries, vectors.queries, np.arange(len(task.queries)))
    directory.mkdir(parents=True, exist_ok=True)
    for kind, (table, rows, numbers) in (("corpus", passages), ("queries", queries)):
        with atomic_path(directory / f"{kind}.npy") as beside, open(beside, "wb") as file:
            np.save(file, rows.astype(np.float16))
        write_text(directory / f"{kind}_ids.txt", "".join(f"{name}\n" for name in table.column("id", numbers)))

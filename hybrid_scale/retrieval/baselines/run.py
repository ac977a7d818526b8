"""Where a set stands without our training: BM25, published encoders, given vectors, and vectors without their language.

Every baseline writes what `evaluate.evaluate` gives, with `baseline` = {name, kind, settings, fitted_on} beside it, to
OUT/NAME/eval/SET.json and the values of single queries to SET.parquet: the layout of a run directory's results.
Knows no file format but that.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hybrid_scale import dist
from hybrid_scale.data.prepared import RetrievalSet
from hybrid_scale.errors import DataError, describe
from hybrid_scale.retrieval.baselines.bm25 import Bm25, Tokenizer, rank_by_scores
from hybrid_scale.retrieval.baselines.languages import Removal, fit_and_remove
from hybrid_scale.retrieval.evaluate import (
    drops_own_id,
    evaluate,
    first_languages,
    judge,
    languages_of,
    own_passages,
    positive,
    tabulate,
    write_per_query,
)
from hybrid_scale.retrieval.index import Shard
from hybrid_scale.retrieval.published_encoder import Encoder, encode_set
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


def result_file(out: Path, name: str, task: RetrievalSet) -> Path:
    """Where a baseline's result on a set is written. Raises DataError: it is there already."""
    path = RunDirectory(out / name).evaluation_file(task.name)
    if path.exists():
        raise DataError(describe(str(path), "a file", "results are never overwritten", "Choose another --out."))
    return path


# ------------------------------------------------------------------------------------------------------------- lexical


def bm25(task: RetrievalSet, out: Path, tokenizer: Tokenizer | None = None) -> dict[str, Any]:
    """BM25's result, written. Collective, but one rank works."""
    path = result_file(out, "bm25", task)
    result: dict[str, Any] = dist.first_rank_does(lambda: _bm25(task, path, tokenizer))
    return result


def _bm25(task: RetrievalSet, path: Path, tokenizer: Tokenizer | None) -> dict[str, Any]:
    index = Bm25(task, tokenizer)
    languages, language = languages_of(task, task.corpus)
    qrels, drop = positive(task), drops_own_id(task)
    own = own_passages(task) if drop else np.full(len(task.queries), -1)
    above, scores, numbers = rank_by_scores(index.scores, qrels, language, len(languages), own, TOP_K)
    numbers[np.isneginf(scores)] = -1
    judged = judge(task, above, own[qrels[:, 0]] != qrels[:, 1])
    first = first_languages(task, numbers)
    write_per_query(path.with_suffix(".parquet"), task, judged, first)
    dropped = {"own_ids_dropped": int((own >= 0).sum())} if drop else {}
    baseline = {"name": "bm25", "kind": "bm25", "settings": index.tokenizer.settings, "fitted_on": "the corpus"}
    result = {**tabulate(task, judged, first), **dropped, "baseline": baseline}
    write_json(path, result)
    return result


# --------------------------------------------------------------------------------------------------------------- dense


def given(directory: Path, task: RetrievalSet) -> Vectors:
    """Vectors of a folder as `vectors.py` describes it, named after it."""
    queries, shard = open_embeddings(directory, task)
    return Vectors(directory.name, queries, shard, {"embeddings": str(directory)})


def encoded(task: RetrievalSet, encoder: Encoder) -> Vectors:
    """Vectors that a published encoder gives. Collective."""
    queries, numbers, passages = encode_set(task, encoder)
    return Vectors(encoder.options.name, queries, Shard(numbers, passages), encoder.settings)


def dense(task: RetrievalSet, out: Path, vectors: Vectors, kind: str) -> dict[str, Any]:
    """The result of vectors as they are, written. Collective."""
    baseline = {"name": vectors.name, "kind": kind, "settings": vectors.settings, "fitted_on": None}
    return _evaluated(task, out, vectors.queries, vectors.shard, baseline)


def without_language(task: RetrievalSet, out: Path, vectors: Vectors, removal: Removal) -> dict[str, Any]:
    """The result of vectors whose language was taken out, written. Collective."""
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
    return _evaluated(task, out, queries, Shard(vectors.shard.numbers, passages), baseline)


def _evaluated(task: RetrievalSet, out: Path, queries: np.ndarray, shard: Shard, baseline: dict[str, Any]) -> dict[str, Any]:
    path = result_file(out, baseline["name"], task)
    result = evaluate(task, queries, shard, TOP_K, per_query_file=path.with_suffix(".parquet")) | {"baseline": baseline}
    dist.first_rank_does(lambda: write_json(path, result))
    return result


def dense_results(
    task: RetrievalSet, out: Path, vectors: Vectors, kind: str, removals: Sequence[Removal]
) -> Iterator[dict[str, Any]]:
    """The vectors as they are, then after each removal. Collective."""
    yield dense(task, out, vectors, kind)
    for removal in removals:
        yield without_language(task, out, vectors, removal)


# ------------------------------------------------------------------------------------------------------------- writing


def averages(out: Path, results: Sequence[dict[str, Any]], tasks: Sequence[RetrievalSet]) -> list[dict[str, Any]]:
    """For each baseline and each set that comes in parts (`part_of`, CQADupStack), the mean over its parts, written. Collective.

    Parts that weren't scored are missing from the mean: `parts` names those that are in it.
    """
    part_of = {task.name: task.manifest.get("part_of") for task in tasks}
    wholes: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for result in results:
        whole = part_of[result["task"]]
        if whole:
            wholes.setdefault((result["baseline"]["name"], whole), []).append(result)
    means = [macro_average(whole, parts) for (_, whole), parts in wholes.items()]
    for mean in means:
        path = RunDirectory(out / mean["baseline"]["name"]).evaluation_file(mean["task"])
        dist.first_rank_does(lambda path=path, mean=mean: write_json(path, mean))
    return means


def macro_average(name: str, parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One result from those of the parts: every metric is the plain mean over the parts that have it (BEIR's CQADupStack)."""
    values = {
        metric: [part["metrics"][metric] for part in parts if part["metrics"].get(metric) is not None]
        for metric in parts[0]["metrics"]
    }
    return {
        "task": name,
        "parts": [part["task"] for part in parts],
        "queries": sum(part["queries"] for part in parts),
        "passages": sum(part["passages"] for part in parts),
        "languages": sorted({language for part in parts for language in part["languages"]}),
        "metrics": {metric: float(np.mean(found)) if found else None for metric, found in values.items()},
        "by_language": {},
        "baseline": parts[0]["baseline"],
    }


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

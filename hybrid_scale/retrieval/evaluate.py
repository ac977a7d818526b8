"""Score one retrieval set: vectors in, one dictionary of numbers out (JSON, the same on every rank).

Ranks are exact at any depth (index.count_above); ties go to the passage that comes first in the corpus. The numbers are
defined in measures.py.
Knows no model and no text.

Shapes: Q queries, J judged pairs with a positive grade, X query languages, C passage languages.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import parquet

from hybrid_scale import dist
from hybrid_scale.data.prepared import RetrievalSet, TextTable
from hybrid_scale.errors import RunError, describe
from hybrid_scale.protocols import Protocol, protocol_of
from hybrid_scale.retrieval import bias, trec
from hybrid_scale.retrieval.index import Shard, count_above, judged_keys, part_of, search
from hybrid_scale.retrieval.measures import Judged, matrix, per_query, summarise
from hybrid_scale.runs import atomic_path


def evaluate(
    task: RetrievalSet,
    query_vectors: np.ndarray,
    shard: Shard,
    top_k: int = 100,
    run_file: Path | None = None,
    per_query_file: Path | None = None,
    drop_own_id: bool | None = None,
) -> dict[str, Any]:
    """All measures of `task` for these vectors. All ranks call it, each with all queries [Q, D] and its own shard.

    `top_k` results a query are searched as well: they give the top-1 languages and the optional TREC `run_file`, and they are
    compared with the counted ranks. `per_query_file`: Parquet with the values of single queries (measures.per_query).
    `drop_own_id`: a passage whose id is the query's id is no result (see `own_passages`); None: as the prepared set says.
    Raises RunError when search and counting disagree (broken arithmetic), DataError as index.py does.
    """
    drop = drops_own_id(task) if drop_own_id is None else drop_own_id
    own = own_passages(task) if drop else np.full(len(task.queries), -1, np.int64)
    judged = _count(task, query_vectors, shard, own)
    scores, numbers = without(*search(query_vectors, shard, top_k + int((own >= 0).any())), own, top_k)
    result = outcome(task, judged, scores, numbers, per_query_file)
    if run_file is not None:
        listed = scores, numbers
        if protocol(task).pools == "own language":
            listed = _search_own_language(task, query_vectors, shard, own, top_k)
        dist.first_rank_does(lambda: trec.write_run(run_file, task, *listed))
    return result | ({"own_ids_dropped": int((own >= 0).sum())} if drop else {})


def judge(task: RetrievalSet, above: np.ndarray, found: np.ndarray | None = None) -> Judged:
    """The positive judgments of a set, in the order of its qrels, with how many passages of each language beat them.

    Behind them come those whose passage the corpus lacks (`RetrievalSet.missing`).

    `above` int64 [J, C] by any scorer (as index.count_above, C the languages that occur in the corpus, in the order of
    `task.languages`); `found` [J]: False where the ranking lacks the passage; None: it has all.
    """
    query_languages, query_language = languages_of(task, task.queries)
    passage_languages, passage_language = languages_of(task, task.corpus)
    qrels = positive(task)
    found = np.ones(len(qrels), bool) if found is None else found
    language = passage_language[qrels[:, 1]]
    topics = np.zeros(len(task.queries), bool)
    topics[np.concatenate([task.qrels[:, 0], task.missing[:, 0]])] = True
    pairs = qrels[:, 0], language, qrels[:, 2], above, found
    judged = Judged(query_languages, passage_languages, query_language, *pairs, topics)
    return _with_missing(judged, missing_positive(task))


def outcome(
    task: RetrievalSet,
    judged: Judged,
    scores: np.ndarray,
    numbers: np.ndarray,
    per_query_file: Path | None = None,
) -> dict[str, Any]:
    """Numbers and the table of single queries of one scorer: counted ranks, and its best results [Q, k] (number -1: none).

    All ranks call it alike. Raises RunError when the two disagree.
    """
    _check_agreement(numbers, positive(task)[:, 1], judged)
    first = first_languages(task, numbers)
    if per_query_file is not None:
        dist.first_rank_does(lambda: write_per_query(per_query_file, task, judged, first))
    return tabulate(task, judged, first)


def first_languages(task: RetrievalSet, numbers: np.ndarray) -> np.ndarray:
    """[Q] number of the language of each query's first result of [Q, k], -1 where it has none."""
    language = languages_of(task, task.corpus)[1]
    return np.where(numbers[:, 0] >= 0, language[numbers[:, 0]], -1)


def tabulate(task: RetrievalSet, judged: Judged, first: np.ndarray) -> dict[str, Any]:
    """All numbers of a set. No communication."""
    some = first >= 0
    shape = (len(judged.query_languages), len(judged.passage_languages))
    top = bias.top_language_shares(judged.query_language[some], first[some], *shape)
    return _summary(task, judged) | {"top1_language_matrix": matrix(judged, top)}


def protocol(task: RetrievalSet) -> Protocol:
    """How the set is scored (protocols.py)."""
    (query_names, query_language), (passage_names, passage_language) = (
        languages_of(task, table) for table in (task.queries, task.corpus)
    )
    query, passage = positive(task)[:, :2].T
    asked, answered = np.array(query_names)[query_language[query]], np.array(passage_names)[passage_language[passage]]
    return protocol_of(task.manifest, len(passage_names), bool((asked != answered).any()))


def _summary(task: RetrievalSet, judged: Judged) -> dict[str, Any]:
    names, language = languages_of(task, task.corpus)
    return facts(task, judged) | summarise(judged, np.bincount(language, minlength=len(names)), protocol(task))


def _search_own_language(
    task: RetrievalSet, query_vectors: np.ndarray, shard: Shard, own: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """The best `k` passages of each query's own language, as `search` gives those of the union; number -1: none."""
    query_languages, query_language = languages_of(task, task.queries)
    passage_languages, passage_language = languages_of(task, task.corpus)
    scores, numbers = np.full((len(own), k), -np.inf, np.float32), np.full((len(own), k), -1, np.int64)
    for x, language in enumerate(query_languages):
        if language not in passage_languages:
            continue
        held = np.flatnonzero(passage_language[shard.numbers] == passage_languages.index(language))
        asking = np.flatnonzero(query_language == x)
        deeper = int((own[asking] >= 0).any())
        found = without(*search(query_vectors[asking], part_of(shard, held), k + deeper), own[asking], k)
        width = found[0].shape[1]
        scores[asking, :width], numbers[asking, :width] = found
    return scores, numbers


def _count(task: RetrievalSet, query_vectors: np.ndarray, shard: Shard, own: np.ndarray) -> Judged:
    """Ranks by counting, the passage `own` [Q] of a query (-1: none) taken out."""
    passage_languages, passage_language = languages_of(task, task.corpus)
    query, passage = positive(task)[:, :2].T
    above = count_above(query_vectors, shard, query, passage, passage_language[shard.numbers], len(passage_languages))
    if (own >= 0).any():
        asking = np.flatnonzero(own >= 0)
        own_keys = np.full(len(own), np.iinfo(np.int64).min)
        own_keys[asking] = judged_keys(query_vectors, shard, asking, own[asking])
        beaten = own_keys[query] > judged_keys(query_vectors, shard, query, passage)
        above[beaten, passage_language[own[query[beaten]]]] -= 1
    return judge(task, above, passage != own[query])


def positive(task: RetrievalSet) -> np.ndarray:
    """The judgments above 0 of passages in the corpus: int64 [J, 3] query, passage, grade."""
    return np.asarray(task.qrels[task.qrels[:, 2] > 0])


def missing_positive(task: RetrievalSet) -> np.ndarray:
    """The judgments above 0 of passages that the corpus lacks: int64 [M, 2] query, grade."""
    return np.asarray(task.missing[task.missing[:, 1] > 0])


def _with_missing(judged: Judged, missing: np.ndarray) -> Judged:
    """The judged pairs and, behind them, passages that aren't in the corpus: never found, but relevant, as in BEIR and mteb.

    Their language is that of the corpus where it has one; else it is unknown (-1), and they count in the union pool alone.
    """
    if not len(missing):
        return judged
    languages = len(judged.passage_languages)
    return replace(
        judged,
        query=np.concatenate([judged.query, missing[:, 0]]),
        language=np.concatenate([judged.language, np.full(len(missing), 0 if languages == 1 else -1, judged.language.dtype)]),
        grade=np.concatenate([judged.grade, missing[:, 1]]),
        above=np.concatenate([judged.above, np.zeros((len(missing), languages), judged.above.dtype)]),
        found=np.concatenate([judged.found, np.zeros(len(missing), bool)]),
    )


def languages_of(task: RetrievalSet, table: TextTable) -> tuple[list[str], np.ndarray]:
    """The languages that occur in a table, in the task's order, and the number of each row's."""
    codes = pc.index_in(table.table.column("lang"), value_set=pa.array(task.spellings, pa.large_string())).to_numpy()
    counts = np.bincount(codes, minlength=len(task.languages))
    numbers = (np.cumsum(counts > 0) - 1).astype(np.int16)
    return [language for language, count in zip(task.languages, counts, strict=True) if count], numbers[codes]


def _check_agreement(numbers: np.ndarray, passage: np.ndarray, judged: Judged) -> None:
    """Counting and searching take different paths to the same order: a judged passage of rank r is result r."""
    listed = judged.ranks[: len(passage)] <= numbers.shape[1]  # behind them: passages that the corpus lacks
    place = judged.ranks[: len(passage)][listed].astype(np.int64) - 1
    wrong = int((numbers[judged.query[: len(passage)][listed], place] != passage[listed]).sum())
    if wrong:
        rule = "search and counting must give them the same rank"
        raise RunError(
            describe("evaluation", f"{wrong} passages", rule, "This is a defect of the software or the GPU: report it.")
        )


# --------------------------------------------------------------------------------------------------------------- own ids


def drops_own_id(task: RetrievalSet) -> bool:
    """Whether the prepared set asks for it: `drop_own_id` in its manifest (data/sources/domains.py)."""
    return bool(task.manifest.get("drop_own_id", False))


def own_passages(task: RetrievalSet) -> np.ndarray:
    """For each query the number of the passage with the same id, -1 where there is none: int64 [Q].

    BEIR takes such a passage out of the results (not out of the qrels, where it counts as not found): in ArguAna and Quora the
    queries are passages of the corpus.
    """
    found = pc.index_in(task.queries.table.column("id"), value_set=task.corpus.table.column("id"))
    own: np.ndarray = pc.fill_null(found, -1).to_numpy().astype(np.int64)
    return own


def without(scores: np.ndarray, numbers: np.ndarray, own: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Results [Q, k] without each query's `own` passage; a list that is one short ends with number -1, score -infinity."""
    if not (own >= 0).any():
        return scores[:, :k], numbers[:, :k]
    kept = numbers != own[:, None]
    order = np.argsort(~kept, axis=1, kind="stable")  # the own passage goes to the end
    scores = np.take_along_axis(np.where(kept, scores, -np.inf).astype(np.float32), order, 1)
    numbers = np.take_along_axis(np.where(kept, numbers, -1), order, 1)
    return scores[:, :k], numbers[:, :k]


# ----------------------------------------------------------------------------------------------------------------- files


def facts(task: RetrievalSet, judged: Judged) -> dict[str, Any]:
    return {
        "task": task.name,
        "evaluation": task.manifest.get("evaluation"),
        "queries": len(task.queries),
        "passages": len(task.corpus),
        "languages": task.languages,
        "fingerprint": task.fingerprint,
        **judged.topic_counts(),
    }


def write_per_query(path: Path, task: RetrievalSet, judged: Judged, first: np.ndarray | None) -> None:
    """The table of single queries as Parquet; its metadata name the set."""
    rule = protocol(task)
    table = per_query(judged, task.queries.column("id"), task.queries.column("group"), first, rule)
    write_table(path, table, {"task": task.name, "fingerprint": task.fingerprint, "pools": rule.pools})


def write_table(path: Path, table: pa.Table, facts: dict[str, str]) -> None:
    with atomic_path(path) as beside:
        parquet.write_table(table.replace_schema_metadata(facts), beside)


def evaluate_run_file(
    task: RetrievalSet,
    path: Path,
    order: trec.Order = "score",
    per_query_file: Path | None = None,
    drop_own_id: bool | None = None,
) -> dict[str, Any]:
    """All measures of `task` for the results in a TREC run, down to the depth that it has: what it doesn't list isn't found.

    `drop_own_id` as in `evaluate`. All ranks call it alike. Raises DataError: a line that isn't one of a run, an id that the set
    doesn't hold, a passage twice for a query.
    """
    drop = drops_own_id(task) if drop_own_id is None else drop_own_id
    results = trec.read_run(path, order)
    results, dropped = trec.without_own_ids(results) if drop else (results, 0)
    query = trec.numbers_of(results.query_ids, task.queries, f"{path}: queries", task)[results.query]
    passage = trec.numbers_of(results.passage_ids, task.corpus, f"{path}: passages", task)[results.passage]
    passage_languages, passage_language = languages_of(task, task.corpus)
    wanted = positive(task)
    above, found = trec.ranks_in(query, passage, passage_language, len(passage_languages), wanted[:, 0], wanted[:, 1])
    judged = judge(task, above, found)
    if per_query_file is not None:
        dist.first_rank_does(lambda: write_per_query(per_query_file, task, judged, None))
    missing = len(task.queries) - len(np.unique(query))
    counts = {"queries_without_results": missing, **({"own_ids_dropped": dropped} if drop else {})}
    return _summary(task, judged) | {"run": path.name} | counts

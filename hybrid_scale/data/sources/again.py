"""Prepared data as a source: judged passages as training pairs, and a training set divided into training and development.

    judged     a prepared retrieval set (a *training* split of MIRACL, Mr. TyDi, BEIR, ...) -> training pairs
    held_in    a prepared training set without the families that `held_out` takes
    held_out   those families as a retrieval set: a development set, in every language that the training has

`held_in` and `held_out` with equal options are complements: no text of one is in the other.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from hybrid_scale.data.prepared import Pairs, RetrievalSet
from hybrid_scale.data.records import Judgment, Note, Pair, Passage, Query, Record
from hybrid_scale.data.shuffle import generator
from hybrid_scale.data.sources.common import require_languages
from hybrid_scale.data.sources.domains import judged_sources
from hybrid_scale.errors import DataError, describe

BLOCK = 50_000
"""Rows whose texts are read at once."""
_HELD_OUT = 0x68656C64
"""First word of the key that draws families: no other purpose has it."""


def read_judged(path: Path, negatives: int = 0, min_score: int = 1) -> Iterator[Record]:
    """A pair for each query and passage judged `min_score` or higher, in the order of the judgments.

    negatives: at most so many passages judged 0 or lower for the query, as hard negatives (MIRACL has some). Raises DataError:
    not a prepared retrieval set, or no judgment high enough; ConfigError: the set is held out (`domains.judged_sources`).
    """
    task = RetrievalSet(path)
    judged_sources(task.manifest, str(path))
    qrels = np.asarray(task.qrels)
    relevant = qrels[qrels[:, 2] >= min_score]
    if len(relevant) == 0:
        raise DataError(
            describe(str(path), f"no judgment of {min_score} or more", "training pairs are made of relevant passages")
        )
    wrong = _wrong(qrels[qrels[:, 2] <= 0], negatives)
    empty = 0
    for start in range(0, len(relevant), BLOCK):
        rows = relevant[start : start + BLOCK]
        columns = [task.queries.column(name, rows[:, 0]) for name in ("id", "lang", "group", "text")]
        passages = [task.corpus.column(name, rows[:, 1]) for name in ("id", "lang", "text")]
        hard = [wrong.get(int(query), np.empty(0, np.int64)) for query in rows[:, 0]]
        texts = _named(task, np.unique(np.concatenate([np.empty(0, np.int64), *hard])))
        for place, (query, lang, group, text, pid, passage_lang, passage) in enumerate(zip(*columns, *passages, strict=True)):
            if not passage:
                empty += 1
                continue
            held = tuple(texts[int(number)] for number in hard[place] if texts[int(number)][1])
            yield Pair(f"{path}: {query}", f"{query}:{pid}", group, pid, lang, passage_lang, text, passage, held)
    if empty:
        yield Note(str(path), f"a relevant passage without text makes no pair; such pairs left out: {empty:,}")


def _wrong(judged: np.ndarray, most: int) -> dict[int, np.ndarray]:
    """Query -> the first `most` passages judged not relevant."""
    if not most or not len(judged):
        return {}
    queries, starts = np.unique(judged[:, 0], return_index=True)
    ends = [*starts[1:], len(judged)]
    return {
        int(query): judged[start : min(end, start + most), 1] for query, start, end in zip(queries, starts, ends, strict=True)
    }


def _named(task: RetrievalSet, numbers: np.ndarray) -> dict[int, tuple[str, str]]:
    ids, texts = (task.corpus.column(name, numbers) for name in ("id", "text"))
    return {int(number): (name, text) for number, name, text in zip(numbers, ids, texts, strict=True)}


def read_held_in(path: Path, families: int = 500, seed: int = 0) -> Iterator[Record]:
    """The rows of a prepared training set but those of the families held out."""
    pairs = Pairs(path)
    out = held_out_families(pairs, families, seed)
    chosen = np.flatnonzero(~np.isin(np.asarray(pairs.family), out))
    for start in range(0, len(chosen), BLOCK):
        rows = chosen[start : start + BLOCK]
        ids, queries = (pairs.queries.column(name, pairs.query[rows]) for name in ("id", "text"))
        pids, passages = (pairs.passages.column(name, pairs.passage[rows]) for name in ("id", "text"))
        for place, row in enumerate(rows.tolist()):
            negatives = pairs.negatives[pairs.negative_offsets[row] : pairs.negative_offsets[row + 1]]
            held = zip(*(pairs.passages.column(name, negatives) for name in ("id", "text")), strict=True)
            yield Pair(
                where=f"{path}: row {row}",
                id=ids[place],
                group=str(pairs.group[row]),
                pid=pids[place],
                query_lang=pairs.languages[pairs.query_lang[row]],
                passage_lang=pairs.languages[pairs.passage_lang[row]],
                query=queries[place],
                passage=passages[place],
                negatives=tuple(held),
                cross_only=bool(pairs.cross_only[row]),
                source=pairs.source_names[pairs.source[row]] if pairs.source is not None else "",
            )


def read_held_out(path: Path, families: int = 500, seed: int = 0, languages: tuple[str, ...] = ()) -> Iterator[Record]:
    """The families held out: their queries, their passages, and every passage of a query's parallel group as relevant.

    `languages`: those of the development set, all where it is empty; `held_in` leaves the families out in every language.
    Raises DataError: a language that the training set lacks.
    """
    pairs = Pairs(path)
    out = held_out_families(pairs, families, seed)
    chosen = require_languages(str(path), languages, pairs.languages)
    wanted = np.array([code in chosen for code in pairs.languages])[np.asarray(pairs.passage_lang)]
    rows = np.flatnonzero(np.isin(np.asarray(pairs.family), out) & ~np.asarray(pairs.cross_only) & wanted)
    ids, queries = (pairs.queries.column(name, pairs.query[rows]) for name in ("id", "text"))
    pids, passages = (pairs.passages.column(name, pairs.passage[rows]) for name in ("id", "text"))
    of_group: dict[int, dict[str, None]] = {}
    seen: set[str] = set()
    for place, row in enumerate(rows.tolist()):
        of_group.setdefault(int(pairs.group[row]), {})[pids[place]] = None
        if pids[place] not in seen:
            seen.add(pids[place])
            lang = pairs.languages[pairs.passage_lang[row]]
            yield Passage(f"{path}: row {row}", pids[place], lang, passages[place])
    for place, row in enumerate(rows.tolist()):
        where, group = f"{path}: row {row}", int(pairs.group[row])
        yield Query(where, ids[place], pairs.languages[pairs.query_lang[row]], queries[place], str(group))
        for pid in of_group[group]:
            yield Judgment(where, ids[place], pid, 1)


def held_out_families(pairs: Pairs, count: int, seed: int) -> np.ndarray:
    """Numbers of the `count` families that are held out, drawn among those with a monolingual row; ascending.

    Raises DataError: more than half of the families would be.
    """
    known = np.unique(np.asarray(pairs.family)[~np.asarray(pairs.cross_only)])
    if not 0 < count <= len(known) // 2:
        rule = f"at least one family and at most half of the {len(known):,} with a monolingual row can be held out"
        raise DataError(describe(f"{pairs.directory}: families", count, rule, "Change --option families=N."))
    return np.sort(known[generator(seed, _HELD_OUT).permutation(len(known))[:count]])

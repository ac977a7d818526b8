"""Records -> a prepared directory, checked together and written whole or not at all.

Checked: duplicate ids, two texts under one passage id, judgments that name nothing. Memory grows with the number of ids, not
with their texts: 200 to 300 bytes a training row (`numbers`). Knows no source and no tokenizer.
"""

import itertools
from array import array
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from hybrid_scale.data.folder import Rejects, TextWriter, finish, new_directory
from hybrid_scale.data.numbers import Numbers, Places, key_of
from hybrid_scale.data.records import Bad, Judgment, Pair, Query, Record
from hybrid_scale.errors import DataError, describe


def write(
    records: Iterable[Record],
    directory: Path,
    source: dict[str, Any],
    rejects: Rejects | None = None,
    facts: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """`write_pairs` or `write_retrieval`, whichever the first good record asks for. `facts`: further keys of the manifest."""
    records = iter(records)
    head: list[Record] = []
    for record in records:
        head.append(record)
        if not isinstance(record, Bad):
            break
    training = not head or isinstance(head[-1], Pair | Bad)
    return (write_pairs if training else write_retrieval)(itertools.chain(head, records), directory, source, rejects, facts)


def write_pairs(
    records: Iterable[Record],
    directory: Path,
    source: dict[str, Any],
    rejects: Rejects | None = None,
    facts: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Check pairs and write them to the empty `directory`; returns the manifest.

    Rows are stored by group. Passages with equal text become one passage (counted in the manifest), so that one text
    is never another row's negative. Raises DataError: no pairs, duplicate id, two texts under one pid, a Bad row
    without a reject file, `directory` not empty. A failed write leaves nothing behind.
    """
    with new_directory(directory) as beside, rejects or Rejects() as refused:
        return finish(beside, "pairs", source, refused, _fill_pairs(records, beside, source, refused), facts)


def write_retrieval(
    records: Iterable[Record],
    directory: Path,
    source: dict[str, Any],
    rejects: Rejects | None = None,
    facts: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Check a corpus, its queries and judgments (in any order) and write them; returns the manifest.

    Raises DataError: duplicate ids, a judgment that names an unknown query or passage, a pair judged twice, no
    passages / queries / judgments, a Bad row without a reject file, `directory` not empty. Queries without a positive
    judgment are kept and counted (`queries_without_relevant`); metrics say what they do with them. A failed write leaves
    nothing behind.
    """
    with new_directory(directory) as beside, rejects or Rejects() as refused:
        return finish(beside, "retrieval", source, refused, _fill_retrieval(records, beside, source, refused), facts)


class _Codes:
    """Text -> consecutive numbers, in order of first appearance. For few texts (languages)."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}

    def __call__(self, text: str) -> int:
        return self.numbers.setdefault(text, len(self.numbers))


def _bad_id(where: str, key: str, value: str) -> Bad | None:
    """Ids are parted by line breaks and tabs in the files of other programs."""
    if value.isprintable() or not any(sign in value for sign in "\t\r\n\0"):
        return None
    return Bad(where, describe(f"{where}: {key}", value, "an id holds no tab, line break or NUL"))


# ------------------------------------------------------------------------------------------------------------ pairs


class _PassageTable:
    """Unique passages: one number per pid, and one number per text, whatever its pid and language."""

    def __init__(self, writer: TextWriter):
        self.writer = writer
        self.by_pid, self.by_text = Numbers(), Numbers()
        self.same_text = 0

    def refusal(self, where: str, named: Sequence[tuple[str, str]]) -> Bad | None:
        """What is wrong with the (pid, text) of a row; nothing is kept of them yet."""
        here: dict[str, str] = {}
        for pid, text in named:
            known = self.by_pid.get(key_of(pid))
            if here.setdefault(pid, text) != text or (known is not None and known != self.by_text.get(key_of(text))):
                return Bad(where, describe(f"{where}: pid", pid, "this pid already names a passage with another text"))
            if bad := _bad_id(where, "pid", pid):
                return bad
        return None

    def number(self, pid: str, lang: str, text: str) -> int:
        key = key_of(pid)
        known = self.by_pid.get(key)
        if known is not None:
            return known
        number = self.by_text.setdefault(key_of(text), self.writer.count)
        if number == self.writer.count:
            self.writer.append(pid, lang, text)
        else:
            self.same_text += 1
        return self.by_pid.setdefault(key, number)


class _PairTable:
    """The rows of a training set, a number at a time."""

    def __init__(self, directory: Path):
        self.queries = TextWriter(directory / "queries.arrow", ("id", "text"))
        self.passages = _PassageTable(TextWriter(directory / "passages.arrow", ("id", "lang", "text")))
        self.ids, self.groups, self.places, self.languages = Numbers(), Numbers(), Places(), _Codes()
        self.group, self.passage, self.negatives = array("q"), array("q"), array("q")
        self.query_lang, self.passage_lang, self.cross_only = array("h"), array("h"), array("b")
        self.held = array("i")
        """Hard negatives of each row."""

    def refusal(self, pair: Pair) -> Bad | None:
        first = self.ids.get(key_of(pair.id))
        if first is not None:
            return Bad(pair.where, describe(f"{pair.where}: id", pair.id, f"duplicate id, first at {self.places[first]}"))
        if bad := _bad_id(pair.where, "id", pair.id):
            return bad
        return self.passages.refusal(pair.where, [(pair.pid, pair.passage), *pair.negatives])

    def append(self, pair: Pair) -> None:
        self.ids.setdefault(key_of(pair.id), self.queries.append(pair.id, pair.query))
        self.places.append(pair.where)
        self.group.append(self.groups.setdefault(key_of(pair.group), self.groups.count))
        self.passage.append(self.passages.number(pair.pid, pair.passage_lang, pair.passage))
        self.query_lang.append(self.languages(pair.query_lang))
        self.passage_lang.append(self.languages(pair.passage_lang))
        self.cross_only.append(pair.cross_only)
        self.held.append(len(pair.negatives))
        self.negatives.extend(self.passages.number(pid, pair.passage_lang, text) for pid, text in pair.negatives)

    def close(self) -> None:
        self.queries.close()
        self.passages.writer.close()

    def arrays(self) -> dict[str, np.ndarray]:
        """What `prepared.Pairs` opens, rows ordered by group."""
        group = _numpy(self.group)
        order = np.argsort(group, kind="stable")
        passage = _numpy(self.passage)[order]
        offsets, negatives = _reordered(_numpy(self.held), _numpy(self.negatives), order)
        row_family, passage_family = families(group[order], passage, self.passages.writer.count)
        return {
            "query": order.astype(np.int64),
            "group": group[order],
            "passage": passage,
            "query_lang": _numpy(self.query_lang)[order],
            "passage_lang": _numpy(self.passage_lang)[order],
            "cross_only": _numpy(self.cross_only)[order].astype(bool),
            "family": row_family,
            "passage_family": passage_family,
            "negative_offsets": offsets,
            "negatives": negatives,
        }


def _fill_pairs(records: Iterable[Record], directory: Path, source: dict[str, Any], rejects: Rejects) -> dict[str, Any]:
    table = _PairTable(directory)
    for record in records:
        if not isinstance(record, Pair | Bad):
            raise DataError(describe(record.where, type(record).__name__, "a training source yields pairs only"))
        bad = record if isinstance(record, Bad) else table.refusal(record)
        if bad is not None:
            rejects.add(bad)
        elif isinstance(record, Pair):
            table.append(record)
    table.close()
    if not len(table.group):
        raise DataError(describe(f"source {source}", f"no good rows, {rejects.count} rejected", "a training set needs a pair"))
    for name, values in table.arrays().items():
        np.save(directory / f"{name}.npy", values)
    return {
        "languages": list(table.languages.numbers),
        "rows": len(table.group),
        "groups": table.groups.count,
        "passages": table.passages.writer.count,
        "passage_ids_with_a_known_text": table.passages.same_text,
    }


def _numpy(values: array) -> np.ndarray:
    return np.frombuffer(values, np.dtype(f"i{values.itemsize}")) if len(values) else np.empty(0, f"i{values.itemsize}")


def _reordered(held: np.ndarray, values: np.ndarray, order: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lists of `held` values each, one after another, in another order: their offsets [R + 1] and the values."""
    starts = np.concatenate([[0], np.cumsum(held, dtype=np.int64)])[:-1][order]
    offsets = np.concatenate([[0], np.cumsum(held[order], dtype=np.int64)])
    return offsets, values[np.arange(len(values)) + np.repeat(starts - offsets[:-1], held[order])]


def families(group: np.ndarray, passage: np.ndarray, passages: int) -> tuple[np.ndarray, np.ndarray]:
    """Family of each row [R] and passage [P]: connected components of rows tied by a parallel group or a passage.

    Two rows of different families can be each other's negatives without doubt. A passage that is nobody's positive is
    a family of its own.
    """
    groups = int(group.max()) + 1
    edges = coo_matrix((np.ones(len(group), np.int8), (group, groups + passage)), shape=(groups + passages,) * 2)
    _, label = connected_components(edges, directed=False)
    return label[group].astype(np.int64), label[groups:].astype(np.int64)


# -------------------------------------------------------------------------------------------------------- retrieval


def _fill_retrieval(records: Iterable[Record], directory: Path, source: dict[str, Any], rejects: Rejects) -> dict[str, Any]:
    corpus = TextWriter(directory / "corpus.arrow", ("id", "lang", "text"))
    queries = TextWriter(directory / "queries.arrow", ("id", "lang", "text", "group"))
    numbers = {"query": Numbers(), "passage": Numbers()}
    languages = _Codes()
    judgments: list[Judgment] = []
    for record in records:
        if isinstance(record, Bad):
            rejects.add(record)
        elif isinstance(record, Judgment):
            judgments.append(record)
        elif isinstance(record, Pair):
            rule = "a retrieval source yields passages, queries and judgments"
            raise DataError(describe(record.where, "a training pair", rule))
        else:
            kind, key = "query" if isinstance(record, Query) else "passage", key_of(record.id)
            if numbers[kind].get(key) is not None:
                rejects.add(Bad(record.where, describe(f"{record.where}: _id", record.id, f"duplicate {kind} id")))
            elif bad := _bad_id(record.where, "_id", record.id):
                rejects.add(bad)
            elif isinstance(record, Query):
                languages(record.lang)
                numbers[kind].setdefault(key, queries.append(record.id, record.lang, record.text, record.group))
            else:
                languages(record.lang)
                numbers[kind].setdefault(key, corpus.append(record.id, record.lang, record.text))
    corpus.close()
    queries.close()
    qrels = _judgment_array(judgments, numbers, rejects)
    for what, count in (("passages", corpus.count), ("queries", queries.count), ("judgments", len(qrels))):
        if count == 0:
            raise DataError(describe(f"source {source}", f"no good {what}", f"a retrieval set needs {what}"))
    np.save(directory / "qrels.npy", qrels)
    return {
        "languages": list(languages.numbers),
        "passages": corpus.count,
        "queries": queries.count,
        "judgments": len(qrels),
        "queries_without_relevant": queries.count - len(np.unique(qrels[qrels[:, 2] > 0, 0])),
    }


def _judgment_array(judgments: list[Judgment], numbers: Mapping[str, Numbers], rejects: Rejects) -> np.ndarray:
    """[J, 3] int64: query, passage, score; sorted by query, then passage."""
    rows: dict[tuple[int, int], int] = {}
    for judgment in judgments:
        query, passage = (
            numbers[kind].get(key_of(name)) for kind, name in (("query", judgment.query), ("passage", judgment.passage))
        )
        if query is None or passage is None:
            kind, name = ("query", judgment.query) if query is None else ("passage", judgment.passage)
            rule = f"the qrels name a {kind} that {'the queries do' if kind == 'query' else 'the corpus does'} not hold"
            rejects.add(Bad(judgment.where, describe(judgment.where, name, rule)))
        elif (query, passage) in rows:
            found = (judgment.query, judgment.passage)
            rejects.add(Bad(judgment.where, describe(judgment.where, found, "this query and passage are judged twice")))
        else:
            rows[query, passage] = judgment.score
    return np.asarray(sorted((q, p, s) for (q, p), s in rows.items()), np.int64).reshape(-1, 3)

"""Records -> a prepared directory, checked together and written whole or not at all.

Checked: duplicate ids, two texts under one passage id, judgments that name no query. What is done with oddities of published
sets is stated in RULES, counted in the manifest and said in its `notes`. Memory grows with the number of ids, not
with their texts: 200 to 300 bytes a training row (`numbers`). Knows no source and no tokenizer.
"""

import itertools
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from hybrid_scale.data.folder import Facts, Rejects, TextWriter, finish, new_directory
from hybrid_scale.data.numbers import Numbers, Places, key_of
from hybrid_scale.data.records import Bad, Judgment, Note, Pair, Passage, Query, Record
from hybrid_scale.errors import DataError, describe
from hybrid_scale.languages import known_code, refusal


def write(
    records: Iterable[Record],
    directory: Path,
    source: dict[str, Any],
    rejects: Rejects | None = None,
    facts: Facts | None = None,
) -> dict[str, Any]:
    """`write_pairs` or `write_retrieval`, whichever the first good record asks for. `facts`: see `folder.Facts`."""
    records = iter(records)
    head: list[Record] = []
    for record in records:
        head.append(record)
        if not isinstance(record, Bad | Note):
            break
    training = not head or isinstance(head[-1], Pair | Bad | Note)
    return (write_pairs if training else write_retrieval)(itertools.chain(head, records), directory, source, rejects, facts)


def write_pairs(
    records: Iterable[Record],
    directory: Path,
    source: dict[str, Any],
    rejects: Rejects | None = None,
    facts: Facts | None = None,
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
    facts: Facts | None = None,
) -> dict[str, Any]:
    """Check a corpus, its queries and judgments (in any order) and write them; returns the manifest.

    Kept and counted in the manifest, as BEIR and mteb do, and said in its `notes`: judgments of a passage that the corpus lacks
    (`judgments_of_missing_passages`: never found, but relevant), empty passages (`empty_passages`), and second copies of a
    passage, query or judgment, which are left out (`copies_left_out`). Queries without a positive judgment are kept and counted
    (`queries_without_relevant`); metrics say what they do with them.
    Raises DataError: an id twice with another text, a judgment that names an unknown query, a pair judged with two scores, no
    passages / queries, no judgment of a passage in the corpus, a Bad row without a reject file, `directory` not empty.
    A failed write leaves nothing behind.
    """
    with new_directory(directory) as beside, rejects or Rejects() as refused:
        return finish(beside, "retrieval", source, refused, _fill_retrieval(records, beside, source, refused), facts)


class _Codes:
    """Text -> consecutive numbers, in order of first appearance. For few texts (the sources of a mix)."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}

    def __call__(self, text: str) -> int:
        return self.numbers.setdefault(text, len(self.numbers))


class _Languages:
    """Codes of languages (`hybrid_scale.languages`) -> consecutive numbers, in order of first appearance."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}
        self.spellings: dict[str, Counter[str]] = {}
        """Code -> spelling -> texts."""

    def refusal(self, where: str, **fields: str) -> Bad | None:
        """What is wrong with a row whose `fields` name languages; nothing is kept of them yet."""
        for key, spelling in fields.items():
            if known_code(spelling) is None:
                return Bad(where, refusal(f"{where}: {key}", spelling))
        return None

    def code(self, spelling: str) -> str:
        """The code of one text's language, counted."""
        code = known_code(spelling)
        assert code is not None, "`refusal` comes first"
        self.numbers.setdefault(code, len(self.numbers))
        self.spellings.setdefault(code, Counter())[spelling] += 1
        return code

    def number(self, spelling: str) -> int:
        """As `code`, but its number."""
        return self.numbers[self.code(spelling)]

    def facts(self) -> dict[str, Any]:
        """For the manifest: the codes, and of those that the data spell otherwise the spellings."""
        other = {code: dict(found) for code, found in self.spellings.items() if list(found) != [code]}
        return {"languages": list(self.numbers)} | ({"language_codes": other} if other else {})


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
        self.by_pid, self.by_text, self.titled = Numbers(), Numbers(), Numbers()
        self.places = Places()
        """Of the row that a passage's text was first seen in."""
        self.same_text = 0

    def refusal(self, where: str, named: Sequence[tuple[str, str]], body: str) -> Bad | None:
        """What is wrong with the (pid, text) of a row, the first one's text being title + space + `body` where that isn't
        empty; nothing is kept of them yet."""
        here: dict[str, str] = {}
        for number, (pid, text) in enumerate(named):
            known = self.by_pid.get(key_of(pid))
            if here.setdefault(pid, text) != text or (known is not None and known != self.by_text.get(key_of(text))):
                why = self._why(pid, body if number == 0 else None, known)
                return Bad(where, describe(f"{where}: pid", pid, why, "Give each its own pid."))
            if bad := _bad_id(where, "pid", pid):
                return bad
        return None

    def _why(self, pid: str, body: str | None, known: int | None) -> str:
        """`body` None: it isn't known what of the text is a title."""
        if known is None:
            return "this pid names two texts in one row"
        if body and self.titled.get(key_of(f"{pid}\0{body}")) is not None:
            return f"this pid already names the same passage under another title: see {self.places[known]}"
        other = "another title or text" if body is None else "another text"
        return f"this pid already names a passage with {other}: see {self.places[known]}"

    def number(self, pid: str, lang: str, text: str, where: str, body: str = "") -> int:
        """The passage of a pid, which is written where its text is new. `body`: the text without its title, if it has one."""
        key = key_of(pid)
        if body:
            self.titled.setdefault(key_of(f"{pid}\0{body}"), 0)
        known = self.by_pid.get(key)
        if known is not None:
            return known
        number = self.by_text.setdefault(key_of(text), self.writer.count)
        if number == self.writer.count:
            self.writer.append(pid, lang, text)
            self.places.append(where)
        else:
            self.same_text += 1
        return self.by_pid.setdefault(key, number)


class _PairTable:
    """The rows of a training set, a number at a time."""

    def __init__(self, directory: Path):
        self.queries = TextWriter(directory / "queries.arrow", ("id", "text"))
        self.passages = _PassageTable(TextWriter(directory / "passages.arrow", ("id", "lang", "text")))
        self.ids, self.groups, self.places, self.languages = Numbers(), Numbers(), Places(), _Languages()
        self.group, self.passage, self.negatives = array("q"), array("q"), array("q")
        self.query_lang, self.passage_lang, self.cross_only = array("h"), array("h"), array("b")
        self.held = array("i")
        """Hard negatives of each row."""
        self.sources, self.source = _Codes(), array("h")

    def refusal(self, pair: Pair) -> Bad | None:
        first = self.ids.get(key_of(pair.id))
        if first is not None:
            return Bad(pair.where, describe(f"{pair.where}: id", pair.id, f"duplicate id, first at {self.places[first]}"))
        if bad := _bad_id(pair.where, "id", pair.id):
            return bad
        if bad := self.languages.refusal(pair.where, query_lang=pair.query_lang, passage_lang=pair.passage_lang):
            return bad
        return self.passages.refusal(pair.where, [(pair.pid, pair.passage), *pair.negatives], pair.body)

    def append(self, pair: Pair) -> None:
        self.query_lang.append(self.languages.number(pair.query_lang))
        passage_lang = self.languages.code(pair.passage_lang)
        self.ids.setdefault(key_of(pair.id), self.queries.append(pair.id, pair.query))
        self.places.append(pair.where)
        self.group.append(self.groups.setdefault(key_of(pair.group), self.groups.count))
        self.passage.append(self.passages.number(pair.pid, passage_lang, pair.passage, pair.where, pair.body))
        self.passage_lang.append(self.languages.numbers[passage_lang])
        self.cross_only.append(pair.cross_only)
        self.held.append(len(pair.negatives))
        self.source.append(self.sources(pair.source))
        self.negatives.extend(self.passages.number(pid, passage_lang, text, pair.where) for pid, text in pair.negatives)

    @property
    def named(self) -> bool:
        """Whether rows say which source of a mix they come from."""
        return any(self.sources.numbers)

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
        named = {"source": _numpy(self.source)[order]} if self.named else {}
        return {
            **named,
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
    notes: list[str] = []
    for record in records:
        if isinstance(record, Note):
            notes.append(record.message)
            continue
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
        **table.languages.facts(),
        "rows": len(table.group),
        "groups": table.groups.count,
        "passages": table.passages.writer.count,
        "passage_ids_with_a_known_text": table.passages.same_text,
        **({"source_names": list(table.sources.numbers)} if table.named else {}),
        "notes": notes,
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


RULES = {
    "judgments_of_missing_passages": (
        "a judged passage that the corpus lacks counts as relevant and is never found, as in BEIR and mteb; judgments"
    ),
    "empty_passages": "a passage with neither title nor text is kept and ranked, as in BEIR and mteb; passages",
    "copies_left_out": "a row that stands there again (a text under its id, a judgment with its score) is kept once; copies",
}
"""What is done with oddities of published sets, by the manifest's key for their number."""


class _RetrievalTables:
    """Corpus and queries, a row at a time, and how many rows are odd."""

    def __init__(self, directory: Path):
        columns = ("id", "lang", "text")
        self.corpus = TextWriter(directory / "corpus.arrow", columns)
        self.queries = TextWriter(directory / "queries.arrow", (*columns, "group"))
        self.numbers = {"passage": Numbers(), "query": Numbers()}
        self.contents = {"passage": array("Q"), "query": array("Q")}
        """64 bits of each row's digest: they tell a second copy of a row from another row under the same id."""
        self.languages = _Languages()
        self.odd = dict.fromkeys(RULES, 0)

    def append(self, record: Passage | Query) -> Bad | None:
        """What is wrong with the row, which isn't kept then. A copy of a row that is there is left out and counted."""
        kind = "query" if isinstance(record, Query) else "passage"
        if bad := self.languages.refusal(record.where, lang=record.lang):
            return bad
        key, content = key_of(record.id), key_of(f"{known_code(record.lang)}\0{record.text}")[0]
        first = self.numbers[kind].get(key)
        if first is not None:
            if self.contents[kind][first] != content:
                rule = f"this {kind} id already names another text"
                return Bad(record.where, describe(f"{record.where}: _id", record.id, rule, "Keep one of the two."))
            self.odd["copies_left_out"] += 1
            return None
        if bad := _bad_id(record.where, "_id", record.id):
            return bad
        lang = self.languages.code(record.lang)
        if isinstance(record, Query):
            number = self.queries.append(record.id, lang, record.text, record.group)
        else:
            number = self.corpus.append(record.id, lang, record.text)
            self.odd["empty_passages"] += not record.text
        self.numbers[kind].setdefault(key, number)
        self.contents[kind].append(content)
        return None

    def close(self) -> None:
        self.corpus.close()
        self.queries.close()


def _fill_retrieval(records: Iterable[Record], directory: Path, source: dict[str, Any], rejects: Rejects) -> dict[str, Any]:
    tables = _RetrievalTables(directory)
    judgments: list[Judgment] = []
    notes: list[str] = []
    for record in records:
        if isinstance(record, Bad):
            rejects.add(record)
        elif isinstance(record, Note):
            notes.append(record.message)
        elif isinstance(record, Judgment):
            judgments.append(record)
        elif isinstance(record, Pair):
            rule = "a retrieval source yields passages, queries and judgments"
            raise DataError(describe(record.where, "a training pair", rule))
        elif bad := tables.append(record):
            rejects.add(bad)
    tables.close()
    qrels, missing, missing_ids = _judgment_arrays(judgments, tables.numbers, rejects, tables.odd)
    tables.odd["judgments_of_missing_passages"] = len(missing)
    for what, count in (("passages", tables.corpus.count), ("queries", tables.queries.count), ("judgments", len(qrels))):
        if count == 0:
            found = f"no good {what}"
            if what == "judgments" and len(missing):
                found += f", {len(missing)} of passages that the corpus lacks, such as '{missing_ids[0]}'"
            raise DataError(describe(f"source {source}", found, f"a retrieval set needs {what}"))
    np.save(directory / "qrels.npy", qrels)
    if len(missing):
        _write_missing(directory, missing, missing_ids)
    odd = {name: count for name, count in tables.odd.items() if count}
    relevant = np.concatenate([qrels[qrels[:, 2] > 0, 0], missing[missing[:, 1] > 0, 0]])
    return {
        **tables.languages.facts(),
        "passages": tables.corpus.count,
        "queries": tables.queries.count,
        "judgments": len(qrels) + len(missing),
        "queries_without_relevant": tables.queries.count - len(np.unique(relevant)),
        **odd,
        "notes": notes + [f"{RULES[name]}: {count:,}" for name, count in odd.items()],
    }


def _judgment_arrays(
    judgments: list[Judgment], numbers: Mapping[str, Numbers], rejects: Rejects, odd: dict[str, int]
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Query, passage, score [J, 3] int64, sorted by query, then passage; and query, score [M, 2] with the ids [M] of passages
    that the corpus lacks, sorted by query, then id."""
    rows: dict[tuple[int, int | str], int] = {}
    for judgment in judgments:
        query, passage = (
            numbers[kind].get(key_of(name)) for kind, name in (("query", judgment.query), ("passage", judgment.passage))
        )
        pair = (query, judgment.passage if passage is None else passage)
        if query is None:
            rule = "the qrels name a query that the queries do not hold"
            rejects.add(Bad(judgment.where, describe(judgment.where, judgment.query, rule)))
        elif pair in rows and rows[query, pair[1]] != judgment.score:
            found = (judgment.query, judgment.passage)
            rule = "this query and passage are judged twice, with two scores"
            rejects.add(Bad(judgment.where, describe(judgment.where, found, rule, "Keep one of the two.")))
        elif pair in rows:
            odd["copies_left_out"] += 1
        else:
            rows[query, pair[1]] = judgment.score
    here = sorted((query, passage, score) for (query, passage), score in rows.items() if isinstance(passage, int))
    missing = sorted((query, name, score) for (query, name), score in rows.items() if isinstance(name, str))
    pairs = np.asarray([(query, score) for query, _, score in missing], np.int64).reshape(-1, 2)
    return np.asarray(here, np.int64).reshape(-1, 3), pairs, [name for _, name, _ in missing]


def _write_missing(directory: Path, missing: np.ndarray, ids: Sequence[str]) -> None:
    """What `prepared.RetrievalSet.missing` opens."""
    np.save(directory / "missing.npy", missing)
    names = TextWriter(directory / "missing.arrow", ("id",))
    for name in ids:
        names.append(name)
    names.close()

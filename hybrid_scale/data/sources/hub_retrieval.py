"""Retrieval sets as they are published on the Hub: which configs, splits and columns hold corpus, queries and judgments.

    mteb                      configs corpus, queries (or query), default or qrels; in parts or languages en-corpus, en-queries,
                              en-qrels (or corpus-en, ...); a config's only split is taken, whatever its name
    BeIR                      configs corpus and queries, or files corpus.jsonl and queries.jsonl; judgments in a data set of
                              their own (`qrels`) or in qrels/SPLIT.tsv
    sentence-transformers     configs corpus, queries, relevance (lists of ids); qrels without a score; splits by subset
    one config a set          splits corpus, queries, qrels
    MIRACL, Cohere            corpus and queries in two data sets; a query's row holds its judged passages
A passage is title + space + text. Knows no set by name.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from hybrid_scale.data.records import Bad, Judgment, Note, Passage, Query, Record
from hybrid_scale.data.sources.common import Languages, LeftOut, Row, converted
from hybrid_scale.data.sources.hub_data import HubData
from hybrid_scale.errors import DataError, describe

CONFIGS = {"corpus": ("corpus",), "queries": ("query", "queries"), "qrels": ("default", "qrels", "relevance")}
"""Table -> the configs that may hold it, the first that is there; as mteb's loader does."""
PASSAGE_ID = ("_id", "id", "docid", "doc_id", "corpus-id", "corpus_id", "pid")
QUERY_ID = ("_id", "id", "query_id", "query-id", "qid")
JUDGED_QUERY = ("query-id", "query_id", "qid", "_id", "id")
JUDGED_PASSAGE = ("corpus-id", "corpus_id", "docid", "doc_id", "passage_id", "pid")
SCORE = ("score", "relevance", "label")
PASSAGE_TEXT, QUERY_TEXT = ("text", "passage", "contents"), ("text", "query", "question")
LISTS = (("positive-corpus-ids", 1), ("positive_corpus_ids", 1), ("positive_passages", 1), ("negative_passages", 0))
"""Fields of a query's row that list passages, and their score."""


@dataclass(frozen=True)
class Table:
    """Where the rows of one kind are."""

    data: HubData
    config: str
    split: str

    def rows(self) -> Iterator[Row | Bad]:
        return self.data.rows(self.config, self.split)

    def note(self, asked: str) -> Iterator[Note]:
        """A note where the judgments are of another split than asked for."""
        if self.split not in (asked, "qrels"):
            where = f"hub:{self.data.path}:{self.config}"
            yield Note(where, f"{where} has no split '{asked}': its only split '{self.split}' was taken")


@dataclass(frozen=True)
class Tables:
    """A retrieval set: its data set, and others where queries or judgments lie elsewhere. `prefix`: the part or language."""

    corpus: HubData
    queries: HubData | None
    qrels: HubData | None
    prefix: str
    split: str

    def read(self, wanted: Languages, lang: str, code: str = "") -> Iterator[Record]:
        """Records of the set; only judged queries. lang: of rows that name none; code: put before every id, with a colon."""
        before = f"{code}:" if code else ""
        judged_by = self._judgments()
        judgments = list(converted(judged_by.rows(), lambda row: judgments_of(row, before)))
        judged = {record.query for record in judgments if isinstance(record, Judgment)}
        left_out = LeftOut()
        corpus, queries = self.find("corpus"), self.find("queries")
        yield from judged_by.note(self.split)
        yield from converted(corpus.rows(), lambda row: left_out.unless_wanted(passage(row, lang, before), wanted))
        for record in converted(queries.rows(), lambda row: left_out.unless_wanted(query(row, lang, before), wanted)):
            if not isinstance(record, Query) or record.id in judged:
                yield record
        yield from (record for record in judgments if not left_out.concerns(record))

    def find(self, kind: str) -> Table:
        """Where the corpus or the queries are. Raises DataError with the configs that are there."""
        other = self.queries if kind == "queries" else None
        data, alone = other or self.corpus, other is not None or (kind == "corpus" and self.queries is not None)
        table = locate(data, kind, self.prefix, self.split, alone) or self._file(data, f"{kind}.jsonl*")
        if table is None:
            raise DataError(_nothing(data, kind, self.prefix))
        return table

    def _judgments(self) -> Table:
        """Where the judgments are: a config, a file qrels/SPLIT.tsv, or the rows of the queries themselves."""
        if self.queries is None or self.qrels is not None:  # the corpus' config default may hold the judgments
            table = locate(self.qrels or self.corpus, "qrels", self.prefix, self.split, self.qrels is not None)
            if table is not None:
                return table
        if self.qrels is None and self.queries is None:
            beside = self._file(self.corpus, f"qrels/{self.split}.tsv")
            if beside is not None:
                return beside
        queries = self.find("queries")
        first = next((row for row in queries.rows() if isinstance(row, Row)), None)
        if self.qrels is not None or first is None or not any(key in first.values for key, _ in LISTS):
            raise DataError(_nothing(self.qrels or self.corpus, "qrels", self.prefix))
        return queries

    def _file(self, data: HubData, name: str) -> Table | None:
        """A file of a data set in BEIR's layout, None where it has none."""
        if self.prefix:
            return None
        file = HubData(data.path, data.columns, data.revision, name, strict=False)
        try:
            file.split_of("", self.split)
        except DataError:
            return None
        return Table(file, "", self.split)


def _nothing(data: HubData, kind: str, prefix: str) -> DataError:
    wanted = f"{prefix}-{kind}" if prefix else " or ".join(CONFIGS[kind])
    remedy = f"Known: {', '.join(data.configs())}. Name a part as --option config=NAME, "
    remedy += "another data set as --option queries=ID or qrels=ID, or read a folder in BEIR's layout by the source beir."
    return DataError(describe(f"hub:{data.path}", f"no config {wanted}", f"a retrieval set needs its {kind}", remedy))


def locate(data: HubData, kind: str, prefix: str, split: str, alone: bool) -> Table | None:
    """The table of a kind in a data set, None where it has none. alone: the data set holds no other kind."""
    there = data.configs()
    names = [pattern for name in CONFIGS[kind] for pattern in _spelled(name, prefix)] if prefix else list(CONFIGS[kind])
    splits = (split, kind) if kind == "qrels" else (kind, split)
    for config in names:
        if config in there:
            return Table(data, config, data.split_of(config, *splits))
    single = prefix if prefix in there else there[0] if len(there) == 1 and not prefix else None
    if single is not None and (alone or kind in data.splits(single)):
        return Table(data, single, data.split_of(single, *(splits if alone else (kind,))))
    return None


def _spelled(name: str, prefix: str) -> list[str]:
    return [f"{prefix}-{name}", f"{name}-{prefix}", f"{prefix}_{name}", f"{name}_{prefix}"]


def parts(data: HubData) -> list[str]:
    """Prefixes (or endings) of the configs of a set in parts or languages, such as en of en-corpus; none for a whole set."""
    names = data.configs()
    return sorted(
        {
            part
            for name in names
            for part in (name.removesuffix("-corpus"), name.removeprefix("corpus-"))
            if part not in (name, "corpus")
        }
    )


# ------------------------------------------------------------------------------------------------------------- converters


def passage(row: Row, lang: str, before: str = "") -> Passage:
    """Raises BadRow."""
    text = row.titled(row.first(*PASSAGE_TEXT), may_be_empty=True)
    return Passage(row.where, before + row.text(row.first(*PASSAGE_ID)), row.text("lang", lang), text)


def query(row: Row, lang: str, before: str = "") -> Query:
    """`group` ties translations; a query without it stands alone. Raises BadRow."""
    name = before + row.text(row.first(*QUERY_ID))
    text = row.text(row.first(*QUERY_TEXT))
    return Query(row.where, name, row.text("lang", lang), text, row.text("group", name))


def judgments_of(row: Row, before: str = "") -> list[Record]:
    """The judgments of a row: one, of score 1 where it names none; or those that a query's row lists. Raises BadRow."""
    name = before + row.text(row.first(*JUDGED_QUERY))
    if not any(key in row.values for key, _ in LISTS):
        score = row.first(*SCORE)
        grade = row.integer(score) if score in row.values else 1
        return [Judgment(row.where, name, before + row.text(row.first(*JUDGED_PASSAGE)), grade)]
    return [
        Judgment(row.where, name, before + _listed_id(row, key, value), score)
        for key, score in LISTS
        for value in row.values.get(key) or ()
    ]


def _listed_id(row: Row, key: str, value: Any) -> str:
    inner = Row(f"{row.where}: {key}", value if isinstance(value, dict) else {"docid": value})
    return inner.text(inner.first(*PASSAGE_ID))

"""BEIR's folder layout (2104.08663): corpus.jsonl, queries.jsonl, qrels/<split>.tsv, each also as .gz. BEIR NQ is one of these.

Refuses to download, and to score.
"""

from collections.abc import Iterator
from pathlib import Path

from hybrid_scale.data.files import either
from hybrid_scale.data.records import Judgment, Passage, Query, Record
from hybrid_scale.data.sources.common import Languages, Row, converted, json_rows, judgment, qrels_rows


def read(
    path: Path, split: str = "test", languages: tuple[str, ...] = (), lang: str = "en", queries: str = "queries.jsonl"
) -> Iterator[Record]:
    """The whole corpus, and only those queries that the qrels of `split` name, as BEIR does.

    lang: language of rows without a field `lang`; queries: the file of queries. A passage is title + space + text.
    """
    wanted, left_out = Languages(languages), LeftOut()
    judgments = list(converted(qrels_rows(either(path / "qrels" / f"{split}.tsv")), judgment))
    judged = {record.query for record in judgments if isinstance(record, Judgment)}
    yield from converted(json_rows(either(path / "corpus.jsonl")), lambda row: left_out.unless_wanted(passage(row, lang), wanted))
    for record in converted(json_rows(either(path / queries)), lambda row: left_out.unless_wanted(query(row, lang), wanted)):
        if not isinstance(record, Query) or record.id in judged:
            yield record
    wanted.check(str(path))
    yield from (record for record in judgments if not left_out.concerns(record))


def passage(row: Row, lang: str) -> Passage:
    """Raises BadRow."""
    return Passage(row.where, row.text("_id"), row.text("lang", lang), row.titled("text", may_be_empty=True))


def query(row: Row, lang: str) -> Query:
    """`group` ties translations; a query without it stands alone. Raises BadRow."""
    name = row.text("_id")
    return Query(row.where, name, row.text("lang", lang), row.text("text"), row.text("group", name))


class LeftOut:
    """Ids left out for their language, so that their judgments are left out too instead of being errors."""

    def __init__(self) -> None:
        self.ids: set[tuple[type, str]] = set()

    def unless_wanted(self, record: Passage | Query, wanted: Languages) -> Passage | Query | None:
        if wanted.keep(record.lang):
            return record
        self.ids.add((type(record), record.id))
        return None

    def concerns(self, record: Record) -> bool:
        return isinstance(record, Judgment) and ((Query, record.query) in self.ids or (Passage, record.passage) in self.ids)

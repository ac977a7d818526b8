"""BEIR's folder layout (2104.08663): corpus.jsonl, queries.jsonl, qrels/<split>.tsv, each also as .gz. BEIR NQ is one of these.

Refuses to download, and to score.
"""

from collections.abc import Iterator
from pathlib import Path

from hybrid_scale.data.files import either
from hybrid_scale.data.records import Judgment, Query, Record
from hybrid_scale.data.sources.common import Languages, LeftOut, converted, json_rows, judgment, qrels_rows
from hybrid_scale.data.sources.hub_retrieval import passage, query


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

"""Training rows in JSON Lines: one query with its positive passage, and hard negatives where there are any.

Fields: id, query, passage, query_lang; group, pid (both default to id), passage_lang (defaults to query_lang), title
(put before the passage), negatives (a list of texts or of {pid, text}). A row with `text` in place of query and passage is
a translated sentence (sources/bitext.py), so that one training set may hold both.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hybrid_scale.data.records import Pair, Record
from hybrid_scale.data.sources.bitext import wanted_sentence
from hybrid_scale.data.sources.common import Languages, Row, converted, json_rows


def read(paths: tuple[Path, ...], languages: tuple[str, ...] = (), lang: str = "") -> Iterator[Record]:
    """Rows of one or several files whose query and passage are both in `languages`.

    lang: language of rows without `query_lang`.
    """
    wanted = Languages(languages)
    for path in paths:
        yield from converted(json_rows(path), lambda row: wanted_pair(row, wanted, lang))
    wanted.check(", ".join(map(str, paths)))


def wanted_pair(row: Row, wanted: Languages, lang: str = "") -> Pair | None:
    """The row as a Pair, None where its languages aren't wanted. Raises BadRow."""
    if "text" in row.values and "query" not in row.values:
        return wanted_sentence(row, wanted)
    query_lang = row.text("query_lang", lang or None)
    passage_lang = row.text("passage_lang", query_lang)
    if not wanted.keep(query_lang, passage_lang):
        return None
    name = row.text("id")
    return Pair(
        where=row.where,
        id=name,
        group=row.text("group", name),
        pid=row.text("pid", name),
        query_lang=query_lang,
        passage_lang=passage_lang,
        query=row.text("query"),
        passage=row.titled("passage"),
        negatives=_negatives(row),
        body="" if row.blank("title") or row.blank("passage") else row.text("passage"),
    )


def _negatives(row: Row) -> tuple[tuple[str, str], ...]:
    values = row.values.get("negatives") or []
    if not isinstance(values, list):
        raise row.bad("negatives", "must be a list of texts or of objects with pid and text")
    return tuple(_negative(Row(f"{row.where}: negatives[{number}]", _as_object(value))) for number, value in enumerate(values))


def _as_object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {"text": value}


def _negative(row: Row) -> tuple[str, str]:
    text = row.titled("text")
    # Equal texts must share a pid whichever row they stand in, else one passage would be written twice.
    return row.text("pid", "text:" + hashlib.blake2b(text.encode(), digest_size=12).hexdigest()), text

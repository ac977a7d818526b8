"""Training rows in JSON Lines: one query with its positive passage, and hard negatives where there are any.

Fields: id, query, passage, query_lang; group, pid (both default to id), passage_lang (defaults to query_lang), title
(put before the passage, as in BEIR), negatives (a list of texts or of {pid, title, text}), split (see `read`). A row with `text`
in place of query and passage is a translated sentence (sources/bitext.py), so that one training set may hold both. Rows of other
projects (sources/row_layouts.py) are read as well.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hybrid_scale.data.records import Pair, Record
from hybrid_scale.data.sources.bitext import wanted_sentence
from hybrid_scale.data.sources.common import Languages, Row, Splits, converted, json_rows
from hybrid_scale.data.sources.row_layouts import text_id, training_rows


def read(paths: tuple[Path, ...], languages: tuple[str, ...] = (), lang: str = "", split: str = "") -> Iterator[Record]:
    """Rows of one or several files whose query and passage are both in `languages`.

    lang: language of rows without `query_lang`. split: take the rows whose field `split` says so; without it all are taken, and
    a note says which splits the rows name.
    """
    wanted, splits = Languages(languages), Splits(split)
    for path in paths:
        rows = splits.kept(json_rows(path))
        yield from converted(rows, lambda row: wanted_pairs(row, wanted, lang))
    named = ", ".join(map(str, paths))
    yield from splits.check(named)
    wanted.check(named)


def wanted_pairs(row: Row, wanted: Languages, lang: str = "") -> list[Pair]:
    """The row's pairs, none where its languages aren't wanted. Raises BadRow."""
    if "text" in row.values and "query" not in row.values:
        sentence = wanted_sentence(row, wanted)
        return [] if sentence is None else [sentence]
    return [pair for one in training_rows(row) if (pair := _pair(one, wanted, lang)) is not None]


def _pair(row: Row, wanted: Languages, lang: str) -> Pair | None:
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
    return row.text("pid", text_id(text)), text

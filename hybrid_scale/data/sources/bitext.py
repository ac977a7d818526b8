"""Translated sentences: rows {id, group, lang, text}; sentences of one group translate each other.

Raw material of cross pairs only: a sentence paired with its own copy teaches nothing, so rows are marked `cross_only`.
"""

from collections.abc import Iterator
from pathlib import Path

from hybrid_scale.data.records import Pair, Record
from hybrid_scale.data.sources.common import Languages, Row, Splits, converted, json_rows


def read(paths: tuple[Path, ...], languages: tuple[str, ...] = (), split: str = "") -> Iterator[Record]:
    """Sentences of one or several JSON Lines files in `languages`; query and passage of a row are the same sentence.

    split: as in `pairs.read`.
    """
    wanted, splits = Languages(languages), Splits(split)
    for path in paths:
        yield from converted(splits.kept(json_rows(path)), lambda row: wanted_sentence(row, wanted))
    named = ", ".join(map(str, paths))
    yield from splits.check(named)
    wanted.check(named)


def wanted_sentence(row: Row, wanted: Languages) -> Pair | None:
    """The row as a Pair of the sentence with itself, None where its language isn't wanted. Raises BadRow."""
    lang = row.text("lang")
    if not wanted.keep(lang):
        return None
    name, text = row.text("id"), row.text("text")
    return Pair(row.where, name, row.text("group"), name, lang, lang, text, text, cross_only=True)

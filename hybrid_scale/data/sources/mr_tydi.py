"""Mr. TyDi v1.1 (2108.08787): per language a corpus, topics and judgments; monolingual, 11 languages, split `test`.

Reads its own layout, anywhere below a folder: `mrtydi-v1.1-<language>/` with `topic.<split>.tsv`, `qrels.<split>.txt` (TREC) and
`collection/docs.jsonl(.gz)`, whose `contents` are title, empty line, text. Or mteb's copy on the Hub (`mteb/mrtidy`).
Published measures are MRR@100 and recall@100. Ids become `lang:id`.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from hybrid_scale.data.files import either
from hybrid_scale.data.records import Passage, Query, Record
from hybrid_scale.data.sources import hub_languages
from hybrid_scale.data.sources.common import Row, converted, json_rows, judgment, require_languages, trec_rows, tsv_rows
from hybrid_scale.data.sources.hub_data import is_copy
from hybrid_scale.errors import DataError, describe

HUB = "mteb/mrtidy"
NAMES = {
    **{"ar": "arabic", "bn": "bengali", "en": "english", "fi": "finnish", "id": "indonesian", "ja": "japanese"},
    **{"ko": "korean", "ru": "russian", "sw": "swahili", "te": "telugu", "th": "thai"},
}


def read(path: str = HUB, languages: tuple[str, ...] = (), split: str = "test", revision: str = "") -> Iterator[Record]:
    """Passages (title + space + text), topics and judgments of `languages`, all when left out."""
    chosen = require_languages("Mr. TyDi", languages, NAMES)
    if not Path(path).is_dir() or is_copy(path):
        yield from hub_languages.read(path, {code: NAMES[code] for code in chosen}, split, revision)
        return
    folders = {code: next(Path(path).rglob(f"mrtydi-v1.1-{name}"), None) for code, name in NAMES.items()}
    found = {code: folder for code, folder in folders.items() if folder is not None}
    if not found:
        raise DataError(describe(path, "no mrtydi-v1.1-<language> folder", "Mr. TyDi's own layout is needed", "Check the path."))
    for code in require_languages(path, languages, found):
        yield from _language(code, found[code], split)


def _language(code: str, folder: Path, split: str) -> Iterator[Record]:
    yield from converted(json_rows(either(folder / "collection" / "docs.jsonl")), partial(_passage, lang=code))
    topics = tsv_rows(either(folder / f"topic.{split}.tsv"), ("_id", "text"))
    yield from converted(topics, partial(_query, lang=code))
    yield from converted(trec_rows(either(folder / f"qrels.{split}.txt")), partial(judgment, prefix=f"{code}:"))


def _passage(row: Row, lang: str) -> Passage:
    title, _, text = row.titled("contents", may_be_empty=True).partition("\n\n")
    joined = " ".join(part.strip() for part in (title, text) if part.strip())
    return Passage(row.where, f"{lang}:{row.text('id')}", lang, joined)


def _query(row: Row, lang: str) -> Query:
    """A query stands alone: topics of different languages aren't parallel."""
    name = f"{lang}:{row.text('_id')}"
    return Query(row.where, name, lang, row.text("text"), name)

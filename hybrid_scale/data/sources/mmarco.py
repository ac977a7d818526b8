"""mMARCO (2108.13897), a local copy of the Hub repository unicamp-dl/mmarco: MS MARCO's training queries in 14 languages.

Reads `data/google/collections/<language>_collection.tsv`, `data/google/queries/train/<language>_queries.train.tsv` and
`data/triples.train.ids.small.tsv` (query, positive, negative). The translations share MS MARCO's ids, so a query id is a
parallel group. Refuses to download, and to read the dev split.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from hybrid_scale.data.records import Bad, Pair, Record, either
from hybrid_scale.data.sources.common import Row, require_languages, tsv_rows
from hybrid_scale.errors import describe

NAMES = {
    "ar": "arabic",
    "de": "german",
    "en": "english",
    "es": "spanish",
    "fr": "french",
    "hi": "hindi",
    "id": "indonesian",
    "it": "italian",
    "ja": "japanese",
    "nl": "dutch",
    "pt": "portuguese",
    "ru": "russian",
    "vi": "vietnamese",
    "zh": "chinese",
}


@dataclass(slots=True)
class _Example:
    """A query with one positive, and the first of its negatives."""

    where: str
    query: str
    positive: str
    negatives: list[str] = field(default_factory=list)


def read(path: Path, languages: tuple[str, ...] = (), negatives: int = 1, max_queries: int = 0) -> Iterator[Record]:
    """One pair per (query, positive, language), with up to `negatives` hard negatives in the same language.

    max_queries: only the first so many queries of the triples (which are shuffled); 0: all. Memory holds the wanted
    passages of one language at a time.
    """
    folder = path / "data" / "google"
    found = [lang for lang, name in NAMES.items() if list(folder.glob(f"collections/{name}_collection.tsv*"))]
    require_languages(str(folder / "collections"), languages or tuple(NAMES) * (not found), set(found))
    examples: list[_Example] = []
    for item in _examples(either(path / "data" / "triples.train.ids.small.tsv"), negatives, max_queries):
        if isinstance(item, Bad):
            yield item
        else:
            examples.append(item)
    for lang in languages or tuple(found):
        name = NAMES[lang]
        queries = _texts(folder / "queries" / "train" / f"{name}_queries.train.tsv", {e.query for e in examples})
        wanted = {pid for e in examples for pid in (e.positive, *e.negatives)}
        passages = _texts(folder / "collections" / f"{name}_collection.tsv", wanted)
        yield from (_pair(example, lang, queries, passages) for example in examples)


def _examples(path: Path, negatives: int, max_queries: int) -> Iterator[_Example | Bad]:
    """Bad lines as they come, then every distinct (query, positive)."""
    examples: dict[tuple[str, str], _Example] = {}
    queries: set[str] = set()
    for row in tsv_rows(path, ("query", "positive", "negative")):
        if isinstance(row, Bad):
            yield row
            continue
        query, positive, negative = row.values["query"], row.values["positive"], row.values["negative"]
        if query not in queries:
            if max_queries and len(queries) == max_queries:
                continue
            queries.add(query)
        example = examples.setdefault((query, positive), _Example(row.where, query, positive))
        if len(example.negatives) < negatives and negative not in example.negatives:
            example.negatives.append(negative)
    yield from examples.values()


def _texts(path: Path, wanted: set[str]) -> dict[str, str]:
    rows = tsv_rows(either(path), ("id", "text"))
    return {row.values["id"]: row.values["text"].strip() for row in rows if isinstance(row, Row) and row.values["id"] in wanted}


def _pair(example: _Example, lang: str, queries: dict[str, str], passages: dict[str, str]) -> Record:
    where = f"{example.where}: {lang}"
    query, ids = queries.get(example.query), (example.positive, *example.negatives)
    missing = [f"query {example.query}"] * (not query) + [f"passage {pid}" for pid in ids if not passages.get(pid)]
    if not query or missing:
        return Bad(where, describe(where, missing[0], f"the {NAMES[lang]} files hold no text for it"))
    texts = [(f"{lang}:{pid}", passages[pid]) for pid in ids]
    name = f"{example.query}:{example.positive}:{lang}"
    return Pair(where, name, example.query, texts[0][0], lang, lang, query, texts[0][1], tuple(texts[1:]))

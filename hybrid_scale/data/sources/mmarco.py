"""mMARCO (2108.13897), a local copy of the Hub repository unicamp-dl/mmarco: MS MARCO's training queries in 14 languages.

Reads `data/google/collections/<language>_collection.tsv`, `data/google/queries/train/<language>_queries.train.tsv` and
`data/triples.train.ids.small.tsv` (query, positive, negative). The translations share MS MARCO's ids, so a query id is a
parallel group. Refuses to download, and to read the dev split.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from hybrid_scale.data.files import either
from hybrid_scale.data.records import Bad, Pair, Record
from hybrid_scale.data.sources.common import require_languages, tsv_rows
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
    chosen = require_languages(str(folder / "collections"), languages or tuple(NAMES) * (not found), found)
    examples: list[_Example] = []
    for item in _examples(either(path / "data" / "triples.train.ids.small.tsv"), negatives, max_queries):
        if isinstance(item, Bad):
            yield item
        else:
            examples.append(item)
    for lang in chosen:
        name = NAMES[lang]
        queries = _Texts(folder / "queries" / "train" / f"{name}_queries.train.tsv", {e.query for e in examples})
        wanted = {pid for e in examples for pid in (e.positive, *e.negatives)}
        passages = _Texts(folder / "collections" / f"{name}_collection.tsv", wanted)
        yield from (*queries.read(), *passages.read())
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


class _Texts:
    """The wanted texts of a file of lines `id TAB text`."""

    def __init__(self, path: Path, wanted: set[str]):
        self.path, self.wanted = either(path), wanted
        self.held: dict[str, tuple[str, str]] = {}
        """Id -> text and `file:line`."""

    def read(self) -> Iterator[Bad]:
        """Reads the file; yields lines that aren't such, and ids that stand twice with another text (the first is kept)."""
        for row in tsv_rows(self.path, ("id", "text")):
            if isinstance(row, Bad):
                yield row
                continue
            name, text = row.values["id"], row.values["text"].strip()
            if name in self.wanted and self.held.setdefault(name, (text, row.where))[0] != text:
                rule = f"this id already names another text, at {self.held[name][1]}"
                yield Bad(row.where, describe(f"{row.where}: id", name, rule, "Keep one of the two."))

    def get(self, name: str) -> str:
        """Empty where the file has none."""
        return self.held.get(name, ("", ""))[0]


def _pair(example: _Example, lang: str, queries: _Texts, passages: _Texts) -> Record:
    where = f"{example.where}: {lang}"
    ids = (example.positive, *example.negatives)
    if not queries.get(example.query):
        return Bad(where, describe(where, f"query {example.query}", f"{queries.path} holds no text for it"))
    missing = [pid for pid in ids if not passages.get(pid)]
    if missing:
        return Bad(where, describe(where, f"passage {missing[0]}", f"{passages.path} holds no text for it"))
    query, texts = queries.get(example.query), [(f"{lang}:{pid}", passages.get(pid)) for pid in ids]
    name = f"{example.query}:{example.positive}:{lang}"
    return Pair(where, name, example.query, texts[0][0], lang, lang, query, texts[0][1], tuple(texts[1:]))

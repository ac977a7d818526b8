"""MIRACL (2210.09984): per language a corpus, topics and judgments. Ids become `lang:id`; topics aren't parallel.

Two layouts are read:
- one folder with `<lang>.corpus.jsonl`, `<lang>.queries.jsonl`, `<lang>.qrels.tsv` (BEIR fields, each also as .gz);
- MIRACL's own, anywhere below the folder: `topics.miracl-v1.0-<lang>-<split>.tsv`, `qrels.miracl-v1.0-<lang>-<split>.tsv`
  (TREC) and `miracl-corpus-v1.0-<lang>/docs-*.jsonl.gz`.
A path that is no folder is an id of the Hub: mteb/MIRACLRetrieval, or mteb/MIRACLRetrievalHardNegatives, whose corpus holds
the 250 best passages a query of BM25 and two encoders (the source `miracl_hard` takes it by default).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

from hybrid_scale.data.files import either
from hybrid_scale.data.records import Bad, Passage, Query, Record
from hybrid_scale.data.sources import hub_languages
from hybrid_scale.data.sources.common import (
    Row,
    converted,
    json_rows,
    judgment,
    qrels_rows,
    require_languages,
    trec_rows,
    tsv_rows,
)
from hybrid_scale.data.sources.hub_data import is_copy
from hybrid_scale.errors import DataError, describe

HARD_NEGATIVES = Path("mteb/MIRACLRetrievalHardNegatives")
LANGUAGES = (*("ar", "bn", "de", "en", "es", "fa", "fi", "fr", "hi", "id", "ja", "ko", "ru", "sw", "te", "th", "yo", "zh"),)


@dataclass(frozen=True, slots=True)
class _Files:
    corpus: list[Path]
    topics: Path
    qrels: Path

    def topic_rows(self) -> Iterator[Row | Bad]:
        return tsv_rows(self.topics, ("_id", "text")) if self.topics.suffix == ".tsv" else json_rows(self.topics)

    def qrels_rows(self) -> Iterator[Row | Bad]:
        return trec_rows(self.qrels) if self.qrels.name.startswith("qrels.miracl") else qrels_rows(self.qrels)


def read(path: Path, languages: tuple[str, ...] = (), split: str = "dev") -> Iterator[Record]:
    """Passages (title + space + text), topics and judgments of every language. All files are looked for first.

    split: MIRACL's own layout and the Hub name it. Raises DataError: a language without corpus, topics or qrels.
    """
    if not path.is_dir() or is_copy(path):
        chosen = require_languages(str(path), languages, LANGUAGES)
        yield from hub_languages.read(path.as_posix(), {lang: lang for lang in chosen}, split)
        return
    files = _own_layout(path, languages, split) or _flat_layout(path, languages)
    for lang, here in files.items():
        yield from converted(chain.from_iterable(map(json_rows, here.corpus)), partial(_passage, lang=lang))
        yield from converted(here.topic_rows(), partial(_query, lang=lang))
        yield from converted(here.qrels_rows(), partial(judgment, prefix=f"{lang}:"))


def read_hard_negatives(path: Path = HARD_NEGATIVES, languages: tuple[str, ...] = (), split: str = "dev") -> Iterator[Record]:
    """The subset with hard negatives, from mteb's copy or a folder in either layout."""
    return read(path, languages, split)


def _flat_layout(path: Path, languages: tuple[str, ...]) -> dict[str, _Files]:
    known = sorted({file.name.partition(".")[0] for file in path.glob("*.queries.jsonl*")})
    if not known:
        rule = "needs <lang>.queries.jsonl or topics.miracl-v1.0-<lang>-<split>.tsv"
        raise DataError(describe(str(path), "no MIRACL topics", rule, "Check the path and the split."))
    return {
        lang: _Files(
            [_corpus(path / f"{lang}.corpus.jsonl", lang)],
            either(path / f"{lang}.queries.jsonl"),
            either(path / f"{lang}.qrels.tsv"),
        )
        for lang in require_languages(str(path), languages, known)
    }


def _corpus(path: Path, lang: str) -> Path:
    try:
        return either(path)
    except DataError:
        raise _no_corpus(path, lang) from None


def _own_layout(path: Path, languages: tuple[str, ...], split: str) -> dict[str, _Files]:
    topics = {file.name.split("-")[2]: file for file in sorted(path.rglob(f"topics.miracl-v1.0-*-{split}.tsv"))}
    if not topics:
        return {}
    files = {}
    for lang in require_languages(f"{path} ({split})", languages, topics):
        corpus = sorted(path.rglob(f"miracl-corpus-v1.0-{lang}/docs-*.jsonl*"))
        if not corpus:
            raise _no_corpus(path / f"miracl-corpus-v1.0-{lang}", lang)
        qrels = next(path.rglob(f"qrels.miracl-v1.0-{lang}-{split}.tsv"), None)
        if qrels is None:
            raise DataError(describe(str(path), f"no qrels of '{lang}'", f"qrels.miracl-v1.0-{lang}-{split}.tsv is needed"))
        files[lang] = _Files(corpus, topics[lang], qrels)
    return files


def _no_corpus(path: Path, lang: str) -> DataError:
    remedy = f"Fetch it from the Hub's miracl/miracl-corpus, or leave '{lang}' out with --languages."
    return DataError(describe(str(path), f"no corpus of '{lang}'", "MIRACL's passages are needed beside its topics", remedy))


def _passage(row: Row, lang: str) -> Passage:
    name = row.text("docid") if "docid" in row.values else row.text("_id")
    return Passage(row.where, f"{lang}:{name}", lang, row.titled("text", may_be_empty=True))


def _query(row: Row, lang: str) -> Query:
    name = f"{lang}:{row.text('_id')}"
    return Query(row.where, name, lang, row.text("text"), name)

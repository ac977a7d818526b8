"""XQuAD (1910.11856) as retrieval of whole paragraphs: a question's relevant passage is the paragraph it was asked about.

1,190 questions over 240 paragraphs, the same in 12 languages, so every question has one relevant passage in each. Prepared with
one language it is the task of mteb's XQuADRetrieval (nDCG@10); LAReQA's task, whose candidates are sentences, is `xquad_r`.
Reads the Hub's google/xquad (configs `xquad.<lang>`, split `validation`), or a folder of SQuAD files: `<lang>.json`,
`xquad.<lang>.json`, also as .gz. Knows no sentence.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hybrid_scale.data.files import json_document
from hybrid_scale.data.records import Bad, Judgment, Passage, Query, Record
from hybrid_scale.data.sources.common import BadRow, Row, require_languages
from hybrid_scale.data.sources.hub_data import HubData, is_copy
from hybrid_scale.errors import DataError, describe

HUB = "google/xquad"
LANGUAGES = ("ar", "de", "el", "en", "es", "hi", "ro", "ru", "th", "tr", "vi", "zh")


def read(path: str = HUB, languages: tuple[str, ...] = (), revision: str = "") -> Iterator[Record]:
    """Passages `lang:pNNN` by first appearance, queries `lang:<question id>`, then judgments; all languages when left out.

    Raises DataError: languages that aren't there, a file that isn't SQuAD's layout.
    """
    paragraph: dict[tuple[str, str], str] = {}
    asked: list[tuple[str, str, str]] = []
    for lang, rows in _sources(path, languages, revision).items():
        numbers: dict[str, str] = {}
        for row in rows:
            if isinstance(row, Bad):
                yield row
                continue
            try:
                context, question, name = row.text("context"), row.text("question"), row.text("id")
            except BadRow as error:
                yield error.bad
                continue
            if context not in numbers:
                numbers[context] = f"{lang}:p{len(numbers):03}"
                yield Passage(row.where, numbers[context], lang, context)
            if (lang, name) in paragraph:
                yield Bad(row.where, describe(f"{row.where}: id", name, "this question stands twice"))
                continue
            paragraph[lang, name] = numbers[context]
            asked.append((row.where, lang, name))
            yield Query(row.where, f"{lang}:{name}", lang, question, name)
    codes = dict.fromkeys(lang for _, lang, _ in asked)
    for where, lang, name in asked:
        for other in codes:
            if (other, name) in paragraph:
                yield Judgment(where, f"{lang}:{name}", paragraph[other, name], 1)


def _sources(path: str, languages: tuple[str, ...], revision: str) -> dict[str, Iterator[Row | Bad]]:
    if not Path(path).is_dir() or is_copy(path):
        data = HubData(path, revision=revision)
        return {lang: data.rows(f"xquad.{lang}", "validation") for lang in require_languages(path, languages, LANGUAGES)}
    files = sorted([*Path(path).glob("*.json"), *Path(path).glob("*.json.gz")])
    found = {code: file for file in files if (code := file.name.removeprefix("xquad.").partition(".")[0]) in LANGUAGES}
    if not found:
        raise DataError(
            describe(path, "no xquad.<lang>.json", "a folder of XQuAD's files is needed", "Or take --path google/xquad.")
        )
    return {lang: _rows(found[lang]) for lang in require_languages(path, languages, found)}


def _rows(file: Path) -> Iterator[Row | Bad]:
    """Questions with their context, as the Hub has them."""
    tree = json_document(file)
    try:
        paragraphs: list[dict[str, Any]] = [paragraph for article in tree["data"] for paragraph in article["paragraphs"]]
        pairs = [(paragraph["context"], qa) for paragraph in paragraphs for qa in paragraph["qas"]]
    except (KeyError, TypeError) as error:
        rule = "SQuAD's layout is data[].paragraphs[] with context and qas[]"
        raise DataError(describe(str(file), f"{type(error).__name__}: {error}", rule, "Fetch the file again.")) from None
    for number, (context, qa) in enumerate(pairs):
        yield Row(f"{file}: question {number}", {"context": context, **qa} if isinstance(qa, dict) else {})

"""LAReQA's JSON layout (2004.05484): SQuAD with `sentence_breaks` -> candidates, queries, judgments.

A folder holds `<lang>.json` or `<lang>.json.gz`. Candidates are all sentences of all paragraphs; questions with one id
are translations of each other; a query is judged against the answer sentences of its question in every language.
A question that a language doesn't have gets no judgment there (counted per language pair by `data.summary`).
Knows no metric and doesn't split sentences itself.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybrid_scale.data.records import Bad, Judgment, Passage, Query, Record, open_text
from hybrid_scale.data.sources.common import require_languages
from hybrid_scale.errors import DataError, describe


@dataclass(frozen=True, slots=True)
class _Paragraph:
    where: str
    id: str
    context: str
    breaks: list[tuple[int, int]]
    """[start, end) of each sentence, in characters of the context."""
    sentences: list[str]
    questions: list[dict[str, Any]]

    def sentence_of(self, start: int) -> str | None:
        """Id of the sentence that holds this character."""
        for number, (first, end) in enumerate(self.breaks):
            if first <= start < end:
                return f"{self.id}:s{number:02d}"
        return None


def read_lareqa(path: Path, languages: tuple[str, ...] = (), with_context: bool = False) -> Iterator[Record]:
    """Passages `lang:pNNNN:sNN` (paragraphs counted over the file), queries `lang:<question id>`, then judgments.

    with_context: append a line break and the paragraph to each sentence, the second input of LAReQA's own models.
    Several answers of a question: each answer's sentence is relevant. An answer that starts in no sentence makes its
    question Bad in that language. Raises DataError: no such folder or language, not LAReQA's layout.
    """
    asked: dict[tuple[str, str], str] = {}
    answers: dict[str, list[str]] = {}
    for lang, file in _files(path, languages).items():
        for paragraph in _paragraphs(lang, file):
            yield from _passages(lang, paragraph, with_context)
            for question in paragraph.questions:
                name, sentences = str(question["id"]), _answer_sentences(paragraph, question)
                if isinstance(sentences, Bad):
                    yield sentences
                    continue
                yield Query(paragraph.where, f"{lang}:{name}", lang, str(question["question"]).strip(), name)
                if (lang, name) not in asked:
                    asked[lang, name] = paragraph.where
                    answers.setdefault(name, []).extend(sentences)
    for (lang, name), where in asked.items():
        for sentence in answers[name]:
            yield Judgment(where, f"{lang}:{name}", sentence, 1)


def _files(path: Path, languages: tuple[str, ...]) -> dict[str, Path]:
    files = sorted([*path.glob("*.json"), *path.glob("*.json.gz")])
    found = {file.name.partition(".")[0]: file for file in files}
    if not found:
        raise DataError(describe(str(path), "no <lang>.json or <lang>.json.gz", "a folder of LAReQA files is needed"))
    require_languages(str(path), languages, set(found))
    return {lang: file for lang, file in found.items() if not languages or lang in languages}


def _paragraphs(lang: str, file: Path) -> Iterator[_Paragraph]:
    with open_text(file) as stream:
        try:
            tree = json.load(stream)
        except json.JSONDecodeError as error:
            raise DataError(f"{file}:{error.lineno}: not JSON: {error.msg} at column {error.colno}.") from None
    try:
        paragraphs = [paragraph for article in tree["data"] for paragraph in article["paragraphs"]]
        for number, paragraph in enumerate(paragraphs):
            breaks = [(int(start), int(end)) for start, end in paragraph["sentence_breaks"]]
            name = f"{lang}:p{number:04d}"
            sentences = _sentences(paragraph, breaks)
            yield _Paragraph(f"{file}: {name}", name, paragraph["context"].strip(), breaks, sentences, _questions(paragraph))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        remedy = "Fetch xquad-r or mlqa-r from github.com/google-research-datasets/lareqa."
        rule = "LAReQA's layout is data[].paragraphs[] with context, qas[] and sentence_breaks[]"
        raise DataError(describe(str(file), f"{type(error).__name__}: {error}", rule, remedy)) from None


def _sentences(paragraph: dict[str, Any], breaks: list[tuple[int, int]]) -> list[str]:
    """The published `sentences`; where they are missing, the context cut at its breaks.

    The two differ in one Turkish paragraph of XQuAD-R, whose breaks are two characters off its wrongly decoded context.
    """
    texts = paragraph.get("sentences") or [paragraph["context"][start:end] for start, end in breaks]
    if len(texts) != len(breaks):
        raise ValueError(f"{len(texts)} sentences but {len(breaks)} sentence_breaks")
    return [text.strip() for text in texts]


def _questions(paragraph: dict[str, Any]) -> list[dict[str, Any]]:
    """`qas`, its fields touched here so that a wrong layout fails inside `_paragraphs`."""
    return [
        {"id": qa["id"], "question": qa["question"], "starts": [int(answer["answer_start"]) for answer in qa["answers"]]}
        for qa in paragraph["qas"]
    ]


def _passages(lang: str, paragraph: _Paragraph, with_context: bool) -> Iterator[Record]:
    for number, text in enumerate(paragraph.sentences):
        name = f"{paragraph.id}:s{number:02d}"
        if not text:
            yield Bad(paragraph.where, describe(f"{paragraph.where}: sentence {number}", text, "empty text"))
        else:
            yield Passage(paragraph.where, name, lang, f"{text}\n{paragraph.context}" if with_context else text)


def _answer_sentences(paragraph: _Paragraph, question: dict[str, Any]) -> list[str] | Bad:
    where = f"{paragraph.where}: question {question['id']}"
    if not str(question["question"]).strip():
        return Bad(where, describe(where, question["question"], "empty text"))
    sentences = [paragraph.sentence_of(start) for start in question["starts"]]
    if not sentences:
        return Bad(where, describe(where, [], "a question needs an answer"))
    if None in sentences:
        start = question["starts"][sentences.index(None)]
        return Bad(where, describe(f"{where}: answer_start", start, "the answer starts in no sentence"))
    return sorted({sentence for sentence in sentences if sentence is not None})

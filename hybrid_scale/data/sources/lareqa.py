"""LAReQA's JSON layout (2004.05484): SQuAD with `sentence_breaks` -> candidates, queries, judgments.

A folder holds `<lang>.json` or `<lang>.json.gz`. Candidates are all sentences of all paragraphs; questions with one id
are translations of each other; a query is judged against the answer sentences of its question in every language.
A question that a language doesn't have gets no judgment there (counted per language pair by `data.summary`).
The files come from github.com/google-research-datasets/lareqa, or, by its id, from any repository of data sets on the Hub that
holds them as they are. The Hub's known copies of XQuAD, XQuAD-R and MLQA lack `sentence_breaks`: no candidates without them.
Knows no metric and doesn't split sentences itself.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybrid_scale.data.files import json_document
from hybrid_scale.data.records import Bad, Judgment, Passage, Query, Record
from hybrid_scale.data.sources.common import require_languages
from hybrid_scale.errors import DataError, describe

WITHOUT_BREAKS = (
    *("google/xquad", "google-research-datasets/xquad_r", "mteb/XQuADRetrieval", "SEACrowd/xquadr", "xquad", "xquad_r"),
    *("facebook/mlqa", "mteb/MLQARetrieval", "mlqa"),
)
"""Repositories of the Hub whose rows are paragraphs, questions and answers alone."""
GET = "git clone https://github.com/google-research-datasets/lareqa"
WHERE = {
    "xquad-r": f"{GET}, then --path lareqa/xquad-r. Whole paragraphs can be read from the Hub: source xquad.",
    "mlqa-r": (
        f"{GET}; its head holds XQuAD-R alone, its issue 1 names the commit with MLQA-R: git -C lareqa checkout "
        "354d67d1cd066854cdfbf5ad0e6105528976141d, then --path lareqa/mlqa-r."
    ),
}
"""Folder of LAReQA's repository -> how to get it."""
REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*")
LANGUAGE = re.compile(r"[a-z]{2,3}")


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


def read_lareqa(
    name: str, path: Path, languages: tuple[str, ...] = (), with_context: bool = False, revision: str = ""
) -> Iterator[Record]:
    """Passages `lang:pNNNN:sNN` (paragraphs counted over the file), queries `lang:<question id>`, then judgments.

    name: `xquad-r` or `mlqa-r`, the folder in LAReQA's repository. path: that folder or the one that holds it, or the id of a
    repository of the Hub with either, at `revision`. with_context: append a line break and the paragraph to each sentence, the
    second input of LAReQA's own models.
    Several answers of a question: each answer's sentence is relevant. An answer that starts in no sentence makes its
    question Bad in that language. Raises DataError: no such folder, repository or language, not LAReQA's layout.
    """
    asked: dict[tuple[str, str], str] = {}
    answers: dict[str, list[str]] = {}
    for lang, file in _files(name, path, languages, revision).items():
        for paragraph in _paragraphs(lang, file):
            yield from _passages(lang, paragraph, with_context)
            for question in paragraph.questions:
                number, sentences = str(question["id"]), _answer_sentences(paragraph, question)
                if isinstance(sentences, Bad):
                    yield sentences
                    continue
                yield Query(paragraph.where, f"{lang}:{number}", lang, str(question["question"]).strip(), number)
                if (lang, number) not in asked:
                    asked[lang, number] = paragraph.where
                    answers.setdefault(number, []).extend(sentences)
    for (lang, number), where in asked.items():
        for sentence in answers[number]:
            yield Judgment(where, f"{lang}:{number}", sentence, 1)


def _files(name: str, path: Path, languages: tuple[str, ...], revision: str) -> dict[str, Path]:
    """Language -> file."""
    folder = path if path.is_dir() else _from_hub(name, path.as_posix(), revision)
    folder = folder / name if (folder / name).is_dir() else folder
    files = sorted([*folder.glob("*.json"), *folder.glob("*.json.gz")])
    found = {code: file for file in files if LANGUAGE.fullmatch(code := file.name.partition(".")[0])}
    if not found:
        rule = "a folder of LAReQA's files is needed"
        raise DataError(describe(str(path), "no <lang>.json or <lang>.json.gz", rule, WHERE[name]))
    wanted = require_languages(str(path), languages, found)
    return {lang: file for lang, file in found.items() if lang in wanted}


def _from_hub(name: str, repository: str, revision: str) -> Path:
    """The JSON files of a repository of the Hub, as they lie in the local cache. Raises DataError: it can't be had."""
    if repository in WITHOUT_BREAKS:
        raise DataError(
            describe(repository, "no sentence_breaks", "candidates are the sentences that LAReQA published", WHERE[name])
        )
    if not REPOSITORY.fullmatch(repository):
        raise DataError(describe(repository, "no such folder", "nor is it an id of the Hub, USER/NAME", WHERE[name]))
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        wanted = ["*.json", "*.json.gz"]
        return Path(snapshot_download(repository, repo_type="dataset", revision=revision or None, allow_patterns=wanted))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        found = f"{type(error).__name__}: {error}".splitlines()[0]
        rule = "neither a folder nor a repository of data sets on the Hub that can be read"
        raise DataError(describe(repository, found, rule, WHERE[name])) from error


def _paragraphs(lang: str, file: Path) -> Iterator[_Paragraph]:
    tree = json_document(file)
    try:
        paragraphs = [paragraph for article in tree["data"] for paragraph in article["paragraphs"]]
        if not paragraphs:
            raise ValueError("no paragraph")
        for number, paragraph in enumerate(paragraphs):
            breaks = [(int(start), int(end)) for start, end in paragraph["sentence_breaks"]]
            name = f"{lang}:p{number:04d}"
            sentences = _sentences(paragraph, breaks)
            yield _Paragraph(f"{file}: {name}", name, paragraph["context"].strip(), breaks, sentences, _questions(paragraph))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        remedy = f"Fetch the files from LAReQA: {GET}"
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

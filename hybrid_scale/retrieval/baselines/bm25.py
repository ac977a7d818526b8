"""BM25 over a retrieval set, by the package bm25s: Lucene's formula with k1 = .9 and b = .4, as BEIR's published figures have it.

Tokens, by the language of the text, whatever spelling its code has (`hybrid_scale.languages`):
    first NFKC, lower case (Turkish and Azerbaijani by their own dotless i), without format characters (soft hyphens, joiners) and
    without the vowel points of Arabic and Hebrew, which few texts write
    words are runs of word characters as Unicode's UTS #18 has them: letters, numbers, connectors, and the marks on them, which
    `\\w` of Python's `re` lacks: it cuts Hindi at every vowel sign; no stop words, no stemming by default
    where the script has no spaces between words (Chinese, Japanese, Thai, Lao, Khmer, Burmese): pairs of neighbouring characters
    inside each run without white space
`stem` reduces words by Snowball's stemmer of the text's language where there is one (PyStemmer), else leaves them.
One index holds the whole corpus: document frequencies count passages of all languages. Where the set's protocol ranks a query
in the corpus of its own language, each language has an index of its own.
A query without a known word scores 0 everywhere, as does every query where the corpus has no word. Knows no vector and no
measure. Needs bm25s (extra `eval`).

Shapes: Q queries, J judged pairs, C languages, P passages.
"""

import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import regex

from hybrid_scale.data.prepared import RetrievalSet, TextTable
from hybrid_scale.errors import ModelError, describe
from hybrid_scale.languages import known_code, script

K1, B = 0.9, 0.4
WORD = regex.compile(r"[\p{Alphabetic}\p{N}\p{Pc}][\p{Alphabetic}\p{N}\p{Pc}\p{M}]*")
"""A word character of UTS #18 and those behind it; a mark alone, such as an emoji's variation selector, is no word."""
UNSEEN = regex.compile("[\\p{Cf}\u0640\u064b-\u0652\u0670\u0591-\u05bd\u05bf\u05c1\u05c2\u05c4\u05c5\u05c7]")
"""Format characters, Arabic's tatweel and vowel points, Hebrew's points and accents."""
WITHOUT_SPACES = ("Hans", "Hant", "Hani", "Jpan", "Thai", "Laoo", "Khmr", "Mymr")
"""Scripts (ISO 15924)."""
DOTLESS = ("tr", "az")
"""Languages whose I is the capital of \u0131, and whose \u0130 is that of i."""
STEMMERS = {
    **{"ar": "arabic", "da": "danish", "de": "german", "el": "greek", "en": "english", "es": "spanish", "fi": "finnish"},
    **{"fr": "french", "hi": "hindi", "hu": "hungarian", "id": "indonesian", "it": "italian", "nl": "dutch"},
    **{"no": "norwegian", "pt": "portuguese", "ro": "romanian", "ru": "russian", "sv": "swedish", "ta": "tamil"},
    "tr": "turkish",
}
"""Language -> Snowball's name of its stemmer."""


@dataclass(frozen=True)
class Tokenizer:
    """Text and language -> tokens."""

    stem: bool = False

    def __call__(self, text: str, language: str) -> list[str]:
        code = known_code(language) or language
        text = normalised(text, code)
        if script(code) in WITHOUT_SPACES:
            return [pair for run in text.split() for pair in _pairs(run)]
        words: list[str] = WORD.findall(text)
        return _stemmer(code)(words) if self.stem and code in STEMMERS else words

    def of(self, table: TextTable) -> list[list[str]]:
        """The tokens of every text."""
        return [self(text, language) for text, language in zip(table.column("text"), table.column("lang"), strict=True)]

    @property
    def settings(self) -> dict[str, Any]:
        rule = "NFKC, lower case; words of UTS #18, their marks included; character pairs in " + " ".join(WITHOUT_SPACES)
        return {"k1": K1, "b": B, "formula": "lucene", "tokens": rule, "stop_words": "none", "stem": self.stem}


def normalised(text: str, code: str) -> str:
    """One form of every character: NFKC, no format characters, lower case."""
    text = unicodedata.normalize("NFKC", text)
    if not text.isascii():
        text = UNSEEN.sub("", text.replace("\u200b", " "))  # a zero-width space parts words
        text = text.replace("\u0e4d\u0e32", "\u0e33").replace(
            "\u0ecd\u0eb2", "\u0eb3"
        )  # am of Thai and Lao, which NFKC takes apart
    if code in DOTLESS:
        text = text.replace("I", "\u0131").replace("\u0130", "i")
    return text.lower().replace("i\u0307", "i")  # what \u0130 becomes in other languages


def _pairs(run: str) -> list[str]:
    return [run[start : start + 2] for start in range(max(1, len(run) - 1))]


_LOADED: dict[str, Any] = {}


def _stemmer(language: str) -> Callable[[list[str]], list[str]]:
    if language not in _LOADED:
        try:
            import Stemmer
        except ImportError:
            raise ModelError(describe("bm25 stem", "no PyStemmer", "stemming needs it", "pip install .[eval]")) from None
        _LOADED[language] = Stemmer.Stemmer(STEMMERS[language])
    return _LOADED[language].stemWords


class Bm25:
    """An index over the corpus of `task`; `scores(query)` are float32 [P].

    `by_language`: an index for the passages of each language, with their own document frequencies. A query is scored in that
    of its language, and every other passage scores -infinity.
    """

    def __init__(self, task: RetrievalSet, tokenizer: Tokenizer | None = None, by_language: bool = False):
        try:
            import bm25s
        except ImportError:
            raise ModelError(describe("bm25", "no bm25s", "this baseline needs it", "pip install .[eval]")) from None
        self.tokenizer = tokenizer or Tokenizer()
        self.passages = len(task.corpus)
        self.queries = self.tokenizer.of(task.queries)
        tokens = self.tokenizer.of(task.corpus)
        every = [""] * len(tokens), [""] * len(self.queries)
        of_passage, self.part = (task.corpus.column("lang"), task.queries.column("lang")) if by_language else every
        self.rows: dict[str, np.ndarray] = {name: np.flatnonzero(np.array(of_passage) == name) for name in set(of_passage)}
        self.indexes: dict[str, Any] = {}
        for name, rows in self.rows.items():
            texts = [tokens[row] for row in rows]
            if any(texts):  # bm25s can't index a corpus without a word
                self.indexes[name] = bm25s.BM25(k1=K1, b=B, method="lucene")
                self.indexes[name].index(texts, show_progress=False)

    def scores(self, query: int) -> np.ndarray:
        """Scores of all passages for one query; zeros where it holds no word of the corpus."""
        part, scores = self.part[query], np.full(self.passages, -np.inf, np.float32)
        index = self.indexes.get(part)
        known = [word for word in self.queries[query] if word in index.vocab_dict] if index else []
        scores[self.rows.get(part, [])] = index.get_scores(known) if index and known else 0.0
        return scores


Scores = Callable[[int], np.ndarray]


def rank_by_scores(
    scores: Scores, judged: np.ndarray, language: np.ndarray, languages: int, own: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The order of any scorer that scores all passages of a query at once; ties go to the lower passage number.

    `judged` int [J, >= 2] holds query and passage of the judged pairs, `language` [P] numbers the passages' languages, `own` [Q]
    the passage that a query may not find (-1: none). Returns how many passages of each language rank above each judged one,
    int64 [J, C] (as index.count_above), and the scores float32 and passage numbers int64 of the best `k`, [Q, min(k, P)] (as
    index.search; a dropped passage comes last, with -inf).
    """
    k = min(k, len(language))
    above = np.zeros((len(judged), languages), np.int64)
    best, numbers = np.empty((len(own), k), np.float32), np.empty((len(own), k), np.int64)
    for query, pairs in _pairs_by_query(judged[:, 0], len(own)):
        values = scores(query)
        if own[query] >= 0:
            values[own[query]] = -np.inf
        numbers[query] = top = _top(values, k)
        best[query] = values[top]
        for pair in pairs:
            passage = judged[pair, 1]
            beats = values > values[passage]
            beats[:passage] |= values[:passage] == values[passage]
            above[pair] = np.bincount(language[beats], minlength=languages)
    return above, best, numbers


def _pairs_by_query(query: np.ndarray, queries: int) -> Iterator[tuple[int, Sequence[int]]]:
    order = np.argsort(query, kind="stable")
    ends = np.searchsorted(query[order], np.arange(queries + 1))
    return ((number, order[ends[number] : ends[number + 1]].tolist()) for number in range(queries))


def _top(values: np.ndarray, k: int) -> np.ndarray:
    """Numbers of the `k` best values, ties by the lower number."""
    bar = np.partition(values, len(values) - k)[len(values) - k]
    candidates = np.flatnonzero(values >= bar)
    return candidates[np.argsort(-values[candidates], kind="stable")][:k]

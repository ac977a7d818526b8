"""Belebele (2308.16884) as retrieval: a question is answered by the passage of FLORES-200 that it was asked about.

The corpus of a language is its 488 passages, its queries the 900 questions; all language variants are parallel, so every
question has one relevant passage in each. Reads a folder with `<variant>.jsonl` (as github.com/facebookresearch/belebele has
it; also .gz), or the Hub (`facebook/belebele`, one config a variant, split `test`).
Variants are named as in the data (`zho_Hans`) or by any other spelling of their code (`hybrid_scale.languages`). Refuses to
choose languages when reading from the Hub.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from hybrid_scale.data.records import Bad, Judgment, Passage, Query, Record
from hybrid_scale.data.sources.common import BadRow, Row, json_rows, require_languages
from hybrid_scale.data.sources.hub_data import HubData, is_copy
from hybrid_scale.errors import ConfigError, DataError, describe
from hybrid_scale.languages import distinct_codes

HUB = "facebook/belebele"


def read(path: str = HUB, languages: tuple[str, ...] = (), revision: str = "") -> Iterator[Record]:
    """Passages, questions and judgments of `languages` (all that the folder holds when left out).

    Raises ConfigError: no languages with a Hub id; DataError: languages that the folder lacks.
    """
    variants = (
        _from_folder(Path(path), languages) if Path(path).is_dir() and not is_copy(path) else _from_hub(path, languages, revision)
    )
    numbers: dict[str, int] = {}
    codes = [code for code, _ in variants]
    for code, rows in variants:
        yield from _variant(code, codes, rows, numbers)


Variant = tuple[str, Iterator[Row | Bad]]


def _from_folder(folder: Path, languages: tuple[str, ...]) -> list[Variant]:
    files = {file.name.partition(".")[0]: file for file in sorted(folder.glob("*_*.jsonl*"))}
    if not files:
        rule = "Belebele's <variant>.jsonl, such as eng_Latn.jsonl, are needed"
        raise DataError(describe(str(folder), "no such files", rule, "Check the path."))
    chosen = require_languages(str(folder), languages, files)
    return [(code, json_rows(files[variant])) for code, variant in zip(_codes(chosen), chosen, strict=True)]


def _from_hub(path: str, languages: tuple[str, ...], revision: str) -> list[Variant]:
    if not languages or any("_" not in name for name in languages):
        rule = "reading from the Hub needs the variants' own names, such as eng_Latn,zho_Hans"
        raise ConfigError(describe("belebele: languages", ",".join(languages), rule))
    data = HubData(path, revision=revision)
    return [(code, data.rows(variant, "test")) for code, variant in zip(_codes(languages), languages, strict=True)]


def _codes(variants: Sequence[str]) -> list[str]:
    """Raises DataError: two variants of one language, whose ids would be the same."""
    return distinct_codes("belebele: languages", variants, DataError)


def _variant(code: str, codes: list[str], rows: Iterator[Row | Bad], numbers: dict[str, int]) -> Iterator[Record]:
    """`numbers`: link -> number of the passage, the same in every language."""
    written: set[str] = set()
    for row in rows:
        if isinstance(row, Bad):
            yield row
            continue
        try:
            link, question = row.text("link"), row.text("question")
            passage, which = row.text("flores_passage"), row.text("question_number")
        except BadRow as error:
            yield error.bad
            continue
        number = numbers.setdefault(link, len(numbers))
        if link not in written:
            written.add(link)
            yield Passage(row.where, f"{code}:p{number:03}", code, passage)
        name, group = f"{code}:p{number:03}:q{which}", f"p{number:03}:q{which}"
        yield Query(row.where, name, code, question, group)
        yield from (Judgment(row.where, name, f"{other}:p{number:03}", 1) for other in codes)

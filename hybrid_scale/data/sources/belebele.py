"""Belebele (2308.16884) as retrieval: a question is answered by the passage of FLORES-200 that it was asked about.

The corpus of a language is its 488 passages, its queries the 900 questions; all language variants are parallel, so every
question has one relevant passage in each. Reads a folder with `<variant>.jsonl` (as github.com/facebookresearch/belebele has
it; also .gz), or the Hub (`facebook/belebele`, one config a variant, split `test`).
Variants are named as in the data (`zho_Hans`) or by our code (`zh`, `zh-Hant`): CLDR's code, and the script where it isn't the
usual one. Refuses to choose languages when reading from the Hub.
"""

from collections.abc import Iterator
from pathlib import Path

from babel.core import get_global

from hybrid_scale.data.records import Bad, Judgment, Passage, Query, Record
from hybrid_scale.data.sources.common import BadRow, Row, json_rows, require_languages
from hybrid_scale.data.sources.hub import HubData
from hybrid_scale.errors import ConfigError, DataError, describe

HUB = "facebook/belebele"


def read(path: str = HUB, languages: tuple[str, ...] = (), revision: str = "") -> Iterator[Record]:
    """Passages, questions and judgments of `languages` (all that the folder holds when left out).

    Raises ConfigError: no languages with a Hub id; DataError: languages that the folder lacks.
    """
    variants = _from_folder(Path(path), languages) if Path(path).is_dir() else _from_hub(path, languages, revision)
    numbers: dict[str, int] = {}
    codes = [code for code, _ in variants]
    for code, rows in variants:
        yield from _variant(code, codes, rows, numbers)


def code_of(variant: str) -> str:
    """`eng_Latn` -> `en`, `zho_Hant` -> `zh-Hant`, `ary_Arab` -> `ary`."""
    long, _, script = variant.partition("_")
    short = get_global("language_aliases").get(long, long)
    usual = get_global("likely_subtags").get(short, "")
    return short if f"_{script}_" in f"{usual}_" or not usual else f"{short}-{script}"


Variant = tuple[str, Iterator[Row | Bad]]


def _from_folder(folder: Path, languages: tuple[str, ...]) -> list[Variant]:
    files = {file.name.partition(".")[0]: file for file in sorted(folder.glob("*_*.jsonl*"))}
    if not files:
        rule = "Belebele's <variant>.jsonl, such as eng_Latn.jsonl, are needed"
        raise DataError(describe(str(folder), "no such files", rule, "Check the path."))
    known = {code_of(variant): variant for variant in files} | {variant: variant for variant in files}
    require_languages(str(folder), languages, set(known))
    chosen = [known[name] for name in languages] if languages else list(files)
    return [(code_of(variant), json_rows(files[variant])) for variant in chosen]


def _from_hub(path: str, languages: tuple[str, ...], revision: str) -> list[Variant]:
    if not languages or any("_" not in name for name in languages):
        rule = "reading from the Hub needs the variants' own names, such as eng_Latn,zho_Hans"
        raise ConfigError(describe("belebele: languages", ",".join(languages), rule))
    data = HubData(path, {}, revision, "")
    return [(code_of(variant), data.rows(variant, "test")) for variant in languages]


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

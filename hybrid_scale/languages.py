"""One code for each language, however data and settings spell it: `EN`, `eng`, `en-US` and `en_Latn` are `en`.

A spelling is a BCP 47 tag (RFC 5646); case doesn't matter, and `_` counts as `-`. Its code is
- the language: ISO 639-1 where it has such a code, by CLDR's aliases (`eng` -> `en`, `iw` -> `he`, `cmn` -> `zh`, `arb` -> `ar`);
- its script, where it isn't the usual one of the language (CLDR's likely subtags): `zh-Hans` is `zh`, `zh-Hant` and `sr-Latn`
  stay. A region decides only where it implies a script (`zh-TW` is `zh-Hant`); otherwise it is dropped, as are variants and
  extensions: `en-GB`, `pt-BR` and `de-1996` are `en`, `pt` and `de`;
- private subtags, as they stand (`x-mine`, `en-x-legal`): what must count as a language of its own is named so.
A tag whose language nobody registered (`english`, `jp`) has no code and is refused. Knows no data set.
"""

from collections.abc import Sequence
from functools import lru_cache

from langcodes import Language, LanguageTagError, standardize_tag, tag_is_valid

from hybrid_scale.errors import HybridScaleError, describe

SAME_LANGUAGE = {"nb": "no"}
"""Bokmål is what data marked `no` holds; CLDR treats the two as one, and Nynorsk (`nn`) as another."""
PART_OF = {
    **{"Hang": "Kore", "Hira": "Jpan", "Kana": "Jpan", "Hrkt": "Jpan"},
    **{"Aran": "Arab", "Cyrs": "Cyrl", "Latf": "Latn", "Latg": "Latn"},
}
"""Script -> the script that holds it (ISO 15924): FLORES writes `kor_Hang` where CLDR says `ko-Kore`."""
HAN = ("Hans", "Hant", "Jpan", "Kore")
"""Scripts that hold `Hani`."""
UNSTATED = ("Zyyy", "Zinh", "Zzzz")
"""Codes of ISO 15924 that name no script."""
RULE = "a language must be named by its BCP 47 code"
REMEDY = "Write a code such as en, zh-Hant or sr-Latn; a language of your own is x-NAME."


@lru_cache(maxsize=4096)
def known_code(spelling: str) -> str | None:
    """The code of the language that a tag names; None where it names no registered language."""
    try:
        tag = Language.get(standardize_tag(spelling.strip().replace("_", "-"), macro=True))
    except LanguageTagError:
        return None
    if not tag_is_valid(tag.to_tag()) or tag.extlangs:
        return None
    if tag.private == tag.to_tag():
        return tag.private
    base = SAME_LANGUAGE.get(tag.language or "und", tag.language or "und")
    written = script(tag.to_tag())
    parts = [base, written if written != script(base) else None, tag.private]
    return "-".join(part for part in parts if part)


@lru_cache(maxsize=4096)
def script(code: str) -> str:
    """ISO 15924 code of the script that a language is written in, by its tag."""
    tag = Language.get(code)
    usual = Language.make(language=tag.language).maximize().script or ""
    own = None if tag.script in UNSTATED else tag.script
    if own is None:
        return Language.make(language=tag.language, territory=tag.territory).maximize().script or ""
    if own == "Hani" and usual in HAN:
        return usual
    return PART_OF.get(own, own)


def refusal(where: str, spelling: str) -> str:
    """The message for a spelling without a code."""
    return describe(where, spelling, RULE, REMEDY)


def distinct_codes(where: str, spellings: Sequence[str], error: type[HybridScaleError], remedy: str = "") -> list[str]:
    """The code of each spelling. Raises `error`: a spelling without a code, two that name one language."""
    first: dict[str, str] = {}
    for spelling in spellings:
        code = known_code(spelling)
        if code is None:
            raise error(refusal(where, spelling) + (f" {remedy}" if remedy else ""))
        if code in first:
            found, rule = f"{first[code]} and {spelling}", f"both name the language {code}, which must stand once"
            raise error(describe(where, found, rule, remedy or "Leave one of them out."))
        first[code] = spelling
    return list(first)

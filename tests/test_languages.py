"""One code a language: tables worked by hand from RFC 5646, ISO 639 and CLDR's aliases and likely subtags."""

import pytest

from hybrid_scale.errors import DataError
from hybrid_scale.languages import distinct_codes, known_code, refusal, script

SAME = {
    "en": "en EN eng ENG en-US en_US en-gb eng_Latn en-Latn-US en-001 en-Zzzz en-u-co-phonebk",
    "zh": "zh zho chi cmn zh-CN zh_Hans zho-Hans zho_Hans cmn_Hans_CN zh-cmn-Hans zh-SG zh-Hani",
    "zh-Hant": "zh-Hant zho_Hant zh-TW zh_HK zh-hant-tw cmn-Hant",
    "yue": "yue zh-yue yue_Hant yue-HK",
    "ja": "ja jpn jpn_Jpan ja-JP ja-Hrkt",
    "th": "th tha-Thai tha_Thai th-TH",
    "ko": "ko kor kor_Hang ko-Kore",
    "pt": "pt pt-BR pt_PT por_Latn",
    "ar": "ar arb arb_Arab ar-EG ara",
    "ar-Latn": "arb_Latn ar-Latn",
    "ary": "ary ary_Arab",
    "no": "no nb nob_Latn nor nb-NO",
    "nn": "nn nno_Latn",
    "sr": "sr srp_Cyrl sr-RS",
    "sr-Latn": "sr-Latn sh sr-ME",
    "he": "he iw heb_Hebr",
    "de": "de deu ger de-1996 de-AT",
    "hi-Latn": "hi-Latn hin_Latn",
    **{"el": "ell_Grek", "ne": "npi_Deva", "fa": "pes_Arab fa-IR", "km": "khm_Khmr", "sw": "swh_Latn", "ur": "ur-Aran"},
    **{"x-mine": "x-mine X-Mine", "en-x-legal": "en-x-legal EN-US-x-Legal", "qaa": "qaa", "mul": "mul", "und": "und"},
}


@pytest.mark.parametrize("code", SAME)
def test_spellings_of_one_language_share_its_code(code: str) -> None:
    assert {spelling: known_code(spelling) for spelling in SAME[code].split()} == dict.fromkeys(SAME[code].split(), code)
    assert known_code(code) == code


@pytest.mark.parametrize(
    "spelling", ["english", "jp", "cn", "xx", "en US", "en_US.UTF-8", "sr@latin", "", "日本語", "zh-CHS", "x"]
)
def test_what_names_no_registered_language_has_no_code(spelling: str) -> None:
    assert known_code(spelling) is None
    said = refusal("f.jsonl:3: lang", spelling)
    assert f"f.jsonl:3: lang: found {spelling!r}; a language must be named by its BCP 47 code. Write a code such as en" in said


def test_the_script_of_a_tag() -> None:
    scripts = {"zh": "Hans", "zh-Hant": "Hant", "zh-Latn": "Latn", "tha": "Thai", "yue": "Hant", "kor_Hang": "Kore", "lo": "Laoo"}
    assert {tag: script(tag.replace("_", "-")) for tag in scripts} == scripts


def test_two_spellings_in_one_list_are_refused_with_both() -> None:
    assert distinct_codes("key", ["eng", "deu_Latn"], DataError) == ["en", "de"]
    with pytest.raises(DataError, match="key: found 'zh-CN and zho_Hans'; both name the language zh, which must stand once"):
        distinct_codes("key", ["en", "zh-CN", "zho_Hans"], DataError)
    with pytest.raises(DataError, match=r"key: found 'jp'; a language must be named .* Prepare the data again\."):
        distinct_codes("key", ["en", "jp"], DataError, "Prepare the data again.")

"""The embedded demo: questions and answers about places, made at run time from CLDR's names (Babel), parallel in 9 languages.

A fact is a kind, a subject and an answer (currency, Japan, yen); every language states it with one template, worded so
that names stay uninflected. Each territory and place occurs in several kinds, so that a model can answer a held-out
fact from what it learnt of its names. Downloads nothing; another release of Babel may hold other names.
"""

import datetime
import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache

from babel import Locale, localedata
from babel.core import get_global
from babel.languages import get_official_languages
from babel.numbers import get_territory_currencies

from hybrid_scale.data.records import Judgment, Pair, Passage, Query, Record
from hybrid_scale.data.sources.common import require_languages
from hybrid_scale.errors import DataError, describe

LOCALES = {"ar": "ar", "de": "de", "en": "en", "es": "es", "fr": "fr", "hi": "hi", "ja": "ja", "ru": "ru", "zh": "zh_Hans"}
LATIN = ("de", "en", "es", "fr")
HELD_OUT = 0.18
"""Share of each kind's facts in the split `test`."""
CURRENCIES_ON = datetime.date(2025, 1, 1)
"""Fixed, so that the demo doesn't change with the calendar."""
DISPUTED = ("Africa/El_Aaiun", "Asia/Famagusta", "Asia/Gaza", "Asia/Hebron", "Asia/Jerusalem", "Europe/Simferopol")
"""Places left out of the kind `place`: a demo takes no side on where they belong."""

Template = tuple[str, str]
"""Question and statement; {s} is the subject, {a} the answer."""
TEMPLATES: dict[str, dict[str, Template]] = {
    "currency": {
        "ar": ("ما العملة المستخدمة في {s}؟", "{s}: العملة الرسمية هي «{a}»."),
        "de": ("Mit welcher Währung bezahlt man hier: {s}?", "{s}: Die offizielle Währung heißt „{a}“."),
        "en": ("Which currency do people use in {s}?", "{s}: the official money is called “{a}”."),
        "es": ("¿Qué moneda se usa en {s}?", "{s}: el dinero oficial se llama «{a}»."),
        "fr": ("Quelle monnaie utilise-t-on ici : {s} ?", "{s} : la devise officielle s’appelle « {a} »."),
        "hi": ("{s} में कौन-सी मुद्रा चलती है?", "{s}: आधिकारिक मुद्रा का नाम “{a}” है।"),
        "ja": ("{s}ではどの通貨が使われていますか？", "{s}の公式通貨は「{a}」です。"),
        "ru": ("Какой валютой платят здесь: {s}?", "{s}: официальная валюта называется «{a}»."),
        "zh": ("{s}使用什么货币？", "{s}的官方货币是{a}。"),
    },
    "language": {
        "ar": ("ما اللغة الرسمية في {s}؟", "{s}: اللغة الرسمية هي «{a}»."),
        "de": ("Welche Amtssprache gilt hier: {s}?", "{s}: Die Amtssprache heißt „{a}“."),
        "en": ("What is the official language of {s}?", "{s}: the language of the state is called “{a}”."),
        "es": ("¿Cuál es el idioma oficial en {s}?", "{s}: la lengua del estado se llama «{a}»."),
        "fr": ("Quelle est la langue officielle ici : {s} ?", "{s} : la langue de l’État s’appelle « {a} »."),
        "hi": ("{s} की राजभाषा क्या है?", "{s}: सरकारी भाषा का नाम “{a}” है।"),
        "ja": ("{s}の公用語は何ですか？", "{s}では「{a}」が公用語です。"),
        "ru": ("Какой официальный язык здесь: {s}?", "{s}: государственный язык называется «{a}»."),
        "zh": ("{s}的官方语言是什么？", "{s}的官方语言是{a}。"),
    },
    "week": {
        "ar": ("بأي يوم يبدأ الأسبوع في {s}؟", "{s}: أول يوم في التقويم هو {a}."),
        "de": ("Mit welchem Tag beginnt die Woche hier: {s}?", "{s}: Der erste Tag im Kalender ist {a}."),
        "en": ("On which day does the week begin in {s}?", "{s}: the first day in the calendar is {a}."),
        "es": ("¿Qué día empieza la semana en {s}?", "{s}: el primer día del calendario es {a}."),
        "fr": ("Quel jour commence la semaine ici : {s} ?", "{s} : le premier jour du calendrier est {a}."),
        "hi": ("{s} में सप्ताह किस दिन से शुरू होता है?", "{s}: कैलेंडर का पहला दिन {a} है।"),
        "ja": ("{s}では週は何曜日から始まりますか？", "{s}のカレンダーの最初の日は{a}です。"),
        "ru": ("С какого дня начинается неделя здесь: {s}?", "{s}: первый день в календаре — {a}."),
        "zh": ("{s}的一周从哪一天开始？", "{s}的日历以{a}为第一天。"),
    },
    "place": {
        "ar": ("في أي بلد أو منطقة تقع {s}؟", "{s}: مكان في {a}."),
        "de": ("In welchem Land oder Gebiet liegt {s}?", "{s}: ein Ort; Land oder Gebiet: {a}."),
        "en": ("In which country or region is {s}?", "{s}: a place in {a}."),
        "es": ("¿En qué país o región está {s}?", "{s}: un lugar en {a}."),
        "fr": ("Dans quel pays ou quelle région se trouve {s} ?", "{s} : un lieu ; pays ou région : {a}."),
        "hi": ("{s} किस देश या क्षेत्र में है?", "{s}: एक स्थान; देश या क्षेत्र: {a}।"),
        "ja": ("{s}はどの国や地域にありますか？", "{s}は{a}にある場所です。"),
        "ru": ("В какой стране или регионе находится {s}?", "{s}: место; страна или регион: {a}."),
        "zh": ("{s}位于哪个国家或地区？", "{s}是{a}的一个地方。"),
    },
    "clock": {
        "ar": ("ما المنطقة الزمنية في {s}؟", "{s}: الساعات مضبوطة على «{a}»."),
        "de": ("Welche Zeitzone gilt hier: {s}?", "{s}: Die Uhren folgen „{a}“."),
        "en": ("Which time zone applies in {s}?", "{s}: the clocks follow “{a}”."),
        "es": ("¿Qué huso horario se usa en {s}?", "{s}: los relojes siguen «{a}»."),
        "fr": ("Quel fuseau horaire utilise-t-on ici : {s} ?", "{s} : les horloges suivent « {a} »."),
        "hi": ("{s} में कौन-सा समय क्षेत्र लागू है?", "{s}: घड़ियाँ “{a}” के अनुसार चलती हैं।"),
        "ja": ("{s}はどのタイムゾーンですか？", "{s}の時計は「{a}」に合わせてあります。"),
        "ru": ("Какой часовой пояс действует здесь: {s}?", "{s}: часы показывают «{a}»."),
        "zh": ("{s}属于哪个时区？", "{s}的时钟采用{a}。"),
    },
}

Names = Mapping[str, str]
"""Language -> name."""


@dataclass(frozen=True, slots=True)
class Fact:
    """Subjects and answers are keys such as `territory:JP`; the names are those of every language in LOCALES."""

    kind: str
    subject: str
    answer: str
    subject_names: Names
    answer_names: Names

    @property
    def id(self) -> str:
        return f"{self.kind}:{self.subject.partition(':')[2]}"

    def question(self, lang: str) -> str:
        return self._fill(0, lang)

    def statement(self, lang: str) -> str:
        return self._fill(1, lang)

    def _fill(self, side: int, lang: str) -> str:
        return TEMPLATES[self.kind][lang][side].format(s=self.subject_names[lang], a=self.answer_names[lang])


def read(split: str = "train", languages: tuple[str, ...] = ()) -> Iterator[Record]:
    """`train`: a pair per fact and language; `test`: passages, queries and judgments, each query relevant in all languages.

    The split of facts doesn't depend on `languages`. Raises DataError: another split, a language that the demo lacks.
    """
    chosen = require_languages("demo", languages, LOCALES)
    if split not in ("train", "test"):
        raise DataError(describe("demo: split", split, "must be train or test"))
    train, test = split_facts()
    if split == "train":
        yield from (_pair(fact, lang) for fact in train for lang in chosen)
        return
    for fact in test:
        for lang in chosen:
            name = f"{fact.id}:{lang}"
            where = f"demo:{name}"
            yield Passage(where, name, lang, fact.statement(lang))
            yield Query(where, name, lang, fact.question(lang), fact.id)
            yield from (Judgment(where, name, f"{fact.id}:{other}", 1) for other in chosen)


def _pair(fact: Fact, lang: str) -> Pair:
    name = f"{fact.id}:{lang}"
    return Pair(f"demo:{name}", name, fact.id, name, lang, lang, fact.question(lang), fact.statement(lang))


def statistics() -> dict[str, int]:
    """`facts`, `train`, `test` and `<split> <kind>`: numbers of facts (parallel groups)."""
    train, test = split_facts()
    counts = {"languages": len(LOCALES), "facts": len(train) + len(test), "train": len(train), "test": len(test)}
    for split, facts in (("train", train), ("test", test)):
        counts |= {f"{split} {kind}": count for kind, count in sorted(Counter(fact.kind for fact in facts).items())}
    return counts


@cache
def split_facts() -> tuple[tuple[Fact, ...], tuple[Fact, ...]]:
    """Train and test. A fact is held out only while its subject and its answer still occur in training facts."""
    everything = unambiguous(all_facts())
    room = {kind: round(HELD_OUT * count) for kind, count in Counter(fact.kind for fact in everything).items()}
    occurs = Counter(name for fact in everything for name in (fact.subject, fact.answer))
    test: set[str] = set()
    for fact in sorted(everything, key=lambda fact: hashlib.blake2b(fact.id.encode()).digest()):
        if room[fact.kind] and occurs[fact.subject] > 1 and occurs[fact.answer] > 1:
            test.add(fact.id)
            room[fact.kind] -= 1
            occurs.subtract((fact.subject, fact.answer))
    return tuple(fact for fact in everything if fact.id not in test), tuple(fact for fact in everything if fact.id in test)


def unambiguous(facts: list[Fact]) -> list[Fact]:
    """Without those facts whose question or statement, in any language, equals another's but for case."""
    texts = {fact.id: {text(lang).casefold() for text in (fact.question, fact.statement) for lang in LOCALES} for fact in facts}
    count = Counter(text for own in texts.values() for text in own)
    return [fact for fact in facts if all(count[text] == 1 for text in texts[fact.id])]


def all_facts() -> list[Fact]:
    """Every fact that CLDR can name in all languages, in a fixed order; no place that is called like its territory."""
    locales = {lang: Locale.parse(name) for lang, name in LOCALES.items()}
    territories = _territories(locales)
    facts = [*_currencies(locales, territories), *_languages(locales, territories), *_weeks(locales, territories)]
    for zone, names in _places(locales).items():
        territory, meta_zone = get_global("zone_territories")[zone], get_global("meta_zones").get(zone)
        home = territories.get(territory)
        if home is None or any(names[lang].casefold() == home[lang].casefold() for lang in LOCALES):
            continue
        if zone not in DISPUTED:
            facts.append(Fact("place", f"place:{zone}", f"territory:{territory}", names, home))
        clock = _complete({lang: _zone_name(locale, meta_zone) for lang, locale in locales.items()})
        if clock:
            facts.append(Fact("clock", f"place:{zone}", f"clock:{meta_zone}", names, clock))
    return facts


def _complete(names: Mapping[str, str | None]) -> Names | None:
    return {lang: name for lang, name in names.items() if name} if all(names.values()) else None


def _named(locales: Mapping[str, Locale], table: str, key: str) -> Names | None:
    """The key's name in a table of every locale, such as `currencies`; None where one lacks it."""
    return _complete({lang: getattr(locale, table).get(key) for lang, locale in locales.items()})


def _territories(locales: Mapping[str, Locale]) -> dict[str, Names]:
    """Two-letter codes that hold people and have a name everywhere."""
    result = {}
    for code in sorted(get_global("territory_languages")):
        names = _named(locales, "territories", code)
        if len(code) == 2 and names:
            result[code] = names
    return result


def _currencies(locales: Mapping[str, Locale], territories: Mapping[str, Names]) -> Iterator[Fact]:
    """Territories with exactly one legal tender."""
    for code, names in territories.items():
        current = get_territory_currencies(code, CURRENCIES_ON, CURRENCIES_ON)
        answer = _named(locales, "currencies", current[0]) if len(current) == 1 else None
        if answer:
            yield Fact("currency", f"territory:{code}", f"currency:{current[0]}", names, answer)


def _languages(locales: Mapping[str, Locale], territories: Mapping[str, Names]) -> Iterator[Fact]:
    """Territories with exactly one official language."""
    for code, names in territories.items():
        official = get_official_languages(code, de_facto=True)
        answer = _named(locales, "languages", official[0]) if len(official) == 1 else None
        if answer:
            yield Fact("language", f"territory:{code}", f"language:{official[0]}", names, answer)


def _weeks(locales: Mapping[str, Locale], territories: Mapping[str, Names]) -> Iterator[Fact]:
    """Babel keeps CLDR's week data per locale: a territory has a fact where all its locales agree."""
    days: dict[str, set[int]] = {}
    for identifier in localedata.locale_identifiers():
        code = identifier.rsplit("_", 1)[-1]
        if code in territories and "_" in identifier:
            days.setdefault(code, set()).add(Locale.parse(identifier).first_week_day)
    for code, names in territories.items():
        found = sorted(days.get(code, ()))
        if len(found) == 1:
            answer = {lang: locale.days["stand-alone"]["wide"][found[0]] for lang, locale in locales.items()}
            yield Fact("week", f"territory:{code}", f"day:{found[0]}", names, answer)


def _places(locales: Mapping[str, Locale]) -> dict[str, Names]:
    """Exemplar cities of time zones `area/city`. CLDR omits a Latin name equal to the zone's; other scripts need their own."""
    result = {}
    for zone in sorted(get_global("zone_territories")):
        area, slash, city = zone.rpartition("/")
        own = {lang: locale.time_zones.get(zone, {}).get("city") for lang, locale in locales.items()}
        names = _complete({lang: name or (city.replace("_", " ") if lang in LATIN else None) for lang, name in own.items()})
        if slash and "/" not in area and area != "Etc" and names:
            result[zone] = names
    return result


def _zone_name(locale: Locale, meta_zone: str | None) -> str | None:
    names = locale.meta_zones.get(meta_zone, {}).get("long", {}) if meta_zone else {}
    return names.get("standard") or names.get("generic")

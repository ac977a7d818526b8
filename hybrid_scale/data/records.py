"""What a source yields: records, bad rows and notes; checked fields.

Knows no data set, and nothing of how records are stored.
"""

from dataclasses import dataclass
from typing import Any

from hybrid_scale.errors import describe


@dataclass(frozen=True, slots=True)
class Pair:
    """One training row. `group` ties parallel items: any query of a group may be paired with any passage of it."""

    where: str
    id: str
    group: str
    pid: str
    query_lang: str
    passage_lang: str
    query: str
    passage: str
    negatives: tuple[tuple[str, str], ...] = ()
    """Hard negatives as (pid, text)."""
    cross_only: bool = False
    """Not a monolingual pair by itself (a sentence and its own copy), only raw material of cross pairs."""
    body: str = ""
    """The passage without its title, where it has one: it tells another title from another text in messages."""
    source: str = ""
    """Name of the source in a mix of several."""


@dataclass(frozen=True, slots=True)
class Passage:
    where: str
    id: str
    lang: str
    text: str
    """May be empty: published corpora hold such passages."""


@dataclass(frozen=True, slots=True)
class Query:
    where: str
    id: str
    lang: str
    text: str
    group: str
    """Parallel queries share it; a query without translations has its own."""


@dataclass(frozen=True, slots=True)
class Judgment:
    where: str
    query: str
    passage: str
    score: int


@dataclass(frozen=True, slots=True)
class Bad:
    """A row that breaks a rule: `message` starts with `where`."""

    where: str
    message: str


@dataclass(frozen=True, slots=True)
class Note:
    """What a reader noticed of its data: it is kept in the manifest and printed, and no row is refused for it."""

    where: str
    message: str


Record = Pair | Passage | Query | Judgment | Bad | Note


def text_field(where: str, row: dict[str, Any], key: str, default: str | None = None) -> str | Bad:
    """`row[key]` as non-empty text (numbers become text), stripped of outer white space; else Bad."""
    value = row.get(key, default)
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        rule = "missing" if value is None else "must be text"
        return Bad(where, describe(f"{where}: {key}", value, rule))
    if not value.strip():
        return Bad(where, describe(f"{where}: {key}", value, "empty text"))
    if not _encodes(value):
        return Bad(where, describe(f"{where}: {key}", value, "half of a surrogate pair is no text"))
    return value.strip()


def _encodes(text: str) -> bool:
    """JSON may spell half a surrogate pair (`\\ud83d`), which no UTF-8 file can hold."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True

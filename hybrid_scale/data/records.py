"""What a source yields: records and bad rows, lines of text files with their place, checked fields.

Knows no data set, and nothing of how records are stored.
"""

import gzip
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from hybrid_scale.errors import DataError, describe


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


@contextmanager
def open_text(path: Path) -> Iterator[TextIO]:
    """A UTF-8 text file (a byte-order mark is skipped), gunzipped when its name ends in .gz.

    Raises DataError: it doesn't exist, not UTF-8 (with the line), a damaged .gz.
    """
    if not path.is_file():
        there = "a folder" if path.is_dir() else "no such file"
        raise DataError(describe(str(path), there, "this file is needed", "Check the path."))
    try:
        with gzip.open(path, "rt", encoding="utf-8-sig") if _zipped(path) else open(path, encoding="utf-8-sig") as file:
            yield file
    except UnicodeDecodeError:
        where, found = _first_undecodable(path)
        raise DataError(describe(where, found, "a text file must be UTF-8", "Convert it.")) from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(describe(str(path), str(error), "damaged gzip", "Fetch the file again.")) from None


def _zipped(path: Path) -> bool:
    return path.suffix == ".gz"


def _first_undecodable(path: Path) -> tuple[str, bytes]:
    """(`file:line`, the bytes) that are not UTF-8: a second pass, as a decoder reads ahead of the lines."""
    with gzip.open(path, "rb") if _zipped(path) else open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                return f"{path}:{number}", line[error.start : error.end]
    return str(path), b""


def either(path: Path) -> Path:
    """`path`, or `path` + .gz where only that exists. Raises DataError when neither does."""
    zipped = path.with_name(path.name + ".gz")
    if not path.is_file() and zipped.is_file():
        return zipped
    if not path.is_file():
        raise DataError(describe(str(path), "no such file", "this file (or the same with .gz) is needed", "Check the path."))
    return path


def read_lines(path: Path) -> Iterator[tuple[str, str]]:
    """(`file:line`, line without its end) per line that isn't blank."""
    with open_text(path) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield f"{path}:{number}", line.rstrip("\r\n")


def read_jsonl(path: Path) -> Iterator[tuple[str, dict[str, Any] | Bad]]:
    """(`file:line`, parsed object or Bad) per line; blank lines are skipped."""
    for where, line in read_lines(path):
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            yield where, Bad(where, describe(where, line.strip(), f"not JSON ({error.msg} at column {error.colno})"))
            continue
        except (RecursionError, ValueError) as error:  # nested too deep; a number of more than 4,300 digits
            yield where, Bad(where, describe(where, line.strip(), f"not JSON ({error})"))
            continue
        if isinstance(value, dict):
            yield where, value
        else:
            yield where, Bad(where, describe(where, value, "a row is a JSON object"))


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

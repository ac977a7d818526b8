"""What the readers share: rows that know where they stand, wanted languages, qrels tables.

Knows no data set.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybrid_scale.data.files import read_jsonl, read_lines, read_trec
from hybrid_scale.data.records import Bad, Judgment, Note, Passage, Query, Record, text_field
from hybrid_scale.errors import DataError, describe
from hybrid_scale.languages import distinct_codes, known_code


class BadRow(Exception):
    """Raised inside a converter; `converted` yields the Bad record that it carries."""

    def __init__(self, bad: Bad):
        super().__init__(bad.message)
        self.bad = bad


@dataclass(frozen=True, slots=True)
class Row:
    """Fields of one input row and its place (`file:line`)."""

    where: str
    values: dict[str, Any]

    def text(self, key: str, default: str | None = None) -> str:
        """Non-empty text; `default` where the key is absent or null. Raises BadRow."""
        if default is not None and self.values.get(key) is None:
            return default
        value = text_field(self.where, self.values, key)
        if isinstance(value, Bad):
            raise BadRow(value)
        return value

    def first(self, *keys: str) -> str:
        """The first of the keys whose field is there and not null; the first one of all where none is."""
        return next((key for key in keys if self.values.get(key) is not None), keys[0])

    def blank(self, key: str) -> bool:
        """Whether the field is absent, null, not a number (as pandas writes it), empty or white space alone."""
        value = self.values.get(key)
        return value is None or value != value or (isinstance(value, str) and not value.strip())

    def titled(self, key: str, may_be_empty: bool = False) -> str:
        """`title` + space + text; either alone where the other is blank (BEIR's convention).

        Raises BadRow when both are, except, with `may_be_empty`, where the text is there and says nothing: then it is "".
        """
        parts = [name for name in ("title", key) if not self.blank(name)]
        if not parts and may_be_empty and self.values.get(key) is not None:
            return ""
        return " ".join(self.text(name) for name in parts) if parts else self.text(key)

    def integer(self, key: str) -> int:
        """A whole number, which may be written as a float or as text (1, 1.0, "1"). Raises BadRow."""
        value = self.values.get(key)
        try:
            number = float(value if isinstance(value, float) else self.text(key))
        except ValueError:
            number = float("nan")
        if not number.is_integer():
            raise self.bad(key, "must be a whole number")
        return int(number)

    def bad(self, key: str, rule: str) -> BadRow:
        return BadRow(Bad(self.where, describe(f"{self.where}: {key}", self.values.get(key), rule)))


Converter = Callable[[Row], Record | Sequence[Record] | None]


def converted(rows: Iterator[Row | Bad], converter: Converter) -> Iterator[Record]:
    """The converter's record or records of each row, or the Bad record that it raised; None and an empty list leave a row out."""
    for row in rows:
        try:
            records = row if isinstance(row, Bad) else converter(row)
        except BadRow as error:
            records = error.bad
        if isinstance(records, Sequence):
            yield from records
        elif records is not None:
            yield records


def json_rows(path: Path) -> Iterator[Row | Bad]:
    """Rows of a JSON Lines file (or of one JSON list, or Parquet). Raises DataError where it holds none."""
    return _some(path, (value if isinstance(value, Bad) else Row(where, value) for where, value in read_jsonl(path)))


def _some(path: Path, rows: Iterator[Row | Bad]) -> Iterator[Row | Bad]:
    """The rows. Raises DataError where there are none: an interrupted download often leaves an empty file."""
    row = None
    for row in rows:
        yield row
    if row is None:
        raise DataError(describe(str(path), "no row", "this file must hold rows", "Fetch it again, or leave it out."))


def tsv_rows(path: Path, columns: Sequence[str]) -> Iterator[Row | Bad]:
    """Rows of a tab-separated file without a header and without quoting."""
    return _some(path, (_split(where, line, "\t", columns) for where, line in read_lines(path)))


def trec_rows(path: Path) -> Iterator[Row | Bad]:
    """Rows of TREC qrels (`query Q0 passage score`, see `files.read_trec`), under BEIR's column names."""
    columns = ("query-id", "Q0", "corpus-id", "score")
    return _some(path, (_row(where, line, fields, columns) for where, line, fields in read_trec(path)))


def qrels_rows(path: Path) -> Iterator[Row | Bad]:
    """Rows of BEIR qrels. Raises DataError when the header isn't `query-id corpus-id score`."""
    columns = ("query-id", "corpus-id", "score")
    lines = read_lines(path)
    where, header = next(lines, (f"{path}:1", ""))
    if tuple(header.split("\t")) != columns:
        raise DataError(describe(where, header, f"the header must be {' '.join(columns)}, separated by tabs"))
    for where, line in lines:
        yield _split(where, line, "\t", columns)


def _split(where: str, line: str, separator: str, columns: Sequence[str]) -> Row | Bad:
    return _row(where, line, line.split(separator), columns)


def _row(where: str, line: str, cells: Sequence[str], columns: Sequence[str]) -> Row | Bad:
    if len(cells) != len(columns):
        return Bad(where, describe(where, line, f"a row has {len(columns)} columns ({' '.join(columns)}), not {len(cells)}"))
    return Row(where, dict(zip(columns, cells, strict=True)))


def judgment(row: Row, prefix: str = "") -> Judgment:
    """A qrels row; `prefix` is put before both ids. Raises BadRow."""
    return Judgment(row.where, prefix + row.text("query-id"), prefix + row.text("corpus-id"), row.integer("score"))


class Languages:
    """The languages asked for, in any spelling, and which of them the data held."""

    def __init__(self, wanted: Sequence[str]):
        self.wanted = frozenset(distinct_codes("languages", wanted, DataError))
        self.met: set[str] = set()

    def keep(self, *languages: str) -> bool:
        """Whether a row in these languages is wanted; remembers them as met."""
        if not self.wanted:
            return True
        codes = [known_code(spelling) or spelling for spelling in languages]
        self.met.update(codes)
        return self.wanted.issuperset(codes)

    def check(self, where: str) -> None:
        """Raises DataError when a language asked for never occurred. Call it after the last row."""
        require_languages(where, sorted(self.wanted), self.met)


class Splits:
    """The split asked for (empty: all) by rows' own field `split`, and what the rows say. remedy: where all are taken."""

    def __init__(self, wanted: str, remedy: str = "--split NAME takes one"):
        self.wanted, self.remedy = wanted, remedy
        self.met: Counter[str] = Counter()

    def kept(self, rows: Iterator[Row | Bad]) -> Iterator[Row | Bad]:
        """The rows of the wanted split; all where none is asked for."""
        for row in rows:
            if isinstance(row, Row):
                named = "" if row.blank("split") else str(row.values["split"]).strip()
                self.met[named] += 1
                if self.wanted and named != self.wanted:
                    continue
            yield row

    def check(self, where: str) -> Iterator[Note]:
        """A note of what was taken or left out. Raises DataError when no row was of the split asked for. Call it at the end."""
        named = {name: count for name, count in sorted(self.met.items()) if name}
        shown = ", ".join(f"{name} {count:,}" for name, count in named.items()) or "none"
        if self.wanted and self.wanted not in named:
            raise DataError(describe(f"{where}: split", self.wanted, "no row names this split", f"Known: {shown}."))
        without = f", {self.met['']:,} rows name none" if self.met[""] else ""
        if self.wanted:
            yield Note(where, f"rows of split '{self.wanted}' were taken; the rows name these splits: {shown}{without}")
        elif set(named) - {"train"}:
            yield Note(where, f"rows of all splits were taken, by their field `split`: {shown}{without}; {self.remedy}")


def require_languages(where: str, wanted: Sequence[str], known: Iterable[str]) -> tuple[str, ...]:
    """The data's own names of the wanted languages, however each side spells them; all of them where none is wanted.

    A name of the data that is written exactly so is taken before another of the same language. Raises DataError: a language
    that the data doesn't hold, that is named twice, or whose code fits two names of the data.
    """
    known = list(known)
    if not wanted:
        return tuple(known)
    codes = distinct_codes(f"{where}: languages", wanted, DataError)
    fitting = [
        [spelling] if spelling in known else [k for k in known if (known_code(k) or k) == code]
        for spelling, code in zip(wanted, codes, strict=True)
    ]
    unknown = [spelling for spelling, names in zip(wanted, fitting, strict=True) if not names]
    if unknown:
        remedy = f"Known: {', '.join(sorted(known))}."
        raise DataError(describe(f"{where}: languages", ",".join(sorted(unknown)), "the data doesn't hold them", remedy))
    for spelling, names in zip(wanted, fitting, strict=True):
        if len(names) > 1:
            rule = f"the data hold this language as {' and '.join(names)}"
            raise DataError(describe(f"{where}: languages", spelling, rule, "Name one of them as it is written there."))
    return tuple(names[0] for names in fitting)


class LeftOut:
    """Ids left out for their language, so that their judgments are left out too instead of being errors."""

    def __init__(self) -> None:
        self.ids: set[tuple[type, str]] = set()

    def unless_wanted(self, record: Passage | Query, wanted: Languages) -> Passage | Query | None:
        if wanted.keep(record.lang):
            return record
        self.ids.add((type(record), record.id))
        return None

    def concerns(self, record: Record) -> bool:
        return isinstance(record, Judgment) and ((Query, record.query) in self.ids or (Passage, record.passage) in self.ids)

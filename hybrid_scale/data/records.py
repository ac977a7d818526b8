"""Checked records on disk: training pairs and retrieval sets, written once, opened memory-mapped.

A source yields records; `write_pairs` and `write_retrieval` check them together (duplicate ids, unknown ids, two texts
under one passage id) and write a directory that `Pairs` and `RetrievalSet` open without reading it into memory.
Knows no tokenizer, no batch and no rank.

Shapes: R rows, Q queries, P passages, J judgments.
"""

import gzip
import hashlib
import itertools
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import pyarrow as pa
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from hybrid_scale.errors import DataError, describe
from hybrid_scale.runs import read_json, write_json, write_text

FORMAT = 1
FLUSH_ROWS = 50_000


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


@dataclass(frozen=True, slots=True)
class Passage:
    where: str
    id: str
    lang: str
    text: str


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


Record = Pair | Passage | Query | Judgment | Bad


# ---------------------------------------------------------------------------------------------------------- reading


@contextmanager
def open_text(path: Path) -> Iterator[TextIO]:
    """A UTF-8 text file, gunzipped when its name ends in .gz. Raises DataError: it doesn't exist, not UTF-8, a damaged .gz."""
    if not path.is_file():
        raise DataError(describe(str(path), "no such file", "this file is needed", "Check the path."))
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else open(path, encoding="utf-8") as file:
            yield file
    except UnicodeDecodeError as error:
        found = error.object[error.start : error.end]
        raise DataError(describe(str(path), found, "a text file must be UTF-8", "Convert it.")) from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(describe(str(path), str(error), "damaged gzip", "Fetch the file again.")) from None


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


# ---------------------------------------------------------------------------------------------------------- writing


class _TextWriter:
    """Columns of text -> an uncompressed Arrow file, a batch of rows at a time."""

    def __init__(self, path: Path, columns: Sequence[str]):
        self.schema = pa.schema([(name, pa.large_string()) for name in columns])
        self.sink = pa.OSFile(str(path), "wb")
        self.writer = pa.ipc.new_file(self.sink, self.schema)
        self.rows: list[tuple[str, ...]] = []
        self.count = 0

    def append(self, *values: str) -> int:
        """Add a row; returns its number."""
        self.rows.append(values)
        self.count += 1
        if len(self.rows) >= FLUSH_ROWS:
            self._flush()
        return self.count - 1

    def _flush(self) -> None:
        if self.rows:
            arrays = [pa.array(column, pa.large_string()) for column in zip(*self.rows, strict=True)]
            self.writer.write_batch(pa.record_batch(arrays, schema=self.schema))
            self.rows = []

    def close(self) -> None:
        self._flush()
        self.writer.close()
        self.sink.close()


@dataclass
class Rejects:
    """What happens to bad rows: an error at the first one, or, with a file, counted and listed there."""

    path: Path | None = None
    count: int = 0
    _messages: list[str] = field(default_factory=list)

    def add(self, bad: Bad) -> None:
        if self.path is None:
            raise DataError(bad.message)
        self.count += 1
        self._messages.append(json.dumps({"where": bad.where, "message": bad.message}, ensure_ascii=False))

    def close(self) -> None:
        if self.path is not None:
            write_text(self.path, "".join(m + "\n" for m in self._messages))


class _Codes:
    """Text -> consecutive numbers, in order of first appearance."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}

    def __call__(self, text: str) -> int:
        return self.numbers.setdefault(text, len(self.numbers))


@contextmanager
def _new_directory(directory: Path) -> Iterator[Path]:
    """A sibling to fill; it becomes `directory` when the block ends well and is removed when it doesn't."""
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        found = "a non-empty folder" if directory.is_dir() else "a file"
        raise DataError(describe(str(directory), found, "prepared data is never overwritten", "Choose another --out."))
    directory = directory.resolve()
    beside = directory.with_name(f".{directory.name}.{os.getpid()}.part")
    beside.mkdir(parents=True)
    try:
        yield beside
        os.replace(beside, directory)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8"), digest_size=16).digest()


class _PassageTable:
    """Unique passages: one number per pid, and one number per text, whatever its pid and language."""

    def __init__(self, writer: _TextWriter):
        self.writer = writer
        self.by_pid: dict[str, tuple[int, bytes]] = {}
        self.by_text: dict[bytes, int] = {}
        self.same_text = 0

    def number(self, where: str, pid: str, lang: str, text: str) -> int | Bad:
        digest = _digest(text)
        known = self.by_pid.get(pid)
        if known is not None:
            if known[1] != digest:
                return Bad(where, describe(f"{where}: pid", pid, "this pid already names a passage with another text"))
            return known[0]
        twin = self.by_text.get(digest)
        if twin is not None:
            self.same_text += 1
            number = twin
        else:
            number = self.by_text[digest] = self.writer.append(pid, lang, text)
        self.by_pid[pid] = (number, digest)
        return number


def write(records: Iterable[Record], directory: Path, source: dict[str, Any], rejects: Rejects | None = None) -> dict[str, Any]:
    """`write_pairs` or `write_retrieval`, whichever the first good record asks for."""
    records = iter(records)
    head: list[Record] = []
    for record in records:
        head.append(record)
        if not isinstance(record, Bad):
            break
    training = not head or isinstance(head[-1], Pair | Bad)
    return (write_pairs if training else write_retrieval)(itertools.chain(head, records), directory, source, rejects)


def write_pairs(
    records: Iterable[Record], directory: Path, source: dict[str, Any], rejects: Rejects | None = None
) -> dict[str, Any]:
    """Check pairs and write them to the empty `directory`; returns the manifest.

    Rows are stored by group. Passages with equal text become one passage (counted in the manifest), so that one text
    is never another row's negative. Raises DataError: no pairs, duplicate id, two texts under one pid, a Bad row
    without a reject file, `directory` not empty. A failed write leaves nothing behind.
    """
    rejects = rejects or Rejects()
    with _new_directory(directory) as beside:
        return _fill_pairs(records, beside, source, rejects)


def _fill_pairs(records: Iterable[Record], directory: Path, source: dict[str, Any], rejects: Rejects) -> dict[str, Any]:
    queries = _TextWriter(directory / "queries.arrow", ("id", "text"))
    passages = _PassageTable(_TextWriter(directory / "passages.arrow", ("id", "lang", "text")))
    groups, languages = _Codes(), _Codes()
    ids: dict[str, str] = {}
    columns: dict[str, list[int]] = {name: [] for name in ("group", "query_lang", "passage_lang", "passage", "cross_only")}
    negatives: list[int] = []
    offsets = [0]
    for record in records:
        if isinstance(record, Pair) and record.id in ids:
            record = Bad(record.where, describe(f"{record.where}: id", record.id, f"duplicate id, first at {ids[record.id]}"))
        if isinstance(record, Bad):
            rejects.add(record)
            continue
        if not isinstance(record, Pair):
            raise DataError(describe(record.where, type(record).__name__, "a training source yields pairs only"))
        numbers = [passages.number(record.where, record.pid, record.passage_lang, record.passage)]
        numbers += [passages.number(record.where, pid, record.passage_lang, text) for pid, text in record.negatives]
        wrong = [number for number in numbers if isinstance(number, Bad)]
        if wrong:
            rejects.add(wrong[0])
            continue
        good = [number for number in numbers if isinstance(number, int)]
        ids[record.id] = record.where
        queries.append(record.id, record.query)
        for name, value in zip(
            columns,
            (groups(record.group), languages(record.query_lang), languages(record.passage_lang), good[0], record.cross_only),
            strict=True,
        ):
            columns[name].append(value)
        negatives += good[1:]
        offsets.append(len(negatives))
    queries.close()
    passages.writer.close()
    rejects.close()
    if not ids:
        raise DataError(describe(f"source {source}", f"no good rows, {rejects.count} rejected", "a training set needs a pair"))
    return _finish_pairs(directory, columns, negatives, offsets, list(languages.numbers), passages, source, rejects)


def _finish_pairs(
    directory: Path,
    columns: dict[str, list[int]],
    negatives: list[int],
    offsets: list[int],
    languages: list[str],
    passages: _PassageTable,
    source: dict[str, Any],
    rejects: Rejects,
) -> dict[str, Any]:
    group = np.asarray(columns["group"], np.int64)
    order = np.argsort(group, kind="stable")
    counts = np.diff(np.asarray(offsets, np.int64))[order]
    starts = np.asarray(offsets[:-1], np.int64)[order]
    flat = np.asarray(negatives, np.int64)
    taken = np.concatenate([flat[s : s + c] for s, c in zip(starts, counts, strict=True)]) if len(flat) else flat
    row_family, passage_family = families(group[order], np.asarray(columns["passage"], np.int64)[order], passages.writer.count)
    arrays: dict[str, np.ndarray] = {
        "query": order.astype(np.int64),
        "group": group[order],
        "passage": np.asarray(columns["passage"], np.int64)[order],
        "query_lang": np.asarray(columns["query_lang"], np.int16)[order],
        "passage_lang": np.asarray(columns["passage_lang"], np.int16)[order],
        "cross_only": np.asarray(columns["cross_only"], bool)[order],
        "family": row_family,
        "passage_family": passage_family,
        "negative_offsets": np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        "negatives": taken,
    }
    for name, array in arrays.items():
        np.save(directory / f"{name}.npy", array)
    manifest = {
        "format": FORMAT,
        "kind": "pairs",
        "source": source,
        "languages": languages,
        "rows": len(group),
        "groups": int(group.max()) + 1,
        "passages": passages.writer.count,
        "passage_ids_with_a_known_text": passages.same_text,
        "rejected_rows": rejects.count,
        "fingerprint": fingerprint(directory),
    }
    write_json(directory / "manifest.json", manifest)
    return manifest


def families(group: np.ndarray, passage: np.ndarray, passages: int) -> tuple[np.ndarray, np.ndarray]:
    """Family of each row [R] and passage [P]: connected components of rows tied by a parallel group or a passage.

    Two rows of different families can be each other's negatives without doubt. A passage that is nobody's positive is
    a family of its own.
    """
    groups = int(group.max()) + 1
    edges = coo_matrix((np.ones(len(group), np.int8), (group, groups + passage)), shape=(groups + passages,) * 2)
    _, label = connected_components(edges, directed=False)
    return label[group].astype(np.int64), label[groups:].astype(np.int64)


def write_retrieval(
    records: Iterable[Record], directory: Path, source: dict[str, Any], rejects: Rejects | None = None
) -> dict[str, Any]:
    """Check a corpus, its queries and judgments (in any order) and write them; returns the manifest.

    Raises DataError: duplicate ids, a judgment that names an unknown query or passage, a pair judged twice, no
    passages / queries / judgments, a Bad row without a reject file, `directory` not empty. Queries without a positive
    judgment are kept and counted (`queries_without_relevant`); metrics say what they do with them. A failed write leaves
    nothing behind.
    """
    rejects = rejects or Rejects()
    with _new_directory(directory) as beside:
        return _fill_retrieval(records, beside, source, rejects)


def _fill_retrieval(records: Iterable[Record], directory: Path, source: dict[str, Any], rejects: Rejects) -> dict[str, Any]:
    corpus = _TextWriter(directory / "corpus.arrow", ("id", "lang", "text"))
    queries = _TextWriter(directory / "queries.arrow", ("id", "lang", "text", "group"))
    numbers: dict[str, dict[str, int]] = {"query": {}, "passage": {}}
    languages = _Codes()
    judgments: list[Judgment] = []
    for record in records:
        if isinstance(record, Bad):
            rejects.add(record)
        elif isinstance(record, Judgment):
            judgments.append(record)
        elif isinstance(record, Pair):
            raise DataError(
                describe(record.where, "a training pair", "a retrieval source yields passages, queries and judgments")
            )
        else:
            kind = "query" if isinstance(record, Query) else "passage"
            if record.id in numbers[kind]:
                rejects.add(Bad(record.where, describe(f"{record.where}: _id", record.id, f"duplicate {kind} id")))
                continue
            languages(record.lang)
            if isinstance(record, Query):
                numbers[kind][record.id] = queries.append(record.id, record.lang, record.text, record.group)
            else:
                numbers[kind][record.id] = corpus.append(record.id, record.lang, record.text)
    corpus.close()
    queries.close()
    qrels = _judgment_array(judgments, numbers, rejects)
    rejects.close()
    for what, count in (("passages", corpus.count), ("queries", queries.count), ("judgments", len(qrels))):
        if count == 0:
            raise DataError(describe(f"source {source}", f"no good {what}", f"a retrieval set needs {what}"))
    np.save(directory / "qrels.npy", qrels)
    manifest = {
        "format": FORMAT,
        "kind": "retrieval",
        "source": source,
        "languages": list(languages.numbers),
        "passages": corpus.count,
        "queries": queries.count,
        "judgments": len(qrels),
        "queries_without_relevant": queries.count - len(np.unique(qrels[qrels[:, 2] > 0, 0])),
        "rejected_rows": rejects.count,
        "fingerprint": fingerprint(directory),
    }
    write_json(directory / "manifest.json", manifest)
    return manifest


def _judgment_array(judgments: list[Judgment], numbers: dict[str, dict[str, int]], rejects: Rejects) -> np.ndarray:
    """[J, 3] int64: query, passage, score; sorted by query, then passage."""
    rows: dict[tuple[int, int], int] = {}
    for judgment in judgments:
        query, passage = numbers["query"].get(judgment.query), numbers["passage"].get(judgment.passage)
        if query is None or passage is None:
            kind, name = ("query", judgment.query) if query is None else ("passage", judgment.passage)
            rule = f"the qrels name a {kind} that {'the queries do' if kind == 'query' else 'the corpus does'} not hold"
            rejects.add(Bad(judgment.where, describe(judgment.where, name, rule)))
        elif (query, passage) in rows:
            found = (judgment.query, judgment.passage)
            rejects.add(Bad(judgment.where, describe(judgment.where, found, "this query and passage are judged twice")))
        else:
            rows[query, passage] = judgment.score
    return np.asarray(sorted((q, p, s) for (q, p), s in rows.items()), np.int64).reshape(-1, 3)


def fingerprint(directory: Path) -> str:
    """SHA-256 over the names and bytes of the data files of a prepared directory (its manifest left out)."""
    total = hashlib.sha256()
    for path in sorted(directory.iterdir()):
        if path.suffix in (".arrow", ".npy"):
            with open(path, "rb") as file:
                total.update(f"{path.name}:{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return total.hexdigest()


# ---------------------------------------------------------------------------------------------------------- opening


class TextTable:
    """Text columns of an Arrow file, memory-mapped: rows are decoded when they are asked for."""

    def __init__(self, path: Path):
        with pa.memory_map(str(path)) as source:
            self.table = pa.ipc.open_file(source).read_all()

    def __len__(self) -> int:
        return self.table.num_rows

    def column(self, name: str, rows: np.ndarray | None = None) -> list[str]:
        """Values of a column for the given row numbers, in their order; all of them when `rows` is None."""
        column = self.table.column(name)
        if rows is None:
            return column.to_pylist()
        if column.num_chunks == 1:
            return column.chunk(0).take(pa.array(rows, pa.int64())).to_pylist()
        return [column[int(row)].as_py() for row in rows]


def _open(directory: Path, kind: str) -> dict[str, Any]:
    if not (directory / "manifest.json").is_file():
        raise DataError(
            describe(str(directory), "no manifest.json", "not a prepared data directory", "Make one with launch/prepare.py.")
        )
    manifest = read_json(directory / "manifest.json")
    if manifest["kind"] != kind:
        raise DataError(describe(str(directory), manifest["kind"], f"a prepared '{kind}' directory is needed here"))
    if manifest["format"] != FORMAT:
        raise DataError(
            describe(str(directory), manifest["format"], f"this version reads format {FORMAT}", "Prepare the data again.")
        )
    return manifest


class Pairs:
    """Training rows, ordered by group. Arrays are memory-mapped; nothing is copied."""

    def __init__(self, directory: Path | str):
        self.directory = Path(directory)
        self.manifest = _open(self.directory, "pairs")
        self.languages: list[str] = self.manifest["languages"]
        self.fingerprint: str = self.manifest["fingerprint"]
        self.queries = TextTable(self.directory / "queries.arrow")
        self.passages = TextTable(self.directory / "passages.arrow")
        load: Callable[[str], np.ndarray] = lambda name: np.load(self.directory / f"{name}.npy", mmap_mode="r")  # noqa: E731
        self.query = load("query")
        """[R] number of the row's query in `queries`."""
        self.group = load("group")
        """[R] parallel group, non-decreasing."""
        self.passage = load("passage")
        """[R] number of the row's positive in `passages`."""
        self.query_lang = load("query_lang")
        """[R] number of the query's language in `languages`."""
        self.passage_lang = load("passage_lang")
        self.cross_only = load("cross_only")
        self.family = load("family")
        """[R] see `families`."""
        self.passage_family = load("passage_family")
        """[P]"""
        self.negative_offsets = load("negative_offsets")
        """[R + 1] the row's hard negatives are negatives[offsets[r]:offsets[r + 1]]."""
        self.negatives = load("negatives")

    def __len__(self) -> int:
        return len(self.query)


class RetrievalSet:
    """A corpus, its queries and its judgments; numbers are positions in `corpus` and `queries`."""

    def __init__(self, directory: Path | str):
        self.directory = Path(directory)
        self.name = self.directory.name
        self.manifest = _open(self.directory, "retrieval")
        self.fingerprint: str = self.manifest["fingerprint"]
        self.corpus = TextTable(self.directory / "corpus.arrow")
        self.queries = TextTable(self.directory / "queries.arrow")
        self.qrels: np.ndarray = np.load(self.directory / "qrels.npy", mmap_mode="r")
        """[J, 3] query, passage, score."""
        self.languages: list[str] = self.manifest["languages"]

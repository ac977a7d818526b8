"""Raw files as rows: lines of text, JSON objects, CSV. What a file is, is told by its first bytes and not by its name.

gzip, bzip2, xz and Zstandard are unpacked. What is none of them and no text is named: Parquet (which `read_jsonl` reads), an
archive, a Git LFS pointer, a web page. Every fault of a file is a DataError of one line with its name.
A file is a path, or a URL that fsspec opens (`hf://datasets/...`, `https://...`). Knows no data set.
"""

import bz2
import csv
import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import pyarrow as pa
from pyarrow import parquet

from hybrid_scale.data.records import Bad
from hybrid_scale.errors import DataError, describe

File = Path | str

UNPACK: dict[str, Callable[[BinaryIO], Any]] = {
    "gzip": lambda raw: gzip.GzipFile(fileobj=raw),
    "bzip2": bz2.BZ2File,
    "xz": lzma.LZMAFile,
    "Zstandard": lambda raw: pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), "zstd"),
}
"""Compression -> how its bytes are unpacked."""
FIRST_BYTES: tuple[tuple[bytes, str], ...] = (
    (b"\x1f\x8b", "gzip"),
    *((b"BZh" + bytes([level]) + block, "bzip2") for level in b"123456789" for block in (b"1AY&SY", b"\x17rE8P\x90")),
    (b"\xfd7zXZ\x00", "xz"),
    (b"\x28\xb5\x2f\xfd", "Zstandard"),
    (b"PAR1", "Parquet"),
    (b"PK\x03\x04", "a zip archive"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (b"Rar!\x1a\x07", "a rar archive"),
    (b"\x04\x22\x4d\x18", "LZ4"),
    (b"ARROW1", "an Arrow file"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"SQLite format 3\x00", "an SQLite database"),
    (b"version https://git-lfs.github.com/spec/", "a Git LFS pointer"),
)
TAR_AT = 257
"""Where a tar archive says `ustar`."""
REMEDIES = {
    "a Git LFS pointer": "It stands for the file: get that with `git lfs pull`, or download it.",
    "a web page": "The download gave an answer in place of the file: fetch it again.",
    "Parquet": "Convert it to text, or read it by a source of JSON Lines (pairs, bitext, beir) or by the source hub.",
}
FIELD = re.compile("[^ \\t\\n\\v\\f\\r]+")
"""A field of a TREC file: what C's isspace doesn't part."""
PEEK = 1 << 13
PARQUET_ROWS = 1 << 10
SEPARATORS = ",;|\t"


def kind_of(head: bytes) -> str | None:
    """What the first bytes of a file say that it is; None: text, as far as they tell."""
    for magic, name in FIRST_BYTES:
        if head.startswith(magic):
            return name
    if head[TAR_AT : TAR_AT + 5] == b"ustar":
        return "a tar archive"
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip()[:14].lower()
    return "a web page" if start.startswith((b"<!doctype html", b"<html")) else None


def is_remote(path: File) -> bool:
    """Whether it is a URL."""
    return isinstance(path, str) and "://" in path


def either(path: Path) -> Path:
    """`path`, or the same with .gz, .bz2, .xz or .zst where only that exists. Raises DataError when none does."""
    if not path.is_file():
        for ending in (".gz", ".bz2", ".xz", ".zst"):
            packed = path.with_name(path.name + ending)
            if packed.is_file():
                return packed
        rule = "this file (or the same with .gz, .bz2, .xz or .zst) is needed"
        raise DataError(describe(str(path), "no such file", rule, "Check the path."))
    return path


# ---------------------------------------------------------------------------------------------------------------- opening


@contextmanager
def open_text(path: File) -> Iterator[TextIO]:
    """A UTF-8 text file (a byte-order mark is skipped), unpacked; its lines end at \\n and nowhere else.

    Raises DataError: it doesn't exist, can't be fetched, is damaged, isn't text, isn't UTF-8 (with the line).
    """
    with named_faults(path), _unpacked(path) as stream:
        yield io.TextIOWrapper(stream, encoding="utf-8-sig", newline="\n")


@contextmanager
def named_faults(path: File) -> Iterator[None]:
    """What goes wrong while a file is read, as a DataError that names it."""
    try:
        yield
    except DataError:
        raise
    except UnicodeDecodeError:
        where, found = _first_undecodable(path)
        raise DataError(describe(where, found, "a text file must be UTF-8", "Convert it.")) from None
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile, pa.ArrowException) as error:
        raise _damaged(path, error) from None
    except OSError as error:
        if error.errno is not None and not is_remote(path):
            raise
        raise (_unreachable if is_remote(path) else _damaged)(path, error) from None
    except Exception as error:
        if not is_remote(path):
            raise
        raise _unreachable(path, error) from error


def _damaged(path: File, error: Exception) -> DataError:
    with _raw(path) as raw:
        kind = kind_of(raw.read(PEEK))
    return DataError(describe(str(path), _one_line(error), f"damaged {kind or 'file'}", "Fetch the file again."))


def _unreachable(path: File, error: Exception) -> DataError:
    rule = "this file can't be read"
    return DataError(
        describe(str(path), f"{type(error).__name__}: {_one_line(error)}", rule, "Check its address and the network.")
    )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _raw(path: File) -> BinaryIO:
    """The bytes as they lie. Raises DataError where there is no such file."""
    if is_remote(path):
        import fsspec

        stream: BinaryIO = fsspec.open(str(path), "rb").open()
        return stream
    there = Path(path)
    if not there.is_file():
        found = "a folder" if there.is_dir() else "no such file"
        raise DataError(describe(str(path), found, "this file is needed", "Check the path."))
    return open(there, "rb")


@contextmanager
def _unpacked(path: File) -> Iterator[io.BufferedReader]:
    """The bytes of a text file, unpacked. Raises DataError for what isn't text, also where it was packed."""
    with _raw(path) as raw:
        packing = kind_of(raw.read(PEEK))
        raw.seek(0)
        unpacked: Any = UNPACK[packing](raw) if packing in UNPACK else raw
        stream: io.BufferedReader = io.BufferedReader(unpacked, PEEK)
        kind = kind_of(stream.peek(PEEK))
        if kind is not None:
            found = f"{kind} within {packing}" if packing in UNPACK else kind
            raise DataError(describe(str(path), found, "a text file is needed", REMEDIES.get(kind, "Unpack or convert it.")))
        yield stream


def _first_undecodable(path: File) -> tuple[str, bytes]:
    """(`file:line`, the bytes) that are not UTF-8: a second pass, as a decoder reads ahead of the lines."""
    with _unpacked(path) as stream:
        for number, line in enumerate(stream, start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                return f"{path}:{number}", line[error.start : error.end]
    return str(path), b""


# ------------------------------------------------------------------------------------------------------------------- rows


def read_lines(path: File) -> Iterator[tuple[str, str]]:
    """(`file:line`, line without its end) per line that isn't blank. A carriage return inside a line belongs to it."""
    with open_text(path) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield f"{path}:{number}", line.removesuffix("\n").removesuffix("\r")


def read_trec(path: File) -> Iterator[tuple[str, str, list[str]]]:
    """(`file:line`, line, its fields) of a run or of qrels, read as trec_eval reads them.

    ASCII white space alone parts fields: a no-break space belongs to its id. A line that begins with `#` is a comment.
    """
    for where, line in read_lines(path):
        if (fields := FIELD.findall(line)) and not fields[0].startswith("#"):
            yield where, line, fields


def read_jsonl(path: File) -> Iterator[tuple[str, dict[str, Any] | Bad]]:
    """(`file:row`, object or Bad) per line of JSON Lines (blank ones are skipped), element of one JSON list, or Parquet row."""
    with named_faults(path):
        if is_parquet(path):
            yield from _parquet_rows(path)
            return
        with open_text(path) as file:
            listed = file.read(PEEK).lstrip().startswith("[")
        yield from (_listed(path) if listed else None) or map(_parsed, read_lines(path))


def json_document(path: File) -> Any:
    """The one JSON value of a file. Raises DataError with the line where it isn't JSON."""
    with open_text(path) as file:
        text = file.read()
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"{path}:{error.lineno}"
        found = f"{error.msg} at column {error.colno}"
        raise DataError(describe(where, found, "the file must be JSON", "Fetch it again.")) from None
    except (RecursionError, ValueError) as error:
        raise DataError(describe(str(path), str(error), "the file must be JSON", "Fetch it again.")) from None


def is_parquet(path: File) -> bool:
    """By its first bytes. Raises DataError where there is no such file."""
    with _raw(path) as raw:
        return kind_of(raw.read(PEEK)) == "Parquet"


def _parsed(place: tuple[str, str]) -> tuple[str, dict[str, Any] | Bad]:
    where, line = place
    try:
        return _object(where, json.loads(line))
    except json.JSONDecodeError as error:
        return where, Bad(where, describe(where, line.strip(), f"not JSON ({error.msg} at column {error.colno})"))
    except (RecursionError, ValueError) as error:  # nested too deep; a number of more than 4,300 digits
        return where, Bad(where, describe(where, line.strip(), f"not JSON ({error})"))


def _object(where: str, value: Any) -> tuple[str, dict[str, Any] | Bad]:
    return where, value if isinstance(value, dict) else Bad(where, describe(where, value, "a row is a JSON object"))


def _listed(path: File) -> Iterator[tuple[str, dict[str, Any] | Bad]] | None:
    """The elements of a file that is one JSON list of objects; None: it isn't."""
    with open_text(path) as file:
        text = file.read()
    try:
        rows = json.loads(text)
    except (RecursionError, ValueError):
        return None
    if not any(isinstance(row, dict) for row in rows):
        return None
    return (_object(f"{path}:{number}", row) for number, row in enumerate(rows, start=1))


def _parquet_rows(path: File) -> Iterator[tuple[str, dict[str, Any]]]:
    """Columns of vectors (an encoder's embeddings beside the text) are left out."""
    with _raw(path) as raw:
        table = parquet.ParquetFile(raw)
        columns = [field.name for field in table.schema_arrow if not _is_vector(field.type)]
        number = 0
        for batch in table.iter_batches(PARQUET_ROWS, columns=columns):
            for row in batch.to_pylist():
                number += 1
                yield f"{path} (Parquet):{number}", row


def _is_vector(kind: pa.DataType) -> bool:
    lists = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    return lists and pa.types.is_floating(kind.value_type)


def read_table(path: File, separator: str = ",", columns: list[str] | None = None) -> Iterator[tuple[str, dict[str, Any] | Bad]]:
    """(`file:line`, cells by column or Bad) per row of a CSV or TSV file. Cells are text as they stand; an empty one is None.

    columns: their names where the file has no header line. A TSV file (`separator` tab) knows no quotes, as every line is a
    row; a CSV's quoted cells may hold separators, line breaks and doubled quotes.
    Raises DataError: no header, a column twice, columns parted otherwise.
    """
    rows = _tsv_cells(path) if separator == "\t" else _csv_cells(path, separator)
    if columns is None:
        where, header = next(rows, (str(path), None))
        if not isinstance(header, list) or len(set(header)) != len(header):
            found = header.message if isinstance(header, Bad) else header
            raise DataError(describe(where, found, "a table must begin with a line of column names, each once"))
        if len(header) == 1 and any(sign in header[0] for sign in SEPARATORS):
            rule = f"columns must be parted by {separator!r}"
            raise DataError(describe(where, header[0], rule, "Convert the file, or name it .tsv where tabs part them."))
        columns = header
    for where, cells in rows:
        if isinstance(cells, Bad):
            yield where, cells
        elif len(cells) != len(columns):
            rule = f"a row must have {len(columns)} columns ({', '.join(columns)}), not {len(cells)}"
            yield where, Bad(where, describe(where, separator.join(cells), rule))
        else:
            yield where, {name: cell or None for name, cell in zip(columns, cells, strict=True)}


def _tsv_cells(path: File) -> Iterator[tuple[str, list[str] | Bad]]:
    for where, line in read_lines(path):
        yield where, line.split("\t")


def _csv_cells(path: File, separator: str) -> Iterator[tuple[str, list[str] | Bad]]:
    csv.field_size_limit(1 << 30)
    with open_text(path) as file:
        reader = csv.reader(file, delimiter=separator, strict=True)
        while True:
            where = f"{path}:{reader.line_num + 1}"
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield where, Bad(where, describe(where, str(error), "a row must be valid CSV", "Quote the cell."))
                continue
            if cells:
                yield where, cells

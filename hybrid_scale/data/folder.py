"""A directory of prepared data while it is made: its files, its manifest, and the list of rejected rows.

A directory appears whole, with its manifest, or not at all. Knows neither pairs nor judgments.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa

from hybrid_scale.data.prepared import FORMAT, data_files, fingerprint
from hybrid_scale.data.records import Bad
from hybrid_scale.errors import DataError, describe
from hybrid_scale.runs import write_json

FLUSH_ROWS = 50_000
FLUSH_CHARACTERS = 1 << 25
"""Rows of a table are written when they are that many, or that long."""


Facts = Callable[[Path], Mapping[str, Any]]
"""Further keys of a manifest, known when all records are written. It may add files of its own to the folder that it gets."""


class Rejects:
    """What happens to bad rows: an error at the first one, or, with a file, counted and listed there as they come.

    `remedy`: added to that error. Raises DataError for a file that exists and isn't such a list.
    """

    def __init__(self, path: Path | None = None, remedy: str = ""):
        self.path, self.remedy, self.count = path, remedy, 0
        self._file: TextIO | None = None
        if path is not None and path.exists() and not _is_list_of_rejects(path):
            rule = "bad rows would overwrite a file that lists none"
            raise DataError(describe(str(path), "an existing file", rule, "Choose another --rejects."))

    def __enter__(self) -> "Rejects":
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self._beside(self.path), "w", encoding="utf-8")
        return self

    def __exit__(self, *_: object) -> None:
        """The list stays, also of a set that couldn't be written."""
        if self.path is not None and self._file is not None:
            self._file.close()
            os.replace(self._beside(self.path), self.path)

    def add(self, bad: Bad) -> None:
        if self._file is None:
            raise DataError(f"{bad.message} {self.remedy}".strip())
        self.count += 1
        self._file.write(json.dumps({"where": bad.where, "message": bad.message}, ensure_ascii=False) + "\n")

    def _beside(self, path: Path) -> Path:
        return path.with_name(f".{path.name}.{os.getpid()}.part")


def _is_list_of_rejects(path: Path) -> bool:
    try:
        with open(path, encoding="utf-8") as file:
            line = file.readline()
        return not line or set(json.loads(line)) == {"where", "message"}
    except (OSError, ValueError, TypeError):
        return False


@contextmanager
def new_directory(directory: Path, what: str = "prepared data") -> Iterator[Path]:
    """A sibling to fill with `what`; it becomes `directory` when the block ends well and is removed when it doesn't.

    Raises DataError: `directory` exists and isn't an empty folder.
    """
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        found = "a non-empty folder" if directory.is_dir() else "a file"
        raise DataError(describe(str(directory), found, f"{what} is never overwritten", "Choose another --out."))
    directory = directory.resolve()
    beside = directory.with_name(f".{directory.name}.{os.getpid()}.part")
    beside.mkdir(parents=True)
    try:
        yield beside
        os.replace(beside, directory)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def finish(
    directory: Path,
    kind: str,
    source: dict[str, Any],
    rejects: Rejects,
    counts: dict[str, Any],
    facts: Facts | None,
) -> dict[str, Any]:
    """The manifest, written last."""
    further = facts(directory) if facts else {}
    manifest = {
        "format": FORMAT,
        "kind": kind,
        "source": source,
        **counts,
        "rejected_rows": rejects.count,
        "fingerprint": fingerprint(directory),
        "bytes": {path.name: path.stat().st_size for path in data_files(directory)},
        **further,
    }
    write_json(directory / "manifest.json", manifest)
    return manifest


class TextWriter:
    """Columns of text -> an uncompressed Arrow file, a batch of rows at a time."""

    def __init__(self, path: Path, columns: Sequence[str]):
        self.schema = pa.schema([(name, pa.large_string()) for name in columns])
        self.sink = pa.OSFile(str(path), "wb")
        self.writer = pa.ipc.new_file(self.sink, self.schema)
        self.rows: list[tuple[str, ...]] = []
        self.characters = 0
        self.count = 0

    def append(self, *values: str) -> int:
        """Add a row; returns its number."""
        self.rows.append(values)
        self.characters += sum(map(len, values))
        self.count += 1
        if len(self.rows) >= FLUSH_ROWS or self.characters >= FLUSH_CHARACTERS:
            self._flush()
        return self.count - 1

    def _flush(self) -> None:
        if self.rows:
            arrays = [pa.array(column, pa.large_string()) for column in zip(*self.rows, strict=True)]
            self.writer.write_batch(pa.record_batch(arrays, schema=self.schema))
            self.rows, self.characters = [], 0

    def close(self) -> None:
        self._flush()
        self.writer.close()
        self.sink.close()

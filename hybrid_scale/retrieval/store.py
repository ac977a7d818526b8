"""Vectors of a table of texts on disk: numbered parts with checksums, and a manifest that says whose vectors they are.

    DIR/manifest.json         identity (model, prompt, texts, type), dimensions, rows, rows of a part
    DIR/part_00000.npy        vectors of rows 0 to part_rows - 1; the last part may be shorter
    DIR/part_00000.json       its SHA-256, its longest vector, the identity again; written last: a part without it isn't finished

bfloat16 is stored as its 16 bits (NumPy has no such type). A finished part is never written again unless it is damaged, and a
store of another model or other texts is refused with the difference.
Knows no model, no text and no rank.

Shapes: N rows of the table, n rows of a part, D dimensions.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from hybrid_scale.errors import DataError, describe
from hybrid_scale.runs import atomic_path, read_json, write_json

FORMAT = 1
STORED: dict[str, np.dtype[Any]] = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(np.uint16),
    "float32": np.dtype(np.float32),
}
"""Type of vectors -> type of the NumPy file."""
PIECE_BYTES = 2**24
"""Read at a time when a part is checked."""


# ---------------------------------------------------------------------------------------------------------------- types


def encode(vectors: np.ndarray, dtype: str) -> np.ndarray:
    """float32 vectors as they are stored, rounded to nearest even."""
    if dtype != "bfloat16":
        with np.errstate(over="ignore"):  # infinities are found later, with the passage's id
            return vectors.astype(STORED[dtype])
    bits = np.ascontiguousarray(vectors, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def decode(stored: np.ndarray, dtype: str) -> np.ndarray:
    """Stored vectors as float16 or float32, values unchanged."""
    if dtype != "bfloat16":
        return stored
    bits = stored.astype(np.uint32)
    bits <<= 16
    return bits.view(np.float32)


# ---------------------------------------------------------------------------------------------------------------- store


class Store:
    """A folder of parts. `identity` is what makes the vectors these and no others: a JSON object, compared key by key."""

    def __init__(self, directory: Path, manifest: dict[str, Any]):
        self.directory = directory
        self.identity: dict[str, Any] = manifest["identity"]
        self.dtype: str = self.identity["dtype"]
        self.rows: int = manifest["rows"]
        self.dimensions: int = manifest["dimensions"]
        self.part_rows: int = manifest["part_rows"]
        self.row_bytes = self.dimensions * STORED[self.dtype].itemsize

    @property
    def parts(self) -> int:
        return -(-self.rows // self.part_rows)

    @property
    def vector_bytes(self) -> int:
        """Of all parts."""
        return self.rows * self.row_bytes

    def span(self, part: int) -> tuple[int, int]:
        """First row of a part and the row behind its last."""
        return part * self.part_rows, min((part + 1) * self.part_rows, self.rows)

    def vectors_file(self, part: int) -> Path:
        return self.directory / f"part_{part:05d}.npy"

    def record_file(self, part: int) -> Path:
        return self.directory / f"part_{part:05d}.json"

    def write(self, part: int, vectors: np.ndarray, name: Callable[[int], str], **facts: Any) -> None:
        """Store the vectors [n, D] (float32) of a part, whole or not at all.

        `name` turns a row of the table into words; `facts` (JSON) go into the part's record. Raises DataError: another shape, NaN
        or infinity (also where the stored type can't hold a number), naming the rows.
        """
        first, end = self.span(part)
        if vectors.shape != (end - first, self.dimensions):
            rule = f"{end - first} vectors of {self.dimensions} dimensions were expected"
            raise DataError(describe(str(self.vectors_file(part)), vectors.shape, rule, "Has the model changed meanwhile?"))
        stored = encode(vectors, self.dtype)
        norms = _norms(decode(stored, self.dtype))
        bad = np.flatnonzero(~np.isfinite(norms))
        if len(bad):
            shown = ", ".join(name(first + int(row)) for row in bad[:3]) + (", ..." if len(bad) > 3 else "")
            rule = f"every number of an embedding is finite as {self.dtype}"
            raise DataError(describe(f"{len(bad)} vectors ({shown})", "NaN or infinity", rule, "The model is broken for them."))
        with atomic_path(self.vectors_file(part)) as beside, open(beside, "wb") as file:
            np.save(file, stored)
        record = {
            "first": first,
            "rows": end - first,
            "sha256": hashlib.sha256(np.ascontiguousarray(stored).data.cast("B")).hexdigest(),
            "largest_norm": float(norms.max(initial=0.0)),
            "identity": self.identity,
            **facts,
        }
        write_json(self.record_file(part), record)

    def fact(self, part: int, key: str) -> Any:
        """What `write` was told of a finished part; None where it wasn't."""
        return read_json(self.record_file(part)).get(key)

    def finished(self, part: int) -> bool:
        """Whether a part has its record. It may be damaged: see `damage`."""
        return self.record_file(part).is_file()

    def damage(self, part: int) -> str | None:
        """What is wrong with a finished part, or None. Reads all of it. Raises DataError where it is of another store."""
        try:
            record = json.loads(self.record_file(part).read_text(encoding="utf-8"))
            identity, expected = record["identity"], record["sha256"]
        except (ValueError, KeyError, TypeError, OSError) as error:
            return f"{self.record_file(part)} can't be read: {error!r}"
        refuse_difference(str(self.record_file(part)), identity, self.identity)
        first, end = self.span(part)
        if (record["first"], record["rows"]) != (first, end - first):
            return f"{self.record_file(part)} is of rows {record['first']} to {record['first'] + record['rows'] - 1}"
        path = self.vectors_file(part)
        if not path.is_file():
            return f"{path} is missing"
        size = path.stat().st_size
        if size != self._header_bytes(path) + (end - first) * self.row_bytes:
            return f"{path} has {size} bytes for {end - first} vectors: truncated or not what was written"
        digest = hashlib.sha256()
        for piece in self._pieces(path):
            digest.update(piece)
        return None if digest.hexdigest() == expected else f"{path} is not what was written: another SHA-256"

    def largest_norm(self, part: int) -> float:
        """Length of the longest vector of a part."""
        return float(read_json(self.record_file(part))["largest_norm"])

    def check(self, parts: Iterator[int] | range) -> None:
        """Raise DataError where one of the parts isn't there or damaged."""
        for part in parts:
            reason = self.damage(part) if self.finished(part) else f"{self.vectors_file(part)} isn't finished"
            if reason is not None:
                raise DataError(f"{reason}. Encode again: parts that are whole stay.")

    def _header_bytes(self, path: Path) -> int:
        """Bytes before the first vector; 0 when the file isn't such an array."""
        with open(path, "rb") as file:
            try:
                np.lib.format.read_magic(file)
                shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
            except ValueError:
                return 0
            good = len(shape) == 2 and shape[1] == self.dimensions and not fortran and dtype == STORED[self.dtype]
            return file.tell() if good else 0

    def _pieces(self, path: Path) -> Iterator[bytes]:
        with open(path, "rb") as file:
            file.seek(self._header_bytes(path))
            while piece := file.read(PIECE_BYTES):
                yield piece


def open_store(directory: Path) -> Store:
    """A store that exists. Raises DataError: there is none, another format."""
    path = directory / "manifest.json"
    if not path.is_file():
        raise DataError(describe(str(directory), "no manifest.json", "not a store of embeddings", "Encode the set first."))
    manifest = read_json(path)
    found = manifest.get("format") if isinstance(manifest, dict) else manifest
    if found != FORMAT:
        raise DataError(describe(str(path), found, f"this version reads format {FORMAT}", "Encode again."))
    try:
        return Store(directory, manifest)
    except (KeyError, TypeError) as error:
        raise DataError(describe(str(path), repr(error), "not the manifest of a store of embeddings", "Encode again.")) from None


def make_store(directory: Path, identity: dict[str, Any], rows: int, dimensions: int, part_rows: int) -> Store:
    """Open the store of these vectors, or begin it where the folder is absent or empty.

    `identity` holds "dtype" (a key of STORED). `part_rows` counts for a new store only. Raises DataError: the folder holds
    something else, or vectors of another identity or dimension (the message says what differs).
    """
    if identity["dtype"] not in STORED:
        raise DataError(describe("dtype of embeddings", identity["dtype"], f"one of {', '.join(STORED)}"))
    if (directory / "manifest.json").is_file():
        store = open_store(directory)
        found = {**store.identity, "rows": store.rows, "dimensions": store.dimensions}
        refuse_difference(str(directory), found, {**identity, "rows": rows, "dimensions": dimensions})
        return store
    if directory.is_dir() and any(directory.iterdir()):
        remedy = "Choose another folder, or empty this one."
        raise DataError(describe(str(directory), "files but no manifest.json", "not a store of embeddings", remedy))
    manifest = {"format": FORMAT, "rows": rows, "dimensions": dimensions, "part_rows": part_rows, "identity": identity}
    write_json(directory / "manifest.json", manifest)
    return Store(directory, manifest)


def refuse_difference(where: str, stored: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise DataError with each `key: stored -> now` that differs."""
    lines = [f"{key}: {old!r} -> {new!r}" for key, old, new in _differing("", json.loads(json.dumps(stored)), now)]
    if lines:
        remedy = "Choose another folder for these embeddings, or remove this one."
        raise DataError(f"{where}: these are embeddings of something else: {'; '.join(lines)}. {remedy}")


def _differing(prefix: str, old: Any, new: Any) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted({*old, *new}):
            yield from _differing(f"{prefix}.{key}" if prefix else key, old.get(key), new.get(key))
    elif old != new:
        yield prefix, old, new


def _norms(vectors: np.ndarray) -> np.ndarray:
    """Length of each vector [n] float64, not finite where the vector isn't; a part's float64 copy is never held whole."""
    norms = np.empty(len(vectors))
    step = max(1, 2**21 // max(1, vectors.shape[1]))
    for start in range(0, len(vectors), step):
        rows = vectors[start : start + step].astype(np.float64)
        norms[start : start + step] = np.sqrt(np.einsum("nd,nd->n", rows, rows))
    return norms


def rows_of_parts(rows: int, world: int) -> int:
    """Rows of a part, the unit in which ranks take work: at least sixteen parts a rank where there are enough rows."""
    return min(16_384, max(16, -(-rows // (16 * world))))

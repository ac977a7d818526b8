"""Vectors that come block after block and are searched once: in memory while they fit a budget, else in a temporary store.

For vectors that nobody keeps: a model in training, a published encoder, vectors changed after the fact. Either way they are
rounded to the stored type, checked, and searched as `Shard`s. What is on disk goes with the `with` block.
Knows no model and no text.

Shapes: n vectors in all, D dimensions.
"""

import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from hybrid_scale.errors import HybridScaleError
from hybrid_scale.retrieval.index import Shard
from hybrid_scale.retrieval.store import STORED, Store, decode, encode, make_store
from hybrid_scale.retrieval.stored import StoredVectors

PART_ROWS = 16_384
PREFIX = ".vectors-"
"""Of the folder of one store."""


def remove_left(folder: Path) -> None:
    """Take away what processes left in `folder` that ended within a Spill, as a stop does. Nobody else may work there now."""
    for left in folder.glob(f"{PREFIX}*"):
        shutil.rmtree(left, ignore_errors=True)


class Spill:
    """Room for `rows` vectors of the type `dtype` (a key of store.STORED), on this rank alone.

    `memory_bytes`: up to this size they are held in memory; larger ones go to a folder made inside `folder`. `name` turns a row
    into words for error messages.
    """

    def __init__(self, rows: int, dtype: str, memory_bytes: float, folder: Path, name: Callable[[int], str]):
        self.rows, self.dtype, self.memory_bytes = rows, dtype, memory_bytes
        self.folder, self.name = folder, name
        self.filled = 0
        self._array: np.ndarray | None = None
        """All vectors, or those of the part that is being filled."""
        self._store: Store | None = None
        self._made: Path | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._array = None
        if self._made is not None:
            shutil.rmtree(self._made, ignore_errors=True)

    @property
    def on_disk(self) -> bool:
        return self._store is not None

    def extend(self, blocks: Iterable[np.ndarray]) -> Self:
        """Append all blocks. They are exhausted also after an error, for making them may be collective; then it is raised."""
        failure: Exception | None = None
        for block in blocks:
            try:
                if failure is None:
                    self.add(block)
            except (HybridScaleError, OSError) as error:
                failure = error
        if failure is not None:
            raise failure
        return self

    def add(self, vectors: np.ndarray) -> None:
        """Append float32 [m, D]; m may be 0, but the first call tells D. Raises DataError as Store.write does."""
        if self._array is None:
            self._begin(vectors.shape[1])
        assert self._array is not None
        assert self.filled + len(vectors) <= self.rows, "more vectors than there is room for"
        while len(vectors):
            at = self.filled % len(self._array)
            some = vectors[: len(self._array) - at]
            self._array[at : at + len(some)] = some if self._store else encode(some, self.dtype)
            self.filled += len(some)
            vectors = vectors[len(some) :]
            if self._store and (self.filled == self.rows or self.filled % PART_ROWS == 0):
                part = (self.filled - 1) // PART_ROWS
                first, end = self._store.span(part)
                self._store.write(part, self._array[: end - first], self.name)

    def shard(self, numbers: np.ndarray) -> Shard:
        """All vectors, row r being passage `numbers[r]`. Valid inside the `with` block. Raises DataError as Shard does."""
        assert self._array is not None, "not one vector was added, not even none of D dimensions"
        assert self.filled == self.rows, "fewer vectors than promised"
        if self._store is None:
            return Shard(numbers, decode(self._array[: self.rows], self.dtype), self.name)
        self._array = self._array[:0]
        vectors = StoredVectors(self._store, 0, self.rows, self.memory_bytes)
        return Shard(numbers, vectors, self.name, vectors.largest_norm(), vectors.block_bytes)

    def _begin(self, dimensions: int) -> None:
        if self.rows * dimensions * STORED[self.dtype].itemsize <= self.memory_bytes:
            self._array = np.empty((max(1, self.rows), dimensions), STORED[self.dtype])
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        self._made = Path(tempfile.mkdtemp(prefix=PREFIX, dir=self.folder))
        self._store = make_store(self._made, {"dtype": self.dtype}, self.rows, dimensions, PART_ROWS)
        self._array = np.empty((PART_ROWS, dimensions), np.float32)

"""A range of rows of a store as an array that is read when asked for: from memory where it fits a budget, else from disk.

Disk reads go to buffers of their own instead of a memory map, whose pages would count as this process's memory.
Knows no score, no text and no rank.

Shapes: N rows of the range, D dimensions.
"""

import os
from typing import Any

import numpy as np

from hybrid_scale.retrieval.store import STORED, Store, decode


class StoredVectors:
    """Rows `first` to `end` - 1 of a store. `[slice]` and `[integer array]` give float16 or float32 (bfloat16 as float32).

    `memory_bytes`: hold the range in memory if it needs no more. Parts must be finished and whole (`Store.check`).
    """

    def __init__(self, store: Store, first: int, end: int, memory_bytes: float):
        self.store, self.first = store, first
        self.shape = (end - first, store.dimensions)
        self.ndim = 2
        self.dtype = np.dtype(np.float16 if store.dtype == "float16" else np.float32)
        self.memory_bytes = memory_bytes
        self._held: np.ndarray | None = None
        if (end - first) * store.row_bytes <= memory_bytes:
            self._held = self._read(0, len(self))

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Any) -> np.ndarray:
        if self._held is not None:
            return decode(self._held[rows], self.store.dtype)
        if isinstance(rows, slice):
            start, end, step = rows.indices(len(self))
            assert step == 1
            return decode(self._read(start, end), self.store.dtype)
        return decode(self._gather(np.asarray(rows)), self.store.dtype)

    @property
    def in_memory(self) -> bool:
        return self._held is not None

    @property
    def block_bytes(self) -> int | None:
        """float32 bytes of a block such that it and what is read for it take half of the budget; None: any size."""
        if self.in_memory:
            return None
        item = STORED[self.store.dtype].itemsize
        return max(4 * self.shape[1], int(self.memory_bytes / 2 * 4 / (4 + item * (3 if self.store.dtype == "bfloat16" else 1))))

    def largest_norm(self) -> float:
        """Of the vectors of the parts that the range touches: at least that of the range."""
        return max((self.store.largest_norm(part) for part, _, _ in self._places(0, len(self))), default=0.0)

    def _places(self, start: int, end: int) -> list[tuple[int, int, int]]:
        """(part, its rows from, to) of rows `start` to `end` - 1 of the range."""
        places = []
        row, stop = self.first + start, self.first + end
        while row < stop:
            part = row // self.store.part_rows
            first, behind = self.store.span(part)
            places.append((part, row - first, min(stop, behind) - first))
            row = behind
        return places

    def _read(self, start: int, end: int) -> np.ndarray:
        """Rows in one new array; the system is told to fetch as many behind them."""
        out = np.empty((max(0, end - start), self.shape[1]), STORED[self.store.dtype])
        at = 0
        for part, first, behind in self._places(start, end):
            view = out[at : at + behind - first].reshape(-1).view(np.uint8)
            self._read_into(part, first, view)
            at += behind - first
        if self._held is None and end < len(self) and hasattr(os, "posix_fadvise"):
            self._announce(end, min(len(self), 2 * end - start))
        return out

    def _read_into(self, part: int, first: int, buffer: np.ndarray) -> None:
        with open(self.store.vectors_file(part), "rb", buffering=0) as file:
            file.seek(self._offset(file.fileno(), part) + first * self.store.row_bytes)
            view, done = buffer.data, 0
            while done < len(view):
                got = file.readinto(view[done:])
                if not got:
                    raise OSError(f"{self.store.vectors_file(part)} ended early: it changed while it was read")
                done += got

    def _offset(self, descriptor: int, part: int) -> int:
        """Bytes before the first vector of a part: the header, whatever its length."""
        first, end = self.store.span(part)
        return os.fstat(descriptor).st_size - (end - first) * self.store.row_bytes

    def _announce(self, start: int, end: int) -> None:
        for part, first, behind in self._places(start, end):
            with open(self.store.vectors_file(part), "rb", buffering=0) as file:
                begin = self._offset(file.fileno(), part) + first * self.store.row_bytes
                os.posix_fadvise(file.fileno(), begin, (behind - first) * self.store.row_bytes, os.POSIX_FADV_WILLNEED)

    def _gather(self, rows: np.ndarray) -> np.ndarray:
        """Single rows, each read once, part by part: integer array of any shape -> the same shape + [D]."""
        wanted, place = np.unique(rows, return_inverse=True)
        out = np.empty((len(wanted), self.shape[1]), STORED[self.store.dtype])
        bytes_of = out.view(np.uint8)
        part_of = (wanted + self.first) // self.store.part_rows
        for part in np.unique(part_of):
            chosen = np.flatnonzero(part_of == part)
            offsets = (wanted[chosen] + self.first - self.store.span(int(part))[0]) * self.store.row_bytes
            with open(self.store.vectors_file(int(part)), "rb", buffering=0) as file:
                header = self._offset(file.fileno(), int(part))
                for row, offset in zip(chosen.tolist(), offsets.tolist(), strict=True):
                    if os.preadv(file.fileno(), [bytes_of[row].data], header + offset) != self.store.row_bytes:
                        raise OSError(f"{file.name} ended early: it changed while it was read")
        return out[place.reshape(rows.shape)]

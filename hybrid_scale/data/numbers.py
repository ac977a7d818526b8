"""Numbers for millions of texts in little memory: a hash table of digests in flat arrays.

A dict of 100 million ids takes 20 GB and more; this takes 24 to 48 bytes an entry, whatever the texts' length. Texts are told
apart by 96 bits of BLAKE2b: for 1e9 texts the chance of one mistake is 6e-12. Knows no record.
"""

import hashlib
import struct
from array import array

import numpy as np

EMPTY = -1
MOST = 2**31 - 1
_PARTS = struct.Struct("<QI")
Key = tuple[int, int]


def key_of(text: str) -> Key:
    """The first 64 and the next 32 bits of the text's digest."""
    first, second = _PARTS.unpack(hashlib.blake2b(text.encode("utf-8"), digest_size=_PARTS.size).digest())
    return first, second


class Numbers:
    """Key of a text -> whole number from 0 to MOST. Open addressing with linear probing, at most two thirds full."""

    def __init__(self) -> None:
        self.count = 0
        self._resize(1 << 10)

    def _resize(self, slots: int) -> None:
        self.mask = slots - 1
        self.first, self.second = array("Q", bytes(8 * slots)), array("I", bytes(4 * slots))
        self.numbers = array("i", b"\xff" * (4 * slots))

    def get(self, key: Key) -> int | None:
        """The number of a key, None for an unknown one."""
        number = self.numbers[self._slot(*key)]
        return None if number == EMPTY else number

    def setdefault(self, key: Key, number: int) -> int:
        """The number of a key, which becomes `number` where it has none."""
        slot = self._slot(*key)
        if self.numbers[slot] != EMPTY:
            return self.numbers[slot]
        self.first[slot], self.second[slot] = key
        self.numbers[slot] = number
        self.count += 1
        if 3 * self.count > 2 * (self.mask + 1):
            self._grow()
        return number

    def _slot(self, first: int, second: int) -> int:
        """Where the key stands, or the free slot where it would."""
        mask, firsts, seconds, numbers = self.mask, self.first, self.second, self.numbers
        slot = first & mask
        while numbers[slot] != EMPTY and (firsts[slot] != first or seconds[slot] != second):
            slot = (slot + 1) & mask
        return slot

    def _grow(self) -> None:
        """Twice the slots. All entries are placed at once; those that find their slot taken try the next, together."""
        before = self._views()
        held = np.flatnonzero(before[2] != EMPTY)
        first, second, number = (view[held] for view in before)
        self._resize(2 * (self.mask + 1))
        mask, one = np.uint64(self.mask), np.uint64(1)
        at = first & mask
        owner = np.full(self.mask + 1, EMPTY, np.int32)
        waiting = np.arange(len(held))
        while len(waiting):
            free = waiting[owner[at[waiting]] == EMPTY]
            owner[at[free]] = free  # of several that want one slot, one remains
            waiting = waiting[owner[at[waiting]] != waiting]
            at[waiting] = (at[waiting] + one) & mask
        for view, values in zip(self._views(), (first, second, number), strict=True):
            view[at] = values

    def _views(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The arrays as NumPy sees them, without a copy."""
        return (
            np.frombuffer(self.first, np.uint64),
            np.frombuffer(self.second, np.uint32),
            np.frombuffer(self.numbers, np.int32),
        )


class Places:
    """`file:line` of many rows, 12 bytes each: lines as numbers, files named once."""

    def __init__(self) -> None:
        self.files: dict[str, int] = {}
        self.names: list[str] = []
        self.file, self.line = array("i"), array("q")

    def append(self, where: str) -> None:
        name, colon, line = where.rpartition(":")
        if not colon or not (line.isascii() and line.isdigit()) or line != str(int(line)):
            name, line = where, "-1"
        number = self.files.setdefault(name, len(self.names))
        if number == len(self.names):
            self.names.append(name)
        self.file.append(number)
        self.line.append(int(line))

    def __getitem__(self, row: int) -> str:
        name, line = self.names[self.file[row]], self.line[row]
        return name if line < 0 else f"{name}:{line}"

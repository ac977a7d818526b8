"""The corpus of an index compression study, read in blocks: wherever its vectors lie, no copy of all of them is made.

Knows no index, no judgment and no rank.

Shapes: n vectors, D dimensions.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from hybrid_scale.retrieval.index import Vectors

BLOCK_BYTES = 2**26
"""float32 bytes of the vectors that are given out at a time."""
SAMPLE_BYTES = 2**30
"""float32 bytes of the vectors from which codes, cells and ranges are learned."""


@dataclass(frozen=True)
class Corpus:
    """Vectors [n, D], float16 or float32, in memory, memory-mapped or in a store."""

    vectors: Vectors

    def __len__(self) -> int:
        return self.vectors.shape[0]

    @property
    def dimensions(self) -> int:
        return self.vectors.shape[1]

    def blocks(self, block_bytes: int = BLOCK_BYTES) -> Iterator[np.ndarray]:
        """All vectors in order, float32 [m, D]."""
        rows = max(1, block_bytes // (4 * self.dimensions))
        for start in range(0, len(self), rows):
            yield np.ascontiguousarray(self.vectors[start : min(start + rows, len(self))], np.float32)

    def sample(self, sample_bytes: int = SAMPLE_BYTES) -> np.ndarray:
        """All vectors, or as many as `sample_bytes` hold at equal distances: float32 [m, D]."""
        rows = max(1, min(len(self), sample_bytes // (4 * self.dimensions)))
        if rows == len(self):
            return np.ascontiguousarray(self.vectors[0 : len(self)], np.float32)
        return np.ascontiguousarray(self.vectors[np.arange(rows) * len(self) // rows], np.float32)

    def rows(self, rows: np.ndarray) -> np.ndarray:
        """Single vectors in their stored type: integers [...] -> [..., D]; the first vector where a row is -1."""
        return self.vectors[np.maximum(rows, 0)]

    def mean(self) -> np.ndarray:
        """float32 [D]"""
        total = np.zeros(self.dimensions)
        for block in self.blocks():
            total += block.sum(0, dtype=np.float64)
        return (total / max(1, len(self))).astype(np.float32)

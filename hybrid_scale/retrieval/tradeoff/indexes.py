"""Indexes that answer a search, behind one interface: rows of the best vectors, and the bytes they occupy.

Scores are inner products. How an index is built and named is in variants.py. Knows no text and no judgment.

Shapes: n vectors, D dimensions, Q queries.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import faiss
import numpy as np

from hybrid_scale.retrieval.tradeoff.corpus import Corpus

GATHERED = 2**24
"""Numbers gathered at a time when results are scored again."""


class Index(Protocol):
    """What the study asks of an index."""

    def search(self, queries: np.ndarray, k: int) -> np.ndarray:
        """Rows of the `k` best vectors, best first: int64 [Q, k], -1 where fewer were found."""
        ...

    @property
    def bytes(self) -> int:
        """What it occupies, as serialised."""
        ...


@dataclass(frozen=True)
class Faiss:
    """An index of faiss on the CPU."""

    index: Any

    def search(self, queries: np.ndarray, k: int) -> np.ndarray:
        return self.index.search(queries, k)[1]

    @property
    def bytes(self) -> int:
        return serialised(self.index)


def serialised(index: Any, write: Callable[[Any, Any], None] = faiss.write_index) -> int:
    """Bytes of an index as faiss writes it, counted as they come: the copy is never held."""
    count = 0

    def take(piece: bytes) -> int:
        nonlocal count
        count += len(piece)
        return len(piece)

    library: Any = faiss  # the stubs lack its writers
    write(index, library.PyCallbackIOWriter(take))
    return count


@dataclass(frozen=True)
class OnGpu:
    """An index of faiss on the GPU; its size is that of its copy on the CPU."""

    index: Any

    def search(self, queries: np.ndarray, k: int) -> np.ndarray:
        return self.index.search(queries, k)[1]

    @property
    def bytes(self) -> int:
        return serialised(faiss.index_gpu_to_cpu(self.index))


@dataclass(frozen=True)
class Binary:
    """Signs of centred and rotated vectors, searched by Hamming distance."""

    mean: np.ndarray
    rotation: Any
    index: Any

    def search(self, queries: np.ndarray, k: int) -> np.ndarray:
        return self.index.search(signs(self.mean, self.rotation, queries), k)[1].astype(np.int64)

    @property
    def bytes(self) -> int:
        tables = 4 * self.rotation.d_in * self.rotation.d_out + self.mean.nbytes
        return serialised(self.index, faiss.write_index_binary) + tables


def signs(mean: np.ndarray, rotation: Any, vectors: np.ndarray) -> np.ndarray:
    """One bit a rotated dimension, packed: uint8 [n, bits / 8]."""
    return np.packbits(rotation.apply(vectors - mean) > 0, axis=1)


@dataclass(frozen=True)
class Reduced:
    """Vectors in fewer dimensions; `reduce` does to queries what was done to the corpus."""

    reduce: Callable[[np.ndarray], np.ndarray]
    index: Faiss
    tables: int
    """Bytes of what `reduce` needs."""

    def search(self, queries: np.ndarray, k: int) -> np.ndarray:
        return self.index.search(self.reduce(queries), k)

    @property
    def bytes(self) -> int:
        return self.index.bytes + self.tables


@dataclass(frozen=True)
class Rescored:
    """`factor` * k results of another index, put in the order of their fp16 vectors' scores.

    The vectors are read from where the corpus lies: memory or disk.
    """

    first: Index
    corpus: Corpus
    factor: int

    def search(self, queries: np.ndarray, k: int) -> np.ndarray:
        rows = self.first.search(queries, min(self.factor * k, len(self.corpus)))
        best = np.empty((len(queries), min(k, rows.shape[1])), np.int64)
        step = max(1, GATHERED // (rows.shape[1] * self.corpus.dimensions))
        for start in range(0, len(queries), step):
            some = rows[start : start + step]
            held = self.corpus.rows(some).astype(np.float16, copy=False).astype(np.float32)
            scores = np.einsum("qd,qkd->qk", queries[start : start + step], held)
            order = np.argsort(-np.where(some >= 0, scores, -np.inf), axis=1, kind="stable")[:, : best.shape[1]]
            best[start : start + step] = np.take_along_axis(some, order, axis=1)
        return best

    @property
    def bytes(self) -> int:
        return self.first.bytes + 2 * len(self.corpus) * self.corpus.dimensions


def set_threads(threads: int) -> None:
    """How many threads searching and building may use."""
    faiss.omp_set_num_threads(threads)

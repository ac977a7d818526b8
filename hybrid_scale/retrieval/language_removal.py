"""Take a text's language out of its vector, after training: two ways that need no gradient.

    language_mean   v - mean of the vectors of its language, then unit length
    lir             v - its projection on the first r right singular vectors of its language's matrix (uncentred), then unit
                    length: "Language Information Removal", Yang, Yang, Cer and Darve, EMNLP 2021 (2109.04727)

Both are fitted on the vectors that they are applied to, queries and passages apart: they need every text's language, and they
see the test set's texts though never its judgments (transductive). `fitted_on` in the result says so.
Each rank holds a share of the corpus and all queries; the fit is the same on any number of ranks, to rounding.
Knows no model and no measure.

Shapes: n vectors, D dimensions, L languages, r directions.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from hybrid_scale import dist
from hybrid_scale.errors import DataError, describe
from hybrid_scale.retrieval.index import Vectors

BLOCK_ROWS = 4096
LANGUAGE_MEAN, LIR = "language_mean", "lir"


@dataclass(frozen=True)
class Removal:
    """`language_mean`, or `lir` with the number of directions removed."""

    method: str
    directions: int = 1

    @property
    def name(self) -> str:
        return f"{self.method}-{self.directions}" if self.method == LIR else self.method


def parse(text: str) -> Removal:
    """`language_mean`, `lir` (one direction) or `lir:R`. Raises DataError."""
    method, colon, number = text.partition(":")
    if text == LANGUAGE_MEAN:
        return Removal(LANGUAGE_MEAN)
    if method != LIR or (colon and not (number.isdecimal() and int(number) > 0)):
        raise DataError(describe("post-processing", text, f"must be {LANGUAGE_MEAN}, {LIR} or {LIR}:R with R above 0"))
    return Removal(LIR, int(number) if colon else 1)


def fit_and_remove(
    vectors: Vectors, language: np.ndarray, languages: int, removal: Removal, shared: bool
) -> Iterator[np.ndarray]:
    """New unit vectors for `vectors` [n, D] whose language numbers are `language` [n]: blocks of float32 [m, D], in order.

    `shared`: every rank passes its own part of the rows (the corpus), and the fit adds over ranks (collective); else all ranks
    pass the same rows (the queries). A vector that is nothing but its language becomes zero. Raises DataError: as many
    directions as dimensions.
    """
    if removal.method == LANGUAGE_MEAN:
        means = _means(vectors, language, languages, shared)
        return _by_block(vectors, language, lambda block, row: block - means[row])
    if removal.directions >= vectors.shape[1]:
        rule = f"fewer than the {vectors.shape[1]} dimensions"
        raise DataError(describe("lir directions", removal.directions, rule))
    axes = _directions(vectors, language, languages, removal.directions, shared)
    return _by_block(vectors, language, lambda block, row: block - _projection(block, row, axes))


def _means(vectors: Vectors, language: np.ndarray, languages: int, shared: bool) -> np.ndarray:
    """float64 [L, D]; a language without vectors has zeros."""
    sums, counts = np.zeros((languages, vectors.shape[1])), np.bincount(language, minlength=languages).astype(np.float64)
    for block in _blocks(len(language)):
        np.add.at(sums, language[block], np.asarray(vectors[block], np.float64))
    if shared:
        sums, counts = dist.sum_array(sums), dist.sum_array(counts)
    return sums / np.maximum(counts, 1)[:, None]


def _directions(vectors: Vectors, language: np.ndarray, languages: int, count: int, shared: bool) -> np.ndarray:
    """The first right singular vectors of each language's matrix, from its Gram matrix: float64 [L, r, D]."""
    axes = np.zeros((languages, count, vectors.shape[1]))
    for number in range(languages):
        gram = np.zeros((vectors.shape[1],) * 2)
        rows = np.flatnonzero(language == number)
        for block in _blocks(len(rows)):
            some = np.asarray(vectors[rows[block]], np.float64)
            gram += some.T @ some
        gram = dist.sum_array(gram) if shared else gram
        values, columns = np.linalg.eigh(gram)
        found = columns[:, ::-1][:, :count].T
        axes[number] = found * (values[::-1][:count, None] > 0)  # fewer texts than directions: the others remove nothing
    return axes


def _projection(block: np.ndarray, language: np.ndarray, axes: np.ndarray) -> np.ndarray:
    result = np.empty_like(block)
    for number in np.unique(language):
        here = language == number
        result[here] = (block[here] @ axes[number].T) @ axes[number]
    return result


def _by_block(
    vectors: Vectors, language: np.ndarray, change: Callable[[np.ndarray, np.ndarray], np.ndarray]
) -> Iterator[np.ndarray]:
    """`change` of each block of rows (float64, with its languages), then unit length. At least one block, be it empty."""
    for block in _blocks(len(language)) or [slice(0, 0)]:
        changed = change(np.asarray(vectors[block], np.float64), language[block])
        length = np.sqrt(np.einsum("nd,nd->n", changed, changed))[:, None]
        yield np.divide(changed, length, out=np.zeros_like(changed), where=length > 1e-6).astype(np.float32)


def _blocks(rows: int) -> list[slice]:
    return [slice(start, min(start + BLOCK_ROWS, rows)) for start in range(0, rows, BLOCK_ROWS)]

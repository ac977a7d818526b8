"""Exact search over a corpus that is divided among ranks, and ranks of given passages by counting.

Each rank holds a shard: any subset of the corpus, together they hold every passage once. Every rank passes *all* queries (they
are few) and gets the whole answer. Answers follow the canonical order (scores.py): ids and scores are the same for any
number of shards and however passages are dealt to them.
Knows no text, no metric and no file.

Shapes: Q queries, n passages of a shard, D dimensions, J judged pairs, C languages.
"""

import importlib
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import faiss
import numpy as np
import torch
from torch import Tensor

from hybrid_scale import dist, gpu
from hybrid_scale.errors import DataError, describe
from hybrid_scale.retrieval.scores import (
    EMPTY,
    NUMBER_LIMIT,
    beaten_by,
    block_scores,
    float32_slack,
    pack,
    pair_scores,
    unpack,
)

# Below its threshold faiss leaves BLAS: 3 to 17 times slower for small batches.
faiss.cvar.distance_compute_blas_threshold = 1

MARGIN = 32
"""Candidates beyond k that the first attempt re-scores."""
WIDEST = 2048
"""Most candidates of a query that faiss is asked for (its limit on GPUs); wider lists come from a full scan."""
LARGEST_SCORE = 1e37
"""Scores beyond it could overflow float32."""
BLOCK_BYTES = 2**28 if gpu.present() else 2**26
"""Vectors converted to float32 at a time."""
CELLS = 2**24 if gpu.present() else 2**20
"""Numbers in one working array: scores of a block, vectors to re-score, keys between ranks (on a CPU 8 MiB, about its cache)."""


# ------------------------------------------------------------------------------------------------------------- shards


class Vectors(Protocol):
    """A NumPy array, or what gives one for a slice of rows and for an integer array of rows."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def ndim(self) -> int: ...

    @property
    def dtype(self) -> np.dtype[Any]: ...

    def __getitem__(self, rows: Any, /) -> np.ndarray: ...


class Shard:
    """Passage numbers int64 [n] and their vectors float16 or float32 [n, D] (may lie on disk), finite throughout.

    `name` turns a row of the shard into words for error messages. `largest_norm` (of all vectors, or more), where it is
    known, saves reading them all. `block_bytes`: float32 bytes of vectors to convert at a time, if less than BLOCK_BYTES.
    Raises DataError on shapes, types or numbers that don't fit, on NaN and on infinity.
    """

    def __init__(
        self,
        numbers: np.ndarray,
        vectors: Vectors,
        name: Callable[[int], str] | None = None,
        largest_norm: float | None = None,
        block_bytes: int | None = None,
    ):
        self.numbers = np.asarray(numbers, np.int64)
        self.vectors = vectors
        self.name = name or (lambda row: f"passage {self.numbers[row]}")
        self.block_bytes = block_bytes
        self._check_shape()
        self.largest_norm = self._largest_norm() if largest_norm is None else largest_norm
        rising = bool((self.numbers[1:] > self.numbers[:-1]).all())
        self._order = None if rising else np.argsort(self.numbers, kind="stable")
        self._check_numbers()

    def __len__(self) -> int:
        return len(self.numbers)

    def blocks(self, rows: int) -> Iterator[slice]:
        """Consecutive slices of at most `rows` rows."""
        return (slice(start, min(start + rows, len(self))) for start in range(0, len(self), rows))

    def locate(self, numbers: np.ndarray) -> np.ndarray:
        """Row of each passage number in this shard, -1 where it isn't held."""
        if not len(self):
            return np.full(len(numbers), -1, np.int64)
        place = np.minimum(np.searchsorted(self.numbers, numbers, sorter=self._order), len(self) - 1)
        row = place if self._order is None else self._order[place]
        return np.where(self.numbers[row] == numbers, row, -1)

    def _check_shape(self) -> None:
        found = f"{self.vectors.dtype} {self.vectors.shape} for {self.numbers.shape} numbers"
        if self.vectors.dtype not in (np.float16, np.float32) or self.vectors.ndim != 2 or self.vectors.shape[1] < 1:
            raise DataError(describe("shard", found, "vectors are float16 or float32 with shape [passages, dimensions]"))
        if self.numbers.shape != self.vectors.shape[:1]:
            raise DataError(describe("shard", found, "every passage number has one vector"))

    def _check_numbers(self) -> None:
        ordered = self.numbers if self._order is None else self.numbers[self._order]
        if len(ordered) and (ordered[0] < 0 or ordered[-1] >= NUMBER_LIMIT):
            raise DataError(describe("shard", f"passage numbers {ordered[0]} to {ordered[-1]}", f"0 <= number < {NUMBER_LIMIT}"))
        twice = ordered[1:][ordered[1:] == ordered[:-1]]
        if len(twice):
            raise DataError(describe("shard", f"passage {twice[0]} twice", "a passage is held once"))

    def _largest_norm(self) -> float:
        largest = 0.0
        for block in self.blocks(max(1, CELLS // self.vectors.shape[1])):
            vectors = np.asarray(self.vectors[block], np.float64)
            squares = np.einsum("nd,nd->n", vectors, vectors)
            if not np.isfinite(squares).all():
                row = block.start + int(np.flatnonzero(~np.isfinite(squares))[0])
                column = int(np.flatnonzero(~np.isfinite(self.vectors[row]))[0])
                found = float(self.vectors[row, column])
                raise DataError(describe(f"{self.name(row)}, dimension {column}", found, "vectors are finite"))
            largest = max(largest, float(np.sqrt(squares.max(initial=0.0))))
        return largest


class _Rows:
    """Some rows of vectors, read when they are asked for."""

    def __init__(self, vectors: Vectors, rows: np.ndarray):
        self.vectors, self.rows = vectors, rows
        self.shape, self.ndim, self.dtype = (len(rows), *vectors.shape[1:]), vectors.ndim, vectors.dtype

    def __getitem__(self, rows: Any, /) -> np.ndarray:
        return self.vectors[self.rows[rows]]


def part_of(shard: Shard, rows: np.ndarray) -> Shard:
    """Some rows [m] of a shard as a shard; vectors on disk stay there."""
    numbers, name = shard.numbers[rows], lambda row: shard.name(int(rows[row]))
    return Shard(numbers, _Rows(shard.vectors, rows), name, shard.largest_norm, shard.block_bytes)


def _checked(queries: np.ndarray, shards: Sequence[Shard]) -> np.ndarray:
    """The queries as float32, after the checks that every rank makes alike."""
    queries = np.ascontiguousarray(queries, np.float32)
    dist.agree("the query matrix", (queries.shape, zlib.crc32(queries.data)))
    if queries.ndim != 2:
        raise DataError(describe("queries", f"shape {queries.shape}", "a matrix [queries, dimensions] is needed"))
    lengths = np.sqrt(np.einsum("qd,qd->q", queries, queries, dtype=np.float64))
    if not np.isfinite(lengths).all():
        raise DataError(describe(f"query {np.flatnonzero(~np.isfinite(lengths))[0]}", "NaN or infinity", "vectors are finite"))
    held = [fact for facts in dist.gather_objects([(s.vectors.shape[1], s.largest_norm) for s in shards]) for fact in facts]
    if {dimensions for dimensions, _ in held} != {queries.shape[1]}:
        rule = f"the queries have {queries.shape[1]} dimensions"
        raise DataError(describe("shards", sorted({dimensions for dimensions, _ in held}), rule))
    largest = max(norm for _, norm in held) * float(lengths.max(initial=0.0))
    if largest > LARGEST_SCORE:
        raise DataError(describe("vectors", f"scores up to {largest:.3g}", "float32 scores overflow", "Normalise the vectors."))
    return queries


# ------------------------------------------------------------------------------------------------------------- search


def search(queries: np.ndarray, shard: Shard, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The best `k` passages of the whole corpus: scores float32 and passage numbers int64, [Q, min(k, corpus size)].

    All ranks call it together with the same queries and get the same answer, best first, ties by the lower number.
    """
    return search_shards(queries, [shard], k)


def search_shards(queries: np.ndarray, shards: Sequence[Shard], k: int) -> tuple[np.ndarray, np.ndarray]:
    """As `search`, for a rank that holds several shards.

    Queries whose answer isn't certain (a passage left out could still belong to it) are searched again with twice the margin.
    """
    if k < 1:
        raise ValueError(f"k is {k}: at least one passage must be asked for")
    queries = _checked(queries, shards)
    k = min(k, int(dist.sum_array(np.array([sum(len(shard) for shard in shards)]))[0]))
    best = torch.full((len(queries), k), EMPTY)
    pending, margin = np.arange(len(queries) if k else 0), MARGIN
    while len(pending):
        parts = [_shard_answer(queries[pending], shard, k, k + margin) for shard in shards]
        keys, certain = _merge_over_ranks(parts, k)
        best[pending[certain]] = keys[certain]
        pending, margin = pending[~certain], 2 * margin
    if (best[:, 1:] == best[:, :-1]).any():
        raise DataError(describe("shards", "a passage in two shards", "together the shards hold every passage once"))
    scores, numbers = unpack(best)
    return scores.numpy(), numbers.numpy()


def merge(parts: Sequence[Tensor], k: int) -> Tensor:
    """Answers of several shards -> the answer of all of them.

    An answer is int64 [Q, k + 1]: the k best keys in falling order (EMPTY where the shard has fewer passages), then a key
    that no passage left out exceeds. So an answer is certain where column k - 1 exceeds column k.
    """
    keys = torch.cat([part[:, :k] for part in parts], dim=1).topk(k, dim=1).values
    rest = torch.stack([part[:, k] for part in parts]).amax(0)
    return torch.cat([keys, rest[:, None]], dim=1)


def _merge_over_ranks(parts: Sequence[Tensor], k: int) -> tuple[Tensor, np.ndarray]:
    """Keys [Q, k] of the whole corpus, and which queries they are certain for."""
    mine, world = merge(parts, k), dist.world_size()
    merged = []
    for chunk in mine.split(max(1, CELLS // (world * (k + 1)))):
        rows = dist.gather_rows(chunk.to(dist.device()), [len(chunk)] * world).cpu()
        merged.append(merge(rows.split(len(chunk)), k))
    whole = torch.cat(merged)
    return whole[:, :k], (whole[:, k - 1] > whole[:, k]).numpy()


def _shard_answer(queries: np.ndarray, shard: Shard, k: int, width: int) -> Tensor:
    """One shard's answer (see `merge`) from its `width` best candidates."""
    width = min(width, len(shard))
    if width > WIDEST:
        keys, rest = _scan(queries, shard, k), torch.full((len(queries), 1), EMPTY)
    else:
        approximate, rows = _candidates(queries, shard, width)
        keys = _rescored(queries, shard, rows).topk(min(k, width), dim=1).values
        rest = _rest(queries, shard, approximate)
    missing = torch.full((len(queries), k - keys.shape[1]), EMPTY)
    return torch.cat([keys, missing, rest], dim=1)


def _candidates(queries: np.ndarray, shard: Shard, width: int) -> tuple[np.ndarray, np.ndarray]:
    """The `width` best rows of a shard by float32 score, in no order: approximate scores and rows, [Q, width]."""
    scores, rows = np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64)
    block_size = max(1, min(BLOCK_BYTES, shard.block_bytes or BLOCK_BYTES) // (4 * queries.shape[1]))
    # One copy's memory for all blocks: new pages for each would cost a tenth of the search.
    space = np.empty((0 if _on_gpu() else min(block_size, len(shard)), queries.shape[1]), np.float32)
    for block in shard.blocks(block_size):
        block_best, block_rows = _nearest(queries, shard.vectors[block], min(width, block.stop - block.start), space)
        scores, rows = np.hstack([scores, block_best]), np.hstack([rows, block_rows + block.start])
        if scores.shape[1] > width:
            kept = np.argpartition(scores, -width, axis=1)[:, -width:]
            scores, rows = np.take_along_axis(scores, kept, 1), np.take_along_axis(rows, kept, 1)
    return scores, rows


def _nearest(queries: np.ndarray, vectors: np.ndarray, k: int, space: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """faiss on this rank's GPU or CPU: float32 scores and rows, [Q, k]. `space`: where the CPU may put a float32 copy."""
    if not _on_gpu():
        if vectors.dtype != np.float32:
            np.copyto(space[: len(vectors)], vectors)
            vectors = space[: len(vectors)]
        return faiss.knn(queries, vectors, k, metric=faiss.METRIC_INNER_PRODUCT)
    importlib.import_module("faiss.contrib.torch_utils")  # teaches knn_gpu torch tensors
    on_gpu = torch.from_numpy(np.array(vectors)).to(dist.device()).float()
    scores, rows = faiss.knn_gpu(
        _gpu_resources(), torch.from_numpy(queries).to(dist.device()), on_gpu, k, metric=faiss.METRIC_INNER_PRODUCT
    )
    return scores.cpu().numpy(), rows.cpu().numpy()


def _on_gpu() -> bool:
    return gpu.present() and faiss.get_num_gpus() > 0


_resources: list[Any] = []


def _gpu_resources() -> Any:
    """faiss's scratch memory (1.5 GiB), allocated once a process."""
    if not _resources:
        _resources.append(faiss.StandardGpuResources())
    return _resources[0]


def _rescored(queries: np.ndarray, shard: Shard, rows: np.ndarray) -> Tensor:
    """Canonical keys of candidate rows: [Q, width] -> int64 [Q, width]."""
    keys = torch.empty(rows.shape, dtype=torch.int64)
    for part in _parts(len(rows), max(1, CELLS // max(1, rows.shape[1] * queries.shape[1]))):
        vectors = torch.from_numpy(shard.vectors[rows[part]]).to(dist.device())  # [part, width, D]
        scores = pair_scores(torch.from_numpy(queries[part, None]).to(dist.device()), vectors).cpu()
        keys[part] = pack(scores, torch.from_numpy(shard.numbers[rows[part]]))
    return keys


def _rest(queries: np.ndarray, shard: Shard, approximate: np.ndarray) -> Tensor:
    """A key that no passage outside the candidates exceeds: [Q, 1]."""
    if approximate.shape[1] == len(shard):
        return torch.full((len(queries), 1), EMPTY)
    slack = float32_slack(torch.from_numpy(queries), shard.largest_norm, _rounding_units())
    highest = torch.from_numpy(approximate.min(1)).double() + slack
    above = torch.nextafter(highest.float(), torch.tensor(torch.inf))
    return pack(above, torch.tensor(0))[:, None]


def _scan(queries: np.ndarray, shard: Shard, k: int) -> Tensor:
    """The k best keys of a shard from the canonical scores of all its passages: [Q, min(k, n)].

    For the rare queries with thousands of passages tied at the cut (a collapsed model, copies) and for very large k.
    """
    best = torch.full((len(queries), min(k, len(shard))), EMPTY)
    width = max(1, int(CELLS**0.5))
    for block in shard.blocks(width):
        vectors, numbers = _exact(shard.vectors[block]), torch.from_numpy(shard.numbers[block])
        for part in _parts(len(queries), max(1, CELLS // (width + best.shape[1]))):
            keys = pack(block_scores(_exact(queries[part]), vectors).cpu(), numbers)
            best[part] = torch.cat([best[part], keys], dim=1).topk(best.shape[1], dim=1).values
    return best


def _rounding_units() -> float:
    """Rounding of one float32 addition in half units in the last place: tensor cores may be twice as coarse as IEEE."""
    return 2.0 if gpu.present() else 1.0


def _exact(vectors: np.ndarray) -> Tensor:
    return _on_device(vectors).double()


def _on_device(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(array)).to(dist.device())  # np.array: torch wants it writable


def _parts(rows: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


# ----------------------------------------------------------------------------------------------------------- counting


def count_above(
    queries: np.ndarray, shard: Shard, query: np.ndarray, passage: np.ndarray, language: np.ndarray, languages: int
) -> np.ndarray:
    """For each judged pair (`query` row, `passage` number, both [J]): how many passages of each language rank above it.

    `language` [n] is the number of the language of each passage of the shard, below `languages`. Returns int64 [J, C], equal
    on all ranks. The rank of a judged passage in the whole corpus is 1 + the sum of its row; among the passages of language
    c (and itself) it is 1 + column c. Exact at any depth without a list of results.

    Raises DataError when a judged passage isn't held by exactly one rank.
    """
    queries = _checked(queries, [shard])
    wanted = judged_keys(queries, shard, query, passage)
    return dist.sum_array(count_in_shard(queries, shard, query, wanted, language, languages))


def count_in_shard(
    queries: np.ndarray, shard: Shard, query: np.ndarray, wanted: np.ndarray, language: np.ndarray, languages: int
) -> np.ndarray:
    """The part of `count_above` that one shard contributes; `wanted` [J] are the keys of the judged pairs."""
    order = np.argsort(query, kind="stable")  # neighbours share a query, whose scores are computed once
    counts = np.zeros((len(query), languages), np.int64)
    block_rows = max(1, int(CELLS**0.5))
    for block in shard.blocks(block_rows):
        by_language = np.argsort(language[block], kind="stable")
        ends = np.cumsum(np.bincount(language[block], minlength=languages))[:-1].tolist()
        vectors = _on_device(np.asarray(shard.vectors[block])[by_language]).float()
        numbers = _on_device(shard.numbers[block][by_language])
        for part in _parts(len(query), block_rows):
            judged = order[part]
            asked, pair = np.unique(query[judged], return_inverse=True)
            some, keys = _on_device(queries[asked]), _on_device(wanted[judged])
            slack = float32_slack(some, shard.largest_norm, _rounding_units())
            above = beaten_by(some, vectors, numbers, _on_device(pair), keys, slack)  # [part, block]
            sums = [columns.sum(1) for columns in above.tensor_split(ends, dim=1)]
            counts[judged] += torch.stack(sums, dim=1).cpu().numpy()
    return counts


def judged_keys(queries: np.ndarray, shard: Shard, query: np.ndarray, passage: np.ndarray) -> np.ndarray:
    """Canonical key of each judged pair, from whichever rank holds the passage: int64 [J], equal on all ranks."""
    rows = shard.locate(passage)
    mine = np.flatnonzero(rows >= 0)
    keys = np.zeros(len(passage), np.int64)
    for part in _parts(len(mine), max(1, CELLS // queries.shape[1])):
        pairs = mine[part]
        asked, held = torch.from_numpy(queries[query[pairs]]), torch.from_numpy(shard.vectors[rows[pairs]])
        keys[pairs] = pack(pair_scores(asked, held), torch.from_numpy(passage[pairs])).numpy()
    holders = dist.sum_array((rows >= 0).astype(np.int64))
    if (holders != 1).any():
        wrong = int(np.flatnonzero(holders != 1)[0])
        found = f"held by {holders[wrong]} shards"
        raise DataError(describe(f"judged passage {passage[wrong]}", found, "together the shards hold every passage once"))
    return dist.sum_array(keys)  # all but one addend are 0

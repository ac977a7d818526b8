"""The canonical score of a query and a passage, and keys that order passages by it.

The canonical score is the inner product of the two stored vectors: exact products, added in float64 along a fixed binary
tree, rounded to float32. It depends on the two vectors alone, never on the batch, block, shard, thread or device that
computed it, so equal vectors tie everywhere and ties can be broken by passage number.
Knows no shard, no rank and no language.

Shapes: q queries, b passages of a block, D dimensions. Vectors are finite and float32 or narrower: in float64 their products
are exact.
"""

import torch
from torch import Tensor

HALF_ULP32 = 2.0**-24
HALF_ULP64 = 2.0**-53
NUMBER_LIMIT = 2**32
"""Passage numbers are below it: a key keeps 32 bits for the number."""
EMPTY = torch.iinfo(torch.int64).min
"""The key of no passage; smaller than every other key."""
PAIRS_AT_ONCE = 2**20
"""Terms of a tree sum held at a time (8 MiB in float64, about the size of a cache)."""


def pair_scores(queries: Tensor, passages: Tensor) -> Tensor:
    """Canonical score along the last axis: [..., D] and [..., D] (broadcast) -> float32 [...]."""
    terms = queries.double() * passages.double()
    while (width := terms.shape[-1]) > 1:
        half = (width + 1) // 2
        terms[..., : width - half] += terms[..., half:]
        terms = terms[..., :half]
    return terms[..., 0].float()


def block_scores(queries: Tensor, passages: Tensor) -> Tensor:
    """Canonical scores of all pairs: float64 [q, D] and [b, D] -> float32 [q, b].

    A float64 product of matrices adds in an unknown order, so it knows a score to within `slack`. Where both ends of that
    interval round to one float32, this is the canonical score; the few other pairs (about one in a million) take the tree.
    """
    sums = queries @ passages.T
    dimensions = queries.shape[1]
    slack = (dimensions + 32) * HALF_ULP64 * queries.norm(dim=1, keepdim=True) * _largest_norm(passages)
    scores = (sums - slack).float()
    row, column = torch.nonzero(scores != (sums + slack).float(), as_tuple=True)
    step = max(1, PAIRS_AT_ONCE // dimensions)
    for some_rows, some_columns in zip(row.split(step), column.split(step), strict=True):
        scores[some_rows, some_columns] = pair_scores(queries[some_rows], passages[some_columns])
    return scores


def _largest_norm(vectors: Tensor) -> Tensor:
    return vectors.norm(dim=1).max() if len(vectors) else vectors.new_zeros(())


def float32_slack(queries: Tensor, largest_norm: float, units: float) -> Tensor:
    """How far a float32 inner product can lie from the canonical score, for passages up to `largest_norm`: float64 [q].

    The classical bound for D terms added in any order (D * 2^-24 * |q| * |x|), `units` times. The last term is for underflow.
    """
    dimensions = queries.shape[1]
    return units * (dimensions + 8) * HALF_ULP32 * queries.double().norm(dim=1) * largest_norm + dimensions * 2.0**-126


def beaten_by(queries: Tensor, passages: Tensor, numbers: Tensor, pair: Tensor, keys: Tensor, slack: Tensor) -> Tensor:
    """Which passages of a block have a larger key than the given ones: bool [p, b].

    `queries` [q, D] and `passages` [b, D] float32, `numbers` [b]; key `keys[i]` [p] is asked of query `pair[i]`; `slack` [q] as
    `float32_slack` gives. A float32 product of matrices decides all pairs but those within `slack` of the key's score; these
    take the canonical score, one by one or, where they are many (copies, a collapsed model), the whole block.
    """
    scores = (queries @ passages.T).index_select(0, pair)
    bars, slack = unpack(keys)[0].double(), slack[pair]
    infinity = scores.new_tensor(torch.inf)
    highest, lowest = (torch.nextafter((bars + slack).float(), infinity), torch.nextafter((bars - slack).float(), -infinity))
    above = scores > highest[:, None]
    row, column = torch.nonzero((scores >= lowest[:, None]) & ~above, as_tuple=True)
    if len(row) * 16 > scores.numel():
        exact = pack(block_scores(queries.double(), passages.double()), numbers)
        return exact.index_select(0, pair) > keys[:, None]
    step = max(1, PAIRS_AT_ONCE // queries.shape[1])
    for some_rows, some_columns in zip(row.split(step), column.split(step), strict=True):
        exact = pair_scores(queries[pair[some_rows]], passages[some_columns])
        above[some_rows, some_columns] = pack(exact, numbers[some_columns]) > keys[some_rows]
    return above


def pack(scores: Tensor, numbers: Tensor) -> Tensor:
    """int64 keys: the larger key has the higher score, or an equal score and the lower number. Shapes broadcast."""
    bits = (scores + 0.0).view(torch.int32).to(torch.int64)  # + 0.0: -0.0 and 0.0 are one score
    return (_mirror_negative(bits) << 32) | (NUMBER_LIMIT - 1 - numbers)


def unpack(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Scores float32 and numbers int64 of packed keys."""
    bits = _mirror_negative(keys >> 32).to(torch.int32)
    return bits.view(torch.float32), NUMBER_LIMIT - 1 - (keys & (NUMBER_LIMIT - 1))


def _mirror_negative(bits: Tensor) -> Tensor:
    """float32 bit patterns <-> integers in the same order as the numbers: negative ones are stored by magnitude."""
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)

"""The contrastive loss of some rows of a global batch, and its gradient, on plain tensors. Knows no process group.

loss = sum over rows of -log( exp(s+ / t) / sum over the row's columns of exp(s / t) ) / N       (InfoNCE, 1807.03748)

A row's columns are those of its pool, less the columns of its own family (its positive stays), less, if asked, columns
that score above the positive by a margin (2506.05176). `hard_only` keeps hard negatives only (2408.10536 as printed).

The gradient is worked out by hand, d loss / d s = (softmax - 1 at the positive) / (t N), a chunk of rows at a time in one
reused buffer of scores, so that memory grows with the texts of a pool and not with their square.

R rows of the embedding buffer, D embedding size, N rows, C columns of a pool, r rows of a chunk.
"""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Self

import torch

from hybrid_scale.config import LossSettings
from hybrid_scale.data.sampler import GlobalBatch

LOG2_E = math.log2(math.e)


@dataclass(frozen=True)
class Targets:
    """The index tensors of a `GlobalBatch`, on the device of the embeddings.

    `row_text` and `column_text` number rows of the embedding buffer; it may hold rows that neither of them names.
    """

    row_offsets: list[int]
    column_offsets: list[int]
    row_text: torch.Tensor
    row_column: torch.Tensor
    row_family: torch.Tensor
    column_text: torch.Tensor
    column_family: torch.Tensor
    column_is_hard: torch.Tensor

    @classmethod
    def of(cls, batch: GlobalBatch, device: torch.device) -> Self:
        names = ("row_text", "row_column", "row_family", "column_text", "column_family", "column_is_hard")
        tensors = {name: torch.from_numpy(getattr(batch, name)).to(device) for name in names}
        return cls(batch.row_offsets.tolist(), batch.column_offsets.tolist(), **tensors)


@dataclass(frozen=True)
class _Share:
    """The asked rows of one pool, all its columns, and how many of the rows are scored at once."""

    rows: range
    columns: slice
    chunk: int

    @property
    def width(self) -> int:
        return self.columns.stop - self.columns.start


@dataclass(frozen=True)
class _Buffers:
    """Room for the scores of one chunk and for their mask, flat, reused by every chunk."""

    scores: torch.Tensor
    mask: torch.Tensor


def share_rows(targets: Targets, rank: int, world: int) -> range:
    """The contiguous rows of this rank when ranks share out the scores (rows x columns of their pool), not the rows.

    Every row belongs to exactly one rank; a rank's scores differ from scores / world by less than the largest row's. With
    more ranks than rows some ranks get an empty range.
    """
    return range(_cut(targets, rank, world), _cut(targets, rank + 1, world))


def _cut(targets: Targets, number: int, world: int) -> int:
    """How many rows lie wholly within the first number / world of the scores; integers, so equal on every rank."""
    pools = list(zip(pairwise(targets.row_offsets), pairwise(targets.column_offsets), strict=True))
    left = sum((end - start) * (last - first) for (start, end), (first, last) in pools) * number // world
    for (start, end), (first, last) in pools:
        scores = (end - start) * (last - first)
        if left < scores:
            return start + left // (last - first)
        left -= scores
    return targets.row_offsets[-1]


@torch.no_grad()
def contrastive_loss(
    embeddings: torch.Tensor, targets: Targets, rows: range, settings: LossSettings
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss of the given rows divided by N, and its gradient with respect to all embeddings.

    embeddings [R, D] (no gradient flows into them) -> (scalar, [R, D]): float64 for float64, float32 for float32 and for
    bfloat16, whose values are widened before anything is computed. Summed over ranks that share out the rows, both are
    exactly those of the whole batch. Rows of the buffer that `targets` doesn't name have gradient zero, whatever they hold.

    Memory above the inputs, in elements: R D (the gradient) + 2 C D (passages of one pool and their gradient; nothing where
    the pool's texts are consecutive and not bfloat16) + 3 r D (queries) + max_logits, or one row of scores if that is more,
    and a mask of as many bytes. Time: three products of 2 D operations a score; no score outside a pool.
    """
    gradient = torch.zeros(embeddings.shape, dtype=torch.promote_types(embeddings.dtype, torch.float32), device=embeddings.device)
    shares = _shares(targets, rows, settings.max_logits)
    most = max((share.chunk * share.width for share in shares), default=0)
    buffers = _Buffers(gradient.new_empty(most), gradient.new_empty(most, dtype=torch.bool))
    total = gradient.new_zeros(())
    for share in shares:
        total += _add_pool(embeddings, gradient, targets, share, buffers, settings)
    return total, gradient


def _shares(targets: Targets, rows: range, max_logits: int) -> list[_Share]:
    """The pools that `rows` touch, each with its part of them."""
    found = []
    for (start, end), (first, last) in zip(pairwise(targets.row_offsets), pairwise(targets.column_offsets), strict=True):
        mine = range(max(start, rows.start), min(end, rows.stop))
        if mine:
            chunk = min(len(mine), max(1, max_logits // (last - first)))
            found.append(_Share(mine, slice(first, last), chunk))
    return found


def _add_pool(
    embeddings: torch.Tensor,
    gradient: torch.Tensor,
    targets: Targets,
    share: _Share,
    buffers: _Buffers,
    settings: LossSettings,
) -> torch.Tensor:
    """Loss of one pool's share of rows; adds its gradient to `gradient`."""
    texts = targets.column_text[share.columns]
    place = _as_slice(texts)
    passages = embeddings[texts if place is None else place].to(gradient.dtype)
    to_passages = torch.zeros_like(passages) if place is None else gradient[place]
    losses = []
    for at in share.rows[:: share.chunk]:
        rows = slice(at, min(at + share.chunk, share.rows.stop))
        queries = embeddings[targets.row_text[rows]].to(gradient.dtype)
        loss, to_queries = _chunk(queries, passages, to_passages, targets, rows, share.columns, buffers, settings)
        gradient.index_add_(0, targets.row_text[rows], to_queries)
        losses.append(loss)
    if place is None:
        gradient.index_add_(0, texts, to_passages)
    return torch.stack(losses).sum()


def _as_slice(texts: torch.Tensor) -> slice | None:
    """The slice that texts [C] are if each is its predecessor plus one: a slice is a view, an index a copy."""
    first = int(texts[0])
    run = torch.arange(first, first + len(texts), dtype=texts.dtype, device=texts.device)
    return slice(first, first + len(texts)) if torch.equal(texts, run) else None


def _chunk(
    queries: torch.Tensor,
    passages: torch.Tensor,
    to_passages: torch.Tensor,
    targets: Targets,
    rows: slice,
    columns: slice,
    buffers: _Buffers,
    settings: LossSettings,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss of r rows and the gradient of their queries [r, D], which are overwritten; adds to `to_passages` [C, D].

    The softmax is never divided by its sums: the sums scale the small factors of the two products instead of [r, C].
    """
    shape = (len(queries), len(passages))
    scores = torch.mm(queries, passages.T, out=buffers.scores[: shape[0] * shape[1]].view(shape))
    positive = (targets.row_column[rows] - columns.start).unsqueeze(1)  # [r, 1]
    of_positive = scores.gather(1, positive)
    _drop(scores, of_positive, targets, rows, columns, buffers, settings)
    scores.scatter_(1, positive, float("-inf"))
    best = torch.maximum(scores.amax(1, keepdim=True), of_positive)
    weights = scores.sub_(best).mul_(LOG2_E / settings.temperature).exp2_()  # exp_ underflows 40 times slower
    others = weights.sum(1, keepdim=True)
    sums = others + ((of_positive - best) / settings.temperature).exp()
    loss = (sums.log() + (best - of_positive) / settings.temperature).sum() / targets.row_offsets[-1]
    weights.scatter_(1, positive, -others)
    scale = 1 / (sums * settings.temperature * targets.row_offsets[-1])
    to_queries = torch.mm(weights, passages).mul_(scale)
    torch.addmm(to_passages, weights.T, queries.mul_(scale), out=to_passages)
    return loss, to_queries


def _drop(
    scores: torch.Tensor,
    of_positive: torch.Tensor,
    targets: Targets,
    rows: slice,
    columns: slice,
    buffers: _Buffers,
    settings: LossSettings,
) -> None:
    """-inf in place in scores [r, C] where a column is no negative of the row; the positive, dropped too, is the caller's."""
    mask = buffers.mask[: scores.numel()].view(scores.shape)
    if settings.false_negative_margin is not None:
        torch.gt(scores, of_positive + settings.false_negative_margin, out=mask)
        scores.masked_fill_(mask, float("-inf"))
    torch.eq(targets.row_family[rows].unsqueeze(1), targets.column_family[columns], out=mask)
    scores.masked_fill_(mask, float("-inf"))
    if settings.denominator == "hard_only":
        scores.masked_fill_(~targets.column_is_hard[columns], float("-inf"))

"""The contrastive loss of some rows of a global batch, and its gradient, on plain tensors. Knows no process group.

loss = sum over rows of -log( exp(s+ / t) / sum over the row's columns of exp(s / t) ) / N       (InfoNCE, 1807.03748)

A row's columns are those of its pool, less the columns of its own family (its positive stays), less, if asked, columns
that score above the positive by a margin (2506.05176). `hard_only` keeps hard negatives only (2408.10536 as printed).

T texts, D embedding size, N rows, C columns, P pools of the global batch.
"""

from dataclasses import dataclass
from typing import Self

import torch

from hybrid_scale.config import LossSettings
from hybrid_scale.data.sampler import GlobalBatch


@dataclass(frozen=True)
class Targets:
    """The index tensors of a `GlobalBatch`, on the device of the embeddings."""

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


def contrastive_loss(
    embeddings: torch.Tensor, targets: Targets, rows: range, settings: LossSettings
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss of the given rows divided by N, and its gradient with respect to all embeddings.

    embeddings [T, D] (no gradient flows into them) -> (scalar, [T, D]). Summed over ranks that share out the rows,
    both are exactly those of the whole batch. At most `max_logits` scores, or one row of them, exist at once.
    """
    gradient = torch.zeros_like(embeddings)
    total = embeddings.new_zeros(())
    for pool, (start, end) in enumerate(zip(targets.row_offsets[:-1], targets.row_offsets[1:], strict=True)):
        start, end = max(start, rows.start), min(end, rows.stop)
        columns = slice(targets.column_offsets[pool], targets.column_offsets[pool + 1])
        chunk = max(1, settings.max_logits // max(1, columns.stop - columns.start))
        for at in range(start, end, chunk):
            total += _chunk(embeddings, gradient, targets, slice(at, min(at + chunk, end)), columns, settings)
    return total, gradient


def _chunk(
    embeddings: torch.Tensor, gradient: torch.Tensor, targets: Targets, rows: slice, columns: slice, settings: LossSettings
) -> torch.Tensor:
    """Loss of one chunk of rows of one pool; adds its gradient to `gradient`."""
    row_text, column_text = targets.row_text[rows], targets.column_text[columns]
    queries = embeddings[row_text].detach().requires_grad_()
    passages = embeddings[column_text].detach().requires_grad_()
    with torch.enable_grad():
        scores = queries @ passages.T
        positive = (targets.row_column[rows] - columns.start).unsqueeze(1)
        dropped = _dropped(scores.detach(), positive, targets, rows, columns, settings)
        logits = (scores / settings.temperature).masked_fill(dropped, float("-inf"))
        losses = torch.logsumexp(logits, dim=1) - logits.gather(1, positive).squeeze(1)
        loss = losses.sum() / targets.row_offsets[-1]
    to_queries, to_passages = torch.autograd.grad(loss, (queries, passages))
    gradient.index_add_(0, row_text, to_queries)
    gradient.index_add_(0, column_text, to_passages)
    return loss.detach()


def _dropped(
    scores: torch.Tensor, positive: torch.Tensor, targets: Targets, rows: slice, columns: slice, settings: LossSettings
) -> torch.Tensor:
    """[rows, columns] True where a column is no negative of the row; the positive is always False."""
    dropped = targets.row_family[rows].unsqueeze(1) == targets.column_family[columns].unsqueeze(0)
    if settings.denominator == "hard_only":
        dropped |= ~targets.column_is_hard[columns].unsqueeze(0)
    if settings.false_negative_margin is not None:
        dropped |= scores > scores.gather(1, positive) + settings.false_negative_margin
    return dropped.scatter(1, positive, False)

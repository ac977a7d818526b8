"""Hidden states + mask, or + lengths -> one vector per text. Knows no backbone.

B texts, L tokens (padded), T tokens of all texts end to end, H hidden size.
last: the last token (2310.08319); mean: over tokens (2404.05961); weighted_mean: token i weighs i (2202.08904).
"""

import torch


def wide(hidden: torch.Tensor) -> torch.dtype:
    """Type of pooled states: float32, or that of the states where it is wider."""
    return torch.promote_types(hidden.dtype, torch.float32)


def pool(hidden: torch.Tensor, mask: torch.Tensor, how: str) -> torch.Tensor:
    """Hidden states [B, L, H] and mask [B, L] (1 = token, padding on either side) -> [B, H] in float32 or wider."""
    if how == "last":
        positions = torch.arange(mask.shape[1], device=mask.device)
        last = (positions * mask).argmax(dim=1)
        return hidden[torch.arange(len(hidden), device=hidden.device), last].to(wide(hidden))
    weights = mask.to(wide(hidden))
    if how == "weighted_mean":
        weights = weights * weights.cumsum(dim=1)
    return (hidden * weights.unsqueeze(-1)).sum(dim=1) / weights.sum(dim=1, keepdim=True)


def pool_packed(hidden: torch.Tensor, lengths: torch.Tensor, positions: torch.Tensor, how: str) -> torch.Tensor:
    """Hidden states [T, H], lengths int64 [B] and positions int64 [T] (from 0 in each text) -> [B, H] in float32 or wider."""
    if how == "last":
        return hidden.index_select(0, lengths.cumsum(0) - 1).to(wide(hidden))
    weights, totals = torch.ones_like(positions), lengths
    if how == "weighted_mean":
        weights, totals = positions + 1, lengths * (lengths + 1) // 2
    texts = torch.repeat_interleave(torch.arange(len(lengths), device=hidden.device), lengths, output_size=len(hidden))
    sums = hidden.new_zeros((len(lengths), hidden.shape[1]), dtype=wide(hidden))
    return sums.index_add_(0, texts, hidden.to(wide(hidden)) * weights.unsqueeze(-1)) / totals.unsqueeze(-1)

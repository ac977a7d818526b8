"""Hidden states + mask -> one vector per text. Knows no backbone.

B texts, L tokens (padded), H hidden size.
"""

import torch


def pool(hidden: torch.Tensor, mask: torch.Tensor, how: str) -> torch.Tensor:
    """Hidden states [B, L, H] and mask [B, L] (1 = token, padding on either side) -> [B, H] in float32.

    last: the last token (2310.08319); mean: over tokens (2404.05961); weighted_mean: token i weighs i (2202.08904).
    """
    if how == "last":
        positions = torch.arange(mask.shape[1], device=mask.device)
        last = (positions * mask).argmax(dim=1)
        return hidden[torch.arange(len(hidden), device=hidden.device), last].float()
    weights = mask.to(torch.float32)
    if how == "weighted_mean":
        weights = weights * weights.cumsum(dim=1)
    return (hidden.float() * weights.unsqueeze(-1)).sum(dim=1) / weights.sum(dim=1, keepdim=True)

"""Backbone + pooling as one module: token ids in, unit vectors out. Knows no loss and no engine.

B texts, L tokens (padded), D embedding size.
"""

import torch
from torch import nn

from hybrid_scale.model.pooling import pool


class Embedder(nn.Module):
    """A decoder whose hidden states are pooled and normalised to length 1 (cosine similarity is a dot product)."""

    def __init__(self, backbone: nn.Module, pooling: str, attention: str):
        super().__init__()
        self.backbone = backbone
        self.pooling = pooling
        self.attention = attention

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """int64 [B, L] twice -> float32 [B, D]. The side of the padding doesn't matter: positions count real tokens."""
        positions = (attention_mask.cumsum(dim=1) - 1).clamp(min=0)
        mask = attention_mask if self.attention == "causal" else self._bidirectional(attention_mask)
        hidden = self.backbone(
            input_ids=input_ids, attention_mask=mask, position_ids=positions, use_cache=False
        ).last_hidden_state
        return nn.functional.normalize(pool(hidden, attention_mask, self.pooling), dim=-1)

    def _bidirectional(self, mask: torch.Tensor) -> torch.Tensor:
        """Additive mask [B, 1, L, L] that hides padding only; transformers passes a 4-D mask through unchanged."""
        dtype = self.backbone.dtype if isinstance(self.backbone.dtype, torch.dtype) else torch.float32
        hidden = (1.0 - mask[:, None, None, :].to(dtype)) * torch.finfo(dtype).min
        return hidden.expand(-1, 1, mask.shape[1], -1)

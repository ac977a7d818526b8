"""Backbone + pooling as one module: token ids in, unit vectors out. Knows no loss and no engine.

B texts, L tokens (padded), T tokens of all texts end to end, D embedding size.
"""

from typing import Any

import torch
from torch import nn

from hybrid_scale.errors import ModelError, describe
from hybrid_scale.model import packing
from hybrid_scale.model.pooling import pool, pool_packed


class Embedder(nn.Module):
    """A decoder whose hidden states are pooled and normalised to length 1 (cosine similarity is a dot product)."""

    def __init__(self, backbone: nn.Module, pooling: str, attention: str):
        super().__init__()
        self.backbone = backbone
        self.pooling = pooling
        self.attention = attention

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, lengths: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Texts -> [B, D] in their order, float32 (float64 of a float64 model).

        Padded: ids and mask, int64 [B, L] each; the side of the padding doesn't matter: positions count real tokens.
        Packed: ids int64 [1, T] and lengths int64 [B] on the CPU; every linear layer sees the T real tokens alone.
        """
        if lengths is not None:
            pooled = self._packed(input_ids, lengths)
        else:
            assert attention_mask is not None
            pooled = self._padded(input_ids, attention_mask)
        return nn.functional.normalize(pooled, dim=-1)

    def _padded(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        positions = (attention_mask.cumsum(dim=1) - 1).clamp(min=0)
        mask = attention_mask if self.attention == "causal" else self._bidirectional(attention_mask)
        hidden = self.backbone(
            input_ids=input_ids, attention_mask=mask, position_ids=positions, use_cache=False
        ).last_hidden_state
        return pool(hidden, attention_mask, self.pooling)

    def _packed(self, input_ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        layout = packing.make_layout(lengths, self.attention == "causal", input_ids.device)
        ids = input_ids if layout.tokens is None else input_ids[:, layout.tokens]
        hidden = self.backbone(
            input_ids=ids, position_ids=layout.positions, use_cache=False, **self._packed_arguments(layout)
        ).last_hidden_state
        pooled = pool_packed(hidden.squeeze(0), layout.lengths, layout.positions[0], self.pooling)
        return pooled if layout.texts is None else pooled[layout.texts]

    def _packed_arguments(self, layout: packing.Layout) -> dict[str, Any]:
        """What the backbone's attention layers must know of the texts."""
        implementation = self.backbone.config._attn_implementation  # type: ignore[union-attr]
        if implementation == packing.NAME:
            return {"segments": layout.segments}
        if implementation == "flash_attention_2":
            return packing.flash_arguments(layout)
        rule = "it knows no texts end to end"
        raise ModelError(describe("model.attention_implementation", implementation, rule, "Use packed, or padded batches."))

    def _bidirectional(self, mask: torch.Tensor) -> torch.Tensor:
        """Additive mask [B, 1, L, L] that hides padding only; transformers passes a 4-D mask through unchanged."""
        dtype = self.backbone.dtype if isinstance(self.backbone.dtype, torch.dtype) else torch.float32
        hidden = (1.0 - mask[:, None, None, :].to(dtype)) * torch.finfo(dtype).min
        return hidden.expand(-1, 1, mask.shape[1], -1)

"""What planning needs to know of a model, from its config.json alone. Loads no weights."""

from dataclasses import dataclass
from typing import Any

from transformers import AutoConfig

from hybrid_scale.config import ModelSettings
from hybrid_scale.errors import ModelError, describe


@dataclass(frozen=True)
class Shape:
    """A decoder's layers, and whether it draws random numbers while it trains."""

    layers: int
    hidden: int
    intermediate: int
    attention_width: int
    """Query heads x head size."""
    key_value_width: int
    dropout: bool

    @property
    def linear(self) -> int:
        """Weights of the linear layers: q, k, v, o and a gated MLP in each layer."""
        attention = 2 * self.hidden * (self.attention_width + self.key_value_width)
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    def quadratic(self, causal: bool) -> float:
        """Attention's products over those of the linear layers, per token of a text's length.

        Forward, a text of n tokens: 2 P n for the linear layers, 4 n^2 x width x layers for scores and values, half of it
        where attention is causal.
        """
        return (1.0 if causal else 2.0) * self.layers * self.attention_width / self.linear


def read_shape(settings: ModelSettings) -> Shape:
    """Shape of `model.base`. Raises ModelError when there is no config.json or it lacks the usual names."""
    try:
        config = AutoConfig.from_pretrained(
            settings.base, revision=settings.revision, trust_remote_code=settings.trust_remote_code
        ).get_text_config()
        heads = int(config.num_attention_heads)
        size = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
        return Shape(
            layers=int(config.num_hidden_layers),
            hidden=int(config.hidden_size),
            intermediate=int(config.intermediate_size),
            attention_width=heads * size,
            key_value_width=int(getattr(config, "num_key_value_heads", None) or heads) * size,
            dropout=(settings.lora is not None and settings.lora.dropout > 0) or _has_dropout(config),
        )
    except (OSError, ValueError, AttributeError) as error:
        raise ModelError(describe("model.base", settings.base, f"its config.json can't be read: {error}")) from None


def _has_dropout(config: Any) -> bool:
    values = {name: value for name, value in config.to_dict().items() if "dropout" in name or "pdrop" in name}
    return any(isinstance(value, float) and value > 0 for value in values.values())

"""The shape of a run's model as transformers reads it: revisions, remote code, the hub. Loads no weights, counts nothing."""

from hybrid_scale.config import ModelSettings
from hybrid_scale.model.base import read_config
from hybrid_scale.planning.architecture import Architecture, from_config

NAMES = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size"),
    *("vocab_size", "tie_word_embeddings"),
)
"""What some types call otherwise in their config.json and translate when they are asked."""


def read_shape(settings: ModelSettings) -> Architecture:
    """Shape of `model.base`, of whatever type. Raises ModelError when there is no config.json or it lacks the usual names."""
    config = read_config(settings)
    config.allow_global_per_layer_attribute_access = True  # where layers differ (Gemma 4), the shape is that of most of them
    named = {name: getattr(config, name) for name in NAMES if getattr(config, name, None) is not None}
    return from_config({**config.to_dict(), **named}, settings.base, strict=False)

"""Models without storage: what no checkpoint holds is computed, what can't be streamed is said."""

import pytest
import torch
from transformers import LlamaConfig, LlamaModel, MixtralConfig

from hybrid_scale.errors import ModelError
from hybrid_scale.model import skeleton
from tests.model.families import FAMILIES, SIZES


class ExtraBuffer(LlamaModel):
    """A model whose initialisation forgets a buffer."""

    def __init__(self, config: LlamaConfig):
        super().__init__(config)
        self.norm.register_buffer("forgotten", torch.ones(3), persistent=False)


def test_a_buffer_that_nothing_computes_is_an_error():
    config = FAMILIES["llama"][0]
    with torch.device("meta"):
        good, bad = LlamaModel(config), ExtraBuffer(config)
    skeleton.fill_buffers(good, torch.device("cpu"))
    assert torch.equal(good.rotary_emb.inv_freq, LlamaModel(config).rotary_emb.inv_freq)
    with pytest.raises(ModelError, match=r"ExtraBuffer: nothing computes the buffers \['norm.forgotten'\]"):
        skeleton.fill_buffers(bad, torch.device("cpu"))


def test_merged_experts_are_left_to_transformers():
    config = MixtralConfig(**SIZES, hidden_size=32, intermediate_size=48, num_local_experts=2)
    reason = skeleton.why_not(skeleton.make_skeleton(config, torch.bfloat16, "eager", four_bit=True))
    assert reason == "transformers renames or merges its weights"
    for config, _, _ in FAMILIES.values():
        assert skeleton.why_not(skeleton.make_skeleton(config, torch.bfloat16, "eager", four_bit=True)) is None

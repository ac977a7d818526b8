"""A model without storage (the `meta` device), ready to be filled weight by weight; which architectures can be filled so.

Uses private attributes of transformers. Knows no weight file and no rank.
"""

import copy

import torch
from transformers import AutoModel, PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.modeling_utils import set_quantized_state
from transformers.quantizers.base import HfQuantizer

from hybrid_scale.errors import ModelError
from hybrid_scale.model.nf4 import PER_STORED, nf4, slots_of


def make_skeleton(
    config: PretrainedConfig, dtype: torch.dtype, attention: str, four_bit: bool, trust_remote_code: bool = False
) -> PreTrainedModel:
    """The model without storage (the `meta` device), its linear layers replaced as transformers would replace them."""
    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"), set_quantized_state():  # which keeps transformers from DeepSpeed's own construction
        model: PreTrainedModel = AutoModel.from_config(
            config, dtype=dtype, attn_implementation=attention, trust_remote_code=trust_remote_code
        )
    if four_bit:
        from transformers.integrations.bitsandbytes import replace_with_bnb_linear  # imports bitsandbytes, which nf4.py quiets

        quantisation = nf4(dtype)
        kept = HfQuantizer.get_modules_to_not_convert(model, None, list(model._keep_in_fp32_modules or ()))
        replace_with_bnb_linear(model, kept, quantisation)
        model.is_loaded_in_4bit = True  # type: ignore[assignment]
        model.config.quantization_config = quantisation
    return model.requires_grad_(False)


def why_not(model: PreTrainedModel) -> str | None:
    """Why this architecture must be loaded by transformers, whole on every rank; None where it can be streamed."""
    if get_model_conversion_mapping(model, add_legacy=False):
        return "transformers renames or merges its weights"
    if model._keep_in_fp32_modules_strict:
        return "some of its weights stay in float32"
    if set(model.state_dict()) - {name for name, _ in model.named_parameters()}:
        return "its checkpoints hold more than parameters, or one parameter twice"
    if any(slot.four_bit and slot.weights % PER_STORED for slot in slots_of(model)):
        return f"a linear layer's weights don't fill whole stored elements of {PER_STORED}"
    return None


def fill_buffers(model: PreTrainedModel, device: torch.device) -> None:
    """Compute what no checkpoint holds (rotary frequencies, Gemma's scale), each as its model's initialisation does."""
    for parameter in model.parameters():
        parameter._is_hf_initialized = True  # type: ignore[attr-defined]
    sentinels = {}
    for path, module in model.named_modules():
        missing = [name for name, buffer in module._buffers.items() if buffer is not None and buffer.is_meta]
        for name in missing:
            sentinels[f"{path}.{name}"] = module._buffers[name] = _sentinel(module._buffers[name], device)
        if missing:
            with torch.no_grad():
                model._init_weights(module)
    left = [name for name, buffer in sentinels.items() if torch.equal(_bits(buffer), _bits(_sentinel(buffer, device)))]
    if left:
        raise ModelError(f"{type(model).__name__}: nothing computes the buffers {left[:5]} ({len(left)}).")


def _sentinel(like: torch.Tensor | None, device: torch.device) -> torch.Tensor:
    assert like is not None
    value = float("nan") if like.is_floating_point() else torch.iinfo(like.dtype).max if like.dtype != torch.bool else True
    return torch.full(like.shape, value, dtype=like.dtype, device=device)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)

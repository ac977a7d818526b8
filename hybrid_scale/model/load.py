"""Base model, 4-bit weights, LoRA and checkpointing -> Embedder. Knows no data, no optimiser and no ranks."""

import logging
import warnings
from pathlib import Path
from typing import Any

import torch

logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # a missing optional CPU kernel, said at import
# DeepSpeed asks transformers for the old name of activation checkpointing.
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)

import bitsandbytes as bnb  # noqa: E402
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict  # noqa: E402
from peft.tuners.lora import LoraLayer  # noqa: E402
from safetensors import SafetensorError  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from torch import nn  # noqa: E402
from transformers import AutoConfig, AutoModel, PretrainedConfig  # noqa: E402

from hybrid_scale import gpu  # noqa: E402
from hybrid_scale.config import LoraSettings, ModelSettings  # noqa: E402
from hybrid_scale.errors import ModelError, describe  # noqa: E402
from hybrid_scale.model import packing  # noqa: E402
from hybrid_scale.model.embedder import Embedder  # noqa: E402
from hybrid_scale.model.nf4 import nf4  # noqa: E402
from hybrid_scale.model.quantize import check_written  # noqa: E402
from hybrid_scale.model.stream import load_sharded  # noqa: E402
from hybrid_scale.planning.costs import ParameterCounts  # noqa: E402

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}


def load_embedder(
    settings: ModelSettings, seed: int, adapter: Path | None = None, shards: dict[str, Any] | None = None
) -> Embedder:
    """The model to train or to evaluate, in train mode, on this rank's device.

    `seed` sets the new LoRA weights, equal on every rank; `adapter` (a folder that `train.checkpoint` wrote) replaces
    them, or the full weights where the run has no LoRA. `shards`, the DeepSpeed JSON of a ZeRO-3 run on several ranks, has a
    frozen base loaded straight into their shares (`model.stream`; collective). Raises ModelError: the base can't be loaded,
    holds no linear layer that LoRA could adapt, or the adapter doesn't fit.
    """
    backbone = _load_backbone(settings, shards)
    if settings.lora is None:
        backbone.requires_grad_(True)
    else:
        backbone = _add_lora(backbone, settings.lora, seed)
        if settings.lora.compute == "model" and settings.dtype == "bfloat16":
            _follow_activations(backbone)
    if settings.gradient_checkpointing:
        # Reentrant: the only form that lets ZeRO-3 free a gathered 4-bit weight between forward and backward
        # (bitsandbytes keeps a view of it on the autograd node otherwise).
        backbone.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": True})
    embedder = Embedder(backbone, settings.pooling, settings.attention)
    if adapter is not None:
        load_trained(embedder, adapter)
    return embedder.train()


def _load_backbone(settings: ModelSettings, shards: dict[str, Any] | None) -> Any:
    check_written(settings)
    try:
        config = _read_config(settings)
        if settings.packed:
            _check_packable(config, settings)
        packed = settings.attention_implementation == "packed"
        attention = packing.NAME if packed else settings.attention_implementation
        backbone = None
        if shards is not None and settings.lora is not None:
            backbone = load_sharded(settings, config, attention, shards)
        if backbone is None:
            backbone = _load_whole(settings, config, attention)
    except (OSError, ValueError, ImportError, SafetensorError) as error:  # ImportError: flash attention that isn't installed
        raise ModelError(describe("model.base", settings.base, f"the model can't be loaded: {error}")) from None
    for module in backbone.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            # On AVX512-BF16 CPUs an eval() forward repacks the weight in place, which ZeRO-3 then gathers as rubbish.
            module.support_avx512bf16_for_cpu = False
    backbone.requires_grad_(False)
    return backbone


def _load_whole(settings: ModelSettings, config: PretrainedConfig, attention: str) -> Any:
    options: dict[str, Any] = {}
    if settings.quantization == "nf4":
        if not hasattr(config, "quantization_config"):  # written in 4 bits: it says itself how
            options["quantization_config"] = nf4(DTYPES[settings.dtype])
        if gpu.present():
            options["device_map"] = {"": gpu.device()}
    backbone, report = AutoModel.from_pretrained(
        settings.base,
        config=config,
        revision=settings.revision,
        trust_remote_code=settings.trust_remote_code,
        dtype=DTYPES[settings.dtype],
        attn_implementation=attention,
        use_safetensors=True,
        output_loading_info=True,
        **options,
    )
    if missing := sorted(report["missing_keys"]):  # transformers would leave them random
        rule = f"its files lack {len(missing)} of the model's weights"
        raise ModelError(describe("model.base", settings.base, rule, f"The first: {', '.join(missing[:5])}."))
    return backbone


def _read_config(settings: ModelSettings) -> PretrainedConfig:
    config = AutoConfig.from_pretrained(settings.base, revision=settings.revision, trust_remote_code=settings.trust_remote_code)
    text = config.get_text_config()
    flash = settings.attention_implementation == "flash_attention_2"
    if flash and settings.attention == "bidirectional" and getattr(text, "sliding_window", None) is not None:
        # Bidirectional attention sees the whole text; flash attention would keep to the window on both sides.
        text.sliding_window = text.max_position_embeddings
    return config


def _skeleton(config: PretrainedConfig, settings: ModelSettings) -> Any:
    """The model without storage (the `meta` device): 1.5 s for 80 layers."""
    with torch.device("meta"):
        return AutoModel.from_config(config, trust_remote_code=settings.trust_remote_code)


def _check_packable(config: PretrainedConfig, settings: ModelSettings) -> None:
    """Raises ModelError where texts end to end would reach each other."""
    architecture = type(_skeleton(config, settings))
    layers = set(getattr(config.get_text_config(), "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if not getattr(architecture, "_supports_attention_backend", False):
        fault = "doesn't go through transformers' attention interface"
    elif getattr(architecture, "_is_stateful", False):
        fault = "carries a state from token to token, across texts"
    elif layers:
        fault = f"has layers that mix neighbouring tokens in other ways ({', '.join(sorted(layers))})"
    else:
        return
    raise ModelError(
        describe(
            "model.attention_implementation",
            settings.attention_implementation,
            f"it puts texts end to end, and {architecture.__name__} {fault}",
            "Use sdpa.",
        )
    )


def _add_lora(backbone: nn.Module, settings: LoraSettings, seed: int) -> PeftModel:
    targets = settings.targets if settings.targets == "all-linear" else list(settings.targets)
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]
        lora_dropout=settings.dropout,
        target_modules=targets,
    )
    with gpu.seeded(seed):
        try:
            return get_peft_model(backbone, config)
        except ValueError as error:
            raise ModelError(describe("model.lora.targets", settings.targets, str(error))) from None


class _FollowingLinear(nn.Linear):
    """A linear layer that multiplies in the type of its input and keeps weight and gradient in its own."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(input, self.weight.to(input.dtype))


def _follow_activations(adapted: nn.Module) -> None:
    """LoRA's products in the type of the activations instead of the weights' float32; names and weights stay as they are."""
    for layer in adapted.modules():
        if isinstance(layer, LoraLayer):
            layer.cast_input_dtype_enabled = False
            for held in (layer.lora_A, layer.lora_B):
                for linear in held.values():
                    assert type(linear) is nn.Linear
                    linear.__class__ = _FollowingLinear


def load_trained(embedder: Embedder, folder: Path) -> None:
    """Put trained weights (PEFT's `adapter_model.safetensors`, or `model.safetensors`) into a fresh embedder.

    Raises ModelError listing missing and unknown names.
    """
    backbone = embedder.backbone
    if isinstance(backbone, PeftModel):
        path = folder / "adapter_model.safetensors"
        if not path.is_file():
            raise ModelError(describe(str(path), "no such file", "the run has model.lora, its adapter is needed"))
        state = load_file(path)
        expected = {n.replace(".default.", ".") for n, p in backbone.named_parameters() if p.requires_grad}
        _check_names(path, set(state), expected)
        set_peft_model_state_dict(backbone, state)
    else:
        path = folder / "model.safetensors"
        if not path.is_file():
            raise ModelError(describe(str(path), "no such file", "the run trains all weights, its weights are needed"))
        state = load_file(path)
        _check_names(path, set(state), {n for n, p in backbone.named_parameters()})
        backbone.load_state_dict(state, strict=False)


def _check_names(path: Path, found: set[str], expected: set[str]) -> None:
    if found != expected:
        missing, unknown = sorted(expected - found)[:5], sorted(found - expected)[:5]
        raise ModelError(
            f"{path}: {len(expected - found)} weights are missing {missing}, {len(found - expected)} unknown {unknown}."
        )


def count_parameters(settings: ModelSettings) -> ParameterCounts:
    """Weights by how they are held, from a skeleton without storage (the `meta` device)."""
    backbone = _skeleton(_read_config(settings), settings)
    linear = sum(m.weight.numel() for m in backbone.modules() if isinstance(m, nn.Linear))
    total = sum(p.numel() for p in backbone.parameters())
    if settings.lora is None:
        return ParameterCounts(quantised=0, frozen=0, trained=total)
    backbone.requires_grad_(False)
    adapted = _add_lora(backbone, settings.lora, seed=0)
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    quantised = linear if settings.quantization == "nf4" else 0
    return ParameterCounts(quantised, total - quantised, trained)

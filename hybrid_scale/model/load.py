"""Base model, 4-bit weights, LoRA and checkpointing -> Embedder. Knows no data, no optimiser and no ranks."""

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # a missing optional CPU kernel, said at import
# DeepSpeed asks transformers for the old name of activation checkpointing.
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)

import bitsandbytes as bnb  # noqa: E402
from peft import PeftModel, set_peft_model_state_dict  # noqa: E402
from safetensors import SafetensorError  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from torch import nn  # noqa: E402
from transformers import AutoModel, PretrainedConfig  # noqa: E402
from transformers.utils import logging as transformers_logging  # noqa: E402

from hybrid_scale import gpu  # noqa: E402
from hybrid_scale.base_files import code_revision, locate  # noqa: E402
from hybrid_scale.config import ModelSettings  # noqa: E402
from hybrid_scale.errors import ModelError, describe  # noqa: E402
from hybrid_scale.model import packing  # noqa: E402
from hybrid_scale.model.adapters import add_lora, follow_activations  # noqa: E402
from hybrid_scale.model.base import check_packable, is_multimodal, read_config, skeleton  # noqa: E402
from hybrid_scale.model.embedder import Embedder  # noqa: E402
from hybrid_scale.model.nf4 import nf4  # noqa: E402
from hybrid_scale.model.quantize import check_written  # noqa: E402
from hybrid_scale.model.stream import load_sharded  # noqa: E402
from hybrid_scale.model.weight_files import Checkpoint, text_prefix  # noqa: E402
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
        backbone = add_lora(backbone, settings.lora, seed)
        if settings.lora.compute == "model" and settings.dtype == "bfloat16":
            follow_activations(backbone)
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
        config = loaded_config(settings)
        if settings.packed:
            check_packable(config, settings)
        Checkpoint(locate(settings)).close()  # whole, and one set of weights
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
    backbone.name_or_path = settings.base  # as PEFT notes it, not the snapshot's folder
    backbone.requires_grad_(False)
    return backbone


def _load_whole(settings: ModelSettings, config: PretrainedConfig, attention: str) -> Any:
    options: dict[str, Any] = {}
    if settings.quantization == "nf4":
        if not hasattr(config, "quantization_config"):  # written in 4 bits: it says itself how
            options["quantization_config"] = nf4(DTYPES[settings.dtype])
        if gpu.present():
            options["device_map"] = {"": gpu.device()}
    if is_multimodal(settings):
        model = skeleton(config, settings.trust_remote_code)
        prefix = text_prefix(model, Checkpoint(locate(settings)).where)
        if prefix != f"{model.base_model_prefix}.":
            options["key_mapping"] = {f"^{re.escape(prefix)}": ""}
    with _quiet_about_unexpected(is_multimodal(settings)):
        backbone, report = AutoModel.from_pretrained(
            locate(settings),
            config=config,
            trust_remote_code=settings.trust_remote_code,
            code_revision=code_revision(settings),
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


@contextmanager
def _quiet_about_unexpected(quiet: bool) -> Iterator[None]:
    """Keep transformers from listing the weights of a picture model, which nothing here uses."""
    before = transformers_logging.get_verbosity()
    if quiet:
        transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)


def loaded_config(settings: ModelSettings) -> PretrainedConfig:
    """The text model's config as it is loaded."""
    config = read_config(settings)
    flash = settings.attention_implementation == "flash_attention_2"
    if flash and settings.attention == "bidirectional" and getattr(config, "sliding_window", None) is not None:
        # Bidirectional attention sees the whole text; flash attention would keep to the window on both sides.
        config.sliding_window = config.max_position_embeddings
    return config


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
    backbone = skeleton(loaded_config(settings), settings.trust_remote_code)
    linear = sum(m.weight.numel() for m in backbone.modules() if isinstance(m, nn.Linear))
    total = sum(p.numel() for p in backbone.parameters())
    if settings.lora is None:
        return ParameterCounts(quantised=0, frozen=0, trained=total)
    backbone.requires_grad_(False)
    adapted = add_lora(backbone, settings.lora, seed=0)
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    quantised = linear if settings.quantization == "nf4" else 0
    return ParameterCounts(quantised, total - quantised, trained)

"""LoRA on a backbone: where adapters may sit, how they are made, in which type they multiply. Works without storage as well.

Every target must name a linear layer that each text passes through, so that every adapter gets a gradient and can be merged.
"""

from collections.abc import Iterable
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from hybrid_scale import gpu
from hybrid_scale.config import LoraSettings
from hybrid_scale.errors import ModelError, describe, nearest

KEY = "model.lora.targets"
LISTED = 5


def add_lora(backbone: nn.Module, settings: LoraSettings, seed: int) -> PeftModel:
    """The backbone with adapters; `seed` sets their first weights, equal on every rank.

    Raises ModelError: a target that names no layer, another kind of layer, or experts that only some tokens pass through.
    """
    check_targets(backbone, settings)
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]
        lora_dropout=settings.dropout,
        target_modules=settings.targets if settings.targets == "all-linear" else list(settings.targets),
    )
    with gpu.seeded(seed):
        try:
            return get_peft_model(backbone, config)
        except ValueError as error:
            raise ModelError(describe(KEY, settings.targets, str(error))) from None


def check_targets(backbone: nn.Module, settings: LoraSettings) -> None:
    """Raises ModelError as `add_lora` does, before anything is changed."""
    linear = {name for name, module in backbone.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    experts = expert_modules(backbone)
    beside = sorted({name.rpartition(".")[2] for name in linear if not _inside(name, experts)})
    if settings.targets == "all-linear":
        if experts:
            rule = "the model has experts, which only some tokens pass through: adapters there can't be trained and merged"
            raise ModelError(describe(KEY, "all-linear", rule, f"Name layers beside the experts: [{', '.join(beside)}]."))
        return
    modules = {name: module for name, module in backbone.named_modules() if name}
    unmatched = [target for target in settings.targets if not _matches(target, modules)]
    if unmatched:
        rule = f"{len(unmatched)} of {len(settings.targets)} targets match no layer of {type(backbone).__name__}"
        remedy = nearest(unmatched[0].rpartition(".")[2], beside) if len(unmatched) == 1 else f"It has {', '.join(beside)}."
        raise ModelError(describe(KEY, ", ".join(unmatched), rule, remedy))
    for target in settings.targets:
        found = _matches(target, modules)
        other = next((name for name in found if name not in linear), None)
        if other is not None:
            rule = f"adapters must sit on linear layers, and {other} is {type(modules[other]).__name__}"
            raise ModelError(describe(KEY, target, rule, f"Choose of {', '.join(beside)}."))
        if inside := next((name for name in found if _inside(name, experts)), None):
            rule = f"{inside} belongs to experts, which only some tokens pass through: adapters there can't be trained and merged"
            raise ModelError(describe(KEY, target, rule, f"Choose of {', '.join(beside)}."))


def expert_modules(backbone: nn.Module) -> set[str]:
    """Names of the modules that hold a mixture's experts: as tensors of three dimensions, or as a list of modules."""
    found = set()
    for name, module in backbone.named_modules():
        stacked = any(p.ndim > 2 for p in module.parameters(recurse=False)) and not isinstance(module, nn.modules.conv._ConvNd)
        listed = isinstance(module, nn.ModuleList) and name.rpartition(".")[2].endswith("experts")
        if (stacked and "expert" in f"{name} {type(module).__name__}".lower()) or listed:
            found.add(name)
    return found


def _inside(name: str, parents: Iterable[str]) -> bool:
    return any(name == parent or name.startswith(f"{parent}.") for parent in parents)


def _matches(target: str, names: Iterable[str]) -> list[str]:
    """The modules that PEFT takes a target for: of this name, or ending in it at a dot."""
    return [name for name in names if name == target or name.endswith(f".{target}")]


class _FollowingLinear(nn.Linear):
    """A linear layer that multiplies in the type of its input and keeps weight and gradient in its own."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(input, self.weight.to(input.dtype))


def follow_activations(adapted: nn.Module) -> None:
    """LoRA's products in the type of the activations instead of the weights' float32; names and weights stay as they are."""
    for layer in adapted.modules():
        if isinstance(layer, LoraLayer):
            layer.cast_input_dtype_enabled = False
            held: Any
            for held in (layer.lora_A, layer.lora_B):
                for linear in held.values():
                    assert type(linear) is nn.Linear
                    linear.__class__ = _FollowingLinear

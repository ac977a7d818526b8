"""Trained weights -> files. Knows neither the engine that gathered them nor the run directory."""

from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import save_file

from hybrid_scale.errors import ModelError
from hybrid_scale.model.embedder import Embedder

PREFIX = "backbone."


def save_trained(embedder: Embedder, weights: dict[str, torch.Tensor], folder: Path) -> None:
    """Write full CPU weights, named as the embedder's parameters, in PEFT's layout (or `model.safetensors` without LoRA).

    Raises ModelError when a name of the trainable parameters is missing, or an adapter never left its initial zero.
    """
    expected = {name for name, parameter in embedder.named_parameters() if parameter.requires_grad}
    if set(weights) != expected:
        raise ModelError(f"{folder}: weights to save don't match the trained ones: {sorted(expected ^ set(weights))[:5]}.")
    folder.mkdir(parents=True, exist_ok=True)
    stripped = {name.removeprefix(PREFIX): tensor.contiguous() for name, tensor in weights.items()}
    if isinstance(embedder.backbone, PeftModel):
        embedder.backbone.peft_config["default"].save_pretrained(str(folder))
        adapter = {name.replace(".default.", "."): tensor for name, tensor in stripped.items()}
        save_file(adapter, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    else:
        save_file(stripped, folder / "model.safetensors", metadata={"format": "pt"})

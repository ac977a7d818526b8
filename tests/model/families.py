"""Small causal language models of several families as files, their 4-bit forms, and run configs over them."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, PretrainedConfig, Qwen2Config, Qwen3Config

from hybrid_scale.config import RunConfig
from hybrid_scale.model.quantize import quantize
from tests.train.setup import make_config

BATCH = {"input_ids": torch.arange(1, 31).remainder(23)[None], "lengths": torch.tensor([14, 3, 9, 4])}
SIZES = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 51}
# Packed weights of 100, 50 and 185 elements, in 7, 4 and 12 blocks, the last of each shorter than 64 weights: neither 2 nor 4
# ranks share them evenly, and every border lies inside a block.
ODD = {"hidden_size": 20, "intermediate_size": 37}
FAMILIES: dict[str, tuple[PretrainedConfig, torch.dtype, str]] = {
    "llama": (LlamaConfig(**SIZES, **ODD, head_dim=10), torch.float32, "bfloat16"),
    "qwen2": (Qwen2Config(**SIZES, hidden_size=64, intermediate_size=96), torch.bfloat16, "float32"),
    "qwen3": (Qwen3Config(**SIZES, **ODD, head_dim=10), torch.float16, "bfloat16"),
    "gemma3": (Gemma3TextConfig(**SIZES, hidden_size=64, intermediate_size=96, head_dim=32), torch.bfloat16, "bfloat16"),
}
"""Family -> config, type of its checkpoint, `model.dtype`. Float32 where there are biases: DeepSpeed's linear rounds before it
adds them, so that in bfloat16 no ZeRO-3 equals one process."""


def write_checkpoint(folder: Path, family: str) -> Path:
    """A random causal language model in several files, biases and norms away from 0 and 1."""
    config, dtype, _ = FAMILIES[family]
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    model.to(dtype).save_pretrained(folder / family, max_shard_size="8KB")
    assert len(list((folder / family).glob("*.safetensors"))) > 2
    return folder / family


def write_families(place: Path) -> Path:
    """A checkpoint of each family and, as NAME-nf4, its 4-bit form."""
    for family in FAMILIES:
        quantize(str(write_checkpoint(place, family)), place / f"{family}-nf4", FAMILIES[family][2])
    return place


def config_of(folder: Path, name: str, deepspeed: str | None = None, **model: Any) -> RunConfig:
    """A run over `folder/name`, a family's checkpoint or its 4-bit form."""
    family = name.removesuffix("-nf4")
    settings = {"base": str(folder / name), "dtype": FAMILIES[family][2], "quantization": "nf4", "pooling": "mean", **model}
    engine = {"engine": "deepspeed", "deepspeed": deepspeed} if deepspeed else {}
    return make_config(folder, model=settings, training=engine)


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], value) for name, value in expected.items())


def copy_of(source: Path, target: Path) -> Path:
    target.mkdir()
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def merged(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}

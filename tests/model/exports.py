"""Checkpoints as far from their start as after real training, and our own vectors of them: inputs and oracle of export tests."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hybrid_scale.data.text import for_evaluation, load_text_encoder
from hybrid_scale.model.export import save_trained
from hybrid_scale.model.load import load_embedder
from hybrid_scale.model.tiny import write_model, write_tokenizer
from hybrid_scale.model.trained import Trained
from tests.train.setup import make_config

TEXTS = [
    "",
    "a",
    "Where is the station?",
    "Où est la gare ? Straße, naïve.",
    "東京は日本の首都です。人口は千四百万人。",
    "मौसम आज बहुत अच्छा है",
    "القاهرة عاصمة مصر",
    "Москва — столица России",
    " two  spaces\n\tand more ",
    "long text that is cut " * 60,
    "ein Wort",
    "長い" * 200,
]
TOLERANCE = 1e-5
"""Largest difference between numbers of two float32 vectors of length 1. Seen: 3e-7."""
SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 0,
}


def write_base(folder: Path) -> Path:
    """A random Llama whose attention is far from uniform, with its tokenizer."""
    tokenizer = write_tokenizer(TEXTS, folder, vocabulary=400)
    model = write_model(folder, len(tokenizer), hidden=32, layers=2, heads=4)
    spread(model)
    model.save_pretrained(folder)
    return folder


def spread(model: torch.nn.Module) -> None:
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))


def trained(base: Path, folder: Path, facts: dict[str, Any] | None = None, **model: Any) -> Trained:
    """A run's checkpoint with an adapter (or full weights) as far from its start as after real training."""
    lengths = {"max_query_tokens": 32, "max_passage_tokens": 64}
    config = make_config(base.parent, model={"base": str(base), **model}, evaluation=lengths)
    embedder = load_embedder(config.model, seed=1)
    generator = torch.Generator().manual_seed(5)
    weights = {}
    for name, parameter in embedder.named_parameters():
        if parameter.requires_grad:
            weights[name] = parameter.detach() + 0.05 * torch.randn(parameter.shape, generator=generator)
    save_trained(embedder, weights, folder / "adapter")
    return Trained(config, folder / "adapter", 3, for_evaluation(load_text_encoder(config), config.evaluation), **(facts or {}))


def our_vectors(run: Trained, role: Any, limit: int | None = None) -> np.ndarray:
    """[len(TEXTS), D], texts padded together; `limit` replaces the role's longest text."""
    embedder = load_embedder(run.config.model, seed=0, adapter=run.weights).eval()
    encoder = load_text_encoder(run.config)
    if limit is not None:
        encoder.max_tokens[role] = limit
    with torch.no_grad():
        return embedder(**encoder.collate(encoder.encode(role, TEXTS))).numpy()


def distance(first: np.ndarray, second: Any) -> float:
    return float(np.abs(first - np.asarray(second)).max())


def copy_of(base: Path, folder: Path) -> Path:
    return Path(shutil.copytree(base, folder))


def on(base: Path, run: Trained) -> Trained:
    """The same checkpoint with another base."""
    model = run.config.model.model_copy(update={"base": str(base)})
    return Trained(run.config.model_copy(update={"model": model}), *rest(run))


def rest(run: Trained) -> tuple[Any, ...]:
    return run.weights, run.step, run.texts

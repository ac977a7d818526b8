"""Models, tokenizers and rows of the benchmarks, made so that every system sees the same token ids in the same order."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, LlamaConfig, LlamaModel, PreTrainedTokenizerFast

from hybrid_scale.data.records import Pair
from hybrid_scale.data.writing import write_pairs
from hybrid_scale.train.batches import TrainingData

END = "<end>"
VOCABULARY = 8192
SHORTEST, LONGEST = 8, 256
Batch = tuple[list[str], list[str]]
"""Queries and positive passages of one global batch, row by row."""


def write_random_model(folder: Path) -> None:
    """Llama: hidden 256, 4 layers, FFN 704, 4 heads, 8,192 words; its tokenizer puts the end token behind every text."""
    words = {END: 0, "<unknown>": 1} | {f"w{number}": number + 2 for number in range(VOCABULARY - 2)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unknown>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {END}", special_tokens=[(END, 0)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END).save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=1024,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    LlamaModel(config).save_pretrained(folder)


def log_normal(median: float, count: int, rng: np.random.Generator, sigma: float = 0.6) -> np.ndarray:
    """Token lengths, end token included."""
    return np.clip(np.rint(median * np.exp(sigma * rng.standard_normal(count))), SHORTEST, LONGEST).astype(np.int64)


def write_random_pairs(folder: Path, rows: int) -> None:
    """Prepared pairs of one language, no two of a family: queries of 24 tokens in the median, passages of 80."""
    rng = np.random.default_rng(7)
    lengths = np.stack([log_normal(24, rows, rng), log_normal(80, rows, rng)], axis=1)
    write_pairs(_random_rows(lengths, rng), folder, {"name": "random words"})


def _random_rows(lengths: np.ndarray, rng: np.random.Generator) -> Iterator[Pair]:
    for number, (query, passage) in enumerate(lengths):
        texts = [" ".join(f"w{word}" for word in rng.integers(0, VOCABULARY - 2, size - 1)) for size in (query, passage)]
        name = f"r{number}"
        yield Pair(f"random:{number}", name, name, name, "en", "en", texts[0], texts[1])


def copy_with_end_token(model: Path, folder: Path) -> None:
    """A model folder (weights linked) whose tokenizer puts its eos token behind every text, as ours does by itself."""
    folder.mkdir(parents=True)
    for path in model.resolve().iterdir():
        if path.suffix in (".safetensors", ".json") and not path.name.startswith(("tokenizer", "special_tokens")):
            (folder / path.name).symlink_to(path)
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = tokenizer("a")["input_ids"]
    begin = [(tokenizer.bos_token, tokenizer.bos_token_id)] if ids[0] == tokenizer.bos_token_id else []
    specials = [*begin, (tokenizer.eos_token, tokenizer.eos_token_id)]
    template = " ".join([*(token for token, _ in begin), "$A", tokenizer.eos_token])
    tokenizer.save_pretrained(folder)
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=specials)
    backend.save(str(folder / "tokenizer.json"))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # a model's own class would write its template anew
    if tokenizer.pad_token is None:
        settings["pad_token"] = tokenizer.eos_token
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def link_data(data: Path, folder: Path) -> None:
    """A copy of prepared data whose caches (index, lengths) are written beside it instead of into it."""
    shutil.copytree(data, folder, ignore=shutil.ignore_patterns("index", "lengths"), copy_function=_link)


def _link(source: str, target: str) -> None:
    Path(target).symlink_to(Path(source).resolve())


def batches(data: TrainingData, steps: int) -> list[Batch]:
    """The rows of the sampler's first global batches."""
    return [_batch(data, step) for step in range(steps)]


def _batch(data: TrainingData, step: int) -> Batch:
    batch = data.sampler.batch(step)
    queries = data.pairs.queries.column("text", batch.queries)
    passages = data.pairs.passages.column("text", batch.passages)
    positives = batch.column_text[batch.row_column] - len(queries)
    return [queries[i] for i in batch.row_text], [passages[i] for i in positives]

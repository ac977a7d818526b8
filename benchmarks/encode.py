"""Encoding texts: ours to a store against sentence-transformers' encode, in CPU-seconds a text, and ours on 1 and 2 ranks.

    python benchmarks/encode.py                                                  # a tiny random decoder, demo sentences
    python benchmarks/encode.py --model models/gemma3-270m --passages xquad-r/*.json.gz --texts 240 [--json OUT.json]

`--passages`: XQuAD(-R) JSON files named by their language. One script: the English texts; mixed: as many, equally many of each
language. Without files: one to twelve demo sentences joined, of en, and of ar de en es ru zh. Texts are cut at 512 tokens.
Both systems: the same weights and texts, mean pooling, unit vectors, one thread, tokenization included; ours also packs texts
end to end, sorts by tokens, writes float32 vectors to disk with checksums. Theirs: `encode` as it comes (sorted by characters,
batches of 32). Rounds alternate; the least CPU-seconds of each system count (what a busy machine adds is never negative).
Vectors are compared in float32 on a few texts; timed in `--dtype`.
"""

import argparse
import gzip
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _environment  # noqa: F401 (before the heavy libraries)
import numpy as np
import torch
from _inputs import copy_with_end_token
from _ranks import machine, run_ranks
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

from hybrid_scale import dist
from hybrid_scale.config import RunConfig, validate
from hybrid_scale.data.prepared import RetrievalSet
from hybrid_scale.data.records import Judgment, Passage, Query, Record
from hybrid_scale.data.sources import demo
from hybrid_scale.data.text import load_text_encoder
from hybrid_scale.data.writing import write_retrieval
from hybrid_scale.model.load import load_embedder
from hybrid_scale.model.tiny import write_model, write_tokenizer
from hybrid_scale.retrieval.encode import Encoding, encode_stored
from hybrid_scale.retrieval.stored import StoredVectors

CUT = 512
COMPARED = 12
GOALS = {"one script": 1.0, "mixed scripts": 1.15, "2 ranks": 1.9}
DEMO = ("en", "ar", "de", "es", "ru", "zh")


# ----------------------------------------------------------------------------------------------------------------- texts


def xquad_texts(paths: list[Path]) -> dict[str, list[str]]:
    texts = {}
    for path in paths:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else open(path, encoding="utf-8") as file:
            articles = json.load(file)["data"]
        texts[path.name.split(".")[0]] = [p["context"] for article in articles for p in article["paragraphs"]]
    return texts


def demo_texts(count: int) -> dict[str, list[str]]:
    sentences: dict[str, list[str]] = {lang: [] for lang in DEMO}
    for record in demo.read("test", DEMO):
        if isinstance(record, Passage):
            sentences[record.lang].append(record.text)
    rng = np.random.default_rng(0)
    draw = lambda held: " ".join(held[i] for i in rng.integers(0, len(held), rng.integers(1, 13)))  # noqa: E731
    return {lang: [draw(held) for _ in range(count)] for lang, held in sentences.items()}


def materials(by_language: dict[str, list[str]], count: int) -> dict[str, list[str]]:
    """English texts, and as many of all languages in turn."""
    rng = np.random.default_rng(1)
    shuffled = {lang: [held[i] for i in rng.permutation(len(held))] for lang, held in by_language.items()}
    languages = list(shuffled)
    mixed = [shuffled[languages[at % len(languages)]][at // len(languages)] for at in range(count)]
    return {"one script": shuffled["en"][:count], "mixed scripts": mixed}


def as_set(texts: list[str], folder: Path) -> RetrievalSet:
    records: list[Record] = [Passage("b", f"p{at}", "und", text) for at, text in enumerate(texts)]
    write_retrieval([*records, Query("b", "q", "und", "q", "q"), Judgment("b", "q", "p0", 1)], folder, {"name": "benchmark"})
    return RetrievalSet(folder)


def tiny_model(folder: Path, texts: dict[str, list[str]]) -> None:
    tokenizer = write_tokenizer([text for held in texts.values() for text in held], folder, vocabulary=8000)
    write_model(folder, len(tokenizer), hidden=256, layers=4, heads=4)


# --------------------------------------------------------------------------------------------------------------- systems


def configuration(model: Path, dtype: str, budget: int) -> RunConfig:
    return validate(
        RunConfig,
        {
            "data": {"train": "none", "max_passage_tokens": CUT},
            "model": {"base": str(model), "dtype": dtype, "lora": {"rank": 1}, "pooling": "mean", "passage_prompt": ""},
            "training": {"max_steps": 1, "max_tokens_per_embedding_batch": budget},
        },
        "benchmark",
    )


def our_encoding(config: RunConfig) -> Encoding:
    without_lora = config.model.model_copy(update={"lora": None})
    embedder = load_embedder(without_lora, 0).eval()
    tokens = config.training.max_tokens_per_embedding_batch
    return Encoding({"b": 1}, load_text_encoder(config), lambda batch: embedder(**batch), tokens, "float32")


def theirs(model: Path, dtype: str) -> SentenceTransformer:
    transformer = Transformer(str(model), model_kwargs={"dtype": getattr(torch, dtype)}, max_seq_length=CUT)
    pooling = Pooling(transformer.get_embedding_dimension(), pooling_mode="mean")
    return SentenceTransformer(modules=[transformer, pooling, Normalize()], device="cpu")


def ours_run(encoding: Encoding, task: RetrievalSet) -> np.ndarray:
    with tempfile.TemporaryDirectory() as folder:
        store = encode_stored(task, "passage", Path(folder), encoding)
        return StoredVectors(store, 0, store.rows, float("inf"))[:]


def cpu_seconds(action: Callable[[], Any]) -> float:
    started = time.process_time()
    action()
    return time.process_time() - started


def on_rank(model: str, dtype: str, budget: int, data: str, store: str) -> tuple[float, float]:
    """CPU-seconds and seconds of this rank, models loaded."""
    dist.start()
    encoding = our_encoding(configuration(Path(model), dtype, budget))
    dist.barrier()
    wall = time.monotonic()
    used = cpu_seconds(lambda: encode_stored(RetrievalSet(data), "passage", Path(store), encoding))
    return used, time.monotonic() - wall


# ------------------------------------------------------------------------------------------------------------------- run


def difference(model: Path, peer_model: Path, budget: int, texts: list[str], folder: Path) -> float:
    """Largest difference of a coordinate in float32."""
    mine = ours_run(our_encoding(configuration(model, "float32", budget)), as_set(texts, folder))
    return float(np.abs(mine - theirs(peer_model, "float32").encode(texts)).max())


def compare(given: argparse.Namespace, peer_model: Path, texts: list[str], folder: Path) -> dict[str, Any]:
    task = as_set(texts, folder)
    encoding, peer = our_encoding(configuration(given.model, given.dtype, given.budget)), theirs(peer_model, given.dtype)
    seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
    for _ in range(given.rounds):
        seconds["ours"].append(cpu_seconds(lambda: ours_run(encoding, task)))
        seconds["theirs"].append(cpu_seconds(lambda: peer.encode(texts)))
    lengths = np.array([len(ids) for ids in encoding.encoder.encode("passage", texts)])
    return {
        "texts": len(texts),
        "tokens": int(lengths.sum()),
        "cpu_s": seconds,
        "cpu_ms_per_text": {name: 1000 * min(values) / len(texts) for name, values in seconds.items()},
        "ratio": min(seconds["theirs"]) / min(seconds["ours"]),
    }


def on_ranks(given: argparse.Namespace, texts: list[str], folder: Path) -> dict[str, Any]:
    """CPU-seconds of one rank alone over those of the busier of two: what two ranks gain on cores of their own."""
    as_set(texts, folder / "set")
    results = {}
    for world in (1, 2):
        held = (str(given.model), given.dtype, given.budget, str(folder / "set"), str(folder / f"store{world}"))
        results[world] = run_ranks(on_rank, world, *held)
    slowest = {world: max(used for used, _ in ranks) for world, ranks in results.items()}
    walls = {world: max(wall for _, wall in ranks) for world, ranks in results.items()}
    return {"cpu_s": results, "speedup_cpu": slowest[1] / slowest[2], "speedup_wall": walls[1] / walls[2]}


def run(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    by_language = xquad_texts(given.passages) if given.passages else demo_texts(given.texts)
    chosen = materials(by_language, given.texts)
    if given.model is None:
        given.model = folder / "model"
        tiny_model(given.model, chosen)
    peer_model = folder / "with_end"
    copy_with_end_token(given.model, peer_model)
    result: dict[str, Any] = {
        "model": given.model.name,
        "dtype": given.dtype,
        "budget": given.budget,
        "largest_difference_float32": difference(
            given.model, peer_model, given.budget, chosen["mixed scripts"][:COMPARED], folder / "few"
        ),
    }
    for name, texts in chosen.items():
        result[name] = compare(given, peer_model, texts, folder / name.replace(" ", "_"))
        print(name, json.dumps(result[name]), file=sys.stderr, flush=True)
    result["2 ranks"] = on_ranks(given, chosen["mixed scripts"], folder)
    return {**result, "goals": GOALS, "machine": machine()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of a decoder with its tokenizer (default: tiny, random)")
    parser.add_argument("--passages", type=Path, nargs="+", help="XQuAD(-R) JSON files, also .gz")
    parser.add_argument("--texts", type=int, default=384)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--budget", type=int, default=2048, help="tokens of our micro-batches")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        result = run(given, Path(folder))
    text = json.dumps(result, indent=1)
    print(text)
    if given.json:
        given.json.write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Score a trained run, an untrained model or given embeddings on a prepared retrieval set.

    accelerate launch launch/evaluate.py DATA_DIR --run RUN_DIR --out FILE.json
    accelerate launch launch/evaluate.py DATA_DIR --config RUN.yaml --out FILE.json
    accelerate launch launch/evaluate.py DATA_DIR --embeddings DIR --out FILE.json

--run takes the latest checkpoint of a run directory, --config the base model of a run's YAML as it is. DIR holds corpus.npy,
corpus_ids.txt, queries.npy and queries_ids.txt. Every process encodes and searches its share; the numbers don't depend on how
many there are (`python launch/evaluate.py` is one). They are defined in hybrid_scale/retrieval/evaluate.py.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np

from hybrid_scale import dist
from hybrid_scale.config import load_config
from hybrid_scale.data.records import RetrievalSet
from hybrid_scale.data.text import load_text_encoder
from hybrid_scale.errors import HybridScaleError, RunError, describe
from hybrid_scale.model.load import load_embedder
from hybrid_scale.retrieval.encode import encode_corpus, encode_queries
from hybrid_scale.retrieval.evaluate import evaluate
from hybrid_scale.retrieval.index import Shard
from hybrid_scale.retrieval.vectors import open_embeddings
from hybrid_scale.runs import RunDirectory, write_json
from hybrid_scale.train.checkpoint import latest


def arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="prepared retrieval set (launch/prepare.py)")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", type=Path, help="run directory: its latest checkpoint is scored")
    source.add_argument("--config", type=Path, help="YAML of a run: its base model is scored, untrained")
    source.add_argument("--embeddings", type=Path, help="folder with the vectors of its corpus and queries")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--top-k", type=int, default=100, help="results a query in --run-file (default 100)")
    parser.add_argument("--run-file", type=Path, help="also write the results as a TREC run")
    chosen = parser.parse_args(given)
    if chosen.top_k < 1:
        parser.error("--top-k must be at least 1")
    return chosen


def summary(result: dict[str, Any]) -> str:
    """One line of facts, then one line a metric."""
    head = f"{result['task']}: {result['queries']} queries, {result['passages']} passages, {len(result['languages'])} languages"
    lines = [f"  {name:26s}{'-' if value is None else f'{value:.4f}'}" for name, value in result["metrics"].items()]
    notes = [f"  {result[key]} {key.replace('_', ' ')}" for key in ("queries_without_relevant", "skipped_pairs") if result[key]]
    return "\n".join([head, *lines, *notes])


def encode(chosen: argparse.Namespace, task: RetrievalSet) -> tuple[np.ndarray, Shard]:
    """Vectors of all queries and of this rank's share of the corpus, by a replica of the model on each rank."""
    run = RunDirectory(chosen.run) if chosen.run else None
    config = run.config() if run else load_config(chosen.config)
    checkpoint = latest(run) if run else None
    if run and checkpoint is None:
        raise RunError(describe(str(run.checkpoints), "no complete checkpoint", "a trained run is needed", "Train it first."))
    embedder = load_embedder(config.model, config.run.seed, checkpoint / "adapter" if checkpoint else None)
    embedder = embedder.to(dist.device()).eval()
    encoder, tokens = load_text_encoder(config), config.training.max_tokens_per_embedding_batch
    return (
        encode_queries(task, encoder, lambda batch: embedder(**batch), tokens),
        Shard(*encode_corpus(task, encoder, lambda batch: embedder(**batch), tokens)),
    )


def main(given: list[str] | None = None) -> int:
    chosen = arguments(given)
    try:
        dist.start()
        task = RetrievalSet(chosen.data)
        queries, shard = open_embeddings(chosen.embeddings, task) if chosen.embeddings else encode(chosen, task)
        result = evaluate(task, queries, shard, chosen.top_k, chosen.run_file)
        dist.first_rank_does(lambda: write_json(chosen.out, result))
        if dist.rank() == 0:
            print(summary(result))
    except HybridScaleError as error:
        if dist.rank() == 0:
            print(error, file=sys.stderr)
        return 2
    finally:
        dist.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())

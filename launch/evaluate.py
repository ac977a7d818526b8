"""Score given embeddings on a prepared retrieval set.

    python launch/evaluate.py DATA_DIR --embeddings DIR --out FILE.json
    accelerate launch launch/evaluate.py DATA_DIR --embeddings DIR --out FILE.json

DIR holds corpus.npy, corpus_ids.txt, queries.npy and queries_ids.txt. Every process searches its slice of the corpus; the
numbers don't depend on how many there are. They are defined in hybrid_scale/retrieval/evaluate.py.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from hybrid_scale import dist
from hybrid_scale.data.records import RetrievalSet
from hybrid_scale.errors import HybridScaleError
from hybrid_scale.retrieval.evaluate import evaluate
from hybrid_scale.retrieval.vectors import open_embeddings
from hybrid_scale.runs import write_json


def arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="prepared retrieval set (launch/prepare.py)")
    source = parser.add_mutually_exclusive_group(required=True)
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


def main(given: list[str] | None = None) -> int:
    chosen = arguments(given)
    try:
        dist.start()
        task = RetrievalSet(chosen.data)
        queries, shard = open_embeddings(chosen.embeddings, task)
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

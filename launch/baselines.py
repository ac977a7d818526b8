"""Score baselines on prepared retrieval sets: BM25, published encoders, given vectors, vectors without their language.

    python launch/baselines.py data/scifact data/xquad_r --out baselines --bm25
    python launch/baselines.py data/xquad_r --out baselines --encoder intfloat/multilingual-e5-small --query-prompt "query: "
    python launch/baselines.py data/xquad_r --out baselines --embeddings vectors/me5-small --remove language_mean lir:1

Each result is OUT/NAME/eval/SET.json, as a run directory has it. --remove adds, for every encoder and every folder of vectors,
the same vectors after that removal (hybrid_scale/retrieval/baselines/languages.py says what it is fitted on). The twelve parts of
CQADupStack are also averaged into one result. Encoders divide the corpus over the processes of `accelerate launch`.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hybrid_scale import dist
from hybrid_scale.data.prepared import RetrievalSet
from hybrid_scale.errors import ConfigError, HybridScaleError, describe
from hybrid_scale.retrieval.baselines import run as baselines
from hybrid_scale.retrieval.baselines.bm25 import Tokenizer
from hybrid_scale.retrieval.baselines.languages import parse
from hybrid_scale.retrieval.published_encoder import POOLINGS, Encoder, EncoderOptions

COLUMNS = ("ndcg@10", "recall@100", "mono_map", "cross_map", "multi_map", "rank_distance")


def arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="+", help="prepared retrieval sets (launch/prepare.py)")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--bm25", action="store_true", help="BM25, k1 .9, b .4")
    parser.add_argument("--stem", action="store_true", help="Snowball stemmers for BM25")
    parser.add_argument("--encoder", nargs="+", default=[], help="folders or Hub ids of encoders")
    parser.add_argument("--query-prompt", help="put before queries, instead of the model's own prompt")
    parser.add_argument("--passage-prompt")
    parser.add_argument("--pooling", choices=POOLINGS, help="instead of the model's own")
    parser.add_argument("--no-normalise", action="store_true", help="keep the vectors' lengths: scores are inner products")
    parser.add_argument("--max-tokens", type=int, help="cut texts here")
    parser.add_argument("--batch", type=int, default=32, help="texts at a time")
    parser.add_argument("--embeddings", type=Path, nargs="+", default=[], help="folders with vectors; one per data set, in order")
    parser.add_argument("--remove", nargs="+", default=[], metavar="METHOD", help="language_mean, lir, lir:R")
    parser.add_argument("--save-vectors", type=Path, help="also keep encoders' vectors, as FOLDER/ENCODER/SET")
    return parser.parse_args(given)


def checked(chosen: argparse.Namespace) -> argparse.Namespace:
    """Raises ConfigError: nothing asked for, folders of vectors that don't match the sets."""
    if not (chosen.bm25 or chosen.encoder or chosen.embeddings):
        raise ConfigError(describe("baselines", "none", "give --bm25, --encoder or --embeddings"))
    if chosen.embeddings and len(chosen.embeddings) != len(chosen.data):
        found = f"{len(chosen.embeddings)} for {len(chosen.data)} data sets"
        raise ConfigError(describe("--embeddings", found, "one folder per data set, in the same order"))
    return chosen


def results(chosen: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Every result asked for, one after another. Collective."""
    tasks = [RetrievalSet(directory) for directory in chosen.data]
    removals = [parse(text) for text in chosen.remove]
    if chosen.bm25:
        for task in tasks:
            yield baselines.bm25(task, chosen.out, Tokenizer(chosen.stem))
    for directory, task in zip(chosen.embeddings, tasks, strict=False):
        yield from baselines.dense_results(task, chosen.out, baselines.given(directory, task), "embeddings", removals)
    for model in chosen.encoder:
        encoder = Encoder(options(chosen, model))
        for task in tasks:
            vectors = baselines.encoded(task, encoder)
            if chosen.save_vectors:
                baselines.save_vectors(chosen.save_vectors / vectors.name / task.name, task, vectors)
            yield from baselines.dense_results(task, chosen.out, vectors, "encoder", removals)


def options(chosen: argparse.Namespace, model: str) -> EncoderOptions:
    return EncoderOptions(
        model=model,
        query_prompt=chosen.query_prompt,
        passage_prompt=chosen.passage_prompt,
        pooling=chosen.pooling,
        normalise=not chosen.no_normalise,
        max_tokens=chosen.max_tokens,
        batch=chosen.batch,
    )


def line(result: dict[str, Any]) -> str:
    values = [f"{name} {result['metrics'][name]:.4f}" for name in COLUMNS if result["metrics"].get(name) is not None]
    return f"{result['baseline']['name']:32s} {result['task']:20s} {'  '.join(values)}"


def main(given: list[str] | None = None) -> int:
    """Exit code: 0, or 2 with a message on stderr."""
    chosen = arguments(given)
    try:
        dist.start()
        checked(chosen)
        made = []
        for result in results(chosen):
            made.append(result)
            if dist.rank() == 0:
                print(line(result), flush=True)
        for mean in baselines.averages(chosen.out, made, [RetrievalSet(directory) for directory in chosen.data]):
            if dist.rank() == 0:
                print(line(mean), flush=True)
    except HybridScaleError as error:
        if dist.rank() == 0:
            print(error, file=sys.stderr)
        return 2
    finally:
        dist.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())

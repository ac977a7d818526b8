"""Score baselines on prepared retrieval sets: BM25, published encoders, given vectors, vectors without their language.

    python launch/baselines.py data/scifact data/xquad_r --out baselines --bm25
    python launch/baselines.py data/xquad_r --out baselines --encoder intfloat/multilingual-e5-small \\
        --query-prompt "query: " --passage-prompt "passage: "
    python launch/baselines.py data/xquad_r --out baselines --embeddings vectors/me5-small --remove language_mean lir:1

Each result is OUT/NAME/eval/SET.json, as a run directory has it. --remove adds, for every encoder and every folder of vectors,
the same vectors after that removal (hybrid_scale/retrieval/language_removal.py says what it is fitted on). A set in parts, as
prepare.py makes CQADupStack, is one folder and gives one result, the mean of its parts; its --embeddings folder holds a folder
for each part. Encoders divide the corpus over the processes of `accelerate launch`.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from hybrid_scale import dist
from hybrid_scale.command_line import read_arguments
from hybrid_scale.data.prepared import RetrievalSet
from hybrid_scale.errors import ConfigError, describe
from hybrid_scale.retrieval.baselines import run as baselines
from hybrid_scale.retrieval.baselines.bm25 import Tokenizer
from hybrid_scale.retrieval.baselines.run import Results, Room, Table, bm25, dense_results, results_on, without
from hybrid_scale.retrieval.language_removal import parse
from hybrid_scale.retrieval.parts import beside, open_sets
from hybrid_scale.retrieval.published_encoder import POOLINGS, Encoder, EncoderOptions
from hybrid_scale.retrieval.vectors import Similarity, similarity_note
from hybrid_scale.runs import check_writable


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
    kind = "score of --embeddings: of the vectors as they stand (inner_product, the default), or at unit length (cosine)"
    parser.add_argument("--similarity", choices=get_args(Similarity), default="inner_product", help=kind)
    parser.add_argument("--remove", nargs="+", default=[], metavar="METHOD", help="language_mean, lir, lir:R")
    parser.add_argument("--save-vectors", type=Path, help="also keep encoders' vectors, as FOLDER/ENCODER/SET")
    room = "memory for a rank's passages; beyond it they are read from disk (default 4)"
    parser.add_argument("--memory-gib", type=float, default=4.0, help=room)
    return read_arguments(parser, given)


def checked(chosen: argparse.Namespace) -> argparse.Namespace:
    """All that is known before anything is computed. Raises ConfigError or DataError."""
    if not (chosen.bm25 or chosen.encoder or chosen.embeddings):
        raise ConfigError(describe("baselines", "none", "give --bm25, --encoder or --embeddings"))
    if chosen.embeddings and len(chosen.embeddings) != len(chosen.data):
        found = f"{len(chosen.embeddings)} for {len(chosen.data)} data sets"
        raise ConfigError(describe("--embeddings", found, "one folder per data set, in the same order"))
    for key, value in (("--batch", chosen.batch), ("--max-tokens", chosen.max_tokens), ("--memory-gib", chosen.memory_gib)):
        if value is not None and not value > 0:
            raise ConfigError(describe(key, value, "must be above 0"))
    if chosen.save_vectors and dist.world_size() != 1:
        raise ConfigError(
            describe("--save-vectors", f"{dist.world_size()} ranks", "one process writes them", "Start one process.")
        )
    sources = (["bm25"] if chosen.bm25 else []) + [options(chosen, model).name for model in chosen.encoder]
    removals = [parse(text) for text in chosen.remove]
    for directory in chosen.data:
        open_sets(directory)
    for number, directory in enumerate(chosen.data):
        names = sources + ([chosen.embeddings[number].name] if chosen.embeddings else [])
        dense = [name for name in names if name != "bm25"]
        baselines.check_results(chosen.out, [*names, *(without(name, r) for name in dense for r in removals)], [directory])
    baselines.check_results(chosen.out, sources, chosen.data)
    dist.first_rank_does(lambda: check_writable(chosen.out / "test"))
    return chosen


def results(chosen: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Every result asked for, one after another. Collective."""
    removals = [parse(text) for text in chosen.remove]
    room = Room(chosen.memory_gib * 2**30, chosen.out)
    for directory in chosen.data if chosen.bm25 else ():
        yield from results_on(
            directory, chosen.out, lambda task, table: iter([bm25(task, table("bm25"), Tokenizer(chosen.stem))])
        )
    for folder, directory in zip(chosen.embeddings, chosen.data, strict=False):

        def of_folder(task: RetrievalSet, table: Table, folder: Path = folder, directory: Path = directory) -> Results:
            vectors = baselines.given(beside(folder, directory, task), task, folder.name, room, chosen.similarity)
            return dense_results(task, table, vectors, "embeddings", removals, room)

        yield from results_on(directory, chosen.out, of_folder)
    for model in chosen.encoder:
        encoder = Encoder(options(chosen, model))
        if dist.rank() == 0 and (missing := encoder.missing_prompts()):
            print(f"warning: {missing}", file=sys.stderr)
        for directory in chosen.data:

            def of_encoder(task: RetrievalSet, table: Table, encoder: Encoder = encoder, directory: Path = directory) -> Results:
                with baselines.encoded(task, encoder, room) as vectors:
                    if chosen.save_vectors:
                        kept = chosen.save_vectors / vectors.name / directory.name
                        baselines.save_vectors(beside(kept, directory, task), task, vectors)
                    yield from dense_results(task, table, vectors, "encoder", removals, room)

            yield from results_on(directory, chosen.out, of_encoder)


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
    headline, metrics = result["protocol"]["headline"], result["metrics"]
    values = [f"{name} {metrics[name]:.4f}" for name in headline if metrics.get(name) is not None]
    settings = result["baseline"]["settings"]
    if settings.get("passage_lengths"):
        values.append(f"[{similarity_note(settings['similarity'], settings['passage_lengths'])}]")
    return f"{result['baseline']['name']:32s} {result['task']:20s} {'  '.join(values)}"


def main(given: list[str] | None = None) -> int:
    """Exit code: see dist.run_door."""
    chosen = arguments(given)

    def work() -> None:
        for result in results(checked(chosen)):
            if dist.rank() == 0:
                print(line(result), flush=True)

    return dist.run_door(work)


if __name__ == "__main__":
    sys.exit(main())

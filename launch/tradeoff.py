"""What compressed and approximate indexes save and lose on given embeddings, against the certified exact list.

    python launch/tradeoff.py vectors/me5-small data/xquad_r --out studies/index-xquad-r
    python launch/tradeoff.py vectors/me5-small data/xquad_r --out DIR --variants flat:fp32 sq:8 rabitq+rescore:4 --questions 200

EMBEDDINGS holds corpus.npy, corpus_ids.txt, queries.npy and queries_ids.txt, or the stores that launch/evaluate.py keeps (a
run's embeddings/SET/CHECKPOINT). Writes tradeoff.json, tradeoff.csv, tradeoff.html.
Where the set's protocol ranks a query in the passages of its own language (MIRACL, Mr. TyDi), each language has its own index.
One process, --threads threads. Variants and their names: hybrid_scale/retrieval/tradeoff/variants.py; measures and verdicts:
hybrid_scale/retrieval/tradeoff/run.py. A variant of the default list that can't run here (no GPU) is listed with the reason;
one that was asked for by name is an error.
"""

import argparse
import sys
from pathlib import Path

from hybrid_scale import dist
from hybrid_scale.command_line import read_arguments
from hybrid_scale.data.prepared import RetrievalSet
from hybrid_scale.errors import DataError, describe
from hybrid_scale.retrieval.lengths import text_lengths_of
from hybrid_scale.retrieval.parts import one_set
from hybrid_scale.retrieval.tradeoff import report as tradeoff_report
from hybrid_scale.retrieval.tradeoff import run as tradeoff
from hybrid_scale.retrieval.tradeoff.variants import defaults, parse
from hybrid_scale.retrieval.vectors import open_embeddings
from hybrid_scale.runs import check_writable


def arguments(given: list[str] | None) -> argparse.Namespace:
    standard = tradeoff.Options()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("embeddings", type=Path, help="folder with the vectors of the set's corpus and queries")
    parser.add_argument("data", type=Path, help="prepared retrieval set (launch/prepare.py)")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--variants", nargs="+", metavar="NAME", help="instead of the default list")
    parser.add_argument("--k", type=int, default=standard.k, help=f"results a query (default {standard.k})")
    parser.add_argument("--margin", type=float, default=standard.margin, help=f"of equivalence (default {standard.margin})")
    parser.add_argument("--threads", type=int, default=standard.threads, help="of building and searching (default 1)")
    parser.add_argument("--questions", type=int, default=0, help="study so many parallel questions only, drawn by a fixed seed")
    room = (
        "memory for the largest index; stored vectors are held up to a quarter of it, else read from disk (default %(default)s)"
    )
    parser.add_argument("--memory-gib", type=float, default=standard.memory_gib, help=room)
    return read_arguments(parser, given)


def chosen_variants(given: argparse.Namespace, task: RetrievalSet, dimensions: int) -> list[str]:
    """Raises DataError: a variant asked for can't run here."""
    smallest = tradeoff.smallest_pool(task)
    if not given.variants:
        return defaults(smallest, dimensions)
    for name in given.variants:
        reason = tradeoff.refusal(parse(name, smallest, dimensions), len(task.corpus), given.memory_gib)
        if reason is not None:
            raise DataError(describe("--variants", name, reason, "Leave it out here."))
    return list(given.variants)


def study(chosen: argparse.Namespace) -> None:
    """Raises DataError: what can't be studied, results that are there already."""
    if chosen.out.exists() and (not chosen.out.is_dir() or any(chosen.out.iterdir())):
        found = "a non-empty folder" if chosen.out.is_dir() else "a file"
        raise DataError(describe(str(chosen.out), found, "results are never overwritten", "Choose another --out."))
    task = one_set(chosen.data, "an index holds one set")
    names = ("k", "margin", "threads", "questions", "memory_gib")
    options = tradeoff.Options(**{name: getattr(chosen, name) for name in names})
    tradeoff.check(task, options)
    queries, shard = open_embeddings(chosen.embeddings, task, chosen.memory_gib / 4)
    variants = chosen_variants(chosen, task, queries.shape[1])
    check_writable(chosen.out / "tradeoff.json")
    bench = tradeoff.set_up(task, queries, shard, options)
    points = []
    for point in tradeoff.study(bench, variants):
        points.append(point)
        print(tradeoff_report.line(point, options.k), flush=True)
    lengths = {"text_lengths": text_lengths_of(chosen.embeddings)}
    tradeoff_report.write(chosen.out, tradeoff.finished(bench, task, points) | lengths)


def main(given: list[str] | None = None) -> int:
    """Exit code: see dist.run_door."""
    chosen = arguments(given)
    return dist.run_door(lambda: study(chosen))


if __name__ == "__main__":
    sys.exit(main())

"""Score a trained run, an untrained model, given embeddings or a TREC run on a prepared retrieval set.

    accelerate launch launch/evaluate.py DATA_DIR --run RUN_DIR [--best] --out FILE.json
    accelerate launch launch/evaluate.py DATA_DIR --config RUN.yaml --out FILE.json
    accelerate launch launch/evaluate.py DATA_DIR --embeddings DIR --out FILE.json
    python launch/evaluate.py DATA_DIR --run-in RESULTS.run --out FILE.json
    python launch/evaluate.py --run-in RESULTS.run --qrels QRELS --out FILE.json

--run takes the latest checkpoint of a run directory (--best: the one that checkpoints/best names), --config the base model of a
run's YAML as it is. Their embeddings are kept in --store, by default RUN_DIR/embeddings/SET/CHECKPOINT-LENGTHS: the same command
again goes on after a kill and searches without encoding. --embeddings DIR holds such stores, or corpus.npy, corpus_ids.txt,
queries.npy and queries_ids.txt. A set in parts (CQADupStack) is one folder and one result, the mean of its parts; its stores and
vectors lie in a folder for each part. Every process encodes what is free and searches its share; the numbers don't depend on how
many there are (`python launch/evaluate.py` is one). They are defined in hybrid_scale/retrieval/measures.py. FILE.parquet beside
FILE.json holds the values of single queries. Files of another kind are never overwritten. SIGTERM, Ctrl-C and SIGHUP end it at
once with exit code 3.
"""

import argparse
import sys
from pathlib import Path
from typing import Any, get_args

from hybrid_scale.signals import LISTENER

if __name__ == "__main__":
    LISTENER.start()  # loading the libraries takes seconds, in which Ctrl-C is no traceback either

from hybrid_scale import dist
from hybrid_scale.checkpoints import chosen as checkpoint_of
from hybrid_scale.command_line import read_arguments
from hybrid_scale.config import RunConfig, load_config
from hybrid_scale.data.prepared import RetrievalSet
from hybrid_scale.errors import RunError, describe
from hybrid_scale.planning.planner import as_planned
from hybrid_scale.retrieval.benchmark import trained_on
from hybrid_scale.retrieval.evaluate import evaluate, evaluate_run_file, write_table
from hybrid_scale.retrieval.language_means import without_language_means
from hybrid_scale.retrieval.lengths import cut_warning, lengths_note, text_lengths_of
from hybrid_scale.retrieval.parts import beside, one_set, open_sets, score_all
from hybrid_scale.retrieval.scored_model import ScoredModel
from hybrid_scale.retrieval.trec import check_ids, score_files, write_qrels
from hybrid_scale.retrieval.vectors import Similarity, open_embeddings, passage_lengths, similarity_note
from hybrid_scale.runs import RunDirectory, check_writable, read_json, write_json


def arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="?", help="prepared retrieval set (launch/prepare.py)")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", type=Path, help="run directory: its latest checkpoint is scored")
    source.add_argument("--config", type=Path, help="YAML of a run: its base model is scored, untrained")
    source.add_argument("--embeddings", type=Path, help="folder with the vectors of its corpus and queries")
    source.add_argument("--run-in", type=Path, help="results of another system as a TREC run")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write; single queries go to .parquet beside it")
    parser.add_argument("--best", action="store_true", help="with --run: the checkpoint that scored best in training")
    parser.add_argument("--store", type=Path, help="folder for the embeddings of --run and --config")
    parser.add_argument("--top-k", type=int, default=100, help="results a query in --run-file (default 100)")
    parser.add_argument("--run-file", type=Path, help="also write the results as a TREC run")
    parser.add_argument("--qrels", type=Path, help="with --run-in and without a prepared set: TREC judgments")
    parser.add_argument("--qrels-out", type=Path, help="also write the judgments of the set as TREC qrels")
    order = "order of --run-in: `score` as trec_eval (ties by the higher id), or its column `rank`"
    parser.add_argument("--run-order", choices=["score", "rank"], default="score", help=order)
    kind = "score of --embeddings: of the vectors as they stand (inner_product, the default), or at unit length (cosine)"
    parser.add_argument("--similarity", choices=get_args(Similarity), help=kind)
    own = "a passage with the query's id is no result (BEIR's rule; by default as the prepared set says)"
    parser.add_argument("--drop-own-id", action=argparse.BooleanOptionalAction, default=None, help=own)
    for role in ("query", "passage"):
        cut = f"longest {role} in tokens for --run and --config (default: evaluation.max_{role}_tokens)"
        parser.add_argument(f"--max-{role}-tokens", type=int, help=cut)
    parser.add_argument("--memory-gib", type=float, help="memory for a rank's vectors (default: evaluation.shard_memory_gib)")
    chosen = read_arguments(parser, given)
    _refuse_contradictions(parser, chosen)
    return chosen


def _refuse_contradictions(parser: argparse.ArgumentParser, chosen: argparse.Namespace) -> None:
    if chosen.top_k < 1:
        parser.error(f"--top-k is {chosen.top_k}: it must be at least 1")
    if chosen.memory_gib is not None and not chosen.memory_gib > 0:
        parser.error(f"--memory-gib is {chosen.memory_gib}: it must be above 0")
    if chosen.run_order != "score" and not chosen.run_in:
        parser.error("--run-order needs --run-in")
    if chosen.similarity and not chosen.embeddings:
        parser.error("--similarity needs --embeddings: a model's own vectors are of unit length")
    chosen.similarity = chosen.similarity or "inner_product"
    if chosen.out.suffix != ".json":
        parser.error(f"--out is {chosen.out}: its name must end in .json (the table beside it in .parquet)")
    if chosen.best and not chosen.run:
        parser.error("--best needs --run")
    for key, value in (("--store", chosen.store), *_lengths(chosen)):
        if value is not None and not (chosen.run or chosen.config):
            parser.error(f"{key} needs --run or --config")
    for key, value in _lengths(chosen):
        if value is not None and value < 1:
            parser.error(f"{key} is {value}: it must be at least 1")
    if bool(chosen.data) == bool(chosen.qrels) or (chosen.qrels and not chosen.run_in):
        parser.error("give a prepared set, or --run-in with --qrels")


def _lengths(chosen: argparse.Namespace) -> tuple[tuple[str, int | None], ...]:
    return ("--max-query-tokens", chosen.max_query_tokens), ("--max-passage-tokens", chosen.max_passage_tokens)


COUNTS = {
    "queries_without_relevant": ": each counts 0",
    "queries_without_judgment": ": left out",
    "queries_without_results": "",
    "skipped_pairs": "",
    "own_ids_dropped": "",
}
"""What is told of a result beside its metrics, and what it means for them."""


def summary(result: dict[str, Any]) -> str:
    """One line of facts, then one line a metric."""
    head = f"{result.get('task', result.get('run'))}: {result['queries']} queries"
    if "passages" in result:
        head += f", {result['passages']} passages, {len(result['languages'])} languages"
    lines = [f"  {name:26s}{'-' if value is None else f'{value:.4f}'}" for name, value in result["metrics"].items()]
    rule = result.get("protocol")
    lines = [f"  scored as {rule['name']}: pools {rule['pools']}, {rule['mean']}", *lines] if rule else lines
    notes = [f"  {result[key]} {key.replace('_', ' ')}{meaning}" for key, meaning in COUNTS.items() if result.get(key)]
    if "text_lengths" in result:
        notes.append(f"  {cut_warning(result) or lengths_note(result['text_lengths'])}")
    if moved := result.get("without_language_means"):
        headline = result["protocol"]["headline"]
        shown = ", ".join(f"{name} {moved['metrics'][name]:.4f}" for name in headline if moved["metrics"].get(name) is not None)
        notes.append(f"  without the means of languages: {shown}")
    if "similarity" in result:
        notes.append(f"  scores: {similarity_note(result['similarity'], result.get('passage_lengths'))}")
    refusals = [f"  no {name}: {reason}" for name, reason in result["refused"].items()]
    if result.get("in_domain", {}).get("verdict"):
        notes.append(f"  in-domain: trained on {', '.join(result['in_domain']['sources'])}")
    return "\n".join([head, *lines, *notes, *refusals])


def open_model(chosen: argparse.Namespace) -> ScoredModel:
    lengths = {"max_query_tokens": chosen.max_query_tokens, "max_passage_tokens": chosen.max_passage_tokens}
    if not chosen.run:
        return ScoredModel(with_lengths(load_config(chosen.config), lengths))
    run = RunDirectory(chosen.run)
    config = as_planned(run.config(), read_json(run.manifest_file))
    return ScoredModel(with_lengths(config, lengths), checkpoint_of(run, chosen.best), run.embeddings)


def with_lengths(config: RunConfig, lengths: dict[str, int | None]) -> RunConfig:
    """The config with those evaluation lengths that are given."""
    given = {key: tokens for key, tokens in lengths.items() if tokens is not None}
    return config.model_copy(update={"evaluation": config.evaluation.model_copy(update=given)})


def check_outputs(chosen: argparse.Namespace) -> None:
    """All that is to be written can be, and replaces at most results of this door. Raises RunError."""
    files = [path for path in (chosen.out, chosen.out.with_suffix(".parquet"), chosen.run_file, chosen.qrels_out) if path]
    inputs = [path.resolve() for path in (chosen.run_in, chosen.qrels) if path]
    for number, path in enumerate(files):
        if path.resolve() in inputs or path in files[:number]:
            raise RunError(describe(str(path), "named twice", "each file is read, or written once", "Choose another name."))
    check_writable(*files)
    if chosen.out.exists() and not _is_result(read_json(chosen.out)):
        raise RunError(describe(str(chosen.out), "another file", "only results are replaced", "Choose another --out."))
    for path in (chosen.run_file, chosen.qrels_out):
        if path and path.exists():
            raise RunError(describe(str(path), "a file", "TREC files are never overwritten", "Choose another name."))


def _is_result(content: Any) -> bool:
    return isinstance(content, dict) and "metrics" in content


def score(chosen: argparse.Namespace) -> dict[str, Any]:
    """The numbers; files that go beside them are written."""
    per_query = chosen.out.with_suffix(".parquet")
    if chosen.qrels:
        result, table = score_files(chosen.run_in, chosen.qrels, chosen.run_order, bool(chosen.drop_own_id))
        dist.first_rank_does(lambda: write_table(per_query, table, {"run": chosen.run_in.name, "qrels": chosen.qrels.name}))
        return result
    if chosen.run_in or chosen.run_file or chosen.qrels_out:
        task = one_set(chosen.data, "TREC files belong to a single set")
    if chosen.run_file or chosen.qrels_out:
        check_ids(task)
    if chosen.qrels_out:
        dist.first_rank_does(lambda: write_qrels(chosen.qrels_out, task))
    if chosen.run_in:
        return evaluate_run_file(task, chosen.run_in, chosen.run_order, per_query, chosen.drop_own_id)
    open_sets(chosen.data)
    model = None if chosen.embeddings else open_model(chosen)

    def score_one(task: RetrievalSet, per_query_file: Path | None) -> dict[str, Any]:
        if model is None:
            folder = beside(chosen.embeddings, chosen.data, task)
            queries, shard = open_embeddings(folder, task, chosen.memory_gib or 4.0, chosen.similarity)
        else:
            store = beside(chosen.store or model.home / chosen.data.name / model.point, chosen.data, task)
            queries, shard, lengths = model.vectors(task, store, chosen.memory_gib)
        result = evaluate(task, queries, shard, chosen.top_k, chosen.run_file, per_query_file, chosen.drop_own_id)
        if model is None:
            given = {"similarity": chosen.similarity, "passage_lengths": passage_lengths(folder)}
            return {**result, **given, "text_lengths": text_lengths_of(folder)}
        result["text_lengths"] = lengths
        settings = model.config.evaluation
        if settings.subtract_language_means:
            memory = chosen.memory_gib or settings.shard_memory_gib
            result |= without_language_means(task, queries, shard, chosen.top_k, memory, store, chosen.drop_own_id)
        return {**result, "in_domain": trained_on(task, model.config)} if chosen.run else result

    return score_all(chosen.data, score_one, per_query, dist.first_rank_does)


def main(given: list[str] | None = None) -> int:
    """Exit code: see dist.run_door."""
    chosen = arguments(given)

    def work() -> None:
        dist.first_rank_does(lambda: check_outputs(chosen))
        result = score(chosen)
        dist.first_rank_does(lambda: write_json(chosen.out, result))
        if dist.rank() == 0:
            print(summary(result))

    return dist.run_door(work)


if __name__ == "__main__":
    sys.exit(main())

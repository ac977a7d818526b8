"""A model over the retrieval sets of a run: encode in lock-step, search, score, one JSON file a set, and for the final model the
values of single queries. A set in parts (parts.py) gives one file.
Knows no engine: `embed` is handed in.
"""

import sys
import time
from pathlib import Path
from typing import Any

from hybrid_scale import dist
from hybrid_scale.config import RunConfig
from hybrid_scale.data.prepared import RetrievalSet
from hybrid_scale.data.sources.domains import in_domain
from hybrid_scale.data.text import TextEncoder, for_evaluation
from hybrid_scale.retrieval.encode import Embed, encode_corpus, encode_queries, prepare_lengths
from hybrid_scale.retrieval.evaluate import evaluate
from hybrid_scale.retrieval.language_means import without_language_means
from hybrid_scale.retrieval.lengths import at_limit, budget_of, cut_warning, text_lengths
from hybrid_scale.retrieval.parts import score_all
from hybrid_scale.retrieval.spill import Spill
from hybrid_scale.runs import RunDirectory, read_json, write_json


def evaluate_run(config: RunConfig, run: RunDirectory, encoder: TextEncoder, embed: Embed, step: int | None) -> None:
    """Score the sets that are due after `step` steps (DataSettings.scored_at). Collective. Writes `eval/SET.json`, or
    `SET.step-N.json`.

    `encoder`: the training's; the evaluation's lengths are put in here.
    """
    encoder = for_evaluation(encoder, config.evaluation)

    def score_one(task: RetrievalSet, per_query_file: Path | None) -> dict[str, Any]:
        return score(task, config, encoder, embed, per_query_file, run.embeddings, means)

    means = config.evaluation.subtract_language_means and step in (None, 0)
    for directory in config.data.scored_at(step):
        path = run.evaluation_file(Path(directory).name, step)
        per_query_file = path.with_suffix(".parquet") if step is None else None
        result = score_all(directory, score_one, per_query_file, dist.first_rank_does)
        if dist.rank() == 0:
            write_json(path, {"step": step, **result})
            lines = [f"{summary(result)}  -> {path}", cut_warning(result)]
            print(*filter(None, lines), sep="\n", file=sys.stderr, flush=True)


def score(
    task: RetrievalSet,
    config: RunConfig,
    encoder: TextEncoder,
    embed: Embed,
    per_query_file: Path | None = None,
    folder: Path | None = None,
    means: bool = False,
) -> dict[str, Any]:
    """Metrics of one set; see `retrieval.evaluate`. `encoder`: the evaluation's.

    Passages are rounded to the type in which launch/evaluate.py stores them. A rank's vectors beyond
    `evaluation.shard_memory_gib` lie in `folder` (the run's `embeddings`) until the set is scored. `means`: also with the means
    of languages taken away (language_means.py).
    """
    started = time.monotonic()
    tokens, settings = budget_of(encoder, config.training.max_tokens_per_embedding_batch), config.evaluation
    queries = encode_queries(task, encoder, embed, tokens)
    numbers, blocks = encode_corpus(task, encoder, embed, tokens)
    folder = folder or RunDirectory(config.run.directory).embeddings
    name = lambda row: f"passage {task.corpus.column('id', numbers[row : row + 1])[0]!r}"  # noqa: E731
    with Spill(len(numbers), settings.embedding_dtype, settings.shard_memory_gib * 2**30, folder, name) as spill:
        shard = dist.together(lambda: spill.extend(blocks).shard(numbers))
        encoded = time.monotonic()
        result = evaluate(task, queries, shard, settings.top_k, per_query_file=per_query_file)
        if means:
            result |= without_language_means(task, queries, shard, settings.top_k, settings.shard_memory_gib, folder)
    seconds = {"encode": round(encoded - started, 2), "search": round(time.monotonic() - encoded, 2)}
    return {**result, "text_lengths": cut(task, encoder), "in_domain": trained_on(task, config), "seconds": seconds}


def cut(task: RetrievalSet, encoder: TextEncoder) -> dict[str, Any]:
    """`text_lengths` of a set whose length tables are there. Collective."""
    queries = prepare_lengths(task, "queries", task.queries, "query", encoder)
    passages = prepare_lengths(task, "corpus", task.corpus, "passage", encoder)
    return text_lengths(encoder, at_limit(queries, encoder, "query"), at_limit(passages, encoder, "passage"))


def trained_on(task: RetrievalSet, config: RunConfig) -> dict[str, Any]:
    """Whether the run's training data holds the set's own (`verdict`; null: the manifests don't say), and which `sources`."""
    path = Path(config.data.train) / "manifest.json"
    found = in_domain(read_json(path) if path.is_file() else {}, task.manifest)
    return {"verdict": found.verdict, "sources": list(found.sources)}


def summary(result: dict[str, Any]) -> str:
    """One line for the terminal: the headline metrics of the set's protocol."""
    metrics = result["metrics"]
    shown = "  ".join(f"{name} {metrics[name]:.4f}" for name in result["protocol"]["headline"] if metrics.get(name) is not None)
    return f"{result['task']}: {shown}"

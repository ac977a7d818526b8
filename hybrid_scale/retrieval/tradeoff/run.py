"""What an index costs and what it loses: every variant against the certified exact list, on real vectors and judgments.

For each variant and k results a query:
    recall@k            share of the k returned passages that belong to the certified list, averaged over queries. A passage whose
                        canonical score reaches that of the list's last one belongs to it: ties aren't losses.
    ndcg@10, map@k      of the returned lists; a relevant passage beyond k earns nothing, in the certified list as well
    difference          variant - certified of both, with a BCa interval (95 %), a sign-flip p value and that of TOST (both after
                        Holm over the variants), all clustered by parallel question and averaged over query languages
    verdict             equivalent: shown to differ by less than the margin; worse, better: shown to differ, though not by less;
                        not shown: neither; not judged: a margin of more than MOST_SHARE of the certified score says nothing
    bytes               measured (serialised, whole) and by formula, a vector
    seconds             CPU and wall of building; CPU and wall milliseconds a query of searching all queries at once
Pareto status over (quality, bytes, query CPU time): `front`: nothing else is at least as good in all three; `overlaps`: behind
it, but its interval of quality overlaps those of all that beat it; `behind`.
One process. In memory stand the index under study (one at a time), the sample it learns from and all queries; the corpus is read
in blocks from where it lies. A variant whose index exceeds `memory_gib` by formula is refused, with the reason.
Knows no file.

Shapes: Q queries, P passages, D dimensions.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from hybrid_scale import dist, statistics
from hybrid_scale.data.prepared import RetrievalSet
from hybrid_scale.errors import DataError, describe
from hybrid_scale.retrieval import metrics
from hybrid_scale.retrieval.evaluate import drops_own_id, missing_positive, positive
from hybrid_scale.retrieval.index import Shard, search
from hybrid_scale.retrieval.metrics import RelevantRanks
from hybrid_scale.retrieval.scores import pair_scores
from hybrid_scale.retrieval.tradeoff.corpus import Corpus
from hybrid_scale.retrieval.tradeoff.indexes import Index, set_threads
from hybrid_scale.retrieval.tradeoff.variants import Variant, parse

ALPHA = 0.05
MOST_SHARE = 0.05
"""Of the certified score that a margin may be: a difference within a larger one isn't small."""
GATHERED = 2**24
"""Numbers gathered at a time when scores of returned passages are computed."""
NOWHERE = -2
"""Number of a relevant passage that the corpus lacks: no result has it (-1 is no result)."""


@dataclass(frozen=True)
class Options:
    """How the study is done. `k` at least 10; `questions`: at most so many parallel questions, drawn by a fixed seed (0: all)."""

    k: int = 100
    margin: float = statistics.MARGIN
    level: float = 0.95
    resamples: int = statistics.RESAMPLES
    threads: int = 1
    questions: int = 0
    memory_gib: float = 16.0
    """Of the largest index."""


@dataclass(frozen=True)
class Bench:
    """The vectors, the certified answer and the judgments that every variant is held against."""

    corpus: Corpus
    """P vectors, in the order in which they lie"""
    numbers: np.ndarray
    """[P] passage number of each vector"""
    queries: np.ndarray
    """float32 [Q, D], those studied"""
    last_score: np.ndarray
    """[Q] canonical score of the last passage of the certified list"""
    qrels: np.ndarray
    """[J, 3] query (position in `queries`), passage, grade above 0"""
    question: np.ndarray
    """[Q] parallel group"""
    language: np.ndarray
    """[Q]"""
    exact: dict[str, np.ndarray]
    """Measure -> [Q] of the certified list"""
    options: Options

    def passages(self, rows: np.ndarray) -> np.ndarray:
        """Passage numbers of rows of the corpus (-1: none)."""
        return np.where(rows >= 0, self.numbers[rows], -1)

    def measures(self, passages: np.ndarray) -> dict[str, np.ndarray]:
        """Measures of lists [Q, k] of passage numbers (-1: none): each [Q], NaN for a query without a relevant passage."""
        relevant = RelevantRanks(self.qrels[:, 0], ranks_in(passages, self.qrels), len(self.queries), self.qrels[:, 2])
        return {"ndcg@10": metrics.ndcg(relevant, 10), f"map@{self.options.k}": metrics.average_precision(relevant)}

    def recall(self, rows: np.ndarray) -> float:
        """Share of the certified list among rows [Q, k] of the corpus (-1: none); ties with its last passage count as found."""
        found = np.zeros(len(rows))
        step = max(1, GATHERED // (rows.shape[1] * self.corpus.dimensions))
        for start in range(0, len(rows), step):
            some = rows[start : start + step]
            left, right = torch.from_numpy(self.queries[start : start + step, None]), torch.from_numpy(self.corpus.rows(some))
            scores = pair_scores(left, right).numpy()
            found[start : start + step] = ((some >= 0) & (scores >= self.last_score[start : start + step, None])).mean(1)
        return float(found.mean())


def ranks_in(passages: np.ndarray, qrels: np.ndarray) -> np.ndarray:
    """Rank of each judged passage in its query's list of [Q, k]: float64 [J], infinity where it isn't listed."""
    hits = passages[qrels[:, 0]] == qrels[:, 1, None]
    return np.where(hits.any(1), 1.0 + hits.argmax(1), np.inf)


def check(task: RetrievalSet, options: Options) -> None:
    """Raises DataError for what can't be studied, before a vector is read: several ranks, k out of range, own ids to drop."""
    if dist.world_size() != 1:
        raise DataError(describe("index study", f"{dist.world_size()} ranks", "one process measures times", "Start one."))
    if not 10 <= options.k <= len(task.corpus):
        raise DataError(describe("k", options.k, f"must be from 10 to the {len(task.corpus)} passages"))
    if drops_own_id(task):
        rule = "its queries are passages too, which an index can't leave out"
        raise DataError(describe(f"index study: {task.name}", "drop_own_id", rule, "Choose another set."))
    for key, value in (("margin", options.margin), ("threads", options.threads), ("memory_gib", options.memory_gib)):
        if not value > 0:
            raise DataError(describe(key, value, "must be above 0"))
    if options.questions < 0:
        raise DataError(describe("questions", options.questions, "must be 0 (all) or more"))


def set_up(task: RetrievalSet, queries: np.ndarray, shard: Shard, options: Options) -> Bench:
    """The certified lists of the studied queries. Raises DataError as `check` does."""
    check(task, options)
    chosen = studied(task, options.questions)
    asked = np.ascontiguousarray(queries[chosen], np.float32)
    scores, numbers = search(asked, shard, options.k)
    place = np.full(len(task.queries), -1)
    place[chosen] = np.arange(len(chosen))
    query, grade = missing_positive(task).T
    absent = np.stack([query, np.full(len(query), NOWHERE), grade], 1)
    qrels = np.concatenate([positive(task), absent])
    qrels = qrels[place[qrels[:, 0]] >= 0]
    qrels[:, 0] = place[qrels[:, 0]]
    groups, languages = (np.array(task.queries.column(name, chosen)) for name in ("group", "lang"))
    bench = Bench(Corpus(shard.vectors), shard.numbers, asked, scores[:, -1], qrels, groups, languages, {}, options)
    bench.exact.update(bench.measures(numbers))
    return bench


def studied(task: RetrievalSet, questions: int) -> np.ndarray:
    """Numbers of the queries of `questions` parallel groups (0: all), drawn once and for all by a fixed seed."""
    names, group = np.unique(np.array(task.queries.column("group")), return_inverse=True)
    if not 0 < questions < len(names):
        return np.arange(len(group))
    kept = np.random.default_rng(0).permutation(len(names))[:questions]
    return np.flatnonzero(np.isin(group, kept))


# ------------------------------------------------------------------------------------------------------------ points


def study(bench: Bench, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """One dictionary a variant, in order; a variant that can't run here is {name, refused}. Raises DataError: a bad name.

    All names are checked before the first index is built.
    """
    set_threads(bench.options.threads)
    variants = [parse(name, len(bench.corpus), bench.corpus.dimensions) for name in names]
    built: dict[str, tuple[Any, dict[str, float]]] = {}
    for variant in variants:
        reason = refusal(variant, len(bench.corpus), bench.options.memory_gib)
        if reason is not None:
            yield {"name": variant.name, "refused": reason}
            continue
        if variant.base not in built:
            built.clear()  # the index before it goes first
            built[variant.base] = timed(lambda variant=variant: variant.build(bench.corpus))
        made, building = built[variant.base]
        yield point(bench, variant, variant.open(made, bench.corpus), building)


def refusal(variant: Variant, passages: int, memory_gib: float) -> str | None:
    """Why a variant isn't run: it can't be here, or its index is too large; None: it is."""
    if variant.refusal is not None:
        return variant.refusal
    needed = (variant.bytes_per_vector - variant.outside_per_vector) * passages / 2**30
    return None if needed <= memory_gib else f"its index takes {needed:.1f} GiB of memory, {memory_gib:g} are allowed"


def point(bench: Bench, variant: Variant, index: Index, building: dict[str, float]) -> dict[str, Any]:
    """Everything that is measured of one variant."""
    rows, searching = timed(lambda: index.search(bench.queries, bench.options.k))
    rows = padded(rows, bench.options.k)
    measured = bench.measures(bench.passages(rows))
    per_query = {f"{clock}_ms": 1000 * seconds / len(bench.queries) for clock, seconds in searching.items()}
    return {
        "name": variant.name,
        f"recall@{bench.options.k}": bench.recall(rows),
        "quality": {name: compared(bench, name, values) for name, values in measured.items()},
        "bytes": {"measured": index.bytes / len(bench.corpus), "formula": variant.bytes_per_vector},
        "build": {f"{clock}_seconds": seconds for clock, seconds in building.items()},
        "query": per_query,
    }


def compared(bench: Bench, name: str, values: np.ndarray) -> dict[str, Any]:
    """A measure of a variant, its difference from the certified list, and what that difference is worth."""
    options = bench.options
    differences = statistics.paired(values, bench.exact[name], bench.question, bench.language)
    interval = statistics.bootstrap(differences, options.level, options.resamples)
    tost = statistics.equivalence_test(differences, options.margin)
    value = statistics.cluster(values, bench.question, bench.language).estimate
    facts = {"value": value, "difference": differences.estimate, "low": interval.low, "high": interval.high}
    test = statistics.sign_flip_test(differences, options.resamples)
    return {**facts, "interval": interval.method, "p": test.p, "tost_p": tost.p}


def timed(action: Any) -> tuple[Any, dict[str, float]]:
    """What `action` returns, and its CPU and wall seconds."""
    cpu, wall = time.process_time(), time.perf_counter()
    result = action()
    return result, {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}


def padded(rows: np.ndarray, k: int) -> np.ndarray:
    """Lists of exactly `k` rows, -1 where an index found fewer."""
    return np.pad(rows, ((0, 0), (0, k - rows.shape[1])), constant_values=-1)


# ----------------------------------------------------------------------------------------------------------- verdicts


def finished(bench: Bench, task: RetrievalSet, points: list[dict[str, Any]]) -> dict[str, Any]:
    """The whole study as one dictionary: facts, points with Holm's p values and Pareto status, what was refused."""
    ran = [point for point in points if "refused" not in point]
    for name in bench.exact:
        qualities = [point["quality"][name] for point in ran]
        for key in ("p", "tost_p"):
            for quality, p in zip(qualities, statistics.holm([quality[key] for quality in qualities]), strict=True):
                quality[f"{key}_holm"] = p
        for quality in qualities:
            quality["verdict"] = verdict(quality, bench.options.margin)
        for point, status in zip(ran, pareto(ran, name), strict=True):
            point["quality"][name]["pareto"] = status
    exact = {name: statistics.cluster(values, bench.question, bench.language).estimate for name, values in bench.exact.items()}
    return {
        "task": task.name,
        "fingerprint": task.fingerprint,
        "passages": len(bench.corpus),
        "dimensions": bench.corpus.dimensions,
        "queries": len(bench.queries),
        "questions": len(np.unique(bench.question)),
        "options": asdict(bench.options),
        "certified": exact,
        "points": ran,
        "refused": {point["name"]: point["refused"] for point in points if "refused" in point},
    }


def verdict(quality: Mapping[str, Any], margin: float) -> str:
    """One word for a variant's difference from the certified list."""
    if margin > MOST_SHARE * (quality["value"] - quality["difference"]):
        return "not judged"
    if quality["tost_p_holm"] <= ALPHA:
        return "equivalent"
    if quality["p_holm"] <= ALPHA and quality["difference"] != 0:
        return "worse" if quality["difference"] < 0 else "better"
    return "not shown"


def pareto(points: Sequence[dict[str, Any]], measure: str) -> list[str]:
    """`front`, `overlaps` or `behind` for each point, over (quality, measured bytes, query CPU time)."""
    quality = [point["quality"][measure] for point in points]
    costs = [(point["bytes"]["measured"], point["query"]["cpu_ms"]) for point in points]
    states = []
    for mine, cost in zip(quality, costs, strict=True):
        better = [
            other
            for other, price in zip(quality, costs, strict=True)
            if dominates((other["difference"], *price), (mine["difference"], *cost))
        ]
        close = all(other["low"] <= mine["high"] for other in better)
        states.append("front" if not better else "overlaps" if close else "behind")
    return states


def dominates(first: tuple[float, ...], second: tuple[float, ...]) -> bool:
    """(quality, costs...): at least as good in everything, better in something."""
    no_worse = first[0] >= second[0] and all(a <= b for a, b in zip(first[1:], second[1:], strict=True))
    return no_worse and first != second

"""What an index costs and what it loses: every variant against the certified exact list, on real vectors and judgments.

A query is ranked against the passages that the set's protocol says (protocols.py): all, or those of its own language. Then every
variant is an index for each language, each learned from its own passages; sizes and times are those of all of them together.
For each variant and k results a query:
    recall@k            share of the k returned passages that belong to the certified list, averaged over queries. A passage whose
                        canonical score reaches that of the list's last one belongs to it: ties aren't losses.
    ndcg@10, map@k      of the returned lists; a relevant passage beyond k earns nothing, in the certified list as well. MRR@100
                        instead of nDCG@10 where that heads the set's protocol. With flat:fp32 nDCG@10 is what evaluate.py gives
    difference          variant - certified of both, with a BCa interval (95 %), a sign-flip p value and that of TOST (both after
                        Holm over the variants), all clustered by parallel question and averaged as the protocol says
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
from hybrid_scale.protocols import SEVERAL_LANGUAGES, Protocol
from hybrid_scale.retrieval import metrics
from hybrid_scale.retrieval.evaluate import drops_own_id, judge, languages_of, missing_positive, positive, protocol
from hybrid_scale.retrieval.index import Shard, part_of, search
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
class Pool:
    """Passages that some of the queries are ranked against; each pool has an index of its own."""

    corpus: Corpus
    rows: np.ndarray | None
    """Rows of the whole corpus; None: all of it, in its order"""
    asking: np.ndarray
    """Positions of its queries among those studied"""


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
    pools: tuple[Pool, ...] = ()
    """None: the whole corpus, for all queries"""
    protocol: Protocol = SEVERAL_LANGUAGES
    topics: np.ndarray | None = None
    """[Q] whether a query counts, be it with 0; None: those with a relevant passage"""

    @property
    def searched(self) -> tuple[Pool, ...]:
        return self.pools or (Pool(self.corpus, None, np.arange(len(self.queries))),)

    def stratum(self, measure: str) -> np.ndarray | None:
        """[Q] what the mean of a measure goes over; None: over the queries."""
        if self.protocol.pools == "own language" or (self.protocol.pools == "by language" and measure.startswith("map")):
            return self.language
        return None

    def passages(self, rows: np.ndarray) -> np.ndarray:
        """Passage numbers of rows of the corpus (-1: none)."""
        return np.where(rows >= 0, self.numbers[rows], -1)

    def measures(self, passages: np.ndarray) -> dict[str, np.ndarray]:
        """Measures of lists [Q, k] of passage numbers (-1: none): each [Q], NaN for a query without a relevant passage."""
        ranks, k = ranks_in(passages, self.qrels), self.options.k
        relevant = RelevantRanks(self.qrels[:, 0], ranks, len(self.queries), self.qrels[:, 2], self.topics)
        first = {"ndcg@10": metrics.ndcg(relevant, 10)}
        if self.protocol.headline[0] == "mrr@100":
            first = {f"mrr@{min(100, k)}": metrics.reciprocal_rank(relevant, 100)}
        return {**first, f"map@{k}": metrics.average_precision(relevant)}

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
    smallest = smallest_pool(task)
    if not 10 <= options.k <= smallest:
        which = "" if smallest == len(task.corpus) else " of the language that has the fewest"
        raise DataError(describe("k", options.k, f"must be from 10 to the {smallest} passages{which}"))
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
    rule, judged = protocol(task), judge(task, np.zeros((len(positive(task)), len(languages_of(task, task.corpus)[0])), np.int64))
    own = rule.pools == "own language"
    topics = (judged.own_pool() if own else judged.union()).topics
    chosen = studied(task, options.questions)
    chosen = chosen[topics[chosen]] if own else chosen
    asked = np.ascontiguousarray(queries[chosen], np.float32)
    pools = _own_language_pools(task, shard, chosen) if own else ()
    place = np.full(len(task.queries), -1)
    place[chosen] = np.arange(len(chosen))
    query, grade = missing_positive(task).T
    absent = np.stack([query, np.full(len(query), NOWHERE), grade], 1)
    qrels = np.concatenate([_in_its_pool(task, positive(task)) if own else positive(task), absent])
    qrels = qrels[place[qrels[:, 0]] >= 0]
    qrels[:, 0] = place[qrels[:, 0]]
    groups, languages = (np.array(task.queries.column(name, chosen)) for name in ("group", "lang"))
    scores, numbers = _certified(asked, shard, pools, options.k)
    corpus, facts = Corpus(shard.vectors), (options, pools, rule, topics[chosen])
    bench = Bench(corpus, shard.numbers, asked, scores[:, -1], qrels, groups, languages, {}, *facts)
    bench.exact.update(bench.measures(numbers))
    return bench


def smallest_pool(task: RetrievalSet) -> int:
    """How many passages the smallest index has."""
    if protocol(task).pools != "own language":
        return len(task.corpus)
    asked = languages_of(task, task.queries)[0]
    names, language = languages_of(task, task.corpus)
    counts = [count for name, count in zip(names, np.bincount(language, minlength=len(names)), strict=True) if name in asked]
    return int(min(counts, default=0))


def _own_language_pools(task: RetrievalSet, shard: Shard, chosen: np.ndarray) -> tuple[Pool, ...]:
    """For each language of the queries `chosen` its passages."""
    (asked, query_language), (names, passage_language) = (languages_of(task, table) for table in (task.queries, task.corpus))
    pools = []
    for x, name in enumerate(asked):
        asking = np.flatnonzero(query_language[chosen] == x)
        if len(asking):
            rows = np.flatnonzero(passage_language[shard.numbers] == names.index(name))
            pools.append(Pool(Corpus(part_of(shard, rows).vectors), rows, asking))
    return tuple(pools)


def _in_its_pool(task: RetrievalSet, qrels: np.ndarray) -> np.ndarray:
    """The judgments whose passage is in the query's language."""
    (asked, query_language), (names, passage_language) = (languages_of(task, table) for table in (task.queries, task.corpus))
    query, passage = qrels[:, :2].T
    same = np.array(asked)[query_language[query]] == np.array(names)[passage_language[passage]]
    found: np.ndarray = qrels[same]
    return found


def _certified(asked: np.ndarray, shard: Shard, pools: Sequence[Pool], k: int) -> tuple[np.ndarray, np.ndarray]:
    """Canonical scores and passage numbers [Q, k] of the nearest passages in each query's pool."""
    if not pools:
        return search(asked, shard, k)
    scores, numbers = np.empty((len(asked), k), np.float32), np.empty((len(asked), k), np.int64)
    for pool in pools:
        assert pool.rows is not None
        scores[pool.asking], numbers[pool.asking] = search(asked[pool.asking], part_of(shard, pool.rows), k)
    return scores, numbers


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
    pools = bench.searched
    smallest = min((pool.corpus for pool in pools), key=len)
    variants = [parse(name, len(smallest), bench.corpus.dimensions) for name in names]
    passages = sum(len(pool.corpus) for pool in pools)
    built: dict[str, tuple[list[Any], dict[str, float]]] = {}
    for variant in variants:
        reason = refusal(variant, passages, bench.options.memory_gib)
        if reason is not None:
            yield {"name": variant.name, "refused": reason}
            continue
        if variant.base not in built:
            built.clear()  # the index before it goes first
            built[variant.base] = timed(lambda variant=variant: [variant.build(pool.corpus) for pool in pools])
        made, building = built[variant.base]
        opened = [variant.open(index, pool.corpus) for index, pool in zip(made, pools, strict=True)]
        yield point(bench, variant, opened, building)


def refusal(variant: Variant, passages: int, memory_gib: float) -> str | None:
    """Why a variant isn't run: it can't be here, or its index is too large; None: it is."""
    if variant.refusal is not None:
        return variant.refusal
    needed = (variant.bytes_per_vector - variant.outside_per_vector) * passages / 2**30
    return None if needed <= memory_gib else f"its index takes {needed:.1f} GiB of memory, {memory_gib:g} are allowed"


def searched(bench: Bench, indexes: Sequence[Index]) -> np.ndarray:
    """Rows of the corpus [Q, k] that the index of each query's pool gives (-1: none)."""
    rows = np.full((len(bench.queries), bench.options.k), -1, np.int64)
    for pool, index in zip(bench.searched, indexes, strict=True):
        found = padded(index.search(bench.queries[pool.asking], bench.options.k), bench.options.k)
        rows[pool.asking] = found if pool.rows is None else np.where(found >= 0, pool.rows[found], -1)
    return rows


def point(bench: Bench, variant: Variant, indexes: Sequence[Index], building: dict[str, float]) -> dict[str, Any]:
    """Everything that is measured of one variant. `indexes`: one for each pool."""
    rows, searching = timed(lambda: searched(bench, indexes))
    measured = bench.measures(bench.passages(rows))
    per_query = {f"{clock}_ms": 1000 * seconds / len(bench.queries) for clock, seconds in searching.items()}
    return {
        "name": variant.name,
        f"recall@{bench.options.k}": bench.recall(rows),
        "quality": {name: compared(bench, name, values) for name, values in measured.items()},
        "bytes": {
            "measured": sum(index.bytes for index in indexes) / sum(len(pool.corpus) for pool in bench.searched),
            "formula": variant.bytes_per_vector,
        },
        "build": {f"{clock}_seconds": seconds for clock, seconds in building.items()},
        "query": per_query,
    }


def compared(bench: Bench, name: str, values: np.ndarray) -> dict[str, Any]:
    """A measure of a variant, its difference from the certified list, and what that difference is worth."""
    options, stratum = bench.options, bench.stratum(name)
    differences = statistics.paired(values, bench.exact[name], bench.question, stratum)
    interval = statistics.bootstrap(differences, options.level, options.resamples)
    tost = statistics.equivalence_test(differences, options.margin)
    value = statistics.cluster(values, bench.question, stratum).estimate
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
    exact = {
        name: statistics.cluster(values, bench.question, bench.stratum(name)).estimate for name, values in bench.exact.items()
    }
    return {
        "task": task.name,
        "fingerprint": task.fingerprint,
        "protocol": bench.protocol.facts(),
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

"""What the words of the report mean: metrics, verdicts, arms. Each is explained where it first stands."""

from collections.abc import Iterable, Iterator

from hybrid_scale.pages.parts import Tone
from hybrid_scale.study.results.scores import Metric
from hybrid_scale.study.results.verdicts import Outcome

METRICS = {
    "mono_map": "mean average precision (mAP, 0 to 1, higher is better) of queries against the passages of their own "
    "language, averaged over languages",
    "cross_map": "mAP of queries against the passages of one other language, averaged over ordered pairs of languages",
    "multi_map": "mAP of queries against the passages of all languages together, averaged over query languages",
    "rank_distance": "largest minus smallest rank of a query's parallel relevant passages among the passages of all "
    "languages: a measure of language bias, lower is better",
    "rank_distance_normalised": "rank distance as a share of the candidates, lower is better",
    "mono_r@1": "share of queries whose first result in their own language is relevant",
    "cross_r@1": "share of queries whose first result in another language is relevant",
    "multi_r@10": "share of the relevant passages of all languages that stand among the first ten",
    "ndcg@10": "gain of the relevant passages among the first ten results, the lower the later they stand, over that of "
    "the best possible order (0 to 1, higher is better)",
    "recall@100": "share of the relevant passages that stand among the first hundred results",
    "mrr@10": "one over the rank of the first relevant passage among the first ten results, else 0",
    "mrr@100": "one over the rank of the first relevant passage among the first hundred results, else 0",
    "map": "mean average precision over the whole ranking",
    "r@1": "share of queries whose first result is relevant",
    "ndcg@10_median": "median over languages of their nDCG@10, instead of the mean",
    "recall@100_median": "median over languages of their recall@100, instead of the mean",
    "mrr@100_median": "median over languages of their MRR@100, instead of the mean",
}
ARMS = {
    "mono": "batches whose queries and passages are all in one language",
    "cross": "batches in which a passage is in another language than its query",
    "hybrid": "mono and cross batches mixed, a share alpha of them mono",
    "mixed": "same-language pairs of many languages in one batch: the negative control",
}
VERDICTS: dict[Outcome, str] = {
    "better": "in favour of the first arm, by an adjusted p of at most 0.05",
    "worse": "against the first arm, by an adjusted p of at most 0.05",
    "equivalent": "shown to be smaller than the margin of equivalence, by an adjusted p of at most 0.05",
    "not shown": "neither a difference nor equivalence is shown",
    "not judged": "there is no test; the reason stands with it",
    "better in these runs": "better, but with too few seeds to speak of training: it is so for these trained models",
    "worse in these runs": "worse, but with too few seeds to speak of training: it is so for these trained models",
    "no straight line": "the differences bend over the sizes, so their slope isn't stated",
}
TONES: dict[Outcome, Tone] = {
    "better": "good",
    "worse": "bad",
    "equivalent": "good",
    "not shown": "open",
    "not judged": "plain",
    "better in these runs": "open",
    "worse in these runs": "open",
    "no straight line": "open",
}
PLACES: dict[str, Tone] = {"on the front": "good", "overlaps the front": "open", "behind the front": "plain"}


def of_metrics(metrics: Iterable[Metric]) -> Iterator[tuple[str, str]]:
    """(label, meaning) of each that is known, once, in the order of METRICS: later ones use the words of earlier ones."""
    labels = {metric.key: metric.label for metric in metrics}
    yield from ((labels[key], meaning) for key, meaning in METRICS.items() if key in labels)


def of_arms(kinds: Iterable[str]) -> Iterator[tuple[str, str]]:
    """(type, meaning), in the order of ARMS."""
    present = set(kinds)
    yield from ((kind, meaning) for kind, meaning in ARMS.items() if kind in present)


def of_verdicts(outcomes: Iterable[Outcome]) -> Iterator[tuple[str, str]]:
    """(verdict, meaning), in the order of VERDICTS."""
    present = set(outcomes)
    yield from ((verdict, meaning) for verdict, meaning in VERDICTS.items() if verdict in present)

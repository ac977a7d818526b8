"""What is a set's score: the one table that evaluation, baselines, training and studies read.

A protocol says which passages a query is ranked against (*pools*), which metrics stand first (*headline*) and over what they
are averaged (*mean*). It is looked up by `evaluation` in the manifest of a prepared set; sets that the table doesn't know
have a stated default. Every result says its protocol.

Pools:
    union           the whole corpus
    own language    the corpus of the query's own language: passages in other languages are no candidates
    by language     the union, and the passages of each language apart (mono, cross, multi: retrieval/measures.py)
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Pools = Literal["union", "own language", "by language"]

OVER_QUERIES = "mean over the queries"
OVER_LANGUAGES = "mean over the queries of a language, then mean over languages (`_median`: median over languages)"
OVER_PAIRS = (
    "mono, multi and rank distance: mean over the queries of a language, then over languages; cross: over the queries of an "
    "ordered language pair, then over pairs; other metrics: over the queries, in the union"
)


@dataclass(frozen=True)
class Protocol:
    """How a set is scored."""

    name: str
    pools: Pools
    headline: tuple[str, ...]
    """Keys of `metrics`, the most important first."""
    mean: str
    source: str

    def facts(self) -> dict[str, Any]:
        """As a result states it."""
        return {
            "name": self.name,
            "pools": self.pools,
            "headline": list(self.headline),
            "mean": self.mean,
            "source": self.source,
        }


LAREQA = Protocol(
    "lareqa",
    "by language",
    ("mono_map", "cross_map", "multi_map", "mono_r@1", "rank_distance"),
    OVER_PAIRS,
    "2408.10536 (mono, cross, multi, rank distance); 2004.05484 (LAReQA) for the candidates",
)
MIRACL = Protocol(
    "miracl",
    "own language",
    ("ndcg@10", "recall@100", "ndcg@10_median", "recall@100_median"),
    OVER_LANGUAGES,
    "2210.09984 (MIRACL): nDCG@10 and Recall@100 of each language, and their average; the median is added here",
)
MR_TYDI = Protocol(
    "mr_tydi",
    "own language",
    ("mrr@100", "recall@100", "mrr@100_median", "recall@100_median"),
    OVER_LANGUAGES,
    "2108.08787 (Mr. TyDi): MRR@100 and Recall@100 of each language, and their average; the median is added here",
)
BEIR = Protocol(
    "beir",
    "union",
    ("ndcg@10", "recall@100", "mrr@10", "map"),
    OVER_QUERIES,
    "2104.08663 (BEIR): nDCG@10 and Recall@100 of each set; CQADupStack is the mean of its twelve parts",
)
OWN_LANGUAGE = Protocol(
    "own language",
    "own language",
    ("ndcg@10", "recall@100", "ndcg@10_median", "recall@100_median"),
    OVER_LANGUAGES,
    "the default for a set in several languages whose judgments stay within a language: as MIRACL",
)
SEVERAL_LANGUAGES = Protocol(
    "several languages",
    LAREQA.pools,
    LAREQA.headline,
    OVER_PAIRS,
    "the default for a set in several languages whose judgments cross them: as XQuAD-R",
)
ONE_LANGUAGE = Protocol(
    "one language", BEIR.pools, BEIR.headline, OVER_QUERIES, "the default for passages in one language: as BEIR"
)

BEIR_SETS = (
    *("arguana", "climate-fever", "cqadupstack", "dbpedia-entity", "fever", "fiqa", "hotpotqa", "msmarco", "nfcorpus", "nq"),
    *("quora", "scidocs", "scifact", "trec-covid", "webis-touche2020"),
)
"""The public sets of BEIR, over which its mean goes."""
CQADUPSTACK_PARTS = 12
"""CQADupStack's score is the mean over its forums; that of a single forum is no part of BEIR's mean."""

PROTOCOLS: dict[str, Protocol] = {
    **{f"beir/{name}": BEIR for name in BEIR_SETS},
    "nq": BEIR,
    "miracl": MIRACL,
    "mr_tydi": MR_TYDI,
    "xquad_r": LAREQA,
    "mlqa_r": LAREQA,
    "belebele": SEVERAL_LANGUAGES,
    "xquad": SEVERAL_LANGUAGES,
    "demo": SEVERAL_LANGUAGES,
}
"""`evaluation` of a prepared set's manifest -> its protocol."""
BY_NAME = {each.name: each for each in (*PROTOCOLS.values(), OWN_LANGUAGE, ONE_LANGUAGE)}


def protocol_of(manifest: Mapping[str, Any], languages: int, crosses: bool) -> Protocol:
    """The protocol of a prepared set. `languages`: of its passages; `crosses`: whether a judgment joins two languages.

    A set that is scored by language but was prepared in one language is scored as one in one language.
    """
    known = PROTOCOLS.get(str(manifest.get("evaluation")))
    if known is not None and not (known.pools == "by language" and languages < 2):
        return known
    if languages < 2:
        return ONE_LANGUAGE
    return SEVERAL_LANGUAGES if crosses else OWN_LANGUAGE


def beir_member(evaluation: str | None, parts: int = 0) -> str | None:
    """The set of BEIR's mean that a result is of, by its manifest's `evaluation` and how many parts it is the mean of.

    None: no set of BEIR, or not the whole of it.
    """
    name = (evaluation or "").removeprefix("beir/")
    if name not in BEIR_SETS or evaluation not in (f"beir/{name}", "nq"):
        return None
    return None if name == "cqadupstack" and parts != CQADUPSTACK_PARTS else name

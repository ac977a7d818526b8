"""Which evaluation sets are in-domain for which training data, and the rules that belong to a set: keys of its manifest.

A result is *in-domain* when the training data holds the set's own training examples (or what they were made from). It is no
fault, but it isn't zero-shot, so a report has to say it.

    training set     `contains`: the sources in it, by the names of SOURCES; null where nobody has said (a file of pairs)
    retrieval set    `evaluation`: its name in IN_DOMAIN_OF; `in_domain_of`: the sources that make it in-domain; both null
                     where the set is unknown. `drop_own_id`: true where a query never finds the passage of its own id.
                     `part_of`: the set whose score is the mean of its parts (CQADupStack); `part`: which of them this is
Knows no file and no text.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hybrid_scale.data.sources import beir_sets
from hybrid_scale.errors import ConfigError, describe, nearest

IMPLIES: dict[str, tuple[str, ...]] = {
    "mmarco": ("msmarco",),
    "miracl": ("mr_tydi", "tydiqa"),
    "mr_tydi": ("tydiqa",),
    "mlqa_translate_train": ("squad",),
    "cqadupstack": ("stackexchange",),
}
"""Source -> what it was made from: translations of MS MARCO, MIRACL's topics taken over from Mr. TyDi and TyDi QA."""

IN_DOMAIN_OF: dict[str, tuple[str, ...]] = {
    "beir/arguana": ("arguana",),
    "beir/climate-fever": ("climate_fever",),
    "beir/cqadupstack": ("cqadupstack", "stackexchange"),
    "beir/dbpedia-entity": ("dbpedia_entity",),
    "beir/fever": ("fever",),
    "beir/fiqa": ("fiqa",),
    "beir/hotpotqa": ("hotpotqa",),
    "beir/msmarco": ("msmarco",),
    "beir/nfcorpus": ("nfcorpus",),
    "beir/nq": ("nq",),
    "beir/quora": ("quora",),
    "beir/scidocs": ("scidocs",),
    "beir/scifact": ("scifact",),
    "beir/trec-covid": ("trec_covid",),
    "beir/webis-touche2020": ("touche",),
    "belebele": ("belebele", "flores"),
    "demo": ("demo",),
    "miracl": ("miracl", "mr_tydi", "tydiqa"),
    "mlqa_r": ("mlqa", "squad"),
    "mr_tydi": ("miracl", "mr_tydi", "tydiqa"),
    "nq": ("nq",),
    "xquad": ("squad", "xquad"),
    "xquad_r": ("squad", "xquad"),
}
"""Evaluation set -> sources with its training examples. XQuAD and MLQA have none of their own: both name SQuAD as theirs."""

OTHER_SOURCES = (
    *("duorc", "entity_questions", "mfaq", "newsqa", "ntrex", "opus", "paq", "parallel_faq", "tatoeba", "trivia_qa", "wikiqa"),
    *("yahoo_qa",),
)
"""Usual training sources that make no set of the table in-domain."""
OWN = re.compile(r"x-[a-z0-9_-]+")
"""A source that nobody but its user knows."""
RETRIEVAL_ONLY = ("beir", "beir_set", "belebele", "miracl", "miracl_hard", "mlqa_r", "mr_tydi", "nq", "xquad", "xquad_r")
"""Readers that never give training pairs."""
OWN_READERS = {"mmarco": ("mmarco",), "demo": ("demo",)}
"""Reader of training rows -> the source that it always gives."""
SOURCES = frozenset(
    {*IMPLIES, *(name for names in (*IMPLIES.values(), *IN_DOMAIN_OF.values()) for name in names), *OTHER_SOURCES}
)


@dataclass(frozen=True)
class InDomain:
    """Whether an evaluation set is in-domain for a training set; None: the manifests don't say."""

    verdict: bool | None
    sources: tuple[str, ...]
    """Those of the training set that make it so."""


def in_domain(training: Mapping[str, Any], evaluation: Mapping[str, Any] | str) -> InDomain:
    """The verdict from the manifest of a training set and that (or the name) of an evaluation set.

    Raises ConfigError on an unknown name.
    """
    if isinstance(evaluation, str):
        if evaluation not in IN_DOMAIN_OF:
            raise ConfigError(describe("evaluation set", evaluation, "isn't in the table", nearest(evaluation, IN_DOMAIN_OF)))
        own: Sequence[str] | None = IN_DOMAIN_OF[evaluation]
    else:
        own = evaluation.get("in_domain_of")
    contains = training.get("contains")
    if own is None or contains is None:
        return InDomain(None, ())
    common = tuple(sorted(set(expanded(contains)) & set(own)))
    return InDomain(bool(common), common)


def expanded(sources: Sequence[str]) -> list[str]:
    """The sources and all that they were made from, sorted; `x-NAME` is a user's own. Raises ConfigError on an unknown one."""
    found: set[str] = set()
    waiting = list(sources)
    while waiting:
        source = waiting.pop()
        if source not in SOURCES and not OWN.fullmatch(source):
            remedy = f"{nearest(source, SOURCES)} A source of your own is x-NAME."
            raise ConfigError(describe("training source", source, "isn't in the table", remedy))
        if source not in found:
            found.add(source)
            waiting += IMPLIES.get(source, ())
    return sorted(found)


def check_contains(source: str, options: Mapping[str, Any], contains: Sequence[str], in_domain_of: Sequence[str] = ()) -> None:
    """Raises ConfigError: unknown training sources, those of a training set for a set that is held out, or the other way round.
    To be asked before anything is read."""
    expanded(contains)
    expanded(in_domain_of)
    what = held_out(source, options)
    if in_domain_of and not what:
        remedy = "State with --contains what this training set was made from."
        raise ConfigError(describe("--in-domain-of", ",".join(in_domain_of), "only an evaluation set is in-domain", remedy))
    if contains and what:
        rule = f"{source} gives {what}, which is held out for evaluation and must never be training data"
        raise ConfigError(describe("--contains", ",".join(contains), rule, "Leave it out."))


def held_out(source: str, options: Mapping[str, Any]) -> str:
    """What a reader with these options gives if that must never be training data, in words; "" where it gives training rows."""
    if source == "held_out":
        return "a development set"
    if (source, options.get("split")) == ("demo", "test"):
        return "the test questions of the demo"
    if source == "beir_set":
        return f"the retrieval set {options.get('name', 'of BEIR')}"
    return "a retrieval set" if source in RETRIEVAL_ONLY or options.get("kind") == "retrieval" else ""


def judged_sources(manifest: Mapping[str, Any], where: str) -> list[str]:
    """The sources that training rows made of a retrieval set's judgments come from: the set's own; of a set outside the table
    those that it is in-domain of. `manifest`: of the set.

    Raises ConfigError: a development set, or a known evaluation set but for its training split.
    """
    source, evaluation = manifest.get("source", {}), manifest.get("evaluation")
    if source.get("name") == "held_out":
        rule = "a development set is held out of a training set, so its questions must not be trained on"
        raise ConfigError(describe(where, "held_out", rule, "Use its other part, held_in."))
    if evaluation is None:
        return list(manifest.get("in_domain_of") or [])
    split = source.get("split")
    if split != "train":
        found = f"the evaluation set {evaluation}, " + (f"split '{split}'" if split else "no split named")
        rule = "its questions are held out: only a training split may become training rows"
        raise ConfigError(describe(where, found, rule, "Prepare the training split, if it has one, with --split train."))
    return [own_source(evaluation)]


def own_source(evaluation: str) -> str:
    """The source of IN_DOMAIN_OF that holds the set's own examples: `xquad` of `xquad_r`, `touche` of `beir/webis-touche2020`."""
    return next(one for one in IN_DOMAIN_OF[evaluation] if one in evaluation.replace("-", "_"))


def facts(source: str, options: Mapping[str, Any], contains: Sequence[str], in_domain_of: Sequence[str] = ()) -> dict[str, Any]:
    """Keys of the manifest of what a reader with these options gave. `in_domain_of`: sources beside those of the table."""
    if not held_out(source, options):
        implied = OWN_READERS.get(source, ())
        return {"contains": expanded([*contains, *implied]) if contains or implied else None}
    chosen = beir_sets.known(options["name"]) if source == "beir_set" else None
    part_of = chosen.part_of if chosen else None
    name = f"beir/{part_of or options['name']}" if chosen else {"miracl_hard": "miracl"}.get(source, source)
    known = name if name in IN_DOMAIN_OF else None
    sources = sorted({*(IN_DOMAIN_OF[known] if known else ()), *in_domain_of})
    rules: dict[str, Any] = {"evaluation": known, "in_domain_of": sources if known or in_domain_of else None}
    if chosen and chosen.drop_own_id:
        rules["drop_own_id"] = True
    return {**rules, "part_of": part_of, "part": options["name"].removeprefix(f"{part_of}-")} if part_of else rules

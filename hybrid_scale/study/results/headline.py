"""The study's answer in one sentence, and what must be said before it: scores below something that wasn't trained.

The sentence is made of the primary family's claims that decide the question, each number in it is one of theirs, and it has at
most about MOST_WORDS words: intervals and the other claims stand in the table. Knows no HTML.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from hybrid_scale.study.family import Family
from hybrid_scale.study.pilot import Chosen
from hybrid_scale.study.results.primary import Claim
from hybrid_scale.study.results.scores import Metric
from hybrid_scale.study.results.verdicts import Outcome
from hybrid_scale.study.settings import ChooseSettings

LACKS = {"mono": ("cross_map", "mono_map"), "cross": ("mono_map",)}
"""Type of the other arm -> what hybrid batches should gain on it; beside the gain on mono batches, what they should keep."""
ALONE: dict[Outcome, str] = {"not shown": "not shown to differ"}
AGAINST: dict[Outcome, str] = {
    "equivalent": "equivalent to {}",
    "not shown": "not shown to differ from {}",
    "not judged": "not judged against {}",
}
"""How a verdict reads in a sentence, without and with the other arm's name, where that isn't its own name and "than"."""
MOST_WORDS = 40
"""Of the sentence; the reason why nothing is judged stands in it where it fits, and below the table always."""
MOST_NAMED = 2


def answer(family: Family, claims: Sequence[Claim], kinds: Mapping[str, str], flags: Mapping[str, str], named: bool) -> str:
    """The one sentence: the verdicts at the largest size with their differences, then how these change from the smaller one.
    `kinds`: arm -> type of its batches; `flags`: set -> what must stand at its numbers; `named`:
    whether sizes have names (the axis `models`)."""
    if family.refusal:
        return f"This study names no claim that could answer its question: {family.refusal}."
    pairs = asked(claims, kinds)
    if all(pair.difference.estimate is None for pair in pairs):
        return "Nothing can be answered yet: no two arms of the question have been scored on one set."
    first = pairs[0].difference
    where = f"At {first.models[-1]} on {_set(first, flags)}" if named else f"On {_set(first, flags)}"
    if all(pair.difference.outcome == "not judged" for pair in pairs):
        return _unjudged(f"{where}, {first.arm}", pairs)
    before = [None, *(pair.difference.rival for pair in pairs[:-1])]
    clauses = [_clause(pair.difference, pair.difference.rival != rival) for pair, rival in zip(pairs, before, strict=True)]
    return f"{where}, {first.arm} is {_listed(clauses)}{_moved(pairs)}."


def _unjudged(subject: str, pairs: Sequence["Asked"]) -> str:
    """Means alone, with nothing concluded from them."""
    claims = [pair.difference for pair in pairs if pair.difference.estimate is not None]
    by_rival = {rival: [claim for claim in claims if claim.rival == rival] for rival in dict.fromkeys(c.rival for c in claims)}
    means = [f"from {rival} by {_listed([_mean(claim) for claim in members])}" for rival, members in by_rival.items()]
    sentence = f"{subject} differs {_listed(means)}: not judged"
    reason = "; ".join(dict.fromkeys(claim.refusal for claim in claims))
    return f"{sentence}, {reason}." if len(f"{sentence} {reason}".split()) <= MOST_WORDS else f"{sentence}."


def _mean(claim: Claim) -> str:
    return f"{number(claim)} in {claim.metric.label}"


def _clause(claim: Claim, names: bool) -> str:
    """`better than mono in cross mAP (+0.0500)`; `names`: whether the other arm must be named."""
    against, alone = AGAINST.get(claim.outcome, f"{claim.outcome} than {{}}"), ALONE.get(claim.outcome, claim.outcome)
    stands = against.format(claim.rival) if names else alone
    return f"{stands} in {claim.metric.label} ({number(claim)})"


def _moved(pairs: Sequence["Asked"]) -> str:
    """`; change from 7b: -0.0013 (equivalent), ...`, in the order of the clauses; empty where there is one size."""
    changes = [pair.change for pair in pairs if pair.change is not None]
    if len(changes) < len(pairs):
        return ""
    return f"; change from {changes[0].models[0]}: {', '.join(f'{number(each)} ({each.outcome})' for each in changes)}"


def _listed(parts: Sequence[str]) -> str:
    """`a, b and c`"""
    return " and ".join(filter(None, (", ".join(parts[:-1]), parts[-1])))


@dataclass(frozen=True)
class Asked:
    """A claim that the question is about, with its change between two sizes."""

    difference: Claim
    change: Claim | None


def asked(claims: Sequence[Claim], kinds: Mapping[str, str]) -> list[Asked]:
    """What decides the question: on the first set with mono and cross mAP, cross and mono mAP against the mono arm, mono
    mAP against the cross arm. Where no set has both, the first two metrics of the first set against the first arm."""
    differences = [claim for claim in claims if claim.kind == "difference"]
    changes = {_key(claim): claim for claim in claims if claim.kind == "change"}
    places = dict.fromkeys((claim.task, claim.series) for claim in differences)
    found: list[Claim] = []
    for place in places:
        members = [claim for claim in differences if (claim.task, claim.series) == place]
        for rival in sorted(dict.fromkeys(claim.rival for claim in members), key=lambda rival: kinds.get(rival) != "mono"):
            by_metric = {claim.metric.key: claim for claim in members if claim.rival == rival}
            wanted = LACKS.get(kinds.get(rival, ""), LACKS["mono"])
            if set(wanted) <= set(by_metric):
                found += [by_metric[key] for key in wanted]
        if found:
            break
    if not found and differences:
        first = differences[0]
        found = [
            claim for claim in differences if (claim.task, claim.series, claim.rival) == (first.task, first.series, first.rival)
        ][:2]
    return [Asked(claim, changes.get(_key(claim))) for claim in found]


def _key(claim: Claim) -> tuple[str, ...]:
    return claim.task, claim.series, claim.arm, claim.rival, claim.metric.key


def _set(claim: Claim, flags: Mapping[str, str]) -> str:
    notes = ", ".join(filter(None, (claim.series, flags.get(claim.task, ""))))
    return f"{claim.task} ({notes})" if notes else claim.task


def answer_of_pilot(chosen: Chosen | None, wanted: ChooseSettings) -> str:
    """What a pilot chose for each model, with the score that decided."""
    if chosen is None:
        return f"Nothing is chosen yet: every value of {wanted.setting} needs a finished run, scored on {wanted.metric}."
    shown = [
        f"{choice.value} at {model} ({choice.score:.4f}{', an end of the values tried' if choice.at_edge else ''})"
        for model, choice in chosen.models.items()
    ]
    return f"The pilot chose {wanted.setting} by {wanted.metric}: {', '.join(shown)}."


def number(claim: Claim) -> str:
    """+0.0310; its interval stands in the table."""
    return "without a score" if claim.estimate is None else f"{claim.estimate:+.{claim.metric.decimals}f}"


# ------------------------------------------------------------------------------------------------------- said before it


@dataclass(frozen=True)
class Beside:
    """A mean of an arm beside that of something which the study didn't train."""

    task: str
    group: str
    arm: str
    metric: Metric
    score: float
    reference: str
    theirs: float

    @property
    def below(self) -> bool:
        """Whether the arm is the worse one, as far as the numbers are shown."""
        ours, theirs = float(self.metric.show(self.score)), float(self.metric.show(self.theirs))
        return ours < theirs if self.metric.higher_is_better else ours > theirs


def warnings_first(found: Sequence[Beside], flags: Mapping[str, str], arm: str) -> Iterator[str]:
    """One sentence for each reference that an arm is below, the scores of `arm`, which the study is for, first."""
    for reference in dict.fromkeys(each.reference for each in found):
        under = [each for each in found if each.reference == reference and each.below]
        under.sort(key=lambda each: each.arm != arm)
        if under:
            count = sum(each.reference == reference for each in found)
            named = "; ".join(_below(each, flags) for each in under[:MOST_NAMED])
            more = f"; {len(under) - MOST_NAMED} more in the table" if len(under) > MOST_NAMED else ""
            yield f"Below {reference} in {len(under)} of {count} scores: {named}{more}."


def _below(each: Beside, flags: Mapping[str, str]) -> str:
    flag = f", {flags[each.task]}" if each.task in flags else ""
    at = f" at {each.group.removeprefix('model ')}" if each.group else ""
    ours, theirs = each.metric.show(each.score), each.metric.show(each.theirs)
    return f"{each.arm}{at}, {each.metric.label} on {each.task} ({ours} against {theirs}{flag})"

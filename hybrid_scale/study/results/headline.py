"""The study's answer in one sentence, and what must be said before it: scores below something that wasn't trained.

The sentence is made of the primary family's claims alone; each number in it is one of theirs. Knows no HTML.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from hybrid_scale.study.family import Family
from hybrid_scale.study.pilot import Chosen
from hybrid_scale.study.results.primary import Claim
from hybrid_scale.study.results.scores import Metric
from hybrid_scale.study.results.verdicts import Outcome
from hybrid_scale.study.settings import ChooseSettings

LACKS = {"mono": ("cross_map", "mono_map"), "cross": ("mono_map", "cross_map")}
"""Type of the other arm -> what hybrid batches should gain on it, and what they should keep."""
QUALITY = {
    "cross_map": "cross-lingual quality",
    "mono_map": "monolingual quality",
    "multi_map": "quality across all languages",
}
STANDS: dict[Outcome, str] = {"not shown": "not shown to differ"}
"""How a verdict reads in a sentence, where that isn't its own name."""
CHANGED: dict[Outcome, str] = {
    "better": "a change for the better",
    "worse": "a change for the worse",
    "equivalent": "an equivalent value",
    "not shown": "a change not shown",
    "not judged": "a change not judged",
}
MOST_NAMED = 2


def answer(family: Family, claims: Sequence[Claim], kinds: Mapping[str, str], flags: Mapping[str, str], named: bool) -> str:
    """The one sentence. `kinds`: arm -> type of its batches; `flags`: set -> what must stand at its numbers; `named`:
    whether sizes have names (the axis `models`)."""
    if family.refusal:
        return f"This study names no claim that could answer its question: {family.refusal}."
    pairs = asked(claims, kinds)
    if all(pair.difference.estimate is None for pair in pairs):
        return "Nothing can be answered yet: no two arms of the question have been scored on one set."
    first = pairs[0].difference
    place = _set(first, flags)
    where = f"At {first.models[-1]} on {place}" if named else f"On {place}"
    rivals = dict.fromkeys(pair.difference.rival for pair in pairs)
    by_rival = [[pair for pair in pairs if pair.difference.rival == rival] for rival in rivals]
    if all(pair.difference.outcome == "not judged" for pair in pairs):
        clauses = [f"against {members[0].difference.rival} by {_means(members)}" for members in by_rival]
        reasons = "; ".join(dict.fromkeys(pair.difference.refusal for pair in pairs))
        return f"{where}, {first.arm} differs {' and '.join(clauses)}, which isn't judged: {reasons}."
    clauses = [
        f"against {members[0].difference.rival} {'it ' * (n > 0)}is {' and '.join(map(_clause, members))}"
        for n, members in enumerate(by_rival)
    ]
    return f"{where}, {first.arm} {'; '.join(clauses)}."


@dataclass(frozen=True)
class Asked:
    """A claim that the question is about, with its change between two sizes."""

    difference: Claim
    change: Claim | None


def asked(claims: Sequence[Claim], kinds: Mapping[str, str]) -> list[Asked]:
    """What the question is about: on the first set with mono and cross mAP, against the mono and the cross arm, what
    hybrid batches gain and what they keep. Where no set has both, the first two metrics of the first set against the
    first arm."""
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


def _means(members: Sequence[Asked]) -> str:
    """Means alone, with nothing concluded from them."""
    claims = [pair.difference for pair in members]
    return " and ".join(f"{number(claim)} in {_quality(claim.metric)} ({claim.metric.label})" for claim in claims)


def _clause(pair: Asked) -> str:
    """`better in cross-lingual quality (cross mAP +0.05 [+0.04, +0.06], after +0.04 at 7b, an equivalent value)`."""
    claim, change = pair.difference, pair.change
    reason = f"; {claim.refusal}" if claim.outcome == "not judged" else ""
    then = ""
    if change is not None:
        before = change.differences[0] if change.differences else None
        was = f", after {before:+.{change.metric.decimals}f} at {change.models[0]}" if before is not None else ""
        then = f"{was}, {CHANGED[change.outcome]}"
    stands = STANDS.get(claim.outcome, claim.outcome)
    return f"{stands} in {_quality(claim.metric)} ({claim.metric.label} {number(claim)}{then}{reason})"


def _quality(metric: Metric) -> str:
    return QUALITY.get(metric.key, "quality")


def number(claim: Claim) -> str:
    """+0.0310 [+0.0280, +0.0340]; the interval where there is one."""
    places = claim.metric.decimals
    if claim.estimate is None:
        return "without a score"
    bounds = f" [{claim.interval[0]:+.{places}f}, {claim.interval[1]:+.{places}f}]" if claim.interval else ""
    return f"{claim.estimate:+.{places}f}{bounds}"


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

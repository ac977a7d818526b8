"""The first sentence on made-up truth: what it says is what the claims say, number by number."""

from dataclasses import replace

import pytest

from hybrid_scale.study.family import Family
from hybrid_scale.study.pilot import Candidate, Choice, Chosen
from hybrid_scale.study.results.crossed import Crossed
from hybrid_scale.study.results.headline import MOST_WORDS, Beside, answer, answer_of_pilot, asked, warnings_first
from hybrid_scale.study.results.primary import Claim
from hybrid_scale.study.results.scores import METRICS
from hybrid_scale.study.results.verdicts import Level
from hybrid_scale.study.settings import ChooseSettings

KINDS = {"hybrid": "hybrid", "mono": "mono", "cross": "cross"}
FAMILY = Family("hybrid", ("mono", "cross"))


def claim(rival: str, metric: str, difference: float, p: float, within: float | None = 1.0, **changes: object) -> Claim:
    """A difference at 72b whose 95 % interval is +-0.0020."""
    both = Crossed(difference, 0.001, 1e9, 3, 50)
    both = replace(both, error=0.002 / (both.interval()[1] - difference) * 0.001)
    level = Level(0.7 + difference, 0.7, None, 1.0)
    made = Claim("difference", "xquad_r", "", "hybrid", rival, METRICS[metric], ("72b",), (72e9,), (level,), both)
    return replace(made, margin=0.007, adjusted=p, within=within, **changes)  # type: ignore[arg-type]


def change(of: Claim, before: float, p: float, within: float | None = 1.0) -> Claim:
    now = of.estimate or 0.0
    levels = (Level(0.6 + before, 0.6, None, 1.0), *of.levels)
    both = Crossed(now - before, 0.001, 1e9, 3, 50)
    return replace(of, kind="change", models=("7b", "72b"), levels=levels, both=both, adjusted=p, within=within)


def said(claims: list[Claim], flags: dict[str, str] | None = None, named: bool = True) -> str:
    return answer(FAMILY, claims, KINDS, flags or {}, named)


def test_an_effect_that_stays_one_that_vanishes_and_those_that_are_null() -> None:
    gained, kept = claim("mono", "cross_map", 0.05, 0.001), claim("mono", "mono_map", -0.0001, 1.0, 0.001)
    vanished, rest = claim("cross", "mono_map", -0.0005, 1.0, 0.2), claim("cross", "cross_map", -0.03, 0.01)
    changes = [change(gained, 0.0513, 1.0, 0.01), change(kept, -0.0002, 1.0), change(vanished, 0.0406, 0.001)]
    sentence = said([gained, kept, vanished, rest, *changes, change(rest, -0.05, 0.01)])
    assert sentence == (
        "At 72b on xquad_r, hybrid is better than mono in cross mAP (+0.0500), equivalent in mono mAP (-0.0001) and not shown to "
        "differ from cross in mono mAP (-0.0005); change from 7b: -0.0013 (equivalent), +0.0001 (not shown), -0.0411 (worse)."
    )
    assert len(sentence.split()) <= MOST_WORDS


def test_the_verdicts_that_need_other_words() -> None:
    worse, these = claim("mono", "cross_map", -0.05, 0.001), claim("mono", "mono_map", 0.01, 1.0)
    assert said([worse, these], named=False) == (
        "On xquad_r, hybrid is worse than mono in cross mAP (-0.0500) and not shown to differ in mono mAP (+0.0100)."
    )
    same = claim("cross", "mono_map", 0.0, 1.0, 0.001)
    assert said([worse, these, same]).endswith("mono mAP (+0.0100) and equivalent to cross in mono mAP (+0.0000).")


def test_a_change_that_one_of_them_lacks_is_left_to_the_table() -> None:
    gained, kept = claim("mono", "cross_map", 0.05, 0.001), claim("mono", "mono_map", -0.0001, 1.0, 0.001)
    assert "change from" not in said([gained, kept, change(gained, 0.04, 1.0)])


def test_what_is_not_judged_concludes_nothing() -> None:
    silent = [
        replace(claim(rival, metric, 0.03, 0.5), both=None, adjusted=None, within=None, refusal="1 seed of both arms")
        for rival in ("mono", "cross")
        for metric in ("mono_map", "cross_map")
    ]
    assert said(silent) == (
        "At 72b on xquad_r, hybrid differs from mono by +0.0300 in cross mAP and +0.0300 in mono mAP and from cross by +0.0300 "
        "in mono mAP: not judged, 1 seed of both arms."
    )
    long = [replace(each, refusal=f"{each.refusal}, and {'many ' * 20}words") for each in silent]
    assert said(long).endswith("in mono mAP: not judged.")
    some = said([claim("mono", "cross_map", 0.05, 0.001), silent[0]])
    assert some.endswith("better than mono in cross mAP (+0.0500) and not judged in mono mAP (+0.0300).")


def test_without_scores_or_a_family_nothing_is_answered() -> None:
    empty = replace(claim("mono", "cross_map", 0.05, 0.5), both=None, adjusted=None, levels=(None,), refusal="no seed")
    assert said([]) == said([empty]) == ("Nothing can be answered yet: no two arms of the question have been scored on one set.")
    none = Family(refusal="no arm of the type hybrid")
    assert answer(none, [], {}, {}, True) == (
        "This study names no claim that could answer its question: no arm of the type hybrid."
    )


def test_sets_in_one_language_are_asked_where_no_other_is() -> None:
    one = replace(claim("mono", "ndcg@10", -0.02, 0.001), task="nq")
    assert said([one], {"nq": "in-domain"}) == ("At 72b on nq (in-domain), hybrid is worse than mono in nDCG@10 (-0.0200).")


@pytest.mark.parametrize("first", ["mono", "cross"])
def test_the_mono_arm_is_asked_first_whatever_the_order(first: str) -> None:
    rivals = [first, "cross" if first == "mono" else "mono"]
    claims = [claim(rival, metric, 0.01, 0.5) for rival in rivals for metric in ("multi_map", "mono_map", "cross_map")]
    order = [(pair.difference.rival, pair.difference.metric.key) for pair in asked(claims, KINDS)]
    assert order == [("mono", "cross_map"), ("mono", "mono_map"), ("cross", "mono_map")]


def beside(arm: str, score: float, theirs: float, reference: str = "untrained base", metric: str = "mono_map") -> Beside:
    return Beside("xquad_r", "model 7b", arm, METRICS[metric], score, reference, theirs)


def test_below_untrained_and_below_bm25_are_told_apart_and_counted() -> None:
    found = [beside("mono", 0.12, 0.1848), beside("hybrid", 0.19, 0.1848), beside("hybrid", 0.3, 0.41, "BM25")]
    found += [beside("cross", 900.0, 800.0, metric="rank_distance"), beside("cross", 0.41, 0.40004)]
    assert list(warnings_first(found, {}, "hybrid")) == [
        "Below untrained base in 2 of 4 scores: mono at 7b, mono mAP on xquad_r (0.1200 against 0.1848); "
        "cross at 7b, rank distance on xquad_r (900.0 against 800.0).",
        "Below BM25 in 1 of 1 scores: hybrid at 7b, mono mAP on xquad_r (0.3000 against 0.4100).",
    ]


def test_nothing_below_is_not_said_and_what_looks_equal_isnt_below() -> None:
    assert list(warnings_first([beside("mono", 0.4, 0.3), beside("mono", 0.400001, 0.40000101)], {}, "hybrid")) == []


def test_the_arm_that_the_study_is_for_is_named_first() -> None:
    found = [beside(arm, 0.1, 0.2) for arm in ("mono", "cross", "hybrid")]
    (one,) = warnings_first(found, {}, "hybrid")
    assert one.startswith("Below untrained base in 3 of 3 scores: hybrid at 7b, ")
    assert one.endswith("; 1 more in the table.")


def test_an_in_domain_number_says_so_also_there() -> None:
    (one,) = warnings_first([beside("mono", 0.1, 0.2)], {"xquad_r": "in-domain"}, "hybrid")
    assert one.endswith("(0.1000 against 0.2000, in-domain).")


def test_a_pilot_says_what_it_chose() -> None:
    wanted = ChooseSettings(metric="dev:multi_map")
    tried = (Candidate(value=1e-4, score=0.5, seeds=1), Candidate(value=2e-4, score=0.61234, seeds=1))
    chosen = Chosen(
        study="pilot",
        setting=wanted.setting,
        metric=wanted.metric,
        models={"7b": Choice(value=2e-4, score=0.61234, tried=tried, at_edge=True)},
    )
    assert answer_of_pilot(chosen, wanted) == (
        "The pilot chose optimizer.learning_rate by dev:multi_map: 0.0002 at 7b (0.6123, an end of the values tried)."
    )
    assert answer_of_pilot(None, wanted).startswith("Nothing is chosen yet: every value of optimizer.learning_rate")

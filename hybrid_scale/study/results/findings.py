"""Do the directions that the science predicts hold? Answers in words, computed from the arms' scores.

The predictions are those of LAReQA (2004.05484) and of hybrid batch training (2408.10536). An answer carries its numbers
and what is known of their variance; nothing here tests significance, and nothing knows HTML.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from hybrid_scale.study.results.scores import METRICS, Arm, Metric

Verdict = Literal["holds", "does not hold", "not judged"]
ValueOf = Callable[[Arm, str], float]

HYBRID_METRICS = ("mono_map", "cross_map", "multi_map", "rank_distance")


@dataclass(frozen=True)
class Finding:
    claim: str
    verdict: Verdict
    numbers: str
    caution: str
    """What is known of the variance; empty where nothing was judged."""
    missing: str = ""
    """What it would take to judge it; empty where it was judged."""


@dataclass(frozen=True)
class _Extreme:
    """`kind` has the highest (or lowest) `metric` of all arms, or of the arms of the kinds `needs` alone."""

    claim: str
    kind: str
    metric: str
    highest: bool
    needs: tuple[str, ...]
    hybrids_count: bool


EXTREMES = (
    _Extreme("Mixed pools (X-X) have the worst multi mAP of all arms.", "mixed", "multi_map", False, ("mono", "cross"), True),
    _Extreme(
        "Mixed pools (X-X) have the worst rank distance of all arms.",
        *("mixed", "rank_distance", True, ("mono", "cross"), True),
    ),
    _Extreme(
        "Cross-lingual batches (X-Y) have the best cross mAP of the single arms (mono, cross, mixed).",
        *("cross", "cross_map", True, ("mono", "mixed"), False),
    ),
)


def findings(arms: Sequence[Arm]) -> list[Finding]:
    """The predictions, judged for comparable arms (one group, one task)."""
    return [*(_extreme(arms, prediction) for prediction in EXTREMES), *_hybrids(arms)]


def _extreme(arms: Sequence[Arm], prediction: _Extreme) -> Finding:
    metric = METRICS[prediction.metric]
    measured = [arm for arm in arms if metric.key in arm.scores]
    subjects = [arm for arm in measured if arm.kind == prediction.kind]
    rival_kinds = (*prediction.needs, "hybrid") if prediction.hybrids_count else prediction.needs
    rivals = [arm for arm in measured if arm.kind in rival_kinds]
    missing = [kind for kind in (prediction.kind, *prediction.needs) if kind not in {arm.kind for arm in measured}]
    if missing:
        return _unjudged(prediction.claim, missing, [*subjects, *rivals], (metric,))

    def gap(value: ValueOf) -> float:
        """By how much the claim is true; negative or zero where it isn't."""
        ours, theirs = [value(arm, metric.key) for arm in subjects], [value(arm, metric.key) for arm in rivals]
        return min(ours) - max(theirs) if prediction.highest else min(theirs) - max(ours)

    margin = gap(_mean)
    numbers = f"{metric.label}: {_listed(subjects, metric)} against {_listed(rivals, metric)}. "
    numbers += f"The nearest rival is {metric.show(abs(margin))} {'away' if margin > 0 else 'on the wrong side'}."
    everyone = [*subjects, *rivals]
    caution = _variance(everyone, lambda value: gap(value) > 0, (metric,), abs(margin))
    return Finding(prediction.claim, "holds" if margin > 0 else "does not hold", numbers, caution)


def _hybrids(arms: Sequence[Arm]) -> list[Finding]:
    """One answer for each hybrid arm, or a single one that says what is missing."""
    finished = [arm for arm in arms if set(HYBRID_METRICS) & set(arm.scores)]
    missing = [kind for kind in ("mono", "cross", "hybrid") if kind not in {arm.kind for arm in finished}]
    if missing:
        measured = [METRICS[key] for key in HYBRID_METRICS if any(key in arm.scores for arm in finished)]
        return [_unjudged(_hybrid_claim("Hybrid batches"), missing, [arm for arm in finished if arm.kind != "mixed"], measured)]
    singles = [arm for arm in finished if arm.kind in ("mono", "cross")]
    return [_hybrid(arm, singles) for arm in finished if arm.kind == "hybrid"]


def _hybrid_claim(subject: str) -> str:
    return f"{subject} lie within or above the range of the single arms (mono, cross), on no metric below both."


def _hybrid(hybrid: Arm, singles: Sequence[Arm]) -> Finding:
    everyone = [hybrid, *singles]
    metrics = [METRICS[key] for key in HYBRID_METRICS if all(key in arm.scores for arm in everyone)]
    claim = _hybrid_claim(f"Hybrid batches (arm {hybrid.name})")
    if not metrics:
        return Finding(claim, "not judged", "The arms share no metric.", "", "a metric that all arms have")

    def place(metric: Metric, value: ValueOf) -> str:
        sign = 1 if metric.higher_is_better else -1
        ours, theirs = sign * value(hybrid, metric.key), [sign * value(arm, metric.key) for arm in singles]
        return "better than both" if ours > max(theirs) else "worse than both" if ours < min(theirs) else "within"

    def holds(value: ValueOf) -> bool:
        return all(place(metric, value) != "worse than both" for metric in metrics)

    parts = [
        f"{metric.label} {_shown(hybrid, metric)}: {place(metric, _mean)} ({_listed(singles, metric)})" for metric in metrics
    ]
    caution = _variance(everyone, holds, metrics, None)
    return Finding(claim, "holds" if holds(_mean) else "does not hold", "; ".join(parts) + ".", caution)


def _unjudged(claim: str, missing: Sequence[str], measured: Sequence[Arm], metrics: Sequence[Metric]) -> Finding:
    numbers = f"No finished run of: {', '.join(missing)}."
    for metric in metrics:
        if present := [arm for arm in measured if metric.key in arm.scores]:
            numbers += f" Measured {metric.label}: {_listed(present, metric)}."
    return Finding(claim, "not judged", numbers, "", f"no finished run of {', '.join(missing)}")


def _variance(arms: Sequence[Arm], holds: Callable[[ValueOf], bool], metrics: Sequence[Metric], gap: float | None) -> str:
    """What the seeds say: whether each tells the same, and how far they lie apart."""
    seeds = {arm.name: set(arm.scores[metrics[0].key].by_seed) for arm in arms}
    single = [name for name, found in seeds.items() if len(found) == 1]
    if single:
        whose = "One seed only" if len(single) == len(arms) else f"One seed only for {', '.join(single)}"
        return f"{whose}: the variance isn't known, so a difference may be chance."
    shared = sorted(set.intersection(*seeds.values()))
    agreeing = sum(holds(lambda arm, key, seed=seed: arm.scores[key].by_seed[seed]) for seed in shared)  # type: ignore[misc]
    ranges = [(metric, max(arm.scores[metric.key].extent for arm in arms)) for metric in metrics]
    text = "" if len(set(map(frozenset, seeds.values()))) == 1 else "Not every arm has finished the same seeds. "
    text += f"True in {agreeing} of {len(shared)} shared seeds taken singly. Widest range over one arm's seeds: "
    text += ", ".join(f"{metric.label} {metric.show(extent)}" for metric, extent in ranges) + "."
    if gap is not None and gap < ranges[0][1]:
        text += " The gap is smaller than that range."
    return text


def _mean(arm: Arm, key: str) -> float:
    return arm.scores[key].mean


def _shown(arm: Arm, metric: Metric) -> str:
    return metric.show(arm.scores[metric.key].mean)


def _listed(arms: Sequence[Arm], metric: Metric) -> str:
    return ", ".join(f"{arm.name} {_shown(arm, metric)}" for arm in arms)

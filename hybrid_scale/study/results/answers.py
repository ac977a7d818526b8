"""The study's details in plain sentences: every comparison counted, how it moves with size, what it costs.

Every sentence comes from numbers computed elsewhere and says how sure it is. Knows no HTML.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import pandas as pd

from hybrid_scale.statistics import FEWEST_SEEDS
from hybrid_scale.study.results.comparisons import Comparison
from hybrid_scale.study.results.scaling import Law, Priced
from hybrid_scale.study.results.trends import Trend
from hybrid_scale.study.results.verdicts import ALPHA, Outcome

MOST_NAMED = 6
"""Things listed in a sentence; beyond that their number is given."""
PULLED = ("mono_map", "cross_map", "ndcg@10", "mrr@100")
"""What single arms trade for each other."""
VERDICTS: tuple[Outcome, ...] = (
    *("better", "worse", "equivalent", "better in these runs", "worse in these runs"),
    *("not shown", "no straight line", "not judged"),
)
"""In the order in which they are counted."""
Part = Literal["comparisons", "size", "cost"]


@dataclass(frozen=True)
class Answer:
    part: Part
    """Where in the report it stands."""
    topic: str
    points: tuple[str, ...]
    caution: str = ""


def answers(
    runs: pd.DataFrame,
    comparisons: Sequence[Comparison],
    trends: Sequence[Trend],
    laws: Sequence[Law],
    points: Sequence[Priced],
) -> list[Answer]:
    """What the details of the report say first, in order. The primary family isn't among it: headline.py."""
    return [
        *_with_size(comparisons, trends),
        *_trade_off(comparisons),
        *_exponents(laws),
        *_cost(points, bool(runs["gpu"].any())),
        *_forecast(runs),
    ]


# -------------------------------------------------------------------------------------------------------------- trade-off


def _trade_off(comparisons: Sequence[Comparison]) -> Iterator[Answer]:
    """For each task and kind of rival: how often hybrid is better, worse or not told apart, on each measure."""
    for task, kind in dict.fromkeys((each.task, each.rival_kind) for each in comparisons):
        members = [each for each in comparisons if (each.task, each.rival_kind) == (task, kind)]
        metrics = {each.metric.key: each.metric for each in members}
        parts = [_one_measure([each for each in members if each.metric.key == key]) for key in metrics]
        pairs = len({(each.group, each.arm, each.rival) for each in members})
        sizes = len({each.group for each in members})
        of_models = f", {pairs} pairs of arms over {sizes} models" if sizes > 1 else ""
        yield Answer("comparisons", f"Hybrid against {kind} on {task}{of_models}", tuple(parts), _how_sure(members))


def _one_measure(members: Sequence[Comparison]) -> str:
    metric, count = members[0].metric, Counter(each.outcome for each in members)
    low, high = min(each.difference for each in members), max(each.difference for each in members)
    span = f"{low:+.{metric.decimals}f}" + (f" to {high:+.{metric.decimals}f}" if len(members) > 1 else "")
    if len(members) == 1:
        return _only(members[0])
    if count["not judged"] == len(members):
        better = sum(each.gain > 0 for each in members)
        return f"{metric.label}: difference {span}, {_of(better, len(members))} in hybrid's favour, not judged"
    told = ", ".join(f"{verdict} in {_of(count[verdict], len(members))}" for verdict in VERDICTS if count[verdict])
    return f"{metric.label}: {told} ({span})"


def _only(each: Comparison) -> str:
    return f"{each.metric.label}: {each.outcome} ({each.difference:+.{each.metric.decimals}f}{_bounds(each)})"


def _bounds(each: Comparison | Trend) -> str:
    """The interval that the verdict rests on: of questions and seeds, or of questions where seeds are too few."""
    places = each.metric.decimals
    return f" [{each.interval.low:+.{places}f}, {each.interval.high:+.{places}f}]" if each.interval else ""


def _of(some: int, every: int) -> str:
    return f"{some} of {every}"


def _how_sure(members: Sequence[Comparison]) -> str:
    parts = []
    if any(each.family == "exploratory" and each.adjusted is not None for each in members):
        parts.append(f"Paired by question; outside of the primary family exploratory, p < {ALPHA:g} after Benjamini-Hochberg")
    few = sum(each.seeds.count < FEWEST_SEEDS for each in members)
    if few:
        which = "All" if few == len(members) else _of(few, len(members))
        parts.append(f"{which} rest on fewer than {FEWEST_SEEDS} seeds: statements on the trained models, not on training")
    return ". ".join(parts) + ("." if parts else "")


# -------------------------------------------------------------------------------------------------------------- with size


def _with_size(comparisons: Sequence[Comparison], trends: Sequence[Trend]) -> Iterator[Answer]:
    """How the difference changes with size, for the measures that single arms trade for each other."""
    rule = f"Exploratory: slope of the difference on log10(parameters); p < {ALPHA:g} after Benjamini-Hochberg over all slopes."
    for task in dict.fromkeys(trend.task for trend in trends):
        told = [trend for trend in trends if trend.task == task and trend.metric.key in PULLED]
        if told:
            caution = f"{rule} It speaks of the sizes measured." if any(trend.test for trend in told) else ""
            yield Answer("size", f"Over the sizes, on {task}", _first([_turn(trend, comparisons) for trend in told]), caution)


def _turn(trend: Trend, comparisons: Sequence[Comparison]) -> str:
    key = (trend.task, trend.series, trend.arm, trend.rival, trend.metric.key)
    line = [each for each in comparisons if (each.task, each.series, each.arm, each.rival, each.metric.key) == key]
    line = sorted((each for each in line if each.size is not None), key=lambda each: each.size or 0.0)
    slope = f"{trend.slope:+.{trend.metric.decimals}f}{_bounds(trend)} for ten times the parameters"
    turn = trend.outcome if trend.outcome == "no straight line" else f"{trend.outcome}, {slope}"
    return f"{trend.arm} minus {trend.rival}, {trend.metric.label}: {turn} ({_at(line[0])}, {_at(line[-1])})"


def _first(lines: Sequence[str]) -> tuple[str, ...]:
    more = len(lines) - MOST_NAMED
    return (*lines[:MOST_NAMED], *([f"{more} more in the table"] if more > 0 else []))


def _at(each: Comparison) -> str:
    return f"{each.difference:+.{each.metric.decimals}f}{_bounds(each)} at {in_words(each.size or 0.0)}"


def in_words(size: float) -> str:
    """8030261248 -> 8.03 B."""
    for unit, value in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if size >= value:
            return f"{size / value:.3g} {unit}"
    return f"{size:.0f}"


def _exponents(laws: Sequence[Law]) -> Iterator[Answer]:
    for task in dict.fromkeys(law.task for law in laws):
        members = [law for law in laws if law.task == task]
        stated = [law for law in members if not law.law.refusal]
        if not stated:
            reasons = Counter(law.law.refusal for law in members)
            reason = reasons.most_common(1)[0][0] if len(reasons) == 1 else "the reason stands beside each in the table"
            yield Answer("size", f"Power laws on {task}", (f"No exponent is stated: {reason}",))
            continue
        shown = [
            f"{law.quantity} of {law.arm}: exponent {law.law.exponent:.2f} [{law.law.low:.2f}, {law.law.high:.2f}]"
            for law in stated
        ]
        silent = len(members) - len(stated)
        refused = (f"{silent} of {len(members)} fits say nothing and are refused",) if silent else ()
        caution = (
            "A value falls as size to the power of minus its exponent, between the sizes measured; that is no promise beyond."
        )
        yield Answer("size", f"Power laws on {task}", (*_first(shown), *refused), caution)


# ------------------------------------------------------------------------------------------------------------------- cost


def _cost(points: Sequence[Priced], gpu: bool) -> Iterator[Answer]:
    unit = "GPU-hours" if gpu else "CPU process-hours"
    for task in dict.fromkeys(point.task for point in points):
        known = [point for point in points if point.task == task and point.by_hours is not None]
        best = sorted((p for p in known if p.by_hours == "on the front"), key=lambda p: p.device_hours or 0.0)
        near = [p for p in known if p.by_hours == "overlaps the front"]
        if len(known) < 2:
            continue
        named = ", ".join(f"{_named(p, known)} ({p.metric.show(p.quality)} for {p.device_hours:.3g})" for p in best[:MOST_NAMED])
        more = f" and {len(best) - MOST_NAMED} more" if len(best) > MOST_NAMED else ""
        said = [f"Best {best[0].metric.label} for its {unit}: {named}{more}"]
        if near:
            said.append(f"{len(near)} of the {len(known) - len(best)} others can't be told from that front")
        missing = sum(point.interval is None for point in known)
        caution = f"{missing} of {len(known)} points have no interval." if missing else ""
        yield Answer("cost", f"Worth its cost on {task}", tuple(said), caution)


def _named(point: Priced, known: Sequence[Priced]) -> str:
    return point.arm if len({each.model for each in known}) == 1 else f"{point.model} {point.arm}"


def _forecast(runs: pd.DataFrame) -> Iterator[Answer]:
    both = runs.dropna(subset=["predicted_step_seconds", "median_step_seconds"])
    if both.empty:
        return
    time = (both["predicted_step_seconds"] / both["median_step_seconds"] - 1).abs().median()
    memory = both.dropna(subset=["predicted_gib", "peak_gib"])
    text = f"The planner's seconds a step were off by {time:.0%} (median of {len(both)} runs)"
    if not memory.empty:
        text += f", its memory by {(memory['predicted_gib'] / memory['peak_gib'] - 1).abs().median():.0%}"
    yield Answer("cost", "Predicted against measured", (text,))

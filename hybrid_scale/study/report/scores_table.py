"""The headline table: every arm's scores beside each other, by group, and what earlier work predicts of them.

Formats numbers; computes none. Knows no HTML.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hybrid_scale.study.report.tables import NOTHING, Cell
from hybrid_scale.study.results.answers import in_words
from hybrid_scale.study.results.findings import Finding, findings
from hybrid_scale.study.results.scores import Arm, Metric, Score


@dataclass(frozen=True)
class Row:
    name: str
    kind: str
    seeds: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Group:
    """Arms that may be compared: rows of the headline table and what they show."""

    label: str
    rows: tuple[Row, ...]
    findings: tuple[Finding, ...]


def headline(found: Sequence[Arm], metrics: Sequence[Metric], start: Mapping[str, Mapping[str, Score]]) -> tuple[Group, ...]:
    by_label: dict[str, list[Arm]] = defaultdict(list)
    for arm in found:
        by_label[arm.group].append(arm)
    return tuple(
        Group(_label(label, members), _rows(members, metrics, start.get(label, {})), tuple(findings(members)))
        for label, members in by_label.items()
    )


def _label(group: str, members: Sequence[Arm]) -> str:
    size = members[0].size
    return f"{group} ({in_words(size)} parameters)" if group.startswith("model ") and size else group


def _rows(found: Sequence[Arm], metrics: Sequence[Metric], start: Mapping[str, Score]) -> tuple[Row, ...]:
    best = {metric.key: _best(found, metric) for metric in metrics}
    rows = [
        Row(
            arm.name,
            arm.kind,
            f"{_finished(arm)} of {arm.runs}",
            tuple(_cell(arm.scores.get(metric.key), metric, best[metric.key]) for metric in metrics),
        )
        for arm in found
    ]
    if start:
        # Without a spread: before the first step runs of one base differ by rounding alone.
        before = tuple(Cell(_cell(start.get(metric.key), metric, None).text) for metric in metrics)
        rows.append(Row("untrained", "before step 1", "", before))
    return tuple(rows)


def _finished(arm: Arm) -> int:
    return max((len(score.by_seed) for score in arm.scores.values()), default=0)


def _best(found: Sequence[Arm], metric: Metric) -> float | None:
    means = [arm.scores[metric.key].mean for arm in found if metric.key in arm.scores]
    if len({metric.show(mean) for mean in means}) < 2:
        return None
    return max(means) if metric.higher_is_better else min(means)


def _cell(score: Score | None, metric: Metric, best: float | None) -> Cell:
    if score is None:
        return Cell(NOTHING)
    spread = metric.show(score.deviation) if score.deviation is not None and score.extent > 0 else ""
    shown = metric.show(score.mean)
    return Cell(shown, spread, best is not None and shown == metric.show(best))

"""Every arm's scores beside each other, and in the same table what the study didn't train.

Formats numbers; computes none. Knows no HTML.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hybrid_scale.pages.parts import MARK, NOTHING, Cell, Row, Table
from hybrid_scale.study.results import frames
from hybrid_scale.study.results.answers import in_words
from hybrid_scale.study.results.references import Reference
from hybrid_scale.study.results.scores import Arm, Metric


@dataclass(frozen=True)
class Column:
    task: str
    metric: Metric
    note: str = ""
    """What must stand at every number of the column: that the set is in-domain."""


def scores_table(
    key: str, title: str, columns: Sequence[Column], by_task: Mapping[str, Sequence[Arm]], references: Sequence[Reference]
) -> Table:
    """`by_task`: set -> the arms to show, the same for every set; each is a row, every reference another."""
    several = len({arm.group for arms in by_task.values() for arm in arms}) > 1
    keys = dict.fromkeys((arm.group, arm.name) for arms in by_task.values() for arm in arms)
    found = {(task, arm.group, arm.name): arm for task, arms in by_task.items() for arm in arms}
    rows = [_row([found.get((column.task, *key)) for column in columns], columns, by_task, several) for key in keys]
    rows += [_reference(each, columns, several) for each in references]
    heads = ("arm", "seeds", *(column.metric.label for column in columns))
    notes = ("", "finished", *(", ".join(filter(None, (column.task, column.note))) for column in columns))
    return Table(key, title, heads, tuple(rows), frames.means(by_task), notes)


def _row(arms: Sequence[Arm | None], columns: Sequence[Column], by_task: Mapping[str, Sequence[Arm]], several: bool) -> Row:
    first = next(arm for arm in arms if arm is not None)
    cells = [_cell(arm, column, by_task) for arm, column in zip(arms, columns, strict=True)]
    name = Cell(first.name, detail=group_name(first) if several else "")
    return Row((name, Cell(f"{max(_finished(arm) for arm in arms if arm)} of {first.runs}"), *cells))


def group_name(arm: Arm) -> str:
    """`7B (7.07 B parameters)`; other groups as they are called."""
    name = arm.group.removeprefix("model ")
    return f"{name} ({in_words(arm.size)})" if arm.group.startswith("model ") and arm.size else name


def _finished(arm: Arm) -> int:
    return max((len(score.by_seed) for score in arm.scores.values()), default=0)


def _cell(arm: Arm | None, column: Column, by_task: Mapping[str, Sequence[Arm]]) -> Cell:
    score = arm.scores.get(column.metric.key) if arm else None
    if arm is None or score is None:
        return Cell(NOTHING)
    shown = column.metric.show(score.mean)
    spread = column.metric.show(score.deviation) if score.deviation is not None and score.extent > 0 else ""
    best = _best([other for other in by_task[column.task] if other.group == arm.group], column.metric)
    return Cell(f"{shown}{_mark(column)}", spread, best is not None and shown == column.metric.show(best))


def _mark(column: Column) -> str:
    return MARK if column.note else ""


def _best(found: Sequence[Arm], metric: Metric) -> float | None:
    """The best mean of comparable runs; None where all are shown alike."""
    means = [arm.scores[metric.key].mean for arm in found if metric.key in arm.scores]
    if len({metric.show(mean) for mean in means}) < 2:
        return None
    return max(means) if metric.higher_is_better else min(means)


def _reference(each: Reference, columns: Sequence[Column], several: bool) -> Row:
    scores = [each.scores.get((column.task, column.metric.key)) for column in columns]
    cells = [
        Cell(NOTHING if score is None else f"{column.metric.show(score)}{_mark(column)}")
        for column, score in zip(columns, scores, strict=True)
    ]
    of = each.group.removeprefix("model ") if several and each.group else ""
    return Row((Cell(each.name, detail=of), Cell(NOTHING), *cells), reference=True)

"""What earlier work predicts, held against the arms of each group: what is judged, and in one line what is not.

Knows no HTML.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from hybrid_scale.study.results.findings import Finding, findings
from hybrid_scale.study.results.scores import Arm, crosses_languages


@dataclass(frozen=True)
class Judged:
    """One prediction in one group of comparable runs."""

    group: str
    finding: Finding


@dataclass(frozen=True)
class Predicted:
    judged: tuple[Judged, ...]
    unjudged: str
    """One line; empty where everything is judged."""

    @property
    def count(self) -> str:
        """`5 of 8 hold`."""
        return f"{sum(each.finding.verdict == 'holds' for each in self.judged)} of {len(self.judged)} hold"


def predicted(task: str, every: Sequence[Arm]) -> Predicted:
    if not crosses_languages(every):
        return Predicted((), "no query has a relevant passage in another language" if any(arm.scores for arm in every) else "")
    by_group: dict[str, list[Arm]] = defaultdict(list)
    for arm in every:
        by_group[arm.group].append(arm)
    found = [Judged(group, finding) for group, members in by_group.items() for finding in findings(members)]
    judged = tuple(each for each in found if each.finding.verdict != "not judged")
    return Predicted(judged, _silent([each for each in found if each.finding.verdict == "not judged"], len(found)))


def _silent(unjudged: Sequence[Judged], count: int) -> str:
    """`4 of 12 not judged: at 7B no finished run of mixed`."""
    if not unjudged:
        return ""
    lacking: dict[str, list[str]] = defaultdict(list)
    for each in unjudged:
        lacking[each.finding.missing].append(each.group.removeprefix("model "))
    parts = []
    for missing, groups in lacking.items():
        named = ", ".join(dict.fromkeys(group for group in groups if group))
        parts.append(f"{missing}{f' ({named})' if named else ''}")
    return f"{len(unjudged)} of {count} not judged: {'; '.join(parts)}"

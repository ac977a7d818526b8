"""The first screen: what must be said first, the answer in one sentence, the trade-off, verdicts beside their metrics,
and all arms beside what wasn't trained.

Chooses and formats; computes no test. Knows no HTML.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hybrid_scale.pages.parts import MARK, NOTHING, Cell, Plot, Row, Table
from hybrid_scale.study.grid import Plan, evaluated
from hybrid_scale.study.report import words
from hybrid_scale.study.report.scores_table import Column, scores_table
from hybrid_scale.study.report.trade_off_plot import trade_off
from hybrid_scale.study.results.choice import choose
from hybrid_scale.study.results.collect import Collected
from hybrid_scale.study.results.frames import claims_frame
from hybrid_scale.study.results.headline import Beside, answer, answer_of_pilot, asked, warnings_first
from hybrid_scale.study.results.primary import Claim
from hybrid_scale.study.results.references import Reference
from hybrid_scale.study.results.scores import Arm, Metric, arms, headline_metrics, tasks
from hybrid_scale.study.results.trade_off import standings

MOST_COLUMNS = 9
"""Of the table of scores: what stands beside an arm at 1280 pixels."""


@dataclass(frozen=True)
class First:
    """What stands before the details, in its order."""

    caution: str
    """Said before the first number; empty where there is nothing to say."""
    below: tuple[str, ...]
    """Scores below something that wasn't trained."""
    answer: str
    answered_with: tuple[tuple[str, str], ...]
    """What the metrics of the answer mean."""
    figure: Plot | None
    words: tuple[tuple[str, str], ...]
    """What everything else in the figure and the table means."""
    rule: str
    """How the verdicts were reached."""
    verdicts: Table | None
    unjudged: str
    """What is not judged, in one line."""
    scores: Table | None
    scores_title: str


def first(
    plan: Plan, collected: Collected, claims: Sequence[Claim], references: Sequence[Reference], flags: Mapping[str, str]
) -> First:
    """`references`: what the study didn't train; `flags`: set -> what must stand at each of its numbers ("in-domain")."""
    by_task = {task: arms(collected, task) for task in tasks(collected)}
    kinds = {arm.name: arm.kind for found in by_task.values() for arm in found}
    columns = [Column(*each, flags.get(each[0], "")) for each in _columns(claims, by_task)]
    largest, title = _largest(claims, by_task, bool(plan.config.models))
    shown = {task: [arm for arm in found if largest is None or arm.model == largest] for task, found in by_task.items()}
    shown = {task: shown[task] for task in dict.fromkeys(column.task for column in columns)}
    groups = {arm.group for found in shown.values() for arm in found}
    stand_beside = [each for each in references if each.group is None or each.group in groups]
    known = any(arm.scores for found in shown.values() for arm in found)
    used = dict.fromkeys(pair.difference.metric for pair in asked(claims, kinds))
    others = [column.metric for column in columns if column.metric not in used]
    return First(
        caution=plan.caution,
        below=tuple(warnings_first(list(_beside(shown, columns, stand_beside)), flags, plan.family.arm)),
        answer=_answer(plan, collected, claims, kinds, flags),
        answered_with=tuple(words.of_metrics(used)),
        figure=_figure(plan, by_task, references),
        words=(
            *words.of_metrics(others),
            *words.of_arms(arm.kind for found in shown.values() for arm in found),
            *words.of_verdicts(claim.outcome for claim in claims),
        ),
        rule=_rule(plan, claims),
        verdicts=_verdicts(claims, flags, bool(plan.config.models)) if claims else None,
        unjudged=_unjudged(claims),
        scores=scores_table("scores-first", title, columns, shown, stand_beside) if known else None,
        scores_title=title,
    )


def _answer(plan: Plan, collected: Collected, claims: Sequence[Claim], kinds: Mapping[str, str], flags: Mapping[str, str]) -> str:
    """Of a pilot, what it chose; of any other study, what its primary family says."""
    if plan.config.choose is not None:
        return answer_of_pilot(choose(plan, collected), plan.config.choose)
    return answer(plan.family, claims, kinds, flags, bool(plan.config.models))


def _columns(claims: Sequence[Claim], by_task: Mapping[str, Sequence[Arm]]) -> Iterator[tuple[str, Metric]]:
    """(set, metric) of the primary family; without one, the first of each set."""
    found = dict.fromkeys((claim.task, claim.metric) for claim in claims if claim.task in by_task)
    usual = ((task, metric) for task, arms in by_task.items() for metric in headline_metrics(arms)[:3])
    yield from list(found or dict.fromkeys(usual))[:MOST_COLUMNS]


def _largest(claims: Sequence[Claim], by_task: Mapping[str, Sequence[Arm]], named: bool) -> tuple[str | None, str]:
    """The model that the primary family speaks of, and the title of its scores; None: all models, where there is one."""
    if not named:
        return None, "Scores"
    sized = sorted((arm for found in by_task.values() for arm in found), key=lambda arm: arm.size or 0.0)
    model = next((claim.models[-1] for claim in claims), sized[-1].model if sized else None)
    return model, f"Scores at {model}" if model else "Scores"


def _beside(shown: Mapping[str, Sequence[Arm]], columns: Sequence[Column], references: Sequence[Reference]) -> Iterator[Beside]:
    """Each score of a trained arm that has its like among the references."""
    for reference in references:
        if reference.trained:
            continue
        for column in columns:
            theirs = reference.scores.get((column.task, column.metric.key))
            for arm in shown[column.task] if theirs is not None else ():
                score = arm.scores.get(column.metric.key)
                if score is not None and theirs is not None and reference.group in (None, arm.group):
                    yield Beside(column.task, arm.group, arm.name, column.metric, score.mean, reference.name, theirs)


def _figure(plan: Plan, by_task: Mapping[str, Sequence[Arm]], references: Sequence[Reference]) -> Plot | None:
    """The trade-off on the first set in several languages, in the order of the study file."""
    order = [Path(name).name for name in evaluated(plan.config, plan.runs[:1])]
    directories = {run.id: run.directory for run in plan.runs}
    for task in sorted(by_task, key=lambda task: order.index(task) if task in order else len(order)):
        found = standings(task, by_task[task], directories)
        if found:
            return trade_off("trade-off-first", task, found, _places(task, references))
    return None


def _places(task: str, references: Sequence[Reference]) -> dict[str, tuple[float, float]]:
    """Name -> (mono mAP, cross mAP) of the references that have both."""
    references = [each for each in references if not each.trained]
    several = len({each.group for each in references if each.group is not None}) > 1
    found = {}
    for each in references:
        mono, cross = each.scores.get((task, "mono_map")), each.scores.get((task, "cross_map"))
        if mono is not None and cross is not None:
            of = f"{each.group.removeprefix('model ')} " if several and each.group else ""
            found[f"{of}{each.name}"] = (mono, cross)
    return found


# ------------------------------------------------------------------------------------------------------------- verdicts


def _verdicts(claims: Sequence[Claim], flags: Mapping[str, str], named: bool) -> Table:
    """A row for each metric: for each rival the difference with its verdict, then its change between two sizes."""
    rows = dict.fromkeys((claim.task, claim.series, claim.metric) for claim in claims)
    columns = dict.fromkeys((claim.rival, claim.kind) for claim in claims)
    found = {(claim.task, claim.series, claim.metric, claim.rival, claim.kind): claim for claim in claims}
    body = []
    for row in rows:
        flag = flags.get(row[0], "")
        body.append(Row((_named(*row, flag), *(_claim(found.get((*row, *column)), flag) for column in columns))))
    heads, notes = ["metric"], [""]
    for rival, kind in columns:
        example = next(claim for claim in claims if (claim.rival, claim.kind) == (rival, kind))
        difference = f"{example.arm} \N{MINUS SIGN} {rival}"
        heads.append(difference if kind == "difference" else "its change")
        notes.append(" \N{RIGHTWARDS ARROW} ".join(example.models) if kind == "change" or named else "")
    title = "Verdicts of the primary family"
    return Table("verdicts", title, tuple(heads), tuple(body), claims_frame(claims), tuple(notes))


def _named(task: str, series: str, metric: Metric, flag: str) -> Cell:
    return Cell(metric.label, detail=", ".join(filter(None, (task, series, flag))))


def _claim(claim: Claim | None, flag: str) -> Cell:
    if claim is None:
        return Cell(NOTHING)
    places = claim.metric.decimals
    interval = f"[{claim.interval[0]:+.{places}f}, {claim.interval[1]:+.{places}f}]" if claim.interval else ""
    shown = NOTHING if claim.estimate is None else f"{claim.estimate:+.{places}f}"
    return Cell(f"{shown}{MARK if flag else ''}", verdict=claim.outcome, tone=words.TONES[claim.outcome], detail=interval)


def _rule(plan: Plan, claims: Sequence[Claim]) -> str:
    if not claims:
        return ""
    return (
        f"{len(claims)} claims named before the runs: each difference with its 95 % interval over questions and seeds, and its "
        f"verdict at p \N{LESS-THAN OR EQUAL TO} 0.05 after Holm over all of them. Equivalent: less than "
        f"{plan.family.margin:.1%} of the other arm's score."
    )


def _unjudged(claims: Sequence[Claim]) -> str:
    """One line for all claims without a test, reasons counted."""
    reasons = Counter(claim.refusal for claim in claims if claim.outcome == "not judged")
    if not reasons:
        return ""
    named = "; ".join(f"{reason} ({count})" if len(reasons) > 1 else reason for reason, count in reasons.most_common(3))
    more = f"; {len(reasons) - 3} more reasons in primary.csv" if len(reasons) > 3 else ""
    return f"{sum(reasons.values())} of {len(claims)} claims not judged: {named}{more}."

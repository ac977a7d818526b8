"""The primary family of a study: which claims it is for, told before any run has ended.

Knows settings and arms; no result, no size and no test.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hybrid_scale.errors import ConfigError, describe
from hybrid_scale.protocols import CQADUPSTACK_PARTS, beir_member
from hybrid_scale.study.settings import PRIMARY_METRICS, StudyConfig

ALPHA = 0.5
"""Of the hybrid arm that a study is for, where it has several and names none: the paper's (2408.10536)."""
RIVALS = ("mono", "cross")
BEIR = "beir"
"""Folder of the sets of BEIR, and the name of the mean over them (results/beir.py)."""


@dataclass(frozen=True)
class Family:
    """Where there is a `refusal`, the study has no primary family and everything in it is exploratory."""

    arm: str = ""
    rivals: tuple[str, ...] = ()
    metrics: tuple[tuple[str, str], ...] = ()
    """(set, metric). Empty: mono, cross and multi mAP of each set in several languages, nDCG@10 of the
    others."""
    contrast: tuple[str, str] | None = None
    """Names of models, the smaller first. None: the smallest and the largest."""
    margin: float = 0.01
    """Of equivalence, relative to the rival's score."""
    refusal: str = ""

    def __str__(self) -> str:
        if self.refusal:
            return f"no primary family: {self.refusal}; every result is exploratory"
        on = ", ".join(f"{name}:{metric}" for name, metric in self.metrics) or "the metrics of each set"
        at, change = (self.contrast[1], " to ".join(self.contrast)) if self.contrast else ("the largest size",) * 2
        change = change if self.contrast else "the smallest to the largest"
        return f"primary family: {self.arm} against {' and '.join(self.rivals)} on {on}; at {at}, and the change from {change}"


@dataclass(frozen=True)
class ArmType:
    """An arm's type of batches; `alpha` of hybrid ones alone."""

    kind: str
    alpha: float | None


def declared(config: StudyConfig, arms: Mapping[str, ArmType], evaluated: Sequence[str], where: str) -> Family:
    """`arms` by name, `evaluated`: folders of all retrieval sets. Raises ConfigError: a name that the study
    doesn't have."""
    given, models = config.study.primary, [model.name for model in config.models]
    for name in (given.arm, *given.against):
        if name is not None and name not in arms:
            rule = f"must be an arm of the study: {', '.join(arms)}"
            raise ConfigError(describe(f"{where}: study.primary", name, rule, "Name one of them."))
    if given.arm is not None and given.arm in given.against:
        raise ConfigError(describe(f"{where}: study.primary.against", given.arm, "an arm can't be compared with itself"))
    _refuse_contrast(config, models, where)
    arm, refusal = (given.arm, "") if given.arm else _hybrid(arms)
    rivals = given.against or tuple(name for name, found in arms.items() if found.kind in RIVALS and name != arm)
    if not refusal and not rivals:
        refusal = "no arm of the type mono or cross to compare with"
    metrics = _metrics(given.metrics, evaluated, where)
    return Family(arm or "", rivals, metrics, config.study.contrast, config.study.margin, refusal)


def _hybrid(arms: Mapping[str, ArmType]) -> tuple[str | None, str]:
    """The arm that the study is for, or why none is."""
    hybrids = [name for name, found in arms.items() if found.kind == "hybrid"]
    if not hybrids:
        return None, "no arm of the type hybrid"
    central = hybrids if len(hybrids) == 1 else [name for name in hybrids if arms[name].alpha == ALPHA]
    if len(central) == 1:
        return central[0], ""
    found = "none" if not central else "several"
    return None, f"{found} of the hybrid arms has alpha {ALPHA:g} (study.primary.arm names one)"


def _refuse_contrast(config: StudyConfig, models: Sequence[str], where: str) -> None:
    contrast = config.study.contrast
    if contrast is None:
        return
    for name in contrast:
        if name not in models:
            rule = f"must be two names of the axis models: {', '.join(models) or 'the study has no such axis'}"
            raise ConfigError(describe(f"{where}: study.contrast", list(contrast), rule, "Name two of them, the smaller first."))
    if contrast[0] == contrast[1]:
        raise ConfigError(describe(f"{where}: study.contrast", list(contrast), "must be two different models"))


def _metrics(given: Sequence[str], evaluated: Sequence[str], where: str) -> tuple[tuple[str, str], ...]:
    places = [(Path(folder).parent.name, Path(folder).name) for folder in evaluated]
    names = {name for _, name in places}
    of_beir = {beir_member(f"{BEIR}/{name}" if parent == BEIR else name, CQADUPSTACK_PARTS) for parent, name in places}
    names |= {BEIR} if len(of_beir - {None}) > 1 else set()
    for metric in given:
        if metric.partition(":")[0] not in names:
            rule = f"must name a set that the study evaluates: {', '.join(sorted(names)) or 'none'}"
            remedy = "Add the set to evaluate, or drop the metric."
            raise ConfigError(describe(f"{where}: study.primary.metrics", metric, rule, remedy))
    chosen = given or [metric for metric in PRIMARY_METRICS if metric.partition(":")[0] in names]
    pairs = [metric.partition(":") for metric in dict.fromkeys(chosen)]
    return tuple((name, metric) for name, _, metric in pairs)

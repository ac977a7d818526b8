"""A pilot's results -> the value of a setting for each model, written for the main study.

The best mean over finished seeds on a development set; ties go to the value listed first. Knows no HTML.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hybrid_scale.config import RunConfig
from hybrid_scale.runs import write_text
from hybrid_scale.study.grid import Plan, setting
from hybrid_scale.study.pilot import CHOSEN, Candidate, Choice, Chosen
from hybrid_scale.study.results.collect import Collected
from hybrid_scale.study.results.scores import METRICS, Arm, arms


def choose(plan: Plan, collected: Collected) -> Chosen | None:
    """Each model's best value; None: the study has no `choose`, or a model has an arm without a finished run yet."""
    wanted = plan.config.choose
    if wanted is None:
        return None
    name, key = wanted.metric.split(":")
    members, configs = arms(collected, name), {run.id: run.config for run in plan.runs}
    models: dict[str, Choice] = {}
    for model in dict.fromkeys(run.model or "" for run in plan.runs):
        tried = [_candidate(arm, key, wanted.setting, configs) for arm in members if arm.model == model or not model]
        if any(candidate is None for candidate in tried) or not tried:
            return None
        models[model or "base"] = _best([one for one in tried if one is not None], METRICS[key].higher_is_better)
    return Chosen(study=plan.config.study.name, setting=wanted.setting, metric=wanted.metric, models=models)


def _candidate(arm: Arm, metric: str, key: str, configs: Mapping[str, RunConfig]) -> Candidate | None:
    """The arm's value of `key` with its score; None where no run of it counts. `configs`: by run."""
    if metric not in arm.scores:
        return None
    value: Any = setting(configs[next(iter(arm.run_of.values()))], key)
    score = arm.scores[metric]
    return Candidate(value=value, score=score.mean, seeds=len(score.by_seed))


def _best(tried: list[Candidate], higher: bool) -> Choice:
    best = max(tried, key=lambda one: one.score if higher else -one.score)
    numbers = [one.value for one in tried if isinstance(one.value, int | float)]
    edge = len(numbers) == len(tried) > 1 and best.value in (min(numbers), max(numbers))
    return Choice(value=best.value, score=best.score, tried=tuple(tried), at_edge=edge)


def write_chosen(plan: Plan, collected: Collected) -> Path | None:
    """Write CHOSEN in the study's directory where every arm of every model has finished; returns its path."""
    chosen = choose(plan, collected)
    if chosen is None:
        return None
    path = plan.directory / CHOSEN
    write_text(path, chosen.model_dump_json(indent=1) + "\n")
    return path

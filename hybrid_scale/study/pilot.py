"""What a pilot decides for a main study: the value of one setting for each model, chosen on a development set.

A pilot is a study whose arms differ in one setting (a learning rate, say) and whose file has a section `choose`. Its report
writes CHOSEN in its directory; a main study that names the pilot's file as `pilot` takes the values from there. Knows no
results: `results.choice` makes the choice.
"""

from pathlib import Path
from typing import Any

from pydantic import Field

from hybrid_scale.config import Section, validate
from hybrid_scale.errors import ConfigError, describe
from hybrid_scale.runs import read_json
from hybrid_scale.study.settings import StudyConfig

CHOSEN = "chosen.json"


class Candidate(Section):
    """One value that was tried for a model."""

    value: Any
    score: float
    seeds: int


class Choice(Section):
    """A model's best value."""

    value: Any
    score: float
    tried: tuple[Candidate, ...]
    at_edge: bool
    """Whether the best value is the smallest or the largest one tried: the optimum may lie beyond."""


class Chosen(Section):
    """The file CHOSEN."""

    study: str
    setting: str
    """Key of a run's setting."""
    metric: str
    """SET:METRIC on which the values were compared."""
    models: dict[str, Choice] = Field(min_length=1)


def read_chosen(directory: Path) -> Chosen | None:
    """The choices that a pilot in `directory` has made; None: none yet. Raises ConfigError: another file."""
    path = directory / CHOSEN
    return validate(Chosen, read_json(path), str(path)) if path.is_file() else None


def with_chosen(config: StudyConfig, chosen: Chosen, where: str) -> StudyConfig:
    """The study with each model's chosen value among its settings. Raises ConfigError: a model sets the key itself, or the
    pilot has no value for it."""
    models = []
    for model in config.models:
        if chosen.setting in model.set:
            rule = "the pilot chooses this key for each model, so a model must not set it"
            raise ConfigError(describe(f"{where}: model '{model.name}': {chosen.setting}", model.set[chosen.setting], rule))
        if model.name not in chosen.models:
            rule = f"the pilot '{chosen.study}' has chosen no {chosen.setting} for this model"
            remedy = "Add the model to the pilot and run it, or name the models alike in both files."
            raise ConfigError(describe(f"{where}: models", model.name, rule, remedy))
        value = chosen.models[model.name].value
        models.append(model.model_copy(update={"set": {**model.set, chosen.setting: value}}))
    return config.model_copy(update={"models": tuple(models)})


def chosen_lines(chosen: Chosen) -> list[str]:
    """A line for each model, for a person: what was chosen, what was tried, and whether the grid may be too small."""
    lines = []
    for name, choice in chosen.models.items():
        tried = ", ".join(f"{candidate.value} {candidate.score:.4f}" for candidate in choice.tried)
        edge = "; the best value stands at the edge of those tried, so try further ones" if choice.at_edge else ""
        lines.append(f"model {name}: {chosen.setting} = {choice.value} by {chosen.metric} ({tried}){edge}")
    return lines

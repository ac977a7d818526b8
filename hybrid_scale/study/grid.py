"""A study file -> the list of its runs, each a checked RunConfig with a stable id.

A study is one base config, a few arms (settings that differ) and a few seeds. All runs are validated and compared before
anything starts. Knows nothing of launching, results or time.
"""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from hybrid_scale.config import NonNegative, Positive, RunConfig, Section, apply_overrides, read_yaml, validate
from hybrid_scale.errors import ConfigError, describe

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._=-]*$")]
Dotted = Annotated[str, Field(pattern=r"^\w+(\.\w+)*$")]
HeldEqual = Literal["data.train", "data.evaluate", "sampler.global_batch", "training.max_steps"]

HELD_EQUAL: tuple[HeldEqual, ...] = ("data.train", "data.evaluate", "sampler.global_batch", "training.max_steps")
"""What two arms must share, or their difference has more than one cause."""


class StudySettings(Section):
    name: Name
    directory: str
    """Home of the runs (`runs/ID/`), the tables and the report; relative to the working directory, as `run.directory` is."""


class ArmSettings(Section):
    name: Name
    set: dict[Dotted, Any] = Field(default_factory=dict)
    """Run settings of this arm (`section.key: value`); they win over `overrides`."""


class LaunchSettings(Section):
    processes: Positive = 1
    """Ranks of one run, on this machine."""
    command: tuple[str, ...] | None = None
    """Arguments of `accelerate launch` in place of the built ones; the number of processes and the port are added."""


class StudyConfig(Section):
    """One study, whole. Unknown keys and wrong types are `ConfigError`s."""

    study: StudySettings
    base: str | dict[str, Any]
    """A run's YAML file (relative to the study file) or its content."""
    overrides: dict[Dotted, Any] = Field(default_factory=dict)
    """Run settings (`section.key: value`) that all arms share and the base doesn't."""
    arms: Annotated[tuple[ArmSettings, ...], Field(min_length=1)]
    seeds: Annotated[tuple[NonNegative, ...], Field(min_length=1)] = (0,)
    launch: LaunchSettings = LaunchSettings()
    may_differ: tuple[HeldEqual, ...] = ()
    """Settings that arms may vary although they are normally held equal."""


@dataclass(frozen=True)
class PlannedRun:
    id: str
    arm: str
    seed: int
    directory: Path
    config: RunConfig


@dataclass(frozen=True)
class Plan:
    """A study whose every run has passed its checks."""

    source: str
    config: StudyConfig
    runs: tuple[PlannedRun, ...]
    checks: tuple[str, ...]
    """What was found equal, or was allowed to differ, in words."""

    @property
    def directory(self) -> Path:
        return Path(self.config.study.directory)

    @property
    def arms(self) -> tuple[str, ...]:
        return tuple(arm.name for arm in self.config.arms)


def plan_study(path: Path, settings: Sequence[str] = ()) -> Plan:
    """Study file + `key=value` settings -> Plan. Raises ConfigError naming study file, arm and key.

    A setting is one of the study (`study.directory=...`, `launch.processes=2`) or of its runs (`training.max_steps=3`).
    """
    config = load_study(path, settings)
    return expand(config, _base_tree(config, path), str(path))


def load_study(path: Path, settings: Sequence[str] = ()) -> StudyConfig:
    tree = read_yaml(path)
    of_runs = [setting for setting in settings if setting.partition("=")[0].split(".")[0] in RunConfig.model_fields]
    tree = apply_overrides(tree, [setting for setting in settings if setting not in of_runs])
    for setting in of_runs:
        _add_override(tree, setting, str(path))
    return validate(StudyConfig, tree, str(path))


def _add_override(tree: dict[str, Any], setting: str, where: str) -> None:
    """Add a run setting of the command line to `overrides`; refused where an arm would win over it."""
    key = setting.partition("=")[0]
    value = apply_overrides({}, [f"value={setting.partition('=')[2]}"])["value"]
    for arm in tree.get("arms") or ():
        if isinstance(arm, dict) and key in (arm.get("set") or {}):
            rule = f"the arm '{arm.get('name')}' sets this key itself"
            raise ConfigError(describe(f"{where}: {key}", value, rule, "Change the arm in the study file."))
    shared = tree.get("overrides") or {}
    if isinstance(shared, dict):  # anything else is refused by the validation that follows
        tree["overrides"] = {**shared, key: value}


def _base_tree(config: StudyConfig, path: Path) -> dict[str, Any]:
    if isinstance(config.base, dict):
        return config.base
    base = path.parent / config.base
    if not base.is_file():
        remedy = f"Looked for {base}: the base is found relative to the study file."
        raise ConfigError(describe(f"{path}: base", config.base, "no such run config", remedy))
    return read_yaml(base)


def expand(config: StudyConfig, base: dict[str, Any], where: str) -> Plan:
    """The runs of a study, arm by arm and seed by seed. Raises ConfigError before any of them exists."""
    _refuse_twice([arm.name for arm in config.arms], f"{where}: arms", "two arms have this name")
    _refuse_twice(config.seeds, f"{where}: seeds", "a seed stands twice")
    _refuse_given(config.overrides, f"{where}: overrides")
    shared = _apply(base, config.overrides, f"{where}: overrides")
    runs = tuple(_run(config, arm, seed, shared, where) for arm in config.arms for seed in config.seeds)
    _refuse_equal_arms(runs, where)
    return Plan(where, config, runs, (*_held_equal(config, runs, where), *_varied(runs)))


def _run(config: StudyConfig, arm: ArmSettings, seed: int, shared: dict[str, Any], where: str) -> PlannedRun:
    at = f"{where}: arm '{arm.name}'"
    _refuse_given(arm.set, at)
    name = f"{arm.name}.seed-{seed}"
    directory = Path(config.study.directory) / "runs" / name
    tree = _apply(shared, arm.set, at)
    tree["run"] = {"name": name, "directory": str(directory), "seed": seed}
    return PlannedRun(name, arm.name, seed, directory, validate(RunConfig, tree, at))


def _apply(tree: dict[str, Any], settings: Mapping[str, Any], where: str) -> dict[str, Any]:
    """`tree` with dotted settings set; JSON is YAML, so `apply_overrides` reads each value back unchanged."""
    try:
        return apply_overrides(tree, [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in settings.items()])
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def _refuse_twice(values: Sequence[Any], where: str, rule: str) -> None:
    for value in values:
        if list(values).count(value) > 1:
            raise ConfigError(describe(where, value, rule, "Keep one of them."))


def _refuse_given(settings: Mapping[str, Any], where: str) -> None:
    for key in settings:
        if key.split(".")[0] == "run":
            rule = "the study itself gives a run its name, place and seed"
            raise ConfigError(describe(f"{where}: {key}", settings[key], rule, "Use the arm's name, seeds and study.directory."))


def _refuse_equal_arms(runs: Sequence[PlannedRun], where: str) -> None:
    seen: dict[str, str] = {}
    for run in runs:
        content = run.config.model_dump_json(exclude={"run": {"name", "directory"}})
        if content in seen:
            rule = f"the arm '{seen[content]}' has the same settings"
            raise ConfigError(describe(f"{where}: arm", run.arm, rule, "Remove one, or set what should differ."))
        seen[content] = run.arm


def _held_equal(config: StudyConfig, runs: Sequence[PlannedRun], where: str) -> list[str]:
    """One line for each setting that must not vary. Raises ConfigError where one does and `may_differ` is silent."""
    lines = []
    for key in HELD_EQUAL:
        by_value: dict[str, list[str]] = defaultdict(list)
        for run in runs:
            by_value[_shown(setting(run.config, key))].append(run.arm)
        found = "; ".join(f"{value} ({', '.join(dict.fromkeys(arms))})" for value, arms in by_value.items())
        if len(by_value) == 1:
            lines.append(f"equal in all runs: {key} = {next(iter(by_value))}")
        elif key in config.may_differ:
            lines.append(f"differs, as may_differ allows: {key} = {found}")
        else:
            rule = "arms are compared at equal values of this key"
            raise ConfigError(describe(f"{where}: {key}", found, rule, f"Make them equal, or add {key} to may_differ."))
    rows = sorted({run.config.sampler.global_batch * run.config.training.max_steps for run in runs})
    lines.append(f"training rows of a run (global batch x steps): {' or '.join(f'{count:,}' for count in rows)}")
    return lines


def _varied(runs: Sequence[PlannedRun]) -> list[str]:
    """One line for each arm: the settings in which it isn't like the others."""
    settings = {run.arm: flat(run.config.model_dump(mode="json", exclude={"run"})) for run in runs}
    keys = dict.fromkeys(key for values in settings.values() for key in values)
    differing = [key for key in keys if len({_shown(values.get(key)) for values in settings.values()}) > 1]
    return [
        f"arm {arm}: " + (", ".join(f"{key} = {_shown(values.get(key))}" for key in differing) or "the base config")
        for arm, values in settings.items()
    ]


def setting(config: RunConfig, key: str) -> Any:
    """The value at `section.key`."""
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as `{"section.key": value}`."""
    settings: dict[str, Any] = {}
    for key, value in tree.items():
        settings.update(flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return settings


def _shown(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)

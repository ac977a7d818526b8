"""A study file -> the list of its runs, each a checked RunConfig with a stable id.

A run is a point of the axes models x data x arms (x alpha) x pool_rows x seeds over one base config; its id is made of their
names alone, so that a value more leaves the other runs as they are. All runs are validated and compared before anything starts.
Knows nothing of launching, results or time.
"""

import itertools
import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hybrid_scale.config import RunConfig, apply_overrides, read_yaml, validate, with_settings
from hybrid_scale.errors import ConfigError, describe, nearest
from hybrid_scale.study.family import ArmType, Family, declared
from hybrid_scale.study.pilot import CHOSEN, chosen_lines, read_chosen, with_chosen
from hybrid_scale.study.settings import HELD_EQUAL, ArmSettings, AxisValue, ModelSettings, Resources, StudyConfig, named_arms


@dataclass(frozen=True)
class PlannedRun:
    id: str
    arm: str
    seed: int
    directory: Path
    config: RunConfig
    resources: Resources
    model: str | None
    """Name on the axis `models`; None where the study has no such axis. So for `data`."""
    data: str | None
    pool_rows: int | None = None
    """Value on the axis `pool_rows`; None where the study has no such axis."""

    @property
    def panel(self) -> str:
        """Place on all axes but arms and seeds, in words."""
        places = (("model", self.model), ("data", self.data), ("pools of", self.pool_rows))
        return ", ".join(f"{axis} {place}" for axis, place in places if place)


@dataclass(frozen=True)
class Plan:
    """A study whose every run has passed its checks."""

    source: str
    config: StudyConfig
    runs: tuple[PlannedRun, ...]
    checks: tuple[str, ...]
    """What was found equal, or was allowed to differ, in words."""
    settings: tuple[str, ...] = ()
    """`key=value` of the command line, which made the plan together with the file."""
    caution: str = ""
    """What must be said before any result: that arms meet unequal numbers of negatives. Empty where they don't."""
    pilot: "Plan | None" = None
    """The study that chooses a setting for each model of this one."""
    pending: str = ""
    """Why nothing may be started yet: the pilot has made no choice. Empty where nothing is in the way."""

    @property
    def directory(self) -> Path:
        return Path(self.config.study.directory)

    @property
    def arms(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(run.arm for run in self.runs))

    @property
    def family(self) -> Family:
        return primary_family(self.config, self.runs, self.source)


def primary_family(config: StudyConfig, runs: Sequence[PlannedRun], where: str) -> Family:
    """Raises ConfigError: an arm, model or set that the study doesn't have."""
    samplers = {run.arm: run.config.sampler for run in runs}
    arms = {name: ArmType(sampler.arm, sampler.alpha if sampler.arm == "hybrid" else None) for name, sampler in samplers.items()}
    return declared(config, arms, tested(config, runs), where)


def evaluated(config: StudyConfig, runs: Sequence[PlannedRun]) -> tuple[str, ...]:
    """Folders of all retrieval sets that these runs are scored on, by the training or after it."""
    return tuple(dict.fromkeys((*(name for run in runs for name in run.config.data.scored), *config.evaluate)))


def tested(config: StudyConfig, runs: Sequence[PlannedRun]) -> tuple[str, ...]:
    """Those of `evaluated` that aren't there for learning curves alone (`data.evaluate_during`)."""
    return tuple(dict.fromkeys((*(name for run in runs for name in run.config.data.evaluate), *config.evaluate)))


def development(config: StudyConfig, runs: Sequence[PlannedRun]) -> tuple[str, ...]:
    """Names of the sets that are scored for learning curves alone: a pilot or `training.keep_best` may have chosen on them."""
    tests = {Path(name).name for name in tested(config, runs)}
    return tuple(name for name in dict.fromkeys(Path(name).name for name in evaluated(config, runs)) if name not in tests)


def plan_study(path: Path, settings: Sequence[str] = ()) -> Plan:
    """Study file + `key=value` settings -> Plan. Raises ConfigError naming study file, arm and key.

    A setting is one of the study (`study.directory=...`, `launch.processes=2`) or of its runs (`training.max_steps=3`).
    """
    config = load_study(path, settings)
    if config.pilot is None:
        return expand(config, _base_tree(config, path), str(path), settings)
    return _plan_after_pilot(config, path, settings)


def _plan_after_pilot(config: StudyConfig, path: Path, settings: Sequence[str]) -> Plan:
    """The plan with the pilot's choices, or, before it has made them, with the base's values and the reason why it must wait."""
    file = path.parent / str(config.pilot)
    if file.resolve() == path.resolve():
        raise ConfigError(describe(f"{path}: pilot", config.pilot, "a study must not be its own pilot", "Name another file."))
    pilot = plan_study(file)
    if pilot.config.choose is None:
        remedy = "Name a study with a section `choose`."
        raise ConfigError(describe(f"{path}: pilot", config.pilot, "this study decides nothing", remedy))
    chosen = read_chosen(pilot.directory)
    plan = expand(with_chosen(config, chosen, str(path)) if chosen else config, _base_tree(config, path), str(path), settings)
    decisive = pilot.config.choose.metric.partition(":")[0]
    if decisive in {Path(name).name for name in tested(config, plan.runs)}:
        rule = f"the pilot '{pilot.config.study.name}' chooses on this set, so this study must not be scored on it"
        remedy = "Let the pilot choose on a development set; for learning curves name that in data.evaluate_during."
        raise ConfigError(describe(f"{path}: evaluate", decisive, rule, remedy))
    if chosen:
        return replace(plan, pilot=pilot, checks=(*plan.checks, *chosen_lines(chosen)))
    pending = (
        f"{path}: the pilot {pilot.source} has chosen no {pilot.config.choose.setting} yet: {pilot.directory / CHOSEN} is not"
    )
    return replace(plan, pilot=pilot, pending=f"{pending} there. Run the pilot and its report first, or state pilot: null.")


def load_study(path: Path, settings: Sequence[str] = ()) -> StudyConfig:
    tree = read_yaml(path)
    of_runs = [setting for setting in settings if setting.partition("=")[0].split(".")[0] in RunConfig.model_fields]
    tree = apply_overrides(tree, [setting for setting in settings if setting not in of_runs], StudyConfig)
    for setting in of_runs:
        _add_override(tree, setting, str(path))
    return validate(StudyConfig, tree, str(path))


def _add_override(tree: dict[str, Any], setting: str, where: str) -> None:
    """Add a run setting of the command line to `overrides`; refused where a value of an axis would win over it."""
    key = setting.partition("=")[0]
    value: Any = apply_overrides({}, [setting], RunConfig)
    for part in key.split("."):
        value = value[part]
    for axis, kind in (("arms", "arm"), ("models", "model"), ("data", "data")):
        for choice in tree.get(axis) or ():
            if isinstance(choice, dict) and key in (choice.get("set") or {}):
                rule = f"the {kind} '{choice.get('name')}' sets this key itself"
                raise ConfigError(describe(f"{where}: {key}", value, rule, f"Change the {kind} in the study file."))
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


def expand(config: StudyConfig, base: dict[str, Any], where: str, settings: Sequence[str] = ()) -> Plan:
    """The runs of a study, ordered by model, data, arm and seed. Raises ConfigError before any of them exists."""
    for axis, values in (("arms", config.arms), ("models", config.models), ("data", config.data)):
        _refuse_twice([value.name for value in values], f"{where}: {axis}", f"two {axis} have this name")
    _refuse_twice(config.seeds, f"{where}: seeds", "a seed stands twice")
    _refuse_twice(config.alpha, f"{where}: alpha", "an alpha stands twice")
    _refuse_twice(config.pool_rows, f"{where}: pool_rows", "a size stands twice")
    _refuse_twice([Path(name).name for name in config.evaluate], f"{where}: evaluate", "two sets write one file eval/NAME.json")
    _refuse_given(config.overrides, f"{where}: overrides")
    shared = _apply(base, config.overrides, f"{where}: overrides")
    arms = [arm for given in config.arms for arm in _alphas(given, config.alpha, shared)]
    axes = (config.models or (None,), config.data or (None,), arms, config.pool_rows or (None,), config.seeds)
    _refuse_unknown_models(config, where)
    points = [point for point in itertools.product(*axes) if _is_wanted(*point[:3])]
    runs = tuple(_run(config, *point, shared, where) for point in points)
    _refuse_one_id(runs, where)
    _refuse_equal_runs(runs, where)
    _refuse_scored_twice(config, runs, where)
    _refuse_an_empty_choice(config, runs, where)
    equal = _held_equal(config, runs, where)
    negatives, caution = _negatives(config, runs, where)
    family = str(primary_family(config, runs, where))
    _refuse_unknown_predictions(config, runs, where)
    checks = (*equal, negatives, *_sizes(runs, where), *_varied(runs), family)
    return Plan(where, config, runs, checks, tuple(settings), caution)


def _is_wanted(model: ModelSettings | None, _: AxisValue | None, arm: ArmSettings) -> bool:
    """Whether an arm is trained with this model."""
    return not arm.models or (model is not None and model.name in arm.models)


def _refuse_unknown_models(config: StudyConfig, where: str) -> None:
    known = [model.name for model in config.models]
    for arm in config.arms:
        for name in arm.models:
            if name not in known:
                raise ConfigError(describe(f"{where}: arm '{arm.name}': models", name, "no such model", nearest(name, known)))


def _alphas(arm: ArmSettings, alphas: Sequence[float], shared: Mapping[str, Any]) -> list[ArmSettings]:
    """An arm of the type `hybrid` once for each alpha, called ARM-ALPHA; any other as it is."""
    sampler = shared.get("sampler") if isinstance(shared.get("sampler"), dict) else None
    kind = arm.set.get("sampler.arm", (sampler or {}).get("arm", "hybrid"))
    if kind != "hybrid" or "sampler.alpha" in arm.set or not alphas:
        return [arm]
    return [
        ArmSettings(name=f"{arm.name}-{alpha:g}", set={**arm.set, "sampler.alpha": alpha}, models=arm.models) for alpha in alphas
    ]


def _run(
    config: StudyConfig,
    model: ModelSettings | None,
    data: AxisValue | None,
    arm: ArmSettings,
    pool_rows: int | None,
    seed: int,
    shared: dict[str, Any],
    where: str,
) -> PlannedRun:
    pools = AxisValue(name=f"pool-{pool_rows}", set={"sampler.pool_rows": pool_rows}) if pool_rows else None
    chosen = {"model": model, "data": data, "arm": arm, "pool_rows": pools}
    at = ", ".join(f"{kind} '{value.name}'" for kind, value in chosen.items() if value)
    tree, setters = shared, dict[str, str]()
    for kind, value in chosen.items():
        if value:
            _refuse_given(value.set, f"{where}: {kind} '{value.name}'")
            _refuse_set_twice(value.set, setters, kind, where)
            tree = _apply(tree, value.set, f"{where}: {at}")
    name = ".".join([*(value.name for value in chosen.values() if value), f"seed-{seed}"])
    directory = Path(config.study.directory) / "runs" / name
    tree = {**tree, "run": {"name": name, "directory": str(directory), "seed": seed}}
    checked = validate(RunConfig, tree, f"{where}: {at}")
    names = (model.name if model else None, data.name if data else None)
    return PlannedRun(name, arm.name, seed, directory, checked, _resources(config, model), *names, pool_rows)


def _resources(config: StudyConfig, model: ModelSettings | None) -> Resources:
    """The study's resources with what the model states itself."""
    stated = model.resources.model_dump(exclude_unset=True) if model else {}
    return Resources(**{**config.resources.model_dump(exclude_unset=True), **stated})


def _apply(tree: dict[str, Any], settings: Mapping[str, Any], where: str) -> dict[str, Any]:
    """`tree` with dotted settings set."""
    try:
        return with_settings(tree, settings)
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
            remedy = "Use the names of the axes, seeds and study.directory."
            raise ConfigError(describe(f"{where}: {key}", settings[key], rule, remedy))


def _refuse_set_twice(settings: Mapping[str, Any], setters: dict[str, str], kind: str, where: str) -> None:
    """Two axes that set one key would hide each other; `setters` collects who sets what."""
    for key in settings:
        if key in setters:
            rule = f"the axes {setters[key]} and {kind} both set this key"
            raise ConfigError(describe(f"{where}: {key}", settings[key], rule, "Leave it to one of them."))
        setters[key] = kind


def _refuse_one_id(runs: Sequence[PlannedRun], where: str) -> None:
    """Ids that differ in case alone are one folder on some file systems."""
    seen: dict[str, PlannedRun] = {}
    for run in runs:
        other = seen.setdefault(run.id.casefold(), run)
        if other is not run:
            parts = [f"{r.panel or 'base'}, arm {r.arm}, seed {r.seed}" for r in (other, run)]
            rule = f"two runs have this id ({'; '.join(parts)})"
            raise ConfigError(describe(f"{where}: id", run.id, rule, "Rename a model, data or arm."))


def _refuse_equal_runs(runs: Sequence[PlannedRun], where: str) -> None:
    seen: dict[str, PlannedRun] = {}
    for run in runs:
        content = run.config.model_dump_json(exclude={"run": {"name", "directory"}})
        other = seen.setdefault(content, run)
        if other is run:
            continue
        kind = next((kind for kind in ("model", "data") if getattr(other, kind) != getattr(run, kind)), "arm")
        rule = f"the {kind} '{getattr(other, kind)}' has the same settings"
        raise ConfigError(describe(f"{where}: {kind}", getattr(run, kind), rule, "Remove one, or set what should differ."))


def _refuse_scored_twice(config: StudyConfig, runs: Sequence[PlannedRun], where: str) -> None:
    later = {Path(name).name: name for name in config.evaluate}
    for name in dict.fromkeys(name for run in runs for name in run.config.data.scored):
        if Path(name).name in later:
            rule = f"the training scores {name} itself (data.evaluate) and writes the same file"
            raise ConfigError(describe(f"{where}: evaluate", later[Path(name).name], rule, "Leave it to one of them."))


def _refuse_an_empty_choice(config: StudyConfig, runs: Sequence[PlannedRun], where: str) -> None:
    """A pilot's arms must each have another value, and its development set must be scored."""
    if config.choose is None:
        return
    values = {arm.name: arm.set.get(config.choose.setting) for arm in config.arms}
    without = [name for name, value in values.items() if value is None]
    if without or len({_shown(value) for value in values.values()}) < len(values):
        rule = f"every arm of a pilot must set another {config.choose.setting}"
        raise ConfigError(describe(f"{where}: arms", values, rule, "One arm for each value to try."))
    scored = {Path(folder).name for folder in evaluated(config, runs)}
    name = config.choose.metric.partition(":")[0]
    if name not in scored:
        raise ConfigError(
            describe(f"{where}: choose.metric", config.choose.metric, "no such set is evaluated", nearest(name, scored))
        )


def _refuse_unknown_predictions(config: StudyConfig, runs: Sequence[PlannedRun], where: str) -> None:
    arms, sets = {run.arm for run in runs}, {Path(folder).name for folder in evaluated(config, runs)}
    for number, prediction in enumerate(config.predictions):
        at = f"{where}: predictions[{number}]"
        for name in named_arms(prediction):
            if name not in arms:
                raise ConfigError(describe(at, name, "no arm of the study has this name", nearest(name, arms)))
        for metric in prediction.metrics:
            name = metric.partition(":")[0]
            if name not in sets:
                raise ConfigError(describe(f"{at}.metrics", metric, "no such set is evaluated", nearest(name, sets)))


def _held_equal(config: StudyConfig, runs: Sequence[PlannedRun], where: str) -> list[str]:
    """One line for each setting that must not vary. Raises ConfigError where one does and `may_differ` is silent."""
    lines = []
    for key in HELD_EQUAL:
        scopes = {run.data for run in runs} if key.startswith("data.") else {None}
        for scope in sorted(scopes, key=str):
            inside = [run for run in runs if scope is None or run.data == scope]
            line = _equal(key, inside, config, where)
            lines.append(line if scope is None else f"data {scope}: {line}")
    rows = sorted({run.config.sampler.global_batch * run.config.training.max_steps for run in runs})
    lines.append(f"training rows of a run (global batch x steps): {' or '.join(f'{count:,}' for count in rows)}")
    return lines


def negatives_by_arm(runs: Sequence[PlannedRun]) -> dict[str, tuple[int, ...]]:
    """Arm -> the numbers of negatives that its rows meet, ascending: one number, unless pools are an axis of the study."""
    found: dict[str, set[int]] = {}
    for run in runs:
        found.setdefault(run.arm, set()).add(run.config.negatives_a_row)
    return {arm: tuple(sorted(counts)) for arm, counts in found.items()}


def negatives_text(runs: Sequence[PlannedRun]) -> str:
    """The negatives a row of every arm, for a person: `127 in every arm`, or arm by arm where they differ."""
    by_arm = {arm: " or ".join(f"{count:,}" for count in counts) for arm, counts in negatives_by_arm(runs).items()}
    shown = set(by_arm.values())
    return f"{shown.pop()} in every arm" if len(shown) == 1 else "; ".join(f"{arm} {counts}" for arm, counts in by_arm.items())


def _negatives(config: StudyConfig, runs: Sequence[PlannedRun], where: str) -> tuple[str, str]:
    """A line for the checks, and what a report must say first. Raises ConfigError where runs that are compared differ."""
    line = f"negatives a row: {negatives_text(runs)}"
    compared = [[run for run in runs if run.pool_rows == size] for size in dict.fromkeys(run.pool_rows for run in runs)]
    unequal = [members for members in compared if len({run.config.negatives_a_row for run in members}) > 1]
    if not unequal:
        return line, ""
    found = _by_value(unequal[0], lambda run: f"{run.config.negatives_a_row:,}")
    if not config.study.unequal_negatives:
        rule = "runs are compared at equal numbers of negatives a row, which move quality more than the batch type does"
        remedy = "Give every arm one sampler.pool_rows, or state study.unequal_negatives: true, which the report will say first."
        raise ConfigError(describe(f"{where}: negatives a row", found, rule, remedy))
    caution = f"Arms differ in the number of negatives that a row meets ({found}), so a difference between arms is not one of"
    return line, f"{caution} batch types alone."


def _equal(key: str, runs: Sequence[PlannedRun], config: StudyConfig, where: str) -> str:
    values = {_shown(setting(run.config, key)) for run in runs}
    if len(values) == 1:
        return f"equal in all runs: {key} = {values.pop()}"
    found = _by_value(runs, lambda run: _shown(setting(run.config, key)))
    if key in config.may_differ:
        return f"differs, as may_differ allows: {key} = {found}"
    rule = "runs are compared at equal values of this key"
    raise ConfigError(describe(f"{where}: {key}", found, rule, f"Make them equal, or add {key} to may_differ."))


def _by_value(runs: Sequence[PlannedRun], value: Callable[[PlannedRun], str]) -> str:
    """`64 (a, b); 32 (c)`: each value with the arms (of which model) that have it."""
    names: dict[str, list[str]] = defaultdict(list)
    for run in runs:
        names[value(run)].append(f"{run.model}.{run.arm}" if run.model else run.arm)
    return "; ".join(f"{shown} ({', '.join(dict.fromkeys(arms))})" for shown, arms in names.items())


def _sizes(runs: Sequence[PlannedRun], where: str) -> list[str]:
    """One line for each model: what its runs get. Raises ConfigError where ranks outnumber the rows of a global batch."""
    lines = []
    for model in dict.fromkeys(run.model for run in runs):
        of_model = [run for run in runs if run.model == model]
        resources, batch = of_model[0].resources, min(run.config.sampler.global_batch for run in of_model)
        if batch < resources.ranks:
            rule = f"{resources.ranks} ranks need at least a row each"
            at = f"{where}: {f'model {model!r}: ' if model else ''}sampler.global_batch"
            raise ConfigError(describe(at, batch, rule, "Use fewer nodes or GPUs, or a larger batch."))
        if model is not None:
            unit = "GPUs" if resources.gpus_per_node else "CPU processes"
            gets = f"{resources.nodes} x {resources.ranks_per_node} {unit}, {batch / resources.ranks:g} rows a rank and step"
            lines.append(f"model {model}: {len(of_model)} runs, each on {gets}")
    return lines


def _varied(runs: Sequence[PlannedRun]) -> list[str]:
    """One line for each arm: the settings in which it isn't like the others of the first panel that has it."""
    lines: dict[str, str] = {}
    for panel in dict.fromkeys(run.panel for run in runs):
        if all(run.arm in lines for run in runs if run.panel == panel):
            continue
        members = {run.arm: flat(run.config.model_dump(mode="json", exclude={"run"})) for run in runs if run.panel == panel}
        keys = dict.fromkeys(key for values in members.values() for key in values)
        differing = [key for key in keys if len({_shown(values.get(key)) for values in members.values()}) > 1]
        for arm, values in members.items():
            said = ", ".join(f"{key} = {_shown(values.get(key))}" for key in differing) or "the base config"
            lines.setdefault(arm, f"arm {arm}: {said}")
    return list(lines.values())


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

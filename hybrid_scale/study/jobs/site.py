"""A site's settings and a run's resources -> arguments of sbatch and what the job scripts read from the environment."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from hybrid_scale.config import read_yaml, validate
from hybrid_scale.study.settings import JobOptions, Resources, Site

Kind = Literal["train", "evaluate", "collect"]
OPTIONS = {
    **{key: key for key in ("partition", "account", "qos", "constraint", "time")},
    **{"cpus-per-task": "cpus_per_node", "mem": "memory"},
}
"""Option of sbatch -> setting."""


def load_site(path: Path) -> Site:
    """A site's YAML file. Raises ConfigError naming the key."""
    return validate(Site, read_yaml(path), str(path))


def sbatch_options(site: Site, kind: Kind, resources: Resources, model: str | None = None) -> list[str]:
    """What a job of a model (its name on the study's axis) asks for.

    The most special statement wins, null included: of the site on this model and kind, on this model; then the resources that
    the study gives the model; then the site on this kind, and on all jobs.
    """
    special, general = _sections(site, kind, model)
    given = resources if kind != "collect" else Resources(gpus_per_node=0)
    of_study = {
        "time": given.time if kind == "train" else None,
        "cpus_per_node": given.cpus_per_node,
        "memory": given.memory,
    }

    def stated(key: str) -> Any:
        for section in special:
            if key in section.model_fields_set:
                return getattr(section, key)
        if of_study.get(key) is not None:
            return of_study[key]
        return next((getattr(section, key) for section in general if key in section.model_fields_set), None)

    options = [f"--nodes={given.nodes if kind == 'train' else 1}", "--ntasks-per-node=1"]
    if given.gpus_per_node:
        options.append(_gpus(site.ask_for_gpus, stated("gpu_type"), given.gpus_per_node))
    values = {option: stated(key) for option, key in OPTIONS.items()}
    return [*options, *(f"--{key}={value}" for key, value in values.items() if value is not None), *(stated("sbatch") or ())]


def _sections(site: Site, kind: Kind, model: str | None) -> tuple[list[JobOptions], list[JobOptions]]:
    """The site's sections that speak of the model, and those that speak of all models, the most special first."""
    of_model = site.models.get(model) if model is not None and kind != "collect" else None
    special = [] if of_model is None else [of_model.train if kind == "train" else of_model.evaluate, of_model]
    own: JobOptions = getattr(site, kind)
    return special, [own, site]


def _gpus(ask: str, gpu_type: str | None, count: int) -> str:
    kind = f"{gpu_type}:" if gpu_type else ""
    return f"--gres=gpu:{kind}{count}" if ask == "gres" else f"--gpus-per-node={kind}{count}"


def dependency(after: str, jobs: Sequence[str]) -> str:
    """--dependency of a job. `singleton`: of two jobs with one name, Slurm never runs both at once."""
    return "--dependency=" + ",".join([*([":".join([after, *jobs])] if jobs else []), "singleton"])


def environment(site: Site, resources: Resources) -> dict[str, str]:
    """What the job scripts read (slurm/*.sbatch say what each means)."""
    ours = {
        "HS_ENV_SETUP": site.setup,
        "HS_LAUNCH_PREFIX": site.container,
        "HS_SRUN_ARGS": site.srun,
        "HS_MAX_RESTARTS": str(site.max_restarts),
    }
    if not resources.gpus_per_node:
        ours["HS_PROCESSES_PER_NODE"] = str(resources.processes_per_node)
    return {**ours, **site.environment}

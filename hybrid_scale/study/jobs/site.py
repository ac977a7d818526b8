"""A site's settings and a run's resources -> arguments of sbatch and what the job scripts read from the environment."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from hybrid_scale.config import read_yaml, validate
from hybrid_scale.study.settings import JobOptions, Resources, Site

Kind = Literal["train", "evaluate", "collect"]


def load_site(path: Path) -> Site:
    """A site's YAML file. Raises ConfigError naming the key."""
    return validate(Site, read_yaml(path), str(path))


def sbatch_options(site: Site, kind: Kind, resources: Resources) -> list[str]:
    """What a job asks for. A model's own resources win over the kind's section of the site, that over the site's head."""
    own: JobOptions = getattr(site, kind)

    def stated(key: str) -> Any:
        return getattr(own if key in own.model_fields_set else site, key)

    given = resources if kind != "collect" else Resources(gpus_per_node=0)
    options = [f"--nodes={given.nodes if kind == 'train' else 1}", "--ntasks-per-node=1"]
    if given.gpus_per_node:
        options.append(_gpus(site, given.gpus_per_node))
    values = {key: stated(key) for key in ("partition", "account", "qos", "constraint")}
    values |= {
        "time": (given.time if kind == "train" else None) or stated("time"),
        "cpus-per-task": given.cpus_per_node or stated("cpus_per_node"),
        "mem": given.memory or stated("memory"),
    }
    return [*options, *(f"--{key}={value}" for key, value in values.items() if value is not None), *stated("sbatch")]


def _gpus(site: Site, count: int) -> str:
    kind = f"{site.gpu_type}:" if site.gpu_type else ""
    return f"--gres=gpu:{kind}{count}" if site.ask_for_gpus == "gres" else f"--gpus-per-node={kind}{count}"


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

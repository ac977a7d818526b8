"""A site's settings and a run's resources -> arguments of sbatch and what the job scripts read from the environment."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from hybrid_scale.config import read_yaml, validate
from hybrid_scale.study.settings import JobOptions, Resources, Site

Kind = Literal["train", "evaluate", "collect"]


def load_site(path: Path) -> Site:
    """A site's YAML file. Raises ConfigError naming the key."""
    return validate(Site, read_yaml(path), str(path))


def sbatch_options(site: Site, kind: Kind, resources: Resources) -> list[str]:
    """What a job asks for. A model's own resources win over the kind's section of the site, that over the site's head."""
    own: JobOptions = getattr(site, kind)
    given = resources if kind != "collect" else None
    nodes = given.nodes if given and kind == "train" else 1
    time = given.time if given and kind == "train" else None
    options = [f"--nodes={nodes}", "--ntasks-per-node=1"]
    if given and given.gpus_per_node:
        options.append(_gpus(site, given.gpus_per_node))
    values = {
        "partition": own.partition or site.partition,
        "account": own.account or site.account,
        "qos": own.qos or site.qos,
        "constraint": own.constraint or site.constraint,
        "time": time or own.time or site.time,
        "cpus-per-task": (given and given.cpus_per_node) or own.cpus_per_node or site.cpus_per_node,
        "mem": (given and given.memory) or own.memory or site.memory,
    }
    return [*options, *(f"--{key}={value}" for key, value in values.items() if value is not None), *site.sbatch, *own.sbatch]


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

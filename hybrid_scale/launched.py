"""Who started this process, and as one of how many: the environment is settled once, before any library reads it.

A process is a rank only where a launcher says so in full: RANK, LOCAL_RANK and WORLD_SIZE, as torchrun, `accelerate launch` and
`deepspeed` set them. Parts of it are left over in a shell, or belong to a pod or a job: they are taken out and named, or refused
where they may mean several processes that would train apart. Settings that `accelerate launch` hands down (its flags, its
config file) would change a run behind its config's back: they are taken out as well. Loads no library.
"""

import os
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path

from hybrid_scale.errors import RunError, describe

WHOLE = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
"""What every launcher sets."""

PARTS = (*WHOLE, "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK", "LOCAL_SIZE")
"""What is taken out where it isn't whole: Accelerate and DeepSpeed read these one by one."""

ELSEWHERE = {
    "PMI_SIZE": "mpirun or srun",
    "OMPI_COMM_WORLD_SIZE": "mpirun",
    "MV2_COMM_WORLD_SIZE": "mpirun",
    "SLURM_STEP_NUM_TASKS": "srun",
}
"""Processes that another launcher started, or that a shell still remembers, and that launcher."""

HANDED_DOWN = ("ACCELERATE_", "FSDP_", "MEGATRON_LM_", "PARALLELISM_CONFIG_")
KEPT = ("ACCELERATE_CPU_AFFINITY", "ACCELERATE_DEBUG_MODE", "ACCELERATE_LOG_LEVEL", "ACCELERATE_DISABLE_RICH")
"""Of Accelerate: places and words, no numbers."""
NEUTRAL = ("", "no", "none", "false", "auto", "default", "1")
HOW = ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_CONFIG_DS_FIELDS", "ACCELERATE_USE_CPU")
"""How the processes were started, which nobody asks for again."""

REMEDY = "Start ranks with `accelerate launch` or `torchrun`."


@dataclass(frozen=True)
class Started:
    """How this process was started."""

    launched: bool
    """Whether it is a rank of a launcher."""
    notes: tuple[str, ...] = ()
    """What was ignored, for a person."""
    cpu: bool = False
    """Whether `accelerate launch --cpu` started it."""
    alone: str | None = None
    """By what it was started as a single process where more could have been started; None: nothing known."""


def is_rank(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether a launcher started this process as a rank."""
    return all(environment.get(name, "").isdecimal() for name in WHOLE)


def settle(environment: MutableMapping[str, str] = os.environ) -> Started:
    """Take out of `environment` what isn't meant, and say what it was. Again, it finds nothing more.

    Raises RunError: variables that can't be told apart, or contradict each other.
    """
    handed_down = _handed_down(environment)
    if is_rank(environment):
        _check_whole(environment)
        if "LOCAL_SIZE" in environment:  # DeepSpeed's launcher; torchrun calls it otherwise
            environment.setdefault("LOCAL_WORLD_SIZE", environment["LOCAL_SIZE"])
        return Started(True, _ignored_settings(handed_down))
    _refuse_several(environment, handed_down)
    notes = _ignored_settings(handed_down)
    parts = {name: environment.pop(name) for name in PARTS if name in environment}
    left = [f"{name}={value}" for name, value in parts.items()]
    tasks = environment.get("SLURM_NTASKS", "")
    left += [f"SLURM_NTASKS={tasks}"] if tasks.isdecimal() and int(tasks) > 1 else []
    if left:
        notes = (*notes, f"one process: no launcher started it, so these variables are ignored: {', '.join(left)}. {REMEDY}")
    cpu = handed_down.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1", "yes", "on")
    alone = None
    if "ACCELERATE_USE_CPU" in handed_down:
        alone = "accelerate launch --cpu (or use_cpu in its config file)" if cpu else "accelerate launch for one device"
    return Started(False, notes, cpu, alone)


def _handed_down(environment: MutableMapping[str, str]) -> dict[str, str]:
    """Settings of Accelerate, taken out of the environment."""
    names = [name for name in environment if name.startswith(HANDED_DOWN) and name not in KEPT]
    return {name: environment.pop(name) for name in names}


def _ignored_settings(handed_down: Mapping[str, str]) -> tuple[str, ...]:
    """One line on settings that would have changed something; FSDP's and Megatron's own count only where they are used."""
    found = [
        f"{name}={value}"
        for name, value in sorted(handed_down.items())
        if name.startswith("ACCELERATE_") and name not in HOW and value.lower() not in NEUTRAL
    ]
    found = [text for text in found if not text.startswith("ACCELERATE_DYNAMO_") or text.startswith("ACCELERATE_DYNAMO_BACKEND")]
    if not found:
        return ()
    file = _config_file()
    source = f"flags of accelerate launch or its config file{f' (by default {file})' if file else ''}"
    return (f"ignored, the run's own config counts: {', '.join(found)}: {source}.",)


def _config_file() -> Path | None:
    """The config file that `accelerate launch` reads unasked, where there is one."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "huggingface"
    folder = Path(os.environ.get("HF_HOME", cache)).expanduser() / "accelerate"
    return next((path for path in (folder / "default_config.yaml", folder / "default_config.json") if path.is_file()), None)


def _check_whole(environment: Mapping[str, str]) -> None:
    rank, local, world = (int(environment[name]) for name in WHOLE)
    if rank >= world or local > rank:
        found = ", ".join(f"{name}={environment[name]}" for name in WHOLE)
        rule = "must be LOCAL_RANK <= RANK < WORLD_SIZE"
        raise RunError(describe("launcher", found, rule, f"Unset what a shell has left over. {REMEDY}"))
    for name in ("MASTER_ADDR", "MASTER_PORT") if world > 1 else ():
        if not environment.get(name):
            rule = f"{world} ranks must be told where to meet"
            raise RunError(
                describe(name, environment.get(name), rule, f"{REMEDY} Unset RANK, LOCAL_RANK and WORLD_SIZE for one.")
            )


def _refuse_several(environment: Mapping[str, str], handed_down: Mapping[str, str]) -> None:
    """No launcher that we know: whatever may mean several processes is refused, as they would train apart."""
    for name, launcher in ELSEWHERE.items():
        count = environment.get(name, "")
        if count.isdecimal() and int(count) > 1:
            rule = f"{launcher} may have started {count} of these processes, which would train apart"
            remedy = f"{REMEDY} One process: unset {name}."
            raise RunError(describe(name, count, rule, remedy))
    several = environment.get("WORLD_SIZE", "") not in ("", "0", "1")
    if "RANK" in environment and several:
        found = f"RANK={environment['RANK']}, WORLD_SIZE={environment['WORLD_SIZE']}, no LOCAL_RANK"
        rule = "these are of a pod or left over, no launcher sets them alone"
        raise RunError(describe("launcher", found, rule, f"{REMEDY} One process: unset RANK WORLD_SIZE."))
    if "ACCELERATE_USE_CPU" in handed_down and environment.get("MASTER_ADDR"):
        cpu = handed_down["ACCELERATE_USE_CPU"].lower() == "true"
        by = "--cpu (or use_cpu in its config file)" if cpu else "a machine without several GPUs, and no flag for ranks,"
        rule = f"with {by} it starts one process, whatever --num_processes says"
        remedy = (
            "Say --use_deepspeed or --multi_gpu, without --cpu, on CPUs as well. Where one process is meant: unset MASTER_ADDR."
        )
        raise RunError(describe("accelerate launch", f"MASTER_ADDR={environment['MASTER_ADDR']} and no RANK", rule, remedy))

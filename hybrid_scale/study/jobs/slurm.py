"""sbatch, squeue and scancel as functions: jobs in, jobs out, every refusal an error with what the program said.

Needs no accounting database and parses no log. Knows nothing of studies.
"""

import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hybrid_scale.errors import RunError

SECONDS = 120.0
"""Longest wait for an answer of Slurm's controller; its own time-out is below that."""
ENDED = {
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED"),
    *("REVOKED", "TIMEOUT"),
}
"""Job states after which nothing runs. A state that isn't known counts as alive: nothing is started beside it."""
WAITING = {"PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD"}
FIELDS = "%i|%T|%j|%r"
NEVER = "DependencyNeverSatisfied"


class SlurmError(RunError):
    """Slurm isn't there, doesn't answer or refuses."""


@dataclass(frozen=True)
class Job:
    id: str
    state: str
    """Slurm's word, e.g. PENDING."""
    name: str
    reason: str = ""
    """Why it waits or ended, in Slurm's words; "" where it says None."""

    @property
    def alive(self) -> bool:
        return self.state not in ENDED

    @property
    def waits(self) -> bool:
        return self.state in WAITING


def submit(script: str, arguments: Sequence[str], options: Sequence[str], environment: Mapping[str, str], lock: int) -> str:
    """sbatch; the new job's id. Raises SlurmError with sbatch's words.

    `lock` is a locked file that sbatch inherits: should this process be killed, the lock is held until sbatch has ended, so
    that whoever looks for the job afterwards finds it.
    """
    env = {**clean(os.environ), **environment}
    said = _call(["sbatch", "--parsable", "--export=ALL", *options, script, *arguments], env, lock)
    number = said.strip().partition(";")[0]
    if not number.isdigit():
        raise SlurmError(f"sbatch: printed {said.strip()[:200]!r} where a job id was expected. Look for the job in squeue.")
    return number


def clean(environment: Mapping[str, str]) -> dict[str, str]:
    """Without the variables of a surrounding job: sbatch refuses some of them in pairs, and a job would take them for its own."""
    return {key: value for key, value in environment.items() if not key.startswith("SLURM_") or key == "SLURM_CONF"}


def jobs() -> list[Job]:
    """This user's jobs that the controller still knows: alive, or ended a few minutes ago (MinJobAge)."""
    said = _call(["squeue", "--states=all", "--noheader", f"--user={os.getuid()}", f"--format={FIELDS}"], clean(os.environ))
    return [_job(line) for line in said.splitlines() if line.strip()]


def _job(line: str) -> Job:
    parts = line.strip().split("|")
    if len(parts) < 4:
        raise SlurmError(f"squeue: printed {line[:200]!r} where {FIELDS} was expected.")
    reason = parts[-1].strip("()")
    return Job(parts[0], parts[1], "|".join(parts[2:-1]), "" if reason == "None" else reason)


def cancel(ids: Sequence[str]) -> None:
    """scancel; a job that has ended meanwhile is no error."""
    if ids:
        _call(["scancel", *ids], clean(os.environ), ended="already completed|Invalid job id")


def _call(command: list[str], env: Mapping[str, str], *inherited: int, ended: str | None = None) -> str:
    try:
        done = subprocess.run(
            command, env=dict(env), pass_fds=inherited, capture_output=True, text=True, timeout=SECONDS, check=False
        )
    except FileNotFoundError:
        remedy = "Run this where Slurm's programs are, or use `launch/study.py run` for this machine."
        raise SlurmError(f"{command[0]}: not found on PATH. {remedy}") from None
    except subprocess.TimeoutExpired:
        raise SlurmError(f"{command[0]}: no answer in {SECONDS:.0f} s. Try again when Slurm answers.") from None
    said = done.stderr.strip()
    if done.returncode and not (ended and said and all(re.search(ended, line) for line in said.splitlines())):
        raise SlurmError(f"{command[0]}: exit code {done.returncode}: {said or done.stdout.strip() or 'without a word'}")
    return done.stdout

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
ENDED = {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "TIMEOUT"}
"""Job states after which nothing runs. Any other, known or not, counts as alive: nothing is started beside it. REVOKED does:
another cluster of a federation has started the job."""
WAITING = {"PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD"}
FIELDS = "%i|%T|%j|%r"
NEVER = "DependencyNeverSatisfied"
OURS_ALONE = ("SLURM_", "SQUEUE_", "SCANCEL_")
"""Variables of a surrounding job, and a user's own filters: under SQUEUE_PARTITION=x jobs elsewhere seem not to exist."""
CHANGES_A_JOB = {f"SBATCH_{name}" for name in ("ARRAY_INX", "CLUSTERS", "NO_REQUEUE", "OPEN_MODE", "SIGNAL", "WAIT")}
"""Defaults of a user that win over what the job scripts say, or make sbatch wait for the job's end."""


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
    found = re.findall(r"^(?:Submitted batch job )?(\d+)(?:;\S+)?\s*$", said, re.MULTILINE)  # below a site's own remarks
    if not found:
        remedy = "If there is a job, the next `submit` finds it by its name."
        raise SlurmError(f"sbatch: printed {said.strip()[:200]!r} where a job id was expected. {remedy}")
    return str(found[-1])


def clean(environment: Mapping[str, str]) -> dict[str, str]:
    """Without OURS_ALONE and CHANGES_A_JOB; accounts, partitions and the like that a user sets for all own jobs stay."""
    kept = {key: value for key, value in environment.items() if key not in CHANGES_A_JOB and not key.startswith(OURS_ALONE)}
    return kept | {key: environment[key] for key in ("SLURM_CONF",) if key in environment}


def jobs() -> list[Job]:
    """This user's jobs that the controller still knows: alive, or ended a few minutes ago (MinJobAge)."""
    said = _call(["squeue", "--states=all", "--noheader", f"--user={os.getuid()}", f"--format={FIELDS}"], clean(os.environ))
    return [_job(line) for line in said.splitlines() if line.strip()]


def _job(line: str) -> Job:
    parts = line.strip().split("|")
    if len(parts) < 4:
        raise SlurmError(f"squeue: printed {line[:200]!r} where {FIELDS} was expected.")
    reason = parts[-1].strip("()")
    return Job(parts[0], state_word(parts[1]), "|".join(parts[2:-1]), "" if reason == "None" else reason)


def state_word(said: str) -> str:
    """`CANCELLED by 1000` and `cancelled` -> CANCELLED; a word that was cut, `OUT_OF_ME+`, whole where it is one of ENDED."""
    word = said.strip().upper().partition(" ")[0]
    whole = [state for state in ENDED if word.endswith("+") and state.startswith(word[:-1])]
    return whole[0] if len(whole) == 1 else word.rstrip("+")


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
        raise SlurmError(
            f"{command[0]}: exit code {done.returncode}: {said or done.stdout.strip() or 'without a word'}{_hint(said)}"
        )
    return done.stdout


def _hint(said: str) -> str:
    if "MaxSubmit" not in said:
        return ""
    return "\nThis is the limit of jobs in the queue: state it as the site's `max_jobs_in_queue`, and submit again as jobs end."

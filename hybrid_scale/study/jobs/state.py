"""What is true of a run: its `status.json` and what Slurm says of its jobs, merged into one word with a reason.

No clock is read: machines of a cluster disagree about the time. No log is parsed.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from hybrid_scale.errors import RunError, describe
from hybrid_scale.runs import RunDirectory, Status
from hybrid_scale.study.jobs.slurm import NEVER, Job

Word = Literal["planned", "queued", "running", "preempted", "done", "failed", "cancelled", "lost", "blocked", "broken"]

TO_START_AGAIN = ("failed", "cancelled", "lost", "blocked", "preempted")
"""What `resubmit --failed` takes. `preempted`: saved and stopped, and no job will go on with it."""


@dataclass(frozen=True)
class State:
    word: Word
    detail: str = ""
    job: Job | None = None


def read_status(run: RunDirectory) -> dict[str, Any]:
    """Content of `status.json`, checked. Raises RunError naming the file where it was changed by hand."""
    status = run.status()
    if not isinstance(status, dict) or status.get("status") not in get_args(Status):
        rule = f"`status` is one of {', '.join(get_args(Status))}"
        remedy = "Restore the file, or delete it to have the run started again from its last checkpoint."
        raise RunError(describe(str(run.status_file), status, rule, remedy))
    return status


def training(status: Mapping[str, Any], job: Job | None, known: str | None) -> State:
    """State of a run's training. `job`: the latest that Slurm knows of; `known`: id of the latest that was ever submitted."""
    word, reason = status["status"], status.get("reason") or ""
    if word == "done":
        return State("done", "", job)
    if job and job.alive:
        return _alive(word, reason, job)
    if word == "failed":
        return State("failed", reason, job)
    if job:
        return _ended(word, job)
    if known:
        rule = "never said a word" if word in ("planned", "queued") else f"left the status '{word}'"
        return State("preempted" if word == "preempted" else "lost", f"job {known} is gone and {rule}")
    if word == "queued":  # the submission died before sbatch, or sbatch refused
        return State("planned")
    return State(word, reason or ("no job of this study: started by hand or by `run`" if word == "running" else ""))


def _alive(word: str, reason: str, job: Job) -> State:
    if job.reason == NEVER:
        return State("blocked", f"job {job.id} waits for one that failed", job)
    if job.waits:
        before = f"; goes on after: {reason or word}" if word in ("preempted", "failed", "running") else ""
        return State("queued", f"{job.reason or job.state.lower()}{before}", job)
    if job.state not in ("RUNNING", "CONFIGURING", "COMPLETING"):
        return State("running", f"job {job.id} is {job.state.lower()}", job)
    return State("running", "" if word == "running" else "starting" if word in ("queued", "planned") else f"after: {reason}", job)


def _ended(word: str, job: Job) -> State:
    ended = f"job {job.id} ended as {job.state}"
    if job.state == "CANCELLED":
        return State("cancelled", f"{ended}, the run's status was '{word}'", job)
    if word == "preempted":
        return State("preempted", f"{ended} after a checkpoint was saved", job)
    return State("failed", f"{ended} while the run's status was '{word}'", job)


def evaluation(left: int, failed: Mapping[str, str], job: Job | None, known: str | None, trained: State) -> State:
    """State of what is scored after the training, `left` sets of which have no result yet."""
    if not left:
        return State("done", "", job)
    if job and job.alive:
        if job.reason == NEVER:
            return State("blocked", "its training failed", job)
        return State("queued" if job.waits else "running", job.reason, job)
    if failed:
        return State("failed", "; ".join(f"{name}: {reason}" for name, reason in failed.items()), job)
    if job and job.state == "CANCELLED":
        blocked = trained.word != "done"
        return State("blocked" if blocked else "cancelled", "its training isn't done" if blocked else f"job {job.id}", job)
    if job:
        return State("failed", f"job {job.id} ended as {job.state} with {left} sets left", job)
    if known:
        return State("lost" if trained.word == "done" else "blocked", f"job {known} is gone with {left} sets left")
    return State("planned")

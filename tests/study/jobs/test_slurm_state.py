"""What is shown of a run, for every pair of what it says itself and what Slurm says of its job."""

import pytest

from hybrid_scale.study.jobs.slurm import ENDED, Job, state_word
from hybrid_scale.study.jobs.state import State, evaluation, training

SAID = ("planned", "queued", "running", "preempted", "failed", "done")
TABLE = {
    "PENDING": ("queued", "queued", "queued", "queued", "queued", "done"),
    "REQUEUE_HOLD": ("queued", "queued", "queued", "queued", "queued", "done"),
    "CONFIGURING": ("running", "running", "running", "running", "running", "done"),
    "RUNNING": ("running", "running", "running", "running", "running", "done"),
    "COMPLETING": ("running", "running", "running", "running", "running", "done"),
    "COMPLETED": ("failed", "failed", "failed", "preempted", "failed", "done"),
    "FAILED": ("failed", "failed", "failed", "preempted", "failed", "done"),
    "TIMEOUT": ("failed", "failed", "failed", "preempted", "failed", "done"),
    "NODE_FAIL": ("failed", "failed", "failed", "preempted", "failed", "done"),
    "CANCELLED": ("cancelled", "cancelled", "cancelled", "cancelled", "failed", "done"),
    "gone": ("lost", "lost", "lost", "preempted", "failed", "done"),
    "never": ("planned", "planned", "running", "preempted", "failed", "done"),
}


@pytest.mark.parametrize("state", TABLE)
def test_training(state: str) -> None:
    job = None if state in ("gone", "never") else Job("7", state, "x")
    known = None if state == "never" else "7"
    assert tuple(training({"status": word, "reason": "r"}, job, known).word for word in SAID) == TABLE[state]


def test_every_end_that_slurm_knows_is_an_end_here() -> None:
    for state in ENDED:
        assert training({"status": "running"}, Job("7", state, "x"), "7").word in ("failed", "cancelled")


EVERY_WORD = {
    **dict.fromkeys(
        ("BOOT_FAIL", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "TIMEOUT"), "failed"
    ),
    "CANCELLED": "cancelled",
    **dict.fromkeys(("PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT"), "queued"),
    **dict.fromkeys(("COMPLETING", "CONFIGURING", "RESIZING", "REVOKED", "RUNNING", "SIGNALING", "STAGE_OUT"), "running"),
    **dict.fromkeys(
        ("STOPPED", "SUSPENDED", "POWER_UP_NODE", "LAUNCH_FAILED", "RECONFIG_FAIL", "UPDATE_DB", "EXPEDITING"), "running"
    ),
}
"""States and flags of Slurm 22.05 to 25.05 (its page job_state_codes and squeue(1)). What another cluster runs, what is stopped
but keeps its nodes, and what may be flagged while a job goes on must not be started a second time."""


@pytest.mark.parametrize("state", EVERY_WORD)
def test_every_word_of_slurm(state: str) -> None:
    job = Job("7", state, "x")
    assert training({"status": "running"}, job, "7").word == EVERY_WORD[state]
    assert evaluation(1, {}, job, "7", State("done")).word == EVERY_WORD[state]


def test_a_job_that_stands_still_is_told() -> None:
    assert training({"status": "running"}, Job("7", "SUSPENDED", "x"), "7").detail == "job 7 is suspended"
    assert training({"status": "queued"}, Job("7", "REVOKED", "x"), "7").detail == "job 7 is revoked"


@pytest.mark.parametrize(
    ("said", "word"),
    [
        ("CANCELLED by 1000", "CANCELLED"),
        ("CANCELLED+", "CANCELLED"),
        ("OUT_OF_ME+", "OUT_OF_MEMORY"),
        ("NODE_FAIL", "NODE_FAIL"),
        ("completed", "COMPLETED"),
        (" RUNNING ", "RUNNING"),
        ("C+", "C"),
        ("REQUEUE_H+", "REQUEUE_H"),
    ],
)
def test_words_that_are_cut_or_carry_more(said: str, word: str) -> None:
    """What may be one of two ends, or no end, stays a word that isn't known: the job counts as alive."""
    assert state_word(said) == word


def test_a_job_that_waits_for_ever_blocks() -> None:
    never = Job("7", "PENDING", "x", "DependencyNeverSatisfied")
    assert training({"status": "queued"}, never, "7").word == "blocked"
    assert evaluation(1, {}, never, "7", State("failed")).word == "blocked"


def test_the_reason_of_a_run_that_goes_on_is_kept() -> None:
    waiting = training({"status": "preempted", "reason": "SIGUSR1"}, Job("7", "PENDING", "x", "BeginTime"), "7")
    assert waiting.detail == "BeginTime; goes on after: SIGUSR1"
    starting = training({"status": "failed", "reason": "RankLost: rank 3"}, Job("7", "RUNNING", "x"), "7")
    assert starting.detail == "after: RankLost: rank 3"


@pytest.mark.parametrize(
    ("left", "failed", "state", "trained", "word"),
    [
        (0, {}, "FAILED", "done", "done"),
        (2, {}, None, "done", "planned"),
        (2, {}, "PENDING", "running", "queued"),
        (2, {}, "RUNNING", "done", "running"),
        (2, {"nq": "exit code 1"}, "RUNNING", "done", "running"),
        (2, {"nq": "exit code 1"}, "FAILED", "done", "failed"),
        (2, {"nq": "exit code 1"}, "gone", "done", "failed"),
        (2, {}, "OUT_OF_MEMORY", "done", "failed"),
        (2, {}, "CANCELLED", "done", "cancelled"),
        (2, {}, "CANCELLED", "failed", "blocked"),
        (2, {}, "gone", "done", "lost"),
        (2, {}, "gone", "failed", "blocked"),
    ],
)
def test_evaluation(left: int, failed: dict[str, str], state: str | None, trained: str, word: str) -> None:
    job = Job("8", state, "x") if state not in (None, "gone") else None
    assert evaluation(left, failed, job, "8" if state else None, State(trained)).word == word  # type: ignore[arg-type]

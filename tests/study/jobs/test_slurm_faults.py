"""What goes wrong between this process, sbatch and the run directories: refusals, deaths, edits by hand. Nothing starts twice."""

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hybrid_scale.errors import ConfigError, RunError
from hybrid_scale.runs import RunDirectory, write_json
from hybrid_scale.study.grid import Plan
from hybrid_scale.study.jobs.journal import only_one
from hybrid_scale.study.jobs.local import run_study
from hybrid_scale.study.jobs.queue import cancel
from hybrid_scale.study.jobs.site import load_site
from hybrid_scale.study.jobs.slurm import SlurmError
from launch import study as study_door
from tests.study.fabricate import start, write_study
from tests.study.jobs.clusters import wait
from tests.study.jobs.fakeslurm import ALL, FakeSlurm, door, said_of, words
from tests.test_floors import BLOCKED, ROOT

# Refusals


def test_a_refused_job_ends_the_submission_and_a_later_one_goes_on(plan: Plan, fake: FakeSlurm) -> None:
    quota = "sbatch: error: QOSMaxSubmitJobPerUserLimit\nsbatch: error: Batch job submission failed"
    fake.misbehave("sbatch", after=2, says=quota)
    with pytest.raises(SlurmError) as refused:
        said_of(plan)
    assert quota in str(refused.value)
    assert "7b.cross.seed-0: train: sbatch: exit code 1" in str(refused.value)
    assert "2 jobs were submitted before it" in str(refused.value)
    assert words(plan) == [("queued", "queued"), ("planned", "planned")]
    assert not RunDirectory(plan.runs[1].directory).status_file.exists()
    fake.behave()
    said_of(plan)
    assert fake.names() == ALL


def test_a_refusal_leaves_the_status_of_a_failed_run(plan: Plan, fake: FakeSlurm) -> None:
    RunDirectory(plan.runs[0].directory).create(plan.runs[0].config)
    RunDirectory(plan.runs[0].directory).set_status("failed", reason="no space left")
    fake.misbehave("sbatch", says="down for maintenance")
    with pytest.raises(SlurmError, match="down for maintenance"):
        said_of(plan, again=True)
    assert RunDirectory(plan.runs[0].directory).status()["reason"] == "no space left"


@pytest.mark.parametrize(
    ("program", "message"), [("squeue", "squeue: not found on PATH"), ("sbatch", "sbatch: not found on PATH")]
)
def test_slurm_missing(plan: Plan, fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch, program: str, message: str) -> None:
    (fake.bin / program).unlink()
    monkeypatch.setenv("PATH", str(fake.bin))
    with pytest.raises(SlurmError, match=message):
        said_of(plan)
    assert fake.jobs == {}
    assert words(plan) == [("planned", "planned")] * 2


def test_nothing_is_submitted_blindly(plan: Plan, fake: FakeSlurm) -> None:
    fake.misbehave("squeue", says="slurm_load_jobs error: Unable to contact slurm controller")
    with pytest.raises(SlurmError, match="Unable to contact slurm controller"):
        said_of(plan)
    assert fake.jobs == {}
    fake.misbehave("squeue", prints="hello")
    with pytest.raises(SlurmError, match="squeue: printed 'hello'"):
        said_of(plan)
    fake.misbehave("sbatch", prints="Submitted!")
    with pytest.raises(SlurmError, match="printed 'Submitted!' where a job id was expected"):
        said_of(plan)


def test_only_from_a_checkout(plan: Plan, fake: FakeSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RunError, match=r"no slurm/train\.sbatch'; not a checkout"):
        said_of(plan)


def test_a_refused_job_that_speaks_all_the_same_is_heard(plan: Plan, fake: FakeSlurm) -> None:
    """sbatch may time out and the job exist."""
    status = RunDirectory(plan.runs[0].directory).status_file
    script = f"#!/bin/sh\nprintf '%s' '{{\"status\": \"running\"}}' >{status}\necho Socket timed out >&2; exit 1\n"
    (fake.bin / "sbatch").write_text(script)
    with pytest.raises(SlurmError, match="Socket timed out"):
        said_of(plan)
    assert json.loads(status.read_text()) == {"status": "running"}


def test_a_file_system_without_locks_is_named(plan: Plan, fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(file: object, how: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr("fcntl.flock", no_locks)
    with pytest.raises(RunError, match="found 'Function not implemented'; this file system can't lock"):
        said_of(plan)
    assert fake.jobs == {}


# Deaths


def test_died_between_sbatch_and_bookkeeping(plan: Plan, fake: FakeSlurm) -> None:
    fake.misbehave("sbatch", after=2, kill="after")
    assert door("submit", plan.source).wait(600) == -signal.SIGKILL
    assert fake.names() == ALL[:3]
    assert "102" not in (plan.directory / "jobs.jsonl").read_text()
    fake.behave()
    wait("the end of the sbatch that holds the lock", lambda: free(plan), 600)
    said = said_of(plan)
    assert said[0] == "7b.cross.seed-0: found train job 102 (pending), which no submission had noted"
    assert fake.names() == ALL, "each started once"


def test_the_lock_outlives_a_submitter_whose_sbatch_is_still_on_its_way(plan: Plan, fake: FakeSlurm) -> None:
    fake.misbehave("sbatch", kill="before")
    assert door("submit", plan.source).wait(600) == -signal.SIGKILL
    assert fake.jobs == {}, "killed before the job exists"
    fake.behave()
    with pytest.raises(RunError, match="this study is being run or submitted right now"):
        said_of(plan)
    fake.release()
    wait("the job", lambda: bool(fake.jobs), 600)
    wait("the end of the sbatch that holds the lock", lambda: free(plan), 600)
    said_of(plan)
    assert fake.names() == ALL


def free(plan: Plan) -> bool:
    try:
        with only_one(plan.directory):
            return True
    except RunError:
        return False


def test_died_before_sbatch(plan: Plan, fake: FakeSlurm) -> None:
    RunDirectory(plan.runs[0].directory).create(plan.runs[0].config)
    RunDirectory(plan.runs[0].directory).set_status("queued")
    assert words(plan)[0] == ("planned", "planned")
    said_of(plan)
    assert fake.names() == ALL


def test_the_journal_may_be_lost_or_cut(plan: Plan, fake: FakeSlurm) -> None:
    said_of(plan)
    journal = plan.directory / "jobs.jsonl"
    whole = journal.read_text()
    journal.write_text(whole[:-9])
    said_of(plan)
    journal.unlink()
    said_of(plan)
    assert fake.names() == ALL
    journal.write_text("rubbish\n" + whole)
    with pytest.raises(RunError, match=r"jobs\.jsonl:1: found 'rubbish'; not an entry"):
        said_of(plan)


# Edited by hand


def delete_status(run: RunDirectory) -> None:
    run.status_file.unlink()


def break_status(run: RunDirectory) -> None:
    run.status_file.write_text('{"status": "run')


def invent_status(run: RunDirectory) -> None:
    write_json(run.status_file, {"status": "finished"})


def change_config(run: RunDirectory) -> None:
    run.config_file.write_text(run.config_file.read_text().replace("global_batch: 64", "global_batch: 128"))


def break_config(run: RunDirectory) -> None:
    run.config_file.write_text("sampler: [")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (break_status, r"status\.json:1: not JSON"),
        (
            invent_status,
            r"status\.json: found .*finished.*; `status` is one of planned, queued, .*Restore the file, or delete it",
        ),
        (change_config, r"started with another config: sampler\.global_batch: 128 -> 64"),
        (break_config, r"config\.yaml:\d+: not YAML"),
    ],
)
def test_an_edited_run_is_refused_before_anything_starts(
    plan: Plan, fake: FakeSlurm, edit: Callable[[RunDirectory], None], message: str
) -> None:
    run = RunDirectory(plan.runs[1].directory)
    run.create(plan.runs[1].config)
    run.set_status("failed", reason="x")
    edit(run)
    with pytest.raises((RunError, ConfigError), match=message):
        said_of(plan, again=True)
    assert fake.jobs == {}
    assert words(plan)[0] == ("planned", "planned"), "the others are still shown"


def test_a_file_system_that_is_away_breaks_one_run_and_starts_nothing(
    plan: Plan, fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As NFS answers when the file was replaced on another node."""
    status = RunDirectory.status

    def stale(run: RunDirectory) -> dict[str, Any]:
        if run.path == plan.runs[1].directory:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(run.status_file))
        return status(run)

    with monkeypatch.context() as patched:
        patched.setattr(RunDirectory, "status", stale)
        assert [word for word, _ in words(plan)] == ["planned", "broken"]
        with pytest.raises(RunError, match="Stale file handle"):
            said_of(plan)
    assert fake.jobs == {}
    said_of(plan)
    assert fake.names() == ALL


def test_a_deleted_status_starts_nothing_twice(plan: Plan, fake: FakeSlurm) -> None:
    said_of(plan)
    fake.set(ALL[0], "RUNNING")
    for run in plan.runs:
        delete_status(RunDirectory(run.directory))
    assert words(plan) == [("running", "queued"), ("queued", "queued")]
    assert said_of(plan, again=True) == []
    fake.set(ALL[0], "GONE")
    assert words(plan)[0][0] == "lost"


# Here and there


def test_a_submitted_study_doesnt_run_here_as_well(plan: Plan, fake: FakeSlurm) -> None:
    said_of(plan)
    with pytest.raises(RunError, match="found '104, 101, 103, 100, 102'; jobs of this study are in Slurm's queue"):
        run_study(plan, lambda run: ["true"])
    cancel(plan, lambda text: None)
    assert len(run_study(plan, lambda run: ["true"])) == 2


def test_a_copy_of_a_submitted_study_where_slurm_isnt(
    plan: Plan, fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said_of(plan)
    (fake.bin / "squeue").unlink()
    monkeypatch.setenv("PATH", str(fake.bin))
    with pytest.raises(
        RunError, match=r"jobs\.jsonl: found 'jobs'; this study was submitted, .*squeue: not found.*delete the file"
    ):
        run_study(plan, lambda run: ["true"])
    monkeypatch.setattr(sys, "argv", ["study.py", "status", plan.source])
    assert study_door.main() == 2
    said = capsys.readouterr()
    assert "7b.mono.seed-0  queued" in said.out
    assert "of their jobs nothing is known" in said.err


def test_a_run_started_by_hand_isnt_touched(plan: Plan, fake: FakeSlurm) -> None:
    start(plan.runs[0], 2).set_status("running")
    assert words(plan)[0][0] == "running"
    said_of(plan, again=True)
    assert fake.names() == [*ALL[2:]]


def test_the_doors_on_a_login_node_without_torch(
    plan: Plan, fake: FakeSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocker = tmp_path / "blocked"
    blocker.mkdir()
    refuse = f"import sys\nfor name in {BLOCKED!r}:\n    sys.modules[name] = None\n"
    (blocker / "sitecustomize.py").write_text(refuse)
    env = {**os.environ, "PYTHONPATH": f"{blocker}{os.pathsep}{ROOT}"}

    def said(code: int, *arguments: str) -> str:
        command = [sys.executable, "launch/study.py", *arguments]
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600, check=False)
        assert done.returncode == code, done.stderr
        assert "Traceback" not in done.stderr
        return done.stdout + done.stderr

    assert subprocess.run([sys.executable, "-c", "import torch"], env=env, capture_output=True, check=False).returncode == 1
    site = tmp_path / "site.yaml"
    site.write_text("partition: gpu\nquality: high\n")
    assert "site.yaml: quality: found 'high'; unknown key." in said(2, "submit", plan.source, "--site", str(site))
    site.write_text("partition: gpu\n")
    assert "7b.cross.seed-0: evaluate is job 103, afterok 102" in said(0, "submit", plan.source, "--site", str(site))
    assert "2 runs: 2 queued" in said(0, "status", plan.source)
    fake.set(ALL[0], "NODE_FAIL")
    shown = said(1, "status", plan.source).splitlines()
    assert shown[0].startswith(
        "7b.mono.seed-0   failed     starting  job 100 ended as NODE_FAIL while the run's status was 'queued'"
    )
    left = "left as they are: 1 failed; to start them again: launch/study.py resubmit"
    assert left in said(0, "submit", plan.source)
    assert "7b.mono.seed-0: train is job 105" in said(0, "resubmit", plan.source, "--failed")
    assert "--failed" in said(2, "resubmit", plan.source)
    assert "cancelled 5 jobs" in said(0, "cancel", plan.source)


def test_a_site_is_needed(tmp_path: Path, fake: FakeSlurm) -> None:
    path = write_study(tmp_path)
    done = door("submit", str(path))
    assert done.wait(600) == 2
    assert "site: found None; a cluster's settings are needed. Give --site SITE.yaml" in done.communicate()[1]
    (tmp_path / "site.yaml").write_text("time: 2 days\n")
    with pytest.raises(ConfigError, match=r"site\.yaml: time: found '2 days'"):
        load_site(tmp_path / "site.yaml")

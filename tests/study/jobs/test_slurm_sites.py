"""Sites and users differ: limits of the queue, options of every job, defaults in the environment, remarks of a wrapped sbatch."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from hybrid_scale.errors import ConfigError, RunError
from hybrid_scale.study.grid import Plan, plan_study
from hybrid_scale.study.jobs.queue import cancel
from hybrid_scale.study.jobs.site import Kind, load_site, sbatch_options
from hybrid_scale.study.jobs.slurm import SlurmError
from hybrid_scale.study.settings import JobOptions, ModelJobs, Resources, Site
from launch import study as study_door
from tests.study.fabricate import finish, write_study
from tests.study.jobs.fakeslurm import ALL, ARMS, MODELS, SITE, FakeSlurm, said_of, words

# What a job asks for

EVERYTHING = Site(
    partition="gpu",
    account="lab",
    qos="high",
    constraint="h100&nvme",
    time="1-00:00:00",
    cpus_per_node=64,
    memory="0",
    sbatch=("--exclusive", "--reservation=r"),
    ask_for_gpus="gres",
    gpu_type="h100",
    evaluate=JobOptions(qos=None, time="02:00:00", sbatch=("--nice=5",)),
    collect=JobOptions(partition="cpu", constraint=None, cpus_per_node=2, memory="8G", sbatch=()),
)


def test_the_exact_options_of_each_kind_of_job() -> None:
    given = Resources(nodes=4, gpus_per_node=8, cpus_per_node=32, memory="500G", time="12:00:00")
    shared = ["--partition=gpu", "--account=lab", "--constraint=h100&nvme"]
    assert sorted(sbatch_options(EVERYTHING, "train", given)) == sorted(
        [
            *("--nodes=4", "--ntasks-per-node=1", "--gres=gpu:h100:8", "--cpus-per-task=32", "--mem=500G", "--time=12:00:00"),
            *(*shared, "--qos=high", "--exclusive", "--reservation=r"),
        ]
    )
    assert sorted(sbatch_options(EVERYTHING, "evaluate", given)) == sorted(
        [
            *("--nodes=1", "--ntasks-per-node=1", "--gres=gpu:h100:8", "--cpus-per-task=32", "--mem=500G", "--time=02:00:00"),
            *(*shared, "--nice=5"),
        ]
    )
    assert sorted(sbatch_options(EVERYTHING, "collect", given)) == sorted(
        [
            *("--nodes=1", "--ntasks-per-node=1", "--cpus-per-task=2", "--mem=8G", "--time=1-00:00:00"),
            *("--partition=cpu", "--account=lab", "--qos=high"),
        ]
    )
    assert sbatch_options(Site(), "train", Resources(gpus_per_node=2)) == [
        "--nodes=1",
        "--ntasks-per-node=1",
        "--gpus-per-node=2",
    ]


BY_MODEL = Site(
    partition="gpu",
    constraint="a100",
    sbatch=("--exclusive",),
    gpu_type="a100",
    evaluate=JobOptions(qos="short"),
    models={
        "7b": ModelJobs(qos="wide"),
        "72b": ModelJobs(
            partition="big",
            constraint="h100",
            gpu_type="h100",
            sbatch=("--reservation=r",),
            train=JobOptions(time="2-00:00:00"),
            evaluate=JobOptions(constraint=None, gpu_type="h200", qos="long"),
        ),
    },
)


@pytest.mark.parametrize(
    ("model", "kind", "expected"),
    [
        ("0.5b", "train", "--gpus-per-node=a100:8 --partition=gpu --constraint=a100 --time=12:00:00 --exclusive"),
        ("0.5b", "evaluate", "--gpus-per-node=a100:8 --partition=gpu --qos=short --constraint=a100 --exclusive"),
        ("7b", "evaluate", "--gpus-per-node=a100:8 --partition=gpu --qos=wide --constraint=a100 --exclusive"),
        ("72b", "train", "--gpus-per-node=h100:8 --partition=big --constraint=h100 --time=2-00:00:00 --reservation=r"),
        ("72b", "evaluate", "--gpus-per-node=h200:8 --partition=big --qos=long --reservation=r"),
        (None, "train", "--gpus-per-node=a100:8 --partition=gpu --constraint=a100 --time=12:00:00 --exclusive"),
    ],
)
def test_sizes_may_need_different_machines(model: str | None, kind: Kind, expected: str) -> None:
    given = Resources(gpus_per_node=8, time="12:00:00")
    assert sbatch_options(BY_MODEL, kind, given, model) == ["--nodes=1", "--ntasks-per-node=1", *expected.split()]


def test_the_report_is_asked_for_as_the_site_says_whatever_the_models_need() -> None:
    assert "--partition=gpu" in sbatch_options(BY_MODEL, "collect", Resources(), "72b")


@pytest.mark.parametrize(
    "option", ["--job-name=x", "-J", "--dependency=afterok:1", "--array=1-9%3", "-M", "--wait", "--export=NONE"]
)
def test_options_by_which_jobs_are_found_again_are_refused(tmp_path: Path, option: str) -> None:
    (tmp_path / "site.yaml").write_text(f"collect: {{sbatch: [--exclusive, '{option}']}}\n")
    with pytest.raises(ConfigError, match=r"site\.yaml: collect\.sbatch: .*is given by the submission itself"):
        load_site(tmp_path / "site.yaml")


# Limits of the queue


@pytest.fixture
def four(tmp_path: Path) -> Plan:
    """Four runs, each with an evaluation: 9 jobs."""
    return plan_study(write_study(tmp_path, arms=ARMS, seeds=[0, 1], models=MODELS, evaluate=["data/nq"], site={}))


def test_a_full_queue_is_left_with_room_for_the_report(four: Plan, fake: FakeSlurm) -> None:
    site = SITE.model_copy(update={"max_jobs_in_queue": 6})
    said = said_of(four, site=site)
    assert said[-1] == "2 runs are left: the site's max_jobs_in_queue is 6. Submit again as jobs end."
    assert [name.split(".")[-1] for name in fake.names()] == ["train", "evaluate"] * 2 + ["collect"]
    assert said_of(four, site=site)[-1].startswith("2 runs are left")
    assert len(fake.jobs) == 5
    finish(four.runs[0], {"mono_map": 0.5})
    fake.set(f"{four.runs[0].id}.train", "COMPLETED")
    fake.set(f"{four.runs[0].id}.evaluate", "FAILED")
    assert said_of(four, site=site)[-1].startswith("1 runs are left")
    assert fake.names()[5:] == [f"{four.runs[2].id}.train", f"{four.runs[2].id}.evaluate", "study.collect"]
    alive = [job for job in fake.jobs.values() if job["state"] == "PENDING"]
    assert len(alive) == 5
    collect = next(job for job in alive if job["name"].startswith("study.collect"))
    assert "--dependency=afterany:103:106:102:105,singleton" in collect["options"], "in place of the one that waited for fewer"
    for job in list(fake.jobs):
        fake.set(fake.jobs[job]["name"].partition("@")[0], "COMPLETED")
    for run in four.runs[:3]:
        finish(run, {"mono_map": 0.5})
    assert "left" not in said_of(four, site=site)[-1]
    assert fake.names().count(f"{four.runs[3].id}.train") == 1


def test_other_jobs_of_the_user_count_and_nothing_is_half_submitted(four: Plan, fake: FakeSlurm) -> None:
    strangers = {str(n): {"name": "mine", "state": "RUNNING", "reason": "None"} for n in range(3)}
    (fake.home / "jobs.json").write_text(json.dumps(strangers))
    said_of(four, site=Site(max_jobs_in_queue=7))
    assert [name.split(".")[-1] for name in fake.names()[3:]] == ["train", "evaluate", "collect"], (
        "no training without evaluation"
    )


def test_what_the_door_says_of_a_full_queue(four: Plan, fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    site = tmp_path / "site.yaml"
    site.write_text("max_jobs_in_queue: 3\n")
    monkeypatch.setattr("sys.argv", ["study.py", "submit", four.source, "--site", str(site)])
    assert study_door.main() == 3
    site.write_text("max_jobs_in_queue: 100\n")
    assert study_door.main() == 0
    site.write_text("max_jobs_in_queue: 2\n")
    assert study_door.main() == 2


@pytest.mark.parametrize("limit", ["QOSMaxSubmitJobPerUserLimit", "AssocMaxSubmitJobLimit"])
def test_a_quota_names_its_remedy(plan: Plan, fake: FakeSlurm, limit: str) -> None:
    quota = f"sbatch: error: {limit}\nsbatch: error: Batch job submission failed: Job violates accounting/QOS policy"
    fake.misbehave("sbatch", after=3, says=quota)
    with pytest.raises(SlurmError, match=rf"(?s){limit}.*state it as the site's `max_jobs_in_queue`.*3 jobs were submitted"):
        said_of(plan)
    fake.behave()
    said_of(plan)
    assert fake.names() == ALL, "the evaluation that was refused, and the report"
    assert "--dependency=afterok:102,singleton" in fake.jobs["103"]["options"]


# What a user's environment and a site's programs add


def test_a_users_own_filters_hide_no_job(plan: Plan, fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> None:
    said_of(plan)
    for name in ("SQUEUE_PARTITION", "SQUEUE_NAMES", "SLURM_CLUSTERS", "SCANCEL_STATE", "SBATCH_WAIT", "SBATCH_ARRAY_INX"):
        monkeypatch.setenv(name, "elsewhere")
    monkeypatch.setenv("SBATCH_RESERVATION", "r")
    assert words(plan) == [("queued", "queued")] * 2
    assert said_of(plan, again=True) == []
    assert len(fake.jobs) == 5
    assert os.environ["SQUEUE_PARTITION"] == "elsewhere"
    assert cancel(plan, lambda text: None) == 5


@pytest.mark.parametrize(
    "remarks", ["Welcome to X. 3 GPU-hours are left.", "sbatch: warning: can't set memory\n2026", "CLUSTER: x"]
)
def test_remarks_before_the_job_id(plan: Plan, fake: FakeSlurm, remarks: str) -> None:
    fake.misbehave("sbatch", remarks=remarks)
    assert said_of(plan)[0] == "7b.mono.seed-0: train is job 100"


def test_a_job_of_which_sbatch_said_nothing_is_found(plan: Plan, fake: FakeSlurm) -> None:
    """A plugin swallowed the id: the job exists."""
    program = fake.bin / "sbatch"
    whole = program.read_text()
    program.write_text(whole.replace('print(number + ";cluster")', "pass"))
    with pytest.raises(SlurmError, match=r"printed '' where a job id was expected\. .* the next `submit` finds it"):
        said_of(plan)
    assert len(fake.jobs) == 1
    program.write_text(whole)
    assert said_of(plan)[0] == "7b.mono.seed-0: found train job 100 (pending), which no submission had noted"
    assert fake.names() == ALL


def test_a_controller_that_is_silent(plan: Plan, fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> None:
    """sbatch makes the job and never ends; it is found again."""
    run = subprocess.run

    def hangs(command: list[str], **how: Any) -> Any:
        done = run(command, **how)
        if command[0] == "sbatch":
            raise subprocess.TimeoutExpired(command, how["timeout"])
        return done

    with monkeypatch.context() as patched:
        patched.setattr("subprocess.run", hangs)
        with pytest.raises(SlurmError, match="sbatch: no answer in 120 s"):
            said_of(plan)
    assert fake.names() == ALL[:1]
    said_of(plan)
    assert fake.names() == ALL


def test_another_users_submission_isnt_repeated(plan: Plan, fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> None:
    """squeue shows a user's own jobs alone, so that user's jobs seem to be gone."""
    said_of(plan)
    for name in ALL:
        fake.set(name, "GONE")
    mine = os.getuid()
    monkeypatch.setattr("os.getuid", lambda: mine + 1)
    with pytest.raises(RunError, match=rf"user {mine} submitted it, .*delete .*jobs\.jsonl"):
        said_of(plan, again=True)
    for run in plan.runs:
        finish(run, {"mono_map": 0.5})
    said_of(plan, again=True)
    assert fake.names()[5:] == [ALL[1], ALL[3], ALL[4]], "what is trained may be scored by anybody"

"""What submitting a study starts, with which options and dependencies, and what is shown and started again later."""

import json
import os
from pathlib import Path

import pytest

from hybrid_scale.errors import RunError
from hybrid_scale.runs import RunDirectory, write_json
from hybrid_scale.study.evaluation import failures, output, settle
from hybrid_scale.study.grid import Plan, plan_study
from hybrid_scale.study.jobs.queue import cancel, known, look
from hybrid_scale.study.settings import Site
from tests.study.fabricate import finish, write_study
from tests.study.jobs.fakeslurm import ALL, ARMS, SITE, FakeSlurm, said_of, words


def test_what_is_submitted(plan: Plan, fake: FakeSlurm) -> None:
    said = said_of(plan)
    assert fake.names() == ALL
    assert said[0] == "7b.mono.seed-0: train is job 100"
    train, evaluate, *_, collect = fake.jobs.values()
    home = plan.runs[0].directory
    assert train["rest"] == ["slurm/train.sbatch", str(plan.directory / "configs" / "7b.mono.seed-0.yaml")]
    asked = {"--nodes=2", "--gpus-per-node=a100:8", "--cpus-per-task=64", "--time=1-00:00:00", "--partition=gpu", "--account=lab"}
    assert asked | {"--exclusive", "--dependency=singleton", f"--output={home / 'slurm-train-%j.log'}"} <= set(train["options"])
    assert train["env"]["HS_RUN_DIRECTORY"] == str(home)
    assert (train["env"]["HS_ENV_SETUP"], train["env"]["HS_LAUNCH_PREFIX"]) == (SITE.setup, SITE.container)
    assert train["env"]["SITE_PROXY"] == "p"
    assert "HS_PROCESSES_PER_NODE" not in train["env"]
    assert evaluate["rest"] == ["slurm/evaluate.sbatch", str(home), "data/nq"]
    asked = {"--nodes=1", "--time=20:00:00", "--dependency=afterok:100,singleton", "--kill-on-invalid-dep=yes"}
    assert asked <= set(evaluate["options"])
    assert collect["rest"] == ["slurm/collect.sbatch", plan.source]
    asked = {"--dependency=afterany:101:103:100:102,singleton", "--partition=cpu", "--time=00:30:00"}
    assert asked <= set(collect["options"])
    assert not any(option.startswith(("--gpus", "--constraint", "--exclusive")) for option in collect["options"])
    assert "--constraint=fast" in evaluate["options"]
    assert len({job["name"] for job in fake.jobs.values()}) == 5


def test_a_second_submission_starts_nothing(plan: Plan, fake: FakeSlurm) -> None:
    said_of(plan)
    fake.set(ALL[0], "RUNNING")
    assert said_of(plan) == []
    assert said_of(plan, again=True) == []
    assert len(fake.jobs) == 5


def test_a_site_without_gpus_by_gres_and_cpu_nodes(tmp_path: Path, fake: FakeSlurm) -> None:
    models = [{"name": "g", "set": {"model.base": "b"}, "resources": {"gpus_per_node": 4}}]
    models += [{"name": "c", "resources": {"gpus_per_node": 0, "processes_per_node": 3}}]
    made = plan_study(write_study(tmp_path, arms=ARMS[:1], seeds=[0], models=models))
    said_of(made, site=Site(ask_for_gpus="gres"))
    gpu, cpu, _ = fake.jobs.values()
    assert "--gres=gpu:4" in gpu["options"]
    assert not any(option.startswith(("--gres", "--gpus")) for option in cpu["options"])
    assert cpu["env"]["HS_PROCESSES_PER_NODE"] == "3"


def test_a_surrounding_job_isnt_inherited(plan: Plan, fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "5")
    monkeypatch.setenv("SLURM_CONF", "/x")
    said_of(plan)
    assert {key for job in fake.jobs.values() for key in job["env"] if key.startswith("SLURM_")} == {"SLURM_CONF"}


# What became of it


def test_a_failure_is_shown_and_started_again(plan: Plan, fake: FakeSlurm) -> None:
    said_of(plan)
    fake.set(ALL[0], "FAILED", "NonZeroExitCode")
    RunDirectory(plan.runs[0].directory).set_status("failed", reason="ModelError: no such folder")
    fake.set(ALL[1], "CANCELLED", "DependencyNeverSatisfied")
    fake.set(ALL[2], "RUNNING")
    RunDirectory(plan.runs[1].directory).set_status("running")
    shown = look(known(plan, must_answer=True))
    assert shown[0].train.detail == "ModelError: no such folder"
    assert words(plan) == [("failed", "blocked"), ("running", "queued")]
    assert said_of(plan) == [], "`submit` leaves it"
    said_of(plan, again=True)
    assert fake.names() == [*ALL, ALL[0], ALL[1], ALL[4]]
    assert fake.jobs["104"]["state"] == "CANCELLED", "the report waits for the new jobs too"
    assert "--dependency=afterok:105,singleton" in fake.jobs["106"]["options"]
    assert "--dependency=afterany:106:103:105:102,singleton" in fake.jobs["107"]["options"]
    assert words(plan) == [("queued", "queued"), ("running", "queued")]


def test_a_job_that_waits_for_ever_is_replaced(plan: Plan, fake: FakeSlurm) -> None:
    said_of(plan)
    finish(plan.runs[0], {"mono_map": 0.5})
    fake.set(ALL[0], "COMPLETED")
    fake.set(ALL[1], "PENDING", "DependencyNeverSatisfied")
    assert words(plan)[0] == ("done", "blocked")
    said_of(plan, again=True)
    assert fake.jobs["101"]["state"] == "CANCELLED"
    assert fake.names()[5:] == [ALL[1], ALL[4]]
    assert "--dependency=singleton" in fake.jobs["105"]["options"]


def test_a_changed_memory_setting_reaches_the_next_start(plan: Plan, fake: FakeSlurm) -> None:
    said_of(plan)
    fake.set(ALL[0], "OUT_OF_MEMORY")
    RunDirectory(plan.runs[0].directory).set_status("running")
    assert (
        look(known(plan, must_answer=True))[0].train.detail
        == "job 100 ended as OUT_OF_MEMORY while the run's status was 'running'"
    )
    smaller = plan_study(Path(plan.source), ["training.max_tokens_per_micro_batch=1024"])
    said_of(smaller, again=True)
    assert "max_tokens_per_micro_batch: 1024" in (plan.directory / "configs" / "7b.mono.seed-0.yaml").read_text()
    with pytest.raises(RunError, match=r"optimizer\.learning_rate: 0\.0001 -> 5e-05"):
        said_of(plan_study(Path(plan.source), ["optimizer.learning_rate=5e-5"]), again=True)


def test_what_is_done_is_only_scored(plan: Plan, fake: FakeSlurm) -> None:
    for run in plan.runs:
        finish(run, {"mono_map": 0.5})
    write_json(RunDirectory(plan.runs[1].directory).evaluation_file("nq"), {"task": "nq"})
    said_of(plan)
    assert fake.names() == [ALL[1], ALL[4]]
    assert words(plan) == [("done", "queued"), ("done", "done")]


def test_cancel_and_start_again(plan: Plan, fake: FakeSlurm) -> None:
    said_of(plan)
    fake.set(ALL[0], "COMPLETED")
    finish(plan.runs[0], {"mono_map": 0.5})
    said: list[str] = []
    assert cancel(plan, said.append) == 4
    assert said == ["cancelled 4 jobs: 104 101 103 102"]
    assert [job["state"] for job in fake.jobs.values()] == ["COMPLETED", *["CANCELLED"] * 4]
    assert words(plan) == [("done", "cancelled"), ("cancelled", "blocked")]
    assert cancel(plan, said.append) == 0
    assert said_of(plan) == []
    said_of(plan, again=True)
    assert fake.names()[5:] == [ALL[1], ALL[2], ALL[3], ALL[4]]


def test_a_job_that_is_gone_is_lost_unless_its_run_is_done(plan: Plan, fake: FakeSlurm) -> None:
    said_of(plan)
    for name in ALL:
        fake.set(name, "GONE")
    RunDirectory(plan.runs[0].directory).set_status("running")
    RunDirectory(plan.runs[1].directory).set_status("done")
    assert words(plan) == [("lost", "blocked"), ("done", "lost")]
    assert look(known(plan, must_answer=True))[0].train.detail == "job 100 is gone and left the status 'running'"


@pytest.mark.parametrize("clock", ["1999-01-01T00:00:00+00:00", "2099-01-01T00:00:00+00:00", "soon"])
@pytest.mark.parametrize(
    ("state", "word"), [("RUNNING", "running"), ("GONE", "lost"), ("TIMEOUT", "failed"), ("NEW_STATE", "running")]
)
def test_no_clock_is_believed(plan: Plan, fake: FakeSlurm, clock: str, state: str, word: str) -> None:
    said_of(plan)
    fake.set(ALL[0], state)
    write_json(RunDirectory(plan.runs[0].directory).status_file, {"status": "running", "time": clock})
    os.utime(RunDirectory(plan.runs[0].directory).status_file, (1, 1))
    assert words(plan)[0][0] == word


# Evaluations


def test_an_evaluation_is_taken_in_only_whole(plan: Plan) -> None:
    run = RunDirectory(plan.runs[0].directory)
    assert not settle(run, "data/nq", 0, "LOG")
    assert failures(run) == {"nq": "no result was written; see LOG"}
    made = output(run, "data/nq")
    write_json(made, {"task": "nq", "metrics": {}})
    made.with_suffix(".parquet").write_bytes(b"rows")
    assert not settle(run, "data/nq", 2, "LOG")
    assert failures(run) == {"nq": "exit code 2; see LOG"}
    assert not run.evaluation_file("nq").exists()
    assert settle(run, "data/nq", 0, "LOG")
    assert failures(run) == {}
    assert json.loads(run.evaluation_file("nq").read_text()) == {"step": None, "task": "nq", "metrics": {}}
    assert run.evaluation_file("nq").with_suffix(".parquet").read_bytes() == b"rows"
    assert not settle(run, "data/nq", 0, "LOG"), "taken in once"
    write_json(output(run, "data/miracl"), {"task": "nq"})
    with pytest.raises(RunError, match="not an evaluation of this set"):
        settle(run, "data/miracl", 0, "LOG")

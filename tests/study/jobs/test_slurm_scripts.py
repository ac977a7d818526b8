"""The job scripts themselves, with stand-ins for srun and scontrol that note how they are called."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_floors import ROOT

SCRIPTS = sorted((ROOT / "slurm").glob("*.sbatch"))
PROGRAM = """#!/bin/sh
echo "$(basename "$0") $*" | tr '\\n' ' ' >>"$CALLS"; echo >>"$CALLS"
case "$(basename "$0") $*" in
    "scontrol show hostnames "*) echo node1 ;;
    "scontrol "*"show node "*) echo "NodeName=node1 NodeAddr=127.0.0.1" ;;
    "scontrol "*"show job "*) echo "JobId=7 JobState=RUNNING" ;;
    "scontrol requeue "*) echo "Requested operation is presently disabled" >&2; exit 1 ;;
    srun*" $FAILS "*) exit 5 ;;
    srun*train.py*) printf '%s\\n' "$LEAVES" >"$HS_RUN_DIRECTORY/status.json"; exit 1 ;;
esac
"""


class Job:
    """A script started as slurmd would, from the checkout."""

    def __init__(self, folder: Path):
        self.folder, self.run = folder, folder / "run"
        self.run.mkdir()
        for name in ("srun", "scontrol"):
            (folder / name).write_text(PROGRAM)
            (folder / name).chmod(0o755)

    def start(self, script: str, *arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
        slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node1", "SLURM_JOB_NUM_NODES": "2", "SLURM_SUBMIT_DIR": str(ROOT)}
        ours = {"HS_RUN_DIRECTORY": str(self.run), "CALLS": str(self.folder / "calls"), "FAILS": "nothing", "LEAVES": "{}"}
        path = os.pathsep.join([str(self.folder), str(Path(sys.executable).parent), os.environ["PATH"]])
        command = ["bash", f"slurm/{script}.sbatch", *arguments]
        env = {**slurm, **ours, "PATH": path, **environment}
        return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600, check=False)

    @property
    def sruns(self) -> list[str]:
        calls = (self.folder / "calls").read_text().splitlines() if (self.folder / "calls").exists() else []
        return [line.strip() for line in calls if line.startswith("srun")]


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_slurm_reads_every_directive(script: Path) -> None:
    """sbatch silently ignores directives below the first command, and a carriage return becomes part of a value."""
    lines = script.read_bytes().decode().split("\n")
    first = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    directives = [number for number, line in enumerate(lines) if line.startswith("#SBATCH")]
    assert len(directives) >= 4
    assert max(directives) < first
    assert not any("\r" in line for line in lines)
    assert "#SBATCH --open-mode=append" in lines, "a requeued job keeps its log"
    assert not any("SLURM_NODEID" in line for line in lines if not line.lstrip().startswith(("#", "--num_machines")))


def test_a_container_and_srun_arguments_reach_the_step(job: Job) -> None:
    environment = {"HS_LAUNCH_PREFIX": "apptainer exec image.sif", "HS_SRUN_ARGS": "--container-image=x --mpi=none"}
    job.start("train", "RUN.yaml", "a.b=c d", HS_PROCESSES_PER_NODE="3", **environment)
    (train,) = job.sruns
    assert "--kill-on-bad-exit=1" in train
    assert "--container-image=x --mpi=none bash -c" in train
    assert "exec ${HS_LAUNCH_PREFIX:-} accelerate launch" in train
    assert train.endswith("step RUN.yaml a.b=c d")
    (job.run / "status.json").write_text(json.dumps({"status": "done"}))
    job.start("evaluate", str(job.run), "data/nq", HS_PROCESSES_PER_NODE="2", **environment)
    assert "--container-image=x --mpi=none apptainer exec image.sif accelerate launch --multi_gpu" in job.sruns[1]
    assert "apptainer exec image.sif python launch/study.py settle" in job.sruns[2]
    job.start("collect", "STUDY.yaml", "k=v", **environment)
    assert job.sruns[3].endswith(
        "--container-image=x --mpi=none apptainer exec image.sif python launch/study.py report STUDY.yaml k=v"
    )


@pytest.mark.parametrize(
    ("script", "arguments"), [("train", ["RUN.yaml"]), ("evaluate", ["RUN", "data/nq"]), ("collect", ["STUDY"])]
)
def test_the_setup_of_a_site_may_read_what_isnt_set_and_must_not_fail(job: Job, script: str, arguments: list[str]) -> None:
    """As conda's and Lmod's shell functions do. A module that isn't there ends the job before it trains with the wrong one."""
    (job.run / "status.json").write_text(json.dumps({"status": "done"}))
    arguments = [str(job.run) if word == "RUN" else word for word in arguments]
    modules = 'module() { [ "$2" = cuda ] && export LOADED="$2$NEVER_SET"; }; '
    job.start(
        script, *arguments, HS_PROCESSES_PER_NODE="1", HS_ENV_SETUP=modules + "module load cuda", CALLS=str(job.folder / "calls")
    )
    assert len(job.sruns) >= 1
    before = len(job.sruns)
    done = job.start(script, *arguments, HS_PROCESSES_PER_NODE="1", HS_ENV_SETUP=modules + "module load none; true")
    assert (done.returncode, len(job.sruns)) == (1, before)


def test_a_stopped_run_that_cant_be_requeued_isnt_a_success(job: Job) -> None:
    """What depends on the job must not begin."""
    done = job.start("train", "RUN.yaml", HS_PROCESSES_PER_NODE="1", LEAVES=json.dumps({"status": "preempted"}))
    assert done.returncode == 3
    assert "isn't requeued; submit again to go on: sbatch slurm/train.sbatch RUN.yaml" in done.stdout


def test_evaluation_of_a_run_that_isnt_done_is_refused(job: Job) -> None:
    (job.run / "status.json").write_text(json.dumps({"status": "preempted"}))
    done = job.start("evaluate", str(job.run), "data/nq", HS_PROCESSES_PER_NODE="1")
    assert done.returncode == 2
    assert 'its status is: {"status": "preempted"}' in done.stderr
    assert job.sruns == []


def test_every_set_is_scored_though_one_fails(job: Job) -> None:
    (job.run / "status.json").write_text(json.dumps({"status": "done"}))
    done = job.start("evaluate", str(job.run), "data/nq", "data/miracl", HS_PROCESSES_PER_NODE="1", FAILS="data/nq --run")
    first, noted, second, last = job.sruns
    assert f"python launch/evaluate.py data/nq --run {job.run} --out {job.run}/evaluating/nq.json" in first
    assert noted.endswith(f"settle {job.run} data/nq 5")
    assert last.endswith(f"settle {job.run} data/miracl 0")
    assert "accelerate" not in first + second, "its --multi_gpu refuses one process"
    assert done.returncode == 0, "settle says what counts; here it is a stand-in"
    assert job.start("evaluate", str(job.run), "data/nq", HS_PROCESSES_PER_NODE="1", FAILS="settle").returncode == 1


def test_gpus_of_a_node_come_from_slurm(job: Job) -> None:
    (job.run / "status.json").write_text(json.dumps({"status": "done"}))
    job.start("evaluate", str(job.run), "data/nq", SLURM_GPUS_ON_NODE="8")
    assert "--num_processes 8" in job.sruns[0]
    none = job.start("evaluate", str(job.run), "data/nq")
    assert none.returncode != 0
    assert "no GPUs allocated: set HS_PROCESSES_PER_NODE or ask for GPUs" in none.stderr


@pytest.mark.parametrize("script", ["train", "evaluate", "collect"])
def test_usage(job: Job, script: str) -> None:
    done = job.start(script)
    assert done.returncode != 0
    assert f"usage: sbatch slurm/{script}.sbatch" in done.stderr

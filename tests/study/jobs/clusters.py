"""A two-node Slurm cluster for a test, or this machine alone where its daemons can't start; both run a study the same way."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.notes import NOTES
from tests.ranks import free_port

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = ROOT / "tests" / "cluster.sh"
OUTER = ("SLURM_", "SBATCH_", "HS_")
DEFAULTS = {"SQUEUE_PARTITION": "urgent", "SBATCH_ARRAY_INX": "1-2", "SBATCH_WAIT": "1", "SCANCEL_STATE": "SUSPENDED"}


def environment() -> dict[str, str]:
    """This process's, without a surrounding job; programs of this interpreter's environment come first."""
    kept = {key: value for key, value in os.environ.items() if key == "HS_CLUSTER" or not key.startswith(OUTER)}
    path = os.pathsep.join([str(Path(sys.executable).parent), kept.get("PATH", ""), "/usr/sbin", "/sbin"])
    quiet = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return {**kept, **quiet, "PATH": path, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"}


def wait(what: str, happened: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, f"{what}: not after {seconds:.0f} s"
        time.sleep(0.1)


def call(command: list[str], env: dict[str, str], seconds: float = 600) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=seconds, check=False)


class Here:
    """Runs a study on this machine, by `launch/study.py run` in the background."""

    name = "local"

    def __init__(self, env: dict[str, str], reason: str = ""):
        self.env = env
        self.reason = reason
        """Why it isn't a cluster; "" for one."""
        self.process: subprocess.Popen[bytes] | None = None

    def door(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        return call([sys.executable, "launch/study.py", *arguments], self.env)

    def start(self, study: Path) -> str:
        command = [sys.executable, "launch/study.py", "run", str(study)]
        with open(study.with_suffix(".log"), "ab") as log:
            self.process = subprocess.Popen(command, cwd=ROOT, env=self.env, stdout=log, stderr=subprocess.STDOUT)
        return ""

    again = start

    def preempt(self, study: Path) -> None:
        assert self.process
        self.process.terminate()
        self.process.wait(600)
        self.start(study)

    def finish(self, seconds: float) -> None:
        assert self.process
        self.process.wait(seconds)

    def train(self, config: Path, seconds: float) -> None:
        launcher = ["-m", "accelerate.commands.launch", "--use_deepspeed", "--deepspeed_multinode_launcher", "standard"]
        plain = ["--num_machines", "1", "--num_processes", "2", "--mixed_precision", "no", "--dynamo_backend", "no"]
        port = ["--main_process_port", str(free_port())]
        done = call([sys.executable, *launcher, *plain, *port, "launch/train.py", str(config)], self.env, seconds)
        assert done.returncode == 0, done.stderr


class Cluster(Here):
    """Runs a study as Slurm jobs of two nodes."""

    name = "slurm"

    def door(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        """Under a user's own filters and defaults, which must neither hide the study's jobs nor change them."""
        return call([sys.executable, "launch/study.py", *arguments], {**self.env, **DEFAULTS})

    def start(self, study: Path) -> str:
        return self._said("submit", str(study))

    def again(self, study: Path) -> str:  # type: ignore[override]
        return self._said("resubmit", str(study), "--failed")

    def _said(self, *arguments: str) -> str:
        done = self.door(*arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def preempt(self, study: Path) -> None:
        """A job of the partition `urgent` takes both nodes for a moment."""
        self.batch(
            "--partition=urgent", "--nodes=2", "--ntasks-per-node=1", "--exclusive", f"--output={study}.urgent", "--wrap=sleep 1"
        )

    def batch(self, *arguments: str) -> str:
        done = call(["sbatch", "--parsable", *arguments], self.env)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def finish(self, seconds: float) -> None:
        def empty() -> bool:  # an answer, and nothing in it: a controller on a busy machine may give none
            said = call(["squeue", "--noheader"], self.env)
            return said.returncode == 0 and said.stdout == ""

        wait("the end of all jobs", empty, seconds)

    def train(self, config: Path, seconds: float) -> None:
        """The job script by hand, as its head describes it; doesn't wait."""
        env = {**self.env, "HS_PROCESSES_PER_NODE": "1"}
        options = ["--nodes=2", "--cpus-per-task=1", "--mem=3G", "--time=60", f"--output={config}.log"]
        done = call(["sbatch", *options, "slurm/train.sbatch", str(config)], env)
        assert done.returncode == 0, done.stderr


@contextmanager
def cluster(env: dict[str, str]) -> Iterator[Here]:
    """A cluster; `Here` and a loud note where it can't be had."""
    folder = Path(tempfile.mkdtemp(prefix="hs-cluster-"))  # not pytest's: munge wants a way to its socket that all may go
    reason = _up(folder, env)
    if reason:
        shutil.rmtree(folder, ignore_errors=True)
        NOTES.append(
            f"NO SLURM CLUSTER: the study of tests/study/jobs/test_cluster.py ran with `run` on this machine instead. {reason}"
        )
        yield Here(env, reason)
        return
    try:
        yield Cluster({**env, "SLURM_CONF": str(folder / "slurm.conf")})
    finally:
        call([str(SCRIPT), "down", str(folder)], env)
        shutil.rmtree(folder, ignore_errors=True)


def _up(folder: Path, env: dict[str, str]) -> str:
    """Why there is no cluster; "" where there is one."""
    for arguments in (["install"], ["up", str(folder)]):
        try:
            done = call([str(SCRIPT), *arguments], env, 300)
        except subprocess.TimeoutExpired:
            return f"tests/cluster.sh {arguments[0]}: not done in 300 s"
        if done.returncode:
            return done.stderr.strip()[-800:]
    NOTES.append(f"Slurm cluster of two nodes ({done.stdout.strip()}): the study of tests/study/jobs/test_cluster.py ran on it.")
    return ""

"""sbatch, squeue and scancel that keep their jobs in a file, for tests of what submits; and how a test makes them misbehave."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from hybrid_scale.study.grid import Plan
from hybrid_scale.study.jobs.queue import known, look, submit
from hybrid_scale.study.settings import JobOptions, Site
from tests.test_floors import ROOT

PROGRAM = """#!{python} -SE
import json, os, signal, sys, time
home = "{home}"
def load(): return json.load(open(home + "/jobs.json"))
def save(jobs):
    json.dump(jobs, open(home + "/jobs.json.new", "w")); os.replace(home + "/jobs.json.new", home + "/jobs.json")
name, given, jobs = os.path.basename(sys.argv[0]), sys.argv[1:], load()
mischief = json.load(open(home + "/mischief.json"))
how = mischief.get(name, {{"from": 1000}})
how = how if how["from"] <= len(jobs) else {{}}
if how.get("kill") == "before":
    os.kill(os.getppid(), signal.SIGKILL)
    for _ in range(60000):
        if not os.path.exists(home + "/released"): time.sleep(.01)
if "says" in how: sys.stderr.write(how["says"] + "\\n"); sys.exit(1)
if "prints" in how: print(how["prints"]); sys.exit(0)
if "remarks" in how: print(how["remarks"])
if name == "squeue" and any(key.startswith("SQUEUE_") for key in os.environ): sys.exit(0)  # as with a filter that nothing passes
if name == "sbatch":
    options = [word for word in given if word.startswith("--")]
    values = dict(word[2:].partition("=")[::2] for word in options)
    number = str(100 + len(jobs))
    keep = {{key: value for key, value in os.environ.items() if key.startswith(("HS_", "SLURM_", "SITE_"))}}
    rest = [word for word in given if not word.startswith("--")]
    jobs[number] = dict(name=values["job-name"], state="PENDING", reason="Priority", options=options, rest=rest, env=keep)
    save(jobs)
    if how.get("kill") == "after": os.kill(os.getppid(), signal.SIGKILL)
    print(number + ";cluster")
elif name == "squeue":
    for number, job in jobs.items():
        if job["state"] != "GONE": print("|".join([number, job["state"], job["name"], job["reason"]]))
else:
    for number in given:
        if jobs[number]["state"] in ("PENDING", "RUNNING"): jobs[number]["state"] = "CANCELLED"
        else: print("scancel: error: Kill job error on job id", number + ": Job already completed", file=sys.stderr)
    save(jobs)
"""


class FakeSlurm:
    """Programs in `bin`, to be put on PATH; jobs by id."""

    def __init__(self, home: Path):
        self.home, self.bin = home, home / "bin"
        self.bin.mkdir(parents=True)
        (home / "jobs.json").write_text("{}")
        self.behave()
        for name in ("sbatch", "squeue", "scancel"):
            (self.bin / name).write_text(PROGRAM.format(python=sys.executable, home=home))
            (self.bin / name).chmod(0o755)

    def misbehave(self, program: str, after: int = 0, **how: str) -> None:
        """`says`: end with 1 and this on stderr; `prints`: this and nothing else; `remarks`: this before its work; `kill`:
        SIGKILL to the caller, `before` (until `release`) or `after` the job exists. Once `after` jobs exist."""
        (self.home / "mischief.json").write_text(json.dumps({program: {"from": after, **how}}))

    def release(self) -> None:
        (self.home / "released").touch()

    def behave(self) -> None:
        (self.home / "mischief.json").write_text("{}")

    @property
    def jobs(self) -> dict[str, dict[str, Any]]:
        return dict(json.loads((self.home / "jobs.json").read_text()))

    def names(self) -> list[str]:
        """RUN.KIND of each job, as submitted."""
        return [job["name"].partition("@")[0] for job in self.jobs.values()]

    def set(self, name: str, state: str, reason: str = "None") -> str:
        """Set the latest job called RUN.KIND to a state; its id."""
        jobs = self.jobs
        number = [key for key, job in jobs.items() if job["name"].startswith(f"{name}@")][-1]
        jobs[number].update(state=state, reason=reason)
        (self.home / "jobs.json").write_text(json.dumps(jobs))
        return number


# A small study over it

ARMS = [{"name": arm, "set": {"sampler.arm": arm}} for arm in ("mono", "cross")]
MODELS = [{"name": "7b", "resources": {"nodes": 2, "gpus_per_node": 8, "cpus_per_node": 64, "time": "1-00:00:00"}}]
ALL = ["7b.mono.seed-0.train", "7b.mono.seed-0.evaluate", "7b.cross.seed-0.train", "7b.cross.seed-0.evaluate", "study.collect"]
"""Jobs of the whole study, as submitted."""

SITE = Site(
    partition="gpu",
    account="lab",
    time="20:00:00",
    setup="source venv/bin/activate",
    container="apptainer exec --nv image.sif",
    environment={"SITE_PROXY": "p"},
    sbatch=("--exclusive",),
    gpu_type="a100",
    constraint="fast",
    collect=JobOptions(partition="cpu", time="00:30:00", constraint=None, sbatch=()),
)


def said_of(plan: Plan, again: bool = False, site: Site = SITE) -> list[str]:
    lines: list[str] = []
    submit(plan, site, again, lines.append)
    return lines


def words(plan: Plan) -> list[tuple[str, str | None]]:
    return [(view.train.word, view.evaluate and view.evaluate.word) for view in look(known(plan, must_answer=False))]


def door(*arguments: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "launch/study.py", *arguments]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

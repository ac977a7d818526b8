"""When slurm/train.sbatch requeues its job: the script itself, with stand-ins for `srun` and `scontrol` on its PATH."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SRUN = """#!/bin/sh
echo "$*" >>"$STATUS_FILE.steps"
[ -z "$ENDS_AS" ] || printf '%s\\n' "$ENDS_AS" >"$STATUS_FILE"
exit "$SRUN_CODE"
"""
SCONTROL = """#!/bin/sh
case "$*" in
    "show hostnames "*) echo node1 ;;
    *"show node "*) echo "NodeName=node1 NodeAddr=127.0.0.1" ;;
    *"show job "*)
        echo . >>"$STATUS_FILE.asked"
        [ "$(wc -l <"$STATUS_FILE.asked")" -gt "${SILENT:-0}" ] || exit 1 # Unable to contact slurm controller
        echo "JobId=7 JobState=$JOB_STATE" ;;
    "requeue "*) echo "requeued $2" ;;
esac
"""
PREEMPTED = {"status": "preempted", "step": 6, "reason": "SIGTERM"}
SILENT = {"status": "failed", "reason": "RankLost: rank 3 (host n2) has not been heard of for 60 s, last step 9"}
OWN_ERROR = {"status": "failed", "reason": "RankLost: rank 3 (host n2) failed: ValueError: no"}
FAILED = {"status": "failed", "reason": "ConfigError: no such key"}


@pytest.mark.parametrize(
    ("before", "ends_as", "environment", "code", "said"),
    [
        (None, PREEMPTED, {}, 0, "requeued 7"),
        (None, PREEMPTED, {"SLURM_RESTART_COUNT": "19"}, 0, "requeued 7"),
        (None, PREEMPTED, {"SLURM_RESTART_COUNT": "20"}, 3, "stopped with a checkpoint after 20 restarts"),
        (None, PREEMPTED, {"JOB_STATE": "CANCELLED"}, 3, "stopped with a checkpoint and isn't requeued"),
        (None, PREEMPTED, {"SILENT": "2"}, 0, "requeued 7"),
        (None, PREEMPTED, {"SILENT": "9"}, 3, "stopped with a checkpoint and isn't requeued"),
        (None, PREEMPTED, {"SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "2"}, 0, "requeued 5_2"),
        (None, SILENT, {}, 0, "requeued 7"),
        (None, SILENT, {"SLURM_RESTART_COUNT": "4"}, 0, "requeued 7"),
        (None, SILENT, {"SLURM_RESTART_COUNT": "5"}, 4, "lost a rank after 5 restarts"),
        (None, SILENT, {"SLURM_RESTART_COUNT": "5", "HS_MAX_RESTARTS_LOST": "6"}, 0, "requeued 7"),
        (None, OWN_ERROR, {}, 1, ""),
        (None, FAILED, {}, 1, ""),
        (None, {"status": "done"}, {"SRUN_CODE": "0"}, 0, ""),
        (PREEMPTED, None, {}, 1, ""),
        (SILENT, None, {}, 1, ""),
        (SILENT, FAILED, {}, 1, ""),
        (None, None, {}, 1, ""),
    ],
)
def test_what_is_requeued(tmp_path, before, ends_as, environment, code, said):
    """`before`: status.json at the start; `ends_as`: what the trainer leaves there, None where it never began."""
    done, _ = run_script(tmp_path, before, ends_as, environment)
    assert done.returncode == code, done.stderr
    assert said in done.stdout
    assert any(line.startswith("requeued") for line in done.stdout.splitlines()) == said.startswith("requeued")


@pytest.mark.parametrize(
    ("environment", "code", "doors"),
    [
        ({"SRUN_CODE": "0"}, 0, ["train"]),
        ({"SRUN_CODE": "0", "HS_SELFTEST": "1"}, 0, ["selftest", "train"]),
        ({"SRUN_CODE": "1", "HS_SELFTEST": "1"}, 2, ["selftest"]),
    ],
)
def test_the_self_test_comes_first(tmp_path, environment, code, doors):
    """A cluster that fails it starts no training."""
    done, steps = run_script(tmp_path, None, {"status": "done"}, environment)
    assert done.returncode == code, done.stderr
    assert re.findall(r"launch/(\w+)\.py", steps) == doors
    assert ('"$@" step launch/configs/xquad_tiny.yaml run.directory=' in steps) == ("train" in doors)


def run_script(
    folder: Path, before: object, ends_as: object, environment: dict[str, str]
) -> tuple[subprocess.CompletedProcess[str], str]:
    """The script's end, and what it asked of srun."""
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("sleep", "#!/bin/sh\n")):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    run = folder / "run"
    run.mkdir()
    status = run / "status.json"
    if before:
        status.write_text(json.dumps(before) + "\n")
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node1", "SLURM_JOB_NUM_NODES": "1", "SLURM_SUBMIT_DIR": str(ROOT)}
    ours = {"HS_PROCESSES_PER_NODE": "1", "JOB_STATE": "RUNNING", "SRUN_CODE": "1", "STATUS_FILE": str(status)}
    path = os.pathsep.join([str(folder), str(Path(sys.executable).parent), os.environ["PATH"]])
    left = {"ENDS_AS": json.dumps(ends_as) if ends_as else "", "PATH": path}
    command = ["bash", "slurm/train.sbatch", "launch/configs/xquad_tiny.yaml", f"run.directory={run}"]
    done = subprocess.run(
        command, cwd=ROOT, env={**slurm, **ours, **left, **environment}, capture_output=True, text=True, timeout=600, check=False
    )
    return done, Path(f"{status}.steps").read_text()

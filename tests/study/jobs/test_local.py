import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hybrid_scale.errors import RunError
from hybrid_scale.runs import RunDirectory
from hybrid_scale.study.clock import clock
from hybrid_scale.study.grid import Plan, PlannedRun, plan_study
from hybrid_scale.study.jobs.local import Command, Progress, accelerate_command, environment, run_study
from hybrid_scale.study.settings import LaunchSettings
from tests.study.fabricate import finish, lines, start, study_tree, write_study
from tests.study.jobs.clusters import wait

ROOT = Path(__file__).parents[3]

TRAINER = """
import json, os, signal, sys, pathlib, time
directory = pathlib.Path(sys.argv[1]); how = sys.argv[2]
def status(word, **facts):  # whole or not at all, as the trainer's
    (directory / "status.part").write_text(json.dumps({"status": word, **facts}))
    os.replace(directory / "status.part", directory / "status.json")
print("hello from", directory.name, "world", os.environ["HS_EXPECT_WORLD"], flush=True)
if how == "silent": sys.exit(7)
status("running")
metrics = directory / "metrics.jsonl"
done = len(metrics.read_text().splitlines()) if metrics.exists() else 0
with open(metrics, "a") as file:
    for step in range(done + 1, 4):
        file.write(json.dumps({"step": step, "loss": 1 / step}) + "\\n"); file.flush(); time.sleep(.02)
if how == "killed": os.kill(os.getpid(), 9)
if how == "raises": status("failed", reason="data ran out"); sys.exit(1)
if how == "preempted": status("preempted"); sys.exit(0)
if how == "forgets": sys.exit(0)
if how == "waits": time.sleep(900)
if how == "saves":  # for a second after Ctrl-C, whatever comes meanwhile
    asked = []
    signal.signal(signal.SIGINT, lambda *_: asked.append(1))
    print("ready", flush=True)
    while not asked: time.sleep(.02)
    end = time.monotonic() + 1.0
    while time.monotonic() < end: time.sleep(.02)
    status("preempted", step=3, reason=f"{len(asked)} times"); sys.exit(3)
status("done")
"""


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    return plan_study(write_study(tmp_path, seeds=[0], base={**study_tree(tmp_path)["base"], "training": {"max_steps": 3}}))


def fake(tmp_path: Path, **how: str) -> Command:
    script = tmp_path / "trainer.py"
    script.write_text(TRAINER, encoding="utf-8")
    return lambda run: [sys.executable, str(script), str(run.directory), how.get(run.arm, "well")]


def run(plan: Plan, command: Command) -> tuple[list[str], str]:
    output = io.StringIO()
    unfinished = run_study(plan, command, output, poll_seconds=0.01)
    return [left.id for left in unfinished], output.getvalue()


def status(run: PlannedRun) -> dict[str, object]:
    return RunDirectory(run.directory).status()


def test_runs_all_and_keeps_their_output(plan: Plan, tmp_path: Path) -> None:
    unfinished, said = run(plan, fake(tmp_path))
    assert unfinished == []
    assert re.search(r"\[1/4\] mono\.seed-0: done \(\d+:\d\d\)", said)
    log = (plan.runs[0].directory / "train.log").read_text(encoding="utf-8")
    assert log.startswith("$ ")
    assert "hello from mono.seed-0 world 1" in log


def test_skips_what_is_done_and_resumes_the_rest(plan: Plan, tmp_path: Path) -> None:
    finish(plan.runs[0], {"mono_map": 0.5})
    start(plan.runs[1], 2)
    unfinished, said = run(plan, fake(tmp_path))
    assert unfinished == []
    assert "mono.seed-0: done already" in said
    assert not (plan.runs[0].directory / "train.log").exists()
    assert [record["step"] for record in lines(plan.runs[1].directory / "metrics.jsonl")] == [1, 2, 3]


def test_a_failure_is_recorded_and_the_others_run(plan: Plan, tmp_path: Path) -> None:
    unfinished, said = run(plan, fake(tmp_path, mono="killed", cross="raises", hybrid="silent"))
    assert unfinished == ["mono.seed-0", "cross.seed-0", "hybrid.seed-0"]
    mono, cross, hybrid, mixed = map(status, plan.runs)
    assert mono["reason"] == "ended with signal 9 while its status was 'running'; see train.log"
    assert cross["reason"] == "data ran out"
    assert hybrid["reason"] == "ended with exit code 7 while its status was 'queued'; see train.log"
    assert mixed["status"] == "done"
    assert "cross.seed-0: failed: data ran out" in said


def test_an_old_failure_is_tried_again(plan: Plan, tmp_path: Path) -> None:
    run(plan, fake(tmp_path, mono="raises"))
    assert run(plan, fake(tmp_path, mono="silent"))[0] == ["mono.seed-0"]
    assert "exit code 7" in str(status(plan.runs[0])["reason"])
    assert run(plan, fake(tmp_path))[0] == []


def test_preempted_isnt_done_and_silence_is_a_failure(plan: Plan, tmp_path: Path) -> None:
    assert run(plan, fake(tmp_path, mono="preempted", cross="forgets"))[0] == ["mono.seed-0", "cross.seed-0"]
    assert status(plan.runs[0])["status"] == "preempted"
    assert status(plan.runs[1])["reason"] == "ended with exit code 0 while its status was 'running'; see train.log"


def test_a_command_that_cant_start_is_a_failure(plan: Plan, tmp_path: Path) -> None:
    assert len(run(plan, lambda run: [str(tmp_path / "absent")])[0]) == 4
    assert "couldn't be started" in str(status(plan.runs[0])["reason"])


def test_another_config_is_refused_before_anything_starts(plan: Plan, tmp_path: Path) -> None:
    changed = plan_study(Path(plan.source), ["optimizer.learning_rate=5e-5"])
    RunDirectory(plan.runs[3].directory).create(plan.runs[3].config)
    with pytest.raises(RunError, match=r"optimizer\.learning_rate: 0\.0001 -> 5e-05"):
        run(changed, fake(tmp_path))
    assert not (plan.runs[0].directory / "train.log").exists()


def test_a_study_runs_once_at_a_time_and_stops_with_its_child(plan: Plan, tmp_path: Path) -> None:
    fake(tmp_path)
    code = (
        "import sys; from pathlib import Path; from hybrid_scale.study.grid import plan_study; "
        "from hybrid_scale.study.jobs.local import run_study; "
        f"run_study(plan_study(Path({plan.source!r})), "
        f"lambda run: [sys.executable, {str(tmp_path / 'trainer.py')!r}, str(run.directory), 'waits'], poll_seconds=.05)"
    )
    other = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.DEVNULL)
    try:
        wait("the first run", lambda: status(plan.runs[0])["status"] == "running", 600)
        with pytest.raises(RunError, match="this study is being run or submitted right now"):
            run(plan, fake(tmp_path))
        other.send_signal(signal.SIGTERM)
        assert other.wait(600) == 128 + signal.SIGTERM
        assert status(plan.runs[0])["reason"] == "ended with signal 15 while its status was 'running'; see train.log"
        assert not (plan.runs[1].directory / "train.log").exists()
    finally:
        other.kill()
        other.wait()
    assert run(plan, fake(tmp_path))[0] == []


def test_a_study_waits_for_the_save_however_often_ctrl_c_comes(plan: Plan, tmp_path: Path) -> None:
    fake(tmp_path)
    code = (
        "import signal, sys; from pathlib import Path; from hybrid_scale.study.grid import plan_study\n"
        "from hybrid_scale.study.jobs.local import run_study\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"command = lambda run: [sys.executable, {str(tmp_path / 'trainer.py')!r}, str(run.directory), 'saves']\n"
        f"try: run_study(plan_study(Path({plan.source!r})), command, poll_seconds=.05)\n"
        "except KeyboardInterrupt: sys.exit(130)"
    )
    other = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        log = plan.runs[0].directory / "train.log"
        wait("the run", lambda: log.exists() and "ready" in log.read_text(), 600)
        for _ in range(2):  # the terminal sends it to the child as well
            os.killpg(other.pid, signal.SIGINT)
            time.sleep(0.4)
        assert other.wait(600) == 130
        assert (status(plan.runs[0])["status"], status(plan.runs[0])["reason"]) == ("preempted", "2 times")
        assert not (plan.runs[1].directory / "train.log").exists()
    finally:
        other.kill()
        other.wait()


SCORER = """
import json, pathlib, sys
directory, data = map(pathlib.Path, sys.argv[1:3])
if sys.argv[3] == "fails": sys.exit(5)
made = directory / "evaluating"; made.mkdir(exist_ok=True)
(made / (data.name + ".json")).write_text(json.dumps({"task": data.name, "metrics": {"mono_map": .5}}))
"""


def test_each_trained_run_is_scored_on_the_studys_sets(tmp_path: Path) -> None:
    base = {**study_tree(tmp_path)["base"], "training": {"max_steps": 3}}
    plan = plan_study(write_study(tmp_path, seeds=[0], base=base, evaluate=["data/nq", "data/miracl"]))
    (tmp_path / "scorer.py").write_text(SCORER, encoding="utf-8")

    def scored(how: str, trainer: Command) -> tuple[list[str], str]:
        output, script = io.StringIO(), str(tmp_path / "scorer.py")

        def command(run: PlannedRun, data: str) -> list[str]:
            return [sys.executable, script, str(run.directory), data, how if data == "data/nq" and run.arm == "cross" else "well"]

        left = run_study(plan, trainer, output, 0.01, command)
        return [run.id for run in left], output.getvalue()

    left, said = scored("fails", fake(tmp_path, mono="raises"))
    assert left == ["mono.seed-0", "cross.seed-0"]
    assert "[2/4] cross.seed-0: nq not scored, see " in said
    assert "[2/4] cross.seed-0: miracl scored" in said
    assert not RunDirectory(plan.runs[0].directory).evaluations.exists(), "a failed run isn't scored"
    left, said = scored("well", fake(tmp_path))
    assert left == []
    assert said.count(" scored (") == 3, "what has a result isn't scored again"
    assert "[2/4] cross.seed-0: nq scored" in said


def test_progress_reads_the_run_directory(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    progress = Progress(plan.runs[0])
    assert progress.text() == "starting"
    directory = start(plan.runs[0], 1)
    assert progress.text().startswith("step 1/3, loss ")
    assert "left" not in progress.text()
    now[0] += 7
    directory.append_metrics({"step": 2, "loss": 0.25})
    assert progress.text() == "step 2/3, loss 0.2500, 0:07 left"
    assert (clock(59.6), clock(3723)) == ("1:00", "1:02:03")


def test_launch_command_is_understood_by_accelerate(plan: Plan) -> None:
    launch = pytest.importorskip("accelerate.commands.launch")
    command = accelerate_command(LaunchSettings(processes=2), Path("launch/train.py"))(plan.runs[0])
    assert command[1:3] == ["-m", "accelerate.commands.launch"]
    parsed = launch.launch_command_parser().parse_args(command[3:])
    assert (parsed.use_deepspeed, parsed.deepspeed_multinode_launcher, parsed.num_processes) == (True, "standard", 2)
    assert parsed.training_script_args == [str(plan.runs[0].directory / "config.yaml")]
    own = accelerate_command(LaunchSettings(command=("--config_file", "a.yaml")), Path("t.py"))(plan.runs[0])
    assert own[3:7] == ["--config_file", "a.yaml", "--num_processes", "1"]


def test_environment_keeps_a_given_thread_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert environment(2)["OMP_NUM_THREADS"] == "5"
    assert environment(2)["HS_EXPECT_WORLD"] == "2"


def door(*arguments: str) -> "subprocess.CompletedProcess[str]":
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "launch" / "study.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=env, check=False)


def test_door(plan: Plan, tmp_path: Path) -> None:
    expanded = door("expand", plan.source)
    assert expanded.returncode == 0
    assert "mono.seed-0  ->  " in expanded.stdout
    refused = door("expand", plan.source, "training.max_step=3")
    assert refused.returncode == 2
    assert "Did you mean 'max_steps'?" in refused.stderr
    assert "Traceback" not in refused.stderr
    start(plan.runs[0], 2)
    RunDirectory(plan.runs[0].directory).set_status("failed", reason="no space left")
    assert "mono.seed-0    failed     step 2/3, loss" in door("status", plan.source).stdout
    reported = door("report", plan.source)
    assert reported.stdout.splitlines()[-1] == str(tmp_path / "out" / "report.html"), reported.stderr
    assert json.loads((plan.runs[0].directory / "status.json").read_text())["reason"] == "no space left"

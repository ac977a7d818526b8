"""Run a study's runs one after another on this machine, and score each on the study's sets.

A run that is done is skipped, any other is started or resumed; a failure is recorded and the next run starts. All that is
known of a run comes from its directory: no output is parsed. Knows no torch and nothing of what training does.
"""

import os
import random
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import FrameType
from typing import IO, Any, TextIO

from hybrid_scale.errors import RunError, describe
from hybrid_scale.runs import RunDirectory
from hybrid_scale.study.clock import clock
from hybrid_scale.study.evaluation import missing, output, settle
from hybrid_scale.study.grid import Plan, PlannedRun
from hybrid_scale.study.jobs.journal import only_one
from hybrid_scale.study.jobs.queue import refuse_if_submitted
from hybrid_scale.study.settings import LaunchSettings

Command = Callable[[PlannedRun], list[str]]
EvaluateCommand = Callable[[PlannedRun, str], list[str]]
"""Of a run and the directory of a prepared retrieval set."""

BUILT = (
    *("--use_deepspeed", "--deepspeed_multinode_launcher", "standard", "--num_machines", "1"),
    *("--mixed_precision", "no", "--dynamo_backend", "no"),
)
PORTS = range(20_000, 32_000)
"""On which ranks of this machine meet, as in slurm/train.sbatch."""
LINE_EVERY_SECONDS = 10.0
"""Pause between two progress lines where the output isn't a terminal."""


def accelerate_command(launch: LaunchSettings, train_script: Path) -> Command:
    """How a run is started: `accelerate launch` with this study's settings.

    The DeepSpeed launcher serves both engines: it starts one process per rank on a machine with or without GPUs, whereas
    Accelerate's plain CPU launcher needs mpirun. `standard` keeps it from looking for hosts (SLURM.md).
    """
    return lambda run: [*_launcher(launch), str(train_script), str(run.directory / "config.yaml")]


def evaluate_command(launch: LaunchSettings, evaluate_script: Path) -> EvaluateCommand:
    """How a trained run is scored on a set, with as many processes."""

    def command(run: PlannedRun, data: str) -> list[str]:
        made = output(RunDirectory(run.directory), data)
        return [*_launcher(launch), str(evaluate_script), data, "--run", str(run.directory), "--out", str(made)]

    return command


def _launcher(launch: LaunchSettings) -> list[str]:
    arguments = BUILT if launch.command is None else launch.command
    start = [sys.executable, "-m", "accelerate.commands.launch", *arguments, "--num_processes", str(launch.processes)]
    return [*start, "--main_process_port", str(_free_port())]


def _free_port() -> int:
    """Free now, and outside the range from which the kernel gives ports to others in the seconds until rank 0 listens."""
    for port in random.SystemRandom().sample(PORTS, 1000):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("", port))
            return port
    raise RunError(describe("ports", f"{PORTS.start} to {PORTS.stop - 1}", "none of 1,000 tried is free for the ranks to meet"))


def environment(processes: int) -> dict[str, str]:
    """This process's environment with the expected world, and one thread per rank where there is no NVIDIA device."""
    env = {**os.environ, "HS_EXPECT_WORLD": str(processes)}
    if not any(Path("/dev").glob("nvidia[0-9]*")):
        env.setdefault("OMP_NUM_THREADS", "1")
    return env


def run_study(
    plan: Plan,
    command: Command,
    output: TextIO = sys.stdout,
    poll_seconds: float = 1.0,
    evaluate: EvaluateCommand | None = None,
) -> list[PlannedRun]:
    """Run what isn't done; returns the runs that aren't done afterwards, or that lack a result on a set of `evaluate`.

    Raises RunError before the first start: a directory holds another config, the study is running already, here or in Slurm.
    """
    with only_one(plan.directory), _Asked() as asked:
        refuse_if_submitted(plan)
        for run in plan.runs:
            RunDirectory(run.directory).create(run.config)
        env = environment(plan.config.launch.processes)
        for position, run in enumerate(plan.runs, start=1):
            asked.leave_if_asked()
            label = f"[{position}/{len(plan.runs)}] {run.id}"
            if RunDirectory(run.directory).status()["status"] == "done":
                print(f"{label}: done already", file=output, flush=True)
            else:
                _run_one(run, command(run), env, _Line(label, output), poll_seconds, asked)
            if evaluate and RunDirectory(run.directory).status()["status"] == "done":
                _evaluate_one(run, plan.config.evaluate, evaluate, env, _Line(label, output), poll_seconds, asked)
    return [run for run in plan.runs if not _complete(run, plan.config.evaluate if evaluate else ())]


def _complete(run: PlannedRun, sets: Sequence[str]) -> bool:
    directory = RunDirectory(run.directory)
    return directory.status()["status"] == "done" and not missing(directory, sets)


class _Asked:
    """SIGTERM, or SIGHUP of a closed terminal, within the block, looked for where a child is waited for: one just started must be
    told and waited for too. A SIGHUP that is ignored, as under nohup, stays so.
    """

    def __enter__(self) -> "_Asked":
        self.number: int | None = None
        wanted = [signal.SIGTERM, *([] if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else [signal.SIGHUP])]
        self.before = {number: signal.signal(number, self._note) for number in wanted}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.number = number

    def leave_if_asked(self) -> None:
        if self.number is not None:
            raise SystemExit(128 + self.number)


def _run_one(
    run: PlannedRun, command: list[str], env: Mapping[str, str], line: "_Line", poll_seconds: float, asked: _Asked
) -> None:
    directory = RunDirectory(run.directory)
    directory.set_status("queued")  # so that a failure before the trainer's first word isn't mistaken for an old one
    begun = time.monotonic()
    with _logged(run.directory / "train.log", command) as log:
        try:
            child = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=env)
        except OSError as error:
            directory.set_status("failed", reason=f"the command couldn't be started: {error}")
        else:
            progress = Progress(run)
            try:
                _follow(child, progress.text, line, poll_seconds, asked)
            except (KeyboardInterrupt, SystemExit):
                if directory.status()["status"] == "queued":  # its libraries were still being loaded
                    directory.set_status("preempted", reason="stopped before it began")
                raise
            finally:
                _record_end(directory, child.returncode)
    line.end(_outcome(directory, time.monotonic() - begun))


def _evaluate_one(
    run: PlannedRun,
    sets: Sequence[str],
    command: EvaluateCommand,
    env: Mapping[str, str],
    line: "_Line",
    poll_seconds: float,
    asked: _Asked,
) -> None:
    directory, log_file = RunDirectory(run.directory), run.directory / "evaluate.log"
    for data in missing(directory, sets):
        name, arguments, begun = Path(data).name, command(run, data), time.monotonic()
        with _logged(log_file, arguments) as log:
            child = subprocess.Popen(arguments, stdout=log, stderr=subprocess.STDOUT, env=env)
            code = _follow(child, partial(str, f"scoring {name}"), line, poll_seconds, asked)
        scored = settle(directory, data, code, str(log_file))
        line.end(f"{name} {'scored' if scored else f'not scored, see {log_file}'} ({clock(time.monotonic() - begun)})")


@contextmanager
def _logged(path: Path, command: Sequence[str]) -> Iterator[IO[bytes]]:
    """The log, opened to be continued, with the command as a line of its own."""
    with open(path, "ab") as log:
        log.write(f"$ {shlex.join(command)}\n".encode())
        log.flush()
        yield log


def _follow(child: subprocess.Popen[bytes], text: Callable[[], str], line: "_Line", poll_seconds: float, asked: _Asked) -> int:
    """Show `text` until the child ends; its exit code. An interrupted study waits for its child, which saves first."""
    try:
        while child.poll() is None:
            asked.leave_if_asked()
            line.show(text())
            _wait(child, poll_seconds)
    except KeyboardInterrupt:  # the terminal has sent SIGINT to the child too
        line.end("interrupted; waiting for the run to save")
        _wait_out(child)
        raise
    except BaseException:
        child.terminate()
        _wait_out(child)
        raise
    return child.returncode


def _wait_out(child: subprocess.Popen[bytes]) -> None:
    """Until the child has ended, also where Ctrl-C comes again: it has heard of that as well."""
    while child.returncode is None:
        with suppress(KeyboardInterrupt):
            child.wait()


def _wait(child: subprocess.Popen[bytes], seconds: float) -> None:
    with suppress(subprocess.TimeoutExpired):
        child.wait(seconds)


def _record_end(directory: RunDirectory, code: int) -> None:
    """Set `failed` where the trainer couldn't: it was killed, or it ended without a word."""
    status = directory.status()["status"]
    if status not in ("done", "preempted", "failed"):
        ended = f"signal {-code}" if code < 0 else f"exit code {code}"
        reason = f"ended with {ended} while its status was '{status}'; see train.log"
        directory.set_status("failed", reason=reason, exit_code=code)


def _outcome(directory: RunDirectory, seconds: float) -> str:
    status = directory.status()
    reason = f": {status['reason']}" if status.get("reason") else ""
    return f"{status['status']}{reason} ({clock(seconds)})"


class Progress:
    """Step, loss and time left of a run, read from `metrics.jsonl`.

    Time left comes from the steps seen since this object was made, so a resumed run's earlier pace doesn't count.
    """

    def __init__(self, run: PlannedRun):
        self.directory = RunDirectory(run.directory)
        self.max_steps = run.config.training.max_steps
        self.first: tuple[float, int] | None = None
        self.read_at_size = -1
        self.last: dict[str, Any] = {}

    def text(self) -> str:
        self._read()
        if not self.last:
            return "starting"
        left = self._seconds_left()
        loss = f", loss {self.last['loss']:.4f}" if "loss" in self.last else ""
        return f"step {self.last['step']}/{self.max_steps}{loss}" + (f", {clock(left)} left" if left is not None else "")

    def _read(self) -> None:
        size = self.directory.metrics_file.stat().st_size if self.directory.metrics_file.exists() else 0
        if size == self.read_at_size:
            return
        self.read_at_size = size
        metrics = self.directory.metrics()
        self.last = metrics[-1] if metrics else {}
        if self.last and self.first is None:
            self.first = (time.monotonic(), self.last["step"])

    def _seconds_left(self) -> float | None:
        if self.first is None or self.last["step"] <= self.first[1]:
            return None
        step: int = self.last["step"]
        pace = (time.monotonic() - self.first[0]) / (step - self.first[1])
        return pace * (self.max_steps - step)


class _Line:
    """One run's progress: rewritten in place on a terminal, a line now and then elsewhere."""

    def __init__(self, label: str, output: TextIO):
        self.label = label
        self.output = output
        self.live = output.isatty()
        self.shown = ""
        self.shown_at = -LINE_EVERY_SECONDS

    def show(self, text: str) -> None:
        now = time.monotonic()
        if text == self.shown or (not self.live and now - self.shown_at < LINE_EVERY_SECONDS):
            return
        self._write(text, end="" if self.live else "\n")
        self.shown, self.shown_at = text, now

    def end(self, text: str) -> None:
        self._write(text, end="\n")

    def _write(self, text: str, end: str) -> None:
        start, clear = ("\r", "\x1b[K") if self.live else ("", "")
        print(f"{start}{self.label}: {text}{clear}", end=end, file=self.output, flush=True)

"""A training run that is killed, filled up and corrupted on purpose, and what must hold afterwards.

Each start is the real door (`launch/train.py`) in W fresh processes; faults hit when a given step stands in metrics.jsonl: soon
after, or exactly there, where rank 0 is made to wait for its fault. What a start must resume from is told by what the campaign
itself did to the files, not by the code under test.
"""

import contextlib
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from hybrid_scale.config import RunConfig, dump_config
from hybrid_scale.runs import RunDirectory
from tests.ranks import launcher_environment, make_context
from tests.train.holds import Hold, number_of

Fault = Callable[["Start"], None]
EXITS = {"done": 0, "wrong": 2, "stopped": 3, "lost": 4}


def rank_main(environment: dict[str, str], log: str, config: str, file_limit: int | None, hold: Hold | None) -> None:
    """The life of one rank: the door, its output in `log`; no file may grow beyond `file_limit` bytes."""
    os.environ.update(environment)
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    import torch

    from launch import train

    torch.set_num_threads(1)
    if file_limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, resource.RLIM_INFINITY))
    if hold is not None:
        hold.install()
    sys.argv = ["train.py", config]
    code = train.main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@dataclass
class Start:
    """One start of a run on some ranks."""

    config: RunConfig
    world: int
    number: int
    file_limit: int | None = None
    hold_at: int | None = None
    hold_in_a_write: bool = False
    timeout: float = 600.0
    processes: list[ForkServerProcess] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.run = RunDirectory(self.config.run.directory)
        place = self.run.path.parent / f"{self.run.path.name}-logs"
        place.mkdir(parents=True, exist_ok=True)
        self.logs = [place / f"{self.number:03d}-rank{rank}.log" for rank in range(self.world)]
        self.file_before = self._metrics_inode()
        if self.file_before is not None:  # a start that goes on from a checkpoint cuts the later steps off
            shutil.copy(self.run.metrics_file, place / f"{self.number:03d}-metrics.jsonl")
        config = place / f"{self.number:03d}.yaml"
        config.write_text(dump_config(self.config))
        hold = None if self.hold_at is None else Hold(self.hold_at, place / f"{self.number:03d}-go", self.hold_in_a_write)
        self.hold = hold
        shared = launcher_environment(self.world)
        self.end = time.monotonic() + self.timeout
        for rank in range(self.world):
            own = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            given = (own, str(self.logs[rank]), str(config), self.file_limit, hold if rank == 0 else None)
            self.processes.append(make_context().Process(target=rank_main, args=given, daemon=True))
            self.processes[-1].start()

    def wait_for_step(self, step: int) -> None:
        """Until this start has logged `step`, or every rank has ended."""
        while any(process.is_alive() for process in self.processes):
            if self._metrics_inode() not in (None, self.file_before):  # each start writes the file anew
                lines = self.run.metrics_file.read_text().splitlines()
                if any(re.match(rf'{{"step": {step},', line) for line in lines):
                    return
            assert time.monotonic() < self.end, f"step {step} did not come:\n{self.output()}"
            time.sleep(0.01)

    def wait_for_a_write(self, step: int) -> None:
        """Until a checkpoint of `step` or later is seen half written, or rank 0 has ended."""
        while self.processes[0].is_alive():
            if any(number_of(part) >= step for part in self.run.checkpoints.glob(".step_*.part")):
                return
            assert time.monotonic() < self.end, f"no checkpoint was begun:\n{self.output()}"
            time.sleep(0.0003)

    def _metrics_inode(self) -> int | None:
        return self.run.metrics_file.stat().st_ino if self.run.metrics_file.exists() else None

    def kill(self, ranks: list[int], number: int = signal.SIGKILL) -> None:
        """Send a signal; whoever was held goes on."""
        for rank in ranks:
            with contextlib.suppress(ProcessLookupError):
                pid = self.processes[rank].pid
                assert pid is not None
                os.kill(pid, number)
        if self.hold is not None:
            self.hold.released.touch()

    def codes(self) -> list[int]:
        """Exit codes, when all have ended. AssertionError with all output when one doesn't end."""
        for process in self.processes:
            process.join(max(0.0, self.end - time.monotonic()))
        alive = [rank for rank, process in enumerate(self.processes) if process.is_alive()]
        self.kill(alive)
        assert not alive, f"ranks {alive} did not end:\n{self.output()}"
        return [int(process.exitcode or 0) for process in self.processes]

    def output(self) -> str:
        return "\n".join(f"--- {log.name}\n{log.read_text()}" for log in self.logs if log.exists())

    def resumed_after(self) -> int:
        """The step that rank 0 said it goes on from; 0 for none."""
        found = re.findall(r"continuing after step (\d+) from", self.logs[0].read_text())
        return int(found[-1]) if found else 0


@dataclass
class Campaign:
    """Events over one run directory until it is done. `check` raises AssertionError as soon as something is lost."""

    config: RunConfig
    chance: random.Random
    damaged: set[str] = field(default_factory=set)
    """Folders that this campaign damaged and no start has replaced yet."""
    events: list[dict[str, Any]] = field(default_factory=list)
    starts: int = 0
    exact: bool = False
    """Whether rank 0 waits for its fault; else the fault is a race with the training, as outside of tests."""
    resize: Callable[[int], None] | None = None
    """Sets the size of the checkpoints' file system; without it a full disk is played by a limit on the size of files."""

    def __post_init__(self) -> None:
        self.run = RunDirectory(self.config.run.directory)

    def start(self, world: int = 2, **how: Any) -> Start:
        self.starts += 1
        return Start(self.config, world, self.starts, **how)

    def folders(self) -> list[Path]:
        """Checkpoints that stand under their name, oldest first."""
        return sorted(self.run.checkpoints.glob("step_*"))

    def expected(self) -> int:
        """The step that the next start must go on from."""
        whole = [folder for folder in self.folders() if folder.name not in self.damaged]
        return int(whole[-1].name[5:]) if whole else 0

    def event(self, kind: str, world: int = 2) -> None:
        """One start that suffers `kind`, and the checks of how it ended and what it resumed from."""
        expected, warned = self.expected(), set(self.damaged)
        self.before_full = {folder.name for folder in self.folders()} - self.damaged
        limit = self._fill_up() if kind == "full" else None
        step = min(expected + self.chance.randint(3, 5), self.config.training.max_steps - 4)
        held = step if self.exact and kind != "full" else None
        start = self.start(world, file_limit=limit, hold_at=held, hold_in_a_write=kind == "kill in a write")
        began = time.monotonic()
        faults: dict[str, Fault] = {
            "kill one": lambda s: self._kill_one(s, step),
            "kill all": lambda s: self._kill_all(s, step),
            "kill in a write": lambda s: self._kill_in_a_write(s, step),
            "terminate": lambda s: self._terminate(s, step),
            "freeze": lambda s: self._freeze(s, step),
            "full": self._full,
            "truncate": lambda s: self._damage(s, step, truncate=True),
            "flip": lambda s: self._damage(s, step, truncate=False),
        }
        try:
            faults[kind](start)
        finally:
            start.kill(list(range(world)))
        went_on = start.resumed_after()
        assert went_on == expected, f"{kind}: went on from {went_on}, not {expected}\n{start.output()}"
        for name in warned:
            assert re.search(rf"{name} is no checkpoint: \S+", start.logs[0].read_text()), start.output()
        self.events.append(
            {
                "kind": kind,
                "ranks": world,
                "resumed_after": expected,
                "step": step,
                "codes": start.codes(),
                "damaged": sorted(self.damaged),
                "torn_writes": len(list(self.run.checkpoints.glob(".step_*.part"))),
                "seconds": round(time.monotonic() - began, 1),
            }
        )

    def random_event(self, kind: str) -> bool:
        """An event of this kind, or `kill all` where it needs a checkpoint and there is none; False too near the run's end."""
        expected = self.expected()
        if expected > self.config.training.max_steps - 6:
            return False
        self.event(kind if expected or kind not in ("truncate", "flip", "full") else "kill all")
        return True

    def finish(self, world: int = 2) -> Start:
        """A last start without a fault."""
        expected = self.expected()
        start = self.start(world)
        assert start.codes() == [0] * world, start.output()
        assert start.resumed_after() == expected, start.output()
        assert self.run.status()["status"] == "done"
        return start

    # ------------------------------------------------------------------------------------------------------------- faults

    def _forget_replaced(self) -> None:
        """A start sets damaged folders aside before it trains."""
        self.damaged.clear()

    def _kill_one(self, start: Start, step: int) -> None:
        victim = self.chance.randrange(start.world)
        start.wait_for_step(step)
        self._forget_replaced()
        start.kill([victim])
        codes = start.codes()
        for rank, code in enumerate(codes):
            if rank != victim:
                assert code == EXITS["lost"], f"rank {rank} ended with {code}\n{start.output()}"
                self._names(start, rank, victim)
        status = self.run.status()
        assert status["status"] == "failed", status
        assert f"rank {victim} " in status["reason"], status

    def _kill_all(self, start: Start, step: int) -> None:
        start.wait_for_step(step)
        self._forget_replaced()
        start.kill(list(range(start.world)))
        assert start.codes() == [-signal.SIGKILL] * start.world

    def _kill_in_a_write(self, start: Start, step: int) -> None:
        """Everything dies as soon as a checkpoint is seen half written."""
        if not self.exact:
            start.wait_for_step(step)
        start.wait_for_a_write(step)
        self._forget_replaced()
        start.kill(list(range(start.world)))
        assert start.codes() == [-signal.SIGKILL] * start.world

    def _terminate(self, start: Start, step: int) -> None:
        start.wait_for_step(step)
        self._forget_replaced()
        start.kill([self.chance.randrange(start.world)], signal.SIGTERM)
        codes = start.codes()
        assert codes == [EXITS["stopped"]] * start.world, f"{codes}\n{start.output()}"
        assert self.run.status()["status"] == "preempted"
        assert self.expected() == self.run.status()["step"]

    def _freeze(self, start: Start, step: int) -> None:
        victim = self.chance.randrange(start.world)
        start.wait_for_step(step)
        self._forget_replaced()
        start.kill([victim], signal.SIGSTOP)
        for rank, process in enumerate(start.processes):
            if rank != victim:
                process.join(max(0.0, start.end - time.monotonic()))
                assert process.exitcode == EXITS["lost"], f"rank {rank} ended with {process.exitcode}\n{start.output()}"
                self._names(start, rank, victim)
        start.kill([victim])

    @staticmethod
    def _names(start: Start, rank: int, victim: int) -> None:
        said = start.logs[rank].read_text()
        assert re.search(rf"rank {victim} \(host \S+\) .*has not been heard of", said), start.output()

    def _full(self, start: Start) -> None:
        codes = start.codes()
        if self.resize:
            self.resize(64 * 2**20)
        self._forget_replaced()
        assert codes == [EXITS["wrong"]] * start.world, f"{codes}\n{start.output()}"
        status = self.run.status()
        assert status["status"] == "failed"
        assert "the checkpoint could not be written" in status["reason"]
        assert re.search("File too large|No space left on device", status["reason"]), status
        assert {folder.name for folder in self.folders()} == self.before_full, "a failed write changed the older checkpoints"

    def _fill_up(self) -> int | None:
        """Leave room for half a checkpoint; the limit of a file's size where there is no file system to fill up."""
        sizes = [path.stat().st_size for path in self.folders()[-1].rglob("*") if path.is_file()]
        if self.resize is None:
            return max(sizes) - 1000  # Adam's moments
        self.resize(int(sum(self._used(folder) for folder in self.run.checkpoints.iterdir()) + sum(sizes) // 2))
        return None

    @staticmethod
    def _used(folder: Path) -> int:
        """Bytes of a tmpfs that a folder takes: pages of 4 KiB."""
        return sum(-(-path.stat().st_size // 4096) * 4096 for path in [folder, *folder.rglob("*")] if path.is_file())

    def _damage(self, start: Start, step: int, truncate: bool) -> None:
        """Everything dies, and a file of the newest checkpoint is not what it was; there must be one before it."""
        self._kill_all(start, step)
        if len(self.folders()) < 2:
            return
        newest = self.folders()[-1]
        path = self.chance.choice(sorted(path for path in newest.rglob("*") if path.is_file()))
        content = bytearray(path.read_bytes())
        if truncate:
            del content[self.chance.randrange(len(content)) :]
        else:
            content[self.chance.randrange(len(content))] ^= 1 << self.chance.randrange(8)
        path.write_bytes(content)
        self.damaged.add(newest.name)


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[Callable[[int], None] | None]:
    """`folder` as a file system of its own, and a function that sets its size in bytes; None where that isn't permitted."""
    folder.mkdir(parents=True, exist_ok=True)
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)], capture_output=True, check=False)
    if mount.returncode:
        yield None
        return
    try:
        yield lambda size: subprocess.run(["mount", "-o", f"remount,size={size}", str(folder)], check=True) and None
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def losses(run: RunDirectory) -> dict[int, float]:
    """Loss by step, every line of every start; a step computed twice must have given the same loss, else it is NaN."""
    found: dict[int, set[float]] = {}
    before = (run.path.parent / f"{run.path.name}-logs").glob("*-metrics.jsonl")
    for line in [line for path in [*before, run.metrics_file] for line in path.read_text().splitlines()]:
        with contextlib.suppress(json.JSONDecodeError):
            record = json.loads(line)
            found.setdefault(record["step"], set()).add(record["loss"])
    return {step: values.pop() if len(values) == 1 else float("nan") for step, values in sorted(found.items())}

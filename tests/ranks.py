"""Run a function on W processes of one machine, as a launcher would: environment set, one thread each, no GPU.

    results = run_ranks(function, 4, argument)

The function is defined at the top of a module (it is pickled by name) and joins the process group itself. A rank that fails ends
the run with its traceback; one that hangs, with the stacks of all ranks that were still running. Limits are for what hangs for
good: a slow machine, or one that stands still for a while, changes no outcome.
"""

import contextlib
import faulthandler
import multiprocessing
import os
import random
import signal
import socket
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
REPORT_SECONDS = 60.0
"""After the first failure: time for the others to report theirs, which may be the cause."""
END_SECONDS = 10.0
"""For a rank that has reported to end, and for one that hangs to write its stacks."""
PORTS = range(10_000, 20_000)
"""Below those that the kernel gives to any connection (32,768 and up) and those of slurm/train.sbatch."""
STACKS = signal.SIGUSR2


class RanksFailed(AssertionError):
    """A rank raised, died or hung. The message holds what is known of each failed rank."""


def run_ranks(
    function: Callable[..., Any],
    world: int,
    *args: Any,
    timeout: float = 600.0,
    patience: float = REPORT_SECONDS,
    environment: Mapping[str, str] | None = None,
) -> list[Any]:
    """`function(*args)` on ranks 0 to world - 1; their results in rank order. `environment` is set in each before the call.

    `timeout` counts from when all have started, `patience` from the first failure: short only where the others hang on purpose.
    Raises RanksFailed. No process outlives the call.
    """
    context = make_context()
    shared = {**launcher_environment(world), **(environment or {})}
    with tempfile.TemporaryDirectory() as folder:
        stacks = [Path(folder) / f"rank{rank}.txt" for rank in range(world)]
        processes, pipes = [], []
        try:
            for rank in range(world):
                ours, theirs = context.Pipe()
                given = (rank, shared, stacks[rank], theirs, function, args)
                processes.append(context.Process(target=_rank_main, args=given, daemon=True))
                processes[-1].start()
                theirs.close()  # so that a rank's death is seen as the end of its pipe
                pipes.append(ours)
            outcomes = _collect(pipes, timeout, patience)
            hanging = [rank for rank in range(world) if rank not in outcomes]
            if not any(kind != "result" for kind, _ in outcomes.values()):
                _write_stacks([(processes[rank], stacks[rank]) for rank in hanging])
            for rank in hanging:
                processes[rank].kill()
        finally:
            for pipe in pipes:
                pipe.close()
            _end(processes)
        failures = _failures(outcomes, processes, stacks, timeout)
    if failures:
        raise RanksFailed("\n\n".join(failures))
    return [outcomes[rank][1] for rank in range(world)]


def make_context() -> ForkServerContext:
    """Ranks are forked from a server process that has imported tests/preload.py."""
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if str(ROOT) not in paths:  # Python 3.11's fork server doesn't learn our sys.path before it preloads
        os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, paths)])
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.preload"])
    return context


def free_port() -> int:
    """A port on which nobody listens now, and which the kernel gives to nobody before it is used."""
    for port in random.SystemRandom().sample(PORTS, 1000):
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
        return port
    raise OSError(f"no free port among 1,000 of {PORTS}")


def launcher_environment(world: int) -> dict[str, str]:
    return {
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "GLOO_SOCKET_IFNAME": "lo",  # whatever the host's name resolves to
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }


def _rank_main(
    rank: int,
    shared: dict[str, str],
    stacks: Path,
    pipe: Connection,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    """The life of one rank: ("started", None), then ("result", value) or ("error", traceback), then stay until all have reported.

    A rank 0 that left early would take the store with it through which the others still find each other.
    """
    os.environ.update(shared, RANK=str(rank), LOCAL_RANK=str(rank))
    with open(stacks, "w") as file:
        faulthandler.register(STACKS, file=file)
        try:
            import torch

            torch.set_num_threads(1)
            pipe.send(("started", None))
            pipe.send(("result", function(*args)))
        except BaseException:
            pipe.send(("error", traceback.format_exc()))
        pipe.poll(None)  # ends when the parent closes its side


def _collect(pipes: list[Connection], timeout: float, patience: float) -> dict[int, tuple[str, Any]]:
    """What each rank reported; ("died", None) for a closed pipe; nothing for a rank that was still running at the end."""
    outcomes: dict[int, tuple[str, Any]] = {}
    started: set[int] = set()
    end, failed = time.monotonic() + 600, False
    while len(outcomes) < len(pipes) and time.monotonic() < end:
        waiting = {pipe: rank for rank, pipe in enumerate(pipes) if rank not in outcomes}
        for pipe in wait(list(waiting), timeout=max(0.0, end - time.monotonic())):
            assert isinstance(pipe, Connection)
            rank = waiting[pipe]
            kind, value = _receive(pipe)
            if kind == "started":
                started.add(rank)
                if len(started) == len(pipes) and not failed:
                    end = time.monotonic() + timeout
                continue
            outcomes[rank] = (kind, value)
            if kind != "result" and not failed:
                end, failed = time.monotonic() + patience, True
    return outcomes


def _receive(pipe: Connection) -> tuple[str, Any]:
    try:
        kind, value = pipe.recv()
    except (EOFError, ConnectionError):
        return "died", None
    return kind, value


def _write_stacks(hanging: list[tuple[ForkServerProcess, Path]]) -> None:
    """Have each process write the stacks of its threads, and wait until it has, if it still can."""
    for process, _ in hanging:
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(process.pid or 0), STACKS)
    end = time.monotonic() + END_SECONDS
    for _, path in hanging:
        before = ""
        while time.monotonic() < end and (not before or before != path.read_text()):
            before = path.read_text()
            time.sleep(0.1)


def _end(processes: list[ForkServerProcess]) -> None:
    for process in processes:
        process.join(END_SECONDS)
        if process.is_alive():
            process.kill()
            process.join()


def _failures(
    outcomes: dict[int, tuple[str, Any]], processes: list[ForkServerProcess], stacks: list[Path], timeout: float
) -> list[str]:
    """One paragraph a failed rank, in the order of the reports. Ranks still running count when nothing else explains them."""
    failures = []
    for rank, (kind, value) in outcomes.items():
        if kind == "error":
            failures.append(f"rank {rank} failed:\n{value}")
        elif kind == "died":
            failures.append(f"rank {rank} died without a word, exit code {processes[rank].exitcode}")
    if not failures:
        for rank in sorted(set(range(len(processes))) - set(outcomes)):
            failures.append(f"rank {rank} was still running after {timeout:g} s:\n{stacks[rank].read_text()}")
    return failures

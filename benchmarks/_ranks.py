"""A function on W fresh processes of this machine, as a launcher would start them, and what each process used.

Processes are forked from a server that has imported the heavy libraries and nothing else, one thread each. Knows no model.
"""

import contextlib
import ctypes
import multiprocessing
import os
import platform
import re
import socket
import time
import traceback
from collections.abc import Callable
from importlib.metadata import distributions
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

PRELOAD = ["torch", "transformers.models.llama.modeling_llama", "hybrid_scale.model.load", "accelerate", "sentence_transformers"]


def run_ranks(function: Callable[..., Any], world: int, *args: Any, timeout: float = 1800.0) -> list[Any]:
    """`function(*args)` on ranks 0 to world - 1; results in rank order.

    Raises RuntimeError with the traceback of a failed rank. No process outlives the call.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    pipes: list[Connection] = []
    processes = []
    for rank in range(world):
        ours, theirs = context.Pipe()
        process = context.Process(target=_rank_main, args=(rank, world, port, theirs, function, args), daemon=True)
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    try:
        return _collect(pipes, timeout)
    finally:
        for pipe in pipes:
            pipe.close()
        for process in processes:
            process.join(5.0)
            if process.is_alive():
                process.kill()
                process.join()


def _rank_main(rank: int, world: int, port: int, pipe: Connection, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    where = {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "RANK": rank, "LOCAL_RANK": rank, "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in where.items()}, MASTER_ADDR="127.0.0.1")
    import torch

    torch.set_num_threads(1)
    try:
        pipe.send((True, function(*args)))
    except BaseException:
        pipe.send((False, traceback.format_exc()))
    with contextlib.suppress(EOFError):
        pipe.poll(600)  # rank 0 holds the store through which the others still meet: all leave when the parent has all results


def _collect(pipes: list[Connection], timeout: float) -> list[Any]:
    results: dict[int, Any] = {}
    end = time.monotonic() + timeout
    while len(results) < len(pipes):
        waiting = {pipe: rank for rank, pipe in enumerate(pipes) if rank not in results}
        ready = wait(list(waiting), timeout=max(0.0, end - time.monotonic()))
        if not ready:
            raise RuntimeError(f"ranks {sorted(waiting.values())} were still running after {timeout:g} s")
        for pipe in ready:
            assert isinstance(pipe, Connection)
            try:
                good, value = pipe.recv()
            except EOFError:
                good, value = False, "died without a word (memory?)"
            if not good:
                raise RuntimeError(f"rank {waiting[pipe]} failed:\n{value}")
            results[waiting[pipe]] = value
    return [results[rank] for rank in range(len(pipes))]


# ------------------------------------------------------------------------------------------------------------- measuring


def give_back_freed_memory() -> None:
    """From now on glibc gives freed blocks above 256 KiB back at once, so that resident memory is memory in use.

    That costs a page fault per 4 KiB allocated and can double the CPU-seconds of a step: not while anything is timed.
    """
    _malloc_thresholds(1 << 18, 1 << 18)


def keep_freed_memory() -> None:
    """From now on glibc's thresholds are the largest that its own rule arrives at: blocks from 32 MiB mapped, 64 MiB kept."""
    _malloc_thresholds(1 << 25, 1 << 26)


def _malloc_thresholds(mapped: int, kept: int) -> None:
    libc = ctypes.CDLL(None)
    libc.malloc_trim(0)
    libc.mallopt(-3, mapped)  # M_MMAP_THRESHOLD
    libc.mallopt(-1, kept)  # M_TRIM_THRESHOLD


def _status() -> dict[str, int]:
    """The kB lines of this process's status."""
    text = Path("/proc/self/status").read_text()
    return {key: int(value) for key, value in re.findall(r"^(\w+):\s+(\d+) kB$", text, re.MULTILINE)}


def reset_peak() -> None:
    """Start VmHWM anew at what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def resident_mib() -> float:
    """Memory of this process that no file backs."""
    return _status()["RssAnon"] / 1024


def peak_mib() -> float:
    """Largest `resident_mib` since `reset_peak`, taking mapped files (library code) to be what they are now."""
    status = _status()
    return (status["VmHWM"] - status["RssFile"] - status["RssShmem"]) / 1024


def available_gib() -> float:
    text = Path("/proc/meminfo").read_text()
    return int(re.findall(r"^MemAvailable:\s+(\d+) kB$", text, re.MULTILINE)[0]) / 2**20


def machine() -> dict[str, Any]:
    """What figures depend on: processor, cores, versions. No names, no paths."""
    names = re.findall(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    known = {d.name: d.version for d in distributions()}
    packages = ("torch", "transformers", "peft", "sentence-transformers", "deepspeed", "accelerate")
    return {
        "cpu": names[0] if names else platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: known.get(name) for name in packages},
    }

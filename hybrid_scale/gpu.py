"""Everything that differs where there is a GPU: which one is ours, its arithmetic, random state, memory. No collective here.

One process drives one GPU. Without a GPU each function does what a CPU needs, mostly nothing; no other module asks torch.cuda.
"""

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from hybrid_scale.errors import RunError, describe


def present() -> bool:
    """Whether this process computes on a GPU."""
    return torch.cuda.is_available()


def take(local_rank: int) -> None:
    """Make GPU `local_rank` of this machine ours, before anything is put on one; later threads start on GPU 0 nevertheless.

    float32 products are made of float32 numbers: TF32 has 10 bits of mantissa, and the loss, its gradient and the certificate of
    the search count on 23. Attention doesn't go to cuDNN, which torch prefers on H100 and B200: it builds a plan for each new
    shape, up to a second (reported for a B200), and micro-batches never repeat theirs. HS_DETERMINISTIC=1 takes torch's
    repeatable kernels where it has them, which are slower.
    Raises RunError: more processes than GPUs.
    """
    if os.environ.get("HS_DETERMINISTIC", "0") != "0":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS may sum in another order each time
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # costs a pass over every new tensor
    if not present():
        return
    os.environ["NVIDIA_TF32_OVERRIDE"] = "0"  # for faiss too, whose cuBLAS isn't torch's
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.enable_cudnn_sdp(False)
    count = torch.cuda.device_count()
    if local_rank >= count:
        rule = f"this process sees {count} GPUs, and each process needs one of its own"
        remedy = "Start as many processes a machine as it has GPUs, or widen CUDA_VISIBLE_DEVICES."
        raise RunError(describe("local rank", local_rank, rule, remedy))
    torch.cuda.set_device(local_rank)


def device() -> torch.device:
    """This process's GPU, or the CPU. In a thread that didn't call `take` it may be another GPU: ask before starting one."""
    return torch.device("cuda", torch.cuda.current_device()) if present() else torch.device("cpu")


def name() -> str | None:
    """The GPU's name, as its driver reports it; None without one."""
    return torch.cuda.get_device_name() if present() else None


def label() -> str:
    """What this process computes on: the GPU's name, its memory and how much of it is free; or `CPU`."""
    if not present():
        return "CPU"
    free, total = torch.cuda.mem_get_info()
    return f"{name()}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free"


def moment() -> torch.cuda.Event | None:
    """A mark behind everything that this thread has asked of our GPU so far; None without one. Waits for nothing."""
    if not present():
        return None
    event = torch.cuda.Event()
    event.record()
    return event


@contextmanager
def after(mark: torch.cuda.Event | None, place: torch.device) -> Iterator[None]:
    """Copies inside come after `mark` and not after what was asked of GPU `place` later; at the end they have been made."""
    if mark is None:
        yield
        return
    stream = torch.cuda.Stream(place)
    stream.wait_event(mark)
    with torch.cuda.stream(stream):
        yield
    stream.synchronize()


def synchronize() -> None:
    """Wait for everything that this process has asked of its GPU, copies to host memory included."""
    if present():
        torch.cuda.synchronize()


# ------------------------------------------------------------------------------------------------------------------- random


def random_state() -> torch.Tensor | None:
    """State of our GPU's random numbers, uint8 in host memory; None without a GPU. Waits for nothing."""
    return torch.cuda.get_rng_state() if present() else None


def set_random_state(state: torch.Tensor | None) -> None:
    """Put back what `random_state` gave; None, or no GPU: nothing."""
    if state is not None and present():
        torch.cuda.set_rng_state(state)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Random numbers from `seed` inside, afterwards those of before; no other GPU than ours is touched.

    torch's fork_rng without `devices` saves the state of every visible GPU, and so opens a context (.5 GB) on each of them.
    """
    with torch.random.fork_rng(devices=[torch.cuda.current_device()] if present() else []):
        torch.manual_seed(seed)
        yield


# ------------------------------------------------------------------------------------------------------------------- memory


def pinned(numel: int, dtype: torch.dtype) -> torch.Tensor:
    """[numel] zeros in host memory, touched; with a GPU in pages that it copies to without the CPU's help."""
    return torch.zeros(numel, dtype=dtype, pin_memory=present()).fill_(0)


def total_bytes() -> int | None:
    """Memory of our GPU; None without one."""
    return int(torch.cuda.get_device_properties(device()).total_memory) if present() else None


def forget_peak() -> None:
    """`peak_bytes` counts from here on; without a GPU it goes on counting from the start of the process."""
    if present():
        torch.cuda.reset_peak_memory_stats()


def peak_bytes() -> int:
    """Most memory that was allocated on our GPU since `forget_peak`; without one, that was ever resident in this process."""
    return torch.cuda.max_memory_allocated() if present() else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@contextmanager
def bounded_by(setting: str, doing: str) -> Iterator[None]:
    """Where the GPU's memory runs out inside: RunError that names the setting which bounds what is done here."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        said = str(error).split(". ")[0]
        remedy = f"Lower {setting} (PYTORCH_ALLOC_CONF=expandable_segments:True helps where much is reserved but unallocated)."
        raise RunError(f"out of GPU memory while {doing}: {said}. {remedy}") from error

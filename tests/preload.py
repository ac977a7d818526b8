"""Imported once by the fork server of tests/ranks.py: the heavy libraries, so that a test's ranks start in a tenth of a second.

Every import may be missing; nothing is configured but what makes imports cheap and CPU runs quiet.
"""

import contextlib
import importlib
import logging
import os
from collections.abc import Callable, Iterator
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before NumPy and torch: a forked child can't use its parent's threads

import numpy  # noqa: F401
import torch

MODULES = (
    *("pytest", "hypothesis", "pyarrow", "scipy.sparse.csgraph", "faiss"),
    *("transformers", "peft", "accelerate", "bitsandbytes", "deepspeed", "deepspeed.runtime.zero.muon.muon_optimizer"),
)


@contextlib.contextmanager
def without_compiling() -> Iterator[None]:
    """bitsandbytes and DeepSpeed call torch.compile at import, which loads the compiler (2 CPU-seconds a process) for nothing."""
    compile_, torch.compile = torch.compile, _as_it_is  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = compile_


def _as_it_is(function: Callable[..., Any] | None = None, **_: Any) -> Any:
    return function if function is not None else _as_it_is


def preload() -> None:
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    with without_compiling():
        for module in MODULES:
            with contextlib.suppress(ImportError):
                importlib.import_module(module)
    with contextlib.suppress(ImportError):
        deepspeed = importlib.import_module("deepspeed")
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        # Its build takes a minute, and a killed one leaves a lock that hangs every later run. Training doesn't use it.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


preload()

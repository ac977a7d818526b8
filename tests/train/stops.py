"""A run under `accelerate launch` on two ranks, asked to stop by a signal in a slow place, and what must hold afterwards."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from hybrid_scale.checkpoints import complete, damage, folder_name
from hybrid_scale.config import RunConfig, dump_config
from hybrid_scale.data.records import Judgment, Passage, Query
from hybrid_scale.data.writing import write_retrieval
from hybrid_scale.runs import RunDirectory
from tests.ranks import free_port
from tests.train.setup import ROOT, make_config, write_inputs, zero

STEPS = 4
SLOW_STEP = 3
"""The step within which a signal comes; the ones before it are finished."""
SLOW_SECONDS = 60.0
LAUNCHER_SECONDS = 30.0
"""After a SIGTERM torch's launcher kills what is left after these, if TORCH_ELASTIC_SHUTDOWN_TIMEOUT says nothing else."""
PLACES = ("loading", "step", "evaluation", "save")
SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP")
SECOND_AFTER = {"loading": 0.3, "step": 0.5, "evaluation": 0.5, "save": 3.0}
"""Seconds between two signals: while the run stops, and in the save later than what counts as the same request."""
FINISHED = {"loading": 0, "step": SLOW_STEP - 1, "evaluation": SLOW_STEP - 1, "save": SLOW_STEP - 1}
"""Steps finished where the signal comes."""


def write_all(folder: Path) -> Path:
    """Training data, model and a retrieval set of 20 queries."""
    write_inputs(folder)
    names = [(number, lang) for number in range(10) for lang in ("en", "de")]
    records: list[Any] = [Passage("t", f"{lang}:{n}", lang, f"text of g{n} {lang}") for n, lang in names]
    records += [Query("t", f"{lang}:{n}", lang, f"question {lang} about g{n}", f"g{n}") for n, lang in names]
    records += [Judgment("t", f"{lang}:{n}", f"{other}:{n}", 1) for n, lang in names for other in ("en", "de")]
    write_retrieval(records, folder / "test", {"name": "synthetic"})
    return folder


def config_of(folder: Path, directory: Path, place: str = "nowhere") -> RunConfig:
    """ZeRO-3, NF4, LoRA with dropout, an evaluation during and after the training, no checkpoint before the last step."""
    settings = {
        **{"engine": "deepspeed", "deepspeed": zero(3, folder), "max_steps": STEPS, "max_tokens_per_micro_batch": 512},
        **{"evaluate_every_steps": SLOW_STEP - 1, "save_every_steps": SLOW_STEP - 1 if place == "save" else None},
    }
    return make_config(
        folder,
        run={"directory": str(directory)},
        data={"evaluate": [str(folder / "test")]},
        model={"quantization": "nf4", "lora": {"rank": 4, "dropout": 0.1}},
        training=settings,
    )


@dataclass
class Launched:
    """`accelerate launch` of one start; `process` leads a group of its own, as a terminal's foreground command does."""

    config: RunConfig
    place: str
    number: int
    seconds: float = SLOW_SECONDS
    step: int = SLOW_STEP
    process: Any = None

    def __post_init__(self) -> None:
        self.run = RunDirectory(self.config.run.directory)
        beside = self.run.path.parent / f"{self.run.path.name}-logs"
        beside.mkdir(parents=True, exist_ok=True)
        self.log = beside / f"{self.number}.log"
        config = beside / f"{self.number}.yaml"
        config.write_text(dump_config(self.config))
        slow = [str(ROOT / "tests/train/slow_train.py"), self.place, str(self.seconds), str(self.step), str(config)]
        launcher = [*("--use_deepspeed", "--num_machines", "1", "--num_processes", "2", "--mixed_precision", "no")]
        launcher += ["--dynamo_backend", "no", "--main_process_port", str(free_port())]
        command = [sys.executable, "-m", "accelerate.commands.launch", *launcher, *slow]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo"}
        environment.pop("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", None)
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=ROOT, start_new_session=True
            )

    def said(self) -> str:
        return self.log.read_text()

    def wait_until_slow(self, timeout: float = 300.0) -> None:
        end = time.monotonic() + timeout
        while f"slow: {self.place}\n" not in self.said():
            assert self.process.poll() is None, self.said()
            assert time.monotonic() < end, self.said()
            time.sleep(0.1)

    def send(self, number: int) -> None:
        """To the launcher and its process group; the ranks are in sessions of their own and hear of it from the launcher."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def end(self, timeout: float = 300.0) -> float:
        """Wait for the launcher; the seconds that took. No rank outlives it."""
        started = time.monotonic()
        try:
            self.process.wait(timeout)
        finally:
            self.send(signal.SIGKILL)
        return time.monotonic() - started


def stop_once(
    config: RunConfig, place: str, name: str, times: int, number: int = 1, finished: int | None = None
) -> dict[str, Any]:
    """Start, signal in the slow place, wait; AssertionError unless the run ended in time, in order, with nothing lost."""
    start = Launched(config, place, number)
    try:
        start.wait_until_slow()
        time.sleep(1.0)
        asked = time.monotonic()
        start.send(getattr(signal, name))
        for _ in range(times - 1):
            time.sleep(SECOND_AFTER[place])
            start.send(getattr(signal, name))
        start.end(LAUNCHER_SECONDS + 10.0)
        seconds = time.monotonic() - asked
    finally:
        start.send(signal.SIGKILL)
    said = start.said()
    assert seconds < LAUNCHER_SECONDS, said
    assert "forcefully exiting" not in said, said
    assert not re.search(r'^\[rank\d+\]|File ".*/(hybrid_scale|launch)/', said, re.MULTILINE), said
    finished = FINISHED[place] if finished is None else finished
    status = start.run.status()
    assert (status["status"], status["step"]) == ("preempted", finished), (status, said)
    assert re.fullmatch(rf"{name} on rank [01]", status["reason"]), status
    assert f"stopped after step {finished}: {status['reason']}" in said, said
    folders = complete(start.run)
    if finished:
        assert folders[-1].name == folder_name(finished), (folders, said)
        assert damage(folders[-1]) is None
    return {"place": place, "signal": name, "times": times, "seconds": round(seconds, 1), "status": status, "lines": said}


def go_on(config: RunConfig, number: int = 2) -> None:
    """The next start, in which nothing is slow, to the end."""
    start = Launched(config, "nowhere", number)
    start.end()
    assert start.process.returncode == 0, start.said()
    assert start.run.status()["status"] == "done"


def same(run: RunDirectory, whole: RunDirectory) -> None:
    """AssertionError unless losses, trained weights, moments and random states are bit for bit those of the other run."""
    ours, theirs = ([(r["step"], r["loss"], r["gradient_norm"]) for r in one.metrics()] for one in (run, whole))
    assert ours == theirs, (ours, theirs)
    assert len(run.metrics_file.read_text().splitlines()) == STEPS, "a step stands twice in metrics.jsonl"
    ours, theirs = (one.checkpoints / folder_name(STEPS) for one in (run, whole))
    for name in ("adapter/adapter_model", "engine/moments", "engine/random"):
        left, right = load_file(ours / f"{name}.safetensors"), load_file(theirs / f"{name}.safetensors")
        assert left.keys() == right.keys()
        for key, value in left.items():
            assert np.array_equal(value, right[key]), (name, key)
    scores = [json.loads((one.evaluations / "test.json").read_text())["metrics"] for one in (run, whole)]
    assert scores[0] == scores[1]

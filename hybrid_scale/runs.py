"""The run directory: names of its files, atomic writes, status, metrics.

The one interface between training, evaluation and studies. Knows no torch and no process group: callers decide which
rank writes.
"""

import datetime
import fcntl
import json
import os
import secrets
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TextIO

from hybrid_scale.config import RunConfig, dump_config, load_config
from hybrid_scale.errors import RunError, describe

Status = Literal["planned", "queued", "running", "preempted", "done", "failed"]


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A sibling to write; renamed to `path` (fsynced) when the block ends well, removed when it doesn't."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")  # two threads, or nodes, may write one file at a time
    try:
        yield beside
        with open(beside, "rb") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def readable(folder: Path) -> None:
    """Give all files in a folder the permissions of an ordinary new file: safetensors makes its own for the owner alone."""
    probe = folder / ".permissions"
    probe.touch()
    mode = probe.stat().st_mode & 0o777
    probe.unlink()
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)


def write_text(path: Path, text: str) -> None:
    """Write a whole file or nothing."""
    with atomic_path(path) as beside:
        beside.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically; NaN and infinity are refused (ValueError)."""
    write_text(path, json.dumps(value, ensure_ascii=False, indent=1, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Parsed JSON. Raises RunError naming the file and line when it is missing or broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunError(describe(str(path), "no such file", "a JSON file is expected here")) from None
    except json.JSONDecodeError as error:
        raise RunError(f"{path}:{error.lineno}: not JSON: {error.msg}.") from None


def check_writable(*files: Path) -> None:
    """Make the folders of these files and see that something can be written there, before hours of work.

    Raises RunError: a file is a folder, its folder can't be made or written to.
    """
    for file in files:
        found = "a folder" if file.is_dir() else None
        try:
            with atomic_path(file.with_name(f"{file.name}.test")) as beside:
                beside.touch()
            file.with_name(f"{file.name}.test").unlink()
        except OSError as error:
            found = f"{error.strerror}: {error.filename}"
        if found is not None:
            raise RunError(describe(str(file), found, "a file is to be written here", "Choose another place."))


FREE = {
    *("run.name", "run.directory", "data.evaluate", "data.evaluate_during", "model.gradient_checkpointing", "loss.max_logits"),
    *("data.train", "model.base", "model.revision"),
}
"""Settings that can't change a run's curve by more than rounding (`training.*` but max_steps, and `evaluation.*`, as well), or
that only say where something lies whose content is compared by itself."""


def differences(before: RunConfig, now: RunConfig) -> list[str]:
    """`section.key: old -> new` of each setting that differs."""
    return [f"{key}: {old!r} -> {new!r}" for key, old, new in _differing("", before.model_dump(), now.model_dump())]


def barred(before: RunConfig, now: RunConfig) -> list[str]:
    """`differences` that a run can't be continued over, as they would bend its curve."""
    lines = []
    for key, old, new in _differing("", before.model_dump(), now.model_dump()):
        if key == "training.max_steps":
            if now.optimizer.schedule != "constant":
                lines.append(f"{key}: {old} -> {new} (the {now.optimizer.schedule} schedule's learning rates depend on it)")
            elif new < old:
                lines.append(f"{key}: {old} -> {new} (it may only grow)")
        elif key not in FREE and not key.startswith(("training.", "evaluation.")):
            lines.append(f"{key}: {old!r} -> {new!r}")
    return lines


def _differing(prefix: str, before: Any, now: Any) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(before, dict) and isinstance(now, dict):
        for key in now:
            yield from _differing(f"{prefix}.{key}" if prefix else key, before.get(key), now[key])
    elif before != now:
        yield prefix, before, now


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _record(line: str) -> dict[str, Any] | None:
    """A logged step; None for a line that isn't one."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


class RunDirectory:
    """One run's files. Layout: DESIGN of the README, section "The run directory"."""

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self.config_file = self.path / "config.yaml"
        self.manifest_file = self.path / "manifest.json"
        self.status_file = self.path / "status.json"
        self.metrics_file = self.path / "metrics.jsonl"
        self.lock_file = self.path / ".lock"
        self.checkpoints = self.path / "checkpoints"
        self.adapter = self.path / "adapter"
        self.embeddings = self.path / "embeddings"
        self.evaluations = self.path / "eval"
        self.failures = self.path / "failures"
        self._lock: TextIO | None = None

    def create(self, config: RunConfig, continuing: bool = False) -> None:
        """Write `config.yaml`, or accept an existing run with an equal config. Raises RunError on another config.

        `continuing`: a config that can only give the same curve, or that is forced by `training.resume_despite`, is accepted
        too; `config.yaml` stays until `adopt`.
        """
        if not self.config_file.exists():
            write_text(self.config_file, dump_config(config))
            return
        forced = continuing and "config" in config.training.resume_despite
        changed = [] if forced else barred(self.config(), config) if continuing else differences(self.config(), config)
        if changed:
            remedy = "Choose another run.directory, or restore the setting."
            if continuing:
                remedy = "Choose another run.directory, restore the setting, or force it by training.resume_despite=[config]."
            raise RunError(f"{self.path}: this run was started with another config: {'; '.join(changed)}. {remedy}")

    def hold(self) -> None:
        """Keep this directory for this process while this object lives: two trainings would mix their steps and checkpoints.

        An advisory lock (flock): the system gives it back however the process ends. A file system without locks is trusted.
        Raises RunError naming the process that holds it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = file = open(self.lock_file, "a+", encoding="utf-8")  # noqa: SIM115 (closed by the end of the process)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip()
            file.close()
            self._lock = None
            remedy = "Wait until it has ended, or choose another run.directory."
            raise RunError(describe(str(self.path), holder, "another training is writing this run", remedy)) from None
        except OSError:
            pass
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {_now()}\n")
        file.flush()

    def adopt(self, config: RunConfig) -> None:
        """Make `config` this run's; a config that differs from it is kept beside as `config.1.yaml`, `config.2.yaml`, ..."""
        if differences(self.config(), config):
            before = len(list(self.path.glob("config.*.yaml")))
            os.replace(self.config_file, self.path / f"config.{before + 1}.yaml")
            write_text(self.config_file, dump_config(config))

    def config(self) -> RunConfig:
        return load_config(self.config_file)

    def set_status(self, status: Status, **facts: Any) -> None:
        write_json(self.status_file, {"status": status, "time": _now(), **facts})

    def status(self) -> dict[str, Any]:
        """Content of `status.json`; `{"status": "planned"}` before the first start."""
        return read_json(self.status_file) if self.status_file.exists() else {"status": "planned"}

    def append_metrics(self, record: dict[str, Any]) -> None:
        """One line of `metrics.jsonl`. Raises ValueError on NaN or infinity."""
        line = json.dumps(record, allow_nan=False)
        with open(self.metrics_file, "ab+") as file:
            if file.seek(0, os.SEEK_END):
                file.seek(-1, os.SEEK_END)
                if file.read() != b"\n":  # a full disk tore the line before: it must not take this one along
                    line = "\n" + line
            file.write(line.encode() + b"\n")

    def metrics(self) -> list[dict[str, Any]]:
        """The logged steps in order; a step logged twice counts once, the later line. A torn line, as a killed process or a full
        disk leaves it, counts for nothing.
        """
        by_step = {record["step"]: record for record in map(_record, self._metric_lines()) if record is not None}
        return [by_step[step] for step in sorted(by_step)]

    def torn_metrics(self) -> int:
        """How many lines of `metrics.jsonl` aren't the record of a step."""
        return sum(_record(line) is None for line in self._metric_lines())

    def rewind_metrics(self, step: int) -> int:
        """Leave in `metrics.jsonl` the steps up to `step`, each once: a run that goes on from there logs the later ones again.

        Returns how many lines were torn.
        """
        if not self.metrics_file.exists():
            return 0
        torn = self.torn_metrics()
        kept = [json.dumps(record) + "\n" for record in self.metrics() if record["step"] <= step]
        write_text(self.metrics_file, "".join(kept))
        return torn

    def _metric_lines(self) -> list[str]:
        if not self.metrics_file.exists():
            return []
        return self.metrics_file.read_text(encoding="utf-8", errors="replace").splitlines()

    def evaluation_file(self, task: str, step: int | None = None) -> Path:
        """`eval/TASK.json` for the final model, `eval/TASK.step-N.json` for one during training."""
        return self.evaluations / (f"{task}.json" if step is None else f"{task}.step-{step}.json")

"""What a study keeps of its jobs: a lock that one process holds, and `jobs.jsonl`, which is only ever appended to.

Knows neither Slurm nor run directories.
"""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hybrid_scale.errors import RunError, describe


@contextmanager
def only_one(directory: Path) -> Iterator[int]:
    """Hold the study's lock; yields its descriptor. It is free when this process, and whoever inherited it, has ended."""
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / "study.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            rule, remedy = "this study is being run or submitted right now", "Wait for it, or stop it."
            raise RunError(describe(str(directory), "a lock", rule, remedy)) from None
        except OSError as error:  # Lustre and NFS may be mounted without locks
            remedy = "Choose a study.directory on one that has them."
            raise RunError(describe(str(directory), error.strerror, "this file system can't lock", remedy)) from None
        yield lock.fileno()


class Journal:
    """The latest job of each run and kind, by id."""

    def __init__(self, directory: Path):
        self.path = directory / "jobs.jsonl"

    def latest(self) -> dict[tuple[str, str], str]:
        """(run id, kind) -> job id. Raises RunError naming the line that isn't one of ours."""
        return {(entry["run"], entry["kind"]): entry["job"] for entry in self._entries()}

    def users(self) -> dict[str, int]:
        """Run id -> number of the user who submitted its latest training."""
        return {entry["run"]: int(entry["user"]) for entry in self._entries() if entry["kind"] == "train" and "user" in entry}

    def _entries(self) -> Iterator[dict[str, str]]:
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        for number, line in enumerate(lines, start=1):
            try:
                entry = {key: str(value) for key, value in json.loads(line).items()}
                _ = entry["run"], entry["kind"], entry["job"], int(entry.get("user", 0))
            except (ValueError, TypeError, KeyError, AttributeError):
                if number == len(lines):
                    return  # the line that a killed process was writing
                remedy = "Restore the line, or delete it: jobs that are alive are found by their names."
                raise RunError(describe(f"{self.path}:{number}", line, "not an entry of this file", remedy)) from None
            yield entry

    def add(self, run: str, kind: str, job: str) -> None:
        before = self.path.read_bytes()[-1:] if self.path.exists() else b"\n"
        with open(self.path, "a", encoding="utf-8") as file:
            start = "" if before in (b"\n", b"") else "\n"
            file.write(start + json.dumps({"run": run, "kind": kind, "job": job, "user": os.getuid()}) + "\n")
            file.flush()
            os.fsync(file.fileno())

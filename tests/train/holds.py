"""Makes a training process wait at a stated place, so that a fault hits there on any machine, however slow or fast."""

import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybrid_scale.runs import RunDirectory
from hybrid_scale.train import checkpoint


@dataclass(frozen=True)
class Hold:
    """Where rank 0 waits, so that a fault hits there on any machine: when it has logged `step`, or before it seals a checkpoint
    of `step` or later. Until the file `released` exists, or it is killed."""

    step: int
    released: Path
    in_a_write: bool = False

    def install(self) -> None:
        append, seal = RunDirectory.append_metrics, checkpoint._seal

        def append_and_wait(run: RunDirectory, record: dict[str, Any]) -> None:
            append(run, record)
            if record["step"] == self.step:
                self._wait()

        def wait_and_seal(folder: Path) -> None:
            if number_of(folder) >= self.step:
                self._wait()
            seal(folder)

        if self.in_a_write:
            checkpoint._seal = wait_and_seal
        else:
            RunDirectory.append_metrics = append_and_wait  # type: ignore[method-assign]

    def _wait(self) -> None:
        while not self.released.exists():
            time.sleep(0.005)


def number_of(folder: Path) -> int:
    """The step of `step_N`, `.step_N.part`."""
    (found,) = re.findall(r"step_(\d+)", folder.name)
    return int(found)

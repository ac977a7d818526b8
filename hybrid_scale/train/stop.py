"""Signals and the time limit -> a flag -> an agreement of all ranks at a step boundary. Knows no checkpoint.

The environment is read here, in `deadline`: HS_STOP_AT (unix seconds or ISO) and Slurm's SLURM_JOB_END_TIME (unix seconds).
"""

import os
import signal
import time
from collections.abc import Mapping
from enum import IntEnum
from types import FrameType

from hybrid_scale import dist
from hybrid_scale.config import TrainingSettings, unix_time
from hybrid_scale.errors import ConfigError, describe

SAME_REQUEST_SECONDS = 2.0
"""Schedulers signal every process and launchers pass on what they get: a rank hears of one request twice."""


class Agreed(IntEnum):
    """What all ranks do next; the highest wish of any rank counts."""

    GO_ON = 0
    STOP = 1
    FAIL = 2


def deadline(settings: TrainingSettings, environment: Mapping[str, str] = os.environ, now: float | None = None) -> float | None:
    """Unix time at which to stop: the earliest of `training.stop_at`, HS_STOP_AT and SLURM_JOB_END_TIME, less
    `training.stop_minutes_before`. None where nothing is said.

    Raises ConfigError: no time, or a stated one that has passed.
    """
    now = time.time() if now is None else now
    stated = {"training.stop_at": settings.stop_at, "HS_STOP_AT": environment.get("HS_STOP_AT")}
    ends = []
    for key, value in stated.items():
        if value is not None:
            ends.append(unix_time(key, value))
            if ends[-1] <= now:
                raise ConfigError(describe(key, value, "this time has passed", "Set a later one, or leave it out."))
    if slurm := environment.get("SLURM_JOB_END_TIME"):
        ends.append(unix_time("SLURM_JOB_END_TIME", slurm))
    return min(ends) - 60.0 * settings.stop_minutes_before if ends else None


class StopRequest:
    """Remembers SIGTERM, SIGUSR1 and the time limit; a second signal ends the process at once."""

    def __init__(self, at: float | None = None) -> None:
        self.at = at
        self.signal: int | None = None
        self._heard = 0.0

    def install(self) -> None:
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.signal is None:
            self.signal, self._heard = number, time.monotonic()
        elif time.monotonic() - self._heard > SAME_REQUEST_SECONDS:
            raise SystemExit(128 + number)

    def reason(self) -> str | None:
        """Why this rank wants to stop; None where it doesn't."""
        if self.signal is not None:
            return signal.Signals(self.signal).name
        return "time limit" if self.at is not None and time.time() >= self.at else None

    def agreed(self, failed: bool = False) -> Agreed:
        """What all ranks do after this step. `failed`: this rank has a reason to end the run. Collective."""
        wish = Agreed.FAIL if failed else Agreed.STOP if self.reason() else Agreed.GO_ON
        return Agreed(dist.max_int(wish))

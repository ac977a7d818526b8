"""Signals -> a flag -> an agreement of all ranks at a step boundary. Knows no checkpoint."""

import signal
from types import FrameType

from hybrid_scale import dist


class StopRequest:
    """Remembers SIGTERM and SIGUSR1; a second signal ends the process at once."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def install(self) -> None:
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            raise SystemExit(128 + number)
        self.signal = number

    def agreed(self) -> bool:
        """Whether any rank was asked to stop; the same answer on every rank. Collective."""
        return dist.max_int(0 if self.signal is None else 1) == 1

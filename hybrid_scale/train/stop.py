"""Signals and the time limit -> an agreement of all ranks that the trained state moves no further. Knows no checkpoint.

Weights and moments move in the update alone, and before it all ranks agree (`agreed`: one collective a step). A rank that has
heard a request and hasn't voted yet therefore knows that this agreement ends the run, and that no rank's state moves until then,
however long loading, the gradient of a step or an evaluation may take. So nobody waits for them: the rank tells the others by a
note in their store, and a thread of each rank saves the state and ends the process, whatever its main thread is doing.
The environment is read here, in `deadline`: HS_STOP_AT (unix seconds or ISO) and Slurm's SLURM_JOB_END_TIME (unix seconds).
"""

import math
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from enum import IntEnum

from hybrid_scale import dist
from hybrid_scale.config import TrainingSettings, unix_time
from hybrid_scale.errors import ConfigError, describe

SAME_REQUEST_SECONDS = 2.0
"""Schedulers signal every process and launchers pass on what they get: a rank hears of one request twice."""
POLL_SECONDS = 0.5
"""How often a rank looks at the clock and at the others' note."""
AGREE_SECONDS = 5.0
"""Enough for all ranks to know of a stop, and for an update to end (measured: 1 to 2 s, benchmarks/stops.py)."""
CHECKPOINT_BYTES_A_SECOND = 50e6
"""Of a slow file system; a local disk took twice as much (benchmarks/checkpoint.py)."""
LEAVE_SECONDS = 5.0
"""For how long rank 0, which mostly keeps the store, waits for the others to have read that all is saved."""


class Agreed(IntEnum):
    """What all ranks do next; the highest wish of any rank counts."""

    GO_ON = 0
    STOP = 1
    FAIL = 2


def deadline(
    settings: TrainingSettings,
    environment: Mapping[str, str] = os.environ,
    now: float | None = None,
    say: Callable[[str], None] = print,
) -> float | None:
    """Unix time at which to stop: the earliest of `training.stop_at`, HS_STOP_AT and SLURM_JOB_END_TIME, less
    `training.stop_minutes_before`. None where nothing is said. An end of a Slurm job that has passed belongs to another job, in
    whose shell this one was started: it is ignored, and `say` says so.

    Raises ConfigError: no time, a stated one that has passed, or one so near that the run would have to stop now.
    """
    now = time.time() if now is None else now
    stated = {"training.stop_at": settings.stop_at, "HS_STOP_AT": environment.get("HS_STOP_AT")}
    ends = {key: unix_time(key, value) for key, value in stated.items() if value is not None}
    for key, end in ends.items():
        if end <= now:
            raise ConfigError(describe(key, stated[key], "this time has passed", "Set a later one, or leave it out."))
    if slurm := environment.get("SLURM_JOB_END_TIME"):
        end = unix_time("SLURM_JOB_END_TIME", slurm)
        if end > now:
            ends["SLURM_JOB_END_TIME"] = end
        else:
            rule = f"this job ended {(now - end) / 60:.0f} minutes ago, so the variable is left over in this shell and ignored"
            say(f"warning: {describe('SLURM_JOB_END_TIME', slurm, rule)}")
    if not ends:
        return None
    key = min(ends, key=ends.__getitem__)
    if (last := ends[key] - 60.0 * settings.stop_minutes_before) <= now:
        rule = f"the run must stop {settings.stop_minutes_before:g} minutes before, which is now"
        remedy = "Give it more time, or lower training.stop_minutes_before."
        raise ConfigError(describe(key, stated.get(key, environment.get(key)), rule, remedy))
    return last


def too_short_for(trained: int, environment: Mapping[str, str] = os.environ) -> str | None:
    """A warning where torch's launcher would kill a run before the checkpoint of `trained` parameters is on disk; else None.

    The launcher reads TORCH_ELASTIC_SHUTDOWN_TIMEOUT (whole seconds, default 30) when it starts, and kills so long after it has
    passed on SIGTERM, SIGINT or SIGHUP. A checkpoint holds 12 bytes a trained parameter.
    """
    if "TORCHELASTIC_RUN_ID" not in environment:
        return None
    allowed = environment.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "30")
    needed = AGREE_SECONDS + 12 * trained / CHECKPOINT_BYTES_A_SECOND
    if needed <= float(allowed):
        return None
    size = f"a checkpoint of {12 * trained / 1e9:.1f} GB may take {needed:.0f} s on a slow file system"
    rule = f"the launcher kills a run so many seconds after a SIGTERM, Ctrl-C or SIGHUP, and {size}"
    remedy = f"Set it to {math.ceil(needed / 60) * 60} before `accelerate launch`, as slurm/train.sbatch does with 300."
    return f"warning: {describe('TORCH_ELASTIC_SHUTDOWN_TIMEOUT', allowed, rule, remedy)}"


class StopRequest:
    """What this rank has been asked, and where all ranks stand.

    The main thread calls `stands` when an update and what belongs to it are over, and `agreed` before the next; `heard` may be
    called by any thread. `start` gives the thread of this rank that, once the run is known to end at the next agreement, calls
    `ends(steps)`: on every rank, the state not moving, with the steps finished since `stands` was called first (else None).
    """

    def __init__(self, at: float | None = None) -> None:
        self.at = at
        self.signal: int | None = None
        self.repeated = 0
        """Ctrl-C again, after the first one."""
        self.agreements = 0
        """Passed so far: the number of the next one, the same on all ranks."""
        self.steps: int | None = None
        self.ending = False
        """Whether the state is being saved, and the process ends when that is done."""
        self.why = ""
        """Who asked, and what: of the first rank that did."""
        self._stands, self._voted, self._closed = True, False, False
        self._last: int | None = None
        """The number of the agreement at which the run ends."""
        self._heard_at = 0.0
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self.board: dist.Board | None = None

    def start(self, ends: Callable[[int | None], None]) -> None:
        self.board = dist.Board("stop") if dist.world_size() > 1 else None
        self._thread = threading.Thread(target=self._watch, args=(ends,), name="stop", daemon=True)
        self._thread.start()

    def heard(self, number: int) -> None:
        """A signal. Those of one request count once; a Ctrl-C or SIGTERM after a Ctrl-C says not to wait."""
        now = time.monotonic()
        with self._changed:
            if self.signal is None:
                self.signal, self._heard_at = number, now
            elif now - self._heard_at > SAME_REQUEST_SECONDS and self.signal == signal.SIGINT:
                self._heard_at = now
                self.repeated += number in (signal.SIGINT, signal.SIGTERM)
            self._changed.notify_all()

    def reason(self) -> str | None:
        """Why this rank wants to stop; None where it doesn't."""
        if self.signal is not None:
            return signal.Signals(self.signal).name
        return "time limit" if self.at is not None and time.time() >= self.at else None

    # -------------------------------------------------------------------------------------------------- the main thread

    def stands(self, steps: int) -> None:
        """The state is that after `steps` finished steps and doesn't move until the next agreement."""
        with self._changed:
            self.steps, self._stands = steps, True
            self._changed.notify_all()

    def agreed(self, failed: bool = False) -> Agreed:
        """What all ranks do before the state moves. `failed`: this rank has a reason to end the run. Collective.

        Doesn't return where the run ends and `start` was called: the thread ends the process.
        """
        with self._changed:
            if self._last is None and self.reason() and not failed:
                self._last = self.agreements
            wish = Agreed.FAIL if failed else Agreed.STOP if self._last is not None else Agreed.GO_ON
            self._voted = True
            self._changed.notify_all()
        agreed = Agreed(dist.max_int(wish))
        with self._changed:
            self._voted = False
            if agreed is Agreed.STOP:
                self._last = self.agreements
            else:
                self.agreements, self._stands = self.agreements + 1, False
            self._changed.notify_all()
        if agreed is Agreed.STOP and self._thread is not None:
            self.wait()
        return agreed

    def close(self) -> None:
        """Nothing is saved any more: the run has ended otherwise. Where that comes too late this doesn't return, see `wait`."""
        with self._changed:
            self._closed = not self.ending
            self._changed.notify_all()
        if self.ending:
            self.wait()

    def wait(self) -> None:
        """For the thread to end the process; what goes wrong meanwhile is an echo of other ranks' ends."""
        threading.Event().wait()

    # -------------------------------------------------------------------------------------------------- the stop's thread

    def _watch(self, ends: Callable[[int | None], None]) -> None:
        pause = max(POLL_SECONDS, dist.world_size() / 128)  # one server answers all ranks
        try:
            while not self._closed and not self.why:
                with self._changed:
                    if not self.reason():
                        self._changed.wait(pause)
                self._look()
        except dist.StoreGone:
            return  # a rank has gone: train.watch says which
        with self._changed:
            self._changed.wait_for(self._may_end)
            if self._closed:
                return
            self.ending = True
        ends(self.steps)

    def _look(self) -> None:
        """Know at which agreement the run ends, if a rank has asked for it, and let all know."""
        mine = self.reason()
        if mine is not None:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._last is not None or (self._stands and not self._voted))
                if self._closed:
                    return
                self._last = self.agreements if self._last is None else self._last
        note = "" if mine is None else f"{self._last} {mine} on rank {dist.rank()}"
        if self.board is not None:
            note = self.board.post("ends", note) if note else self.board.read("ends")
        if note:
            last, _, self.why = note.partition(" ")
            self._last = int(last)

    def _may_end(self) -> bool:
        return self._closed or (self.agreements == self._last and self._stands)

    def leave_together(self, report: Callable[[], None]) -> None:
        """`report` on rank 0, when its part is done; the others wait for it, and rank 0 until they know."""
        if self.board is None:
            report()
            return
        try:
            if dist.rank() == 0:
                report()
                self.board.post("over", "yes")
                end = time.monotonic() + LEAVE_SECONDS
                while self.board.count("left", 0) < dist.world_size() - 1 and time.monotonic() < end:
                    time.sleep(0.05)
            else:
                while not self.board.read("over"):
                    time.sleep(0.05)
                self.board.count("left", 1)
        except dist.StoreGone:
            return  # rank 0 has ended, and said how

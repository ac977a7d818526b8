"""Heartbeats: a rank that dies, hangs or fails is named by the others, which end within a bounded time.

A thread of each rank notes where the rank stands and reads the notes of all; another one judges them, so that it works while a
collective or the store hangs. Time is counted in own ticks: a process that was itself suspended accuses nobody.
"""

import itertools
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from hybrid_scale import dist
from hybrid_scale.errors import RunError

EXIT_CODE = 4
PHASES = ("loading", "data", "gradient", "update", "logging", "checkpoint", "evaluation")
"""Where a rank can stand, in the order of a step."""
UNLIMITED = ("loading", "checkpoint", "evaluation")
"""Phases that may take longer than `training.rank_timeout_seconds`: only the heartbeat is watched in them."""
DEAD_TICKS = 4
"""Ticks without a heartbeat after which a rank is taken for dead, once a connection has broken."""
LINGER_TICKS = 3
"""Ticks for which rank 0 stays after it has named a rank."""
FAILED_TICKS = 10
"""Ticks that this rank has to end by itself after another one said that it failed."""


STOP_SECONDS = 10.0
"""For a thread that is asking the store; one that waits for a store that is gone is left behind."""


class RankLost(RunError):
    """Another rank died, hangs or failed; the message names it. Doors exit with EXIT_CODE."""


class Watch:
    """Watches all ranks from `start` to `stop`; does nothing in a world of one.

    `ending(reason, writes)` is called before the process is ended from the thread; `writes`: this rank should record it.
    """

    def __init__(self, timeout: float, ending: Callable[[str, bool], None]):
        self.timeout, self.ending = timeout, ending
        self.interval = max(min(2.0, timeout / 20), dist.world_size() / 64)  # one server reads W^2 notes a tick
        self.step, self.phase, self.failure, self.saving = 0, "loading", "", False
        self.notes: dist.Notes | None = None
        self.known: list[dict[str, Any]] = [{} for _ in range(dist.world_size())]
        self.silent = [0] * dist.world_size()
        """Ticks since a rank's note changed."""
        self.still = [0] * dist.world_size()
        """Ticks since a rank's step or phase changed."""
        self.storeless = 0
        """Ticks since the store answered."""
        self.refused = False
        """Whether the store's process has ended, not only fallen silent."""
        self._fetched: list[dict[str, Any]] | None = None
        self._stopped = threading.Event()
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        if dist.world_size() > 1:
            self.notes = dist.Notes()
            for work in (self._exchange, self._judge):
                self._threads.append(threading.Thread(target=work, name="watch", daemon=True))
                self._threads[-1].start()

    def stop(self) -> None:
        """End the threads: one that came back from the store while Python takes itself apart would abort the process."""
        self._stopped.set()
        for thread in self._threads:
            thread.join(STOP_SECONDS)

    def at(self, step: int, phase: str) -> None:
        """This rank is in `phase` of step `step` (from 1)."""
        if not self.saving:
            self.step, self.phase = step, phase

    def ends(self) -> None:
        """From here on this rank saves its state, whatever its main thread goes on with."""
        self.phase, self.saving = "checkpoint", True

    def explain(self, error: BaseException) -> RankLost | None:
        """The rank behind an error of this rank, or None where it is this rank's own, which the others are then told."""
        if self.notes is None or isinstance(error, RankLost):
            return None
        if dist.is_lost_connection(error):
            for _ in range(3 * DEAD_TICKS):
                if lost := self._lost(dead=DEAD_TICKS, failed=0, storeless=DEAD_TICKS):
                    self._linger()
                    return RankLost(lost)
                time.sleep(self.interval)
        self.failure = f"{type(error).__name__}: {error}"
        time.sleep(2 * self.interval)  # the thread tells the others
        return None

    def writes(self) -> bool:
        """Whether this is the lowest rank that still lives and didn't fail, or can't tell."""
        lower = range(dist.rank())
        return self.storeless >= DEAD_TICKS or all(self.silent[r] >= DEAD_TICKS or self.known[r].get("failure") for r in lower)

    def _exchange(self) -> None:
        """Write the own note and read all, once a tick. A suspended store makes this wait, a closed one is tried again."""
        assert self.notes is not None
        host = socket.gethostname()
        for beat in itertools.count():
            note = {"beat": beat, "step": self.step, "phase": self.phase, "failure": self.failure[:1000], "host": host}
            try:
                self.notes.put(json.dumps(note))
                self._fetched, self.refused = [json.loads(text or "{}") for text in self.notes.read()], False
            except dist.StoreGone:
                self.refused = True
            if self._stopped.wait(self.interval):
                return

    def _judge(self) -> None:
        while not self._stopped.wait(self.interval):
            self._count()
            lost = self._verdict()
            if lost and not self._stopped.is_set():
                self._end(lost)

    def _verdict(self) -> str | None:
        """Who has gone or stands still, after the ticks counted so far; None while all may be well."""
        most = max(DEAD_TICKS, round(self.timeout / self.interval))
        storeless = FAILED_TICKS if self.refused else most
        return self._lost(dead=most, failed=FAILED_TICKS, storeless=storeless) or self._stuck(most)

    def _count(self) -> None:
        """For how many ticks each rank has said the same. A tick without news from the store counts for the store alone."""
        notes, self._fetched = self._fetched, None
        if notes is None:
            self.storeless += 1
            return
        self.storeless = 0
        for rank, (before, now) in enumerate(zip(self.known, notes, strict=True)):
            same = all(before.get(key) == now.get(key) for key in ("step", "phase", "failure"))
            self.silent[rank] = self.silent[rank] + 1 if before == now else 0
            self.still[rank] = self.still[rank] + 1 if same else 0
        self.known = notes

    def _lost(self, dead: int, failed: int, storeless: int) -> str | None:
        """Who has gone, given after how many ticks each sign counts."""
        others = [rank for rank in range(len(self.known)) if rank != dist.rank()]
        for rank in others:
            if self.known[rank].get("failure") and self.still[rank] >= failed:
                return f"{self._name(rank)} failed: {self.known[rank]['failure']}"
        for rank in others:
            if self.silent[rank] >= dead:
                seconds = self.silent[rank] * self.interval
                return (
                    f"{self._name(rank)} has not been heard of for {seconds:.0f} s, last step {self.known[rank].get('step', 0)}"
                )
        if self.storeless >= storeless:
            seconds, step = self.storeless * self.interval, self.known[0].get("step", 0)
            return f"{self._name(0)} or the store that it keeps has not been heard of for {seconds:.0f} s, last step {step}"
        return None

    def _stuck(self, most: int) -> str | None:
        """The ranks furthest behind, where they have stood in one phase of a step for `most` ticks."""
        places = [(note.get("step", 0), PHASES.index(note.get("phase", "loading"))) for note in self.known]
        behind = [rank for rank, place in enumerate(places) if place == min(places)]
        phase = PHASES[min(places)[1]]
        # One that is behind itself leaves it to the others, if there are any, to say so first.
        needed = most + (DEAD_TICKS if dist.rank() in behind else 0)
        if phase in UNLIMITED or min(self.still[rank] for rank in behind) < needed:
            return None
        names = ", ".join(self._name(rank) for rank in behind)
        return (
            f"{names}: step {min(places)[0]} has been in its phase '{phase}' for {most * self.interval:.0f} s; "
            "raise training.rank_timeout_seconds if a step may take so long"
        )

    def _name(self, rank: int) -> str:
        return f"rank {rank} (host {self.known[rank].get('host', 'unknown')})"

    def _linger(self) -> None:
        """Rank 0 mostly keeps the store from which the others learn the same."""
        if dist.rank() == 0:
            time.sleep(LINGER_TICKS * self.interval)

    def _end(self, lost: str) -> None:
        """End this process, whose main thread may hang in a collective for good."""
        print(f"error: rank {dist.rank()}: {lost}", file=sys.stderr, flush=True)
        try:
            self.ending(f"RankLost: {lost}", self.writes())
            self._linger()
        finally:
            os._exit(EXIT_CODE)

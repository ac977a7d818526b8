"""Signals that ask this process to end, heard by a thread at once, whatever the main thread is doing.

Python runs a handler in the main thread, between two of its instructions: a collective, a kernel or a read that waits isn't
interrupted. The C half of its signal handling writes the number into a socket first (signal.set_wakeup_fd); a thread reads it.
"""

import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterable
from typing import Any

REQUESTS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""A scheduler or a person, Ctrl-C, a terminal that was closed: end now."""
NOTICE = signal.SIGUSR1
"""A batch system's warning that the job will be ended in some minutes."""
EXIT_CODE = 3
"""Of a process that was asked to stop and did, in order."""


class Listener:
    """One a process, started and stopped in the main thread, which alone may set handlers.

    Until somebody `hear`s, a request ends the process at once (there is nothing to save yet), and a notice is kept for later.
    SIGINT and SIGHUP that were ignored before stay ignored: `nohup` and background jobs of a shell ask for it.
    """

    def __init__(self) -> None:
        self.before: dict[int, Any] = {}
        """Handlers that were there; empty while nobody listens."""
        self.quiet = False
        """Whether another process says how the command ended."""
        self._heard: Callable[[int], None] | None = None
        self._kept: list[int] = []
        self._lock = threading.Lock()

    def start(self, numbers: Iterable[signal.Signals] = REQUESTS) -> bool:
        """Listen; False where this process does already, or this isn't the main thread."""
        if self.before or threading.current_thread() is not threading.main_thread():
            return False
        self._heard, self._kept = None, []
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        self._sockets = (ours, theirs)
        self._descriptor = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
        for number in numbers:
            ignored = signal.getsignal(number) is signal.SIG_IGN
            if not (ignored and number in (signal.SIGINT, signal.SIGHUP)):
                self.before[number] = signal.signal(number, lambda *_: None)
        threading.Thread(target=self._listen, args=(ours,), name="signals", daemon=True).start()
        return True

    def stop(self) -> None:
        """Put back the handlers that were there; the thread ends."""
        if not self.before:
            return
        for number, handler in self.before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._descriptor)
        self.before = {}
        self._sockets[1].close()

    def hear(self, heard: Callable[[int], None]) -> None:
        """From here on `heard(number)` is called in the listener's thread, first here for what was kept."""
        with self._lock:
            self._heard, kept, self._kept = heard, self._kept, []
        for number in kept:
            heard(number)

    def _listen(self, ours: socket.socket) -> None:
        with ours:
            while numbers := ours.recv(64):
                for number in numbers:
                    if number in self.before:
                        self._tell(number)

    def _tell(self, number: int) -> None:
        with self._lock:
            heard = self._heard
            if heard is None and number == NOTICE:
                self._kept.append(number)
                return
        if heard is not None:
            heard(number)
            return
        if not self.quiet:
            print(f"stopped by {signal.Signals(number).name}; the same command goes on", file=sys.stderr, flush=True)
        os._exit(EXIT_CODE)


LISTENER = Listener()

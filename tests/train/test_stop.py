"""Signals and time limits: which end counts, when and by whom the state is saved, what a second signal does."""

import signal
import subprocess
import sys
import threading
import time
from typing import Any

import pytest

from hybrid_scale import dist
from hybrid_scale.config import TrainingSettings
from hybrid_scale.errors import ConfigError
from hybrid_scale.signals import REQUESTS, Listener
from hybrid_scale.train.stop import POLL_SECONDS, SAME_REQUEST_SECONDS, Agreed, StopRequest, deadline, too_short_for
from tests.ranks import run_ranks


def settings(**training: Any) -> TrainingSettings:
    return TrainingSettings(max_steps=1, **training)


def test_the_earliest_end_counts():
    """1000 s: stated as a number, as ISO with an offset, in the environment; minus five or the stated minutes."""
    assert deadline(settings(), {}, now=0.0) is None
    assert deadline(settings(stop_at=1000.0), {}, now=0.0) == 700.0
    assert deadline(settings(stop_at="1970-01-01T01:16:40+01:00"), {}, now=0.0) == 700.0
    assert deadline(settings(stop_at=2000.0, stop_minutes_before=1.0), {"HS_STOP_AT": "1000"}, now=0.0) == 940.0
    assert deadline(settings(stop_at=2000.0), {"SLURM_JOB_END_TIME": "900"}, now=0.0) == 600.0


def test_a_time_that_has_passed_or_is_none_is_refused():
    with pytest.raises(ConfigError, match="HS_STOP_AT: found '5'; this time has passed"):
        deadline(settings(), {"HS_STOP_AT": "5"}, now=6.0)
    with pytest.raises(ConfigError, match=r"training.stop_at: found 'noon'; neither unix seconds nor an ISO time"):
        settings(stop_at="noon")


@pytest.mark.parametrize("ended", ["93", "1970-01-01T00:01:33+00:00", 99.9])
def test_the_end_of_another_slurm_job_is_ignored_and_said(ended):
    said: list[str] = []
    found = deadline(settings(stop_at=2000.0), {"SLURM_JOB_END_TIME": str(ended)}, now=100.0, say=said.append)
    assert found == 1700.0, "what is meant for this run counts all the same"
    assert len(said) == 1
    assert f"SLURM_JOB_END_TIME: found '{ended}'; this job ended 0 minutes ago" in said[0]


def test_a_run_that_would_have_to_stop_now_is_refused():
    """Five minutes before 300 s it is 1 s: from then on a start would save nothing new, over and over where a job is requeued."""
    assert deadline(settings(), {"SLURM_JOB_END_TIME": "302"}, now=1.0) == 2.0
    with pytest.raises(ConfigError, match=r"SLURM_JOB_END_TIME: found '301'; the run must stop 5 minutes before, which is now"):
        deadline(settings(), {"SLURM_JOB_END_TIME": "301"}, now=1.0)
    with pytest.raises(ConfigError, match=r"HS_STOP_AT: found '60'; the run must stop 1 minutes before"):
        deadline(settings(stop_minutes_before=1.0), {"HS_STOP_AT": "60", "SLURM_JOB_END_TIME": "9000"}, now=1.0)


def test_a_launcher_that_would_kill_before_the_checkpoint_is_whole():
    """207 million trained parameters (70B, rank 16): 2.484 GB at 50 MB/s take 49.7 s, and 5 s to agree; 10 million 2.4 + 5 s."""
    launched = {"TORCHELASTIC_RUN_ID": "none"}
    said = too_short_for(207_000_000, launched)
    assert said is not None
    assert "TORCH_ELASTIC_SHUTDOWN_TIMEOUT: found '30'; the launcher kills" in said
    assert "a checkpoint of 2.5 GB may take 55 s on a slow file system. Set it to 60 before" in said
    assert too_short_for(207_000_000, {**launched, "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "55"}) is None
    assert too_short_for(10_000_000, launched) is None
    assert too_short_for(10_000_000, {**launched, "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "7"}) is not None
    assert too_short_for(207_000_000, {}) is None, "nobody kills a process that no launcher started"


class Run:
    """One rank of a training in this process: the stop's thread notes what it would save, where a real one ends the process."""

    def __init__(self, at: float | None = None):
        self.stop = StopRequest(at)
        self.saved: list[int | None] = []
        self.ended = threading.Event()
        self.stop.wait = self.ended.wait  # type: ignore[method-assign]
        self.stop.start(self._ends)

    def _ends(self, steps: int | None) -> None:
        self.saved.append(steps)
        self.ended.set()


def test_a_request_while_the_state_stands_is_met_at_once():
    """Before the first step, in a gradient or an evaluation: the main thread needs to do nothing."""
    loading = Run()
    loading.stop.heard(signal.SIGHUP)
    assert loading.ended.wait(60)
    assert (loading.saved, loading.stop.why) == ([None], "SIGHUP on rank 0")

    training = Run()
    training.stop.stands(0)
    assert training.stop.agreed() is Agreed.GO_ON
    training.stop.stands(1)
    training.stop.heard(signal.SIGTERM)
    assert training.ended.wait(60)
    assert training.saved == [1]


def test_a_request_during_an_update_is_met_when_it_is_over():
    run = Run()
    run.stop.stands(6)
    assert run.stop.agreed() is Agreed.GO_ON
    run.stop.heard(signal.SIGTERM)  # the state moves now
    assert not run.ended.wait(3 * POLL_SECONDS)
    run.stop.stands(7)
    assert run.ended.wait(60)
    assert run.saved == [7]
    assert run.stop.agreed() is Agreed.STOP, "the main thread may still get to the agreement"


def test_the_time_limit_is_a_request():
    run = Run(at=time.time() + 1.0)
    run.stop.stands(3)
    assert run.stop.reason() is None
    assert run.ended.wait(60)
    assert (run.saved, run.stop.why) == ([3], "time limit on rank 0")


def test_a_run_that_has_ended_otherwise_isnt_saved():
    run = Run()
    run.stop.stands(3)
    run.stop.close()
    run.stop.heard(signal.SIGTERM)
    assert not run.ended.wait(3 * POLL_SECONDS)
    assert run.saved == []


def test_a_failed_checkpoint_outweighs_a_request():
    stop = StopRequest()
    stop.heard(signal.SIGTERM)
    assert stop.agreed(failed=True) is Agreed.FAIL


def test_only_ctrl_c_again_says_not_to_wait(monkeypatch):
    """Within two seconds it is one request, passed on; SIGTERM after Ctrl-C is what torch's launcher makes of a second one."""
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])

    def repeated(*numbers: signal.Signals, pause: float = SAME_REQUEST_SECONDS + 0.1) -> int:
        stop = StopRequest()
        for number in numbers:
            stop.heard(number)
            now[0] += pause
        assert stop.reason() == numbers[0].name
        return stop.repeated

    assert repeated(signal.SIGTERM, signal.SIGTERM, signal.SIGTERM) == 0
    assert repeated(signal.SIGHUP, signal.SIGTERM, signal.SIGINT) == 0
    assert repeated(signal.SIGINT, signal.SIGINT, pause=0.5) == 0
    assert repeated(signal.SIGINT, signal.SIGTERM) == 1
    assert repeated(signal.SIGINT, signal.SIGINT, signal.SIGINT) == 2


def on_two_ranks(late: int) -> tuple[list[int | None], str]:
    """Rank 0 is asked within a gradient while rank 1 is an update or a step behind; what this rank would save, and why."""
    dist.start()
    run = Run()
    run.stop.stands(0)
    for step in (1, 2):
        assert run.stop.agreed() is Agreed.GO_ON
        if dist.rank() == 1 and step == late:
            time.sleep(1.5)
        run.stop.stands(step)
    if dist.rank() == 0:
        run.stop.heard(signal.SIGINT)
    assert run.ended.wait(60)
    return run.saved, run.stop.why


@pytest.mark.parametrize("late", [1, 2])
def test_all_ranks_save_the_same_step(late):
    assert run_ranks(on_two_ranks, 2, late) == [([2], "SIGINT on rank 0")] * 2


ASKED = """
import hashlib, os, signal, sys, time
from hybrid_scale.signals import LISTENER, NOTICE, REQUESTS
for number in REQUESTS:
    signal.signal(number, signal.SIG_DFL)  # whatever the tests were started from
LISTENER.start((*REQUESTS, NOTICE))
if sys.argv[1] == "hears":
    LISTENER.hear(lambda number: (print("heard", number, flush=True), os._exit(0)))
elif sys.argv[1] == "later":
    os.kill(os.getpid(), signal.SIGUSR1)
    time.sleep(.5)
    LISTENER.hear(lambda number: (print("heard", number, flush=True), os._exit(0)))
print("here", flush=True)
hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # minutes in one call, during which Python runs no handler
"""


@pytest.mark.parametrize(
    ("mode", "number", "code", "said"),
    [
        ("early", signal.SIGINT, 3, "stopped by SIGINT; the same command goes on"),
        ("early", signal.SIGHUP, 3, "stopped by SIGHUP; the same command goes on"),
        ("hears", signal.SIGTERM, 0, "heard 15"),
        ("later", None, 0, f"heard {int(signal.SIGUSR1)}"),
    ],
)
def test_a_signal_is_heard_whatever_the_main_thread_does(mode, number, code, said):
    process = subprocess.Popen([sys.executable, "-c", ASKED, mode], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    if number is not None:
        assert process.stdout.readline() == "here\n"
        process.send_signal(number)
    output = process.communicate(timeout=60)[0]
    assert (process.returncode, output.splitlines()[-1]) == (code, said)


def test_what_was_ignored_stays_ignored_and_handlers_come_back():
    before = {number: signal.getsignal(number) for number in REQUESTS}
    listener = Listener()
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup
    try:
        assert listener.start()
        assert not listener.start()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGTERM) is not before[signal.SIGTERM]
    finally:
        listener.stop()
        signal.signal(signal.SIGHUP, before[signal.SIGHUP])
    assert {number: signal.getsignal(number) for number in REQUESTS} == before

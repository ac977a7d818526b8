"""Signals and time limits: which end counts, what a second signal does."""

from typing import Any

import pytest

from hybrid_scale.config import TrainingSettings
from hybrid_scale.errors import ConfigError
from hybrid_scale.train.stop import SAME_REQUEST_SECONDS, Agreed, StopRequest, deadline


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


def test_the_time_limit_is_a_stop_request(monkeypatch):
    stop = StopRequest(at=1000.0)
    monkeypatch.setattr("time.time", lambda: 999.0)
    assert stop.agreed() is Agreed.GO_ON
    monkeypatch.setattr("time.time", lambda: 1000.0)
    assert stop.agreed() is Agreed.STOP
    assert stop.reason() == "time limit"


def test_the_second_signal_ends_at_once_but_an_echo_doesnt(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    stop = StopRequest()
    stop._remember(15, None)
    assert stop.reason() == "SIGTERM"
    now[0] += SAME_REQUEST_SECONDS
    stop._remember(15, None)
    now[0] += 0.1
    with pytest.raises(SystemExit) as caught:
        stop._remember(15, None)
    assert caught.value.code == 143

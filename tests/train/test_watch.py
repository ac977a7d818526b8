"""Who is named as lost, and when: tick by tick on notes written by hand, then in real processes that hang, stop and fail.

Wording and counts are tested without a clock. The processes are only asked whether the right rank was named by another one: on a
busy machine a rank that stands still may be noticed by its silence or by its phase.
"""

import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from hybrid_scale import dist
from hybrid_scale.runs import write_text
from hybrid_scale.train.watch import DEAD_TICKS, EXIT_CODE, FAILED_TICKS, Watch
from tests.ranks import RanksFailed, run_ranks

MOST = 20
"""Ticks in `training.rank_timeout_seconds`, in a small world."""


def note(beat: int, step: int = 7, phase: str = "gradient", failure: str = "") -> dict[str, Any]:
    return {"beat": beat, "step": step, "phase": phase, "failure": failure, "host": "h"}


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    """Rank 0 of three, with a limit of 40 s, 2 s a tick, after a first tick at which all were well."""
    monkeypatch.setattr(dist, "world_size", lambda: 3)
    made = Watch(40.0, lambda *_: None)
    assert made.timeout / made.interval == MOST
    tick(made, [note(0)] * 3)
    return made


def tick(watch: Watch, notes: list[dict[str, Any]] | None) -> str | None:
    watch._fetched = notes
    watch._count()
    return watch._verdict()


def verdicts(watch: Watch, ticks: int, of_rank: dict[int, Any]) -> list[str | None]:
    """`ticks` ticks; ranks in `of_rank` write what that gives for the tick's number, the others live and go on."""
    found = []
    for beat in range(1, ticks + 1):
        notes = [of_rank[rank](beat) if rank in of_rank else note(beat, step=7 + beat) for rank in range(3)]
        found.append(tick(watch, notes))
    return found


def first(found: list[str | None]) -> tuple[int, str]:
    """The tick at which a verdict came, from 1, and its words."""
    number = next(n for n, said in enumerate(found, start=1) if said)
    said = found[number - 1]
    assert said is not None
    return number, said


def test_a_silent_rank_is_named_after_the_limit(watch):
    said = "rank 2 (host h) has not been heard of for 40 s, last step 7"
    assert first(verdicts(watch, MOST + 3, {2: lambda _: note(0)})) == (MOST, said)


def test_a_rank_that_is_heard_again_in_time_is_not(watch):
    assert not any(verdicts(watch, 3 * MOST, {2: lambda beat: note(beat // (MOST - 1), step=beat // (MOST - 1))}))


def test_a_rank_that_lives_but_stands_in_a_phase_is_named(watch):
    number, said = first(verdicts(watch, MOST + 3, {1: lambda beat: note(beat, phase="data")}))
    assert number == MOST + 1  # it came to this phase in the first tick
    assert said.startswith("rank 1 (host h): step 7 has been in its phase 'data' for 40 s; raise training.rank_timeout_seconds")


@pytest.mark.parametrize("phase", ["loading", "checkpoint", "evaluation"])
def test_phases_that_may_last_have_no_limit(watch, phase):
    assert not any(verdicts(watch, 3 * MOST, {1: lambda beat: note(beat, phase=phase)}))


def test_a_rank_that_is_behind_itself_lets_the_others_speak_first(watch):
    """All three stand still: rank 0 is one of those behind."""
    stand = dict.fromkeys(range(3), lambda beat: note(beat, phase="data"))
    number, said = first(verdicts(watch, MOST + DEAD_TICKS + 3, stand))
    assert number == MOST + 1 + DEAD_TICKS
    assert said.startswith("rank 0 (host h), rank 1 (host h), rank 2 (host h): step 7")


def test_a_rank_that_failed_has_time_to_end_itself(watch):
    failing = {1: lambda beat: note(beat, failure="ValueError: no")}
    assert first(verdicts(watch, MOST, failing)) == (FAILED_TICKS + 1, "rank 1 (host h) failed: ValueError: no")


def test_ticks_without_news_count_for_the_store_alone(watch):
    """A watch that learns nothing accuses no rank; after the limit it names the one that keeps the store."""
    found = [tick(watch, None) for _ in range(MOST)]
    assert found[:-1] == [None] * (MOST - 1)
    assert found[-1] == "rank 0 (host h) or the store that it keeps has not been heard of for 40 s, last step 7"
    assert watch.silent == watch.still == [0] * 3


def test_a_store_whose_process_has_ended_is_given_up_soon(watch):
    watch.refused = True
    assert first([tick(watch, None) for _ in range(MOST)])[0] == FAILED_TICKS


def test_the_lowest_living_rank_writes(watch, monkeypatch):
    monkeypatch.setattr(dist, "rank", lambda: 2)
    assert not watch.writes()
    watch.silent = [DEAD_TICKS, 0, 0]
    assert not watch.writes()
    watch.known[1] = note(0, failure="no")
    assert watch.writes()


# ---------------------------------------------------------------------------------------------------------- real processes


def watched(how: str, folder: str) -> None:
    """Two ranks; one does `how`, the other waits for it in a collective for good, as the trainer does."""
    dist.start()
    out = Path(folder) / f"rank{dist.rank()}"

    def ending(reason: str, writes: bool) -> None:  # from the watch's thread, or this one
        write_text(out, f"{writes} {reason}")

    lost = dist.rank() == (0 if how == "stop 0" else 1)
    watch = Watch(3.0, ending)
    if lost:  # judges nobody: the other one may have to wait for this machine for longer than 3 s
        watch.timeout = 3600
    watch.start()
    watch.at(7, "data")
    dist.barrier()
    try:
        if lost:
            if how.startswith("stop"):
                while any(other.get("step") != 7 for other in watch.known):
                    time.sleep(0.01)
                os.kill(os.getpid(), signal.SIGSTOP)
            if how == "fail":
                watch.explain(ValueError("its own error"))
            time.sleep(3600)
        watch.at(7, "gradient")
        dist.barrier()
    except RuntimeError as error:  # the other one has gone first
        if lost := watch.explain(error):
            ending(f"RankLost: {lost}", watch.writes())
            os._exit(EXIT_CODE)
        raise


@pytest.mark.parametrize(("how", "lost"), [("stop 0", 0), ("stop 1", 1), ("hang", 1), ("fail", 1)])
def test_the_other_rank_ends_and_names_the_lost_one(tmp_path, how, lost):
    with pytest.raises(RanksFailed, match="exit code 4"):
        run_ranks(watched, 2, how, str(tmp_path), patience=1)
    said = (tmp_path / f"rank{1 - lost}").read_text()
    by_silence, by_phase = rf"True RankLost: rank {lost} \(host \S+\)", rf"False RankLost: rank {lost} \(host \S+\): step 7 has"
    assert re.match(f"{by_silence}|{by_phase}", said), said  # one that stands in a phase may still write for itself

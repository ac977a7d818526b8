"""The helper of the distributed tests: results in order, tracebacks of the failing rank, dead and hanging ranks."""

import os
import time

import pytest

from hybrid_scale import dist
from tests.ranks import RanksFailed, run_ranks


def who(offset: int) -> tuple[int, int, str]:
    dist.start()
    return dist.rank() + offset, dist.world_size(), os.environ["HS_WORD"]


def one_fails() -> None:
    dist.start()
    if dist.rank() == 1:
        raise KeyError("the cause")
    dist.barrier()


def one_dies() -> None:
    if os.environ["RANK"] == "1":
        os._exit(3)
    time.sleep(3600)


def sleeps_forever() -> None:
    time.sleep(3600)


def test_results_come_in_rank_order() -> None:
    assert run_ranks(who, 3, 10, environment={"HS_WORD": "hi"}) == [(10, 3, "hi"), (11, 3, "hi"), (12, 3, "hi")]


def test_the_failing_rank_is_named_with_its_traceback() -> None:
    with pytest.raises(RanksFailed, match=r"(?s)rank 1 failed:.*one_fails.*KeyError: 'the cause'"):
        run_ranks(one_fails, 2, patience=1)


def test_a_dead_rank_ends_the_run_before_its_limit() -> None:
    start = time.monotonic()
    with pytest.raises(RanksFailed, match="rank 1 died without a word, exit code 3"):
        run_ranks(one_dies, 2, timeout=3600, patience=1)
    assert time.monotonic() - start < 600


def test_a_hanging_rank_shows_its_stack() -> None:
    with pytest.raises(RanksFailed, match=r"(?s)rank 0 was still running after 1 s:.*sleeps_forever"):
        run_ranks(sleeps_forever, 1, timeout=1)

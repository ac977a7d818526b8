"""Collectives on several processes, against what one process would hold."""

import threading
import time

import numpy as np
import pytest
import torch

from hybrid_scale import dist
from hybrid_scale.errors import DataError, RunError
from tests.ranks import RanksFailed, run_ranks


def every_collective() -> dict[str, object]:
    dist.start()
    rank, world = dist.rank(), dist.world_size()
    mine = torch.full((rank, 2), float(rank))
    dist.barrier()
    joined = dist.join_rows(mine, world)
    return {
        "joined": joined.tolist(),
        "summed": dist.sum_rows(joined + rank).tolist(),
        "flags": dist.flags(rank == world - 1),
        "rows": dist.gather_rows(mine, list(range(world))).tolist(),
        "arrays": [array.tolist() for array in dist.gather_arrays(np.full(rank + 1, rank))],
        "sum": dist.sum_(torch.tensor([rank, 1])).tolist(),
        "sum_array": dist.sum_array(np.array([rank, 1])).tolist(),
        "max": dist.max_int(10 - rank),
        "first": dist.first_rank_does(lambda: f"rank {rank}"),
    }


@pytest.mark.parametrize("world", [1, 2, 4])
def test_collectives(world):
    results = run_ranks(every_collective, world)
    filled = [[float(r) if row < r else 0.0] * 2 for r in range(world) for row in range(world)]
    total = sum(range(world))
    common = {
        "joined": filled,
        "flags": [r == world - 1 for r in range(world)],
        "rows": [[float(r)] * 2 for r in range(world) for _ in range(r)],
        "arrays": [[r] * (r + 1) for r in range(world)],
        "sum": [sum(range(world)), world],
        "sum_array": [sum(range(world)), world],
        "max": 10,
        "first": "rank 0",
    }
    for rank, result in enumerate(results):
        own = filled[rank * world : (rank + 1) * world]
        assert result == {**common, "summed": [[world * cell + total for cell in row] for row in own]}


def broadcast_from_each() -> list[tuple[list[float], bool]]:
    """From every source in turn: what arrives, and whether it is in the tensor that was given."""
    dist.start()
    found = []
    for source in range(dist.world_size()):
        given = torch.tensor([dist.rank() + 1.0, -dist.rank()])
        found.append((given.tolist(), dist.broadcast_(given, source) is given))
        found[-1] = (given.tolist(), found[-1][1])
    return found


@pytest.mark.parametrize("world", [1, 3])
def test_broadcast(world):
    expected = [([source + 1.0, -source], True) for source in range(world)]
    assert run_ranks(broadcast_from_each, world) == [expected] * world


def gather_beside_a_busy_world(rounds: int) -> list[list[list[float]]]:
    """A thread gathers over the side group while this one sums over the world all the time, ranks out of step on purpose."""
    dist.start()
    side, gathered = dist.SideGroup(), []

    def beside() -> None:
        for number in range(rounds):
            time.sleep(0.002 * (dist.rank() + number) % 0.005)
            rows = side.gather(torch.tensor([float(dist.rank()), float(number)]))
            gathered.append([] if rows is None else rows.tolist())

    thread = threading.Thread(target=beside)
    thread.start()
    for number in range(10 * rounds):
        assert dist.max_int(dist.rank() + number) == dist.world_size() - 1 + number
    thread.join()
    return gathered


@pytest.mark.parametrize("world", [1, 3])
def test_a_thread_gathers_beside_the_training(world):
    first, *others = run_ranks(gather_beside_a_busy_world, world, 20)
    assert first == [[[float(rank), float(number)] for rank in range(world)] for number in range(20)]
    assert others == [[[]] * 20] * (world - 1)


def first_rank_fails() -> str:
    dist.start()

    def action() -> None:
        raise DataError("the file is gone")

    try:
        dist.first_rank_does(action)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing raised"


def test_a_failure_of_the_first_rank_reaches_all():
    own, others = "DataError: the file is gone", "RunError: rank 0 failed: DataError: the file is gone"
    assert run_ranks(first_rank_fails, 3) == [own, others, others]


def disagree() -> None:
    dist.start()
    dist.agree("the seed", 7)
    dist.agree("the batch", dist.rank())


def test_disagreement_is_an_error_on_every_rank():
    with pytest.raises(RanksFailed) as caught:
        run_ranks(disagree, 2)
    assert str(caught.value).count("RunError: the batch differs between ranks: rank 0: 0, rank 1: 1.") == 2


def start_only() -> None:
    dist.start()


def test_another_world_than_expected_is_refused():
    with pytest.raises(RanksFailed, match="HS_EXPECT_WORLD: 5 ranks were asked for, 2 joined"):
        run_ranks(start_only, 2, environment={"HS_EXPECT_WORLD": "5"})


def test_without_a_launcher_the_world_is_one(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    dist.start()
    assert (dist.rank(), dist.world_size()) == (0, 1)
    monkeypatch.setenv("HS_EXPECT_WORLD", "2")
    with pytest.raises(RunError, match="HS_EXPECT_WORLD"):
        dist.start()

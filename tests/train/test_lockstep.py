"""Random batches through the plan and the distributed step on real processes: ranks never wait for one another in vain.

The engine here is an embedding table whose every call is a collective, as under ZeRO-3: one call too many or too few on a
rank would hang the run (and end it at the time limit). Its gradient must be that of one process.
"""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hybrid_scale import dist
from hybrid_scale.config import LossSettings
from hybrid_scale.data.partition import Budget, Plan, partition
from hybrid_scale.train.gradcache import Share, forward_backward
from hybrid_scale.train.loss import Targets
from tests.ranks import run_ranks

VOCABULARY, SIZE = 50, 8
LOSS = LossSettings(temperature=0.1)


class Table:
    """An engine: the mean of a text's token vectors. Counts its calls, and does a collective in each."""

    def __init__(self) -> None:
        self.weight = torch.randn(VOCABULARY, SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        self.weight.requires_grad_()
        self.trained = {"weight": self.weight}
        self.calls = 0

    def _together(self) -> None:
        self.calls += 1
        assert float(dist.sum_(torch.tensor(float(self.calls)))) == self.calls * dist.world_size()

    def embed(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        self._together()
        parts = batch["input_ids"][0].split(batch["lengths"].tolist())
        return torch.nn.functional.normalize(torch.stack([self.weight[part].mean(0) for part in parts]), dim=-1)

    def backward(self, surrogate: torch.Tensor, last: bool) -> None:
        self._together()
        surrogate.backward()
        if last:
            assert self.weight.grad is not None
            dist.sum_(self.weight.grad).div_(dist.world_size())


def make_batch(seed: int, pools: list[int]) -> tuple[list[list[int]], Targets]:
    """Token lists and targets: pool p has pools[p] rows, each its own query; passages are shared between pools at random."""
    rng = np.random.default_rng(seed)
    rows = sum(pools)
    passages = int(rng.integers(max(pools), rows + 1))
    columns = [rng.permutation(passages)[:count] for count in pools]
    texts = [rng.integers(0, VOCABULARY, rng.integers(1, 40)).tolist() for _ in range(rows + passages)]
    offsets = np.concatenate([[0], np.cumsum(pools)]).tolist()
    column_text = torch.from_numpy(np.concatenate(columns)) + rows
    place = torch.arange(rows)
    return texts, Targets(offsets, offsets, place, place, place, column_text, place, torch.zeros(rows, dtype=torch.bool))


def collate(texts: list[list[int]]) -> dict[str, torch.Tensor]:
    texts = texts or [[0]]
    flat = [token for text in texts for token in text]
    return {"input_ids": torch.tensor(flat)[None], "lengths": torch.tensor([len(text) for text in texts])}


def make_share(plan: Plan, texts: list[list[int]]) -> Share:
    mine = plan.micro_batches[dist.rank()]
    joined = [np.concatenate(mine[rounds.start : rounds.stop]) for rounds in plan.embedding_batches]
    return Share(
        *([collate([texts[t] for t in batch]) for batch in mine], [len(batch) for batch in mine]),
        *([collate([texts[t] for t in batch]) for batch in joined], [len(batch) for batch in joined]),
    )


def run_cases(cases: list[tuple[int, list[int], Budget]]) -> list[tuple[float, np.ndarray]]:
    dist.start(timeout_seconds=300)
    results = []
    for seed, pools, budget in cases:
        texts, targets = make_batch(seed, pools)
        plan = partition(np.array([len(text) for text in texts]), dist.world_size(), budget)
        engine: Any = Table()
        loss = forward_backward(engine, make_share(plan, texts), plan, targets, LOSS)
        results.append((loss, engine.weight.grad.numpy().copy()))
    return results


def dense(seed: int, pools: list[int]) -> tuple[float, np.ndarray]:
    """The same on one process, row by row."""
    texts, targets = make_batch(seed, pools)
    weight = Table().weight
    vectors = torch.nn.functional.normalize(torch.stack([weight[torch.tensor(text)].mean(0) for text in texts]), dim=-1)
    total = torch.zeros((), dtype=torch.float64)
    for start, end in pairwise(targets.row_offsets):
        scores = vectors[targets.row_text[start:end]] @ vectors[targets.column_text[start:end]].T / LOSS.temperature
        total = total + torch.nn.functional.cross_entropy(scores, torch.arange(end - start), reduction="sum")
    loss = total / len(targets.row_text)
    loss.backward()
    assert weight.grad is not None
    return float(loss.detach()), weight.grad.numpy()


CASES = st.lists(
    st.tuples(
        st.integers(0, 10_000),
        st.lists(st.integers(1, 6), min_size=1, max_size=4),
        st.builds(
            Budget,
            micro_batch=st.integers(40, 300),
            kept=st.sampled_from([0, 60, 200, 10_000]),
            embedding=st.sampled_from([None, 100, 1000]),
            packed=st.booleans(),
        ),
    ),
    min_size=5,
    max_size=25,
)


@pytest.mark.parametrize("world", [2, 3, 4])
@settings(max_examples=3, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(cases=CASES)
def test_ranks_never_deadlock(world, cases):
    """Also with more ranks than texts: a batch of one pair has two."""
    cases = [*cases, (1, [1], Budget(micro_batch=40, kept=0)), (2, [1], Budget(micro_batch=40, kept=40))]
    for results in run_ranks(run_cases, world, cases):
        for (loss, gradient), (seed, pools, _) in zip(results, cases, strict=True):
            expected_loss, expected = dense(seed, pools)
            assert loss == pytest.approx(expected_loss, abs=1e-12)
            np.testing.assert_allclose(gradient, expected, atol=1e-12)

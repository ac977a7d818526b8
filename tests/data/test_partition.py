"""The plan against its invariants over many random lengths and worlds, and against counting by hand."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid_scale.data.partition import ROUND_TOKENS, Budget, Plan, partition
from hybrid_scale.errors import ConfigError

LENGTHS = st.lists(st.integers(1, 64), min_size=1, max_size=200)


def executed(lengths: np.ndarray, texts: np.ndarray, packed: bool) -> int:
    if not len(texts):
        return 0
    return int(lengths[texts].sum()) if packed else len(texts) * int(lengths[texts].max())


@settings(max_examples=300, deadline=None)
@given(
    lengths=LENGTHS,
    world=st.integers(1, 9),
    micro_batch=st.integers(64, 700),
    kept=st.sampled_from([0, 64, 200, 1000, 100_000]),
    embedding=st.sampled_from([None, 64, 500, 3000]),
    packed=st.booleans(),
    quadratic=st.sampled_from([0.0, 1e-4, 1e-2]),
    length_tokens=st.sampled_from([0.0, 4.0, 1e6]),
)
def test_invariants(lengths, world, micro_batch, kept, embedding, packed, quadratic, length_tokens):
    lengths = np.array(lengths)
    plan = partition(lengths, world, Budget(micro_batch, kept, embedding, packed, quadratic, length_tokens))
    assert len(plan.micro_batches) == world
    assert {len(rank) for rank in plan.micro_batches} == {plan.rounds}
    order = [text for rank in plan.micro_batches for batch in rank for text in batch.tolist()]
    assert sorted(order) == list(range(len(lengths)))
    assert sum(plan.counts) == len(lengths)
    costs = [[executed(lengths, batch, packed) for batch in rank] for rank in plan.micro_batches]
    assert plan.executed.tolist() == costs
    assert max(map(max, costs)) <= micro_batch
    assert plan.padded_tokens == sum(map(sum, costs))
    assert plan.real_tokens <= plan.padded_tokens <= plan.lockstep_tokens
    assert plan.lockstep_tokens == world * sum(max(round_) for round_ in zip(*costs, strict=True))
    for rank in plan.micro_batches:
        for batch in rank:
            assert (np.diff(lengths[batch]) <= 0).all()
    check_schedule(plan, lengths, costs, kept, embedding)
    check_positions(plan)


def check_schedule(plan: Plan, lengths: np.ndarray, costs: list[list[int]], kept: int, embedding: int | None) -> None:
    """As many graphs kept as fit, not one more; the rest grouped in order, no group over its budget unless it is alone."""
    slowest = [max(round_) for round_ in zip(*costs, strict=True)]
    assert sum(slowest[: plan.kept]) <= kept
    assert plan.kept == plan.rounds or kept == 0 or sum(slowest[: plan.kept + 1]) > kept
    assert [j for group in plan.embedding_batches for j in group] == list(range(plan.kept, plan.rounds))
    for group in plan.embedding_batches:
        if len(group) > 1:
            assert embedding is not None
            joined = [np.concatenate([rank[j] for j in group]) for rank in plan.micro_batches]
            together = max(executed(lengths, texts, plan.packed) for texts in joined)
            assert together <= embedding
            assert together <= sum(slowest[j] for j in group) + (len(group) - 1) * ROUND_TOKENS
    assert plan.schedule == ("direct" if plan.kept == plan.rounds else "kept" if plan.kept else "two_pass")
    assert plan.recomputed_tokens == sum(sum(rank[plan.kept :]) for rank in costs)


def check_positions(plan: Plan) -> None:
    """Ranks' embeddings, each filled up to the largest count and joined, hold text t in row positions[t]."""
    most = max(plan.counts)
    joined = np.full(most * plan.world, -1)
    for rank, batches in enumerate(plan.micro_batches):
        mine = np.concatenate(batches)
        joined[rank * most : rank * most + len(mine)] = mine
    assert joined[plan.positions].tolist() == list(range(len(plan.lengths)))


@settings(max_examples=100, deadline=None)
@given(lengths=LENGTHS, world=st.integers(1, 9), micro_batch=st.integers(64, 700))
def test_packed_ranks_are_balanced(lengths, world, micro_batch):
    """LPT: a bin exceeds the mean by less than the text that was put there last, so by less than the longest text."""
    lengths = np.array(lengths)
    plan = partition(lengths, world, Budget(micro_batch))
    mean = lengths.sum() / (world * plan.rounds)
    assert plan.executed.max() < mean + lengths.max()


def test_hand_worked_packed_plan():
    """Lengths 5 4 3 3 2 1 on 2 ranks: 9 tokens each, the longest texts dealt first."""
    plan = partition(np.array([3, 5, 1, 4, 3, 2]), 2, Budget(micro_batch=10, kept=9))
    assert [[batch.tolist() for batch in rank] for rank in plan.micro_batches] == [[[1, 4, 2]], [[3, 0, 5]]]
    assert plan.executed.tolist() == [[9], [9]]
    assert plan.schedule == "direct"
    assert partition(plan.lengths, 2, Budget(micro_batch=10, kept=8)).schedule == "two_pass"


def test_attention_counts_in_the_balance():
    """One text of 40 tokens and four of 10: equal tokens if attention is free, but not equal cost."""
    lengths = np.array([40, 10, 10, 10, 10])
    assert partition(lengths, 2, Budget(100)).counts == [1, 4]
    # cost of n tokens = n (1 + n / 10): 200 for the long one, 20 for each short one; of 60 more tokens it takes none
    plan = partition(np.array([40, *[10] * 10]), 2, Budget(200, quadratic=0.1))
    assert sorted(plan.executed.ravel().tolist()) == [40, 100]
    assert sorted(partition(np.array([40, *[10] * 10]), 2, Budget(200)).executed.ravel().tolist()) == [70, 70]


def lengths_in_a_micro_batch(plan: Plan) -> float:
    return float(np.mean([len(np.unique(plan.lengths[batch])) for rank in plan.micro_batches for batch in rank]))


def test_lengths_that_cost_a_call_each_are_kept_apart():
    """Ranks stay in step to 1 %, and a micro-batch of 512 tokens holds half as many lengths or fewer."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(np.log(60), 0.6, 1024).astype(int), 8, 256)
    mixed, layered = (partition(lengths, 2, Budget(512, length_tokens=cost)) for cost in (0.0, 4.0))
    assert lengths_in_a_micro_batch(layered) < 0.5 * lengths_in_a_micro_batch(mixed)
    assert layered.real_tokens / layered.lockstep_tokens > 0.99
    assert layered.rounds <= 1.15 * mixed.rounds


def test_hand_worked_layers():
    """8 7 | 6 5 | 3 3, 2 ranks, 11 tokens: two layers (8 + 5, 7 + 6 exceed 11), the second dealt to and fro."""
    plan = partition(np.array([8, 7, 6, 5, 3, 3]), 2, Budget(11, length_tokens=1e6))
    assert [[batch.tolist() for batch in rank] for rank in plan.micro_batches] == [[[0], [2, 5]], [[1], [3, 4]]]


def test_hand_worked_padded_plan():
    """Runs 10 | 6 6 | 4 4 4 | 3 3 cost 10, 12, 12 and 6: rounds of (12, 12) and (10, 6) take 22, in order of length 24."""
    plan = partition(np.array([10, 6, 6, 4, 4, 4, 3, 3]), 2, Budget(12, packed=False))
    assert [[batch.tolist() for batch in rank] for rank in plan.micro_batches] == [[[1, 2], [0]], [[3, 4, 5], [6, 7]]]
    assert plan.lockstep_tokens == 2 * 22


def test_padded_batches_are_joined_only_where_that_saves():
    """8 texts of 100 tokens in fours: joined they cost what they cost apart. A text of 700 beside them would pad them to 700."""
    budget = Budget(700, embedding=10_000, packed=False)
    alike = partition(np.full(8, 100), 1, Budget(400, embedding=10_000, packed=False))
    assert [list(group) for group in alike.embedding_batches] == [[0, 1]]
    mixed = partition(np.array([700, *[100] * 7]), 1, budget)
    assert [list(group) for group in mixed.embedding_batches] == [[0], [1]]


@pytest.mark.parametrize(
    ("world", "pairs", "packed", "goal"),
    [(8, 256, True, 0.98), (32, 64, True, 0.95), (8, 256, False, 0.98), (32, 64, False, 0.97)],
)
def test_lockstep_efficiency_on_a_realistic_batch(world, pairs, packed, goal):
    """Passages with XQuAD-R's lengths (mean 187, coefficient of variation .45, cut at 512)."""
    rng = np.random.default_rng(0)
    lengths = np.minimum(rng.gamma(1 / 0.45**2, 187 * 0.45**2, world * pairs).astype(int) + 1, 512)
    plan = partition(lengths, world, Budget(2048, packed=packed))
    assert plan.real_tokens / plan.lockstep_tokens > goal


def test_many_long_texts_need_a_micro_batch_each():
    plan = partition(np.full(100, 51), 4, Budget(100))
    assert plan.rounds == 25
    assert plan.executed.max() == 51


def test_a_text_over_the_budget_is_refused():
    with pytest.raises(ConfigError, match="a text has 65 tokens"):
        partition(np.array([3, 65]), 2, Budget(64))

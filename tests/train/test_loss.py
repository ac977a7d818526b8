"""The loss against plain cross entropy with autograd, row by row, against a numerical gradient, and against its own limits:
memory of a fresh process, counted operations, and every row on exactly one rank."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from hybrid_scale.config import LossSettings
from hybrid_scale.train.loss import Targets, contrastive_loss, share_rows

TEXTS = 14
ROWS = 7
MASKS = {"denominator": st.sampled_from(["in_batch", "hard_only"]), "margin": st.sampled_from([None, 0.05, 0.3])}


def random_targets(seed: int, consecutive: bool = False) -> Targets:
    """Two pools of 4 and 3 rows, 6 and 5 columns, some families shared, some columns hard, some texts used twice.

    `consecutive`: the passages of each pool are neighbours in the buffer; those of the second follow one of the first.
    """
    rng = np.random.default_rng(seed)
    return Targets(
        row_offsets=[0, 4, 7],
        column_offsets=[0, 6, 11],
        row_text=torch.from_numpy(rng.integers(0, TEXTS, 7)),
        row_column=torch.from_numpy(np.concatenate([rng.permutation(6)[:4], 6 + rng.permutation(5)[:3]])),
        row_family=torch.from_numpy(rng.integers(0, 5, 7)),
        column_text=torch.from_numpy(np.r_[3:9, 5:10] if consecutive else rng.integers(0, TEXTS, 11)),
        column_family=torch.from_numpy(rng.integers(0, 5, 11)),
        column_is_hard=torch.from_numpy(rng.random(11) < 0.5),
    )


def plain_targets(rows: list[int], columns: list[int]) -> Targets:
    """Pools of the given shapes; row i's positive is column i of its pool, no two families equal, no column hard.

    Texts: all queries, then all passages.
    """
    row_offsets, column_offsets = np.cumsum([0, *rows]), np.cumsum([0, *columns])
    positives = [np.arange(count) + start for count, start in zip(rows, column_offsets[:-1], strict=True)]
    return Targets(
        row_offsets=row_offsets.tolist(),
        column_offsets=column_offsets.tolist(),
        row_text=torch.arange(sum(rows)),
        row_column=torch.from_numpy(np.concatenate(positives)),
        row_family=torch.arange(sum(rows)),
        column_text=torch.arange(sum(rows), sum(rows) + sum(columns)),
        column_family=-1 - torch.arange(sum(columns)),
        column_is_hard=torch.zeros(sum(columns), dtype=torch.bool),
    )


def unit_vectors(seed: int, texts: int = TEXTS, size: int = 8) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(texts, size, generator=generator, dtype=torch.float64), dim=-1)


def reference(embeddings: torch.Tensor, targets: Targets, options: LossSettings) -> torch.Tensor:
    """One row and one column at a time, as the formula reads."""
    rows = targets.row_offsets[-1]
    total = embeddings.new_zeros(())
    for pool in range(2):
        columns = range(targets.column_offsets[pool], targets.column_offsets[pool + 1])
        for row in range(targets.row_offsets[pool], targets.row_offsets[pool + 1]):
            query = embeddings[targets.row_text[row]]
            positive = int(targets.row_column[row])
            score = {c: query @ embeddings[targets.column_text[c]] for c in columns}
            kept = [positive]
            for c in columns:
                same_family = targets.row_family[row] == targets.column_family[c]
                not_hard = options.denominator == "hard_only" and not targets.column_is_hard[c]
                margin = options.false_negative_margin
                too_close = margin is not None and score[c].detach() > score[positive].detach() + margin
                if c != positive and not (same_family or not_hard or too_close):
                    kept.append(c)
            logits = torch.stack([score[c] for c in kept]) / options.temperature
            total = total + torch.nn.functional.cross_entropy(logits[None], torch.tensor([0])) / rows
    return total


def reference_with_gradient(embeddings: torch.Tensor, targets: Targets, options: LossSettings) -> tuple[float, torch.Tensor]:
    leaf = embeddings.clone().requires_grad_()
    expected = reference(leaf, targets, options)
    return float(expected.detach()), torch.autograd.grad(expected, leaf)[0]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1000),
    consecutive=st.booleans(),
    **MASKS,
    max_logits=st.integers(1, 30),
    cut=st.integers(0, ROWS),
)
def test_equals_the_formula_row_by_row(
    seed: int, consecutive: bool, denominator: Literal["in_batch", "hard_only"], margin: float | None, max_logits: int, cut: int
) -> None:
    """max_logits 1 to 30 takes 1 to 4 of the 4 rows of 6 columns at once; below 6 a row exceeds it and is taken whole."""
    embeddings, targets = unit_vectors(seed), random_targets(seed, consecutive)
    options = LossSettings(temperature=0.1, denominator=denominator, false_negative_margin=margin, max_logits=max_logits)
    expected, expected_gradient = reference_with_gradient(embeddings, targets, options)
    given_embeddings = embeddings.clone().requires_grad_()
    parts = [contrastive_loss(given_embeddings, targets, rows, options) for rows in (range(0, cut), range(cut, ROWS))]
    assert sum(float(loss) for loss, _ in parts) == pytest.approx(expected, abs=1e-12)
    torch.testing.assert_close(parts[0][1] + parts[1][1], expected_gradient, atol=1e-12, rtol=0)
    assert torch.equal(given_embeddings.detach(), embeddings)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), **MASKS, max_logits=st.integers(1, 30))
def test_padded_buffer(seed: int, denominator: Literal["in_batch", "hard_only"], margin: float | None, max_logits: int) -> None:
    """Texts anywhere in a larger buffer; rows that no text names hold NaN and get gradient zero."""
    embeddings, targets = unit_vectors(seed), random_targets(seed)
    used = torch.unique(torch.cat([targets.row_text, targets.column_text]))
    place = torch.from_numpy(np.random.default_rng(seed).permutation(TEXTS + 9)[:TEXTS])
    buffer = torch.full((TEXTS + 9, 8), torch.nan, dtype=torch.float64)
    buffer[place[used]] = embeddings[used]
    moved = replace(targets, row_text=place[targets.row_text], column_text=place[targets.column_text])
    options = LossSettings(temperature=0.1, denominator=denominator, false_negative_margin=margin, max_logits=max_logits)
    expected, expected_gradient = reference_with_gradient(embeddings, targets, options)
    loss, gradient = contrastive_loss(buffer, moved, range(ROWS), options)
    assert float(loss) == pytest.approx(expected, abs=1e-12)
    assert gradient.shape == buffer.shape
    torch.testing.assert_close(gradient[place], expected_gradient, atol=1e-12, rtol=0)
    gradient[place[used]] = 0.0
    assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("consecutive", [False, True])
def test_bfloat16_equals_float32_of_the_rounded_embeddings(consecutive: bool) -> None:
    rounded, options = unit_vectors(5).bfloat16(), LossSettings(temperature=0.05, max_logits=12)
    targets = random_targets(5, consecutive)
    loss, gradient = contrastive_loss(rounded, targets, range(ROWS), options)
    expected, expected_gradient = contrastive_loss(rounded.float(), targets, range(ROWS), options)
    assert loss.dtype == gradient.dtype == expected_gradient.dtype == torch.float32
    torch.testing.assert_close(loss, expected, atol=0, rtol=1e-6)
    torch.testing.assert_close(gradient, expected_gradient, atol=1e-6, rtol=1e-6)
    exact, exact_gradient = reference_with_gradient(rounded.double(), targets, options)
    assert float(loss) == pytest.approx(exact, rel=1e-5)
    torch.testing.assert_close(gradient.double(), exact_gradient, atol=1e-5, rtol=0)


@pytest.mark.parametrize("cosine", [-1.0, 1.0])
def test_scores_far_beyond_exp(cosine: float) -> None:
    """Logits of +-2000 in float32 (exp ends at 88). The positive is the worst or the best: loss 4000 or 0, no NaN."""
    embeddings = torch.tensor([[1.0, 0.0], [cosine, 0.0], [-cosine, 0.0]])
    loss, gradient = contrastive_loss(embeddings, plain_targets([1], [2]), range(1), LossSettings(temperature=5e-4))
    worst = cosine < 0
    assert float(loss) == pytest.approx(4000.0 if worst else 0.0, abs=1e-2)
    expected = torch.tensor([[4000.0, 0.0], [-2000.0, 0.0], [2000.0, 0.0]]) if worst else torch.zeros(3, 2)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=0)


def test_easy_row_keeps_its_gradient_in_float32() -> None:
    """The negatives' probability is 2 * exp(-18) = 3e-8, less than float32 resolves beside 1: softmax - 1 would be 0."""
    embeddings = torch.tensor([[1.0, 0.0], [0.9, 0.0], [0.0, 0.0], [0.0, 1.0]])
    targets, options = plain_targets([1], [3]), LossSettings(temperature=0.05)
    _, gradient = contrastive_loss(embeddings, targets, range(1), options)
    to_positive = -2 * np.exp(-18.0) / (1 + 2 * np.exp(-18.0)) / 0.05
    np.testing.assert_allclose(gradient[1].numpy(), [to_positive, 0.0], rtol=1e-5)


def test_gradient_equals_finite_differences() -> None:
    torch.manual_seed(0)
    embeddings = torch.randn(TEXTS, 4, dtype=torch.float64)
    targets, options = random_targets(3), LossSettings(temperature=0.5)
    _, gradient = contrastive_loss(embeddings, targets, range(ROWS), options)
    numeric = torch.zeros_like(embeddings)
    for index in np.ndindex(*embeddings.shape):
        for sign in (1, -1):
            moved = embeddings.clone()
            moved[index] += sign * 1e-6
            numeric[index] += sign * contrastive_loss(moved, targets, range(ROWS), options)[0] / 2e-6
    torch.testing.assert_close(gradient, numeric, atol=1e-8, rtol=1e-6)


def test_hand_worked_value() -> None:
    """One pool, two rows, orthogonal unit vectors, t = 1: each row's loss is log(1 + e^-1)."""
    embeddings = torch.eye(2).repeat(2, 1)
    targets = Targets(
        [0, 2], [0, 2], torch.tensor([0, 1]), torch.tensor([0, 1]), torch.tensor([0, 1]), torch.tensor([2, 3]),
        torch.tensor([0, 1]), torch.tensor([False, False]),
    )  # fmt: skip
    loss, _ = contrastive_loss(embeddings, targets, range(2), LossSettings(temperature=1.0))
    assert float(loss) == pytest.approx(np.log(1 + np.exp(-1)), abs=1e-7)


@pytest.mark.parametrize("max_logits", [1, 100, 10_000])
def test_operations_are_those_of_the_blocks(max_logits: int) -> None:
    """Three products of 2 r c D operations for each pool, none between pools, none for rows that weren't asked for."""
    size, rows, columns = 16, [8, 1, 20, 5], [8, 9, 31, 5]
    targets, embeddings = plain_targets(rows, columns), torch.randn(sum(rows) + sum(columns), size)
    options = LossSettings(max_logits=max_logits)
    for asked, scores in ((range(34), 8 * 8 + 1 * 9 + 20 * 31 + 5 * 5), (range(6, 12), 2 * 8 + 1 * 9 + 3 * 31), (range(4, 4), 0)):
        with FlopCounterMode(display=False) as counted:
            contrastive_loss(embeddings, targets, asked, options)
        assert counted.get_total_flops() == 6 * scores * size


shapes = st.lists(st.tuples(st.integers(1, 30), st.integers(0, 40)), min_size=1, max_size=8)


@settings(max_examples=200, deadline=None)
@given(shapes=shapes, world=st.integers(1, 80))
def test_ranks_share_out_the_scores(shapes: list[tuple[int, int]], world: int) -> None:
    """Every row once, in order, and no rank further than one row from its even share of the scores."""
    rows, columns = [rows for rows, _ in shapes], [rows + more for rows, more in shapes]
    targets = plain_targets(rows, columns)
    shares = [share_rows(targets, rank, world) for rank in range(world)]
    assert [row for share in shares for row in share] == list(range(sum(rows)))
    cost = np.repeat(columns, rows)
    for share in shares:
        assert abs(sum(cost[share.start : share.stop]) - cost.sum() / world) < max(columns)


def test_share_of_unequal_pools_by_hand() -> None:
    """6 rows of 10 columns and 20 rows of 2: 100 scores. Half of them is 5 rows of the first pool, not 13 rows."""
    targets = plain_targets([6, 2, 18], [10, 2, 18])
    targets = replace(targets, row_offsets=[0, 6, 26], column_offsets=[0, 10, 12])
    assert [share_rows(targets, rank, 2) for rank in range(2)] == [range(0, 5), range(5, 26)]
    assert [share_rows(targets, rank, 4) for rank in range(4)] == [range(0, 2), range(2, 5), range(5, 13), range(13, 26)]


def test_equal_pools_are_shared_by_rows() -> None:
    targets = plain_targets([8, 8, 8], [9, 9, 9])
    assert [share_rows(targets, rank, 6) for rank in range(6)] == [range(at, at + 4) for at in range(0, 24, 4)]


@pytest.mark.parametrize("world", [1, 2, 3, 7, 11])
def test_sum_over_ranks_is_the_whole(world: int) -> None:
    embeddings, targets, options = unit_vectors(2), random_targets(2), LossSettings(temperature=0.1, max_logits=12)
    expected, expected_gradient = reference_with_gradient(embeddings, targets, options)
    parts = [contrastive_loss(embeddings, targets, share_rows(targets, rank, world), options) for rank in range(world)]
    assert sum(float(loss) for loss, _ in parts) == pytest.approx(expected, abs=1e-12)
    torch.testing.assert_close(sum(gradient for _, gradient in parts), expected_gradient, atol=1e-12, rtol=0)


# VmHWM, not ru_maxrss: the latter survives exec and begins with the peak of the parent, here all of pytest.
PEAKS = """
import json, sys
from pathlib import Path
import torch
from hybrid_scale.config import LossSettings
from hybrid_scale.train.loss import Targets, contrastive_loss

def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(key)).split()[1])

size, dimension = int(sys.argv[1]), int(sys.argv[2])
order, own = torch.randperm(2 * size), torch.arange(size)
targets = Targets([0, size], [0, size], order[:size], own, own, order[size:], own, torch.zeros(size, dtype=torch.bool))
embeddings = torch.empty(2 * size, dimension).normal_(std=dimension**-0.5)
contrastive_loss(embeddings, targets, range(1), LossSettings())
before, peaks = status("VmRSS"), []
for rows, max_logits in json.loads(sys.argv[3]):
    contrastive_loss(embeddings, targets, range(rows), LossSettings(max_logits=max_logits))
    peaks.append(status("VmHWM") - before)
print(json.dumps(peaks))
"""


def test_memory_of_a_large_pool() -> None:
    """8,192 x 8,192, d = 256: 256 MiB of scores at once without chunks. 8 times `max_logits` breaks the bound."""
    size, dimension, max_logits = 8192, 256, 1 << 20
    cases = [(size, max_logits), (1024, 8 * max_logits)]
    # A fixed threshold makes every tensor a mapping of its own, returned when freed: glibc's moves up to 32 MiB and keeps them.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", PEAKS, str(size), str(dimension), json.dumps(cases)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    peak, peak_of_more = json.loads(done.stdout)
    gradient, passages, slack = 2 * size * dimension * 4, 2 * size * dimension * 4, 16 << 20
    bound = gradient + passages + 5 * max_logits + slack
    assert peak < bound < peak_of_more

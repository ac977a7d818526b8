"""The loss against plain cross entropy with autograd, row by row, and against a numerical gradient."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid_scale.config import LossSettings
from hybrid_scale.train.loss import Targets, contrastive_loss


def random_targets(seed: int, texts: int = 14) -> Targets:
    """Two pools of 4 and 3 rows, 6 and 5 columns, some families shared, some columns hard."""
    rng = np.random.default_rng(seed)
    return Targets(
        row_offsets=[0, 4, 7],
        column_offsets=[0, 6, 11],
        row_text=torch.from_numpy(rng.integers(0, texts, 7)),
        row_column=torch.from_numpy(np.concatenate([rng.permutation(6)[:4], 6 + rng.permutation(5)[:3]])),
        row_family=torch.from_numpy(rng.integers(0, 5, 7)),
        column_text=torch.from_numpy(rng.integers(0, texts, 11)),
        column_family=torch.from_numpy(rng.integers(0, 5, 11)),
        column_is_hard=torch.from_numpy(rng.random(11) < 0.5),
    )


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


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 1000),
    denominator=st.sampled_from(["in_batch", "hard_only"]),
    margin=st.sampled_from([None, 0.05, 0.3]),
    max_logits=st.integers(1, 48),
    cut=st.integers(0, 7),
)
def test_equals_the_formula_row_by_row(seed, denominator, margin, max_logits, cut):
    torch.manual_seed(seed)
    embeddings = torch.nn.functional.normalize(torch.randn(14, 8, dtype=torch.float64), dim=-1)
    targets = random_targets(seed)
    options = LossSettings(temperature=0.1, denominator=denominator, false_negative_margin=margin, max_logits=max_logits)
    leaf = embeddings.clone().requires_grad_()
    expected = reference(leaf, targets, options)
    expected_gradient = torch.autograd.grad(expected, leaf, allow_unused=True)[0]
    parts = [contrastive_loss(embeddings, targets, rows, options) for rows in (range(0, cut), range(cut, 7))]
    assert sum(float(loss) for loss, _ in parts) == pytest.approx(float(expected.detach()), abs=1e-12)
    torch.testing.assert_close(parts[0][1] + parts[1][1], expected_gradient, atol=1e-12, rtol=0)


def test_gradient_equals_finite_differences():
    torch.manual_seed(0)
    embeddings = torch.randn(14, 4, dtype=torch.float64)
    targets, options = random_targets(3), LossSettings(temperature=0.5)
    _, gradient = contrastive_loss(embeddings, targets, range(7), options)
    numeric = torch.zeros_like(embeddings)
    for index in np.ndindex(*embeddings.shape):
        for sign in (1, -1):
            moved = embeddings.clone()
            moved[index] += sign * 1e-6
            numeric[index] += sign * contrastive_loss(moved, targets, range(7), options)[0] / 2e-6
    torch.testing.assert_close(gradient, numeric, atol=1e-8, rtol=1e-6)


def test_hand_worked_value():
    """One pool, two rows, orthogonal unit vectors, t = 1: each row's loss is log(1 + e^-1)."""
    embeddings = torch.eye(2).repeat(2, 1)
    targets = Targets(
        [0, 2], [0, 2], torch.tensor([0, 1]), torch.tensor([0, 1]), torch.tensor([0, 1]), torch.tensor([2, 3]),
        torch.tensor([0, 1]), torch.tensor([False, False]),
    )  # fmt: skip
    loss, _ = contrastive_loss(embeddings, targets, range(2), LossSettings(temperature=1.0))
    assert float(loss) == pytest.approx(np.log(1 + np.exp(-1)), abs=1e-7)

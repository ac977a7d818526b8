"""One global batch -> the exact global gradient, accumulated in the engine. The optimiser step is not included.

Cached gradients (GradCache, 2101.06983) over ranks: embed without gradient, exchange embeddings, differentiate the loss
with respect to them, embed again and push the cached gradient through. Where a rank's whole share fits one micro-batch
the first pass keeps its graph and there is no second one.

This file holds the one factor W: the engine averages gradients over W ranks, the loss is already divided by the N rows
of the whole batch, so every surrogate is multiplied by W.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hybrid_scale import dist
from hybrid_scale.config import LossSettings
from hybrid_scale.data.partition import Plan
from hybrid_scale.train.engine import Engine
from hybrid_scale.train.loss import Targets, contrastive_loss

MicroBatch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Share:
    """What this rank embeds: its micro-batches in the plan's order, already on the device.

    A micro-batch without texts holds one dummy text that keeps the ranks' collectives in step.
    """

    micro_batches: Sequence[MicroBatch]
    counts: Sequence[int]
    """Real texts of each micro-batch."""


def forward_backward(engine: Engine, share: Share, plan: Plan, targets: Targets, settings: LossSettings, direct: bool) -> float:
    """Accumulate the gradient of the whole batch's loss; returns that loss, equal on every rank.

    `direct` needs a plan of one micro-batch a rank and saves the second pass.
    """
    if direct:
        local, states = [engine.embed(share.micro_batches[0])], None
    else:
        local, states = forward_no_grad(engine, share)
    embeddings = gather(local, share, plan)
    loss, cache = build_cache(embeddings, plan, targets, settings)
    push(engine, share, local, states, cache)
    return loss


def forward_no_grad(engine: Engine, share: Share) -> tuple[list[torch.Tensor], list[tuple[torch.Tensor, ...]]]:
    """First pass: embeddings of each micro-batch and the random state that each one started from (LoRA dropout)."""
    local, states = [], []
    with torch.no_grad():
        for micro_batch in share.micro_batches:
            states.append(_random_state())
            local.append(engine.embed(micro_batch))
    return local, states


def gather(local: Sequence[torch.Tensor], share: Share, plan: Plan) -> torch.Tensor:
    """This rank's embeddings -> those of the whole batch in text order, [T, D]."""
    mine = torch.cat([part.detach()[:count] for part, count in zip(local, share.counts, strict=True)])
    gathered = dist.gather_rows(mine, plan.counts)
    order = torch.from_numpy(plan.order).to(gathered.device)
    return torch.empty_like(gathered).index_copy_(0, order, gathered)


def build_cache(
    embeddings: torch.Tensor, plan: Plan, targets: Targets, settings: LossSettings
) -> tuple[float, list[torch.Tensor]]:
    """Loss of the batch and, for each micro-batch of this rank, the gradient of its embeddings."""
    rank, world = dist.rank(), dist.world_size()
    rows = targets.row_offsets[-1]
    loss, gradient = contrastive_loss(embeddings, targets, range(rows * rank // world, rows * (rank + 1) // world), settings)
    dist.sum_(loss)
    dist.sum_(gradient)
    mine = [torch.from_numpy(texts).to(gradient.device) for texts in plan.micro_batches[rank]]
    return float(loss), [gradient[texts] for texts in mine]


def push(
    engine: Engine,
    share: Share,
    local: Sequence[torch.Tensor],
    states: Sequence[tuple[torch.Tensor, ...]] | None,
    cache: Sequence[torch.Tensor],
) -> None:
    """Second pass: the cached gradients through the model, one backward a micro-batch, the last one closing the step."""
    after = _random_state()
    for number, (micro_batch, count, gradient) in enumerate(zip(share.micro_batches, share.counts, cache, strict=True)):
        if states is None:
            embedded = local[number]
        else:
            _set_random_state(states[number])
            embedded = engine.embed(micro_batch)
        surrogate = (embedded[:count] * gradient).sum() * dist.world_size() if count else (embedded * 0.0).sum()
        engine.backward(surrogate, last=number == len(share.micro_batches) - 1)
    _set_random_state(after)


def _random_state() -> tuple[torch.Tensor, ...]:
    cuda = (torch.cuda.get_rng_state(),) if torch.cuda.is_available() else ()
    return (torch.get_rng_state(), *cuda)


def _set_random_state(state: tuple[torch.Tensor, ...]) -> None:
    torch.set_rng_state(state[0])
    if len(state) > 1:
        torch.cuda.set_rng_state(state[1])

"""One global batch -> the exact global gradient, accumulated in the engine. The optimiser step is not included.

Texts of the plan's first `kept` micro-batches go through the model once and keep their graphs. The others follow cached
gradients (GradCache, 2101.06983): embedded without gradient, and once more, with it, when the loss's gradient is known.
`kept` = all is one plain pass ("direct"), `kept` = none is GradCache ("two_pass").

This file holds the one factor W: the engine averages gradients over W ranks, the loss is already divided by the N rows
of the whole batch, so every surrogate is multiplied by W.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Self

import torch

from hybrid_scale import dist, gpu
from hybrid_scale.config import LossSettings
from hybrid_scale.data.partition import Plan
from hybrid_scale.errors import RunError, describe
from hybrid_scale.train.engine import Engine
from hybrid_scale.train.loss import Targets, contrastive_loss, share_rows

MicroBatch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Share:
    """What this rank embeds, in the plan's order, already on the device.

    A micro-batch without texts holds one dummy text that keeps the ranks' collectives in step.
    """

    micro_batches: Sequence[MicroBatch]
    counts: Sequence[int]
    """Real texts of each micro-batch."""
    embedding_batches: Sequence[MicroBatch]
    """The micro-batches that are not kept, consecutive ones joined as the plan says, for the pass without gradients."""
    embedding_counts: Sequence[int]

    def to(self, device: torch.device) -> Self:
        """The same on `device`; text lengths stay on the CPU, where they are read."""
        micro_batches, embedding_batches = (
            [{name: t if name == "lengths" else t.to(device) for name, t in batch.items()} for batch in batches]
            for batches in (self.micro_batches, self.embedding_batches)
        )
        return replace(self, micro_batches=micro_batches, embedding_batches=embedding_batches)


@dataclass(frozen=True)
class Exchanged:
    """Every rank's embeddings, the same on all ranks: row `plan.positions[t]` is text t's."""

    plan: Plan
    rows: torch.Tensor

    def not_finite(self) -> list[int]:
        """Texts whose embedding holds a NaN or an infinity."""
        good = torch.isfinite(self.rows).all(dim=1)
        if bool(good.all()):
            return []
        return [text for text, at in enumerate(self.plan.positions.tolist()) if not good[at]]


class NotFinite(RunError):
    """Embeddings of some texts are not finite; raised on all ranks alike, before any gradient is computed."""

    def __init__(self, texts: list[int]):
        super().__init__(f"embeddings of {len(texts)} texts are not finite")
        self.texts = texts


def forward_backward(
    engine: Engine, share: Share, plan: Plan, targets: Targets, settings: LossSettings, offload: bool = False
) -> float:
    """Accumulate the gradient of the whole batch's loss; returns that loss, equal on every rank.

    `offload` holds what kept graphs save in host memory. Raises NotFinite, and RunError on a rank whose GPU's memory ran out.
    """
    with gpu.bounded_by("training.max_tokens_per_embedding_batch", "embedding without gradients"):
        embedded, states = embed_without_graphs(engine, share, plan)
    with gpu.bounded_by("training.max_kept_tokens or training.max_tokens_per_micro_batch", "embedding with gradients"):
        kept = embed_with_graphs(engine, share, plan, offload)
    exchanged = exchange(kept, embedded, share, plan, settings)
    if texts := exchanged.not_finite():
        raise NotFinite(texts)
    with gpu.bounded_by("loss.max_logits", "computing the loss"):
        loss, cache = build_cache(exchanged, share, targets, settings)
    with gpu.bounded_by("training.max_tokens_per_micro_batch", "computing gradients"):
        push(engine, share, kept, states, cache)
    return loss


def embed_without_graphs(engine: Engine, share: Share, plan: Plan) -> tuple[list[torch.Tensor], list[tuple[torch.Tensor, ...]]]:
    """Embeddings of what isn't kept, and the random state that each pass started from (LoRA dropout)."""
    embedded, states = [], []
    with torch.no_grad():
        for batch, count, rounds in zip(share.embedding_batches, share.embedding_counts, plan.embedding_batches, strict=True):
            before = _random_state()
            embedded.append(engine.embed(batch)[:count])
            if len(rounds) > 1 and not torch.equal(before[-1], _random_state()[-1]):
                rule = "the model drew random numbers in a joined pass, which can't be replayed"
                raise RunError(describe("model.base", "dropout", rule, "Set the dropout of its config.json to 0."))
            states.append(before)
    return embedded, states


def embed_with_graphs(engine: Engine, share: Share, plan: Plan, offload: bool) -> list[torch.Tensor]:
    """Embeddings of the kept micro-batches, with their graphs."""
    place: AbstractContextManager[None] = nullcontext()
    if offload:
        place = torch.autograd.graph.save_on_cpu(pin_memory=gpu.present())
    with place:
        return [engine.embed(batch) for batch in share.micro_batches[: plan.kept]]


def exchange(
    kept: Sequence[torch.Tensor], embedded: Sequence[torch.Tensor], share: Share, plan: Plan, settings: LossSettings
) -> Exchanged:
    """This rank's embeddings -> those of the whole batch, on every rank."""
    held = [part.detach()[:count] for part, count in zip(kept, share.counts[: plan.kept], strict=True)]
    mine = torch.cat([*held, *embedded])
    if settings.exchange == "bfloat16":
        mine = mine.bfloat16()
    return Exchanged(plan, dist.join_rows(mine, max(plan.counts)))


def build_cache(
    exchanged: Exchanged, share: Share, targets: Targets, settings: LossSettings
) -> tuple[float, Sequence[torch.Tensor]]:
    """Loss of the batch and, for each micro-batch of this rank, the gradient of its embeddings [n, D]."""
    positions = torch.from_numpy(exchanged.plan.positions).to(exchanged.rows.device)
    moved = replace(targets, row_text=positions[targets.row_text], column_text=positions[targets.column_text])
    rows = share_rows(targets, dist.rank(), dist.world_size())
    loss, gradient = contrastive_loss(exchanged.rows, moved, rows, settings)
    dist.sum_(loss)
    own = dist.sum_rows(gradient)[: sum(share.counts)]
    return float(loss), own.split(list(share.counts))


def push(
    engine: Engine,
    share: Share,
    kept: list[torch.Tensor],
    states: Sequence[tuple[torch.Tensor, ...]],
    cache: Sequence[torch.Tensor],
) -> None:
    """The cached gradients through the model: first the kept graphs, freed one by one, then the rest once more.

    One backward a micro-batch, the last one closing the step.
    """
    after = _random_state()
    first = len(kept)
    kept.reverse()
    for number, (batch, count, gradient) in enumerate(zip(share.micro_batches, share.counts, cache, strict=True)):
        if kept:
            embedded = kept.pop()
        else:
            if len(states) == len(share.micro_batches) - first:
                _set_random_state(states[number - first])
            embedded = engine.embed(batch)
        surrogate = (embedded[:count] * gradient).sum() * dist.world_size() if count else (embedded * 0.0).sum()
        engine.backward(surrogate, last=number == len(share.micro_batches) - 1)
        del embedded, surrogate
    _set_random_state(after)


def _random_state() -> tuple[torch.Tensor, ...]:
    """The CPU's random state and, where there is one, this rank's GPU's."""
    ours = gpu.random_state()
    return (torch.get_rng_state(),) if ours is None else (torch.get_rng_state(), ours)


def _set_random_state(state: tuple[torch.Tensor, ...]) -> None:
    torch.set_rng_state(state[0])
    gpu.set_random_state(state[1] if len(state) > 1 else None)

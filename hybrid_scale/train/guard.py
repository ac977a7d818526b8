"""Stops all ranks together, before an update, when a number is not finite or training does not train.

Knows parameters and flags; what to write about a failed step is the loop's business.
"""

from collections.abc import Mapping

import torch

from hybrid_scale import dist
from hybrid_scale.errors import RunError


class GradientGuard:
    """Watches the gradients of the trained parameters on this rank, before ranks sum theirs."""

    def __init__(self, trained: Mapping[str, torch.nn.Parameter]):
        self.names = list(trained)
        self.sums = torch.zeros(len(trained), device=dist.device())
        for number, parameter in enumerate(trained.values()):
            parameter.register_hook(self._adder(number))

    def _adder(self, number: int):  # type: ignore[no-untyped-def]
        def add(gradient: torch.Tensor) -> None:
            # A sum is finite unless a term isn't, and costs one pass; nothing is read back until `not_finite`.
            self.sums[number] += gradient.sum()

        return add

    def not_finite(self) -> dict[int, list[str]]:
        """Ranks whose gradients held a NaN or an infinity since the last call, and the parameters on this rank. Collective."""
        good = torch.isfinite(self.sums)
        mine = [] if bool(good.all()) else [name for name, fine in zip(self.names, good.tolist(), strict=True) if not fine]
        self.sums.zero_()
        raised = dist.flags(bool(mine))
        return {rank: mine if rank == dist.rank() else [] for rank, bad in enumerate(raised) if bad}


class MovementGuard:
    """Tells whether the first update changed the weights that the next forward pass will read."""

    def __init__(self, trained: Mapping[str, torch.nn.Parameter]):
        self.trained = trained
        self.before = [_held(parameter).clone() for parameter in trained.values()]

    def check(self) -> None:
        """Raises RunError on every rank when no trained weight moved on any rank. Collective."""
        pairs = zip(self.before, self.trained.values(), strict=True)
        moved = any(not torch.equal(before, _held(parameter)) for before, parameter in pairs)
        if not any(dist.flags(moved)):
            raise RunError(
                f"none of the {len(self.trained)} trained tensors moved in the first optimiser step with a positive learning "
                "rate: gradients don't reach the optimiser. Check training.engine and the DeepSpeed JSON."
            )


def _held(parameter: torch.nn.Parameter) -> torch.Tensor:
    """What this rank holds of a parameter: ZeRO-3's shard, or all of it."""
    return getattr(parameter, "ds_tensor", parameter).detach()

"""ZeRO-3's prefetching in every order of forward and backward passes. Knows no batch and no optimiser.

Uses private attributes of DeepSpeed 0.19.8, which is pinned for that; imports nothing of it.
"""

import copy
from typing import Any

import torch


class ShardedPasses:
    """Makes ZeRO-3 prefetch in every order of passes: no-gradient, gradient, several graphs kept, evaluation in between.

    DeepSpeed 0.19.8 records the order of modules from the start of one forward pass to the start of the next, prefetches along
    it, and drops it at the first module out of order. That holds for forward, backward, forward, backward alone: a forward
    pass without its backward makes the next backward drop the record, which then gathers weight by weight without prefetch.
    Here forward and backward passes have a record each, so that their sequence doesn't matter. Private attributes of
    DeepSpeed are used; it is pinned for that.
    """

    def __init__(self, zero: Any):
        self.offload = zero.parameter_offload
        self.persistent: list[Any] = zero.persistent_parameters
        zero.persistent_parameters = []  # gathered by `after_step`
        self.modules: list[Any] = list(self.offload.module.modules())
        self.open_inputs: dict[Any, int] = {}
        self.forward, self.backward = self._record(), self._record()
        for module in self.modules:
            if isinstance(module, torch.nn.Embedding) and not module.weight.requires_grad:
                # PEFT makes its output require a gradient: DeepSpeed would gather the weight in every backward, for nothing.
                module.pre_bwd_fn = _Unhooked  # type: ignore[assignment]

    def _record(self) -> Any:
        """DeepSpeed's coordinator with a record of its own; what is in flight and in use stays common to all."""
        coordinator = copy.copy(self.offload.param_coordinator)
        coordinator._clear_trace_structures()
        return coordinator

    def before_forward(self) -> None:
        self.offload.param_coordinator = self.forward  # which DeepSpeed's own hook then rewinds

    def after_forward(self) -> None:
        """After a pass with gradients: how many gradients each module's backward waits for, before it lets its weights go."""
        self.open_inputs = {module: module.ds_grads_remaining for module in self.modules if hasattr(module, "ds_grads_remaining")}

    def before_backward(self) -> None:
        """Rewind the backward record, and the counts: only the first of several kept graphs finds what its forward left."""
        self.offload.param_coordinator = self.backward
        self.backward.reset_step()
        for module, count in self.open_inputs.items():
            module.ds_grads_remaining = count

    def after_step(self) -> None:
        """Gather the parameters that stay whole on each rank, in one collective a type; DeepSpeed takes one a parameter."""
        # Under hpZ the frozen ones lie in the shard group, the trained ones in the world; a collective is for one of them.
        for in_group in (False, True):
            params = [p for p in self.persistent if (p.ds_secondary_tensor is not None) is in_group]
            if params:
                params[0].all_gather_coalesced(params).wait()


class _Unhooked:
    """Stands where DeepSpeed keeps the autograd function that gathers a module's weights for its backward."""

    @staticmethod
    def apply(output: torch.Tensor) -> torch.Tensor:
        return output

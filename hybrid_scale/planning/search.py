"""The fastest settings of one run that fit: tries token budgets, shard groups and checkpointing, those that are left open.

Forecasts come from `forecast`; which settings are open, the caller says. What changes a result of training is never tried.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, get_args

from hybrid_scale.config import RunConfig, TokenBudget
from hybrid_scale.planning.forecast import Forecaster, RunPlan

BUDGETS: tuple[TokenBudget, ...] = get_args(TokenBudget)
GRAIN = 256
"""Tokens by which the micro-batches that are tried differ."""
SMALL = 4096
"""Tokens below which published runs are slower than the formulas say (Qwen at 256 to 1,024: up to half): not chosen if there is
a choice."""
CAUTION = 0.93
"""Share of the usable memory that a choice may fill: published peaks lie up to 9.3 % above their predictions
(benchmarks/plan.py), and .97 x .93 x 1.093 is .99 of a GPU."""
SPREAD = 0.6
"""Of the lengths of a batch's texts, deviation over mean: .45 (English passages of XQuAD-R) to .69 (of 11 languages). A step's
tokens stay within four deviations of their sum."""


@dataclass(frozen=True)
class Search:
    """Plans of one run with the budgets in `open`, `places` (ZeRO stage and shard group) and `checkpointing` tried."""

    forecaster: Forecaster
    open: tuple[TokenBudget, ...]
    places: tuple[tuple[int, int], ...]
    checkpointing: tuple[bool, ...]

    @property
    def config(self) -> RunConfig:
        return self.forecaster.config

    @property
    def longest(self) -> int:
        """Tokens that a micro-batch must be able to hold: one text."""
        return max(self.config.data.max_query_tokens, self.config.data.max_passage_tokens)

    @property
    def most(self) -> int:
        """Tokens that a rank may come to execute in a step: more are of no use."""
        texts = self.config.sampler.global_batch * (2 + self.config.sampler.hard_negatives)
        most = self.forecaster.tokens(self.config) * (1 + max(0.02, 4 * SPREAD / math.sqrt(texts)))
        return max(math.ceil(most), self.longest)

    def best(self) -> RunPlan | None:
        """The fastest plan that fits; None: none does."""
        found = [self.forecaster.plan(*candidate) for candidate in self._candidates()]
        if self.config.training.passes == "direct":
            found = [plan for plan in found if plan.schedule == "direct"]
        large = [plan for plan in found if plan.config.training.max_tokens_per_micro_batch >= min(SMALL, plan.tokens)]
        return min(large or found, key=lambda plan: (plan.seconds.total, plan.group, plan.memory), default=None)

    def least(self) -> RunPlan:
        """The plan that needs the least memory, whether it fits or not; with `passes: direct` all graphs are kept."""
        kept = self.most if self.config.training.passes == "direct" else None
        settings = [self._with(self.longest, kept, self.longest, checkpointing) for checkpointing in self.checkpointing]
        plans = [self.forecaster.plan(config, *place) for config in settings for place in self.places]
        return min(plans, key=lambda plan: plan.memory)

    def _candidates(self) -> Iterator[tuple[RunConfig, int, int]]:
        """Large and smaller micro-batches, the rest of the memory kept, passes without gradients as wide as still fits."""
        for stage, group in self.places:
            for checkpointing in self.checkpointing:
                for size in self._micro_batches(stage, group, checkpointing):
                    kept = self._kept(size, stage, group, checkpointing)
                    if kept != 0:
                        yield self._widest(size, kept, checkpointing, stage, group), stage, group

    def _micro_batches(self, stage: int, group: int, checkpointing: bool) -> list[int]:
        if "max_tokens_per_micro_batch" not in self.open:
            return [self.config.training.max_tokens_per_micro_batch]
        most = self._largest(lambda size: self._with(size, None, size, checkpointing), stage, group, self.longest)
        return sorted({most, *(size for size in (16384, 8192, 4096) if self.longest <= size < most)} - {0})

    def _kept(self, size: int, stage: int, group: int, checkpointing: bool) -> int | None:
        """Tokens whose graphs are kept beside micro-batches of `size`; 0: not even this micro-batch fits; None: its own alone."""
        given = self._with(size, None, size, checkpointing)
        if "max_kept_tokens" not in self.open or self.config.training.passes == "two_pass":
            return given.training.max_kept_tokens if self._fits(given, stage, group) else 0
        return self._largest(lambda kept: self._with(size, kept, size, checkpointing), stage, group, size)

    def _widest(self, size: int, kept: int | None, checkpointing: bool, stage: int, group: int) -> RunConfig:
        """Passes without gradients in as few micro-batches as the memory of the passes with gradients allows."""
        for factor in (8, 4, 2):
            wider = self._with(size, kept, max(size, self.longest) * factor, checkpointing)
            if self._fits(wider, stage, group):
                return wider
        return self._with(size, kept, max(size, self.longest), checkpointing)

    def _with(self, micro_batch: int, kept: int | None, embedding: int, checkpointing: bool) -> RunConfig:
        """The run with these budgets where they are open."""
        values = dict(zip(BUDGETS, (micro_batch, kept, embedding), strict=True))
        update: dict[str, Any] = {name: value for name, value in values.items() if name in self.open}
        training = self.config.training.model_copy(update=update | {"planned": ()})
        model = self.config.model.model_copy(update={"gradient_checkpointing": checkpointing})
        return self.config.model_copy(update={"training": training, "model": model})

    def _fits(self, config: RunConfig, stage: int, group: int) -> bool:
        return self.forecaster.memory(config, stage, group) <= self.forecaster.limit * CAUTION

    def _largest(self, config_of: Callable[[int], RunConfig], stage: int, group: int, least: int) -> int:
        """The largest number of tokens, up to what is of use, whose config fits; 0: not even `least` does."""
        low, high = math.ceil(least / GRAIN), math.ceil(max(self.most, least) / GRAIN)
        if not self._fits(config_of(low * GRAIN), stage, group):
            return 0
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self._fits(config_of(middle * GRAIN), stage, group) else (low, middle - 1)
        return low * GRAIN

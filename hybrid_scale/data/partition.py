"""Text lengths + world size -> the same number of token-bounded micro-batches on every rank. Knows no language and no text.

The loss needs embeddings, not pairs kept together, so any text of the global batch may be embedded on any rank. ZeRO-3 puts
ranks in lock-step: micro-batch j takes as long as its slowest rank, and all ranks need equally many.

Packed (texts end to end): texts go, longest first, to the least loaded of world x k equal bins (LPT, Graham 1969), k the
smallest number that respects the budget. Where attention makes a call for each length, the alternative is weighed: sorted
texts are cut into k layers and each layer is dealt to the ranks to and fro, so that a micro-batch holds few lengths.
Padded: sorted texts are cut into runs, so that a micro-batch pads little; a round takes runs that cost nearly the same.
"""

import heapq
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from hybrid_scale.errors import ConfigError, describe

ROUND_TOKENS = 160
"""What one more micro-batch costs (dequantised weights, launches), in tokens: 146 on an A100, 170 on an H100 (estimates from
memory bandwidth). Weighed against padding when texts are padded, against mixed lengths when they are packed."""

LENGTH_TOKENS = 4.0
"""What one more length costs a micro-batch whose attention makes a call for each: 1.4 ms beside .4 ms a token, two-pass, in a
4-layer decoder on a CPU; not measured on a GPU."""


@dataclass(frozen=True)
class Budget:
    """Limits in executed tokens (padding included) of one rank, and what a token costs."""

    micro_batch: int
    """One micro-batch with gradients."""
    kept: int = 0
    """Micro-batches whose graphs are held at once."""
    embedding: int | None = None
    """One micro-batch without gradients; None: those passes take the micro-batches as they are."""
    packed: bool = True
    quadratic: float = 0.0
    """A text of n tokens costs n (1 + quadratic n): attention over linear layers, per token of length."""
    length_tokens: float = 0.0
    """What one more length inside a packed micro-batch costs, in tokens. 0: attention takes all lengths in one call."""

    def cost(self, lengths: np.ndarray) -> np.ndarray:
        """In tokens of the linear layers."""
        return lengths * (1.0 + self.quadratic * lengths)


@dataclass(frozen=True)
class Plan:
    """Who embeds what. `micro_batches[r][j]` are text numbers, longest first; empty ones keep ranks in step.

    The first `kept` micro-batches go through the model once and keep their graphs; the others are embedded without
    gradient first (`embedding_batches` groups consecutive ones) and once more with it.
    """

    micro_batches: tuple[tuple[np.ndarray, ...], ...]
    lengths: np.ndarray
    packed: bool = False
    kept: int = 0
    embedding_batches: tuple[range, ...] = ()

    @property
    def world(self) -> int:
        return len(self.micro_batches)

    @property
    def rounds(self) -> int:
        """Micro-batches per rank."""
        return len(self.micro_batches[0])

    @property
    def schedule(self) -> str:
        """`direct`: one pass; `two_pass`: cached gradients for all; `kept`: for some."""
        return "direct" if self.kept == self.rounds else "kept" if self.kept else "two_pass"

    @cached_property
    def counts(self) -> list[int]:
        """[W] texts per rank."""
        return [sum(len(batch) for batch in rank) for rank in self.micro_batches]

    @cached_property
    def positions(self) -> np.ndarray:
        """[T] where a text's embedding stands when the ranks' embeddings, each filled up to max(counts), are joined."""
        most = max(self.counts)
        positions = np.empty(len(self.lengths), np.int64)
        for rank, batches in enumerate(self.micro_batches):
            mine = np.concatenate(batches)
            positions[mine] = rank * most + np.arange(len(mine))
        return positions

    @property
    def real_tokens(self) -> int:
        return int(self.lengths.sum())

    @cached_property
    def executed(self) -> np.ndarray:
        """[W, rounds] tokens that each micro-batch computes, padding included."""
        return np.array([[self._executed(batch) for batch in rank] for rank in self.micro_batches])

    @property
    def padded_tokens(self) -> int:
        """Tokens the ranks compute in all."""
        return int(self.executed.sum())

    @property
    def lockstep_tokens(self) -> int:
        """Tokens computed if every rank waits for the slowest in each round: the sum of the rounds' maxima times W."""
        return self.world * int(self.executed.max(axis=0).sum())

    @property
    def recomputed_tokens(self) -> int:
        """Executed tokens that go through the model twice."""
        return int(self.executed[:, self.kept :].sum())

    def _executed(self, batch: np.ndarray) -> int:
        return executed_tokens(self.lengths[batch], self.packed)


def executed_tokens(descending: np.ndarray, packed: bool) -> int:
    """Tokens that a micro-batch of texts of these lengths (longest first) computes."""
    if not len(descending):
        return 0
    return int(descending.sum()) if packed else int(descending[0]) * len(descending)


def partition(lengths: np.ndarray, world: int, budget: Budget) -> Plan:
    """Plan for texts of the given token lengths [T] within `budget`. Deterministic.

    Raises ConfigError when one text alone exceeds a micro-batch.
    """
    if len(lengths) and lengths.max() > budget.micro_batch:
        raise ConfigError(
            describe(
                "training.max_tokens_per_micro_batch",
                budget.micro_batch,
                f"a text has {lengths.max()} tokens",
                "Raise it, or lower data.max_passage_tokens.",
            )
        )
    order = np.argsort(-lengths, kind="stable")
    deal = _packed if budget.packed else _padded
    micro_batches = deal(order, lengths[order], world, budget)
    return _scheduled(Plan(micro_batches, lengths, budget.packed), budget)


def _scheduled(plan: Plan, budget: Budget) -> Plan:
    """The plan with as many graphs kept as the budget holds and the rest grouped for the pass without gradients."""
    slowest = plan.executed.max(axis=0)
    kept = int(np.searchsorted(np.cumsum(slowest), budget.kept, side="right")) if budget.kept else 0
    groups: list[range] = []
    tokens = 0
    for j in range(kept, plan.rounds):
        longer = range(groups[-1].start, j + 1) if groups else range(j, j + 1)
        joined, apart = _joined(plan, longer), tokens + int(slowest[j])
        # Padding to the longest of all may cost more than a micro-batch less saves.
        if groups and budget.embedding is not None and joined <= min(budget.embedding, apart + ROUND_TOKENS):
            groups[-1], tokens = longer, joined
        else:
            groups.append(range(j, j + 1))
            tokens = int(slowest[j])
    return Plan(plan.micro_batches, plan.lengths, plan.packed, kept, tuple(groups))


def _joined(plan: Plan, rounds: range) -> int:
    """Executed tokens of the given rounds as one micro-batch, on the rank with most."""
    if plan.packed:
        return int(plan.executed[:, rounds.start : rounds.stop].sum(axis=1).max())
    joined = [[b for b in rank[rounds.start : rounds.stop] if len(b)] for rank in plan.micro_batches]
    return max(
        (max(int(plan.lengths[b[0]]) for b in batches) * sum(map(len, batches)) for batches in joined if batches), default=0
    )


# ----------------------------------------------------------------------------------------------------------------- packed


def _packed(order: np.ndarray, descending: np.ndarray, world: int, budget: Budget) -> tuple[tuple[np.ndarray, ...], ...]:
    """Micro-batches [W][k], none over the budget, those of a round of nearly equal cost."""
    large = int((descending > budget.micro_batch // 2).sum())  # no two of these share a micro-batch
    fewest = max(1, -(-int(descending.sum()) // (world * budget.micro_batch)), -(-large // world))
    ways = [_mixed(fewest, descending, world, budget)]
    if budget.length_tokens and len(descending):
        ways.append(_layered(descending, world, budget))
    bins, rounds = min(ways, key=lambda way: _packed_cost(way[0], way[1], descending, world, budget))
    by_bin = np.argsort(bins, kind="stable")
    ends = np.cumsum(np.bincount(bins, minlength=world * rounds))[:-1]
    runs = np.split(order[by_bin], ends)
    return tuple(tuple(runs[rank::world]) for rank in range(world))


def _mixed(fewest: int, descending: np.ndarray, world: int, budget: Budget) -> tuple[np.ndarray, int]:
    """Bin of each text [T], round * W + rank, and the number of rounds. Every bin gets long and short texts."""
    costs = budget.cost(descending).tolist()
    rounds = fewest
    while True:
        bins = _least_loaded(costs, world * rounds)
        tokens = np.bincount(bins, weights=descending, minlength=world * rounds)
        if tokens.max(initial=0) <= budget.micro_batch:
            return bins, rounds
        rounds += max(1, rounds // 32)


def _layered(descending: np.ndarray, world: int, budget: Budget) -> tuple[np.ndarray, int]:
    """The same, round j from layer j of the sorted texts."""
    rows = np.append(descending, np.zeros(-len(descending) % world, np.int64)).reshape(-1, world)
    cuts = _layers(rows, budget.micro_batch)
    layer = np.repeat(np.arange(len(cuts)), np.diff([*cuts, len(rows)]))
    row = np.arange(len(rows)) - np.array(cuts)[layer]
    ranks = np.where(row[:, None] % 2 == 0, np.arange(world), np.arange(world)[::-1])
    return (layer[:, None] * world + ranks).ravel()[: len(descending)], len(cuts)


def _layers(rows: np.ndarray, budget: int) -> list[int]:
    """Sorted rows of W texts -> first row of each layer: as few layers as the budget allows, of even size.

    Texts dealt to and fro differ by at most the longest less the shortest in what the ranks get: that much is left free.
    """
    before = np.append(0.0, np.cumsum(rows.sum(axis=1)) / rows.shape[1])
    longest, shortest = rows[:, 0], rows[:, -1]
    most = before[1:] - shortest  # a layer from row a to b holds at most most[b] - before[a] + longest[a] on any rank
    fewest = _greedy(before, longest, most, budget)
    low, high = before[-1] / len(fewest), float(budget)
    for _ in range(6):
        middle = (low + high) / 2
        cuts = _greedy(before, longest, most, middle)
        if len(cuts) <= len(fewest):
            fewest, high = cuts, middle
        else:
            low = middle
    return fewest


def _greedy(before: np.ndarray, longest: np.ndarray, most: np.ndarray, room: float) -> list[int]:
    cuts, at = [], 0
    while at < len(longest):
        cuts.append(at)
        at = max(at + 1, int(np.searchsorted(most, room + before[at] - longest[at], side="right")))
    return cuts


def _packed_cost(bins: np.ndarray, rounds: int, descending: np.ndarray, world: int, budget: Budget) -> float:
    """Tokens: the slowest rank of each round, the rounds, and the lengths that share a micro-batch."""
    costs = np.bincount(bins, weights=budget.cost(descending), minlength=world * rounds)
    lengths = len(np.unique(bins * (descending[0] + 1) + descending)) / world if len(bins) else 0.0
    return float(costs.reshape(rounds, world).max(axis=1).sum()) + rounds * ROUND_TOKENS + lengths * budget.length_tokens


def _least_loaded(costs: list[float], bins: int) -> np.ndarray:
    """[T] bin of each text: texts in the given order, each to the bin with the least cost so far, the lower one on a tie."""
    heap = [(0.0, number) for number in range(bins)]
    chosen = np.empty(len(costs), np.int64)
    for text, cost in enumerate(costs):
        load, number = heap[0]
        chosen[text] = number
        heapq.heapreplace(heap, (load + cost, number))
    return chosen


# ----------------------------------------------------------------------------------------------------------------- padded


def _padded(order: np.ndarray, descending: np.ndarray, world: int, budget: Budget) -> tuple[tuple[np.ndarray, ...], ...]:
    """Sorted texts cut into runs, runs of nearly equal cost dealt to the ranks of a round, the longest texts to the first rank.

    A run holds whole texts, so its cost misses the wanted one by up to a text: a tenth where five long texts fill it. Runs of
    neighbouring lengths therefore differ, and runs that miss alike are found by sorting. Ranks keep to their part of the
    lengths, so that consecutive micro-batches can be joined. More micro-batches pad less and cost `ROUND_TOKENS` each: the
    cheapest of a few numbers is taken.
    """
    if not len(order):
        return tuple((order,) for _ in range(world))
    fewest = -(-len(_cuts(descending.tolist(), budget, float("inf"))) // world)
    ways = [_runs(descending, world * rounds, budget) for rounds in sorted({fewest, fewest + 1, fewest + 2, 2 * fewest})]
    starts = min(ways, key=lambda starts: _lockstep_cost(_run_costs(descending, starts, budget), world))
    runs = np.split(order, starts[1:])
    by_cost = np.argsort(-_run_costs(descending, starts, budget), kind="stable")
    rounds = [np.sort(by_cost[at : at + world]) for at in range(0, len(runs), world)]
    nothing = np.empty(0, np.int64)
    return tuple(tuple(runs[each[rank]] if rank < len(each) else nothing for each in rounds) for rank in range(world))


def _runs(descending: np.ndarray, most: int, budget: Budget) -> np.ndarray:
    """Starts of at most `most` runs of nearly equal cost: the least bound that the greedy runs can keep, to half a percent."""
    lengths = descending.tolist()
    low = high = float(budget.cost(descending).sum()) / most
    starts = _cuts(lengths, budget, high)
    while len(starts) > most:
        low, high = high, 1.04 * high
        starts = _cuts(lengths, budget, high)
    for _ in range(3):
        middle = (low * high) ** 0.5
        fewer = _cuts(lengths, budget, middle)
        if len(fewer) <= most:
            starts, high = fewer, middle
        else:
            low = middle
    return np.array(starts)


def _cuts(descending: list[int], budget: Budget, cost: float) -> list[int]:
    """Starts of the greedy runs: as many texts as fit the token budget and `cost` when padded to the run's first."""
    starts: list[int] = []
    at = 0
    while at < len(descending):
        starts.append(at)
        longest = descending[at]
        room = min(budget.micro_batch / longest, cost / (longest * (1.0 + budget.quadratic * longest)))
        at += max(1, int(room))
    return starts


def _run_costs(descending: np.ndarray, starts: np.ndarray, budget: Budget) -> np.ndarray:
    """In tokens of the linear layers, padded to each run's first."""
    return np.diff(starts, append=len(descending)) * budget.cost(descending[starts])


def _lockstep_cost(costs: np.ndarray, world: int) -> float:
    """Tokens: of the costliest run of each round, where runs of like cost share one, and of the rounds."""
    slowest = -np.sort(-costs)[::world]
    return float(slowest.sum()) + len(slowest) * ROUND_TOKENS

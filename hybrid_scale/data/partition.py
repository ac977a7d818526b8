"""Text lengths + world size -> the same number of token-bounded micro-batches on every rank. Knows no language and no text.

The loss needs embeddings, not pairs kept together, so any text may be embedded on any rank: all texts of the global
batch are sorted by length, cut into world x k runs of nearly equal padded size, and dealt so that micro-batch j holds
texts of similar length on every rank (ZeRO-3 puts ranks in lock-step).
"""

from dataclasses import dataclass

import numpy as np

from hybrid_scale.errors import ConfigError, describe


@dataclass(frozen=True)
class Plan:
    """Who embeds what. `micro_batches[r][j]` are text numbers, longest first; empty ones keep ranks in step."""

    micro_batches: tuple[tuple[np.ndarray, ...], ...]
    lengths: np.ndarray

    @property
    def rounds(self) -> int:
        """Micro-batches per rank."""
        return len(self.micro_batches[0])

    @property
    def counts(self) -> list[int]:
        """[W] texts per rank."""
        return [sum(len(batch) for batch in rank) for rank in self.micro_batches]

    @property
    def order(self) -> np.ndarray:
        """[T] text number of each row of the embeddings gathered in rank order."""
        return np.concatenate([batch for rank in self.micro_batches for batch in rank])

    @property
    def real_tokens(self) -> int:
        return int(self.lengths.sum())

    @property
    def padded_tokens(self) -> int:
        """Tokens the ranks compute in all, padding included."""
        return sum(self._padded(batch) for rank in self.micro_batches for batch in rank)

    @property
    def lockstep_tokens(self) -> int:
        """Tokens computed if every rank waits for the slowest in each round: the sum of the rounds' maxima times W."""
        rounds = zip(*self.micro_batches, strict=True)
        return len(self.micro_batches) * sum(max(self._padded(batch) for batch in batches) for batches in rounds)

    def _padded(self, batch: np.ndarray) -> int:
        return int(self.lengths[batch[0]]) * len(batch) if len(batch) else 0


def partition(lengths: np.ndarray, world: int, max_tokens: int) -> Plan:
    """Plan for texts of the given token lengths [T]; a micro-batch has at most `max_tokens` padded tokens.

    Deterministic. Raises ConfigError when one text alone exceeds `max_tokens`.
    """
    if len(lengths) and lengths.max() > max_tokens:
        raise ConfigError(
            describe(
                "training.max_tokens_per_micro_batch",
                max_tokens,
                f"a text has {lengths.max()} tokens",
                "Raise it, or lower data.max_passage_tokens.",
            )
        )
    order = np.argsort(-lengths, kind="stable")
    descending = lengths[order]
    rounds = max(1, -(-len(_cuts(descending, max_tokens)) // world))
    cuts = _cuts(descending, _smallest_budget(descending, world * rounds, max_tokens))
    runs = np.split(order, cuts[1:]) if len(order) else []
    runs += [np.empty(0, np.int64)] * (world * rounds - len(runs))
    return Plan(tuple(tuple(runs[rank::world]) for rank in range(world)), lengths)


def _cuts(descending: np.ndarray, budget: int) -> list[int]:
    """Starts of the greedy runs: as many texts as fit `budget` when padded to the run's first."""
    starts: list[int] = []
    at = 0
    while at < len(descending):
        starts.append(at)
        at += max(1, budget // int(descending[at]))
    return starts


def _smallest_budget(descending: np.ndarray, runs: int, largest: int) -> int:
    """Least budget for which the greedy runs number at most `runs`: spreads the tokens instead of filling the first runs."""
    low = max(int(descending[0]) if len(descending) else 1, -(-int(descending.sum()) // runs))
    high = max(low, largest)
    while low < high:
        middle = (low + high) // 2
        if len(_cuts(descending, middle)) <= runs:
            high = middle
        else:
            low = middle + 1
    return high

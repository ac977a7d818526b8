"""Random order without a stored permutation: position -> element of a keyed bijection of 0..size-1.

A Feistel network with cycle walking (Black & Rogaway, "Ciphers with Arbitrary Finite Domains", 2002): any position of a
shuffle of 100M elements costs the same few multiplications, so an epoch needs no memory and resumes anywhere.
"""

from collections.abc import Sequence

import numpy as np

ROUNDS = 6
_MIX = (np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))


def generator(*key: int) -> np.random.Generator:
    """A generator for one purpose; equal keys give equal streams, different keys independent ones."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))


def mix(values: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser: uint64 -> well-scattered uint64."""
    values = values + _MIX[0]
    values = (values ^ (values >> np.uint64(30))) * _MIX[1]
    values = (values ^ (values >> np.uint64(27))) * _MIX[2]
    return values ^ (values >> np.uint64(31))


def shuffled(positions: np.ndarray, size: int, key: Sequence[int]) -> np.ndarray:
    """Elements at the given positions (int64, 0..size-1) of the shuffle `key` of range(size); same shape, int64."""
    half = max(1, (max(size - 1, 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half) - 1)
    round_keys = np.random.SeedSequence(key).generate_state(ROUNDS, np.uint64)
    result = positions.astype(np.uint64)
    outside = np.ones(result.shape, bool)
    with np.errstate(over="ignore"):
        while outside.any():
            walked = result[outside]
            left, right = walked >> np.uint64(half), walked & mask
            for round_key in round_keys:
                left, right = right, left ^ (mix(right ^ round_key) & mask)
            walked = (left << np.uint64(half)) | right
            result[outside] = walked
            outside = result >= size
    return result.astype(np.int64)


def draw(counters: np.ndarray, size: int, key: Sequence[int]) -> np.ndarray:
    """Elements for draws number `counters` (0, 1, 2, ...): each epoch of `size` draws is its own shuffle of range(size)."""
    epochs = counters // size
    result = np.empty_like(counters)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        result[here] = shuffled(counters[here] % size, size, [*key, int(epoch)])
    return result

"""Which points of quality against cost are worth their cost. Knows no run."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

Place = Literal["on the front", "overlaps the front", "behind the front"]
Worse = Callable[[int, int], bool]
"""Whether the first point is shown to be worse than the second, by their paired difference; both by their position."""


@dataclass(frozen=True)
class Point:
    """`quality`: higher is better; `cost`: lower is better."""

    name: str
    quality: float
    cost: float


def places(points: Sequence[Point], worse: Worse = lambda one, other: True) -> list[Place]:
    """For each point its place.

    On the front: no other is at least as good at no higher cost and better in one of both. Behind it, but overlapping:
    the data don't show that it is worse than the best that is to be had at its cost. Two intervals that overlap don't
    say so: what two arms share (questions, how hard they are) widens both and cancels in their difference.
    """
    return [_place(n, points, worse) for n in range(len(points))]


def _place(n: int, points: Sequence[Point], worse: Worse) -> Place:
    better = [m for m, other in enumerate(points) if _dominates(other, points[n])]
    if not better:
        return "on the front"
    best = max(better, key=lambda m: points[m].quality)
    return "behind the front" if worse(n, best) else "overlaps the front"


def _dominates(one: Point, other: Point) -> bool:
    as_good = one.quality >= other.quality and one.cost <= other.cost
    return as_good and (one.quality > other.quality or one.cost < other.cost)


def front(points: Sequence[Point]) -> list[Point]:
    """Points on the front by rising cost; of equal ones each."""
    found = [point for point, place in zip(points, places(points), strict=True) if place == "on the front"]
    return sorted(found, key=lambda point: (point.cost, point.quality))

"""Which points of quality against cost are worth their cost. Knows no run."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Place = Literal["on the front", "overlaps the front", "behind the front"]


@dataclass(frozen=True)
class Point:
    """`quality`: higher is better, with an interval where one is known; `cost`: lower is better."""

    name: str
    quality: float
    cost: float
    low: float | None = None
    high: float | None = None


def places(points: Sequence[Point]) -> list[Place]:
    """For each point its place.

    On the front: no other is at least as good at no higher cost and better in one of both. Behind it, but overlapping: its
    interval reaches the best quality that is to be had at its cost, so the data don't say that it is worse.
    """
    return [_place(point, points) for point in points]


def _place(point: Point, points: Sequence[Point]) -> Place:
    better = [other for other in points if _dominates(other, point)]
    if not better:
        return "on the front"
    reach = max(other.quality for other in better)
    return "overlaps the front" if point.high is not None and point.high >= reach else "behind the front"


def _dominates(one: Point, other: Point) -> bool:
    as_good = one.quality >= other.quality and one.cost <= other.cost
    return as_good and (one.quality > other.quality or one.cost < other.cost)


def front(points: Sequence[Point]) -> list[Point]:
    """Points on the front by rising cost; of equal ones each."""
    found = [point for point, place in zip(points, places(points), strict=True) if place == "on the front"]
    return sorted(found, key=lambda point: (point.cost, point.quality))

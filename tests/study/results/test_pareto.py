import random

from hybrid_scale.study.results.pareto import Point, front, places


def test_a_front_worked_by_hand() -> None:
    points = [
        Point("cheap", 0.50, 1, 0.48, 0.52),
        Point("dear and best", 0.70, 10, 0.68, 0.72),
        Point("worse for the same", 0.66, 10, 0.64, 0.695),
        Point("overlaps", 0.69, 12, 0.67, 0.71),
        Point("middle", 0.60, 5, 0.58, 0.62),
        Point("just reaches", 0.45, 2, 0.40, 0.50),
        Point("no interval", 0.59, 6),
    ]
    assert places(points) == [
        *("on the front", "on the front", "behind the front", "overlaps the front"),
        *("on the front", "overlaps the front", "behind the front"),
    ]
    assert [point.name for point in front(points)] == ["cheap", "middle", "dear and best"]


def test_equal_points_share_the_front() -> None:
    assert places([Point("a", 0.5, 1), Point("b", 0.5, 1), Point("c", 0.5, 2)]) == ["on the front"] * 2 + ["behind the front"]


def test_the_front_is_what_a_sweep_by_cost_finds() -> None:
    """Another way to the same set: by rising cost, whatever is better than all before."""
    chance = random.Random(4)
    for _ in range(50):
        points = [Point(str(n), chance.random(), chance.random()) for n in range(12)]
        best, swept = -1.0, []
        for point in sorted(points, key=lambda p: p.cost):
            if point.quality > best:
                best = point.quality
                swept.append(point)
        assert front(points) == swept

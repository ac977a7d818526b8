import random

from hybrid_scale.study.results.pareto import Point, front, places


def test_a_front_worked_by_hand() -> None:
    """What is shown to be worse than what: "worse for the same" than "dear and best", "just under" isn't."""
    points = [
        Point("cheap", 0.50, 1),
        Point("dear and best", 0.70, 10),
        Point("worse for the same", 0.66, 10),
        Point("just under", 0.69, 12),
        Point("middle", 0.60, 5),
        Point("under cheap", 0.45, 2),
    ]
    asked: list[tuple[str, str]] = []

    def worse(one: int, other: int) -> bool:
        asked.append((points[one].name, points[other].name))
        return points[one].name != "just under"

    assert places(points, worse) == [
        *("on the front", "on the front", "behind the front", "overlaps the front"),
        *("on the front", "behind the front"),
    ]
    best = [("worse for the same", "dear and best"), ("just under", "dear and best"), ("under cheap", "cheap")]
    assert asked == best, "each against the best that costs no more"
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

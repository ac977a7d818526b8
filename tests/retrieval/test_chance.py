"""Expectations of a random order, against every order there is and numbers worked by hand."""

import itertools
from fractions import Fraction

import numpy as np
import pytest

from hybrid_scale.protocols import BEIR, LAREQA, MIRACL, Protocol
from hybrid_scale.retrieval import chance, metrics
from hybrid_scale.retrieval.measures import Judged, summarise
from hybrid_scale.retrieval.metrics import RelevantRanks


def one_query(ranks: list[float], grades: list[int]) -> RelevantRanks:
    return RelevantRanks(np.zeros(len(ranks), int), np.array(ranks), 1, np.array(grades))


def test_by_hand() -> None:
    """One relevant among 4: precision is 1, 1/2, 1/3 or 1/4, on average H_4 / 4 = 25/48. Two among three: places 12, 13, 23 give
    1, 5/6 and 7/12, on average 29/36."""
    four, three = np.array([4]), np.array([3])
    one, two = one_query([1], [1]), one_query([1, 2], [1, 1])
    assert chance.average_precision(one, four) == pytest.approx([float(Fraction(25, 48))], abs=1e-15)
    assert chance.average_precision(two, three) == pytest.approx([float(Fraction(29, 36))], abs=1e-15)
    assert chance.reciprocal_rank(one, four, 2) == pytest.approx([(1 + 1 / 2) / 4])
    assert chance.recall(one, np.array([1000]), 100) == pytest.approx([0.1])
    assert chance.success_at_1(two, three) == pytest.approx([2 / 3])
    assert chance.ndcg(one, np.array([1000]), 1) == pytest.approx([0.001])
    assert chance.rank_distance(two, three) == pytest.approx([4 / 3]), "1, 2 and 1"
    million = chance.average_precision(one, np.array([1_000_000]))
    assert million == pytest.approx([sum(1 / i for i in range(1, 1_000_001)) / 1e6])


@pytest.mark.parametrize("grades", [[1], [3, 1], [2, 2, 1], [1, 1, 1, 1, 1]])
@pytest.mark.parametrize("missing", [0, 1])
def test_the_mean_over_every_order(grades: list[int], missing: int) -> None:
    """5 candidates, every set of places; `missing` more relevant passages are never found."""
    ways = [[*places, *[np.inf] * missing] for places in itertools.permutations([1, 2, 3, 4, 5], len(grades))]
    every = [one_query(ranks, [*grades, *[1] * missing]) for ranks in ways]
    five = np.array([5])
    for cut in (1, 3, 10):
        for expected, measure in (
            (chance.reciprocal_rank, metrics.reciprocal_rank),
            (chance.recall, metrics.recall),
            (chance.ndcg, metrics.ndcg),
        ):
            assert expected(every[0], five, cut) == pytest.approx(np.mean([measure(one, cut) for one in every]), abs=1e-13)
    precision = np.mean([metrics.average_precision(one) for one in every])
    assert chance.average_precision(every[0], five) == pytest.approx(precision, abs=1e-13)
    assert chance.success_at_1(every[0], five) == pytest.approx(np.mean([metrics.success(one, 1) for one in every]), abs=1e-13)
    if not missing:
        distance = np.mean([one.rank.max() - one.rank.min() for one in every])
        assert chance.rank_distance(every[0], five) == pytest.approx(distance, abs=1e-13)


@pytest.mark.parametrize("protocol", [LAREQA, MIRACL, BEIR], ids=lambda each: each.name)
def test_a_result_states_the_mean_of_every_order_of_its_corpus(protocol: Protocol) -> None:
    """Passages a, b, c in en and d, e in de. Queries: en with a and d relevant (grades 2, 1), de with e, en with b, c and e."""
    language = np.array([0, 0, 0, 1, 1])
    query, passage, grade = np.array([0, 0, 1, 2, 2, 2]), np.array([0, 3, 4, 1, 2, 4]), np.array([2, 1, 1, 1, 1, 1])

    def result(order: tuple[int, ...]) -> dict:
        place = np.argsort(order)
        before = place[None, :] < place[passage][:, None]
        above = np.stack([before[:, language == c].sum(1) for c in (0, 1)], 1)
        facts = (np.array([0, 1, 0]), query, language[passage], grade, above, np.ones(6, bool))
        return summarise(Judged(["en", "de"], ["en", "de"], *facts), np.array([3, 2]), protocol)

    results = [result(order) for order in itertools.permutations(range(5))]
    stated = results[0]["chance"]
    compared = {name for name in results[0]["metrics"] if not name.endswith("_median") and name != "peer"}
    assert stated.keys() == compared
    for name, value in stated.items():
        assert value == pytest.approx(np.mean([one["metrics"][name] for one in results]), abs=1e-13), name


def test_without_the_corpus_nothing_is_stated() -> None:
    facts = (np.array([0]), np.array([0]), np.array([0]), np.array([1]), np.array([[0]]), np.ones(1, bool))
    assert "chance" not in summarise(Judged(["en"], ["en"], *facts), None, BEIR)

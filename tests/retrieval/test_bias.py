"""Rank distance and top languages against numbers worked by hand and a loop."""

import numpy as np

from hybrid_scale.retrieval.bias import rank_distance, top_language_shares


def test_rank_distance_by_hand() -> None:
    query = np.array([0, 0, 0, 1, 2, 2])
    rank = np.array([7, 3, 30, 5, 1, 9])
    language = np.array([0, 1, 2, 0, 1, 1])
    distance = rank_distance(query, rank, language, 4)
    assert distance[0] == 27
    assert np.isnan(distance[1:]).all()  # one relevant passage; two of one language; none


def test_rank_distance_equals_a_loop() -> None:
    rng = np.random.default_rng(2)
    query, language = rng.integers(0, 30, 200), rng.integers(0, 4, 200)
    rank = rng.permutation(1000)[:200] + 1
    distance = rank_distance(query, rank, language, 30)
    for q in range(30):
        mine = query == q
        parallel = len(set(language[mine])) > 1
        assert distance[q] == np.ptp(rank[mine]) if parallel else np.isnan(distance[q])


def test_no_relevant_passages() -> None:
    none = np.zeros(0, np.int64)
    assert np.isnan(rank_distance(none, none, none, 3)).all()


def test_top_language_shares() -> None:
    shares = top_language_shares(np.array([0, 0, 0, 0, 2]), np.array([0, 1, 1, 1, 0]), 3, 2)
    np.testing.assert_array_equal(shares, [[0.25, 0.75], [np.nan, np.nan], [1, 0]])

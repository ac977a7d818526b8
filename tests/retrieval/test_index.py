"""Sharded search and counting against a brute-force order, over shards, ranks, ties, copies and bad vectors."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid_scale import dist
from hybrid_scale.errors import DataError, RunError
from hybrid_scale.retrieval import index
from hybrid_scale.retrieval.index import Shard, count_above, count_in_shard, judged_keys, merge, search, search_shards
from hybrid_scale.retrieval.scores import EMPTY, block_scores, pack, pair_scores, unpack
from tests.ranks import run_ranks


def clustered(passages: int, queries: int, dimensions: int, kind: str = "float32") -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors near one direction (scores crowd, as real ones do), a third of the passages copies of others."""
    rng = np.random.default_rng(7)
    vectors = rng.standard_normal((passages + queries, dimensions)) * 0.3 + rng.standard_normal(dimensions)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    corpus = vectors[:passages].astype(kind)
    copies = rng.choice(passages, passages // 3, replace=False)
    corpus[copies] = corpus[rng.integers(0, passages, len(copies))]
    return corpus, vectors[passages:].astype(np.float32)


def exact_scores(queries: np.ndarray, corpus: np.ndarray) -> np.ndarray:
    """Correctly rounded sums, by a loop."""
    return np.array([[np.float32(math.fsum(q.astype(float) * x.astype(float))) for x in corpus] for q in queries], np.float32)


def brute(queries: np.ndarray, corpus: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    scores = exact_scores(queries, corpus)
    order = np.lexsort((np.broadcast_to(np.arange(len(corpus)), scores.shape), -scores), axis=1)[:, :k]
    return np.take_along_axis(scores, order, 1), order


def deal(corpus: np.ndarray, shards: int) -> list[Shard]:
    """Passages dealt at random, in random order: shards are arbitrary subsets."""
    owner = np.random.default_rng(shards).integers(0, shards, len(corpus))
    rows = [np.random.default_rng(s).permutation(np.flatnonzero(owner == s)) for s in range(shards)]
    return [Shard(some, corpus[some]) for some in rows]


def assert_same(answer: tuple[np.ndarray, np.ndarray], expected: tuple[np.ndarray, np.ndarray]) -> None:
    np.testing.assert_array_equal(answer[1], expected[1])
    np.testing.assert_array_equal(answer[0], expected[0])


# ------------------------------------------------------------------------------------------------------------- scores


@pytest.mark.parametrize("dimensions", [1, 2, 3, 7, 64, 100, 1000])
def test_block_scores_are_pair_scores(dimensions: int) -> None:
    corpus, queries = (torch.from_numpy(a) for a in clustered(50, 20, dimensions))
    scores = block_scores(queries.double(), corpus.double())
    assert torch.equal(scores, pair_scores(queries[:, None], corpus[None]))
    np.testing.assert_array_equal(scores.numpy(), exact_scores(queries.numpy(), corpus.numpy()))


def test_block_scores_take_the_tree_where_rounding_is_open() -> None:
    half = torch.tensor([[1.0, 2.0**-12]], dtype=torch.float64)  # 1 + 2^-24: half way between two float32
    assert block_scores(half, half).item() == pair_scores(half, half).item() == 1.0


@given(st.lists(st.tuples(st.floats(width=32, allow_nan=False), st.integers(0, 2**32 - 2)), min_size=2, max_size=20))
def test_keys_sort_by_score_then_lower_number_and_unpack(items: list[tuple[float, int]]) -> None:
    scores, numbers = torch.tensor([s for s, _ in items]), torch.tensor([n for _, n in items])
    keys = pack(scores, numbers)
    assert (keys > EMPTY).all()
    expected = sorted(items, key=lambda item: (-item[0], item[1]))
    back, numbers_back = unpack(keys.sort(descending=True).values)
    assert list(zip(back.tolist(), numbers_back.tolist(), strict=True)) == expected  # 0.0 == -0.0


# ------------------------------------------------------------------------------------------------------------- search


@pytest.mark.parametrize("kind", ["float16", "float32"])
@pytest.mark.parametrize("shards", [1, 2, 3, 4, 8])
def test_any_number_of_shards_gives_the_brute_force_answer(shards: int, kind: str) -> None:
    corpus, queries = clustered(300, 12, 24, kind)
    for k in (1, 10, 250, 1000):
        assert_same(search_shards(queries, deal(corpus, shards), k), brute(queries, corpus, k))


def test_small_blocks_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    corpus, queries = clustered(300, 12, 24)
    expected = brute(queries, corpus, 20)
    monkeypatch.setattr(index, "BLOCK_BYTES", 4 * 24 * 17)
    monkeypatch.setattr(index, "CELLS", 400)
    assert_same(search_shards(queries, deal(corpus, 3), 20), expected)
    monkeypatch.setattr(index, "WIDEST", 16)  # everything by the full scan
    assert_same(search_shards(queries, deal(corpus, 3), 20), expected)


def test_an_uncertain_answer_is_searched_again(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    corpus, queries = (rng.standard_normal((rows, 16)).astype(np.float32) for rows in (400, 3))
    corpus[rng.permutation(400)[:150]] = queries[1] * 2  # 150 copies on top for query 1
    widths: list[int] = []
    candidates = index._candidates

    def counted(some: np.ndarray, shard: Shard, width: int) -> tuple[np.ndarray, np.ndarray]:
        widths.append(len(some))
        return candidates(some, shard, width)

    monkeypatch.setattr(index, "_candidates", counted)
    assert_same(search(queries, Shard(np.arange(400), corpus), 5), brute(queries, corpus, 5))
    assert widths == [3, 1, 1, 1]  # only the query in doubt; 5 + 32, 64, 128 and 256 candidates


@pytest.mark.parametrize("shards", [1, 3])
def test_constant_scores_give_the_lowest_numbers(shards: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "WIDEST", 100)
    corpus = np.full((500, 8), 0.25, np.float16)
    scores, numbers = search_shards(np.ones((4, 8), np.float32), deal(corpus, shards), 7)
    assert (numbers == np.arange(7)).all()
    assert (scores == 2.0).all()


def test_empty_shards_one_query_and_k_beyond_the_corpus() -> None:
    corpus, queries = clustered(5, 1, 4)
    empty = Shard(np.zeros(0, np.int64), np.zeros((0, 4), np.float32))
    shards = [empty, Shard(np.arange(3), corpus[:3]), empty, Shard(np.arange(3, 5), corpus[3:])]
    assert_same(search_shards(queries, shards, 9), brute(queries, corpus, 9))
    scores, numbers = search(queries, empty, 3)
    assert scores.shape == numbers.shape == (1, 0)
    scores, numbers = search(queries[:0], shards[1], 2)
    assert scores.shape == (0, 2)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(-3, 3), min_size=1, max_size=40),
    st.lists(st.integers(0, 4), min_size=40, max_size=40),
    st.integers(1, 12),
)
def test_merge_of_any_division_is_the_whole(scores: list[int], owner: list[int], k: int) -> None:
    k = min(k, len(scores))
    keys = pack(torch.tensor(scores, dtype=torch.float32), torch.arange(len(scores)))
    parts = []
    for shard in range(5):
        held = keys[torch.tensor(owner[: len(scores)]) == shard].sort(descending=True).values
        rest = held[k : k + 1] if len(held) > k else torch.tensor([EMPTY])
        parts.append(torch.cat([held[:k], torch.full((max(0, k - len(held)),), EMPTY), rest])[None])
    merged = merge(parts, k)[0]
    assert merged[:k].tolist() == keys.sort(descending=True).values[:k].tolist()
    assert merged[k - 1] > merged[k]
    assert merged[k] == max(part[0, k] for part in parts)
    regrouped = merge([merge(parts[:2], k), merge(parts[2:], k)], k)[0]
    assert torch.equal(regrouped, merged)


# ----------------------------------------------------------------------------------------------------------- counting


def judged_pairs(queries: int, passages: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    pairs = np.unique(np.stack([rng.integers(0, queries, 60), rng.integers(0, passages, 60)]), axis=1)
    return pairs[0], pairs[1]


def brute_counts(
    queries: np.ndarray, corpus: np.ndarray, query: np.ndarray, passage: np.ndarray, language: np.ndarray
) -> np.ndarray:
    scores = exact_scores(queries, corpus)
    counts = np.zeros((len(query), 3), np.int64)
    for j, (q, p) in enumerate(zip(query, passage, strict=True)):
        for other in range(len(corpus)):
            ahead = scores[q, other] > scores[q, p] or (scores[q, other] == scores[q, p] and other < p)
            counts[j, language[other]] += ahead
    return counts


@pytest.mark.parametrize("cells", [2**20, 30])
@pytest.mark.parametrize("constant", [False, True])
def test_counts_over_shards_are_brute_force_counts(cells: int, constant: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "CELLS", cells)
    corpus, queries = clustered(90, 9, 12)
    if constant:
        corpus = np.full_like(corpus, 0.1)
    query, passage = judged_pairs(9, 90)
    shuffled = np.random.default_rng(1).permutation(len(query))
    query, passage = query[shuffled], passage[shuffled]
    language = np.random.default_rng(5).integers(0, 3, 90)
    expected = brute_counts(queries, corpus, query, passage, language)
    whole = Shard(np.arange(90), corpus)
    wanted = judged_keys(queries, whole, query, passage)
    for shards in (1, 2, 3, 4, 8):
        parts = deal(corpus, shards)
        total = sum(count_in_shard(queries, part, query, wanted, language[part.numbers], 3) for part in parts)
        np.testing.assert_array_equal(total, expected)
    np.testing.assert_array_equal(count_above(queries, whole, query, passage, language, 3), expected)


def test_counted_ranks_are_places_in_a_full_search() -> None:
    corpus, queries = clustered(200, 8, 16, "float16")
    shard = Shard(np.arange(200), corpus)
    query, passage = judged_pairs(8, 200)
    rank = 1 + count_above(queries, shard, query, passage, np.zeros(200, np.int64), 1)[:, 0]
    _, numbers = search(queries, shard, 200)
    np.testing.assert_array_equal(numbers[query, rank - 1], passage)


def test_a_judged_passage_that_nobody_holds_is_an_error() -> None:
    corpus, queries = clustered(10, 2, 4)
    shard = Shard(np.arange(10), corpus)
    with pytest.raises(DataError, match="judged passage 99: found 'held by 0 shards'"):
        count_above(queries, shard, np.array([0]), np.array([99]), np.zeros(10, np.int64), 1)


# -------------------------------------------------------------------------------------------------------------- ranks


def on_ranks(kind: str) -> dict[str, np.ndarray]:
    dist.start()
    corpus, queries = clustered(200, 10, 16, kind)
    shard = deal(corpus, dist.world_size())[dist.rank()]
    query, passage = judged_pairs(10, 200)
    language = np.random.default_rng(5).integers(0, 3, 200)
    scores, numbers = search(queries, shard, 12)
    constant = Shard(shard.numbers, np.ones_like(shard.vectors))
    _, tied = search(queries, constant, 12)
    counts = count_above(queries, shard, query, passage, language[shard.numbers], 3)
    dist.stop()
    return {"scores": scores, "numbers": numbers, "tied": tied, "counts": counts}


@pytest.mark.parametrize("kind", ["float16", "float32"])
def test_any_number_of_ranks_gives_the_same(kind: str) -> None:
    expected = on_ranks(kind)
    corpus, queries = clustered(200, 10, 16, kind)
    assert_same((expected["scores"], expected["numbers"]), brute(queries, corpus, 12))
    for world in (2, 4) if kind == "float16" else (2,):
        for result in run_ranks(on_ranks, world, kind):
            for name, array in expected.items():
                np.testing.assert_array_equal(result[name], array, err_msg=f"{name}, {world} ranks")


def with_own_queries() -> str:
    dist.start()
    try:
        search(np.full((1, 2), float(dist.rank()), np.float32), Shard(np.array([dist.rank()]), np.ones((1, 2), np.float32)), 1)
    except RunError as error:
        return str(error)
    return "no error"


def test_ranks_with_different_queries_are_refused() -> None:
    assert all(message.startswith("the query matrix differs between ranks") for message in run_ranks(with_own_queries, 2))


# ------------------------------------------------------------------------------------------------------------- errors


def test_vectors_that_are_not_finite_are_named() -> None:
    vectors = np.ones((4, 3), np.float16)
    vectors[2, 1] = np.nan
    with pytest.raises(DataError, match="passage 12, dimension 1: found nan; vectors are finite"):
        Shard(np.arange(10, 14), vectors)
    vectors[2, 1] = -np.inf
    with pytest.raises(DataError, match=r"corpus\.npy: row 2, dimension 1: found -inf"):
        Shard(np.arange(4), vectors, lambda row: f"corpus.npy: row {row}")


def test_bad_shards_and_queries_are_refused() -> None:
    ones = np.ones((2, 3), np.float32)
    with pytest.raises(DataError, match="passage 5 twice"):
        Shard(np.array([5, 5]), ones)
    with pytest.raises(DataError, match="0 <= number < 4294967296"):
        Shard(np.array([-1, 5]), ones)
    with pytest.raises(DataError, match="float16 or float32"):
        Shard(np.arange(2), ones.astype(np.float64))
    with pytest.raises(DataError, match="every passage number has one vector"):
        Shard(np.arange(3), ones)
    shard = Shard(np.arange(2), ones)
    with pytest.raises(DataError, match="the queries have 4 dimensions"):
        search(np.ones((1, 4), np.float32), shard, 1)
    with pytest.raises(DataError, match="query 0: found 'NaN or infinity'"):
        search(np.full((1, 3), np.nan, np.float32), shard, 1)
    with pytest.raises(DataError, match="overflow"):
        search(np.full((1, 3), 1e38, np.float32), shard, 1)
    with pytest.raises(DataError, match="a passage in two shards"):
        search_shards(np.ones((1, 3), np.float32), [shard, shard], 4)
    with pytest.raises(ValueError, match="k is 0"):
        search(ones, shard, 0)

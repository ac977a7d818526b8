"""Stored vectors: what comes back, what is refused, what counts as damaged, and reading by slices and rows."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hybrid_scale.errors import DataError, HybridScaleError
from hybrid_scale.retrieval.index import Shard, search, search_shards
from hybrid_scale.retrieval.store import Store, encode, make_store, open_store
from hybrid_scale.retrieval.stored import StoredVectors
from tests.retrieval.worlds import rounded

ROWS, DIMENSIONS, PART = 23, 6, 5


def identity(**changed: Any) -> dict[str, Any]:
    return {"model": {"base": "abc", "trained": "one"}, "prompt": "Passage: ", "texts": "t", "dtype": "float16", **changed}


def name(row: int) -> str:
    return f"id 'p{row}'"


def vectors(rows: int = ROWS) -> np.ndarray:
    return np.random.default_rng(3).standard_normal((rows, DIMENSIONS)).astype(np.float32)


def filled(directory: Path, dtype: str = "float16", rows: int = ROWS) -> Store:
    store = make_store(directory, identity(dtype=dtype), rows, DIMENSIONS, PART)
    for part in range(store.parts):
        first, end = store.span(part)
        store.write(part, vectors(rows)[first:end], name)
    return store


# ---------------------------------------------------------------------------------------------------------------- types


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=50))
def test_bfloat16_is_rounded_as_torch_does(values: list[float]) -> None:
    given_values = np.array(values, np.float32)
    expected = torch.from_numpy(given_values).bfloat16().float().numpy()
    np.testing.assert_array_equal(rounded(given_values, "bfloat16"), expected)
    assert encode(given_values, "bfloat16").dtype == np.uint16


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("memory", [0.0, 1e9])
def test_what_was_written_comes_back(tmp_path: Path, dtype: str, memory: float) -> None:
    filled(tmp_path, dtype)
    store = open_store(tmp_path)
    expected = rounded(vectors(), dtype)
    stored = StoredVectors(store, 0, ROWS, memory)
    assert stored.in_memory == (memory > 0)
    np.testing.assert_array_equal(stored[:], expected)
    assert stored[:].dtype == stored.dtype
    norm = np.linalg.norm(expected.astype(float), axis=1).max()
    assert stored.largest_norm() == pytest.approx(norm, rel=1e-12)
    store.check(range(store.parts))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(st.integers(0, ROWS), st.integers(0, ROWS), st.data())
def test_any_range_by_slices_and_rows(tmp_path: Path, one: int, other: int, data: st.DataObject) -> None:
    store = open_store(tmp_path) if (tmp_path / "manifest.json").exists() else filled(tmp_path, "bfloat16")
    first, end = min(one, other), max(one, other)
    expected = rounded(vectors(), "bfloat16")[first:end]
    stored = StoredVectors(store, first, end, 0.0 if end > first else -1.0)
    start, stop = sorted(data.draw(st.lists(st.integers(0, end - first), min_size=2, max_size=2)))
    np.testing.assert_array_equal(stored[start:stop], expected[start:stop])
    if end > first:
        rows = np.array(data.draw(st.lists(st.integers(0, end - first - 1), max_size=12)), np.int64).reshape(-1, 1)
        np.testing.assert_array_equal(stored[rows], expected[rows])


# --------------------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("now", "message"),
    [
        (identity(model={"base": "abc", "trained": "two"}), r"model\.trained: 'one' -> 'two'\. Choose another folder"),
        (identity(prompt="P: ", texts="u"), r"prompt: 'Passage: ' -> 'P: '; texts: 't' -> 'u'"),
        (identity(dtype="float32"), r"dtype: 'float16' -> 'float32'"),
        (identity(pooling="mean"), r"pooling: None -> 'mean'"),
    ],
)
def test_another_model_or_corpus_is_refused_with_the_difference(tmp_path: Path, now: dict[str, Any], message: str) -> None:
    filled(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(DataError, match=message):
        make_store(tmp_path, now, ROWS, DIMENSIONS, PART)
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


def test_other_dimensions_rows_types_and_folders_are_refused(tmp_path: Path) -> None:
    filled(tmp_path / "a")
    with pytest.raises(DataError, match="dimensions: 6 -> 8"):
        make_store(tmp_path / "a", identity(), ROWS, 8, PART)
    with pytest.raises(DataError, match="rows: 23 -> 24"):
        make_store(tmp_path / "a", identity(), 24, DIMENSIONS, PART)
    with pytest.raises(DataError, match="found 'int8'; one of float16, bfloat16, float32"):
        make_store(tmp_path / "a", identity(dtype="int8"), ROWS, DIMENSIONS, PART)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis.txt").write_text("mine")
    with pytest.raises(DataError, match=r"found 'files but no manifest\.json'"):
        make_store(tmp_path / "b", identity(), ROWS, DIMENSIONS, PART)
    with pytest.raises(DataError, match="not a store of embeddings"):
        open_store(tmp_path / "c")
    (tmp_path / "a" / "manifest.json").write_text('{"format": 9}')
    with pytest.raises(DataError, match="this version reads format 1"):
        open_store(tmp_path / "a")


def test_a_part_of_another_model_is_refused(tmp_path: Path) -> None:
    store = filled(tmp_path)
    record = json.loads(store.record_file(2).read_text())
    record["identity"]["model"]["trained"] = "other"
    store.record_file(2).write_text(json.dumps(record))
    with pytest.raises(DataError, match=r"part_00002\.json: .*model\.trained: 'other' -> 'one'"):
        store.damage(2)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 70000.0])
def test_vectors_that_are_not_finite_are_refused_with_their_ids(tmp_path: Path, bad: float) -> None:
    store = make_store(tmp_path, identity(), ROWS, DIMENSIONS, PART)
    spoiled = vectors()[5:10]
    spoiled[[1, 3], [0, 5]] = bad  # 70000 is beyond float16
    with pytest.raises(DataError, match=r"2 vectors \(id 'p6', id 'p8'\): found 'NaN or infinity'; .* as float16"):
        store.write(1, spoiled, name)
    assert not store.vectors_file(1).exists()
    assert not store.finished(1)


def test_vectors_of_another_shape_are_refused(tmp_path: Path) -> None:
    store = make_store(tmp_path, identity(), ROWS, DIMENSIONS, PART)
    with pytest.raises(DataError, match=r"found \(5, 7\); 5 vectors of 6 dimensions were expected"):
        store.write(0, np.zeros((5, 7), np.float32), name)
    with pytest.raises(DataError, match="3 vectors of 6"):
        store.write(4, vectors()[:5], name)  # the last part is short


# --------------------------------------------------------------------------------------------------------------- damaged


def cut(path: Path, bytes_left: int) -> None:
    path.write_bytes(path.read_bytes()[:bytes_left])


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


DAMAGES: list[tuple[Callable[[Store], object], str]] = [
    (lambda s: cut(s.vectors_file(1), 150), r"part_00001\.npy has 150 bytes for 5 vectors: truncated"),
    (lambda s: cut(s.vectors_file(1), 0), r"part_00001\.npy has 0 bytes"),
    (lambda s: flip(s.vectors_file(1), 187), r"part_00001\.npy is not what was written: another SHA-256"),
    (lambda s: s.vectors_file(1).write_bytes(s.vectors_file(0).read_bytes()), "another SHA-256"),
    (lambda s: s.vectors_file(1).unlink(), r"part_00001\.npy is missing"),
    (lambda s: s.record_file(1).write_text("{"), r"part_00001\.json can't be read"),
    (lambda s: s.record_file(1).write_text(s.record_file(0).read_text()), r"part_00001\.json is of rows 0 to 4"),
    (
        lambda s: np.save(s.vectors_file(1), vectors()[5:10]),
        r"part_00001\.npy has 248 bytes for 5 vectors",
    ),  # float32 in a float16 store
]


@pytest.mark.parametrize(("harm", "message"), DAMAGES, ids=[message[:30] for _, message in DAMAGES])
def test_a_damaged_part_is_found(tmp_path: Path, harm: Callable[[Store], object], message: str) -> None:
    store = filled(tmp_path)
    assert [store.damage(part) for part in range(5)] == [None] * 5
    harm(store)
    with pytest.raises(DataError, match=message):
        store.check(range(5))
    assert [store.damage(part) is None for part in range(5)] == [True, False, True, True, True]


def test_a_part_without_its_record_is_not_finished(tmp_path: Path) -> None:
    store = filled(tmp_path)
    store.record_file(3).unlink()  # killed between the two files
    assert not store.finished(3)
    with pytest.raises(DataError, match=r"part_00003\.npy isn't finished"):
        store.check(range(5))


# ---------------------------------------------------------------------------------------------------------------- search


def stored_shards(store: Store, shards: int, memory: float, block: int | None) -> list[Shard]:
    parts = []
    for shard in range(shards):
        first, end = (store.rows * at // shards for at in (shard, shard + 1))
        held = StoredVectors(store, first, end, memory)
        parts.append(Shard(np.arange(first, end), held, None, held.largest_norm(), block or held.block_bytes))
    return parts


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_search_on_disk_is_search_in_memory(tmp_path: Path, dtype: str) -> None:
    """Any number of shards, any block; copies across shards; shards without rows; k beyond a shard."""
    store = make_store(tmp_path, identity(dtype=dtype), ROWS, DIMENSIONS, PART)
    values = vectors()
    values[9:] = values[[0, 1] * 7]
    for part in range(store.parts):
        first, end = store.span(part)
        store.write(part, values[first:end], name)
    queries = np.random.default_rng(1).standard_normal((7, DIMENSIONS)).astype(np.float32)
    for k in (1, 6, 40):
        expected = search(queries, Shard(np.arange(ROWS), rounded(values, dtype)), k)
        for shards, memory, block in ((1, 0, None), (2, 0, 1), (3, 1e9, 50), (8, 100, None), (30, 0, 24)):
            answer = search_shards(queries, stored_shards(store, shards, memory, block), k)
            np.testing.assert_array_equal(answer[1], expected[1])
            np.testing.assert_array_equal(answer[0], expected[0])


def test_batches_of_queries_and_threads_change_nothing(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    corpus = rng.standard_normal((600, 96)).astype(np.float16)
    corpus[300:] = corpus[:300]
    queries = rng.standard_normal((40, 96)).astype(np.float32)
    shards = [Shard(np.arange(0, 600, 2), corpus[::2]), Shard(np.arange(1, 600, 2), corpus[1::2])]
    expected = search_shards(queries, shards, 15)
    assert (np.diff(expected[0], axis=1) == 0).any()  # there are ties
    before = torch.get_num_threads()
    try:
        for threads, batch in ((1, 1), (2, 40), (2, 7), (3, 19)):
            faiss.omp_set_num_threads(threads)
            torch.set_num_threads(threads)
            answers = [search_shards(queries[at : at + batch], shards, 15) for at in range(0, 40, batch)]
            np.testing.assert_array_equal(np.concatenate([numbers for _, numbers in answers]), expected[1])
            np.testing.assert_array_equal(np.concatenate([scores for scores, _ in answers]), expected[0])
    finally:
        faiss.omp_set_num_threads(before)
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"manifest\.json:1: not JSON"),
        ("[1]", r"manifest\.json: found \[1\]; this version reads format 1"),
        ('{"format": 1}', r"manifest\.json: found .*identity.*; not the manifest of a store"),
        ('{"format": 1, "identity": []}', r"not the manifest of a store of embeddings\. Encode again"),
    ],
)
def test_manifests_that_are_none(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(HybridScaleError, match=message):
        open_store(tmp_path)

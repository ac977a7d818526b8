"""Given embeddings: any order of rows, slices of ranks, and the message of each thing that can be wrong."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from hybrid_scale import dist
from hybrid_scale.data.prepared import RetrievalSet
from hybrid_scale.errors import DataError
from hybrid_scale.retrieval.vectors import open_embeddings, passage_lengths, read_ids, similarity_note
from launch.evaluate import main
from tests.ranks import run_ranks
from tests.retrieval.worlds import vectors, write_embeddings, write_task


@pytest.fixture
def task(tmp_path: Path) -> RetrievalSet:
    return write_task(tmp_path / "little")


@pytest.fixture
def folder(task: RetrievalSet, tmp_path: Path) -> Path:
    return write_embeddings(tmp_path / "vectors", task)


def test_rows_are_matched_by_id(task: RetrievalSet, folder: Path) -> None:
    queries, shard = open_embeddings(folder, task)
    expected_queries, expected_corpus = vectors(task)
    np.testing.assert_array_equal(queries, expected_queries)
    np.testing.assert_array_equal(shard.vectors, expected_corpus[shard.numbers])
    assert sorted(shard.numbers) == list(range(len(task.corpus)))
    assert isinstance(shard.vectors.base, np.memmap)
    assert shard.vectors.dtype == np.float16


def test_vectors_of_any_length_score_as_asked(task: RetrievalSet, folder: Path) -> None:
    """Cosines by hand; a row of zeros scores 0; the note says what was given."""
    queries, corpus = (matrix.astype(np.float64) for matrix in vectors(task))
    unit = lambda rows: rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-9)  # noqa: E731
    asked, shard = open_embeddings(folder, task, similarity="cosine")
    np.testing.assert_allclose(asked, unit(queries), atol=1e-7)
    np.testing.assert_allclose(shard.vectors[:], unit(corpus)[shard.numbers], atol=1e-7)
    np.testing.assert_array_equal(shard.vectors[np.array([3, 1])], shard.vectors[0:4][[3, 1]])
    assert shard.largest_norm == pytest.approx(1, abs=1e-6)
    lengths = passage_lengths(folder)
    norms = np.linalg.norm(corpus, axis=1)
    assert lengths == (pytest.approx(norms.min()), pytest.approx(norms.max()))
    assert "inner product (given vectors of lengths" in similarity_note("inner_product", lengths)
    np.save(folder / "corpus.npy", unit(corpus + 1e-3).astype(np.float16))
    assert passage_lengths(folder) is None
    assert similarity_note("cosine", None) == "cosine (given vectors of unit length)"


def test_the_script_says_what_scores_are(
    task: RetrievalSet, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [str(task.directory), "--embeddings", str(folder), "--out", str(tmp_path / "a.json")]
    results = []
    for chosen in ([], ["--similarity", "cosine"]):
        assert main([*given, *chosen]) == 0
        results.append(json.loads((tmp_path / "a.json").read_text()))
    assert [result["similarity"] for result in results] == ["inner_product", "cosine"]
    assert results[0]["metrics"]["map"] != results[1]["metrics"]["map"]
    assert "scores: inner product (given vectors of lengths" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([str(task.directory), "--config", "x.yaml", "--out", "x.json", "--similarity", "cosine"])


def held(data: Path, folder: Path) -> list[int] | str:
    dist.start()
    try:
        return open_embeddings(folder, RetrievalSet(data))[1].numbers.tolist()
    except DataError as error:
        return str(error)


def test_ranks_divide_the_corpus_and_fail_together(task: RetrievalSet, folder: Path) -> None:
    parts = run_ranks(held, 4, task.directory, folder)
    assert [len(part) for part in parts] == [9, 9, 9, 9]
    assert sorted(number for part in parts for number in part) == list(range(36))
    corpus = np.load(folder / "corpus.npy")
    corpus[35, 2] = np.inf  # in the last rank's slice only
    np.save(folder / "corpus.npy", corpus)
    messages = run_ranks(held, 2, task.directory, folder)
    assert messages[0] == messages[1]
    assert "row 35 (id " in messages[0]


def change(name: str, how: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path], object]:
    return lambda folder: np.save(folder / name, how(np.load(folder / name)))


def change_ids(name: str, how: Callable[[list[str]], list[str]]) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text("\n".join(how((folder / name).read_text().split())))


def with_nan(vectors: np.ndarray) -> np.ndarray:
    vectors[3, 1] = np.nan
    return vectors


WRONG = [
    (lambda folder: (folder / "corpus.npy").unlink(), r"corpus\.npy: found 'no such file'"),
    (lambda folder: (folder / "queries_ids.txt").unlink(), r"queries_ids\.txt: found 'no such file'"),
    (
        lambda folder: (folder / "corpus.npy").write_bytes(b"hello"),
        r"corpus\.npy: found .*; not a whole NumPy array of numbers\. Save",
    ),
    (
        lambda folder: [np.savez(folder / "x.npz", np.ones(2)), (folder / "x.npz").replace(folder / "corpus.npy")],
        r"corpus\.npy: found 'several arrays",
    ),
    (change("corpus.npy", lambda v: v[:, :0]), r"corpus\.npy: found 'float16 \(36, 0\)'"),
    (change("corpus.npy", lambda v: v[1:]), r"corpus\.npy and corpus_ids\.txt: found '35 rows and 36 ids'; every row has one id"),
    (change("corpus.npy", lambda v: v.astype(np.float64)), r"found 'float64 \(36, 8\)'; float16 or float32"),
    (change("corpus.npy", lambda v: v[:, 0]), r"found 'float16 \(36,\)'"),
    (change("corpus.npy", lambda v: v[:, :5]), r"dimensions of queries and corpus: found '8 and 5'"),
    (change("corpus.npy", with_nan), r"corpus\.npy: row 3 \(id '\w\w:\w\d'\), dimension 1: found nan"),
    (change("queries.npy", with_nan), r"queries\.npy: row 3 \(id '\w\w:q\d'\), dimension 1: found nan"),
    (
        change_ids("corpus_ids.txt", lambda ids: ["alien", *ids[1:]]),
        r"corpus_ids\.txt:1: found 'alien'; 1 ids that 'little' doesn't hold\. Are these",
    ),
    (
        change_ids("corpus_ids.txt", lambda ids: [ids[1], *ids[1:]]),
        r"corpus_ids\.txt: found '\w\w:\w\d'; 1 ids with more than one row",
    ),
    (
        lambda folder: [change_ids("corpus_ids.txt", lambda ids: ids[1:])(folder), change("corpus.npy", lambda v: v[1:])(folder)],
        r"corpus_ids\.txt: found '\w\w:\w\d'; 1 ids of 'little' have no row",
    ),
    (
        lambda folder: (folder / "corpus_ids.txt").write_bytes(b"\xff\n" * 36),
        r"corpus_ids\.txt: found .*; a text file must be UTF-8",
    ),
]


@pytest.mark.parametrize(("spoil", "message"), WRONG, ids=[message[:40] for _, message in WRONG])
def test_what_is_wrong_is_named(task: RetrievalSet, folder: Path, spoil: Callable[[Path], None], message: str) -> None:
    spoil(folder)
    with pytest.raises(DataError, match=message):
        open_embeddings(folder, task)


def test_an_id_with_two_rows_is_named(task: RetrievalSet, folder: Path) -> None:
    change("corpus.npy", lambda v: np.vstack([v, v[:1]]))(folder)
    change_ids("corpus_ids.txt", lambda ids: [*ids, "de:p1"])(folder)
    with pytest.raises(DataError, match="found 'de:p1'; 1 ids with more than one row"):
        open_embeddings(folder, task)


def test_lines_end_with_newline_only(tmp_path: Path) -> None:
    path = tmp_path / "ids.txt"
    path.write_bytes("a\r\nb c\u2028d\n\nénd".encode())
    assert read_ids(path).to_pylist() == ["a", "b c\u2028d", "", "énd"]
    path.write_bytes(b"")
    assert read_ids(path).to_pylist() == []
    path.write_bytes(b"\xef\xbb\xbfa\r\nb\r\n")
    assert read_ids(path).to_pylist() == ["a", "b"]

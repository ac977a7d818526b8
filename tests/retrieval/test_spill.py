"""Vectors that go to disk beyond a budget: what is searched, measured and refused is what memory gives, and nothing stays."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hybrid_scale import dist
from hybrid_scale.config import RunConfig
from hybrid_scale.data.prepared import RetrievalSet
from hybrid_scale.data.text import load_text_encoder
from hybrid_scale.errors import DataError
from hybrid_scale.model.load import load_embedder
from hybrid_scale.retrieval import spill as module
from hybrid_scale.retrieval.benchmark import score
from hybrid_scale.retrieval.index import search
from hybrid_scale.retrieval.spill import Spill, remove_left
from launch import baselines, evaluate
from tests.ranks import run_ranks
from tests.retrieval.worlds import rounded, write_embeddings, write_task
from tests.train.setup import make_config, write_inputs

ROWS, DIMENSIONS = 23, 6


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PART_ROWS", 5)


def vectors() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(ROWS, DIMENSIONS)).astype(np.float32)


def blocks(sizes: tuple[int, ...], values: np.ndarray) -> Iterator[np.ndarray]:
    for end, size in zip(np.cumsum(sizes), sizes, strict=True):
        yield values[end - size : end]


@pytest.mark.parametrize("sizes", [(23,), (0, 1, 4, 5, 6, 7), (5, 5, 5, 5, 3), (11, 12)])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("budget", [0.0, 1e9])
def test_what_went_in_comes_out(tmp_path: Path, sizes: tuple[int, ...], dtype: str, budget: float) -> None:
    numbers, queries = np.random.default_rng(1).permutation(ROWS), vectors()[:4]
    with Spill(ROWS, dtype, budget, tmp_path, str) as room:
        shard = room.extend(blocks(sizes, vectors())).shard(numbers)
        assert room.on_disk == (budget == 0) == any(tmp_path.iterdir())
        np.testing.assert_array_equal(shard.vectors[0:ROWS], rounded(vectors(), dtype))
        np.testing.assert_array_equal(shard.vectors[np.array([7, 0, 22])], rounded(vectors(), dtype)[[7, 0, 22]])
        found = search(queries, shard, 3)
    expected = np.argsort(-(queries @ rounded(vectors(), dtype).astype(np.float32).T), axis=1)[:, :3]
    np.testing.assert_array_equal(found[1], numbers[expected])
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("budget", [0.0, 1e9])
def test_a_broken_vector_is_named_when_all_blocks_are_made(tmp_path: Path, budget: float) -> None:
    """Other ranks wait inside the making of the later blocks, so they have to be made."""
    made = []

    def broken() -> Iterator[np.ndarray]:
        for number, block in enumerate(blocks((10, 10, 3), vectors())):
            made.append(number)
            yield block * (np.nan if number == 0 else 1)

    with pytest.raises(DataError, match=r"id r[05]"), Spill(ROWS, "float16", budget, tmp_path, lambda row: f"id r{row}") as room:
        room.extend(broken()).shard(np.arange(ROWS))
    assert made == [0, 1, 2]
    assert not any(tmp_path.iterdir())


def test_a_rank_without_passages(tmp_path: Path) -> None:
    with Spill(0, "float16", 0.0, tmp_path, str) as room:
        shard = room.extend([np.empty((0, DIMENSIONS), np.float32)]).shard(np.arange(0))
        assert (len(shard), shard.vectors.shape) == (0, (0, DIMENSIONS))


def scored(tree: str, data: str) -> dict[str, Any]:
    module.PART_ROWS = 5
    dist.start()
    config = RunConfig.model_validate_json(tree)
    embedder = load_embedder(config.model, config.run.seed).eval()
    result = score(RetrievalSet(data), config, load_text_encoder(config), lambda batch: embedder(**batch))
    return {key: value for key, value in result.items() if key != "seconds"}


@pytest.mark.distributed
def test_what_a_stop_leaves_on_disk_is_taken_away(tmp_path: Path) -> None:
    """A process that a stop ends within an evaluation doesn't leave the `with` block; stores that are kept stay."""
    (tmp_path / "set" / "step_00000004").mkdir(parents=True)
    spill = Spill(3, "float32", 0, tmp_path, str).extend([np.ones((3, 4), np.float32)])
    assert spill.on_disk
    assert len(list(tmp_path.iterdir())) == 2
    remove_left(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["set"]
    remove_left(tmp_path / "none")


def test_training_scores_the_same_from_memory_and_from_disk(tmp_path: Path) -> None:
    folder = write_inputs(tmp_path / "inputs")
    task = write_task(tmp_path / "little")
    results = []
    for budget in (4.0, 1e-9):
        config = make_config(folder, run={"directory": str(tmp_path / "run")}, evaluation={"shard_memory_gib": budget})
        results += run_ranks(scored, 2, config.model_dump_json(), str(task.directory))
    assert all(result == results[0] for result in results)
    assert not any((tmp_path / "run" / "embeddings").iterdir())


def test_baselines_are_the_same_from_memory_and_from_disk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = write_task(tmp_path / "little")
    folder, shown = write_embeddings(tmp_path / "vec", task), []
    for name, budget in (("memory", "4"), ("disk", "1e-9")):
        given = [
            str(task.directory),
            "--out",
            str(tmp_path / name),
            "--embeddings",
            str(folder),
            "--remove",
            "language_mean",
            "lir:2",
        ]
        assert baselines.main([*given, "--memory-gib", budget]) == 0
        shown.append(capsys.readouterr().out)
        assert not list((tmp_path / name).glob(".vectors-*"))
    assert shown[0] == shown[1]


@pytest.mark.parametrize("given", [["--memory-gib", "0"], ["--top-k", "-3"], ["--out", "x.txt"], ["--run-order", "rank"]])
def test_the_door_refuses_numbers_that_mean_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str], given: list[str]) -> None:
    with pytest.raises(SystemExit) as error:
        evaluate.main([str(tmp_path), "--embeddings", "x", "--out", str(tmp_path / "o.json"), *given])
    assert error.value.code == 2
    assert given[0] in capsys.readouterr().err

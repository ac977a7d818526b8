"""How every evaluation door begins and ends: exit codes of all ranks, who says an error, what may not be written over."""

import contextlib
import io
import json
import os
from pathlib import Path

import pytest

from hybrid_scale import dist
from hybrid_scale.data.prepared import RetrievalSet
from hybrid_scale.errors import DataError, explain
from launch import baselines, evaluate, evaluate_mteb, tradeoff
from tests.ranks import run_ranks
from tests.retrieval.worlds import write_embeddings, write_task


def work(who: str) -> None:
    if who == "all" or (who == "first" and dist.rank() == 0) or (who == "last" and dist.rank() == dist.world_size() - 1):
        raise DataError(f"x.json:3: found 1; wrong on rank {dist.rank()}.")
    dist.barrier()


def door_on_a_rank(who: str, wait: float) -> tuple[int, str]:
    dist.SAID_WITHIN_SECONDS = wait
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        code = dist.run_door(lambda: work(who))
    return code, said.getvalue()


def test_one_process(capsys: pytest.CaptureFixture[str]) -> None:
    assert dist.run_door(lambda: None) == 0
    assert dist.run_door(lambda: work("all")) == 2
    assert capsys.readouterr().err == "x.json:3: found 1; wrong on rank 0.\n"
    with pytest.raises(ZeroDivisionError):
        dist.run_door(lambda: 1 / 0)


def test_what_the_system_refuses_is_a_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert dist.run_door(lambda: (tmp_path / "file" / "x").read_text()) == 2
    assert capsys.readouterr().err.startswith(f"{tmp_path}/file/x: found 'Not a directory'; the system refuses it. Check path")
    assert explain(OSError("odd")) == "a file: found 'odd'; the system refuses it. Check path, rights and room on the disk."


@pytest.mark.distributed
def test_an_error_of_all_ranks_is_said_once() -> None:
    """The others wait for rank 0 as long as the test may take."""
    outcomes = run_ranks(door_on_a_rank, 2, "all", 100.0)
    assert outcomes == [(2, "x.json:3: found 1; wrong on rank 0.\n"), (2, "")]


@pytest.mark.distributed
def test_an_error_of_one_rank_is_said_and_ends_the_others() -> None:
    first, last = run_ranks(door_on_a_rank, 2, "last", 0.05)
    assert last == (2, "rank 1: x.json:3: found 1; wrong on rank 1.\n")
    assert first[0] == 4
    assert first[1].startswith("rank 0: lost another rank: ")


@pytest.fixture
def task(tmp_path: Path) -> RetrievalSet:
    return write_task(tmp_path / "little")


def test_places_that_can_not_be_written_are_found_first(
    task: RetrievalSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder that is a file: it refuses the superuser too. No vectors exist, so nothing was read before."""
    (tmp_path / "file").touch()
    blocked, none = str(tmp_path / "file" / "out"), str(tmp_path / "none")
    assert evaluate.main([str(task.directory), "--embeddings", none, "--out", f"{blocked}.json"]) == 2
    assert f"file/out.json: found 'File exists: {tmp_path}/file'; a file is to be written here" in capsys.readouterr().err
    assert baselines.main([str(task.directory), "--embeddings", none, "--out", blocked]) == 2
    assert "a file is to be written here" in capsys.readouterr().err
    assert evaluate_mteb.main(["--config", none, "--tasks", "NFCorpus", "--out", blocked]) == 2
    assert "a file is to be written here" in capsys.readouterr().err
    assert tradeoff.main([none, str(task.directory), "--out", str(tmp_path / "file")]) == 2
    assert "file: found 'a file'; results are never overwritten" in capsys.readouterr().err


def test_only_results_are_replaced(task: RetrievalSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_embeddings(tmp_path / "vec", task)
    given = [str(task.directory), "--embeddings", str(folder)]
    (tmp_path / "mine.json").write_text('{"my": "notes"}')
    assert evaluate.main([*given, "--out", str(tmp_path / "mine.json")]) == 2
    assert "mine.json: found 'another file'; only results are replaced" in capsys.readouterr().err
    assert (tmp_path / "mine.json").read_text() == '{"my": "notes"}'
    out = str(tmp_path / "o.json")
    files = {"--run-file": tmp_path / "a.run", "--qrels-out": tmp_path / "q.txt"}
    for option, path in files.items():
        path.write_text("mine")
        assert evaluate.main([*given, "--out", out, option, str(path)]) == 2
        assert "TREC files are never overwritten" in capsys.readouterr().err
        assert path.read_text() == "mine"
    assert evaluate.main([*given, "--out", out, "--run-file", str(tmp_path / "n"), "--qrels-out", str(tmp_path / "n")]) == 2
    assert "named twice" in capsys.readouterr().err
    for _ in range(2):
        assert evaluate.main([*given, "--out", out]) == 0
    assert json.loads(Path(out).read_text())["task"] == "little"
    assert sorted(os.listdir(tmp_path)) == ["a.run", "little", "mine.json", "o.json", "o.parquet", "q.txt", "vec"]

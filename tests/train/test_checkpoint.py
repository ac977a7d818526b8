"""One checkpoint at a time, without training: whole or not at all, verified, judged."""

import errno
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hybrid_scale import dist
from hybrid_scale.checkpoints import best, complete, damage, folder_name, latest, resume_point
from hybrid_scale.config import OptimizerSettings, RunConfig
from hybrid_scale.errors import ConfigError, RunError
from hybrid_scale.runs import RunDirectory, read_json, write_json
from hybrid_scale.train import checkpoint
from hybrid_scale.train.engine import PlainEngine
from hybrid_scale.train.stop import Agreed, StopRequest
from tests.ranks import run_ranks
from tests.train.setup import make_config


class Embedder(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = torch.nn.Linear(50, 40, bias=False)


def set_state(engine: PlainEngine, value: float) -> None:
    """Every trained weight `value`, Adam's first moment -`value`, its second and its steps `value`."""
    for parameter in engine.trained.values():
        parameter.data.fill_(value)
        moments = {"exp_avg": torch.full_like(parameter, -value), "exp_avg_sq": torch.full_like(parameter, value)}
        engine.optimizer.state[parameter] = {"step": torch.tensor(value), **moments}


def config_in(place: Path, **sections: dict[str, Any]) -> RunConfig:
    return make_config(place, **{"run": {"directory": str(place / "run")}, **sections})


def checkpoints_of(place: Path, **training: Any) -> checkpoint.Checkpoints:
    data = {"train": str(place), "max_query_tokens": 32, "max_passage_tokens": 64, "evaluate": ["set"]}
    config = config_in(place, training=training, data=data)
    run = RunDirectory(config.run.directory)
    embedder: Any = Embedder()
    return checkpoint.Checkpoints(run, PlainEngine(embedder, OptimizerSettings()), embedder, {"facts": 1}, config)


def engine_of(checkpoints: checkpoint.Checkpoints) -> PlainEngine:
    engine = checkpoints.snapshot.engine
    assert isinstance(engine, PlainEngine)
    return engine


def save(checkpoints: checkpoint.Checkpoints, *steps: int) -> None:
    for step in steps:
        set_state(engine_of(checkpoints), float(step))
        checkpoints.save(step)
    checkpoints.finish()


def names(run: RunDirectory) -> list[str]:
    return sorted(path.name for path in run.checkpoints.iterdir())


# ------------------------------------------------------------------------------------------------------------------ damage


def test_complete_is_what_sha256sum_checks(tmp_path):
    checkpoints = checkpoints_of(tmp_path)
    save(checkpoints, 2)
    folder = latest(checkpoints.run)
    assert folder is not None
    done = subprocess.run(["sha256sum", "--strict", "-c", "COMPLETE"], cwd=folder, capture_output=True, text=True, check=True)
    said = {line.removesuffix(": OK") for line in done.stdout.splitlines()}
    assert said == {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()} - {"COMPLETE"}
    assert len(said) == 4


def test_every_damaged_file_is_found(tmp_path, capsys):
    """Each file of the newest checkpoint in turn: cut to every of ten lengths, one bit of sixteen flipped, removed."""
    checkpoints = checkpoints_of(tmp_path)
    save(checkpoints, 2, 4)
    old, new = (checkpoints.run.checkpoints / folder_name(step) for step in (2, 4))
    assert latest(checkpoints.run) == new
    paths = sorted(path for path in new.rglob("*") if path.is_file())
    assert len(paths) == 5
    for path in paths:
        content = path.read_bytes()
        bits = [n * (8 * len(content) - 1) // 15 for n in range(16)]
        flipped = [bytes(b ^ (1 << bit % 8) if i == bit // 8 else b for i, b in enumerate(content)) for bit in bits]
        for changed in [*(content[: n * len(content) // 10] for n in range(10)), *flipped]:
            path.write_bytes(changed)
            assert latest(checkpoints.run) == old, path
        path.unlink()
        assert latest(checkpoints.run) == old
        said = capsys.readouterr().err.splitlines()
        assert len(said) == 27
        assert all(line.startswith(f"warning: {new} is no checkpoint: ") for line in said)
        assert path.name in said[-1]
        path.write_bytes(content)
    assert latest(checkpoints.run) == new
    assert capsys.readouterr().err == ""


def test_a_run_that_goes_on_sets_damaged_folders_aside(tmp_path):
    """Even with one checkpoint kept, a damaged newer folder must not push out the whole one."""
    checkpoints = checkpoints_of(tmp_path, keep_checkpoints=2)
    save(checkpoints, 2, 6)
    checkpoints.keep = 1
    damaged = checkpoints.run.checkpoints / folder_name(6)
    (damaged / "trainer.json").write_text("{}")
    (damaged.parent / ".step_00000008.part").mkdir()
    assert resume_point(checkpoints.run) == damaged.with_name("step_00000002")
    assert names(checkpoints.run) == [".step_00000006.damaged", ".step_00000008.part", "step_00000002"]
    save(checkpoints, 4)
    assert names(checkpoints.run) == ["step_00000004"]


def test_a_run_of_which_nothing_is_whole_is_not_begun_anew(tmp_path):
    checkpoints = checkpoints_of(tmp_path)
    save(checkpoints, 2, 4)
    for folder in complete(checkpoints.run):
        (folder / "trainer.json").unlink()
    reasons = r"\(step_00000004: trainer.json is missing; step_00000002: trainer.json is missing\)"
    with pytest.raises(RunError, match=rf"checkpoints: found 2; no checkpoint there is whole {reasons}"):
        resume_point(checkpoints.run)
    assert names(checkpoints.run) == ["step_00000002", "step_00000004"]


# ----------------------------------------------------------------------------------------------------------------- writing


@pytest.mark.parametrize("file", ["adapter", "engine/moments.safetensors", "trainer.json", "COMPLETE"])
def test_a_full_disk_leaves_the_older_checkpoints(tmp_path, monkeypatch, file):
    """The disk is full when `file` is written: an error that says so, the older checkpoints untouched, nothing half done."""
    checkpoints = checkpoints_of(tmp_path)
    save(checkpoints, 2)

    def full(name: str, original: Any) -> Any:
        def write(*args: Any, **kwargs: Any) -> Any:
            if any(file in str(arg) for arg in args if isinstance(arg, Path)):
                raise OSError(errno.ENOSPC, "No space left on device")
            return original(*args, **kwargs)

        return write

    for name in ("save_file", "save_trained", "write_json"):
        monkeypatch.setattr(checkpoint, name, full(name, getattr(checkpoint, name)))
    monkeypatch.setattr(Path, "write_text", full("write_text", Path.write_text))
    checkpoints.save(4)
    with pytest.raises(RunError, match=r"step_00000004: found .*No space left on device.*could not be written \(.* MiB are free"):
        checkpoints.finish()
    assert names(checkpoints.run) == ["step_00000002"]
    assert damage(checkpoints.run.checkpoints / "step_00000002") is None


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    """`save` returns before the write begins; the state is that of the moment, whatever the weights become."""
    checkpoints = checkpoints_of(tmp_path)
    begin, original = threading.Event(), checkpoint.save_trained
    monkeypatch.setattr(checkpoint, "save_trained", lambda *a: begin.wait(600) and original(*a))
    set_state(engine_of(checkpoints), 2.0)
    checkpoints.save(2)
    set_state(engine_of(checkpoints), 3.0)
    assert latest(checkpoints.run) is None
    assert not checkpoints.failed()
    begin.set()
    checkpoints.finish()
    folder = latest(checkpoints.run)
    assert folder is not None
    assert load_file(folder / "adapter" / "model.safetensors")["weight"].unique().tolist() == [2.0]
    assert load_file(folder / "engine" / "moments.safetensors")["exp_avg.backbone.weight"].unique().tolist() == [-2.0]
    assert [record["step"] for record in checkpoints.written] == [2]
    assert 0 < checkpoints.written[0]["waited"] < checkpoints.written[0]["seconds"]


def test_a_failed_write_is_seen_at_the_next_step(tmp_path, monkeypatch):
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    checkpoints = checkpoints_of(tmp_path)
    monkeypatch.setattr(checkpoint, "save_trained", full)
    set_state(engine_of(checkpoints), 2.0)
    checkpoints.save(2)
    checkpoints.close()
    assert checkpoints.failed()
    assert StopRequest().agreed(checkpoints.failed()) is Agreed.FAIL


def one_rank_fails(place: str) -> str:
    """Rank 1 has no memory for its part while rank 0 waits for it; what `finish` raises here."""
    dist.start()
    checkpoints = checkpoints_of(Path(place))
    set_state(engine_of(checkpoints), 2.0)
    if dist.rank() == 1:
        checkpoints.snapshot.whole = lambda side: time.sleep(0.2) or bytearray(2**60)  # type: ignore[assignment]
    checkpoints.save(2)
    try:
        checkpoints.finish()
    except RunError as error:
        return str(error)
    return "nothing"


def test_a_rank_that_fails_at_its_part_fails_all(tmp_path):
    """Though the first rank waits for the part, for ten minutes if nobody told it; nothing is left of the checkpoint."""
    said = run_ranks(one_rank_fails, 2, str(tmp_path), timeout=400)
    assert said == ["checkpoint: found 'MemoryError: '; rank 1 could not make its part."] * 2
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_run_that_ends_early_waits_for_a_write_but_not_for_a_lost_rank(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "GATHER_SECONDS", 0.05)
    gathered, written, original = threading.Event(), threading.Event(), checkpoint.save_trained
    checkpoints = checkpoints_of(tmp_path)
    set_state(engine_of(checkpoints), 2.0)
    whole = checkpoints.snapshot.whole
    monkeypatch.setattr(checkpoints.snapshot, "whole", lambda side: gathered.wait(600) and whole(side))
    monkeypatch.setattr(checkpoint, "save_trained", lambda *a: written.wait(600) and original(*a))
    checkpoints.save(2)
    checkpoints.close()
    assert not list(checkpoints.run.checkpoints.glob("*"))
    gathered.set()
    limit = time.monotonic() + 300
    while not list(checkpoints.run.checkpoints.glob(".step_*.part")):
        assert time.monotonic() < limit
        time.sleep(0.01)
    threading.Timer(0.5, written.set).start()
    checkpoints.close()
    assert names(checkpoints.run) == ["step_00000002"]


# -------------------------------------------------------------------------------------------------------------------- best


def evaluated(run: RunDirectory, step: int | None, **metrics: float | None) -> None:
    write_json(run.evaluation_file("set", step), {"metrics": metrics})


def test_the_best_checkpoint_is_kept(tmp_path):
    """Scores .1 .3 .2 .3 over steps 2 4 6 8, one checkpoint kept: step 4 stays, as a tie goes to the older."""
    checkpoints = checkpoints_of(tmp_path, keep_checkpoints=1, keep_best="set:multi_map")
    for step, value in ((2, 0.1), (4, 0.3), (6, 0.2), (8, 0.3)):
        save(checkpoints, step)
        evaluated(checkpoints.run, step, multi_map=value)
        checkpoints.judge(step, step)
    assert names(checkpoints.run) == ["best", "step_00000004", "step_00000008"]
    assert read_json(checkpoints.run.checkpoints / "best") == {
        **{"folder": "step_00000004", "step": 4, "metric": "set:multi_map", "value": 0.3}
    }
    assert best(checkpoints.run) == checkpoints.run.checkpoints / "step_00000004"
    assert latest(checkpoints.run) == checkpoints.run.checkpoints / "step_00000008"


def test_a_smaller_rank_distance_is_better(tmp_path):
    checkpoints = checkpoints_of(tmp_path, keep_best="set:rank_distance")
    for step, value in ((2, 90.0), (4, 70.0), (6, 80.0)):
        save(checkpoints, step)
        evaluated(checkpoints.run, step, rank_distance=value)
        checkpoints.judge(step, step)
    assert read_json(checkpoints.run.checkpoints / "best")["step"] == 4


def test_a_broken_pointer_stops_before_anything_is_pruned(tmp_path):
    checkpoints = checkpoints_of(tmp_path, keep_checkpoints=1)
    save(checkpoints, 2)
    (checkpoints.run.checkpoints / "best").write_text("[]")
    with pytest.raises(RunError, match=r"best: found '\[\]'; it names no folder"):
        save(checkpoints, 4)
    assert names(checkpoints.run) == ["best", "step_00000002", "step_00000004"]


def test_an_unknown_criterion_is_refused_with_what_there_is(tmp_path):
    checkpoints = checkpoints_of(tmp_path, keep_best="set:multi_mapp")
    save(checkpoints, 2)
    evaluated(checkpoints.run, None, multi_map=0.3, cross_map=None)
    with pytest.raises(RunError, match=r"training.keep_best: found 'set:multi_mapp'; .*Found there: \['multi_map'\]"):
        checkpoints.judge(2, None)
    with pytest.raises(ConfigError, match=r"training.keep_best: .* needs a retrieval set in data.evaluate"):
        config_in(tmp_path, training={"keep_best": "set:map"})

"""The run directory: atomic writes, an honest status, metrics that survive a kill."""

import os
import subprocess
import sys

import pytest

from hybrid_scale.config import RunConfig, validate
from hybrid_scale.errors import RunError
from hybrid_scale.runs import RunDirectory, atomic_path, read_json, readable, write_json
from tests.test_config import MINIMAL, changed


def config(**sections) -> RunConfig:
    return validate(RunConfig, changed(**sections), "x")


def test_an_equal_config_continues_and_another_is_refused(tmp_path):
    run = RunDirectory(tmp_path / "run")
    run.create(config())
    run.create(config())
    with pytest.raises(RunError) as caught:
        run.create(config(sampler={"alpha": 0.25}))
    assert "sampler.alpha: 0.5 -> 0.25" in str(caught.value)
    assert run.config() == validate(RunConfig, MINIMAL, "x")


def test_one_training_at_a_time(tmp_path):
    """A second holder is refused with the first one's name, in this process and in another; the end of a process frees it."""
    holder = "import sys, time; from hybrid_scale.runs import RunDirectory; run = RunDirectory(sys.argv[1]); run.hold(); "
    first = subprocess.Popen(
        [sys.executable, "-c", holder + "print('held', flush=True); time.sleep(600)", str(tmp_path / "run")],
        stdout=subprocess.PIPE,
    )
    try:
        assert first.stdout.readline() == b"held\n"
        with pytest.raises(RunError, match=rf"found 'process {first.pid} on .* since .*'; another training is writing this run"):
            RunDirectory(tmp_path / "run").hold()
    finally:
        first.kill()
        first.communicate()
    run = RunDirectory(tmp_path / "run")
    run.hold()
    with pytest.raises(RunError, match=rf"found 'process {os.getpid()} on "):
        RunDirectory(tmp_path / "run").hold()
    del run
    RunDirectory(tmp_path / "run").hold()


def half_write(path):
    path.write_text("half")
    raise OSError("disk full")


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "status.json"
    write_json(path, {"a": 1})
    with pytest.raises(OSError, match="disk full"), atomic_path(path) as beside:
        half_write(beside)
    assert read_json(path) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_others_may_read_what_a_folder_holds(tmp_path):
    """safetensors makes its files 0600."""
    (tmp_path / "deep").mkdir()
    for path in (tmp_path / "a", tmp_path / "deep/b"):
        path.touch(mode=0o600)
    before = os.umask(0o027)
    try:
        readable(tmp_path)
    finally:
        os.umask(before)
    assert {path.name: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*") if path.is_file()} == {"a": 0o640, "b": 0o640}


def test_metrics_of_a_resumed_run_count_once_and_a_torn_last_line_is_left_out(tmp_path):
    run = RunDirectory(tmp_path)
    for step, loss in ((1, 3.0), (2, 2.0), (2, 2.5), (3, 1.0)):
        run.append_metrics({"step": step, "loss": loss})
    with open(run.metrics_file, "a") as file:
        file.write('{"step": 4, "lo')
    assert [(r["step"], r["loss"]) for r in run.metrics()] == [(1, 3.0), (2, 2.5), (3, 1.0)]


def test_a_broken_line_in_the_middle_is_an_error(tmp_path):
    run = RunDirectory(tmp_path)
    run.metrics_file.write_text('{"step": 1}\nrubbish\n{"step": 2}\n')
    with pytest.raises(RunError, match=r"metrics.jsonl:2: not JSON"):
        run.metrics()


def test_status_before_and_after(tmp_path):
    run = RunDirectory(tmp_path)
    assert run.status() == {"status": "planned"}
    run.set_status("failed", reason="disk full")
    assert run.status()["reason"] == "disk full"


def test_nan_is_never_logged(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        RunDirectory(tmp_path).append_metrics({"step": 1, "loss": float("nan")})

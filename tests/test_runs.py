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


def test_a_torn_line_takes_no_other_along(tmp_path):
    """Torn at the end, then gone on after: cut by a kill, by a full disk within a character, zeros after a power failure."""
    run = RunDirectory(tmp_path)
    for step, torn in enumerate((b'{"step": 9, "lo', b'{"step": 9, "note": "\xc3', b"\0\0\0\0", b"17", b""), start=1):
        run.append_metrics({"step": step, "loss": float(step)})
        with open(run.metrics_file, "ab") as file:
            file.write(torn)
        assert [(r["step"], r["loss"]) for r in run.metrics()] == [(s, float(s)) for s in range(1, step + 1)]


def test_a_run_that_goes_on_holds_each_step_once(tmp_path):
    """Steps 1 to 4 were logged, the checkpoint is of step 2: 3 and 4 go, torn lines too; of step 2 the later line stays."""
    run = RunDirectory(tmp_path)
    assert run.rewind_metrics(5) == 0, "there is no file yet"
    for step, loss in ((1, 3.0), (2, 2.0), (2, 2.5), (3, 1.0), (4, 0.1)):
        run.append_metrics({"step": step, "loss": loss})
    with open(run.metrics_file, "a") as file:
        file.write('{"step": 5, "lo')
    assert run.rewind_metrics(2) == 1
    assert run.metrics_file.read_text() == '{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.5}\n'
    run.append_metrics({"step": 3, "loss": 0.9})
    assert [(r["step"], r["loss"]) for r in run.metrics()] == [(1, 3.0), (2, 2.5), (3, 0.9)]
    assert run.rewind_metrics(0) == 0
    assert run.metrics() == []


def test_status_before_and_after(tmp_path):
    run = RunDirectory(tmp_path)
    assert run.status() == {"status": "planned"}
    run.set_status("failed", reason="disk full")
    assert run.status()["reason"] == "disk full"


def test_nan_is_never_logged(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        RunDirectory(tmp_path).append_metrics({"step": 1, "loss": float("nan")})

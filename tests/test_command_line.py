"""Arguments of the scripts: in any order, and with what launchers add."""

import argparse
import itertools
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hybrid_scale.command_line import read_arguments
from launch import evaluate, plan, study


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser()
    made.add_argument("config")
    made.add_argument("overrides", nargs="*")
    made.add_argument("--dry-run", action="store_true")
    made.add_argument("--ranks", type=int)
    return made


@pytest.mark.parametrize("order", list(itertools.permutations(["a=1", "--dry-run", "--ranks=4", "b.c="])))
@pytest.mark.parametrize("first", [True, False])
def test_options_and_settings_in_any_order(order: tuple[str, ...], first: bool) -> None:
    given = ["run.yaml", *order] if first else [order[0], "run.yaml", *order[1:]]
    config, *overrides = [word for word in given if not word.startswith("--")]
    found = read_arguments(parser(), given)
    assert (found.config, found.overrides, found.dry_run, found.ranks) == (config, overrides, True, 4)


@pytest.mark.parametrize("added", ["--local_rank=1", "--local-rank=1"])
def test_the_local_rank_that_launchers_add_is_accepted(added: str) -> None:
    assert read_arguments(parser(), [added, "run.yaml", "--dry-run", "a=1"]).overrides == ["a=1"]


def test_an_unknown_option_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        read_arguments(parser(), ["run.yaml", "--dry", "--rank_s", "a=1"])
    assert "--rank_s" in capsys.readouterr().err


@pytest.mark.parametrize(
    "given", [["s.yaml", "--site", "x", "a=1"], ["--site", "x", "s.yaml", "a=1"], ["s.yaml", "a=1", "--site=x"]]
)
def test_a_study_takes_them_in_any_order(monkeypatch: pytest.MonkeyPatch, given: list[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["study.py", "submit", *given])
    found = study.arguments()
    assert (found.action, found.study, found.settings) == ("submit", Path("s.yaml"), ["a=1"])
    assert (found.site, found.local) == (Path("x"), False)


def test_an_unknown_action_of_a_study_names_the_known_ones(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["study.py", "start", "s.yaml"])
    with pytest.raises(SystemExit, match="2"):
        study.arguments()
    assert "'expand', 'submit', 'resubmit'" in capsys.readouterr().err


def test_a_plan_and_an_evaluation_do_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["plan.py", "--nodes", "2", "r.yaml", "--best", "model.query_prompt="])
    assert plan.parse().settings == ["model.query_prompt="]
    found = evaluate.arguments(["--run", "r", "--out", "o.json", "data/x"])
    assert (found.data, found.run) == (Path("data/x"), Path("r"))


def test_ctrl_c_is_a_line_and_other_errors_keep_their_traceback() -> None:
    """What is made inside a `with` is taken away before; a shell sees a process that ended by SIGINT."""
    script = "import argparse, contextlib, sys, hybrid_scale.command_line as c; c.read_arguments(argparse.ArgumentParser(), [])\n"
    script += "with contextlib.closing(type('T', (), {'close': lambda self: print('cleared')})()): raise "
    ends = {}
    for error in ("KeyboardInterrupt", "ZeroDivisionError"):
        ends[error] = subprocess.run([sys.executable, "-c", script + error], capture_output=True, text=True)
    stopped, broken = ends.values()
    assert (stopped.returncode, stopped.stdout, stopped.stderr) == (-signal.SIGINT, "cleared\n", "stopped by Ctrl-C\n")
    assert broken.returncode == 1
    assert "Traceback" in broken.stderr

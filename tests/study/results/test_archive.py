"""A study's archive: small, without texts, and the report that is written from it says the same."""

import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from pandas.testing import assert_frame_equal

from hybrid_scale.errors import RunError
from hybrid_scale.runs import RunDirectory, write_json
from hybrid_scale.study.grid import Plan, plan_study
from hybrid_scale.study.report.page import report
from hybrid_scale.study.results.archive import by_question, write_archive
from hybrid_scale.study.results.queries import CUTS, Queries, macro_mean
from tests.study.fabricate import SCORES, evaluation, fabricated, scaled, single_queries, start, write_study
from tests.test_floors import ROOT

TABLES = ("study.csv", "primary.csv", "comparisons.csv", "trends.csv", "predictions.csv")
SIZES = ("0.5B", "3B", "7B")


def unpacked(archive: Path, plan: Plan, home: Path) -> Plan:
    """`plan` with its directory in `home`, filled from the archive."""
    with tarfile.open(archive) as file:
        file.extractall(home, filter="data")
    return plan_study(Path(plan.source), [f"study.directory={home}"])


def mean(table: pd.DataFrame, key: str) -> float:
    values = Queries(table, "").values(key)
    assert values is not None
    return macro_mean(values)


def test_the_report_from_the_archive_says_the_same(tmp_path: Path) -> None:
    plan = scaled(tmp_path, SIZES, questions=20)
    baseline = evaluation("xquad_r", 0, {"mono_map": 0.61, "cross_map": 0.2}) | {"fingerprint": "f00d"}
    write_json(plan.directory / "baselines/bm25/eval/xquad_r.json", baseline)
    report(plan)
    runs = write_archive(plan, tmp_path / "runs.tar.xz")
    assert runs == [run.id for run in plan.runs]
    again = unpacked(tmp_path / "runs.tar.xz", plan, tmp_path / "again")
    text = report(again).read_text(encoding="utf-8")
    assert "bm25" in text
    for name in TABLES:
        before, after = pd.read_csv(plan.directory / name), pd.read_csv(again.directory / name)
        assert len(before) or name == "predictions.csv"
        assert_frame_equal(before, after, rtol=2e-4, atol=1e-6)  # bootstrap and p values move with the seventh digit of a score


def test_it_goes_on_with_what_it_lacks(tmp_path: Path) -> None:
    plan = fabricated(tmp_path, {"mono": SCORES["mono"], "cross": SCORES["cross"]}, seeds=[0])
    start(plan.runs[2], 3).set_status("running")
    RunDirectory(plan.runs[1].directory).set_status("failed", reason="out of memory")
    assert write_archive(plan, tmp_path / "runs.tar.xz") == ["mono.seed-0", "cross.seed-0"]
    again = unpacked(tmp_path / "runs.tar.xz", plan, tmp_path / "again")
    said = [RunDirectory(run.directory).status()["status"] for run in again.runs]
    assert said == ["done", "failed", "planned", "planned"]


def test_an_archive_is_the_same_bytes_again(tmp_path: Path) -> None:
    plan = scaled(tmp_path, SIZES[:2], questions=5, seeds=(0,))
    write_archive(plan, tmp_path / "one.tar.xz")
    for file in plan.directory.rglob("*"):
        file.touch()
    write_archive(plan, tmp_path / "two.tar.xz")
    assert (tmp_path / "one.tar.xz").read_bytes() == (tmp_path / "two.tar.xz").read_bytes()
    with tarfile.open(tmp_path / "one.tar.xz") as file:
        names = file.getnames()
    assert len([name for name in names if name.startswith("runs/") and name.endswith("eval/xquad_r.parquet")]) == 6
    assert not [name for name in names if name.startswith("/") or "checkpoints" in name]


def test_no_ended_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"no run that has ended.*Run the study"):
        write_archive(plan_study(write_study(tmp_path)), tmp_path / "runs.tar.xz")


def test_a_question_counts_as_its_queries_did() -> None:
    table = single_queries(30, 7.0, (0.02, 0.06, 0.05), 0)
    small = by_question(table.drop(columns="relevant"))
    assert len(small) == 3 * 30  # union, own, others; 3 languages x 4 pools before
    keys = [key for key, cut in CUTS.items() if cut.column in table]
    assert len(keys) > 8
    for key in keys:
        assert mean(small, key) == pytest.approx(mean(table, key), abs=1e-12)


@pytest.mark.parametrize("fault", ["a query fewer", "a value missing", "in parts"])
def test_rows_stay_where_a_mean_would_change_a_statistic(fault: str) -> None:
    table = single_queries(6, 7.0, (0.0, 0.0, 0.0), 0).drop(columns="relevant")
    if fault == "a query fewer":
        table = table[table["query"] != "3-de"]
    if fault == "a value missing":
        table.loc[table["pool"] != "union", "map"] = table["map"].where(table["query"] != "2-en", np.nan)
    if fault == "in parts":
        table = table.assign(part="android")
    small = by_question(table)
    for key in ("mono_map", "cross_map", "multi_map"):
        assert mean(small, key) == pytest.approx(mean(table, key), abs=1e-12)
    kept = small[small["pool"] != "union"]
    assert set(zip(kept["query"], kept["pool"], strict=True)) == {
        (query, pool) for query, pool in zip(table["query"], table["pool"], strict=True) if pool != "union"
    }


def test_the_command(tmp_path: Path) -> None:
    plan = scaled(tmp_path, SIZES[:1], questions=4, seeds=(0,))
    out = tmp_path / "out/runs.tar.xz"
    command = [sys.executable, str(ROOT / "launch/study.py"), "archive", str(plan.source), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{out}: 3 of 3 runs, ")
    assert tarfile.is_tarfile(out)

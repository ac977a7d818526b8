import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from hybrid_scale.errors import RunError
from hybrid_scale.runs import RunDirectory
from hybrid_scale.study.collect import collect, strangers, tidy, write_tables
from hybrid_scale.study.grid import plan_study
from hybrid_scale.study.scores import arms, untrained
from tests.study.fabricate import SCORES, fabricated, finish, start, write_study


def test_a_small_expected_table(tmp_path: Path) -> None:
    plan = fabricated(tmp_path, {"mono": SCORES["mono"]}, seeds=[0])
    table = tidy(collect(plan))
    final = table[table["final"].fillna(False) & table["language"].isna()]
    assert list(zip(final["arm"], final["seed"], final["step"], final["metric"], final["value"], strict=True)) == [
        ("mono", 0, 20, metric, value) for metric, value in SCORES["mono"].items()
    ]
    cell = table[table["final"].fillna(False) & (table["metric"] == "map_matrix")].set_index(["language", "passage_language"])
    assert cell.loc[("en", "en"), "value"] == 0.7918
    assert len(cell) == 121


def test_unfinished_runs_stay_with_their_reason(tmp_path: Path) -> None:
    plan = fabricated(tmp_path, {"mono": SCORES["mono"]}, seeds=[0])
    start(plan.runs[1], 7).set_status("failed", reason="out of memory")
    collected = collect(plan)
    rows = tidy(collected).set_index("run")
    assert set(rows.index) == {run.id for run in plan.runs}
    assert (rows.loc["cross.seed-0", "status"], rows.loc["cross.seed-0", "reason"]) == ("failed", "out of memory")
    assert rows.loc["cross.seed-0", "steps"] == 7
    assert rows.loc["hybrid.seed-0", "status"] == "planned"
    assert rows["value"].isna()["hybrid.seed-0"]


def test_an_untouched_study_can_be_collected(tmp_path: Path) -> None:
    plan = plan_study(write_study(tmp_path))
    assert list(tidy(collect(plan))["status"]) == ["planned"] * 8
    write_tables(plan, collect(plan))


def test_only_finished_runs_count(tmp_path: Path) -> None:
    plan = fabricated(tmp_path, SCORES, seeds=[0, 1])
    RunDirectory(plan.runs[1].directory).set_status("running")
    collected = collect(plan)
    mono, cross = arms(collected, "xquad_r")[:2]
    assert dict(mono.scores["mono_map"].by_seed) == {0: 0.7918}
    assert (mono.runs, mono.scores["mono_map"].deviation) == (2, None)
    assert cross.scores["mono_map"].mean == pytest.approx(0.7554 * 1.001)
    assert set(untrained(collected, "xquad_r")) == {""}


def test_tables_are_read_back(tmp_path: Path) -> None:
    plan = fabricated(tmp_path, SCORES, seeds=[0])
    collected = collect(plan)
    csv, parquet = write_tables(plan, collected)
    assert len(pd.read_csv(csv)) == len(pd.read_parquet(parquet)) == len(tidy(collected))


def test_arms_that_differ_in_more_than_batches_are_kept_apart(tmp_path: Path) -> None:
    both = [
        {"name": f"{base}-{arm}", "set": {"sampler.arm": arm, "model.base": base, "training.log_every_steps": every}}
        for base, every in (("small", 1), ("large", 2))
        for arm in ("mono", "cross")
    ]
    runs = collect(plan_study(write_study(tmp_path, arms=both, seeds=[0]))).runs
    assert list(runs["group"]) == ['model.base = "small"'] * 2 + ['model.base = "large"'] * 2


def test_a_run_started_with_other_settings_is_marked(tmp_path: Path) -> None:
    plan = fabricated(tmp_path, SCORES, seeds=[0])
    later = plan_study(Path(plan.source), ["optimizer.learning_rate=5e-5"])
    runs = collect(later).runs
    assert runs["changed"].all()
    assert set(runs["learning_rate"]) == {1e-4}


def test_a_broken_evaluation_is_named(tmp_path: Path) -> None:
    plan = fabricated(tmp_path, {}, seeds=[0])
    finish(plan.runs[0], SCORES["mono"])
    file = RunDirectory(plan.runs[0].directory).evaluation_file("xquad_r")
    file.write_text('{"task": "xquad_r", "step": 3}', encoding="utf-8")
    with pytest.raises(RunError, match=r"xquad_r\.json: found KeyError\('metrics'\); not an evaluation file"):
        collect(plan)


def test_folders_outside_the_study_are_told(tmp_path: Path) -> None:
    plan = fabricated(tmp_path, SCORES, seeds=[0, 1])
    assert strangers(plan_study(Path(plan.source), ["seeds=[0]"])) == [f"{arm}.seed-1" for arm in sorted(SCORES)]


def test_the_study_floor_needs_no_torch() -> None:
    code = "import sys; sys.modules['torch'] = None; import hybrid_scale.study.report, launch.study"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=True)

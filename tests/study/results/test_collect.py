import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from hybrid_scale.runs import RunDirectory, read_json, write_json
from hybrid_scale.study.grid import Plan, plan_study
from hybrid_scale.study.results.collect import collect, strangers, tidy, warnings, write_tables
from hybrid_scale.study.results.scaling import priced
from hybrid_scale.study.results.scores import arms, untrained
from tests.study.fabricate import SCORES, fabricated, save_queries, scaled, single_queries, start, write_study

ARMS = [{"name": arm, "set": {"sampler.arm": arm}} for arm in ("mono", "cross", "hybrid")]


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


def edited(plan: Plan, file: str, text: str) -> pd.Series:
    """The row of the first run after one of its files was changed by hand; the others must stay as they were."""
    before = collect(plan)
    (plan.runs[0].directory / file).write_text(text, encoding="utf-8")
    after = collect(plan)
    assert list(after.runs["run"]) == [run.id for run in plan.runs]
    others = before.runs.iloc[1:].reset_index(drop=True)
    pd.testing.assert_frame_equal(after.runs.iloc[1:].reset_index(drop=True), others)
    mine = plan.runs[0].id
    assert (after.values["run"] != mine).sum() == (before.values["run"] != mine).sum()
    assert "" not in [told for _, told in warnings(after.runs)]
    write_tables(plan, after)
    row: pd.Series = after.runs.iloc[0]
    return row


BROKEN = {
    "status.json": ['{"status": "finished"}', "[]", "{"],
    "config.yaml": ["sampler: {arm: wrong}", "]"],
    "metrics.jsonl": ['{"loss": 1}\n', "x\n{}\n"],
    "manifest.json": ["[1]", "{"],
}


@pytest.mark.parametrize(("file", "text"), [(file, text) for file, texts in BROKEN.items() for text in texts])
def test_a_file_that_was_broken_by_hand_breaks_its_run_alone(tmp_path: Path, file: str, text: str) -> None:
    row = edited(fabricated(tmp_path, SCORES, seeds=[0]), file, text)
    assert row["status"] == "broken"
    assert file in row["reason"]


def test_a_torn_line_of_the_log_is_told_and_the_run_counts(tmp_path: Path) -> None:
    plan = fabricated(tmp_path, SCORES, seeds=[0])
    log = (plan.runs[0].directory / "metrics.jsonl").read_text(encoding="utf-8")
    row = edited(plan, "metrics.jsonl", '{"step": 1, "lo\n' + log)
    assert row["status"] == "done"
    assert "1 of the lines in metrics.jsonl are torn" in row["notes"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"task": "xquad_r", "step": 3}', "found KeyError('metrics'); not an evaluation file"),
        ('{"task": "other", "step": 20, "metrics": {}}', "the file says it is of task other"),
        ('{"task": "xquad_r", "step": 20, "metrics": {"mono_map": NaN}}', "mono_map is NaN, not a finite number"),
        ('{"task": "xquad_r", "step": 20, "metrics": {"mono_map": "0.8"}}', 'mono_map is "0.8", not a finite number'),
        ('{"task": "xquad_r", "step": 20, "metrics": {"mono_map": 80.1}}', "mono_map is 80.1, outside of what it can be"),
        ("{", "not JSON"),
    ],
)
def test_a_broken_evaluation_is_told_and_nothing_else_is_lost(tmp_path: Path, text: str, said: str) -> None:
    plan = fabricated(tmp_path, SCORES, seeds=[0])
    row = edited(plan, "eval/xquad_r.json", text)
    assert row["status"] == "done"
    assert said in row["notes"]
    assert "xquad_r.json" in row["notes"]
    assert arms(collect(plan), "xquad_r")[0].scores == {}


def test_a_missing_evaluation_is_told_with_its_reason(tmp_path: Path) -> None:
    plan = fabricated(tmp_path, SCORES, seeds=[0], evaluate=["data/miracl"])
    RunDirectory(plan.runs[0].directory).evaluation_file("xquad_r").unlink()
    write_json(plan.runs[1].directory / "evaluation.json", {"failed": {"miracl": "exit code 1; see the log of job 7"}})
    notes = list(collect(plan).runs["notes"])
    assert notes[0] == "not evaluated on xquad_r; not evaluated on miracl"
    assert notes[1] == "not evaluated on miracl (exit code 1; see the log of job 7)"


def test_a_log_that_was_cut_is_told(tmp_path: Path) -> None:
    plan = fabricated(tmp_path, SCORES, seeds=[0])
    file = plan.runs[0].directory / "metrics.jsonl"
    kept = file.read_text(encoding="utf-8").splitlines(keepends=True)[:4]
    file.write_text("".join(kept), encoding="utf-8")
    every = plan.runs[0].config.training.log_every_steps
    assert every < 16
    assert collect(plan).runs["notes"][0] == "done, but its log ends at step 4 of 20"


def test_means_that_arent_those_of_the_single_queries_dont_count(tmp_path: Path) -> None:
    plan = scaled(tmp_path, models=["7B"], seeds=[0, 1], questions=4)
    file = RunDirectory(plan.runs[0].directory).evaluation_file("xquad_r")
    content = read_json(file)
    content["metrics"]["cross_map"] += 0.01
    write_json(file, content)
    collected = collect(plan)
    assert "xquad_r.json says cross_map" in collected.runs["notes"][0]
    assert collected.values.loc[collected.values["run"] == plan.runs[0].id, "doubt"].notna().all()
    assert collected.values.loc[collected.values["run"] != plan.runs[0].id, "doubt"].isna().all()
    assert set(arms(collected, "xquad_r")[0].scores["cross_map"].by_seed) == {1}


def test_sizes_are_kept_apart_and_belong_to_one_series(tmp_path: Path) -> None:
    plan = scaled(tmp_path, models=["0.5B", "7B"], seeds=[0], questions=4)
    runs = collect(plan).runs
    assert list(runs["group"]) == ["model 0.5B"] * 3 + ["model 7B"] * 3
    assert set(runs["series"]) == {""}
    found = arms(collect(plan), "xquad_r")
    assert [(arm.name, arm.model) for arm in found] == [(a, m) for m in ("0.5B", "7B") for a in ("mono", "cross", "hybrid")]
    assert [list(arm.run_of.values()) for arm in found] == [[run.id] for run in plan.runs]
    assert all(len(arm.scores["mono_map"].by_seed) == 1 for arm in found)


def test_a_model_started_with_other_settings_is_a_group_of_its_own(tmp_path: Path) -> None:
    scaled(tmp_path, models=["0.5B", "7B"], seeds=[0], questions=4)
    axis = [
        {"name": name, "set": {"model.base": f"Qwen/Qwen2.5-{name}", "optimizer.learning_rate": rate}}
        for name, rate in (("0.5B", 1e-4), ("7B", 5e-5))
    ]
    later = plan_study(write_study(tmp_path, models=axis, arms=ARMS, seeds=[0]))
    groups = list(collect(later).runs["group"])
    assert groups[:3] == ["model 0.5B"] * 3
    assert all(group == "model 7B" or group.startswith("model 7B, optimizer.learning_rate = ") for group in groups[3:])


def test_folders_outside_the_study_are_told(tmp_path: Path) -> None:
    plan = fabricated(tmp_path, SCORES, seeds=[0, 1])
    assert strangers(plan_study(Path(plan.source), ["seeds=[0]"])) == [f"{arm}.seed-1" for arm in sorted(SCORES)]


def test_the_study_floor_needs_no_torch() -> None:
    code = "import sys; import hybrid_scale.study.report.page, launch.study; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[3], check=True)


def test_a_run_on_other_data_is_told_and_doesnt_count(tmp_path: Path) -> None:
    plan = fabricated(tmp_path, SCORES, seeds=[0, 1])
    for run in plan.runs:
        other = run.id == "cross.seed-1"
        file = RunDirectory(run.directory).manifest_file
        write_json(file, read_json(file) | {"data": {"fingerprint": "beef0000" if other else "f00d0000"}})
    collected = collect(plan)
    ((run, told),) = warnings(collected.runs)
    assert run == "cross.seed-1"
    assert told == "trained on other data than 7 runs of data/pairs (fingerprint beef0000 for f00d0000); its results don't count"
    by_seed = {arm.name: set(arm.scores["mono_map"].by_seed) for arm in arms(collected, "xquad_r")}
    assert by_seed == {"mono": {0, 1}, "cross": {0}, "hybrid": {0, 1}, "mixed": {0, 1}}


def test_a_changed_run_is_told_at_the_top(tmp_path: Path) -> None:
    plan = fabricated(tmp_path, SCORES, seeds=[0])
    later = plan_study(Path(plan.source), ["optimizer.learning_rate=5e-5"])
    assert len(warnings(collect(plan).runs)) == 0
    assert {told.split(";")[0] for _, told in warnings(collect(later).runs)} == {
        "started with other settings than the study file has now"
    }


def test_infinity_in_a_table_of_queries_is_a_contradiction_and_no_end_of_the_report(tmp_path: Path) -> None:
    plan = scaled(tmp_path, models=["7B"], seeds=[0], questions=4)
    directory = RunDirectory(plan.runs[0].directory)
    table = single_queries(4, 7, (0.02, 0, 0), 0)
    table.loc[table.index[:12], "map"] = float("inf")
    save_queries(directory, "xquad_r", table)
    collected = collect(plan)
    ((run, told),) = warnings(collected.runs)
    assert run == plan.runs[0].id
    assert "its single queries say inf" in told
    assert [each.arm for each in priced(collected, {run.id: run.directory for run in plan.runs})] == ["cross", "hybrid"]

"""A pilot chooses a setting for each model; the main study takes it over, plans the pilot with it, and waits for it."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from hybrid_scale.errors import ConfigError
from hybrid_scale.study.grid import Plan, development, plan_study
from hybrid_scale.study.pilot import chosen_lines, read_chosen
from hybrid_scale.study.report.page import report
from launch import study as study_entry
from tests.study.fabricate import BASE, finish

RATES = {"rate-3e-5": 3e-5, "rate-1e-4": 1e-4, "rate-3e-4": 3e-4}
MODELS = [{"name": name, "set": {"model.base": f"Qwen/Qwen3-{name}"}} for name in ("0.6B", "4B")]
CURVES = {"0.6B": (0.40, 0.50, 0.45), "4B": (0.60, 0.58, 0.41)}
"""multi mAP of each rate: the small model's best lies inside the grid, the large one's at its edge."""


def write(path: Path, tree: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


def pilot_tree(folder: Path) -> dict[str, Any]:
    return {
        "study": {"name": "pilot", "directory": str(folder / "pilot")},
        "choose": {"metric": "dev:multi_map"},
        "base": {**BASE, "data": {"train": "data/pairs", "evaluate": ["data/dev"]}},
        "models": MODELS,
        "arms": [{"name": name, "set": {"optimizer.learning_rate": rate}} for name, rate in RATES.items()],
        "seeds": [0, 1],
    }


def main_tree(folder: Path, **changes: Any) -> dict[str, Any]:
    return {
        "study": {"name": "main", "directory": str(folder / "main")},
        "pilot": "pilot.yaml",
        "base": BASE,
        "models": MODELS,
        "arms": [{"name": arm, "set": {"sampler.arm": arm}} for arm in ("mono", "hybrid")],
        **changes,
    }


def run_pilot(folder: Path) -> Plan:
    plan = plan_study(write(folder / "pilot.yaml", pilot_tree(folder)))
    for run in plan.runs:
        score = CURVES[str(run.model)][list(RATES).index(run.arm)]
        finish(run, {"mono_map": 0.7, "cross_map": 0.6, "multi_map": score, "rank_distance": 300.0}, "dev")
    return plan


def test_the_best_rate_of_each_model_is_written_and_taken_over(tmp_path: Path) -> None:
    pilot = run_pilot(tmp_path)
    report(pilot)
    chosen = read_chosen(pilot.directory)
    assert chosen is not None
    assert {name: (choice.value, choice.at_edge) for name, choice in chosen.models.items()} == {
        "0.6B": (1e-4, False),
        "4B": (3e-5, True),
    }
    main = plan_study(write(tmp_path / "main.yaml", main_tree(tmp_path)))
    rates = {run.model: run.config.optimizer.learning_rate for run in main.runs}
    assert rates == {"0.6B": 1e-4, "4B": 3e-5}
    assert main.pending == ""
    assert [line for line in main.checks if "edge" in line] == [chosen_lines(chosen)[1]]


def test_the_mean_over_seeds_decides(tmp_path: Path) -> None:
    """`finish` adds .2 % for seed 1: the mean of 0.5 and 0.501."""
    pilot = run_pilot(tmp_path)
    report(pilot)
    chosen = read_chosen(pilot.directory)
    assert chosen is not None
    best = chosen.models["0.6B"]
    assert best.score == pytest.approx((0.5 + 0.5 * 1.002) / 2)
    assert [(one.value, one.seeds) for one in best.tried] == [(3e-5, 2), (1e-4, 2), (3e-4, 2)]


def test_nothing_is_chosen_before_every_rate_has_been_tried(tmp_path: Path) -> None:
    plan = plan_study(write(tmp_path / "pilot.yaml", pilot_tree(tmp_path)))
    for run in plan.runs[:-2]:
        finish(run, {"multi_map": 0.5}, "dev")
    report(plan)
    assert read_chosen(plan.directory) is None


def test_a_study_waits_for_its_pilot_but_can_be_planned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "pilot.yaml", pilot_tree(tmp_path))
    path = write(tmp_path / "main.yaml", main_tree(tmp_path))
    plan = plan_study(path)
    assert plan.pilot is not None
    assert len(plan.pilot.runs) == 2 * 3 * 2
    for action in ("run", "submit"):
        monkeypatch.setattr("sys.argv", ["study.py", action, str(path), *(["--local"] if action == "submit" else [])])
        assert study_entry.main() == 2
        assert "has chosen no optimizer.learning_rate yet" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", ["study.py", "expand", str(path)])
    assert study_entry.main() == 0
    assert plan_study(path, ["pilot=null"]).pending == ""


def test_a_study_may_score_its_pilots_set_for_learning_curves_alone(tmp_path: Path) -> None:
    """Then the set is no test: it is flagged, and the primary family can't name it."""
    write(tmp_path / "pilot.yaml", pilot_tree(tmp_path))
    curves = {"train": "t", "evaluate": ["data/xquad_r"], "evaluate_during": ["data/dev", "data/xquad_r"]}
    base = {**BASE, "data": curves, "training": {**BASE["training"], "evaluate_every_steps": 5}}
    plan = plan_study(write(tmp_path / "main.yaml", main_tree(tmp_path, base=base)))
    assert development(plan.config, plan.runs) == ("dev",)
    tree = main_tree(tmp_path, base=base)
    tree["study"]["primary"] = {"metrics": ["dev:multi_map"]}
    with pytest.raises(ConfigError, match=r"study\.primary\.metrics: found 'dev:multi_map'; must name a set"):
        plan_study(write(tmp_path / "main.yaml", tree))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"base": {**BASE, "data": {"train": "t", "evaluate": ["data/dev"]}}},
            r"evaluate: found 'dev'; the pilot 'pilot' chooses on",
        ),
        ({"evaluate": ["elsewhere/dev"]}, r"evaluate: found 'dev'; the pilot 'pilot' chooses on this set"),
        (
            {"models": [*MODELS, {"name": "8B", "set": {"model.base": "Qwen/Qwen3-8B"}}]},
            r"models: found '8B'; the pilot 'pilot' has",
        ),
        (
            {"models": [{**MODELS[0], "set": {**MODELS[0]["set"], "optimizer.learning_rate": 1.0}}]},
            r"model '0\.6B': optimizer\.learning_rate: found 1\.0; the pilot chooses this key",
        ),
    ],
)
def test_a_study_that_doesnt_fit_its_pilot_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    report(run_pilot(tmp_path))
    with pytest.raises(ConfigError, match=message):
        plan_study(write(tmp_path / "main.yaml", main_tree(tmp_path, **changes)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"choose": {"metric": "test:multi_map"}}, r"choose\.metric: found 'test:multi_map'; no such set is evaluated"),
        (
            {"arms": [{"name": "a"}, {"name": "b", "set": {"optimizer.learning_rate": 1.0}}]},
            r"every arm of a pilot must set another",
        ),
        ({"choose": {"metric": "dev:multimap"}}, r"choose\.metric: found 'dev:multimap'"),
    ],
)
def test_a_pilot_that_cant_choose_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_study(write(tmp_path / "pilot.yaml", {**pilot_tree(tmp_path), **changes}))


def test_a_study_without_a_section_choose_is_no_pilot(tmp_path: Path) -> None:
    tree = pilot_tree(tmp_path)
    del tree["choose"]
    write(tmp_path / "pilot.yaml", tree)
    with pytest.raises(ConfigError, match=r"pilot: found 'pilot\.yaml'; this study decides nothing"):
        plan_study(write(tmp_path / "main.yaml", main_tree(tmp_path)))


def test_a_study_is_not_its_own_pilot(tmp_path: Path) -> None:
    path = write(tmp_path / "main.yaml", main_tree(tmp_path, pilot="main.yaml"))
    with pytest.raises(ConfigError, match=r"pilot: found 'main\.yaml'; a study must not be its own pilot"):
        plan_study(path)

from pathlib import Path

import pytest

from hybrid_scale.errors import ConfigError
from hybrid_scale.study.grid import plan_study
from tests.study.fabricate import BASE, write_study


def test_expands_arms_times_seeds_with_stable_ids(tmp_path: Path) -> None:
    plan = plan_study(write_study(tmp_path, overrides={"optimizer.learning_rate": 2e-5}))
    assert [run.id for run in plan.runs][:3] == ["mono.seed-0", "mono.seed-1", "cross.seed-0"]
    assert len(plan.runs) == 8
    first = plan.runs[0].config
    assert (first.run.name, first.run.seed) == ("mono.seed-0", 0)
    assert first.run.directory == str(tmp_path / "out" / "runs" / "mono.seed-0")
    assert first.sampler.arm == "mono"
    assert first.optimizer.learning_rate == 2e-5
    assert not (tmp_path / "out").exists()


def test_says_what_is_equal_and_what_varies(tmp_path: Path) -> None:
    checks = plan_study(write_study(tmp_path)).checks
    assert "equal in all runs: sampler.global_batch = 64" in checks
    assert "training rows of a run (global batch x steps): 1,280" in checks
    assert 'arm cross: sampler.arm = "cross"' in checks


def test_base_may_be_a_file_beside_the_study(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("data: {train: d}\nmodel: {base: m}\ntraining: {max_steps: 5}\n", encoding="utf-8")
    assert plan_study(write_study(tmp_path, base="base.yaml")).runs[0].config.training.max_steps == 5
    with pytest.raises(ConfigError, match=r"study\.yaml: base: found 'absent\.yaml'; no such run config\. Looked for"):
        plan_study(write_study(tmp_path, base="absent.yaml"))


def test_settings_of_the_command_line(tmp_path: Path) -> None:
    path = write_study(tmp_path)
    plan = plan_study(path, ["training.max_steps=3", "study.directory=elsewhere", "launch.processes=2", "model.lora=null"])
    assert plan.runs[0].config.training.max_steps == 3
    assert plan.runs[0].config.model.lora is None
    assert plan.directory == Path("elsewhere")
    assert plan.config.launch.processes == 2
    with pytest.raises(ConfigError, match=r"sampler\.arm: found 'cross'; the arm 'mono' sets this key itself"):
        plan_study(path, ["sampler.arm=cross"])


def arms(**of_second: object) -> list[dict[str, object]]:
    return [{"name": "a", "set": {"sampler.arm": "mono"}}, {"name": "b", "set": {"sampler.arm": "cross", **of_second}}]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arms": arms(**{"sampler.globl_batch": 4})}, r"study\.yaml: arm 'b': sampler\.globl_batch: found 4; unknown key"),
        ({"arms": arms(**{"training.max_steps": 0})}, r"study\.yaml: arm 'b': training\.max_steps: found 0"),
        ({"arms": arms(**{"run.seed": 3})}, r"arm 'b': run\.seed: found 3; the study itself gives a run its"),
        ({"arms": arms(**{"sampler.global_batch": 32})}, r"sampler\.global_batch: found '64 \(a\); 32 \(b\)'; .*may_differ"),
        ({"arms": arms(**{"training.max_steps": 9})}, r"training\.max_steps: found '20 \(a\); 9 \(b\)'"),
        ({"arms": arms(**{"sampler.arm": "mono"})}, r"arm: found 'b'; the arm 'a' has the same settings"),
        ({"arms": [*arms(), *arms()]}, r"study\.yaml: arms: found 'a'; two arms have this name"),
        ({"arms": []}, r"study\.yaml: arms: found"),
        ({"arms": [{"name": "../a"}]}, r"study\.yaml: arms\.0\.name: found '\.\./a'"),
        ({"seeds": [1, 1]}, r"study\.yaml: seeds: found 1; a seed stands twice"),
        ({"seed": [1]}, r"study\.yaml: seed: found \[1\]; unknown key\. Did you mean 'seeds'"),
        ({"overrides": {"run.directory": "x"}}, r"study\.yaml: overrides: run\.directory"),
        ({"overrides": {"training.max_steps.x": 1}}, r"study\.yaml: overrides: override training\.max_steps\.x"),
    ],
)
def test_refuses_with_file_arm_and_key(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_study(write_study(tmp_path, **changes))


def test_a_study_may_allow_a_difference(tmp_path: Path) -> None:
    changed = arms(**{"sampler.global_batch": 32})
    plan = plan_study(write_study(tmp_path, arms=changed, may_differ=["sampler.global_batch"]))
    assert "differs, as may_differ allows: sampler.global_batch = 64 (a); 32 (b)" in plan.checks
    assert "training rows of a run (global batch x steps): 640 or 1,280" in plan.checks


def test_the_base_is_left_as_it_was(tmp_path: Path) -> None:
    plan_study(write_study(tmp_path))
    assert "run" not in BASE
    assert "arm" not in BASE["sampler"]

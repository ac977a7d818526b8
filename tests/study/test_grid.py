from pathlib import Path

import pytest

from hybrid_scale.errors import ConfigError
from hybrid_scale.study.grid import negatives_by_arm, plan_study
from hybrid_scale.study.groups import groups
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


def test_arms_with_unequal_negatives_are_refused_with_their_numbers(tmp_path: Path) -> None:
    """One pool of the whole batch for the cross arm, as `composed` batches once had: 63 negatives a row against 15."""
    unequal = arms(**{"sampler.pool_rows": 64})
    with pytest.raises(
        ConfigError, match=r"study\.yaml: negatives a row: found '15 \(a\); 63 \(b\)'; runs are compared at equal numbers"
    ):
        plan_study(write_study(tmp_path, arms=unequal))
    scheduled = arms(**{"sampler.composition": "scheduled", "sampler.pool_rows": 64})
    with pytest.raises(
        ConfigError, match=r"'15 \(a\); 63 \(b\)'.*one sampler\.pool_rows, or state study\.unequal_negatives: true"
    ):
        plan_study(write_study(tmp_path, arms=scheduled))
    plan = plan_study(write_study(tmp_path, arms=unequal), ["study.unequal_negatives=true"])
    assert plan.caution.startswith("Arms differ in the number of negatives that a row meets (15 (a); 63 (b))")
    assert "negatives a row: a 15; b 63" in plan.checks


def test_negatives_a_row_are_among_the_checks(tmp_path: Path) -> None:
    plan = plan_study(write_study(tmp_path, overrides={"sampler.pool_rows": 32}))
    assert "negatives a row: 31 in every arm" in plan.checks
    assert plan.caution == ""
    assert set(negatives_by_arm(plan.runs).values()) == {(31,)}


def test_unequal_hard_negatives_are_unequal_negatives(tmp_path: Path) -> None:
    mined = arms(**{"sampler.hard_negatives": 2})
    with pytest.raises(ConfigError, match=r"negatives a row: found '15 \(a\); 47 \(b\)'"):
        plan_study(write_study(tmp_path, arms=mined, may_differ=["sampler.hard_negatives"]))


def test_pools_may_be_an_axis_and_are_never_compared_with_each_other(tmp_path: Path) -> None:
    plan = plan_study(write_study(tmp_path, pool_rows=[8, 16], arms=KINDS, alpha=[0.25, 0.5], models=MODELS[:1], seeds=[0]))
    assert [run.id for run in plan.runs[:3]] == [
        "0.5b.mono.pool-8.seed-0",
        "0.5b.mono.pool-16.seed-0",
        "0.5b.hybrid-0.25.pool-8.seed-0",
    ]
    assert [run.config.negatives_a_row for run in plan.runs[:2]] == [7, 15]
    assert plan.runs[1].panel == "model 0.5b, pools of 16"
    assert "negatives a row: 7 or 15 in every arm" in plan.checks
    labels = groups(plan, [run.config for run in plan.runs])
    assert {label for label, _ in labels} == {f"model 0.5b, sampler.pool_rows = {size}" for size in (8, 16)}
    with pytest.raises(ConfigError, match=r"the axes arm and pool_rows both set this key"):
        plan_study(write_study(tmp_path, pool_rows=[8, 16], arms=arms(**{"sampler.pool_rows": 8})))
    with pytest.raises(ConfigError, match=r"pool_rows: found 8; a size stands twice"):
        plan_study(write_study(tmp_path, pool_rows=[8, 8]))


MODELS = [
    {"name": "0.5b", "set": {"model.base": "Qwen/Qwen2.5-0.5B"}, "resources": {"gpus_per_node": 8}},
    {"name": "72b", "set": {"model.base": "Qwen/Qwen2.5-72B"}, "resources": {"nodes": 4, "gpus_per_node": 8, "time": "12:00:00"}},
]
KINDS = [{"name": name, "set": {"sampler.arm": name}} for name in ("mono", "hybrid")]


def test_axes_multiply_and_alpha_belongs_to_hybrid_arms(tmp_path: Path) -> None:
    fixed = {"name": "half", "set": {"sampler.arm": "hybrid", "sampler.alpha": 0.5}}
    changes = {"models": MODELS, "arms": [*KINDS, fixed], "alpha": [0.25, 0.75], "overrides": {"sampler.pool_rows": 16}}
    plan = plan_study(write_study(tmp_path, **changes, resources={"cpus_per_node": 64}))
    assert len(plan.runs) == 2 * (1 + 2 + 1) * 2
    assert plan.arms == ("mono", "hybrid-0.25", "hybrid-0.75", "half")
    assert [run.id for run in plan.runs[2:4]] == ["0.5b.hybrid-0.25.seed-0", "0.5b.hybrid-0.25.seed-1"]
    large = plan.runs[-1]
    assert (large.model, large.data, large.config.model.base) == ("72b", None, "Qwen/Qwen2.5-72B")
    assert (large.resources.ranks, large.resources.time, large.resources.cpus_per_node) == (32, "12:00:00", 64)
    assert plan.runs[0].resources.ranks == 8
    assert {run.config.sampler.alpha for run in plan.runs if run.arm == "half"} == {0.5}
    assert "model 72b: 8 runs, each on 4 x 8 GPUs, 2 rows a rank and step" in plan.checks
    assert "equal in all runs: sampler.hard_negatives = 0" in plan.checks


def test_an_arm_may_belong_to_some_models_alone(tmp_path: Path) -> None:
    models = [{"name": name, "set": {"model.base": name}} for name in ("small", "large")]
    only = {"name": "half", "set": {"sampler.arm": "hybrid", "sampler.alpha": 0.25}, "models": ["large"]}
    plan = plan_study(write_study(tmp_path, models=models, arms=[*arms(), only], seeds=[0]))
    assert [run.id for run in plan.runs] == [
        *("small.a.seed-0", "small.b.seed-0", "large.a.seed-0", "large.b.seed-0", "large.half.seed-0"),
    ]
    assert 'arm half: sampler.arm = "hybrid", sampler.alpha = 0.25' in plan.checks
    with pytest.raises(ConfigError, match=r"arm 'half': models: found 'larger'; no such model. Did you mean 'large'"):
        plan_study(write_study(tmp_path, models=models, arms=[*arms(), {**only, "models": ["larger"]}]))


def test_an_id_outlives_what_is_added(tmp_path: Path) -> None:
    before = {run.id: run.config for run in plan_study(write_study(tmp_path, models=MODELS[1:], arms=KINDS, seeds=[7])).runs}
    added = plan_study(write_study(tmp_path, models=MODELS, arms=[*KINDS[::-1], {"name": "x", "set": {"sampler.arm": "mixed"}}]))
    more = plan_study(write_study(tmp_path, models=MODELS, arms=KINDS[::-1], seeds=[9, 7]))
    assert before == {run.id: run.config for run in more.runs if run.id in before}
    assert len({run.id for run in added.runs}) == len(added.runs) == 12


def test_data_is_an_axis_and_is_compared_within_itself(tmp_path: Path) -> None:
    sets = [{"name": name, "set": {"data.train": f"data/{name}"}} for name in ("faq", "msmarco")]
    plan = plan_study(write_study(tmp_path, data=sets, arms=KINDS, seeds=[0]))
    assert [run.id for run in plan.runs][::3] == ["faq.mono.seed-0", "msmarco.hybrid.seed-0"]
    assert 'data faq: equal in all runs: data.train = "data/faq"' in plan.checks
    sets[1]["set"]["training.max_steps"] = 7  # type: ignore[index]
    with pytest.raises(ConfigError, match=r"training\.max_steps: found '20 \(mono, hybrid\); 7 \(mono, hybrid\)'"):
        plan_study(write_study(tmp_path, data=sets, arms=KINDS))


def of_models(*settings: dict[str, object], **of_last: object) -> list[dict[str, object]]:
    models: list[dict[str, object]] = [{"name": f"m{n}", "set": {"model.base": f"b{n}", **s}} for n, s in enumerate(settings)]
    return [*models[:-1], {**models[-1], **of_last}]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modles": MODELS}, r"study\.yaml: modles: found .*unknown key\. Did you mean 'models'"),
        ({"models": [MODELS[0], MODELS[0]]}, r"models: found '0\.5b'; two models have this name"),
        (
            {"models": of_models({}, {"sampler.global_batch": 32})},
            r"sampler\.global_batch: found '64 \(m0\.mono, .*32 \(m1\.mono",
        ),
        ({"models": of_models({}, {"training.max_steps": 3})}, r"training\.max_steps: found .*equal values of this key"),
        ({"models": of_models({}, {"sampler.hard_negatives": 3})}, r"sampler\.hard_negatives: found '0 "),
        (
            {"models": of_models({}, {"sampler.arm": "mono"})},
            r"sampler\.arm: found 'mono'; the axes model and arm both set this key",
        ),
        (
            {"models": of_models({}, {"model.base": "b0"})},
            r"study\.yaml: model: found 'm1'; the model 'm0' has the same settings",
        ),
        (
            {"models": of_models({}, resources={"nodes": 65})},
            r"model 'm0': sampler\.global_batch: found 64; 65 ranks need at least",
        ),
        ({"models": of_models({}, resources={"gpus": 8})}, r"models\.0\.resources\.gpus: found 8; unknown key"),
        ({"resources": {"time": 43200}}, r'resources\.time: found 43200; value error, a time stands in quotes \("12:00:00"\)'),
        ({"models": of_models({}, resources={"time": "1 day"})}, r"models\.0\.resources\.time: found '1 day'"),
        ({"models": [{"name": "a.mono"}], "data": [{"name": "b"}], "arms": KINDS}, None),
        ({"alpha": [0.5, 0.5]}, r"study\.yaml: alpha: found 0\.5; an alpha stands twice"),
        ({"alpha": [0.3]}, r"arm 'hybrid-0\.3': sampler\.alpha: found 0\.3; alpha must give a whole number of mono pools"),
        ({"evaluate": ["a/x", "b/x"]}, r"evaluate: found 'x'; two sets write one file"),
        ({"evaluate": ["other/xquad_r"]}, r"evaluate: found 'other/xquad_r'; the training scores data/xquad_r itself"),
        ({"site": {"partion": "gpu"}}, r"site\.partion: found 'gpu'; unknown key\. Did you mean 'partition'"),
    ],
)
def test_refuses_axes_that_dont_fit(tmp_path: Path, changes: dict[str, object], message: str | None) -> None:
    path = write_study(tmp_path, **changes)
    if message is None:
        assert plan_study(path).runs[0].id == "a.mono.b.mono.seed-0"
        return
    with pytest.raises(ConfigError, match=message):
        plan_study(path)


def test_two_runs_with_one_id_are_refused(tmp_path: Path) -> None:
    models = [{"name": "a"}, {"name": "a.b", "set": {"model.base": "other"}}]
    arms = [{"name": "b.c", "set": {"sampler.arm": "mono"}}, {"name": "C", "set": {"sampler.arm": "cross"}}]
    message = r"id: found 'a\.b\.C\.seed-0'; two runs have this id \(model a, arm b\.c, seed 0; model a\.b, arm C"
    with pytest.raises(ConfigError, match=message):
        plan_study(write_study(tmp_path, models=models, arms=arms, seeds=[0]))


def test_a_setting_of_the_command_line_is_refused_where_an_axis_sets_it(tmp_path: Path) -> None:
    path = write_study(tmp_path, models=MODELS)
    assert plan_study(path, ["resources.nodes=2", "data.train=d2"]).runs[0].resources.ranks == 16
    with pytest.raises(ConfigError, match=r"model\.base: found 'x'; the model '0\.5b' sets this key itself"):
        plan_study(path, ["model.base=x"])


def test_the_base_is_left_as_it_was(tmp_path: Path) -> None:
    plan_study(write_study(tmp_path))
    assert "run" not in BASE
    assert "arm" not in BASE["sampler"]

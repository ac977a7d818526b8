"""The study files that ship with the project: they expand, are what the README says, and their paths exist."""

import json
from pathlib import Path

import pytest

from hybrid_scale.config import read_yaml
from hybrid_scale.study.grid import negatives_by_arm, plan_study, setting
from hybrid_scale.study.jobs.site import load_site, sbatch_options
from hybrid_scale.study.settings import Site
from tests.test_floors import ROOT

CONFIGS = ROOT / "launch" / "configs"
MEASURED = ROOT / "docs" / "studies" / "gemma-270m"
STUDIES = sorted(path for folder in (CONFIGS, MEASURED) for path in folder.glob("*.yaml") if "arms" in read_yaml(path))


def test_these_are_the_studies() -> None:
    assert [path.name for path in STUDIES] == [
        *("pilot.yaml", "study.yaml"),
        "quickstart.yaml",
        "study_miniature.yaml",
        "study_pool_rows.yaml",
        "study_qwen2.5.yaml",
        "study_qwen2.5_pilot.yaml",
    ]


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_a_study_expands_and_its_deepspeed_files_exist(path: Path) -> None:
    plan = plan_study(path)
    for run in plan.runs:
        zero = json.loads((ROOT / run.config.training.deepspeed).read_text())["zero_optimization"]
        assert (zero["stage"] == "auto") == (run.config.training.shard_group is not None)
    assert plan.directory == Path("runs") / plan.config.study.name


def test_the_study_of_a_small_decoder_says_what_it_expects() -> None:
    """Arms x depths x seeds with two more alphas at the largest depth; predictions on every set but the smoke test."""
    plan = plan_study(MEASURED / "study.yaml")
    assert len(plan.runs) == (4 * 3 + 2) * 3
    assert {run.model for run in plan.runs if run.arm in ("hybrid-0.25", "hybrid-0.75")} == {"18-layers"}
    foretold = {metric.partition(":")[0] for prediction in plan.config.predictions for metric in prediction.metrics}
    assert foretold == {Path(name).name for name in plan.runs[0].config.data.evaluate} - {"nq-mini"}
    assert "the pilot" in plan.pending


def test_the_missions_study() -> None:
    plan = plan_study(CONFIGS / "study_qwen2.5.yaml")
    assert len(plan.runs) == 7 * 6 * 3
    assert plan.arms == ("mono", "cross", "hybrid-0.25", "hybrid-0.5", "hybrid-0.75", "mixed")
    sizes = ["0.5B", "1.5B", "3B", "7B", "14B", "32B", "72B"]
    assert list(dict.fromkeys(run.config.model.base for run in plan.runs)) == [f"Qwen/Qwen2.5-{size}" for size in sizes]
    assert {run.config.sampler.global_batch * run.config.training.max_steps for run in plan.runs} == {2_048_000}
    assert plan.config.may_differ == ()
    assert {Path(name).name for name in plan.runs[0].config.data.evaluate} == {"xquad_r", "mlqa_r"}
    later = [Path(name) for name in plan.config.evaluate]
    assert {"miracl", "nq"} <= {path.name for path in later}
    assert sum(path.parent.name == "beir" for path in later) == 15, "BEIR's public sets, CQADupStack as one"
    assert all(run.resources.gpus_per_node == 8 for run in plan.runs)


def test_every_arm_of_every_study_meets_equally_many_negatives() -> None:
    for path in STUDIES:
        plan = plan_study(path)
        assert plan.caution == ""
        assert len(set(negatives_by_arm(plan.runs).values())) == 1, path.name


def test_the_pilot_of_the_missions_study_tries_rates_at_every_size_on_a_development_set() -> None:
    main, pilot = (plan_study(CONFIGS / f"study_qwen2.5{end}.yaml") for end in ("", "_pilot"))
    assert main.pilot is not None
    assert main.pilot.runs == pilot.runs
    assert {run.model for run in pilot.runs} == {run.model for run in main.runs}
    assert {run.config.sampler.arm for run in pilot.runs} == {"hybrid"}
    for key in ("data.train", "sampler.global_batch", "sampler.pool_rows", "model.lora", "loss.temperature"):
        assert {str(setting(run.config, key)) for run in (*main.runs, *pilot.runs)} == {str(setting(main.runs[0].config, key))}
    assert pilot.runs[0].config.data.evaluate == ("data/dev",)


def test_the_pool_size_ablation() -> None:
    plan = plan_study(CONFIGS / "study_pool_rows.yaml")
    assert (len(plan.runs), {run.pool_rows for run in plan.runs}) == (3 * 3 * 3, {32, 128, 512})
    assert "negatives a row: 31 or 127 or 511 in every arm" in plan.checks


def test_the_miniature_has_three_sizes_of_two_nodes() -> None:
    plan = plan_study(CONFIGS / "study_miniature.yaml")
    assert (len({run.model for run in plan.runs}), len(plan.runs)) == (3, 9)
    assert {(run.resources.nodes, run.resources.ranks) for run in plan.runs} == {(2, 2)}


def test_the_example_site_and_what_it_asks_for() -> None:
    site = load_site(CONFIGS / "site_example.yaml")
    resources = plan_study(CONFIGS / "study_qwen2.5.yaml").runs[-1].resources
    assert {"--nodes=4", "--gpus-per-node=8", "--constraint=h100", "--mem=0", "--exclusive"} <= set(
        sbatch_options(site, "train", resources)
    )
    assert "--constraint=h100" not in sbatch_options(site, "collect", resources)
    assert {"--constraint=h200", "--qos=large"} <= set(sbatch_options(site, "train", resources, "72b"))
    assert {"--constraint=h100", "--qos=normal"} <= set(sbatch_options(site, "evaluate", resources, "72b"))
    assert set(read_yaml(CONFIGS / "site_example.yaml")) == set(Site.model_fields), "it shows every setting"

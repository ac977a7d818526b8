from pathlib import Path
from typing import Any

import pytest

from hybrid_scale.errors import ConfigError
from hybrid_scale.study.family import Family
from hybrid_scale.study.grid import plan_study
from hybrid_scale.study.results.scores import METRICS
from hybrid_scale.study.settings import PRIMARY_METRICS
from tests.study.fabricate import ALPHAS, ARMS, FAMILY, write_study

MODELS = [{"name": name.lower(), "set": {"model.base": f"Qwen/Qwen2.5-{name}"}} for name in FAMILY]


def family(folder: Path, study: dict[str, Any] | None = None, **changes: Any) -> Family:
    own = {"name": "ladder", "directory": str(folder / "out"), **(study or {})}
    return plan_study(write_study(folder, study=own, **{"models": MODELS, "alpha": list(ALPHAS), **changes})).family


def test_the_default_is_the_paper_s_hybrid_arm_on_the_sets_that_are_evaluated(tmp_path: Path) -> None:
    found = family(tmp_path, evaluate=["data/miracl", "data/beir/scifact", "data/beir/nq"])
    assert (found.arm, found.rivals) == ("hybrid-0.5", ("mono", "cross"))
    names = [f"{name}:{metric}" for name, metric in found.metrics]
    assert names == [metric for metric in PRIMARY_METRICS if not metric.startswith("mlqa_r")]
    assert found.contrast is None
    assert str(found) == (
        "primary family: hybrid-0.5 against mono and cross on xquad_r:mono_map, xquad_r:cross_map, xquad_r:multi_map, "
        "miracl:ndcg@10, beir:ndcg@10, nq:ndcg@10; at the largest size, and the change from the smallest to the largest"
    )


def test_a_study_file_names_its_own(tmp_path: Path) -> None:
    primary = {"arm": "hybrid-0.25", "against": ["mixed"], "metrics": ["xquad_r:rank_distance"]}
    found = family(tmp_path, {"primary": primary, "contrast": ["7b", "72b"], "margin": 0.02})
    assert found == Family("hybrid-0.25", ("mixed",), (("xquad_r", "rank_distance"),), ("7b", "72b"), 0.02)
    assert str(found).endswith("; at 72b, and the change from 7b to 72b")


def test_it_stands_in_the_checks_before_any_run(tmp_path: Path) -> None:
    plan = plan_study(write_study(tmp_path, models=MODELS))
    assert str(plan.family) in plan.checks


def test_sets_of_other_names_bring_their_own_metrics(tmp_path: Path) -> None:
    base = {"data": {"train": "data/pairs", "evaluate": ["data/mine"]}, "sampler": {"global_batch": 64}}
    base |= {"model": {"base": "Qwen/Qwen3-0.6B", "dtype": "float32"}, "training": {"max_steps": 20}}
    found = family(tmp_path, base=base)
    assert (found.metrics, found.refusal) == ((), "")
    assert "on the metrics of each set" in str(found)


@pytest.mark.parametrize(
    ("changes", "refusal"),
    [
        ({"arms": [{"name": "mono", "set": {"sampler.arm": "mono"}}]}, "no arm of the type hybrid"),
        ({"alpha": [0.25, 0.75]}, "none of the hybrid arms has alpha 0.5 (study.primary.arm names one)"),
        (
            {"arms": [{"name": "hybrid", "set": {"sampler.arm": "hybrid"}}], "alpha": []},
            "no arm of the type mono or cross to compare with",
        ),
        (
            {
                "alpha": [],
                "arms": [
                    {"name": name, "set": {"sampler.arm": "hybrid", "optimizer.learning_rate": rate}}
                    for name, rate in (("slow", 1e-5), ("fast", 1e-4))
                ],
            },
            "several of the hybrid arms has alpha 0.5 (study.primary.arm names one)",
        ),
    ],
)
def test_a_study_without_such_arms_explores(tmp_path: Path, changes: dict[str, Any], refusal: str) -> None:
    found = family(tmp_path, **changes)
    assert found.refusal == refusal
    assert str(found) == f"no primary family: {refusal}; every result is exploratory"


@pytest.mark.parametrize(
    ("study", "said"),
    [
        ({"contrast": ["7b", "70b"]}, "must be two names of the axis models: 0.5b, 1.5b, 3b, 7b, 14b, 32b, 72b"),
        ({"contrast": ["7b", "7b"]}, "must be two different models"),
        ({"contrast": ["7b"]}, "study.contrast"),
        ({"primary": {"arm": "hybrid"}}, "must be an arm of the study: mono, cross, hybrid-0.25, hybrid-0.5, hybrid-0.75, mixed"),
        ({"primary": {"against": ["both"]}}, "must be an arm of the study"),
        ({"primary": {"arm": "mono", "against": ["mono"]}}, "an arm can't be compared with itself"),
        ({"primary": {"metrics": ["mlqa_r:cross_map"]}}, "must name a set that the study evaluates: xquad_r"),
        ({"primary": {"metrics": ["xquad_r:cross"]}}, "study.primary.metrics"),
        ({"margin": 0}, "study.margin"),
    ],
)
def test_names_that_the_study_lacks_are_refused(tmp_path: Path, study: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        family(tmp_path, study)
    assert said in str(error.value)


def test_a_contrast_needs_the_axis_models(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the study has no such axis"):
        family(tmp_path, {"contrast": ["7b", "72b"]}, models=[])


def test_metrics_that_a_family_may_name_are_known(tmp_path: Path) -> None:
    for name in ("mono_map", "cross_map", "multi_map", "mono_r@1", "cross_r@1", "multi_r@10", "rank_distance", "ndcg@10"):
        assert family(tmp_path, {"primary": {"metrics": [f"xquad_r:{name}"]}}).metrics == (("xquad_r", name),)
        assert name in METRICS
    assert len(ARMS) == 4

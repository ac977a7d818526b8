"""Predictions of a study file, against made runs whose truth is known: true ones hold, false ones fail, open ones stay open."""

from pathlib import Path
from typing import Any

import pytest

from hybrid_scale.errors import ConfigError
from hybrid_scale.study.grid import Plan, plan_study
from hybrid_scale.study.report.tables import foretold_table
from hybrid_scale.study.results.collect import collect
from hybrid_scale.study.results.foretold import Foretold, Statement, counted, foretold, statements
from hybrid_scale.study.settings import Prediction
from tests.study.fabricate import scaled, write_study

MODELS = ("0.5B", "7B")
TRUE = {"says": "cross pools align", "metrics": ["xquad_r:cross_map"], "worst_first": ["mono", "cross", "hybrid"]}
FALSE = {"says": "hybrid loses", "metrics": ["xquad_r:cross_map"], "worst_first": [["hybrid"], ["mono", "cross"]]}
NEAR = {
    "says": "keeps mono",
    "metrics": ["xquad_r:mono_map"],
    "within": {"arm": "hybrid", "of": ["mono", "cross"], "points": 0.02},
}


def judged(plan: Plan) -> list[Foretold]:
    return foretold(plan.config.predictions, collect(plan), {run.id: run.directory for run in plan.runs})


def test_true_predictions_hold_and_false_ones_fail_at_every_size(tmp_path: Path) -> None:
    """In `scaled` hybrid is .03 above cross and .06 above mono in cross mAP, and equal to mono in mono mAP."""
    plan = scaled(tmp_path, models=MODELS, predictions=[TRUE, FALSE, NEAR])
    found = judged(plan)
    assert [(each.says, each.model, each.verdict) for each in found] == [
        (says, model, verdict)
        for says, verdict in (("cross pools align", "holds"), ("hybrid loses", "fails"), ("keeps mono", "holds"))
        for model in MODELS
    ]
    assert counted(found) == "Of 6 predictions that were written down before the runs: holds 4, fails 2."
    assert [row.cells[0].text for row in foretold_table(found).rows][:2] == ["hybrid loses"] * 2, "what fails stands first"


@pytest.mark.parametrize(("points", "verdict"), [(0.04, "holds"), (0.005, "fails"), (0.02, "not shown")])
def test_a_loss_of_two_points_is_within_four_and_not_within_half_a_point(tmp_path: Path, points: float, verdict: str) -> None:
    """The cross arm is .02 below mono in mono mAP; at exactly that allowance neither is shown."""
    rule = {"says": "x", "metrics": ["xquad_r:mono_map"], "within": {"arm": "cross", "of": ["mono"], "points": points}}
    assert [each.verdict for each in judged(scaled(tmp_path, models=MODELS[:1], predictions=[rule]))] == [verdict]


def test_two_seeds_are_too_few(tmp_path: Path) -> None:
    (found,) = judged(scaled(tmp_path, models=MODELS[:1], seeds=(0, 1), predictions=[TRUE]))
    assert found.verdict == "not judged"
    assert "at least 3 are needed" in found.missing
    assert len(found.numbers()) == 2, "the differences stand all the same"


def test_every_arm_of_a_group_is_held_against_every_arm_of_the_next() -> None:
    rule = Prediction(says="x", metrics=("a:map",), worst_first=(("mixed",), ("mono", "cross"), ("hybrid",)))
    expected = [("mono", "mixed"), ("cross", "mixed"), ("hybrid", "mono"), ("hybrid", "cross")]
    assert statements(rule) == tuple(Statement(*pair) for pair in expected)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"worst_first": ["mono", "hybrd"]}, "no arm of the study has this name"),
        ({"metrics": ["mlqa_r:cross_map"]}, "no such set is evaluated"),
        ({"worst_first": ["mono"]}, "either `worst_first` with two groups or more, or `within`"),
        ({"within": NEAR["within"]}, "either `worst_first` with two groups or more, or `within`"),
    ],
)
def test_a_prediction_that_can_never_be_judged_is_refused(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        plan_study(write_study(tmp_path, predictions=[TRUE | change]))

"""Development sets scored during training, over the real tokens and operations that it took to get there."""

from pathlib import Path

import pytest

from hybrid_scale.planning.architecture import find
from hybrid_scale.runs import RunDirectory, write_json
from hybrid_scale.study.grid import Plan, evaluated, plan_study
from hybrid_scale.study.report.figures import progress
from hybrid_scale.study.report.page import render
from hybrid_scale.study.report.plots import looks
from hybrid_scale.study.results.collect import collect
from hybrid_scale.study.results.scores import arms
from hybrid_scale.study.results.usage import flops_a_token
from tests.study.fabricate import BASE, evaluation, write_study

ARMS = [{"name": arm, "set": {"sampler.arm": arm}} for arm in ("mono", "hybrid")]
DATA = {**BASE["data"], "evaluate_during": ["data/dev"]}
TOKENS = {"mono": 1000, "hybrid": 1200}


def studied(folder: Path, counted: bool = True) -> Plan:
    """Twenty steps, each of the arm's TOKENS in 50 texts; `dev` scored before, after ten and at the end."""
    plan = plan_study(write_study(folder, arms=ARMS, seeds=[0], base={**BASE, "data": DATA}))
    for run in plan.runs:
        directory = RunDirectory(run.directory)
        directory.create(run.config)
        tokens = TOKENS[run.arm]
        for step in range(1, 21):
            total = {"total_real_tokens": step * tokens} if counted else {}
            record = {"step": step, "loss": 1.0, "seconds": 1.0, "real_tokens": tokens, "texts": 50}
            directory.append_metrics({**record, **total})
        for step, value in ((0, 0.5), (10, 0.6), (None, 0.7)):
            content = evaluation("dev", 0, {"mono_map": value, "cross_map": value - 0.1})
            write_json(directory.evaluation_file("dev", step), {**content, "step": step})
        directory.set_status("done")
    return plan


def test_a_curve_stands_over_tokens_and_operations(tmp_path: Path) -> None:
    plan = studied(tmp_path)
    assert "data/dev" in evaluated(plan.config, plan.runs)
    collected = collect(plan)
    mono, _ = progress(collected, "dev", "set-0", arms(collected, "dev"), looks(plan.arms))
    table = mono.data.set_index(["arm", "step"])
    assert table["real_tokens"].to_dict() == {
        (arm, step): float(step * tokens) for arm, tokens in TOKENS.items() for step in (0, 10, 20)
    }
    assert table["mono_map"].to_dict() == {
        (arm, step): value for arm in TOKENS for step, value in ((0, 0.5), (10, 0.6), (20, 0.7))
    }
    of_mono = table.loc[("mono", 20), "training_flops"]
    assert of_mono == pytest.approx(20_000 * flops_a_token(plan.runs[0].config, [{"real_tokens": 1000, "texts": 50}]))
    assert "Arms at equal cost" in mono.caption
    assert "training FLOPs" in mono.svg
    assert "dev is a development set, scored for learning curves: no test." in render(plan, collected)


def test_a_log_without_totals_is_drawn_over_steps(tmp_path: Path) -> None:
    collected = collect(plan := studied(tmp_path, counted=False))
    mono, _ = progress(collected, "dev", "set-0", arms(collected, "dev"), looks(plan.arms))
    assert list(mono.data.columns) == ["arm", "seed", "step", "mono_map"]


def test_operations_of_a_token_by_hand(tmp_path: Path) -> None:
    """Full training: 6 P for the linear weights; attention's two products, forward once and backward twice, over 20 tokens."""
    config = studied(tmp_path).runs[0].config
    shape = find(config.model.base)
    lora = config.model.lora
    assert lora is not None
    adapters = shape.lora(lora.rank, lora.targets)
    expected = 4 * shape.linear + 6 * adapters + 3 * (2 * 20 * shape.attention_width * shape.layers)
    assert flops_a_token(config, [{"real_tokens": 1000, "texts": 50}]) == pytest.approx(expected)
    assert flops_a_token(config, [{"step": 1}]) is None

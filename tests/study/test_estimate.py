"""Sums over runs: each on its own machines, equal ones planned once, problems named, values and text that agree."""

import json
from typing import Any

import pytest

from hybrid_scale.config import RunConfig, validate
from hybrid_scale.errors import ConfigError
from hybrid_scale.planning.forecast import Texts
from hybrid_scale.planning.hardware import make_cluster
from hybrid_scale.planning.planner import plan_run
from hybrid_scale.study.estimate import as_values, estimate, run_text, study_text
from tests.test_floors import ROOT

TEXTS = Texts(34, 187, "XQuAD-R")
NODE = make_cluster("h100", price=2.0)
FOUR = make_cluster("h100", 4, price=2.0)


def config(base: str, arm: str = "mono", seed: int = 0, **sections: dict[str, Any]) -> RunConfig:
    tree: dict[str, Any] = {
        "run": {"seed": seed},
        "data": {"train": "none"},
        "sampler": {"arm": arm, "global_batch": 512},
        "model": {"base": base, "quantization": "nf4"},
        "training": {"max_steps": 200, "deepspeed": str(ROOT / "ds_configs/zero_auto.json"), "shard_group": "auto"},
    }
    for name, section in sections.items():
        tree[name] = {**tree.get(name, {}), **section}
    return validate(RunConfig, tree, "test")


def runs() -> list[tuple[str, RunConfig, Any]]:
    small, large = "Qwen/Qwen2.5-7B", "Qwen/Qwen2.5-72B"
    return [
        *((f"7b.{arm}.{seed}", config(small, arm, seed), NODE) for arm in ("mono", "cross") for seed in (0, 1)),
        *((f"72b.{arm}.0", config(large, arm), FOUR) for arm in ("mono", "cross")),
    ]


def test_the_sum_of_a_study() -> None:
    study = estimate(runs(), TEXTS)
    alone = [plan_run(run, cluster, TEXTS) for _, run, cluster in runs()]
    assert list(study.plans) == [name for name, _, _ in runs()]
    assert study.gpu_hours == pytest.approx(sum(plan.gpu_hours for plan in alone))
    assert study.cost == pytest.approx(2 * study.gpu_hours)
    assert study.problems == {}
    assert [len(names) for names, _ in study.kinds] == [4, 2]
    assert study.plans["72b.cross.0"].cluster.world == 32


def test_what_costs_differently_is_planned_apart() -> None:
    """Arms, seeds and learning rates cost the same; hard negatives, longer texts and more steps don't."""
    base = config("Qwen/Qwen2.5-7B")
    others = {
        "rate": config("Qwen/Qwen2.5-7B", optimizer={"learning_rate": 1e-3}),
        "negatives": config("Qwen/Qwen2.5-7B", sampler={"hard_negatives": 3}),
        "steps": config("Qwen/Qwen2.5-7B", training={"max_steps": 400}),
    }
    study = estimate([("base", base, NODE), *((name, run, NODE) for name, run in others.items())], TEXTS)
    assert study.plans["rate"] is study.plans["base"]
    assert study.plans["steps"].gpu_hours == pytest.approx(2 * study.plans["base"].gpu_hours)
    assert study.plans["negatives"].tokens == pytest.approx(study.plans["base"].tokens * (34 + 4 * 187) / (34 + 187))


def test_best_is_no_slower() -> None:
    configured, best = estimate(runs(), TEXTS), estimate(runs(), TEXTS, best=True)
    assert best.gpu_hours < configured.gpu_hours
    assert best.problems == {}


def test_no_price_no_cost() -> None:
    mixed = [(name, run, make_cluster("h100", cluster.nodes)) for name, run, cluster in runs()]
    assert estimate([*runs(), ("free", *mixed[0][1:])], TEXTS).cost is None


def test_a_problem_names_its_run() -> None:
    small = make_cluster("4090", 1, 1)
    study = estimate([("a", config("Qwen/Qwen2.5-7B"), NODE), ("b", config("Qwen/Qwen2.5-72B"), small)], TEXTS)
    assert list(study.problems) == ["b"]
    text = study_text(study)
    assert "b (1 runs): does not fit: needs " in text
    assert "it fits with " in text
    with pytest.raises(ConfigError, match=r"^c: sampler.global_batch: found 512; 1024 ranks"):
        estimate([("c", config("Qwen/Qwen2.5-7B"), make_cluster("h100", 128))], TEXTS)


def test_text_and_values_agree() -> None:
    study = estimate(runs(), TEXTS)
    lines = study_text(study).splitlines()
    total = next(line.split() for line in lines if line.startswith("all "))
    assert total[1:] == ["6", f"{study.gpu_hours:,.1f}", f"{study.cost:,.0f}"]
    plan = study.plans["72b.mono.0"]
    values = json.loads(json.dumps(as_values(plan)))
    assert sum(values["memory_bytes"].values()) == pytest.approx(values["total_bytes"]) == pytest.approx(plan.memory)
    assert values["seconds"]["step"] == plan.seconds.total
    shown = run_text("72b", plan)
    for name, size in plan.lines.items():
        assert any(line.startswith(name) and line[len(name) :].split()[0] == f"{size / 2**30:.2f}" for line in shown.splitlines())
    assert "note: text lengths XQuAD-R" in shown


def cells(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


def test_markdown_holds_the_same_numbers() -> None:
    """Every table has a head, a rule and equally many cells in each row; the sum of a column is its total."""
    study = estimate(runs(), TEXTS)
    for text in (study_text(study, markdown=True), run_text("72b", study.plans["72b.mono.0"], markdown=True)):
        blocks = [cells(block) for block in text.split("\n\n") if block.startswith("|")]
        assert len(blocks) == 2
        for rows in blocks:
            assert {len(row) for row in rows} == {len(rows[0])}
            assert all(set(cell) <= {"-", ":"} and len(cell) >= 3 for cell in rows[1])
        memory = blocks[1][2:]
        total = next(float(row[1]) for row in memory if row[0] == "total")
        lines = [float(row[1]) for row in memory[: [row[0] for row in memory].index("total")] if row[1]]
        assert sum(lines) == pytest.approx(total, abs=0.005 * len(lines))


def test_every_line_is_explained() -> None:
    """Of memory on the GPU and the host, resident and offloaded, NF4 and not, with and without checkpointing."""
    offload = {"deepspeed": str(ROOT / "ds_configs/zero3_offload.json"), "shard_group": None, "offload_activations": True}
    full = {"quantization": "none", "lora": None, "dtype": "float32", "gradient_checkpointing": False}
    for sections in ({}, {"training": offload}, {"model": full}, {"model": full, "training": offload}):
        plan = plan_run(config("Qwen/Qwen2.5-7B", **sections), FOUR, TEXTS)
        shown = run_text("7b", plan).splitlines()
        for name in (*plan.lines, *plan.host):
            found = [line[len(name) :].split(maxsplit=1) for line in shown if line.startswith(f"{name} ")]
            assert found
            assert all(len(words) == 2 for words in found), name
    assert any("what all layers of kept tokens save" in line for line in shown)


def test_what_the_planner_chose_is_marked() -> None:
    auto = config("Qwen/Qwen2.5-72B", training={"max_tokens_per_micro_batch": "auto", "max_kept_tokens": "auto"})
    text = run_text("72b", plan_run(auto, FOUR, TEXTS))
    assert "max_tokens_per_micro_batch, max_kept_tokens, shard_group: chosen here, as the trainer will" in text
    assert "chosen here" not in run_text("72b", plan_run(config("Qwen/Qwen2.5-72B"), FOUR, TEXTS))

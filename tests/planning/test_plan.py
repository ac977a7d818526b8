"""The planner: plans worked by hand, choices that fit, the trainer's same answer, and the door without torch."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from hybrid_scale.config import RunConfig, load_config, validate
from hybrid_scale.data.partition import Budget, partition
from hybrid_scale.errors import ConfigError, ModelError
from hybrid_scale.model.load import count_parameters
from hybrid_scale.model.shape import read_shape
from hybrid_scale.planning.costs import RESERVE
from hybrid_scale.planning.forecast import Texts, text_lengths
from hybrid_scale.planning.hardware import GPUS, Cluster, find_gpu, make_cluster
from hybrid_scale.planning.planner import best_run, nearest_fit, plan_run
from hybrid_scale.planning.speed import Calibration, Work, step_flops, step_seconds
from hybrid_scale.train.settle import choose_shard_group
from tests.test_floors import BLOCKED, ROOT

TEXTS = Texts(34, 187, "XQuAD-R, English")

# Speed by hand


def test_operations_a_token() -> None:
    """6 P with checkpointing, 4 P without, 8 P where every token is embedded twice; 8 P and 6 P where weights are trained."""
    p = 1e9
    assert step_flops(p, 0, 0, 10) == 60 * p
    assert step_flops(p, 0, 0, 10, checkpointing=False) == 40 * p
    assert step_flops(p, 0, 0, 10, twice=10) == 80 * p
    assert step_flops(p, 0, 0, 10, frozen=False) == 80 * p
    assert step_flops(p, 0, 0, 10, checkpointing=False, frozen=False) == 60 * p
    assert step_flops(0, p, 0, 1) == 8 * p  # an adapter: forward twice, its input's gradient, its own
    assert step_flops(0, 0, 1.0, 1) == 4  # attention: forward twice, two products for one in the backward


def test_seconds_of_a_step_by_hand() -> None:
    """Two nodes of eight H100: 100 GB gathered by all 16, by one node alone, and nothing by a replica."""
    cluster = make_cluster("h100", 2, 8, "ib-hdr", ports=1)
    calibration = Calibration({"H100": 0.5}, link=0.5)
    everywhere = step_seconds(Work(flops=989e12, gathered=100e9, group=16), cluster, calibration)
    assert everywhere.compute == pytest.approx(2)
    assert everywhere.between_bytes == 50e9
    assert everywhere.gather == pytest.approx(50e9 / (25e9 * 0.85))  # one port of 25 GB/s
    assert everywhere.total == everywhere.gather
    inside = step_seconds(Work(flops=989e12, gathered=100e9, group=8), cluster, calibration)
    assert (inside.between_bytes, inside.node_bytes) == (0, 87.5e9)
    assert inside.gather == pytest.approx(87.5e9 / 225e9)
    assert inside.total == inside.compute
    unpacked = step_seconds(Work(flops=0, dequantised=1e9), cluster, calibration)
    assert unpacked.total == pytest.approx(2.5e9 / (3350e9 * 0.75))


# Plans


def config(**sections: dict[str, Any]) -> RunConfig:
    tree: dict[str, Any] = {
        "data": {"train": "none"},
        "sampler": {"global_batch": 1024, "pool_rows": 128},
        "model": {"base": "meta-llama/Llama-3.1-70B", "quantization": "nf4"},
        "training": {"max_steps": 100, "deepspeed": str(ROOT / "ds_configs/zero_auto.json"), "shard_group": "auto"},
    }
    for name, section in sections.items():
        tree[name] = {**tree.get(name, {}), **section}
    return validate(RunConfig, tree, "test")


def test_schedules() -> None:
    """1,024 rows of 221 tokens on 16 GPUs are 14,433 executed tokens a rank."""
    cluster = make_cluster("h100", 2)
    direct = plan_run(config(training={"max_tokens_per_micro_batch": 16384}), cluster, TEXTS)
    assert direct.tokens == pytest.approx(14433, abs=1)
    assert (direct.schedule, direct.rounds, direct.kept) == ("direct", 1, 1)
    kept = plan_run(config(training={"max_tokens_per_micro_batch": 4096}), cluster, TEXTS)
    assert (kept.schedule, kept.rounds, kept.kept) == ("kept", 4, 1)
    twice = plan_run(config(training={"max_tokens_per_micro_batch": 4096, "passes": "two_pass"}), cluster, TEXTS)
    assert (twice.schedule, twice.kept) == ("two_pass", 0)
    assert direct.work.flops < kept.work.flops < twice.work.flops
    assert twice.work.flops / direct.work.flops == pytest.approx(8 / 6, rel=0.01)
    assert direct.work.dequantised == 3 * direct.counts.quantised
    assert twice.work.dequantised == (3 * 4 + 1) * direct.counts.quantised


@pytest.mark.parametrize(
    ("micro_batch", "kept", "embedding"), [(8192, None, 8192), (2048, None, 4096), (2048, 5000, 8192), (512, 512, 512)]
)
def test_schedules_are_those_of_the_trainer(micro_batch: int, kept: int | None, embedding: int) -> None:
    """Micro-batches, graphs kept and tokens embedded twice, against the plan of a real step over 2,048 lengths on 8 ranks."""
    rng = np.random.default_rng(0)
    queries, passages = (np.clip(rng.lognormal(np.log(mean), 0.5, 1024), 4, 256).astype(np.int64) for mean in (25, 120))
    step = partition(np.concatenate([queries, passages]), 8, Budget(micro_batch, kept or micro_batch, embedding))
    budgets = {"max_tokens_per_micro_batch": micro_batch, "max_kept_tokens": kept, "max_tokens_per_embedding_batch": embedding}
    plan = plan_run(config(training=budgets), make_cluster("h100"), Texts(queries.mean(), passages.mean(), "drawn"))
    assert plan.schedule == step.schedule
    assert abs(plan.rounds - step.rounds) <= 1 + step.rounds // 20
    assert abs(plan.kept - step.kept) <= 1
    assert plan.tokens * 8 == pytest.approx(step.lockstep_tokens, rel=0.03)
    twice = plan.tokens * 8 * (1 - plan.kept / plan.rounds)
    assert twice == pytest.approx(step.recomputed_tokens, abs=0.12 * step.real_tokens)


def test_time_and_cost() -> None:
    plan = plan_run(config(), make_cluster("h100", 2, price=2.5), TEXTS)
    assert plan.hours == pytest.approx(100 * plan.seconds.total / 3600)
    assert plan.gpu_hours == pytest.approx(16 * plan.hours)
    assert plan.cost == pytest.approx(2.5 * plan.gpu_hours)
    assert plan_run(config(), make_cluster("h100", 2), TEXTS).cost is None


@pytest.mark.parametrize(
    ("gpu", "nodes", "gpus"), [("h100", 1, 8), ("a100-40", 2, 8), ("4090", 1, 8), ("h200", 1, 1), ("a6000", 2, 4)]
)
def test_the_best_plan_fits_and_is_not_slower(gpu: str, nodes: int, gpus: int) -> None:
    cluster = make_cluster(gpu, nodes, gpus)
    best = best_run(config(), cluster, TEXTS)
    assert best is not None
    assert best.memory <= GPUS[gpu].memory * (1 - RESERVE)
    given = plan_run(config(), cluster, TEXTS)
    assert not given.fits or best.seconds.total <= given.seconds.total
    again = plan_run(
        best.config.model_copy(update={"training": best.config.training.model_copy(update={"shard_group": best.group})}),
        cluster,
        TEXTS,
    )
    assert (again.memory, again.seconds, again.schedule) == (best.memory, best.seconds, best.schedule)


def test_more_memory_is_used_for_speed() -> None:
    """A replica needs no gathers, a small model no checkpointing, and what fits goes through the model once."""
    small = best_run(config(model={"base": "Qwen/Qwen2.5-0.5B"}), make_cluster("h100", 2), TEXTS)
    assert small is not None
    assert (small.group, small.schedule, small.config.model.gradient_checkpointing) == (1, "direct", False)
    large = best_run(config(), make_cluster("h100", 2), TEXTS)
    assert large is not None
    assert (large.schedule, large.config.model.gradient_checkpointing) == ("direct", True)


def test_what_does_not_fit_says_why_and_what_would() -> None:
    """16 bits of 70B on four GPUs of 40 GB; 4 bits fit there."""
    cluster = make_cluster("a100-40", 1, 4)
    run = config(model={"quantization": "none"})
    plan = plan_run(run, cluster, TEXTS)
    assert not plan.fits
    assert plan.problem is not None
    needs = f"needs {plan.memory / 2**30:.1f} GiB of 38.8 GiB usable on a a100-40"
    assert plan.problem.startswith(f"does not fit: {needs}, most for ")
    assert max(plan.lines, key=lambda name: plan.lines[name]) in plan.problem
    found = nearest_fit(run, cluster, TEXTS)
    assert found is not None
    assert found[0] == "model.quantization=nf4"
    assert found[1].fits
    alone = nearest_fit(config(), make_cluster("4090", 1, 1), TEXTS)
    assert alone is not None
    assert alone[0] == "4 nodes"
    model = {"base": "llama-3.1-405b", "quantization": "none", "lora": None, "dtype": "float32"}
    huge = config(sampler={"global_batch": 128, "pool_rows": 64}, model=model)
    assert nearest_fit(huge, make_cluster("4090", 1, 1), TEXTS) is None


def test_the_trainer_chooses_the_same_group(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`shard_group: auto` of a 14B on several GPUs: the trainer's answer, from the model's own skeleton, and the planner's."""
    shape = {
        "model_type": "qwen2",
        "hidden_size": 5120,
        "num_hidden_layers": 48,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
    }
    (tmp_path / "config.json").write_text(
        json.dumps({**shape, "intermediate_size": 13824, "vocab_size": 152064, "tie_word_embeddings": False})
    )
    for gib, tokens in ((24, 4096), (12, 4096), (16, 8192)):
        training = {"gpu_memory_gib": gib, "max_tokens_per_micro_batch": tokens}
        run = config(model={"base": str(tmp_path)}, training=training)
        gpu = replace(find_gpu("4090"), memory=gib * 2.0**30)
        cluster = Cluster(gpu, 2, 4)
        data, counts = SimpleNamespace(shape=read_shape(run.model)), count_parameters(run.model)
        asked = choose_shard_group(run, data, counts, 8, 4)  # type: ignore[arg-type]
        assert plan_run(run, cluster, TEXTS).group == asked
    assert asked > 1


def test_offload_of_a_deepspeed_json_is_planned(tmp_path: Path) -> None:
    path = tmp_path / "zero.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}))
    plan = plan_run(config(training={"deepspeed": str(path), "shard_group": None}), make_cluster("h100"), TEXTS)
    assert (plan.stage, plan.group) == (3, 8)
    assert any(note.startswith("offload has low confidence") for note in plan.notes)


def test_a_deepspeed_json_of_the_checkout_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    plan = plan_run(config(training={"deepspeed": "ds_configs/zero3.json", "shard_group": None}), make_cluster("h100"), TEXTS)
    expected = f"DeepSpeed JSON: {ROOT / 'ds_configs/zero3.json'} (that of the checkout: there is no ds_configs/zero3.json in"
    assert any(note.startswith(expected) for note in plan.notes)


def test_text_lengths_come_from_the_prepared_data(tmp_path: Path) -> None:
    run = config(data={"train": str(tmp_path), "max_query_tokens": 64, "max_passage_tokens": 256})
    assert text_lengths(run).source.startswith("assumed: every text as long as the limit")
    assert (text_lengths(run).query, text_lengths(run).passage) == (64, 256)
    tables = tmp_path / "lengths" / "0123"
    tables.mkdir(parents=True)
    np.save(tables / "queries.npy", np.array([10, 20], np.int32))
    np.save(tables / "passages.npy", np.array([100, 300], np.int32))
    assert (text_lengths(run).query, text_lengths(run).passage) == (15, 178)
    assert text_lengths(run, query=30).query == 30
    assert text_lengths(run, 30, 999) == Texts(30, 256, "as given")
    assert text_lengths(run, query=900).query == 64
    for key, lengths in (("--query-tokens", (-4, None)), ("--passage-tokens", (30, float("nan"))), ("--query-tokens", (0, 5))):
        with pytest.raises(ConfigError, match=f"{key}: found"):
            text_lengths(run, *lengths)


# Bad requests


@pytest.mark.parametrize(
    ("sections", "cluster", "message"),
    [
        ({"sampler": {"global_batch": 4, "pool_rows": 1}}, {}, "global_batch: found 4; 8 ranks need at least a row each"),
        ({"training": {"shard_group": 3}}, {}, "shard_group: found 3; must divide the 8 ranks"),
        ({"training": {"shard_group": None}}, {}, 'shard_group: found None; .*leaves "stage" to it'),
        (
            {"training": {"deepspeed": "ds_configs/zero3.json"}},
            {},
            "shard_group: found 'auto'; ds_configs/zero3.json states stage 3",
        ),
        ({"training": {"deepspeed": "none.json"}}, {}, "deepspeed: found 'none.json'; no such file"),
        ({}, {"gpu": "b200x"}, "--gpu: found 'b200x'; no such GPU"),
        ({}, {"nodes": 0}, "--nodes: found 0; must be at least 1"),
        ({}, {"interconnect": "token ring"}, "--interconnect: found 'token ring'"),
        ({}, {"price": -1}, "--price: found -1; must be a number that is not negative"),
        ({}, {"price": float("nan")}, "--price: found nan; must be a number"),
        ({}, {"gpu": "b200x", "gpu_memory_gib": 0.0}, "--gpu-memory: found 0.0; must be a size above 0"),
    ],
)
def test_bad_requests(sections: dict[str, Any], cluster: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_run(config(**sections), make_cluster(**{"gpu": "h100", **cluster}), TEXTS)


def test_a_gpu_outside_the_table_is_planned_by_its_memory() -> None:
    plan = plan_run(config(), make_cluster("b200x", gpu_memory_gib=180), TEXTS)
    assert str(plan.cluster) == "8 x b200x (180.0 GiB)"
    assert any("no published run on a b200x" in note for note in plan.notes)
    assert plan_run(config(), make_cluster("h100", gpu_memory_gib=40), TEXTS).limit == 40 * 2**30 * (1 - RESERVE)


def test_texts_longer_than_the_model_was_made_for() -> None:
    long = config(
        model={"base": "gemma-2-9b"},
        data={"max_passage_tokens": 10_000},
        training={"max_tokens_per_micro_batch": 16384},
    )
    found = [note for note in plan_run(long, make_cluster("h100"), TEXTS).notes if "positions" in note]
    assert found == ["texts of up to 10,000 tokens: gemma-2-9b was made for 8,192 positions; lower data.max_*_tokens"]
    assert not any("positions" in note for note in plan_run(config(), make_cluster("h100"), TEXTS).notes)


def test_an_unknown_model_is_refused() -> None:
    with pytest.raises(ModelError, match=r"model.base: found 'some/model'"):
        plan_run(config(model={"base": "some/model"}), make_cluster("h100"), TEXTS)


# The door

WITHOUT_TORCH = """
import runpy, sys

blocked = set(sys.argv.pop(1).split(","))

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in blocked:
            raise ModuleNotFoundError(f"{name} is blocked", name=name)

sys.meta_path.insert(0, Refuse())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def door(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", WITHOUT_TORCH, ",".join(BLOCKED), "launch/plan.py", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)


def test_a_run_is_planned_without_torch() -> None:
    done = door("launch/configs/llama3.1_70b_hybrid.yaml", "--nodes", "1,2,8", "training.shard_group=8", "--price", "2")
    assert done.returncode == 0, done.stderr
    for part in ("8 GPUs", "16 GPUs", "64 GPUs", "4-bit weights", "hpZ", "GPU-hours, cost", "fastest settings that fit"):
        assert part in done.stdout


def test_values_of_the_door_are_those_of_the_plan() -> None:
    name = "launch/configs/llama3.1_70b_hybrid.yaml"
    done = door(name, "--json", "--query-tokens", "34", "--passage-tokens", "187")
    (values,) = json.loads(done.stdout)
    found = values["runs"]["llama3.1-70b-hybrid"]
    plan = plan_run(load_config(ROOT / name), make_cluster("h100"), Texts(34, 187, ""))
    assert found["memory_bytes"] == plan.lines
    assert found["gpu_hours"] == values["gpu_hours"] == plan.gpu_hours
    assert found["settings"][1] == "training.shard_group=8"


def test_a_study_is_planned_without_torch(tmp_path: Path) -> None:
    """Nine models, five arms, three seeds."""
    models = [
        "Qwen2.5-0.5B",
        "Qwen2.5-1.5B",
        "Qwen2.5-3B",
        "Qwen2.5-7B",
        "Qwen2.5-14B",
        "Qwen2.5-32B",
        "Qwen2.5-72B",
        "Qwen3-8B",
        "Qwen3-32B",
    ]
    study = {
        "study": {"name": "sizes", "directory": str(tmp_path / "runs")},
        "base": str(ROOT / "launch/configs/llama3.1_70b_hybrid.yaml"),
        "arms": [{"name": f"a{i}", "set": {"sampler.arm": "hybrid", "sampler.alpha": i / 16}} for i in (0, 4, 8, 12, 16)],
        "models": [{"name": name, "set": {"model.base": f"Qwen/{name}"}} for name in models],
        "seeds": [0, 1, 2],
    }
    (tmp_path / "study.yaml").write_text(json.dumps(study))
    done = door(str(tmp_path / "study.yaml"), "--gpu", "a100-80", "--nodes", "1,2,8", "--price", "1.5")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("all           ") == 3
    assert "Qwen2.5-72B, 64 x a100-80" in done.stdout


def test_exit_codes_of_the_door() -> None:
    too_small = door("launch/configs/llama3.1_70b_hybrid.yaml", "--gpu", "4090", "training.max_tokens_per_micro_batch=12288")
    assert too_small.returncode == 1
    assert "does not fit: needs" in too_small.stdout
    neither = door("launch/configs/site_example.yaml")
    assert (neither.returncode, neither.stdout) == (2, "")
    assert "neither a run (data, model, training) nor a study (study). See launch/configs/." in neither.stderr
    wrong = door("launch/configs/llama3.1_70b_hybrid.yaml", "--gpu", "h10")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr.startswith("error: --gpu: found 'h10'")

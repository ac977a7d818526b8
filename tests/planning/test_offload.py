"""Offload: what leaves the GPU comes to host memory, by hand; the time that it takes; what a plan says of it."""

from typing import Any

import pytest

from hybrid_scale.config import RunConfig
from hybrid_scale.planning.costs import (
    ALLOCATOR,
    STAGING_LINE,
    MemoryNeed,
    ParameterCounts,
    host_lines,
    memory_lines,
    offloaded_bytes,
)
from hybrid_scale.planning.forecast import RunPlan
from hybrid_scale.planning.hardware import make_cluster
from hybrid_scale.planning.planner import best_run, nearest_fit, plan_run
from hybrid_scale.planning.search import BUDGETS
from tests.planning.test_plan import TEXTS, config
from tests.test_floors import ROOT

COUNTS = ParameterCounts(2_048_000_000, 100_000_000, 10_000_000)


def offloaded(**sections: Any) -> RunConfig:
    training = {"deepspeed": str(ROOT / "ds_configs/zero3_offload.json"), "shard_group": None, **sections.pop("training", {})}
    return config(training=training, **sections)


def plan(**sections: Any) -> RunPlan:
    return plan_run(offloaded(**sections), make_cluster("4090", 1, 8), TEXTS)


def test_what_leaves_a_gpu_by_hand() -> None:
    """8 ranks: a rank's 128 MB of 4-bit weights and 25 MB of others; 5 MB each of gradients and masters, 10 MB of moments."""
    weights = {"4-bit weights": 128_000_000, "frozen weights": 25_000_000}
    optimizer = {"trained weights": 5_000_000, "gradients": 5_000_000, "Adam moments": 10_000_000}
    assert offloaded_bytes(MemoryNeed(COUNTS, 2, 0.0), 8, 3) == {}
    assert offloaded_bytes(MemoryNeed(COUNTS, 2, 0.0, offloads_weights=True), 8, 3) == weights
    assert offloaded_bytes(MemoryNeed(COUNTS, 2, 0.0, offloads_weights=True), 8, 2) == {}  # DeepSpeed offloads shares alone
    assert offloaded_bytes(MemoryNeed(COUNTS, 2, 0.0, offloads_optimizer=True), 8, 3) == optimizer
    replicas = offloaded_bytes(MemoryNeed(COUNTS, 2, 0.0, offloads_optimizer=True), 8, 2)
    assert replicas == optimizer


def test_full_fine_tuning_takes_its_weights_with_it() -> None:
    """A billion weights in float32 on 4 ranks: a rank's 1 GB of them, its masters and gradients, 2 GB of moments."""
    counts = ParameterCounts(0, 0, 1_000_000_000)
    both = MemoryNeed(counts, 4, 0.0, offloads_weights=True, offloads_optimizer=True)
    assert offloaded_bytes(both, 4, 3) == {"trained weights": 2e9, "gradients": 1e9, "Adam moments": 2e9}
    assert offloaded_bytes(MemoryNeed(counts, 4, 0.0, offloads_weights=True), 4, 3) == {"trained weights": 1e9}
    assert "trained weights" not in memory_lines(both, 4, 3)


def test_nothing_is_lost_between_gpu_and_host() -> None:
    resident = MemoryNeed(COUNTS, 2, 3e8)
    both = MemoryNeed(COUNTS, 2, 3e8, offloads_weights=True, offloads_optimizer=True, host_activations=7e8)
    here, there, host = memory_lines(resident, 8, 3), memory_lines(both, 8, 3), host_lines(both, 8, 3)
    apart = (STAGING_LINE, "allocator (reserved over allocated)", "saved by kept graphs")
    for name in (here.keys() | there.keys() | host.keys()) - set(apart):
        assert there.get(name, 0.0) + host.get(name, 0.0) == pytest.approx(here[name])
    assert there["quantisation state (replicated)"] == here["quantisation state (replicated)"]
    assert there["adapters kept whole"] == 40_000_000
    assert there[STAGING_LINE] == pytest.approx(0.27 * 153_000_000)
    assert host["saved by kept graphs"] == 7e8


def test_host_memory_of_a_node() -> None:
    """70B on 8 ranks of one node: all of its 34.2 GB of 4-bit weights and 2.1 GB of table; on two nodes half of them each."""
    one = plan()
    assert one.host["4-bit weights"] == pytest.approx(one.counts.quantised / 2)
    two = plan_run(offloaded(), make_cluster("4090", 2, 8), TEXTS)
    assert two.host["4-bit weights"] == pytest.approx(one.host["4-bit weights"] / 2)
    assert plan_run(config(), make_cluster("4090", 1, 8), TEXTS).host == {}


def test_a_70b_on_two_consumer_gpus_fits_with_offload_alone() -> None:
    """The published case: 2 x 24 GB. Our adapters, buffers and batch differ; 1,024 tokens at once."""
    small = {"max_tokens_per_micro_batch": 1024, "max_tokens_per_embedding_batch": 1024}
    cluster = make_cluster("4090", 1, 2)
    resident = plan_run(config(training={**small, "shard_group": 2}), cluster, TEXTS)
    assert not resident.fits
    assert plan_run(offloaded(training=small), cluster, TEXTS).fits
    assert best_run(offloaded(training=small), cluster, TEXTS) is None  # what is searched is resident


def test_time_of_offloaded_weights_by_hand() -> None:
    """Each pass fetches a rank's eighth of the weights over PCIe 4 at 60 % of 32 GB/s, beside the computing."""
    training = {"max_tokens_per_micro_batch": 4096, "passes": "two_pass", "max_tokens_per_embedding_batch": 16384}
    off, on = plan(training=training), plan_run(config(training={**training, "shard_group": 8}), make_cluster("4090"), TEXTS)
    passes = 2 * off.rounds + -(-off.tokens // 16384)
    weights = off.counts.quantised / 2 + off.counts.frozen * 2
    assert off.work.fetched == pytest.approx(passes * weights / 8)
    assert off.seconds.gather - on.seconds.gather == pytest.approx(off.work.fetched / (32e9 * 0.6))
    updated = off.counts.trained / 8
    assert off.seconds.host == pytest.approx(updated * 8 / (32e9 * 0.6) + updated / 1e8)
    assert off.seconds.total == pytest.approx(
        max(off.seconds.compute, off.seconds.gather) + off.seconds.exchange + off.seconds.host
    )


def test_offloaded_activations() -> None:
    """Kept tokens' layer inputs, 2 h L each, go to the host and come back; the GPU holds a micro-batch's."""
    budgets = {"max_tokens_per_micro_batch": 4096, "max_kept_tokens": 40_000, "shard_group": 8}
    cluster = make_cluster("h100")
    here, there = (plan_run(config(training={**budgets, "offload_activations": off}), cluster, TEXTS) for off in (False, True))
    token = 2 * 8192 * 80
    assert (here.schedule, there.schedule) == ("direct", "direct")
    assert here.lines["activations"] - there.lines["activations"] == pytest.approx((40_000 - 4096) * token)
    assert there.host == {"saved by kept graphs": 8 * 40_000 * token}
    assert there.seconds.host == pytest.approx(2 * there.tokens * token / (64e9 * 0.6))
    assert there.seconds.host_bytes == pytest.approx(2 * there.tokens * token)


def test_a_plan_with_offload_says_how_sure_it_is() -> None:
    found = plan()
    least = sum(found.lines.values()) - ALLOCATOR * found.lines[STAGING_LINE]
    assert any(note.startswith("offload has low confidence") for note in found.notes)
    assert any(f"{least / 2**30:.1f} GiB if nothing is staged" in note for note in found.notes)
    (tiny,) = (note for note in found.notes if "optimiser of adapters is tiny" in note)
    assert "saves 0.4 GiB of a GPU" in tiny  # 207 M x 16 bytes / 8
    full = offloaded(model={"base": "Qwen/Qwen2.5-0.5B", "quantization": "none", "lora": None, "dtype": "float32"})
    assert not any("tiny" in note for note in plan_run(full, make_cluster("h100"), TEXTS).notes)


def test_budgets_are_planned_beside_offload() -> None:
    """The state of the JSON stays; more tokens fit than without it."""
    auto: dict[str, Any] = dict.fromkeys(BUDGETS, "auto")
    off, on = plan(training=auto), plan_run(config(training={**auto, "shard_group": 8}), make_cluster("4090"), TEXTS)
    assert (off.stage, off.group, off.fits) == (3, 8, True)
    assert off.config.training.max_tokens_per_micro_batch > on.config.training.max_tokens_per_micro_batch


def test_the_nearest_change_keeps_the_offload() -> None:
    """A 70B on 2 x 24 GB with micro-batches that are too large: smaller ones fit, on the same machines."""
    large = offloaded(training={"max_tokens_per_micro_batch": 12288})
    found = nearest_fit(large, make_cluster("4090", 1, 2), TEXTS)
    assert found is not None
    assert found[0] == "smaller token budgets"
    assert found[1].fits
    assert found[1].settings()[0].endswith("zero3_offload.json")
    assert not any("shard_group" in setting for setting in found[1].settings())

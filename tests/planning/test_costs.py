"""Byte formulas against numbers worked by hand, and against what published runs needed."""

import json
from pathlib import Path
from typing import Any

import pytest

from hybrid_scale.config import RunConfig, validate
from hybrid_scale.errors import ConfigError
from hybrid_scale.planning.architecture import KNOWN, Architecture
from hybrid_scale.planning.costs import (
    MemoryNeed,
    ParameterCounts,
    activation_bytes,
    loss_bytes,
    memory_lines,
    memory_need,
    needed_bytes,
    saved_bytes,
    smallest_shard_group,
    static_bytes,
)

# Linear weights, embeddings and norms, LoRA rank 16 on all linear layers; hidden, intermediate, layers.
LLAMA_70B = (ParameterCounts(68_451_000_000, 1_051_000_000, 207_100_000), KNOWN["llama-3.1-70b"])
LLAMA_8B = (ParameterCounts(6_979_000_000, 526_000_000, 41_900_000), KNOWN["llama-3.1-8b"])
MISTRAL_7B = (ParameterCounts(6_979_000_000, 131_000_000, 41_900_000), KNOWN["mistral-7b-v0.1"])
STEP_MODEL = Architecture("benchmarks/step.py", "llama", 4, 256, 4, 4, 64, 704, 16_000)

Model = tuple[ParameterCounts, Architecture]


def group(model: Model, world: int, gib: float, tokens: int = 4096, node: int = 8) -> int:
    counts, shape = model
    activations = activation_bytes(shape, tokens, tokens, 16384)
    need = MemoryNeed(counts, 2, activations, 2 * shape.hidden * shape.intermediate)
    return smallest_shard_group(need, world, min(node, world), gib * 2**30)


def test_static_bytes_of_a_round_model() -> None:
    """2.048 billion 4-bit weights, 100 million frozen in 2 bytes, 10 million trained, on 8 ranks."""
    counts = ParameterCounts(2_048_000_000, 100_000_000, 10_000_000)
    lines = static_bytes(counts, 2, 8, 3)
    assert lines == {
        "4-bit weights": 128_000_000,  # 1.024e9 / 8
        "quantisation state (replicated)": 32_500_000,  # 32e6 blocks a byte, 125,000 blocks of blocks four bytes
        "frozen weights": 25_000_000,
        "trained weights": 10_000_000,  # 40e6 of parameters and 40e6 of masters, / 8
        "gradients": 5_000_000,
        "Adam moments": 10_000_000,
        "adapters kept whole": 40_000_000,
    }
    assert static_bytes(counts, 2, 8, 2)["4-bit weights"] == 1_024_000_000
    assert static_bytes(counts, 2, 8, 2)["trained weights"] == 45_000_000
    assert sum(static_bytes(counts, 2, 1, 0).values()) == 1_024_000_000 + 32_500_000 + 200_000_000 + 10_000_000 * 16


def test_hpz_holds_a_second_copy() -> None:
    counts = ParameterCounts(2_048_000_000, 100_000_000, 10_000_000)
    name = "second copy, over the shard group"
    assert static_bytes(counts, 2, 8, 3, 4)[name] == (1_024_000_000 + 200_000_000) / 4
    assert all(name not in static_bytes(counts, 2, 8, stage, size) for stage, size in ((3, 8), (3, 1), (2, 1), (3, None)))
    full = ParameterCounts(0, 0, 1_000_000)
    assert static_bytes(full, 4, 8, 3, 2)[name] == 2_000_000
    assert static_bytes(full, 4, 8, 3)["adapters kept whole"] == 0


def test_activations_of_a_70b_token() -> None:
    """By hand: inputs of 80 layers, 1.311 MB; one layer 24 h + 12 i = .541 MB. Traced at 2,048 tokens: 3,621 MiB; without
    checkpointing 394,728 bytes a token and layer."""
    shape = LLAMA_70B[1]
    assert activation_bytes(shape, 1, 1, 0) == 2 * 8192 * 80 + 24 * 8192 + 12 * 28672
    assert activation_bytes(shape, 0, 0, 1) == 8 * (8192 + 28672)
    assert activation_bytes(shape, 2048, 2048, 0) == pytest.approx(3621 * 2**20, rel=0.003)
    assert activation_bytes(shape, 1, 1, 0, checkpointing=False) == pytest.approx(80 * 394_728, rel=0.01)
    assert activation_bytes(shape, 1, 1, 0, float32_adapter=True) == pytest.approx(80 * 16384 + 856_842 - 8192, rel=0.005)
    assert activation_bytes(shape, 1, 1, 0, dropout=True) == pytest.approx(80 * 16384 + 772_202, rel=0.005)
    assert activation_bytes(shape, 1, 1, 0, float32_adapter=True, dropout=True) == pytest.approx(
        80 * 16384 + 1_231_178, rel=0.005
    )


@pytest.mark.parametrize(
    ("model", "layer", "inside"),
    [("llama-2-7b", 171_368, 232_630), ("llama-3.1-8b", 197_992, 272_618), ("qwen3-8b", 202_248, 268_650)],
)
def test_activations_of_other_traced_models(model: str, layer: int, inside: int) -> None:
    """Bytes a token traced at depths 2 and 4, 2,048 tokens in 4 texts: what a layer saves, and what the recomputed one needs."""
    shape = KNOWN[model]
    assert saved_bytes(shape) == pytest.approx(layer, rel=0.01)
    assert activation_bytes(shape, 1, 0, 0) == pytest.approx(inside, rel=0.015)


def test_a_kept_token_costs_the_inputs_of_its_layers() -> None:
    one, two = (activation_bytes(LLAMA_70B[1], 1000, kept, 0) for kept in (1000, 2000))
    assert two - one == 1000 * 2 * 8192 * 80


def test_needed_bytes_of_a_replica_by_hand() -> None:
    """70B, one GPU: 34.23 + 1.09 (state) + 2.10 (table) + 207.1e6 x 20 bytes = 41.56 GB; buckets .16; a token's 1.9 MB."""
    counts, shape = LLAMA_70B
    by_hand = (34.2255e9 + 1.08626e9 + 2.102e9 + 4.142e9 + 0.16e9 + 1.851e6) * 1.12 + 1.3e9
    assert needed_bytes(MemoryNeed(counts, 2, activation_bytes(shape, 1, 1, 0)), 1, 1) == pytest.approx(by_hand, rel=1e-4)


def test_lines_of_a_shared_model_by_hand() -> None:
    """70B on 8 ranks: 5e8 live and 5e7 prefetched elements of two bytes; the table (2.10 GB) is larger than both by 1.00 GB."""
    lines = memory_lines(MemoryNeed(LLAMA_70B[0], 2, 3e9, loss={"loss": 1e8}), 8, 3)
    assert lines["ZeRO-3 live weights"] == 1e9
    assert lines["ZeRO-3 prefetch"] == 1e8
    assert lines["embedding table, gathered alone"] == pytest.approx(1.002e9)
    assert lines["allocator (reserved over allocated)"] == pytest.approx(
        0.12 * (sum(lines.values()) - lines["CUDA and NCCL"]) / 1.12
    )
    assert lines["loss"] == 1e8
    assert not {"ZeRO-3 live weights", "second copy, over the shard group"} & set(
        memory_lines(MemoryNeed(LLAMA_70B[0], 2, 3e9), 8, 2)
    )


def test_unquantised_weights_are_not_gathered_at_once() -> None:
    """LoRA on 16-bit weights: only the table may exceed what is live, not all that is frozen."""
    counts = ParameterCounts(0, 69_500_000_000, 207_100_000)
    lines = memory_lines(MemoryNeed(counts, 2, 3e9, table=1_050_673_152), 8, 3)
    assert lines["embedding table, gathered alone"] == pytest.approx(2 * 1_050_673_152 - 1.1e9)


def test_loss_of_a_batch_by_hand() -> None:
    """1,024 rows with a negative each, 8 ranks, 4,096 wide: 3,072 texts in float32 with gradients; 128 rows x 2,048 scores."""
    lines = loss_bytes(3072, 2048, 128, 4096, 16_777_216, 4)
    assert lines == {"gathered embeddings": 3072 * 4096 * 8, "loss": 4 * 4096 * (2 * 2048 + 3 * 128) + 5 * 128 * 2048}
    assert loss_bytes(3072, 2048, 128, 4096, 2048 * 10, 2)["loss"] == 4 * 4096 * (2 * 2048 + 30) + 5 * 10 * 2048


def test_a_published_peak_is_met() -> None:
    """PEFT's documentation: QLoRA of Llama-2-70B, rank 8, ZeRO-3 on 2 GPUs, 2 x 2048 tokens each: 36.6 GB a GPU."""
    counts = ParameterCounts(68_451_000_000, 262_000_000, 103_500_000)
    activations = activation_bytes(LLAMA_70B[1], 4096, 4096, 0, dropout=True)
    assert needed_bytes(MemoryNeed(counts, 2, activations, 2 * 8192 * 28672), 2, 2) == pytest.approx(36.6e9, rel=0.05)


@pytest.mark.parametrize("model", [MISTRAL_7B, LLAMA_8B], ids=["7b", "8b"])
@pytest.mark.parametrize("gib", [24, 80])
@pytest.mark.parametrize("world", [1, 8, 32])
def test_7b_is_replicated(model: Model, gib: int, world: int) -> None:
    assert group(model, world, gib) == 1


@pytest.mark.parametrize(
    ("world", "gib", "expected"),
    [
        (8, 80, 1),  # 14.1k tokens fit beside a whole copy
        (16, 40, 2),  # no beside a whole copy, 5.4k with half of one
        (8, 48, 2),  # 0.7k beside a whole copy
        (4, 48, 2),
        (8, 24, 8),  # no, no, 3.2k, 5.5k
        (32, 24, 8),
        (32, 80, 1),
    ],
)
def test_group_of_a_70b(world: int, gib: int, expected: int) -> None:
    """4096 tokens; remarks: the largest micro-batches of another memory model, which meets PEFT's and torchtune's peaks."""
    assert group(LLAMA_70B, world, gib) == expected


@pytest.mark.parametrize(("world", "gib"), [(1, 24), (1, 40), (2, 24), (4, 24)])
def test_a_70b_that_fits_no_group_is_refused(world: int, gib: int) -> None:
    with pytest.raises(ConfigError, match=rf"a GPU of {gib}.0 GiB would need \d+.\d GiB even when all {world} share"):
        group(LLAMA_70B, world, gib)


def test_fewer_tokens_fit_a_smaller_group() -> None:
    assert group(LLAMA_70B, 8, 24, tokens=3000) == 8
    assert group(LLAMA_70B, 4, 24, tokens=3000) == 4
    assert group(LLAMA_70B, 8, 40, tokens=9000) > group(LLAMA_70B, 8, 40, tokens=1000)


def test_groups_stay_inside_a_node_and_divide_the_world() -> None:
    """12 GPUs in nodes of 6: 1, 2, 6, 12; 4 would straddle two nodes."""
    counts, shape = LLAMA_70B
    need = MemoryNeed(counts, 2, activation_bytes(shape, 4096, 4096, 0))
    chosen = {smallest_shard_group(need, 12, 6, gib * 2**30) for gib in range(19, 81)}
    assert chosen == {1, 2, 6, 12}


def run_config(**training: object) -> RunConfig:
    tree = {"data": {"train": "none"}, "model": {"base": "none", "quantization": "nf4"}, "training": {"max_steps": 1, **training}}
    return validate(RunConfig, tree, "test")


def test_the_need_of_a_run_is_read_from_its_config() -> None:
    """70B shape: a kept token costs 1.31 MB, one of the micro-batch .54 MB more."""
    counts, shape = LLAMA_70B
    kept, inside = 2 * 8192 * 80, 24 * 8192 + 12 * 28672

    def activations(**training: object) -> float:
        tokens = {"max_tokens_per_micro_batch": 1000, "max_tokens_per_embedding_batch": 512, **training}
        return memory_need(run_config(**tokens), counts, shape).activations

    assert activations() == 1000 * (kept + inside)
    assert activations(max_kept_tokens=3000) == 3000 * kept + 1000 * inside
    assert activations(max_kept_tokens=3000, offload_activations=True) == 1000 * (kept + inside)
    assert activations(max_tokens_per_embedding_batch=100_000) == 100_000 * 8 * (8192 + 28672)
    need = memory_need(run_config(), counts, shape, world=8)
    assert need.dequantised == 2 * 8192 * 28672
    assert need.table == 128256 * 8192
    assert need.loss == loss_bytes(128, 64, 8, 8192, 16_777_216, 4)


# What this project measured on CPU ranks


def results(name: str) -> Any:
    return json.loads((Path(__file__).parents[2] / "benchmarks" / "results" / name).read_text())


def test_share_of_a_loaded_model_against_memory_of_ranks() -> None:
    """Resident memory of 2 and 4 ranks after a ZeRO-3 load of NF4 weights: at least the formula's share, at most a tenth more."""
    loads = results("load.json")["loads"]
    hidden, inner, vocabulary = 2048, 5632, 16_000  # benchmarks/load.py; as many layers as its gigabytes hold
    layer = 2 * hidden * (hidden + hidden // 4) + 3 * hidden * inner
    layers = round((loads["gigabytes"] * 1e9 / 2 - 2 * vocabulary * hidden) / layer)
    counts = ParameterCounts(layers * layer, vocabulary * hidden + (2 * layers + 1) * hidden, 0)
    rows = [row for row in loads["rows"] if row["system"] == "written"]
    assert {row["ranks"] for row in rows} == {2, 4}
    for row in rows:
        share = sum(static_bytes(counts, 2, row["ranks"], 3).values()) / 1e6
        assert share == pytest.approx(row["share_mb"], rel=0.002)
        assert share < row["load_after_mb"] < 1.1 * share


def test_shares_of_a_70b_and_a_72b() -> None:
    """Against what the streamed loader says of the models' own skeletons, 8 to 64 ranks."""
    shapes = {"Llama-3-70B": KNOWN["llama-3-70b"], "Qwen2.5-72B": KNOWN["qwen2.5-72b"]}
    for row in results("load.json")["shapes"]:
        a = shapes[row["model"]]
        lines = static_bytes(ParameterCounts(a.linear, a.encoder - a.linear, 0), 2, row["ranks"], 3)
        assert lines["4-bit weights"] == row["4-bit weights"]
        assert lines["quantisation state (replicated)"] == pytest.approx(row["quantisation state"], rel=0.001)
        assert lines["frozen weights"] == pytest.approx(row["other weights"], rel=0.003)


@pytest.mark.parametrize(("system", "kept", "tolerance"), [("direct", 4096, 0.06), ("kept", 2048, 0.06), ("two-pass", 512, 0.12)])
def test_activations_against_memory_of_ranks(system: str, kept: int, tolerance: float) -> None:
    """Resident memory of real float32 training steps (benchmarks/step.py, case A: 256 wide, 4 layers, micro-batches of 512).

    A rank's 64 texts hold 3,900 to 4,050 tokens: eight micro-batches.
    """
    measured = results("step.json")["A"]["systems"][system]["training_mib"] * 2**20
    tokens = min(kept, 3975)
    formula = activation_bytes(STEP_MODEL, 512, tokens, 512, 4, checkpointing=False)
    assert formula == pytest.approx(measured, rel=tolerance)

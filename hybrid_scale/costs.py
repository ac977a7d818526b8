"""Formulas: bytes of weights, adapters, optimiser states and activations; the smallest group of GPUs that a model fits.

No torch; parameter counts and shapes come in from outside. Sources: QLoRA (2305.14314) for the 4-bit layout; ZeRO (1910.02054)
for what is shared out; ZeRO++ (2306.10209) for the second copy inside a group (hpZ). Factors fitted to traces say so.
"""

from dataclasses import dataclass

from hybrid_scale.config import RunConfig
from hybrid_scale.errors import ConfigError, describe

NF4_BYTES = 0.5
NF4_STATE_BYTES = 1 / 64 + 4 / (64 * 256)
"""Quantisation state of a 4-bit weight, double quantisation: one byte a block of 64, one float32 a 256 blocks.
bitsandbytes keeps it whole on every rank, ZeRO-3 doesn't share it out."""
ADAM_BYTES = 4 + 4
"""First and second moment of a trained weight, float32."""
GRADIENT_BYTES = 4
MASTER_BYTES = 4

CONTEXT_BYTES = 1.3e9
"""CUDA context and NCCL buffers of a process: assumed; with it PEFT's two published peaks of a 70B are met to 2 %."""
ALLOCATOR = 1.12
"""Reserved over allocated bytes of torch's allocator: 10.22 / 9.16 GiB in answer.ai's QLoRA benchmark (2024)."""
RESERVE = 0.03
"""Share of a GPU's memory that a plan leaves free."""
LIVE_ELEMENTS = 5e8 * 1.1
"""Gathered weights whole at once under ZeRO-3: `stage3_max_live_parameters` of ds_configs, in elements of the stored type,
and the 10 % by which the last prefetch goes over it (counted: benchmarks/traffic.py)."""
BUCKET_BYTES = 2 * 2e7 * 4
"""DeepSpeed's `reduce_bucket_size` of ds_configs, float32, twice for the overlap of filling and sending."""


@dataclass(frozen=True)
class ParameterCounts:
    """Weights of a model: those stored in 4 bits, those frozen in full, those trained (float32)."""

    quantised: int
    frozen: int
    trained: int

    @property
    def total(self) -> int:
        return self.quantised + self.frozen + self.trained

    @property
    def adapter(self) -> int:
        """Trained weights beside frozen ones; 0 where all weights are trained."""
        return self.trained if self.quantised + self.frozen else 0


def static_bytes(
    counts: ParameterCounts, dtype_bytes: int, world: int, zero_stage: int, shard_group: int | None = None
) -> dict[str, float]:
    """Bytes on one rank before any activation, by line. `world` ranks share what their ZeRO stage shares (0: none).

    Under stage 3 adapters stay whole on each rank beside their shares (persistent: below 10^6 weights a tensor), and a
    `shard_group` between 1 and `world` holds a second copy of all other weights (hpZ).
    """
    weights = world if zero_stage == 3 else 1
    gradients = world if zero_stage >= 2 else 1
    states = world if zero_stage >= 1 else 1
    lines = {
        "4-bit weights": counts.quantised * NF4_BYTES / weights,
        "quantisation state (replicated)": counts.quantised * NF4_STATE_BYTES,
        "frozen weights": counts.frozen * dtype_bytes / weights,
        "trained weights": counts.trained * MASTER_BYTES * (1 / weights + (1 / states if zero_stage else 0)),
        "gradients": counts.trained * GRADIENT_BYTES / gradients,
        "Adam moments": counts.trained * ADAM_BYTES / states,
    }
    if zero_stage == 3:
        lines["adapters kept whole"] = float(counts.adapter * MASTER_BYTES)
        if shard_group and 1 < shard_group < world:
            lines["second copy, over the shard group"] = _gathered_in_passes(counts, dtype_bytes) / shard_group
    return lines


def _gathered_in_passes(counts: ParameterCounts, dtype_bytes: int) -> float:
    """Bytes of all weights that ZeRO-3 gathers anew in each pass: all but the adapters."""
    return counts.quantised * NF4_BYTES + counts.frozen * dtype_bytes + (counts.trained - counts.adapter) * MASTER_BYTES


def activation_bytes(
    hidden: int,
    intermediate: int,
    layers: int,
    micro_batch: int,
    kept: int,
    embedding: int,
    dtype_bytes: int = 2,
    checkpointing: bool = True,
    float32_adapter: bool = False,
) -> float:
    """Largest activations of a step, for tokens of a micro-batch with gradients, tokens whose graphs are kept, and tokens of a
    pass without gradients.

    Per token in 16 bits, fitted to traces of 7B to 70B Llamas with errors of -3.7 to -0.1 %: the input of each layer, 2 h L, and
    26 h + 16 i inside the layer that is recomputed; without checkpointing L (20 h + 8 i), grouped-query keys and values left out;
    without gradients 8 h + 8 i. Adapters that compute in float32 add 12 h + 4 i.
    """
    scale = dtype_bytes / 2
    adapter = 12 * hidden + 4 * intermediate if float32_adapter else 0
    without_gradients = embedding * (8 * hidden + 8 * intermediate) * scale
    if checkpointing:
        inside = micro_batch * ((26 * hidden + 16 * intermediate) * scale + adapter)
        return max(kept * 2 * hidden * layers * scale + inside, without_gradients)
    return max(kept * layers * ((20 * hidden + 8 * intermediate) * scale + adapter), without_gradients)


@dataclass(frozen=True)
class MemoryNeed:
    """What a rank's memory must hold of a run, whatever the group."""

    counts: ParameterCounts
    dtype_bytes: int
    activations: float
    """Bytes, from `activation_bytes`."""
    dequantised: float = 0.0
    """Bytes of the largest 4-bit weight once it is unpacked."""


def memory_need(config: RunConfig, counts: ParameterCounts, hidden: int, intermediate: int, layers: int) -> MemoryNeed:
    """The need of a run whose decoder has this shape."""
    training, model = config.training, config.model
    dtype_bytes = {"float64": 8, "float32": 4, "bfloat16": 2}[model.dtype]
    kept = max(training.max_kept_tokens or 0, training.max_tokens_per_micro_batch)
    activations = activation_bytes(
        hidden,
        intermediate,
        layers,
        micro_batch=training.max_tokens_per_micro_batch,
        kept=0 if training.offload_activations and model.gradient_checkpointing else kept,
        embedding=training.max_tokens_per_embedding_batch,
        dtype_bytes=dtype_bytes,
        checkpointing=model.gradient_checkpointing,
        float32_adapter=model.lora is not None and model.lora.compute == "float32",
    )
    return MemoryNeed(counts, dtype_bytes, activations, dtype_bytes * hidden * intermediate if counts.quantised else 0.0)


def needed_bytes(need: MemoryNeed, world: int, shard_group: int) -> float:
    """Bytes a rank needs in a group of `shard_group` of `world` GPUs: a replica (ZeRO-2) for 1, else ZeRO-3."""
    counts, dtype_bytes = need.counts, need.dtype_bytes
    stage = 2 if shard_group == 1 else 3
    static = sum(static_bytes(counts, dtype_bytes, world, stage, shard_group).values())
    live = min(LIVE_ELEMENTS * dtype_bytes, _gathered_in_passes(counts, dtype_bytes))
    # A frozen table of embeddings that is larger than what may be live is gathered alone.
    gathered = max(live, counts.frozen * dtype_bytes) if stage == 3 else 0.0
    return (static + gathered + BUCKET_BYTES + need.dequantised + need.activations) * ALLOCATOR + CONTEXT_BYTES


def smallest_shard_group(need: MemoryNeed, world: int, gpus_per_node: int, memory_bytes: float) -> int:
    """The first of 1, 2, 4, ..., `gpus_per_node`, `world` that divides `world`, stays inside a node and fits `memory_bytes`.

    A smaller group gathers over faster links, and 1 gathers nothing. Raises ConfigError with the need when none fits.
    """
    for group in sorted({1, world, *(g for g in _group_sizes(gpus_per_node) if g < world and world % g == 0)}):
        if needed_bytes(need, world, group) <= memory_bytes * (1 - RESERVE):
            return group
    least = needed_bytes(need, world, world) / 2**30
    rule = f"a GPU of {memory_bytes / 2**30:.1f} GiB would need {least:.1f} GiB even when all {world} share the weights"
    remedy = "Use more GPUs or lower training.max_tokens_per_micro_batch."
    raise ConfigError(describe("training.shard_group", "auto", rule, remedy))


def _group_sizes(gpus_per_node: int) -> list[int]:
    """Powers of two that divide a node, and the node."""
    return [1 << k for k in range(gpus_per_node.bit_length()) if gpus_per_node % (1 << k) == 0] + [gpus_per_node]

"""Formulas: bytes of weights, adapters, optimiser states, activations and loss on one GPU, line by line; the group that fits.

No torch; parameter counts and shapes come in from outside. The trainer and the planner use the same functions. Sources: QLoRA
(2305.14314) for the 4-bit layout; ZeRO (1910.02054) for what is shared out; ZeRO++ (2306.10209) for the second copy inside a
group (hpZ); traces of full-size models under torch's fake tensors for activations (tests/planning/test_trace.py repeats one).
"""

from dataclasses import dataclass, field

from hybrid_scale.config import ModelSettings, RunConfig
from hybrid_scale.errors import ConfigError, describe
from hybrid_scale.planning.architecture import Architecture
from hybrid_scale.planning.zero import Zero, ZeroBuffers

NF4_BYTES = 0.5
NF4_STATE_BYTES = 1 / 64 + 4 / (64 * 256)
"""Quantisation state of a 4-bit weight, double quantisation: one byte a block of 64, one float32 a 256 blocks.
bitsandbytes keeps it whole on every rank, ZeRO-3 doesn't share it out."""
ADAM_BYTES = 4 + 4
"""First and second moment of a trained weight, float32."""
GRADIENT_BYTES = 4
MASTER_BYTES = 4
DTYPE_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2}

STAGING_LINE = "staging of offloaded weights (bound)"
WEIGHTS = ("4-bit weights", "frozen weights")
CONTEXT_BYTES = 1.3e9
"""CUDA context and NCCL buffers of a process: assumed; with it PEFT's published peaks of a 70B are met (benchmarks/plan.py)."""
ALLOCATOR = 1.12
"""Reserved over allocated bytes of torch's allocator: 10.22 / 9.16 GiB in answer.ai's QLoRA benchmark (2024)."""
RESERVE = 0.03
"""Share of a GPU's memory that a plan leaves free."""
STAGING = 0.27
"""Of a rank's offloaded weights, held on the GPU on their way: the two published runs with offload (FSDP, 70B in 4 bits) needed
.05 and .26 of them more than all other lines, so that this bounds both. DeepSpeed's own staging isn't published."""


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


def count(architecture: Architecture, settings: ModelSettings) -> ParameterCounts:
    """Weights of an embedder by how they are held. Raises ModelError: an unknown LoRA target."""
    if settings.lora is None:
        return ParameterCounts(0, 0, architecture.encoder)
    quantised = architecture.linear if settings.quantization == "nf4" else 0
    adapters = architecture.lora(settings.lora.rank, settings.lora.targets)
    return ParameterCounts(quantised, architecture.encoder - quantised, adapters)


def saved_bytes(a: Architecture, dtype_bytes: int = 2) -> float:
    """Bytes a token and layer that a backward pass reads, LoRA on all linear layers.

    Two norms: 2 h inputs in float32 and 2 h outputs. 4 a: queries, keys and values at full width and the output of
    attention. 4 i: gate, activation, up and their product. Four norms: 2 h more inputs in float32; norms of heads: theirs.
    Equal to the traced bytes of Llama 8B and 70B and Qwen3 8B and 32B but for 14 bytes a LoRA rank and 4 a head.
    """
    float32 = max(4, dtype_bytes)
    norms = 2 * a.hidden * (float32 + dtype_bytes) + float32 * a.hidden * (a.traits.norms - 2)
    norms += float32 * (a.attention_width + a.key_value_width) if a.traits.head_norms else 0
    return norms + 4 * dtype_bytes * (a.attention_width + a.intermediate)


def activation_bytes(
    a: Architecture,
    micro_batch: int,
    kept: int,
    embedding: int,
    dtype_bytes: int = 2,
    checkpointing: bool = True,
    float32_adapter: bool = False,
    dropout: bool = False,
) -> float:
    """Largest activations of a step, for tokens of a micro-batch with gradients, tokens whose graphs are kept, and tokens of a
    pass without gradients.

    With checkpointing 2 h L a kept token (the layers' inputs), and for each token of the micro-batch what the layer being
    recomputed saves, 4 h + 4 i of gradients in its backward (4 h more where there are four norms). Without: L x `saved_bytes`
    and 28 h. Without gradients 8 h + 8 i. Adapters in float32 and LoRA dropout add what `_adapter_extra` says. Traced at 2,048 to
    32,768 tokens (Llama 2 7B, Llama 3.1 8B and 70B, Qwen2.5 7B, Qwen3 8B and 32B), within 1 %; Gemma 3 27B 0.1 %, 1B +9 %.
    Attention is a fused kernel: eager attention (Gemma 2's soft cap) adds length^2 terms that aren't here.
    """
    h, i, scale = a.hidden, a.intermediate, dtype_bytes / 2
    without_gradients = embedding * (8 * h + 8 * i) * scale
    saved = saved_bytes(a, dtype_bytes)
    extra = _adapter_extra(a, checkpointing, float32_adapter and dtype_bytes < 4, dropout) * scale
    if checkpointing:
        inside = saved + (4 * h + 4 * i + 2 * h * (a.traits.norms - 2)) * scale + extra
        return max(kept * 2 * h * a.layers * scale + micro_batch * inside, without_gradients)
    return max(kept * a.layers * (saved + extra) + micro_batch * 28 * h * scale, without_gradients)


def _adapter_extra(architecture: Architecture, checkpointing: bool, float32: bool, dropout: bool) -> float:
    """Bytes a token (and layer, without checkpointing) for casts to float32 and dropped inputs, from the same traces."""
    h, i, a = architecture.hidden, architecture.intermediate, architecture.attention_width
    if not float32 and not dropout:
        return 0
    if not checkpointing:
        return 36 * h + 8 * a + 6 * i if float32 and dropout else 16 * h + 4 * a + 2 * i
    if float32 and dropout:
        return 48 * h + 8 * a + 8 * i
    return 26 * h + 4 * a + 2 * i if float32 else 24 * h + 4 * a


def loss_bytes(texts: int, columns: int, rows: int, size: int, max_logits: int, exchange_bytes: int) -> dict[str, float]:
    """Bytes of the loss on one rank, by line: the batch's embeddings gathered with their gradients, and the scores.

    As the docstring of `train.loss.contrastive_loss` counts them: R D gradients, 2 C D copies of a pool, 3 r D queries,
    `max_logits` scores of float32 and their mask of a byte; R D embeddings in the type in which they are exchanged.
    """
    chunk = min(rows, max(1, max_logits // max(1, columns)))
    return {
        "gathered embeddings": texts * size * (exchange_bytes + 4.0),
        "loss": 4.0 * size * (2 * columns + 3 * chunk) + 5.0 * max(chunk * columns, 1),
    }


@dataclass(frozen=True)
class MemoryNeed:
    """What a rank's memory must hold of a run, whatever the group."""

    counts: ParameterCounts
    dtype_bytes: int
    activations: float
    """Bytes, from `activation_bytes`."""
    dequantised: float = 0.0
    """Bytes of the largest 4-bit weight once it is unpacked."""
    loss: dict[str, float] = field(default_factory=dict)
    """Bytes by line, from `loss_bytes`; what of it outlives the activations is counted beside them."""
    buffers: ZeroBuffers = field(default_factory=ZeroBuffers)
    table: int = 0
    """Weights of the embedding table, which is gathered whole; 0: those frozen beside 4-bit ones."""
    offloads_weights: bool = False
    offloads_optimizer: bool = False
    host_activations: float = 0.0
    """Bytes that kept graphs save in host memory."""


def memory_need(
    config: RunConfig, counts: ParameterCounts, a: Architecture, world: int = 1, zero: Zero | None = None
) -> MemoryNeed:
    """The need of a run whose decoder has this shape, on `world` ranks.

    Graphs whose saved tensors are offloaded leave the GPU; those of a micro-batch that is embedded twice stay.
    """
    training, model = config.training, config.model
    dtype_bytes = DTYPE_BYTES[model.dtype]
    zero, kept = zero or Zero(None, None), max(training.max_kept_tokens or 0, training.max_tokens_per_micro_batch)
    activations = activation_bytes(
        a,
        micro_batch=training.max_tokens_per_micro_batch,
        kept=training.max_tokens_per_micro_batch if training.offload_activations else kept,
        embedding=training.max_tokens_per_embedding_batch,
        dtype_bytes=dtype_bytes,
        checkpointing=model.gradient_checkpointing,
        float32_adapter=model.lora is not None and model.lora.compute == "float32",
        dropout=model.lora is not None and model.lora.dropout > 0,
    )
    batch, negatives = config.sampler.global_batch, config.sampler.hard_negatives
    loss = loss_bytes(
        texts=batch * (2 + negatives),
        columns=batch * (1 + negatives),
        rows=-(-batch // world),
        size=a.hidden,
        max_logits=config.loss.max_logits,
        exchange_bytes=DTYPE_BYTES[config.loss.exchange],
    )
    dequantised = dtype_bytes * a.largest_linear if counts.quantised else 0.0
    return MemoryNeed(
        *(counts, dtype_bytes, activations, dequantised, loss, zero.buffers, a.embedding),
        *(zero.offloads_weights, zero.offloads_optimizer),
        kept * saved_by_token(config, a) if training.offload_activations else 0.0,
    )


def saved_by_token(config: RunConfig, a: Architecture) -> float:
    """Bytes that the graph of a token holds: with checkpointing the inputs of the layers, else all that they save."""
    model, dtype_bytes = config.model, DTYPE_BYTES[config.model.dtype]
    if model.gradient_checkpointing:
        return dtype_bytes * a.hidden * a.layers
    float32 = model.lora is not None and model.lora.compute == "float32" and dtype_bytes < 4
    dropout = model.lora is not None and model.lora.dropout > 0
    return a.layers * (saved_bytes(a, dtype_bytes) + _adapter_extra(a, False, float32, dropout) * dtype_bytes / 2)


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
            lines["second copy, over the shard group"] = gathered_bytes(counts, dtype_bytes) / shard_group
    return lines


def offloaded_bytes(need: MemoryNeed, world: int, stage: int) -> dict[str, float]:
    """Of the lines of `static_bytes`, what lies in host memory instead. Adapters stay: DeepSpeed keeps small tensors on the GPU.

    `offload_param` takes a rank's shares of the weights (stage 3), `offload_optimizer` its gradients, float32 masters and
    Adam's moments (stages 1 to 3). Quantisation states, which ZeRO doesn't know, stay.
    """
    counts, lines = need.counts, static_bytes(need.counts, need.dtype_bytes, world, stage)
    states = world if stage >= 1 else 1
    weights = {"4-bit weights": lines["4-bit weights"], "frozen weights": lines["frozen weights"]}
    weights["trained weights"] = (counts.trained - counts.adapter) * MASTER_BYTES / world
    found = weights if need.offloads_weights and stage == 3 else {}
    if need.offloads_optimizer and stage >= 1:
        masters = found.get("trained weights", 0.0) + counts.trained * MASTER_BYTES / states
        found = found | {"trained weights": masters, "gradients": lines["gradients"], "Adam moments": lines["Adam moments"]}
    return {name: size for name, size in found.items() if size}


def host_lines(need: MemoryNeed, world: int, stage: int) -> dict[str, float]:
    """Bytes of host memory of one rank by line: what is offloaded."""
    found = offloaded_bytes(need, world, stage) | {"saved by kept graphs": need.host_activations}
    return {name: size for name, size in found.items() if size}


def gathered_bytes(counts: ParameterCounts, dtype_bytes: int) -> float:
    """Bytes of all weights that ZeRO-3 gathers anew in each pass: all but the adapters."""
    return counts.quantised * NF4_BYTES + counts.frozen * dtype_bytes + (counts.trained - counts.adapter) * MASTER_BYTES


def memory_lines(need: MemoryNeed, world: int, stage: int, shard_group: int | None = None) -> dict[str, float]:
    """Bytes of one rank by line; they add up to the peak that nvidia-smi would show.

    A table of embeddings that is larger than what may be live is gathered alone, so its surplus is a line of its own.
    """
    counts, dtype_bytes, buffers = need.counts, need.dtype_bytes, need.buffers
    lines = static_bytes(counts, dtype_bytes, world, stage, shard_group)
    gone = offloaded_bytes(need, world, stage)
    lines = {name: size - gone.get(name, 0.0) for name, size in lines.items()}
    if need.offloads_weights and stage == 3:
        lines[STAGING_LINE] = STAGING * sum(gone.get(name, 0.0) for name in WEIGHTS)
    if stage == 3 and (world > 1 or need.offloads_weights):
        gathered = gathered_bytes(counts, dtype_bytes)
        live = min(buffers.live * dtype_bytes, gathered)
        prefetch = min(buffers.prefetch * dtype_bytes, gathered - live)
        lines["ZeRO-3 live weights"] = live
        lines["ZeRO-3 prefetch"] = prefetch
        table = need.table or (counts.frozen if counts.quantised else 0)
        lines["embedding table, gathered alone"] = max(0.0, table * dtype_bytes - live - prefetch)
    lines["gradient buckets"] = 2 * buffers.reduce * 4
    lines["dequantised weight"] = need.dequantised
    lines["activations"] = need.activations
    lines |= need.loss
    lines["allocator (reserved over allocated)"] = sum(lines.values()) * (ALLOCATOR - 1)
    lines["CUDA and NCCL"] = CONTEXT_BYTES
    return {name: size for name, size in lines.items() if size > 0.5}


def needed_bytes(need: MemoryNeed, world: int, shard_group: int) -> float:
    """Bytes a rank needs in a group of `shard_group` of `world` GPUs: a replica (ZeRO-2) for 1, else ZeRO-3."""
    return sum(memory_lines(need, world, 2 if shard_group == 1 else 3, shard_group).values())


def smallest_shard_group(need: MemoryNeed, world: int, gpus_per_node: int, memory_bytes: float) -> int:
    """The first of 1, 2, 4, ..., `gpus_per_node`, `world` that divides `world`, stays inside a node and fits `memory_bytes`.

    A smaller group gathers over faster links, and 1 gathers nothing. Raises ConfigError with the need when none fits.
    """
    for group in shard_groups(world, gpus_per_node):
        if needed_bytes(need, world, group) <= memory_bytes * (1 - RESERVE):
            return group
    least = min(needed_bytes(need, world, group) for group in shard_groups(world, gpus_per_node)) / 2**30
    rule = f"a GPU of {memory_bytes / 2**30:.1f} GiB would need {least:.1f} GiB even when all {world} share the weights"
    remedy = "Use more GPUs or lower training.max_tokens_per_micro_batch."
    raise ConfigError(describe("training.shard_group", "auto", rule, remedy))


def shard_groups(world: int, gpus_per_node: int) -> list[int]:
    """Groups worth trying, smallest first: powers of two that divide a node, the node, the world."""
    node = [1 << k for k in range(gpus_per_node.bit_length()) if gpus_per_node % (1 << k) == 0] + [gpus_per_node]
    return sorted({1, world, *(group for group in node if group < world and world % group == 0)})

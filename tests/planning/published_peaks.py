"""Published memory peaks, and what our formulas say of the same runs. Used by tests and benchmarks/plan.py.

Every row names its source. `statistic` says what was read: `device` (nvidia-smi: our line for context and allocator), `reserved`
(torch's reserved: allocator, no context), `allocated` (torch's allocated: neither). Rows of language models have a head whose
logits compete with the layers for the peak. What the sources don't state is said in `note`. Left out: rows whose text length
isn't published (ms-swift's 16 GiB for Qwen2.5-7B).
"""

from dataclasses import dataclass, replace
from typing import Literal

from hybrid_scale.planning.architecture import KNOWN, Architecture
from hybrid_scale.planning.costs import (
    ALLOCATOR,
    CONTEXT_BYTES,
    MemoryNeed,
    ParameterCounts,
    activation_bytes,
    memory_lines,
)
from hybrid_scale.planning.zero import ZeroBuffers

PEFT_Z3 = "huggingface/peft docs/source/accelerate/deepspeed.md"
PEFT_FSDP = "huggingface/peft docs/source/accelerate/fsdp.md"
TUNE = "pytorch/torchtune README.md, September 2024"
ANSWER = "AnswerDotAI/fsdp_qlora benchmarks_03_2024.md"
LITGPT = "Lightning-AI/litgpt tutorials/resource-tables.md (code of October 2023)"
QWEN = "QwenLM/Qwen README.md, profiling of memory and speed"
LOGIT_BYTES = 2 + 4 * 4
"""A token and word of the vocabulary in transformers before 4.45: logits, their float32 copy, the shifted copy, log-probabilities
and their gradient."""
FSDP_LAYERS = 2
"""Whole at once under FSDP: the layer at work and the one prefetched."""
ATTENTION_AND_MLP = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Peak:
    """One published peak of one GPU."""

    title: str
    model: str | Architecture
    measured: float
    """Bytes."""
    statistic: Literal["device", "reserved", "allocated"]
    source: str
    tokens: int
    """Of a micro-batch."""
    world: int = 1
    sharded: Literal["", "zero3", "fsdp"] = ""
    quantised: bool = True
    rank: int = 8
    targets: tuple[str, ...] = ATTENTION_AND_MLP
    checkpointing: bool = True
    dropout: bool = False
    float32_adapter: bool = False
    adapter_bytes: int = 16
    """A trained weight with gradient and Adam's states."""
    logit_bytes: int = LOGIT_BYTES
    """2: torchtune's chunked and compiled loss; 4: lit-gpt's chunks, with log-probabilities."""
    keeps_inputs: bool = False
    """bitsandbytes before 0.42 saved the input of every 4-bit layer for the backward."""
    double: bool = True
    offloaded: bool = False
    note: str = ""

    @property
    def architecture(self) -> Architecture:
        return KNOWN[self.model] if isinstance(self.model, str) else self.model


def predicted_peak(row: Peak) -> float:
    """Bytes, by the functions that plan our own runs."""
    a = row.architecture
    quantised = a.linear if row.quantised else 0
    adapters = a.lora(row.rank, row.targets)
    activations = activation_bytes(
        a, row.tokens, row.tokens, 0, 2, row.checkpointing, row.float32_adapter, row.dropout and row.checkpointing
    )
    logits = row.tokens * row.logit_bytes * a.vocabulary
    if row.checkpointing:
        activations = max(activations, row.tokens * 2 * a.hidden * a.layers + logits)
    else:
        activations += logits
    if row.keeps_inputs:
        activations += row.tokens * a.layers * 2 * (3 * a.hidden + a.intermediate)
    need = MemoryNeed(
        ParameterCounts(quantised, a.total - quantised, 0),
        2,
        activations + adapters * row.adapter_bytes / (row.world if row.sharded else 1),
        2.0 * a.largest_linear if quantised else 0.0,
        buffers=_buffers(row),
        table=a.embedding,
        offloads_weights=row.offloaded,
    )
    stage = 3 if row.sharded else 0
    lines = memory_lines(need, row.world, stage)
    if quantised and not row.double:
        lines["quantisation state (replicated)"] = quantised * 4 / 64
    return _as_read(lines, row)


def _buffers(row: Peak) -> ZeroBuffers:
    """DeepSpeed's defaults, which the published runs had; FSDP holds two layers."""
    if row.sharded == "zero3":
        return ZeroBuffers(live=1e9, prefetch=5e7, reduce=5e8 / 4)  # reduce: 5e8 elements of 2 bytes, once
    layer = row.architecture.linear / row.architecture.layers * (0.25 if row.quantised else 1)
    return ZeroBuffers(live=FSDP_LAYERS * layer, prefetch=0, reduce=0)


def _as_read(lines: dict[str, float], row: Peak) -> float:
    allocated = sum(size for name, size in lines.items() if name not in ("allocator (reserved over allocated)", "CUDA and NCCL"))
    factor = {"device": ALLOCATOR, "reserved": ALLOCATOR, "allocated": 1.0}[row.statistic]
    return allocated * factor + (CONTEXT_BYTES if row.statistic == "device" else 0)


def _qwen(name: str, layers: int, hidden: int, heads: int, intermediate: int) -> Architecture:
    """Qwen (1): a head of its own and as many key-value heads as heads."""
    return replace(
        KNOWN["llama-2-7b"],
        name=name,
        layers=layers,
        hidden=hidden,
        heads=heads,
        key_value_heads=heads,
        intermediate=intermediate,
        vocabulary=151936,
    )


QWEN_7B, QWEN_14B = _qwen("Qwen-7B", 32, 4096, 32, 11008), _qwen("Qwen-14B", 40, 5120, 40, 13696)
QWEN_72B = _qwen("Qwen-72B", 80, 8192, 64, 24576)
LENGTHS = (256, 512, 1024, 2048, 4096, 8192)
GB, GIB = 1e9, 2.0**30
PEAKS = (
    Peak(
        "Llama-2-70B QLoRA ZeRO-3, 2 x 40 GB, 2 x 2048",
        "llama-2-70b",
        36.6 * GB,
        "device",
        PEFT_Z3,
        4096,
        2,
        "zero3",
        dropout=True,
    ),
    Peak(
        "Llama-2-70B QLoRA FSDP, 2 GPUs, 2 x 2048", "llama-2-70b", 35.6 * GB, "device", PEFT_FSDP, 4096, 2, "fsdp", dropout=True
    ),
    Peak(
        *("Llama-2-70B LoRA ZeRO-3, 8 x H100, 8 x 2048", "llama-2-70b", 64 * GB, "device", PEFT_Z3, 16384, 8, "zero3"),
        quantised=False,
        dropout=True,
    ),
    Peak(
        *("Llama-3.1-70B LoRA FSDP2, 8 x A100, 2 x 2048", "llama-3.1-70b", 27.6 * GIB, "allocated", TUNE, 4096, 8, "fsdp"),
        quantised=False,
        rank=16,
        targets=tuple(name for name in ATTENTION_AND_MLP if name != "k_proj"),
        adapter_bytes=8,
        logit_bytes=2,
        note="compiled; the gathered table and head of the root group aren't counted",
    ),
    Peak(
        *("Llama-3.1-8B QLoRA, 4090, 2 x 2048", "llama-3.1-8b", 7.4 * GIB, "allocated", TUNE, 4096),
        adapter_bytes=8,
        logit_bytes=2,
        note="compiled",
    ),
    *(
        Peak(
            *(
                f"Llama-2-7B QLoRA FSDP, 2 x 3090, {batch} x 2048",
                "llama-2-7b",
                gib * GIB,
                "reserved",
                ANSWER,
                batch * 2048,
                2,
                "fsdp",
            ),
            rank=64,
            adapter_bytes=8,
        )
        for batch, gib in ((1, 5.21), (4, 11.22), (10, 20.97))
    ),
    Peak("Llama-2-7B QLoRA DDP, 3090, 8 x 2048", "llama-2-7b", 20.94 * GIB, "reserved", ANSWER, 16384, rank=64, adapter_bytes=8),
    *(
        Peak(
            *(
                f"Llama-2-{size} LoRA {kind}, A100-40, {batch} x 1304",
                f"llama-2-{size}",
                gb * GB,
                "allocated",
                LITGPT,
                batch * 1304,
            ),
            quantised=kind != "bf16",
            double=kind == "nf4-dq",
            targets=("q_proj", "v_proj"),
            checkpointing=False,
            keeps_inputs=kind != "bf16",
            logit_bytes=4,
            adapter_bytes=8,
        )
        for size, kind, batch, gb in (
            ("7b", "nf4-dq", 1, 13.84),
            ("7b", "nf4", 1, 14.14),
            ("7b", "bf16", 1, 21.30),
            ("7b", "bf16", 2, 29.07),
            ("13b", "nf4-dq", 1, 22.55),
            ("13b", "nf4", 1, 23.14),
            ("13b", "bf16", 1, 38.12),
        )
    ),
    *(
        Peak(
            *(
                f"{a.name} LoRA{' ZeRO-3' if world > 1 else ''}, {world} x A100-80, 1 x {n}",
                a,
                gb / world * GB,
                "device",
                QWEN,
                n,
            ),
            *(world, "zero3" if world > 1 else "", False, 64),
            note="how it was read isn't stated",
        )
        for a, world, peaks in (
            (QWEN_7B, 1, (20.1, 20.4, 21.5, 23.8, 29.7, 36.6)),
            (QWEN_14B, 1, (34.6, 35.1, 35.3, 37.4, 42.5, 55.2)),
            (QWEN_72B, 4, (215.4, 217.7, 222.6, 228.8, 249.0, 289.2)),
        )
        for n, gb in zip(LENGTHS, peaks, strict=True)
    ),
    Peak(
        *(
            "Llama-2-70B QLoRA FSDP + CPU offload, 2 x 24 GB, 2 x 2048",
            "llama-2-70b",
            19.6 * GB,
            "device",
            PEFT_FSDP,
            4096,
            2,
            "fsdp",
        ),
        dropout=True,
        offloaded=True,
        note="staging isn't documented: the prediction is a bound",
    ),
    Peak(
        *(
            "Llama-2-70B QLoRA FSDP + CPU offload, 2 GPUs, 2 x 2048",
            "llama-2-70b",
            14.92 * GIB,
            "reserved",
            ANSWER,
            4096,
            2,
            "fsdp",
        ),
        rank=64,
        adapter_bytes=8,
        offloaded=True,
        note="the same",
    ),
)

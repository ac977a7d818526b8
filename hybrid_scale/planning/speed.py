"""Formulas: operations of a step, bytes between GPUs, and the seconds both take on a given cluster. Knows no config.

A step is compute, weights gathered beside it (ZeRO-3 with a valid prefetch order hides the shorter of the two), and exchanges
that wait for both. Shares of the data sheets' rates are calibrated on the published runs in
tests/planning/published_times.py; either half of those predicts the other within 11 % (median). Nothing else is fitted.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from hybrid_scale.planning.architecture import Architecture
from hybrid_scale.planning.hardware import Cluster

NF4_UNPACK_BYTES = 2.5
"""Memory traffic of unpacking a 4-bit weight: half a byte read, two written."""
MEMORY_SHARE = 0.75
"""Of a GPU memory's bandwidth that unpacking reaches: assumed. 146 tokens' worth of compute on an A100, 170 on an H100."""
BETWEEN_SHARE = 0.85
"""Of a port's bandwidth between nodes that NCCL reaches: 22 of 25 GB/s are usual for one HDR port; assumed."""

HOST_SHARE = 0.6
"""Of PCIe's one-way rate that copies to and from pinned host memory reach: 20 of 32 GB/s; assumed."""
CPU_UPDATES = 1e8
"""Weights a second that torch's AdamW updates on a rank's CPU cores, where the optimiser is offloaded; assumed."""


@dataclass(frozen=True)
class Calibration:
    """Shares of the data sheets' rates that training reaches."""

    utilisation: Mapping[str, float] = field(default_factory=lambda: {"A100": 0.515, "H100": 0.345, "GeForce Ada": 0.615})
    """Of the dense bfloat16 rate, by GPU generation (`benchmarks/plan.py`)."""
    other: float = 0.45
    """Of a generation without a published run."""
    link: float = 0.32
    """Of NVLink's or PCIe's one-way bandwidth, for gathers."""

    def rate(self, cluster: Cluster) -> float:
        """Operations a second of one GPU."""
        return cluster.gpu.flops * self.utilisation.get(cluster.gpu.generation, self.other)


CALIBRATION = Calibration()


def step_flops(
    linear: float,
    adapters: float,
    attention: float,
    tokens: float,
    twice: float = 0.0,
    checkpointing: bool = True,
    frozen: bool = True,
) -> float:
    """Operations of one step on one rank.

    A token: forward 2 P, gradients of activations 2 P, of weights 2 P unless they are frozen; checkpointing forwards again, and
    a token embedded `twice` (cached gradients) once more without gradient. Adapters the same with their own gradients;
    attention's products 2 forward + 4 backward of what `attention_flops` says is 2. Agrees with torch's FlopCounterMode on a
    70B to .1 % (tests/planning/test_trace.py); 2 P a multiply-add: 2001.08361.
    """
    again = 1 if checkpointing else 0
    base = 2 * linear * (2 + again + (0 if frozen else 1))
    lora = 2 * adapters * (3 + again)
    return tokens * (base + lora + attention * (3 + again)) + twice * (2 * linear + 2 * adapters + attention)


def attention_flops(architecture: Architecture, length: float, causal: bool) -> float:
    """Operations a token of scores and values, forward, in texts of `length` tokens: 4 n x width x layers, causal half of it."""
    return (2.0 if causal else 4.0) * length * architecture.attention_width * architecture.layers


@dataclass(frozen=True)
class Work:
    """What one rank does in one step."""

    flops: float
    dequantised: float = 0.0
    """4-bit weights unpacked, all passes together."""
    gathered: float = 0.0
    """Bytes of the weights of all passes as they are gathered, before a rank's own share is taken off."""
    group: int = 1
    """GPUs that share a copy of these weights."""
    exchanged: float = 0.0
    """Bytes that all ranks exchange: gradients of adapters, adapters, embeddings and their gradients."""
    fetched: float = 0.0
    """Bytes of offloaded weights from host memory, for all passes, copied beside the computing."""
    swapped: float = 0.0
    """Bytes to and from host memory that the computing waits for: what kept graphs save, gradients, updated weights."""
    updated: float = 0.0
    """Weights that the CPU updates."""


@dataclass(frozen=True)
class Seconds:
    """One step, and what crosses links for it, a GPU."""

    compute: float
    gather: float
    exchange: float
    node_bytes: float
    """Over NVLink or PCIe, a GPU."""
    between_bytes: float
    """Over the interconnect, a node."""
    host: float = 0.0
    """Waiting for host memory and the CPU's optimiser."""
    host_bytes: float = 0.0
    """Between host memory and a GPU."""

    @property
    def total(self) -> float:
        return max(self.compute, self.gather) + self.exchange + self.host


def step_seconds(work: Work, cluster: Cluster, calibration: Calibration = CALIBRATION) -> Seconds:
    """Seconds of a step.

    Gathers are rings (NCCL): each GPU receives (1 - 1/group) of the bytes, each node that holds a part of the group
    (1 - 1/nodes) of them over all its ports. Offloaded weights come over PCIe before they are gathered.
    """
    pcie = cluster.gpu.host * HOST_SHARE
    compute = work.flops / calibration.rate(cluster)
    compute += work.dequantised * NF4_UNPACK_BYTES / (cluster.gpu.bandwidth * MEMORY_SHARE)
    gather, node, between = _ring(work.gathered, work.group, cluster, calibration)
    exchange, node_too, between_too = _ring(work.exchanged, cluster.world, cluster, calibration)
    host = work.swapped / pcie + work.updated / CPU_UPDATES
    moved = work.fetched + work.swapped
    return Seconds(compute, gather + work.fetched / pcie, exchange, node + node_too, between + between_too, host, moved)


def _ring(size: float, group: int, cluster: Cluster, calibration: Calibration) -> tuple[float, float, float]:
    """Seconds, bytes into a GPU, bytes into a node, where `group` GPUs gather `size` bytes."""
    nodes = max(1, group // cluster.gpus_per_node)
    inside = size * (1 - 1 / group)
    between = size * (1 - 1 / nodes)
    seconds = max(inside / (cluster.gpu.link * calibration.link), between / (cluster.node_bandwidth * BETWEEN_SHARE))
    return seconds, inside, between

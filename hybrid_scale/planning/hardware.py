"""GPUs and the links between them: what a planner needs to know of a cluster, by name. Knows no model and no run.

Memory: total in nvidia-smi. Rates: dense bfloat16 with float32 sums, bandwidths: the makers' data sheets. What of them a run
gets is `speed.Calibration`. No price is built in: clouds differ by a factor of three; `price` is a parameter.
"""

import math
import re
from dataclasses import dataclass, replace

from hybrid_scale.errors import ConfigError, describe, nearest


@dataclass(frozen=True)
class Gpu:
    name: str
    memory: float
    """Bytes."""
    flops: float
    """Dense bfloat16 operations a second, peak."""
    bandwidth: float
    """Of its own memory, bytes a second."""
    link: float
    """To the other GPUs of its node, bytes a second in one direction: NVLink, or PCIe where there is none."""
    host: float
    """To host memory, bytes a second in one direction: PCIe."""
    generation: str
    """Utilisation is calibrated by generation (`speed.Calibration`)."""


def _gpu(name: str, mib: int, tflops: float, memory: float, link: float, host: float, generation: str) -> Gpu:
    return Gpu(name, mib * 2.0**20, tflops * 1e12, memory * 1e9, link * 1e9, host * 1e9, generation)


GPUS = {
    gpu.name: gpu
    for gpu in (
        _gpu("a100-40", 40960, 312, 1555, 300, 32, "A100"),
        _gpu("a100-80", 81920, 312, 2039, 300, 32, "A100"),
        _gpu("h100", 81559, 989, 3350, 450, 64, "H100"),
        _gpu("h200", 143771, 989, 4800, 450, 64, "H100"),
        _gpu("l40s", 46068, 362, 864, 32, 32, "L40S"),
        _gpu("a6000", 49140, 155, 768, 32, 32, "Ampere"),
        _gpu("4090", 24564, 165, 1008, 32, 32, "GeForce Ada"),
    )
}
ALIASES = {"a100": "a100-80", "a100-40gb": "a100-40", "a100-80gb": "a100-80", "h100-80": "h100", "rtx4090": "4090"}


@dataclass(frozen=True)
class Interconnect:
    """Between nodes."""

    name: str
    port: float
    """Bytes a second of one port, one direction."""
    port_a_gpu: bool
    """As many ports in a node as GPUs, or one in all, where nothing else is said."""


INTERCONNECTS = {
    kind.name: kind
    for kind in (
        Interconnect("ib-xdr", 100e9, True),
        Interconnect("ib-ndr", 50e9, True),
        Interconnect("ib-hdr", 25e9, True),
        Interconnect("ib-edr", 12.5e9, False),
        Interconnect("roce-400", 50e9, True),
        Interconnect("roce-200", 25e9, True),
        Interconnect("roce-100", 12.5e9, False),
        Interconnect("ethernet-100", 12.5e9, False),
        Interconnect("ethernet-25", 3.125e9, False),
        Interconnect("ethernet-10", 1.25e9, False),
    )
}


@dataclass(frozen=True)
class Cluster:
    """The GPUs of one run."""

    gpu: Gpu
    nodes: int = 1
    gpus_per_node: int = 8
    interconnect: Interconnect = INTERCONNECTS["ib-ndr"]
    ports: int | None = None
    """Ports of a node; None: what the interconnect says."""
    price: float | None = None
    """Of a GPU-hour, in whatever currency."""

    @property
    def world(self) -> int:
        return self.nodes * self.gpus_per_node

    @property
    def node_bandwidth(self) -> float:
        """Bytes a second into a node, over all its ports."""
        ports = self.ports or (self.gpus_per_node if self.interconnect.port_a_gpu else 1)
        return ports * self.interconnect.port

    def __str__(self) -> str:
        nodes = f"{self.nodes} nodes x " if self.nodes > 1 else ""
        links = f", {self.interconnect.name}" if self.nodes > 1 else ""
        return f"{nodes}{self.gpus_per_node} x {self.gpu.name} ({self.gpu.memory / 2**30:.1f} GiB){links}"


def find_gpu(name: str, memory_gib: float | None = None) -> Gpu:
    """The table's row, with the memory if it is stated; one that isn't in the table needs it. Raises ConfigError."""
    key = ALIASES.get(name.lower(), name.lower())
    if memory_gib is not None and not (math.isfinite(memory_gib) and memory_gib > 0):
        raise ConfigError(describe("--gpu-memory", memory_gib, "must be a size above 0 in GiB"))
    if memory_gib is not None:
        return replace(GPUS.get(key) or of_device(name, 2.0**30), memory=memory_gib * 2**30)
    if key not in GPUS:
        remedy = f"Known: {', '.join(GPUS)}. For another state --gpu-memory GIB; an A100's rates are assumed for it."
        raise ConfigError(describe("--gpu", name, "no such GPU in the table", remedy))
    return GPUS[key]


def named_by_driver(device: str) -> Gpu | None:
    """`NVIDIA A100-SXM4-80GB` -> the table's a100-80; None: not in it."""
    words = re.findall(r"[a-z0-9]+", device.lower())
    short = next((word for word in words if word in {"a100", "h100", "h200", "l40s", "a6000", "4090"}), None)
    if short is None:
        return None
    return GPUS["a100-40" if short == "a100" and {"40gb", "40"} & set(words) else ALIASES.get(short, short)]


def of_device(device: str, memory: float) -> Gpu:
    """The GPU that a driver names so, with the bytes that it reports, in whole GiB (drivers differ by some MiB).

    One that isn't in the table gets an A100's rates and PCIe, and a generation of its own.
    """
    row = named_by_driver(device) or replace(GPUS["a100-80"], name=device, link=32e9, generation="unknown")
    return replace(row, memory=memory // 2**30 * 2.0**30 if memory >= 2**31 else memory)


def find_interconnect(name: str) -> Interconnect:
    """Raises ConfigError: not in the table."""
    if name.lower() not in INTERCONNECTS:
        raise ConfigError(describe("--interconnect", name, "no such interconnect in the table", nearest(name, INTERCONNECTS)))
    return INTERCONNECTS[name.lower()]


def make_cluster(
    gpu: str,
    nodes: int = 1,
    gpus_per_node: int = 8,
    interconnect: str = "ib-ndr",
    ports: int | None = None,
    price: float | None = None,
    gpu_memory_gib: float | None = None,
) -> Cluster:
    """A cluster by names. Raises ConfigError: unknown names, or counts and prices below what makes sense."""
    for key, value in (("--nodes", nodes), ("--gpus-per-node", gpus_per_node), ("--ports", 1 if ports is None else ports)):
        if value < 1:
            raise ConfigError(describe(key, value, "must be at least 1", "State how many there are."))
    if price is not None and not (math.isfinite(price) and price >= 0):
        raise ConfigError(describe("--price", price, "must be a number that is not negative", "State what a GPU-hour costs."))
    return Cluster(find_gpu(gpu, gpu_memory_gib), nodes, gpus_per_node, find_interconnect(interconnect), ports, price)

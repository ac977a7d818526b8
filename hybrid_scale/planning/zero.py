"""What a run's DeepSpeed JSON says of memory: ZeRO's stage, groups, sizes of buffers, what lies in host memory."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hybrid_scale.config import RunConfig
from hybrid_scale.errors import ConfigError, describe


@dataclass(frozen=True)
class ZeroBuffers:
    """Sizes of DeepSpeed's buffers in elements, as in ds_configs/."""

    live: float = 5e8
    """Gathered weights whole at once: `stage3_max_live_parameters`, elements of the stored type."""
    prefetch: float = 5e7
    """`stage3_prefetch_bucket_size`: by as much the last prefetch goes over `live` (counted: benchmarks/traffic.py)."""
    reduce: float = 2e7
    """`reduce_bucket_size`, float32, held twice for the overlap of filling and sending."""


@dataclass(frozen=True)
class Zero:
    """What a DeepSpeed JSON says."""

    stage: int | None
    """None: "auto"."""
    group: int | None
    """hpZ group; None: "auto" or none."""
    buffers: ZeroBuffers = field(default_factory=ZeroBuffers)
    offloads_weights: bool = False
    """`offload_param`: a rank's share of the weights lies in host memory (stage 3)."""
    offloads_optimizer: bool = False
    """`offload_optimizer`: so do gradients, float32 masters and Adam's moments, which the CPU updates."""


def read_zero(config: RunConfig) -> Zero:
    """What the run's DeepSpeed JSON says of memory. Raises ConfigError: no such file, not JSON."""
    if config.training.engine == "plain":
        return Zero(0, 1)
    path = Path(config.training.deepspeed)
    if not path.is_file():
        raise ConfigError(describe("training.deepspeed", str(path), "no such file", "Plan from the repository's root."))
    try:
        zero = json.loads(path.read_text(encoding="utf-8")).get("zero_optimization", {})
    except json.JSONDecodeError as error:
        raise ConfigError(describe(str(path), str(error), "not JSON")) from None
    sizes = ZeroBuffers(
        live=_number(zero, "stage3_max_live_parameters", 1e9),
        prefetch=_number(zero, "stage3_prefetch_bucket_size", 5e7),
        reduce=_number(zero, "reduce_bucket_size", 5e8),
    )
    stage, group = zero.get("stage", 0), zero.get("zero_hpz_partition_size", 1)
    stage, group = None if stage == "auto" else int(stage), None if group in ("auto", 1) else int(group)
    parameters, optimizer = (
        (zero.get(key) or {}).get("device", "none") != "none" for key in ("offload_param", "offload_optimizer")
    )
    return Zero(stage, group, sizes, parameters, optimizer)


def _number(zero: dict[str, Any], key: str, default: float) -> float:
    """A size, or DeepSpeed's default where the JSON is silent or says "auto"."""
    value = zero.get(key, default)
    return default if value == "auto" else float(value)

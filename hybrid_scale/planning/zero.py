"""A run's DeepSpeed JSON: where it lies, what may stand in it, and what it says of memory (stage, groups, buffers, offload).

Published files (Hugging Face's documentation, LLaMA-Factory, axolotl) leave values "auto" for a trainer to fill. Those that a
run knows are filled; every other one is refused by its key, and so is what the run's own config says.
"""

import json
from collections.abc import Iterator
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


CHECKOUT = Path(__file__).resolve().parents[2]
"""Where ds_configs/ lies."""

OWN = {
    "optimizer": "the optimizer is the run config's",
    "scheduler": "the schedule is the run config's",
    "train_batch_size": "the global batch is the run config's",
}
"""Sections of a DeepSpeed JSON that say what the run config says, and by which rule they are refused."""

PRECISION = ("bf16", "bfloat16", "fp16", "amp", "torch_autocast")
"""Sections that would change the types of a run; DeepSpeed's own engines accumulate gradients in them."""

BUCKETS = ("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold")

FILLED = (
    *("gradient_clipping", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size"),
    *("zero_optimization.stage", "zero_optimization.zero_hpz_partition_size"),
    *(f"zero_optimization.{key}" for key in BUCKETS),
    "zero_optimization.stage3_gather_16bit_weights_on_model_save",
)
"""Keys that may be "auto"."""


def bucket_sizes(hidden: int) -> dict[str, int]:
    """What stands for "auto" in the buckets of a model of this hidden size, in elements: the rule of transformers' trainer
    (`HfTrainerDeepSpeedConfig.trainer_config_finalize`).
    """
    return dict(zip(BUCKETS, (hidden * hidden, int(0.9 * hidden * hidden), 10 * hidden), strict=True))


def json_file(config: RunConfig) -> Path:
    """The DeepSpeed JSON of a run: relative to the working directory or, where there is none, to the checkout.

    Raises ConfigError: no such file.
    """
    stated = Path(config.training.deepspeed)
    for path in (stated, CHECKOUT / stated):
        if path.is_file():
            return path
    known = ", ".join(f"ds_configs/{path.name}" for path in sorted((CHECKOUT / "ds_configs").glob("*.json")))
    rule = f"no such file in {Path.cwd()} nor in {CHECKOUT}"
    raise ConfigError(describe("training.deepspeed", str(stated), rule, f"Shipped: {known}."))


def place(config: RunConfig) -> str:
    """In words, where the DeepSpeed JSON of a run was found. Raises ConfigError: see `json_file`."""
    path = json_file(config)
    if path == Path(config.training.deepspeed):
        return str(path)
    return f"{path} (that of the checkout: there is no {config.training.deepspeed} in the working directory)"


def read_json(config: RunConfig) -> dict[str, Any]:
    """The DeepSpeed JSON of a run: types of its own and a batch size left to the run are taken out, other "auto" are left.

    Raises ConfigError with file and line or key: no such file, not JSON, a key twice, no `zero_optimization`, a stage that
    isn't 1, 2 or 3, a section that says what the run config says, an "auto" that nobody fills.
    """
    path = json_file(config)
    settings = _parse(path)
    zero = settings.get("zero_optimization")
    if not isinstance(zero, dict):
        remedy = f'Write "zero_optimization": {{"stage": 3}}; {CHECKOUT / "ds_configs"} has whole files.'
        raise ConfigError(describe(f"{path}: zero_optimization", zero, "must be a section with ZeRO's stage", remedy))
    stage = zero.get("stage")
    if isinstance(stage, bool) or stage not in (1, 2, 3, "auto"):
        remedy = "A copy of everything on each rank is training.engine=plain." if stage in (None, 0) else ""
        raise ConfigError(describe(f"{path}: zero_optimization.stage", stage, 'must be 1, 2, 3 or "auto"', remedy))
    if settings.get("train_batch_size") == "auto":
        del settings["train_batch_size"]
    for key, rule in OWN.items():
        if key in settings:
            raise ConfigError(describe(f"{path}: {key}", settings[key], rule, f'Take "{key}" out of the file.'))
    _without_types(path, settings)
    for key, value in _leaves(settings):
        if value == "auto" and key not in FILLED:
            raise ConfigError(describe(f"{path}: {key}", "auto", "nobody fills this key here", "Write a value, or leave it out."))
    return settings


def _parse(path: Path) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        held = dict(pairs)
        if len(held) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise ConfigError(describe(str(path), twice, "the key stands twice in one section", "Keep one of them."))
        return held

    try:
        text = path.read_text(encoding="utf-8-sig")
        settings = json.loads(text, object_pairs_hook=once)
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        stray = error.object[error.start : error.end]
        raise ConfigError(describe(f"{path}:{line}", stray, "must be text in UTF-8", "Convert it.")) from None
    except json.JSONDecodeError as error:
        lines = text.splitlines() or [""]
        found = lines[min(error.lineno, len(lines)) - 1].strip()
        remedy = "Comments and a comma before } or ] aren't JSON."
        raise ConfigError(describe(f"{path}:{error.lineno}", found, f"must be JSON: {error.msg}", remedy)) from None
    if not isinstance(settings, dict):
        raise ConfigError(describe(f"{path}:1", settings, "must be a mapping, {...}, at the top"))
    return settings


def _without_types(path: Path, settings: dict[str, Any]) -> None:
    """Every section of PRECISION says "not enabled" from here on. Raises ConfigError where one is enabled."""
    for key in PRECISION:
        section = settings.pop(key, None)
        enabled = section.get("enabled", False) if isinstance(section, dict) else section
        if enabled not in (None, False, "auto"):
            rule = "the types of a run are model.dtype's, gradients and trained weights float32"
            raise ConfigError(describe(f"{path}: {key}.enabled", enabled, rule, 'Write false or "auto".'))
    settings |= {"bf16": {"enabled": False}, "fp16": {"enabled": False}}


def _leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if not isinstance(tree, dict):
        yield path, tree
        return
    for key, value in tree.items():
        yield from _leaves(value, f"{path}.{key}" if path else key)


def read_zero(config: RunConfig, hidden: int) -> Zero:
    """What the run's DeepSpeed JSON says of memory, for a model of this hidden size. Raises ConfigError: see `read_json`."""
    if config.training.engine == "plain":
        return Zero(0, 1)
    path, zero = json_file(config), read_json(config)["zero_optimization"]
    filled = bucket_sizes(hidden)

    def number(key: str, default: float) -> float:
        """A size, or DeepSpeed's default where the JSON is silent."""
        value = filled[key] if zero.get(key) == "auto" else zero.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError(describe(f"{path}: zero_optimization.{key}", value, "must be a number of elements"))
        return float(value)

    sizes = ZeroBuffers(
        live=number("stage3_max_live_parameters", 1e9),
        prefetch=number("stage3_prefetch_bucket_size", 5e7),
        reduce=number("reduce_bucket_size", 5e8),
    )
    stage, group = zero["stage"], zero.get("zero_hpz_partition_size", 1)
    if group != "auto" and (isinstance(group, bool) or not isinstance(group, int)):
        raise ConfigError(describe(f"{path}: zero_optimization.zero_hpz_partition_size", group, 'must be a number or "auto"'))
    stage, group = None if stage == "auto" else stage, None if group in ("auto", 1) else group
    parameters, optimizer = (_offloads(path, zero, key) for key in ("offload_param", "offload_optimizer"))
    return Zero(stage, group, sizes, parameters, optimizer)


def _offloads(path: Path, zero: dict[str, Any], key: str) -> bool:
    section = zero.get(key) or {}
    if not isinstance(section, dict):
        raise ConfigError(describe(f"{path}: zero_optimization.{key}", section, "must be a section with a device"))
    return (section.get("device") or "none") != "none"

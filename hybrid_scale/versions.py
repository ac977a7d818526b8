"""Names of other packages that aren't promised to stay, and the versions with which they were tried. One table.

Where one is absent a run is refused at its start, by name and with the version that has it; a version that wasn't tried, but has
every name, is warned of. The ranges are those of pyproject.toml (tests/test_versions.py).
"""

import importlib
import inspect
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from hybrid_scale.errors import RunError, describe

TRIED = {
    "torch": ("2.13", "2.14"),
    "accelerate": ("1.15", "1.16"),
    "transformers": ("5.23", "5.24"),
    "deepspeed": ("0.19.8", "0.20"),
    "peft": ("0.21", "0.22"),
    "bitsandbytes": ("0.50", "0.51"),
}
"""Package -> the oldest version tried, and the first that wasn't."""


@dataclass(frozen=True)
class Private:
    """A name that may go in any version of its package."""

    package: str
    name: str
    """`module:attribute`; `module:class@word` where the class's own source must name an attribute that instances get."""
    used_by: str
    breaks: str
    """What doesn't work without it."""
    since: str = ""
    """The oldest version in which it was seen; "": the oldest one tried."""


def _of(package: str, used_by: str, names: dict[str, str]) -> tuple[Private, ...]:
    return tuple(Private(package, name, used_by, breaks) for name, breaks in names.items())


_ZERO = "deepspeed.runtime.zero"
_STAGE3 = f"{_ZERO}.stage3:DeepSpeedZeroOptimizer_Stage3"
_STAGE2 = f"{_ZERO}.stage_1_and_2:DeepSpeedZeroOptimizer"
_INIT = f"{_ZERO}.partition_parameters:Init"
_OFFLOAD = f"{_ZERO}.parameter_offload:DeepSpeedZeRoOffload"
_COORDINATOR = f"{_ZERO}.partitioned_param_coordinator:PartitionedParameterCoordinator"

TABLE = (
    *_of(
        "torch",
        "dist.py",
        {
            "torch.distributed.distributed_c10d:_set_pg_timeout": "ranks give up while one works alone",
            "torch.distributed.distributed_c10d:_get_default_store": "pieces of work, errors and notes of ranks aren't passed on",
            "torch.distributed.distributed_c10d:_abort_process_group": "leaving NCCL after an error hangs",
            "torch.distributed.distributed_c10d:_world.pg_map": "DeepSpeed's groups keep a time-out of 10 minutes",
        },
    ),
    *_of(
        "torch",
        "model/nf4.py, model/stream.py, model/skeleton.py",
        {
            "torch.nn:Module@_parameters": "weights can't be put in their places",
            "torch.nn:Module@_buffers": "the same of buffers",
        },
    ),
    *_of(
        "accelerate",
        "train/engine.py",
        {
            "accelerate.tracking:LOGGER_TYPE_TO_CLASS": "trackers can't be checked before loading",
            "accelerate.tracking:get_available_trackers": "the same",
        },
    ),
    *_of(
        "transformers",
        "model/skeleton.py, model/embedder.py",
        {
            "transformers:PreTrainedModel._init_weights": "buffers of a streamed model aren't computed",
            "transformers:PreTrainedModel._keep_in_fp32_modules": "layers that stay in float32 aren't known",
            "transformers:PreTrainedModel._keep_in_fp32_modules_strict": "the same",
            "transformers.modeling_utils@_is_hf_initialized": "weights of a streamed model are drawn again",
            "transformers:PretrainedConfig._attn_implementation": "padded and packed texts aren't told apart",
            "transformers.modeling_utils:set_quantized_state": "a model can't be built without storage",
            "transformers.quantizers.base:HfQuantizer.get_modules_to_not_convert": "which layers stay out of 4 bits isn't known",
            "transformers.quantizers.base:get_keys_to_not_convert": "the same, when an export is merged",
            "transformers.integrations.bitsandbytes:replace_with_bnb_linear": "4-bit layers can't be put in place",
            "transformers.conversion_mapping:get_model_conversion_mapping": "weights under other names aren't noticed",
        },
    ),
    *_of(
        "deepspeed",
        "model/stream.py",
        {
            f"{_INIT}._convert_to_deepspeed_param": "a base model can't be streamed into its shares",
            f"{_INIT}._enable_mem_efficient_linear": "gathered weights stay in memory until the backward pass",
            f"{_INIT}@mem_efficient_linear": "the same",
            f"{_INIT}@local_device": "shares of a streamed model have no place",
            f"{_INIT}@remote_device": "the same",
            f"{_INIT}@pin_memory": "the same",
            f"{_INIT}@dp_world_size": "the same",
            f"{_INIT}@zero_param_process_group": "hpZ groups aren't filled",
            f"{_INIT}@num_ranks_in_param_group": "the same",
            f"{_INIT}@rank_in_group": "the same",
            f"{_ZERO}.partition_parameters:ZeroParamStatus.NOT_AVAILABLE": "a streamed weight isn't gathered",
            "deepspeed.runtime.swap_tensor.partitioned_param_swapper:PartitionedParamStatus.AVAILABLE": "the same",
            "deepspeed.ops:__compatible_ops__": "a start compiles an operator, and a killed build hangs the next start",
        },
    ),
    *_of(
        "deepspeed",
        "train/engine.py",
        {
            f"{_STAGE3}.clear_backward_seen_flag": "several backward passes a step overwrite each other",
            f"{_STAGE3}.get_param_id": "trained weights can't be gathered for a checkpoint",
            f"{_STAGE3}@grad_position": "the same",
            f"{_STAGE3}@fp32_partitioned_groups_flat": "the same",
            f"{_STAGE2}@single_partition_of_fp32_groups": "Adam's moments can't be put back",
            f"{_STAGE2}._lazy_init_hp_params_optimizer_state": "the same",
            f"{_ZERO}.config:DeepSpeedZeroConfig": "a wrong key of a DeepSpeed JSON ends in a traceback",
        },
    ),
    *_of(
        "deepspeed",
        "train/passes.py",
        {
            f"{_STAGE3}@parameter_offload": "ZeRO-3 doesn't prefetch in passes without gradients",
            f"{_STAGE3}@persistent_parameters": "small weights are gathered one by one",
            f"{_OFFLOAD}@param_coordinator": "ZeRO-3 doesn't prefetch in passes without gradients",
            f"{_COORDINATOR}._clear_trace_structures": "the same",
            f"{_COORDINATOR}.reset_step": "the same",
            f"{_ZERO}.parameter_offload@ds_grads_remaining": "kept graphs let go of their weights too early",
            f"{_ZERO}.parameter_offload@pre_bwd_fn": "the embedding is gathered in every backward pass",
        },
    ),
    *_of(
        "bitsandbytes",
        "model/nf4.py, model/load.py",
        {
            "bitsandbytes.nn:Linear4bit@support_avx512bf16_for_cpu": "an evaluation on AVX512-BF16 CPUs destroys the weights",
            "bitsandbytes.functional:QuantState.from_dict": "weights that were written in 4 bits can't be read",
            "bitsandbytes.functional:get_4bit_type": "4-bit weights can't be described",
        },
    ),
    *_of("peft", "model/load.py", {"peft.tuners.lora:LoraLayer": "the type of an adapter's products isn't changed"}),
)


def check(packages: Collection[str]) -> list[str]:
    """Warnings on the versions of these packages, which it imports. Raises RunError: one isn't installed, a name is absent."""
    warnings = []
    for package in packages:
        low, high = TRIED[package]
        try:
            found = version(package)
        except PackageNotFoundError:
            raise RunError(describe(package, "not installed", f"must be {package}>={low},<{high}", "Install it.")) from None
        for row in _absent(package):
            since = row.since or low
            rule = f"{row.used_by} needs {row.name}, seen since {since}, which it lacks; without it {row.breaks}"
            raise RunError(describe(f"{package} {found}", "another version", rule, f"Install {package}>={since},<{high}."))
        if not _numbers(low) <= _numbers(found) < _numbers(high):
            warnings.append(f"{package} {found} was not tried ({package}>={low},<{high} was); it has every name that is needed")
    return warnings


def _absent(package: str) -> Iterator[Private]:
    return (row for row in TABLE if row.package == package and not _is_there(row.name))


def _is_there(name: str) -> bool:
    """Whether `module:attribute` exists, or `...@word` stands in the source of a module or class."""
    path, _, word = name.partition("@")
    module, _, attributes = path.partition(":")
    try:
        held = importlib.import_module(module)
        for attribute in filter(None, attributes.split(".")):
            held = getattr(held, attribute)
    except (ImportError, AttributeError):
        return False
    return not word or re.search(rf"\b{word}\b", inspect.getsource(held)) is not None


def _numbers(text: str) -> tuple[int, ...]:
    """`2.13.0+cpu` -> (2, 13, 0)."""
    return tuple(int(part) for part in re.findall(r"\d+", re.split(r"[^\d.]", text, maxsplit=1)[0]))

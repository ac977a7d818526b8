"""DeepSpeed through Accelerate, or plain torch, behind five methods. Knows no batch, no loss and no files but ds_configs.

embed and backward are collective under ZeRO-3: every rank calls them equally often.
"""

import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import DeepSpeedPlugin, InitProcessGroupKwargs
from pydantic import ValidationError

from hybrid_scale import dist, gpu, versions
from hybrid_scale.config import OptimizerSettings, RunConfig
from hybrid_scale.errors import ConfigError, RunError, describe, nearest
from hybrid_scale.model.embedder import Embedder
from hybrid_scale.model.shape import read_shape
from hybrid_scale.model.stream import without_compiled_op
from hybrid_scale.planning.costs import MemoryNeed, smallest_shard_group
from hybrid_scale.planning.zero import BUCKETS, bucket_sizes, json_file, read_json
from hybrid_scale.train.passes import ShardedPasses

MOMENTS = ("exp_avg", "exp_avg_sq")
JOINED_AT_ONCE = 2**24
"""Elements of all ranks that are on a device at once while a checkpoint is gathered."""

# DeepSpeed 0.19 calls collectives by the names that torch 2.13 calls deprecated, once a line and step.
warnings.filterwarnings("ignore", message=".*is deprecated. Please use", category=FutureWarning, module="torch.distributed")
# Reentrant checkpointing says this in every pass without gradients, where it is what we want.
warnings.filterwarnings("ignore", message="None of the inputs have requires_grad=True", module="torch.utils.checkpoint")


class Engine(Protocol):
    trained: dict[str, torch.nn.Parameter]
    """The trained parameters by name; under ZeRO-3 each rank holds a part of each."""

    def embed(self, micro_batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Token tensors [B, L] -> unit vectors float32 [B, D]."""
        ...

    def backward(self, surrogate: torch.Tensor, last: bool) -> None:
        """Accumulate the gradient of a scalar; on the last of a step, average over ranks."""
        ...

    def step(self, learning_rate: float) -> float:
        """Clip, update, clear; returns the gradient's norm before clipping."""
        ...

    def weights(self, keep: bool = True) -> dict[str, torch.Tensor]:
        """The trained weights, whole, float32, copied to the CPU of the ranks that `keep` them, {} on others. Collective."""
        ...

    def load_moments(self, state: Mapping[str, torch.Tensor]) -> None:
        """Put back Adam's `exp_avg.NAME`, `exp_avg_sq.NAME` (whole) and `step`, on any number of ranks, before the first step."""
        ...


def check(config: RunConfig) -> list[str]:
    """What can be refused before anything is opened or loaded; returns warnings, one a line.

    Raises ConfigError: trackers, the DeepSpeed JSON; RunError: a package lacks a name that is needed.
    """
    _check_trackers(config.training.trackers)
    packages = ["torch", "accelerate", "transformers"]
    if config.model.lora is not None:
        packages.append("peft")
    if config.model.quantization == "nf4":
        packages.append("bitsandbytes")
    if config.training.engine == "deepspeed":
        read_json(config)
        _quiet_deepspeed()
        packages.append("deepspeed")
    return versions.check(packages)


def _check_trackers(names: Sequence[str]) -> None:
    """Accelerate leaves out a tracker that isn't installed, without a word, and ends at an unknown one after loading."""
    known, installed = [*LOGGER_TYPE_TO_CLASS], [str(name) for name in get_available_trackers()]
    for name in names:
        if name not in known:
            raise ConfigError(describe("training.trackers", name, f"must be one of {', '.join(known)}"))
        if name not in installed:
            remedy = f"Install {name.replace('_', '-')}, or leave it out. Installed: {', '.join(installed) or 'none'}."
            raise ConfigError(describe("training.trackers", name, "its package must be installed", remedy))


def make_accelerator(config: RunConfig, run_directory: Path, group: int | None = None) -> Accelerator:
    """Accelerate on the process group of `dist`, with the run's trackers; `group` comes from `shard_group`.

    Raises RunError when its world differs.
    """
    trackers = list(config.training.trackers) or None
    options: dict[str, Any] = {"log_with": trackers, "project_dir": str(run_directory), "mixed_precision": "no"}
    if config.training.engine == "deepspeed":
        _quiet_deepspeed()
        plugin = DeepSpeedPlugin(hf_ds_config=read_deepspeed_config(config, group), zero3_init_flag=False)
        # Without a GPU, Accelerate takes a DeepSpeed world for a single process unless the backend is named.
        accelerator = Accelerator(
            deepspeed_plugin=plugin, kwargs_handlers=[InitProcessGroupKwargs(backend=dist.backend())], **options
        )
    else:
        accelerator = Accelerator(cpu=not gpu.present(), **options)
    if accelerator.num_processes != dist.world_size():
        raise RunError(f"Accelerate counts {accelerator.num_processes} ranks, the process group has {dist.world_size()}.")
    return accelerator


def _quiet_deepspeed() -> None:
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    without_compiled_op()


def read_deepspeed_config(config: RunConfig, group: int | None = None, world: int | None = None) -> dict[str, Any]:
    """The DeepSpeed JSON of a run, its "auto" values filled from the run config and the model's hidden size.

    `group`: what `shard_group` gave, needed where `training.shard_group` is "auto"; `world`: ranks, by default those there are.
    Raises ConfigError: see `planning.zero.read_json`; no `gradient_clipping` (DeepSpeed would clip at 1.0 unasked), one that
    contradicts `optimizer.max_gradient_norm`, a stage that contradicts `training.shard_group`, what DeepSpeed itself refuses.
    """
    path, settings = json_file(config), read_json(config)
    by_tokens = "a rank's micro-batches are planned by tokens, and the step gathers them"
    ours: dict[str, tuple[float, str]] = {
        "gradient_clipping": (config.optimizer.max_gradient_norm, "the run config says {} (optimizer.max_gradient_norm)"),
        "train_micro_batch_size_per_gpu": (1, by_tokens),
        "gradient_accumulation_steps": (1, by_tokens),
    }
    for key, (value, rule) in ours.items():
        found = settings.get(key)
        if found is None:
            raise ConfigError(describe(f"{path}: {key}", None, "must be stated", f'Write "auto" or {value}.'))
        if found not in ("auto", value):
            raise ConfigError(describe(f"{path}: {key}", found, rule.format(value), f'Write "auto" or {value}.'))
        settings[key] = value
    zero = settings["zero_optimization"]
    if _leaves_the_stage_open(config, settings):
        asked = config.training.shard_group
        group = asked if isinstance(asked, int) else group
        assert group is not None, "shard_group: auto is resolved by shard_group()"
        zero.update(_stage_of(group, world or dist.world_size()))
    if open_buckets := [key for key in BUCKETS if zero.get(key) == "auto"]:
        sizes = bucket_sizes(read_shape(config.model).hidden)
        zero.update({key: sizes[key] for key in open_buckets})
    if zero.get("stage3_gather_16bit_weights_on_model_save") == "auto":
        zero["stage3_gather_16bit_weights_on_model_save"] = False
    settings.setdefault(
        "zero_force_ds_cpu_optimizer", False
    )  # with offload, DeepSpeed would refuse an optimizer that isn't its own
    _refuse_what_deepspeed_refuses(path, zero)
    return settings


def _refuse_what_deepspeed_refuses(path: Path, zero: dict[str, Any]) -> None:
    """Raises ConfigError for keys and values of `zero_optimization` at which DeepSpeed would end with a traceback."""
    _quiet_deepspeed()
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    try:
        DeepSpeedZeroConfig(**zero)
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(["zero_optimization", *(str(part) for part in problem["loc"])])
        known = {name for key, known in DeepSpeedZeroConfig.model_fields.items() for name in (key, known.alias) if name}
        remedy = nearest(str(problem["loc"][-1]), known) if problem["type"] == "extra_forbidden" else ""
        found = problem["input"]
        raise ConfigError(describe(f"{path}: {key}", found, f"DeepSpeed refuses it ({problem['msg'].lower()})", remedy)) from None


def _leaves_the_stage_open(config: RunConfig, settings: dict[str, Any]) -> bool:
    """Whether the JSON says "auto" for stage and hpZ, as `training.shard_group` must agree to."""
    path, asked, zero = json_file(config), config.training.shard_group, settings["zero_optimization"]
    stage, hpz = zero.get("stage"), zero.get("zero_hpz_partition_size", 1)
    if (stage == "auto") != (hpz == "auto"):
        rule = f'"stage" is {stage!r}: both are "auto" or none is'
        raise ConfigError(describe(f"{path}: zero_hpz_partition_size", hpz, rule))
    if stage == "auto" and asked is None:
        raise ConfigError(
            describe("training.shard_group", None, f'{path} leaves "stage" to it', "Set a number of GPUs, or auto.")
        )
    if stage != "auto" and asked is not None:
        remedy = "Use ds_configs/zero_auto.json, or leave training.shard_group out."
        raise ConfigError(describe("training.shard_group", asked, f"{path} states stage {stage} itself", remedy))
    return stage == "auto"


def _stage_of(group: int, world: int) -> dict[str, int]:
    """ZeRO's stage and hpZ group where `group` GPUs of `world` share one copy of the weights."""
    if world % group:
        raise ConfigError(describe("training.shard_group", group, f"must divide the {world} ranks"))
    if group == 1:
        return {"stage": 2, "zero_hpz_partition_size": 1}
    return {"stage": 3, "zero_hpz_partition_size": group if group < world else 1}


def shard_group(config: RunConfig, need: Callable[[], MemoryNeed], world: int, gpus_per_node: int) -> int | None:
    """GPUs that share one copy of the weights; None where the run has no DeepSpeed or its JSON states a stage.

    `need` is asked where the config says "auto". Raises ConfigError: no GPU of known size, or one too small for any group.
    """
    if config.training.engine == "plain" or not _leaves_the_stage_open(config, read_json(config)):
        return None
    asked = config.training.shard_group
    if isinstance(asked, int):
        return asked
    return smallest_shard_group(need(), world, gpus_per_node, _gpu_bytes(config))


def _gpu_bytes(config: RunConfig) -> float:
    if config.training.gpu_memory_gib is not None:
        return config.training.gpu_memory_gib * 2**30
    held = gpu.total_bytes()
    if held is not None:
        return float(held)
    rule = "shard_group: auto needs a GPU's memory and there is no GPU here"
    raise ConfigError(describe("training.gpu_memory_gib", None, rule, "State the memory of the GPUs that will train."))


def zero_stage(config: RunConfig, group: int | None = None, world: int | None = None) -> int:
    """ZeRO stage of the run; 0 without DeepSpeed. Arguments as for `read_deepspeed_config`."""
    if config.training.engine == "plain":
        return 0
    return int(read_deepspeed_config(config, group, world)["zero_optimization"]["stage"])


def make_engine(config: RunConfig, accelerator: Accelerator, embedder: Embedder) -> Engine:
    """The engine that the config asks for, around a loaded embedder."""
    if config.training.engine == "plain":
        return PlainEngine(embedder, config.optimizer)
    return DeepSpeedEngine(embedder, config.optimizer, accelerator)


def _copied(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in host memory, whatever `tensor` becomes later."""
    return torch.empty_like(tensor, device="cpu").copy_(tensor)


def _joined(flat: torch.Tensor, keep: bool) -> torch.Tensor:
    """[n] of every rank -> [W, n] in host memory of the ranks that `keep` it, [W, 0] elsewhere. Collective."""
    world, chunk = dist.world_size(), max(1, JOINED_AT_ONCE // dist.world_size())
    joined = torch.empty(world, len(flat) if keep else 0, dtype=flat.dtype)
    for start in range(0, len(flat), chunk):
        part = flat[start : start + chunk].to(dist.device())
        rows = dist.join_rows(part[:, None], len(part)).view(world, -1)
        if keep:
            joined[:, start : start + chunk] = rows
    return joined


def _adamw(parameters: list[torch.nn.Parameter], settings: OptimizerSettings) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        parameters,
        lr=settings.learning_rate,
        betas=(settings.beta1, settings.beta2),
        eps=settings.epsilon,
        weight_decay=settings.weight_decay,
    )


class PlainEngine:
    """A replica per rank, gradients averaged by one all-reduce at the step's end. The reference."""

    def __init__(self, embedder: Embedder, settings: OptimizerSettings):
        self.module = embedder.to(dist.device())
        self.clip = settings.max_gradient_norm
        self.trained = {name: p for name, p in embedder.named_parameters() if p.requires_grad}
        self.optimizer = _adamw(list(self.trained.values()), settings)

    def embed(self, micro_batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.module(**micro_batch)

    def backward(self, surrogate: torch.Tensor, last: bool) -> None:
        surrogate.backward()
        if last and dist.world_size() > 1:
            self._average()

    def _average(self) -> None:
        """Gradients averaged over ranks, all in one exchange."""
        parameters = list(self.trained.values())
        flat = torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in parameters])
        dist.sum_(flat).div_(dist.world_size())
        for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            parameter.grad = part.view_as(parameter)

    def step(self, learning_rate: float) -> float:
        norm = torch.nn.utils.clip_grad_norm_(self.trained.values(), self.clip or float("inf"))
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(norm)

    def weights(self, keep: bool = True) -> dict[str, torch.Tensor]:
        return {name: _copied(p.detach().float()) for name, p in self.trained.items()} if keep else {}

    def load_moments(self, state: Mapping[str, torch.Tensor]) -> None:
        for name, parameter in self.trained.items():
            moments = {key: state[f"{key}.{name}"].to(parameter.device).clone() for key in MOMENTS}
            self.optimizer.state[parameter] = {"step": state["step"].clone(), **moments}


class DeepSpeedEngine:
    """DeepSpeed ZeRO-1, 2 or 3. Micro-batches are accumulated here, not by DeepSpeed's counter."""

    def __init__(self, embedder: Embedder, settings: OptimizerSettings, accelerator: Accelerator):
        self.names = [name for name, p in embedder.named_parameters() if p.requires_grad]
        trained = [p for p in embedder.parameters() if p.requires_grad]
        self.engine, _ = accelerator.prepare(embedder, _adamw(trained, settings))
        self.trained = dict(zip(self.names, trained, strict=True))
        self.zero = self.engine.optimizer
        self.stage = int(self.engine.zero_optimization_stage())
        self.passes = ShardedPasses(self.zero) if self.stage == 3 else None

    def embed(self, micro_batch: dict[str, torch.Tensor]) -> torch.Tensor:
        if self.passes:
            self.passes.before_forward()
        embedded: torch.Tensor = self.engine(**micro_batch)
        if self.passes and torch.is_grad_enabled():
            self.passes.after_forward()
        return embedded

    def backward(self, surrogate: torch.Tensor, last: bool) -> None:
        # DeepSpeed counts a backward at the next forward; a second one without a forward between would overwrite the first.
        self.zero.clear_backward_seen_flag()
        if self.passes:
            self.passes.before_backward()
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(surrogate, scale_wrt_gas=False)

    def step(self, learning_rate: float) -> float:
        for group in self.zero.param_groups:
            group["lr"] = learning_rate
        self.engine.step()
        if self.passes:
            self.passes.after_step()
        return float(self.engine.get_global_grad_norm())

    def weights(self, keep: bool = True) -> dict[str, torch.Tensor]:
        if self.stage == 3:
            return self._whole(self._flat(), keep)
        from deepspeed.utils import safe_get_full_fp32_param

        held = {}
        for name, parameter in self.trained.items():
            whole = safe_get_full_fp32_param(parameter)  # collective, one tensor at a time
            if keep:
                held[name] = _copied(whole.detach())
        return held

    def load_moments(self, state: Mapping[str, torch.Tensor]) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        for flat in self._flat():
            self.zero.optimizer.state[flat] = {"step": state["step"].clone(), **{key: torch.zeros_like(flat) for key in MOMENTS}}
        if self.stage < 3:  # ZeRO-1 and 2 tie parameters to their moments only after a first step
            self.zero._lazy_init_hp_params_optimizer_state()
        for key in MOMENTS:
            for name, parameter in self.trained.items():
                value = state[f"{key}.{name}"].to(dist.device())
                if self.stage == 3:
                    safe_set_local_optimizer_state(parameter, self._slice(value, parameter), key)
                else:
                    safe_set_full_optimizer_state(parameter, value, key)

    def _whole(self, flats: list[torch.Tensor], keep: bool) -> dict[str, torch.Tensor]:
        """Trained tensors from every rank's flat shards: an exchange a chunk, where DeepSpeed's own needs one a tensor."""
        parts = [_joined(flat.detach(), keep) for flat in flats]
        held = {}
        for name, parameter in self.trained.items() if keep else ():
            group, offset, length = self.zero.grad_position[self.zero.get_param_id(parameter)]
            whole = torch.cat([part[offset : offset + length] for part in parts[group]])
            held[name] = whole[: parameter.ds_numel].view(parameter.ds_shape)  # type: ignore[attr-defined]
        return held

    def _flat(self) -> list[torch.Tensor]:
        """DeepSpeed's flat float32 master weights on this rank."""
        return list(self.zero.fp32_partitioned_groups_flat if self.stage == 3 else self.zero.single_partition_of_fp32_groups)

    def _slice(self, value: torch.Tensor, parameter: torch.nn.Parameter) -> torch.Tensor:
        """This rank's part of a whole tensor as ZeRO-3 cuts it: equal lengths, the last ones padded with zeros."""
        length = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
        padded = torch.zeros(length * dist.world_size(), dtype=value.dtype, device=value.device)
        padded[: value.numel()] = value.reshape(-1)
        return padded[dist.rank() * length : (dist.rank() + 1) * length]

"""A GPU for machines without one: tensors on a device of their own, computed on the CPU, that refuse what CUDA and NCCL refuse.

    with pretended_gpu(world=1) as nccl:
        ...

Inside, hybrid_scale.gpu says that there is a GPU, whose tensors are `OnGpu`. An operator that mixes one with a tensor in host
memory raises, as CUDA's do, with CUDA's exceptions (0-dimensional ones, indices, copies); so do collectives of what NCCL doesn't
take. Autograd works, in a thread of its own as for CUDA. It knows nothing of streams, of kernels and of their numbers.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

from hybrid_scale import dist, gpu

GPU_NAME = "pretended"
MAY_MIX = ("_to_copy", "copy_", "index", "index_put_", "_index_put_impl_")
"""Operators that take a tensor in host memory beside one on a GPU."""
NCCL_TYPES = (
    *(torch.int8, torch.uint8, torch.int32, torch.int64, torch.bool),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
)


class OnGpu(torch.Tensor):
    """A tensor on `cuda`; `held` is where it really is."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> "OnGpu":
        return torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=torch.device(GPU_NAME, 0),
        )

    def __init__(self, held: torch.Tensor):
        self.held = held

    def __repr__(self, **_: Any) -> str:
        return f"OnGpu({self.held})"

    def tolist(self) -> Any:
        return self.held.tolist()

    def numpy(self, **_: Any) -> Any:
        raise TypeError("can't convert a tensor on cuda to numpy")

    def data_ptr(self) -> int:
        raise RuntimeError("a kernel on the CPU was given a tensor on cuda")

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


class _Factories(TorchDispatchMode):
    """Sees operators without a tensor argument too."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """One operator: placed, checked, computed on the CPU, its results placed."""
    name = func.__name__.split(".")[0]
    tensors: list[torch.Tensor] = []
    tree_map(lambda leaf: tensors.append(leaf) if isinstance(leaf, torch.Tensor) else None, (args, kwargs))
    on_gpu = any(isinstance(tensor, OnGpu) for tensor in tensors)
    if on_gpu and name not in MAY_MIX:
        for tensor in tensors:
            if not isinstance(tensor, OnGpu) and tensor.dim() > 0:
                raise RuntimeError(f"{func}: expected all tensors on one device, found one in host memory: {tuple(tensor.shape)}")
    target = kwargs.pop("device", None)
    kwargs.pop("pin_memory", None)
    if target is not None:
        on_gpu = torch.device(target).type == GPU_NAME
        kwargs["device"] = torch.device("cpu")
    if name in ("copy_", "index_put_", "_index_put_impl_"):
        on_gpu = isinstance(args[0], OnGpu)
    bare = tree_map(_bare, (args, kwargs))
    result = func(*bare[0], **bare[1])
    if _in_place(func) and args and isinstance(args[0], torch.Tensor):
        return args[0]
    if "out" in kwargs:
        return kwargs["out"]
    return tree_map(lambda leaf: OnGpu(leaf) if on_gpu and isinstance(leaf, torch.Tensor) else leaf, result)


def _bare(leaf: Any) -> Any:
    return leaf.held if isinstance(leaf, OnGpu) else leaf


def _in_place(func: Any) -> bool:
    return func.__name__.split(".")[0].endswith("_") and not func.__name__.startswith("_foreach")


class _Module(_DummyBackendModule):
    """What torch's gradient checkpointing asks of a device. Random numbers come from the CPU's generator, which it keeps too."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]

    def get_rng_state(self) -> torch.Tensor:
        return torch.zeros(16, dtype=torch.uint8)

    def set_rng_state(self, state: torch.Tensor) -> None:
        pass

    def device(self, index: int) -> AbstractContextManager[None]:
        return nullcontext()


class Nccl:
    """torch.distributed in a world whose ranks all hold the same: checks each call's tensors as NCCL would."""

    class ReduceOp:
        SUM, MAX = "sum", "max"

    def __init__(self, world: int) -> None:
        self.world = world
        self.calls: list[str] = []

    def is_initialized(self) -> bool:
        return True

    def get_rank(self) -> int:
        return 0

    def get_world_size(self) -> int:
        return self.world

    def _take(self, call: str, *tensors: torch.Tensor) -> None:
        self.calls.append(call)
        for tensor in tensors:
            if not isinstance(tensor, OnGpu):
                raise RuntimeError(f"{call}: no backend for a tensor in host memory")
            if tensor.dtype not in NCCL_TYPES:
                raise RuntimeError(f"{call}: NCCL has no type for {tensor.dtype}")
            if not tensor.held.is_contiguous():
                raise ValueError(f"{call}: tensors must be contiguous")

    def all_reduce(self, tensor: torch.Tensor, op: str = "sum") -> None:
        self._take("all_reduce", tensor)
        if op == "sum":
            tensor.mul_(self.world)

    def all_gather(self, parts: list[torch.Tensor], tensor: torch.Tensor) -> None:
        self._take("all_gather", tensor, *parts)
        assert len({(part.shape, part.dtype) for part in (tensor, *parts)}) == 1
        for part in parts:
            part.copy_(tensor)

    def all_gather_into_tensor(self, whole: torch.Tensor, tensor: torch.Tensor) -> None:
        self._take("all_gather_into_tensor", whole, tensor)
        assert whole.dtype == tensor.dtype
        assert whole.numel() == self.world * tensor.numel()
        whole.copy_(torch.cat([tensor] * self.world))

    def reduce_scatter_tensor(self, own: torch.Tensor, whole: torch.Tensor) -> None:
        self._take("reduce_scatter_tensor", own, whole)
        assert whole.dtype == own.dtype
        assert whole.numel() == self.world * own.numel()
        own.copy_(whole[: len(own)] * self.world)

    def broadcast(self, tensor: torch.Tensor, src: int) -> None:
        self._take("broadcast", tensor)

    def all_gather_object(self, values: list[Any], value: Any) -> None:
        values[:] = [value] * self.world

    def broadcast_object_list(self, values: list[Any], src: int) -> None:
        self.calls.append("broadcast_object_list")


def move(module: torch.nn.Module) -> None:
    """What `.to(GPU_NAME)` does to a module."""
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            part._parameters[name] = torch.nn.Parameter(parameter.detach().to(GPU_NAME), parameter.requires_grad)
        for name, buffer in part.named_buffers(recurse=False):
            part._buffers[name] = buffer.to(GPU_NAME)


def register() -> None:
    """Make the device known. Before the process's first backward pass, where autograd counts the devices."""
    if torch._C._get_privateuse1_backend_name() != GPU_NAME:
        _setup_privateuseone_for_python_backend(GPU_NAME, _Module())


@contextmanager
def pretended_gpu(world: int = 1) -> Iterator[Nccl]:
    """See the module; `world`: ranks, of which this is the first.

    The device stays known to the process: run it in a rank of tests/ranks.py.
    """
    register()
    nccl, state = Nccl(world), torch.zeros(16, dtype=torch.uint8)
    changes: dict[str, Any] = {
        "present": lambda: True,
        "device": lambda: torch.device(GPU_NAME, 0),
        "synchronize": lambda: None,
        "moment": lambda: None,
        "random_state": state.clone,
        "set_random_state": state.copy_,
    }
    with ExitStack() as stack:
        for name, change in changes.items():
            stack.enter_context(mock.patch.object(gpu, name, change))
        stack.enter_context(mock.patch.object(torch.Tensor, "pin_memory", lambda self: self))
        stack.enter_context(mock.patch.object(dist, "c10d", nccl))
        stack.callback(torch._C._set_only_lift_cpu_tensors, torch._C._only_lift_cpu_tensors())
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(list, device=...) goes through host memory
        stack.enter_context(_Factories())
        yield nccl

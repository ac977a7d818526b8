"""Our own collectives, and with `launched` the only reader of RANK and its friends.

Works with and without a process group: one process is a world of one. Knows no DeepSpeed and no model.
"""

import datetime
import os
import sys
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as c10d

from hybrid_scale import gpu
from hybrid_scale.errors import HybridScaleError, RunError, describe, explain
from hybrid_scale.launched import Started, is_rank, settle
from hybrid_scale.signals import LISTENER

JOIN_SECONDS = 1800.0
JOIN_SAID_SECONDS = 5.0
"""How long a rank waits for the others without a word."""
SAID_WITHIN_SECONDS = 5.0
"""How long a rank with an error waits for rank 0 to say it."""

_timeout: datetime.timedelta | None = None
_started: Started | None = None


def backend() -> str:
    """`nccl` where a GPU is visible, else `gloo`."""
    return "nccl" if gpu.present() else "gloo"


def start(timeout_seconds: float = 24 * 3600.0) -> None:
    """Join the process group that the launcher describes in the environment; nothing without a launcher.

    `timeout_seconds`: how long ranks wait for one that works alone, as rank 0 does while it tokenises a large data set. Rank and
    launcher notice a rank that dies before that, `train.watch` one that hangs. Ranks have JOIN_SECONDS to appear.
    Raises RunError: who is meant can't be told (`launched.settle`), ranks that don't appear, another world than HS_EXPECT_WORLD.
    """
    global _timeout, _started
    started = settle()
    _started = started if started.launched or _started is None else _started
    if launched_rank() == 0:
        for note in started.notes:
            print(f"warning: {note}", file=sys.stderr, flush=True)
    if started.cpu and gpu.present():
        rule = "this process sees a GPU, which it would take"
        remedy = 'Leave --cpu (use_cpu in its config file) out, or hide the GPUs: CUDA_VISIBLE_DEVICES="".'
        raise RunError(describe("accelerate launch", "--cpu", rule, remedy))
    gpu.take(int(os.environ.get("LOCAL_RANK", "0")))
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not c10d.is_initialized():
        _join(min(JOIN_SECONDS, timeout_seconds))
        _timeout = datetime.timedelta(seconds=timeout_seconds)
        c10d.distributed_c10d._set_pg_timeout(_timeout)
    expected = os.environ.get("HS_EXPECT_WORLD", str(world_size()))
    if not expected.isdecimal():
        raise RunError(describe("HS_EXPECT_WORLD", expected, "must be a number of ranks", "Set it to one, or unset it."))
    if int(expected) != world_size():
        raise RunError(f"HS_EXPECT_WORLD: {expected} ranks were asked for, {world_size()} joined: two worlds are training apart.")


def _join(seconds: float) -> None:
    """Meet the other ranks within `seconds`; a rank that waits for them says so. Raises RunError: they don't come."""
    place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    who = f"rank {launched_rank()} of {os.environ['WORLD_SIZE']}"

    def say() -> None:
        text = f"{who} waits for the others at {place}, at most {seconds:.0f} s; RANK and WORLD_SIZE of the environment say so."
        print(text, file=sys.stderr, flush=True)

    said = threading.Timer(JOIN_SAID_SECONDS, say)
    said.daemon = True
    said.start()
    ours = device() if gpu.present() else None  # NCCL connects now instead of in the first step, and knows its GPU
    try:
        c10d.init_process_group(backend(), timeout=datetime.timedelta(seconds=seconds), device_id=ours)
    except (c10d.DistStoreError, c10d.DistNetworkError, ValueError) as error:
        rule = f"the ranks must meet at {place} within {seconds:.0f} s ({str(error).splitlines()[0]})"
        remedy = "Is it the launcher's address, and were all ranks started? Variables left over in a shell are to be unset."
        raise RunError(describe("process group", who, rule, remedy)) from None
    finally:
        said.cancel()


def share_timeout() -> None:
    """Every process group made so far, those of libraries too, waits as long as the world's: theirs would give up after
    10 minutes (NCCL) or 30 while a rank works alone.
    """
    if _timeout is not None and c10d.is_initialized():
        for group in list(c10d.distributed_c10d._world.pg_map):
            c10d.distributed_c10d._set_pg_timeout(_timeout, group)


def stop(failed: bool = False) -> None:
    """Leave the process group; nothing without one. `failed`: this rank leaves what the others may still be doing."""
    if not c10d.is_initialized():
        return
    if failed and backend() == "nccl":
        c10d.distributed_c10d._abort_process_group()  # leaving in order waits for collectives that other ranks never join
    else:
        c10d.destroy_process_group()


def rank() -> int:
    return c10d.get_rank() if c10d.is_initialized() else 0


def launched() -> bool:
    """Whether a launcher (accelerate launch, torchrun, deepspeed) started this process as a rank."""
    return is_rank()


def alone_by() -> str | None:
    """By what this process was started alone where ranks could have been started; None: nothing known."""
    return _started.alone if _started else None


def launched_rank() -> int:
    """The rank that the launcher gave this process, known before the process group exists."""
    return int(os.environ["RANK"]) if is_rank() else 0


def world_size() -> int:
    return c10d.get_world_size() if c10d.is_initialized() else 1


def local_world_size() -> int:
    """Ranks on this machine, as the launcher says; all of them without one."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))


def first_of_node() -> bool:
    """Whether this rank is the first on its machine, as the launcher counts them."""
    return world_size() == 1 or int(os.environ.get("LOCAL_RANK", "0")) == 0


def device() -> torch.device:
    """This rank's accelerator, or the CPU."""
    return gpu.device()


def barrier() -> None:
    if c10d.is_initialized():
        c10d.barrier()


def sum_(tensor: torch.Tensor) -> torch.Tensor:
    """Sum over ranks, in place; returns `tensor`."""
    if c10d.is_initialized():
        c10d.all_reduce(tensor)
    return tensor


def max_int(value: int) -> int:
    """Largest `value` of all ranks."""
    if not c10d.is_initialized():
        return value
    cell = torch.tensor([value], dtype=torch.int64, device=device())
    c10d.all_reduce(cell, op=c10d.ReduceOp.MAX)
    return int(cell.item())


def gather_rows(rows: torch.Tensor, counts: list[int]) -> torch.Tensor:
    """Rows of all ranks in rank order: [counts[rank], D] -> [sum(counts), D]. No gradient flows through.

    `counts` is known on every rank beforehand (the plan is the same everywhere), so nothing is negotiated.
    """
    if not c10d.is_initialized():
        return rows
    most = max(counts)
    padded = rows.new_zeros(most, *rows.shape[1:])
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in counts]
    c10d.all_gather(parts, padded)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def join_rows(rows: torch.Tensor, most: int) -> torch.Tensor:
    """Rows of all ranks, each rank's [n <= most, D] filled up with zeros, in rank order: [W * most, D]. No gradient flows.

    `most` is known on every rank beforehand (the plan is the same everywhere), so nothing is negotiated.
    """
    filled = rows if len(rows) == most else torch.cat([rows, rows.new_zeros(most - len(rows), *rows.shape[1:])])
    if not c10d.is_initialized():
        return filled
    joined = filled.new_empty(world_size() * most, *rows.shape[1:])
    c10d.all_gather_into_tensor(joined, filled.contiguous())
    return joined


def sum_rows(joined: torch.Tensor) -> torch.Tensor:
    """The sum over ranks of [W * most, D], of which each rank gets its own [most, D] (reduce-scatter)."""
    if not c10d.is_initialized():
        return joined
    own = joined.new_empty(len(joined) // world_size(), *joined.shape[1:])
    c10d.reduce_scatter_tensor(own, joined)
    return own


def broadcast_(tensor: torch.Tensor, source: int = 0) -> torch.Tensor:
    """`tensor` of rank `source` on every rank, in place; shapes and types are known to agree. Returns `tensor`."""
    if c10d.is_initialized():
        c10d.broadcast(tensor, src=source)
    return tensor


def flags(raised: bool) -> list[bool]:
    """`raised` of every rank, in rank order."""
    if not c10d.is_initialized():
        return [raised]
    cells = torch.zeros(world_size(), dtype=torch.int32, device=device())
    cells[rank()] = raised
    return [bool(cell) for cell in sum_(cells).tolist()]


def gather_objects(value: Any) -> list[Any]:
    """`value` of every rank, in rank order. Small objects only (pickled)."""
    if not c10d.is_initialized():
        return [value]
    values: list[Any] = [None] * world_size()
    c10d.all_gather_object(values, value)
    return values


def gather_arrays(array: np.ndarray) -> list[np.ndarray]:
    """`array` of every rank, in rank order; shapes may differ in the first axis."""
    if not c10d.is_initialized():
        return [array]
    counts = [int(n) for n in gather_objects(len(array))]
    whole = gather_rows(torch.from_numpy(np.ascontiguousarray(array)).to(device()), counts).cpu().numpy()
    return np.split(whole, np.cumsum(counts)[:-1])


def sum_array(array: np.ndarray) -> np.ndarray:
    """Elementwise sum over ranks."""
    return sum_(torch.from_numpy(np.ascontiguousarray(array)).to(device())).cpu().numpy()


def agree(what: str, value: Any) -> None:
    """Raise RunError on every rank unless all ranks hold an equal `value`."""
    values = gather_objects(value)
    if any(other != values[0] for other in values):
        listed = ", ".join(f"rank {r}: {v!r}" for r, v in enumerate(values))
        raise RunError(f"{what} differs between ranks: {listed}.")


def first_rank_does(action: Any) -> Any:
    """Run `action()` on rank 0 alone; every rank gets its result. What it raises is raised there, RunError on the others."""
    result, failure = None, None
    if rank() == 0:
        try:
            result = action()
        except Exception as error:
            failure = error
    outcome: list[Any] = [result, failure and f"{type(failure).__name__}: {failure}"]
    if c10d.is_initialized():
        c10d.broadcast_object_list(outcome, src=0)
    if failure is not None:
        raise failure
    if outcome[1] is not None:
        raise RunError(f"rank 0 failed: {outcome[1]}")
    return outcome[0]


def together(action: Any) -> Any:
    """Run `action()` on every rank; a HybridScaleError on any rank is raised on all, so that none waits for the failed one."""
    result, failure = None, None
    try:
        result = action()
    except HybridScaleError as error:
        failure = error
    failures = [error for error in gather_objects(failure) if error is not None]
    if failures:
        raise failures[0]
    return result


class SideGroup:
    """All ranks over connections of their own (gloo, host memory), for one thread beside the training. Collective to make.

    Collectives of a group must be called in one order on every rank, and those of two groups on one GPU may wait for each
    other for good. Neither can happen here, over NCCL or gloo: the group shares no socket, queue or GPU with the training, and
    its one thread has one exchange outstanding. A rank that dies is an error at once, one that hangs after `timeout_seconds`.
    On several nodes gloo finds its network by the host's name, or by GLOO_SOCKET_IFNAME. Raises RunError: it finds none.
    """

    def __init__(self, timeout_seconds: float = 600.0):
        self.group = None
        if world_size() > 1:
            try:
                self.group = c10d.new_group(backend="gloo", timeout=datetime.timedelta(seconds=timeout_seconds))
            except RuntimeError as error:
                rule = f"the ranks can't reach each other through gloo ({str(error).splitlines()[0]})"
                remedy = "Set it to the network interface that all nodes share (`ip -brief address` lists them)."
                raise RunError(describe("GLOO_SOCKET_IFNAME", os.environ.get("GLOO_SOCKET_IFNAME"), rule, remedy)) from error

    def gather(self, row: torch.Tensor) -> torch.Tensor | None:
        """[n] in host memory of every rank -> [W, n] on rank 0, None on the others."""
        if self.group is None:
            return row[None]
        rows = row.new_empty(world_size(), len(row)) if rank() == 0 else None
        c10d.gather(row, None if rows is None else list(rows), dst=0, group=self.group)
        return rows


class Tally:
    """A whole number that all ranks add to, outside of any collective: who takes which piece of work, how much is done.

    Made by all ranks in the same order (each gets its own number), and gone with the process group.
    """

    made = 0

    def __init__(self) -> None:
        Tally.made += 1
        self.key, self.alone = f"tally/{Tally.made}", 0

    def add(self, amount: int) -> int:
        """The number after `amount` was added to it."""
        if not c10d.is_initialized():
            self.alone += amount
            return self.alone
        return int(c10d.distributed_c10d._get_default_store().add(self.key, amount))


class StoreGone(RunError):
    """The store through which the ranks met doesn't answer: the process that keeps it, mostly rank 0's, has ended."""


class Notes:
    """A short text of each rank for all others, outside of any collective: through a connection of its own to their store.

    For one thread beside the training: nothing waits for another rank, but a store whose process is suspended answers never.
    Raises StoreGone where that process has ended.
    """

    def __init__(self) -> None:
        store = c10d.distributed_c10d._get_default_store()
        while isinstance(store, c10d.PrefixStore):
            store = store.underlying_store
        self.store: Any = store.clone()  # type: ignore[attr-defined]

    def put(self, text: str) -> None:
        """Set this rank's note."""
        try:
            self.store.set(f"note/{rank()}", text)
        except (RuntimeError, ValueError) as error:
            raise StoreGone(str(error)) from None

    def read(self) -> list[str]:
        """The note of every rank, in rank order; "" where there is none yet."""
        keys = [f"note/{number}" for number in range(world_size())]
        try:
            if self.store.check(keys):
                return [value.decode() for value in self.store.multi_get(keys)]
            return [self.store.get(key).decode() if self.store.check([key]) else "" for key in keys]
        except (RuntimeError, ValueError) as error:
            raise StoreGone(str(error)) from None


class Board:
    """Short texts under a key, for all ranks and outside of any collective: through a connection of its own to their store.

    For one thread beside the training. Raises StoreGone where the process that keeps the store has ended.
    """

    def __init__(self, name: str) -> None:
        store = c10d.distributed_c10d._get_default_store()
        while isinstance(store, c10d.PrefixStore):
            store = store.underlying_store
        self.store: Any = store.clone()  # type: ignore[attr-defined]
        self.name = name

    def post(self, key: str, text: str) -> str:
        """Put up `text` unless there is one already; what stands there now."""
        return self._asked(lambda place: self.store.compare_set(place, "", text).decode(), key)

    def read(self, key: str) -> str:
        """What stands there; "" for nothing."""
        return self._asked(lambda place: self.store.get(place).decode() if self.store.check([place]) else "", key)

    def count(self, key: str, amount: int) -> int:
        """The number there, after `amount` was added to it by this rank."""
        return self._asked(lambda place: int(self.store.add(place, amount)), key)

    def _asked(self, ask: Callable[[str], Any], key: str) -> Any:
        try:
            return ask(f"{self.name}/{key}")
        except (RuntimeError, ValueError) as error:
            raise StoreGone(str(error)) from None


def is_lost_connection(error: BaseException) -> bool:
    """Whether an error may be the echo of another rank's end: what gloo, NCCL and the store raise."""
    if isinstance(error, HybridScaleError) or not isinstance(error, RuntimeError):
        return False
    words = ("gloo", "nccl", "connection", "broken pipe", "store")
    return isinstance(error, c10d.DistError) or any(word in str(error).lower() for word in words)


def run_door(action: Callable[[], object]) -> int:
    """Join the ranks, run `action`, leave. Returns the exit code of this rank.

    0: done. 2: an error that the user can mend (HybridScaleError, OSError). 3: SIGTERM, Ctrl-C or SIGHUP, at once. 4: the
    connection to another rank was lost, which has its own reason. An error is said once: by rank 0, or by the rank that alone
    has it, if rank 0 says nothing for `SAID_WITHIN_SECONDS`. Every other exception is a defect and passes.
    """
    failed = True
    here = LISTENER.start()
    LISTENER.quiet = launched_rank() != 0
    try:
        start()
        action()
        failed = False
        return 0
    except BrokenPipeError:  # the reader of what is printed has gone, as `head` does
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (for the interpreter's last flush)
        return 2
    except (HybridScaleError, OSError) as error:
        _say_once(explain(error))
        return 2
    except RuntimeError as error:
        if not is_lost_connection(error):
            raise
        print(f"rank {launched_rank()}: lost another rank: {str(error).splitlines()[0]}", file=sys.stderr, flush=True)
        return 4
    finally:
        stop(failed)
        if here:
            LISTENER.stop()


def _say_once(message: str) -> None:
    """Print on rank 0; on another rank only when rank 0 has none, naming the rank."""
    if not c10d.is_initialized():
        if launched_rank() == 0:
            print(message, file=sys.stderr, flush=True)
        return
    store, key = c10d.distributed_c10d._get_default_store(), "door/said"
    if rank() == 0:
        print(message, file=sys.stderr, flush=True)
        store.set(key, "1")
        return
    try:
        store.wait([key], datetime.timedelta(seconds=SAID_WITHIN_SECONDS))
    except c10d.DistNetworkError:
        return  # rank 0 has ended: it has said why
    except RuntimeError:
        print(f"rank {rank()}: {message}", file=sys.stderr, flush=True)

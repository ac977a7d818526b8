"""The trained state at a step's end: each rank copies what it owns to host memory; put together later, behind the training.

Weights and moments move in the update alone, so the copy may be made at any time until the next one, by any thread.

Knows how the engines hold trained weights and Adam's moments (private attributes of DeepSpeed 0.19.8, which is pinned), and no
file. The copy is all that a step waits for: 12 bytes a trained weight, shared out over the ranks.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch

from hybrid_scale import dist, gpu
from hybrid_scale.train.engine import MOMENTS, DeepSpeedEngine, Engine, PlainEngine

KINDS = ("weights", *MOMENTS)


@dataclass(frozen=True)
class State:
    """The whole trained state in host memory, independent of the number of ranks, and each rank's random state."""

    weights: dict[str, torch.Tensor]
    """Trained weights by name, float32."""
    moments: dict[str, torch.Tensor]
    """`exp_avg.NAME`, `exp_avg_sq.NAME` and `step`, as `Engine.load_moments` takes them."""
    random: dict[str, torch.Tensor]
    """`cpu_RANK` and, with GPUs, `cuda_RANK`."""


@dataclass(frozen=True)
class Place:
    """Where a trained tensor lies in the flat tensors [R, n] of the R ranks that share a group."""

    group: int
    start: int
    length: int
    shape: tuple[int, ...]
    in_every_row: bool
    """Whether each rank holds `length` elements of it from `start` (ZeRO-3, padded at the end), or the rows end to end do."""

    def take(self, rows: torch.Tensor) -> torch.Tensor:
        """The tensor, in memory of its own."""
        if self.in_every_row:
            whole = torch.cat([row[self.start : self.start + self.length] for row in rows])
        else:
            whole = rows.reshape(-1)[self.start : self.start + self.length].clone()
        return whole[: math.prod(self.shape)].view(self.shape)


class Snapshot:
    """Host memory for this rank's part of the state, used again for each checkpoint; made before the first step.

    `mark` is called by the training, `copy` by it or by the thread that ends the run, `whole` by one thread beside the training;
    each after the other has returned.
    """

    def __init__(self, engine: Engine):
        self.engine = engine
        self.place = dist.device()  # asked here: another thread may stand on another GPU
        self.places = _places(engine)
        self.buffers = {kind: [gpu.pinned(flat.numel(), flat.dtype) for flat in _flats(engine)] for kind in KINDS}
        self.step = torch.zeros(())
        self.random: dict[str, torch.Tensor] = {}
        self.mark()

    def mark(self) -> None:
        """A step has ended: remember the random state, which the next one changes before its update. Not collective."""
        self.moment = gpu.moment()
        self.random = {"cpu": torch.get_rng_state()}
        ours = gpu.random_state()
        if ours is not None:
            self.random["cuda"] = ours

    def copy(self) -> None:
        """Take this rank's part as it was at `mark`, before the update that follows. Not collective."""
        flats = _flats(self.engine)
        with gpu.after(self.moment, self.place):  # the copies are made at its end: the next update would overtake them
            for kind in KINDS:
                for buffer, flat in zip(self.buffers[kind], flats, strict=True):
                    buffer.copy_(_of_kind(self.engine, flat, kind), non_blocking=True)
            if flats:
                self.step = torch.as_tensor(_optimizer(self.engine).state[flats[0]]["step"]).cpu().clone()

    def whole(self, side: dist.SideGroup) -> State | None:
        """What `copy` took on all ranks, put together on rank 0; None on the others. Every rank's thread calls it."""
        kinds = {kind: self._join(kind, side) for kind in KINDS}
        random = {name: side.gather(state) for name, state in self.random.items()}
        if dist.rank() != 0:
            return None
        moments = {f"{key}.{name}": tensor for key in MOMENTS for name, tensor in kinds[key].items()}
        states = {f"{name}_{rank}": row.clone() for name, rows in random.items() for rank, row in enumerate(_known(rows))}
        return State(kinds["weights"], {**moments, "step": self.step}, states)

    def _join(self, kind: str, side: dist.SideGroup) -> dict[str, torch.Tensor]:
        """Name -> tensor on rank 0, a group of tensors gathered at a time; {} elsewhere."""
        replicated = isinstance(self.engine, PlainEngine)
        whole = {}
        for group, buffer in enumerate(self.buffers[kind]):
            rows = buffer[None] if replicated else side.gather(buffer)
            if rows is not None:
                whole.update({name: place.take(rows) for name, place in self.places.items() if place.group == group})
        return whole


def _known(rows: torch.Tensor | None) -> torch.Tensor:
    assert rows is not None, "gathered on rank 0"
    return rows


def _optimizer(engine: Engine) -> Any:
    return engine.zero.optimizer if isinstance(engine, DeepSpeedEngine) else engine.optimizer  # type: ignore[attr-defined]


def _flats(engine: Engine) -> list[torch.Tensor]:
    """The float32 weights that this rank owns, as the optimiser holds them; of replicas rank 0 owns all."""
    if isinstance(engine, DeepSpeedEngine):
        zero = engine.zero
        return list(zero.fp32_partitioned_groups_flat if engine.stage == 3 else zero.single_partition_of_fp32_groups)
    return list(engine.trained.values()) if dist.rank() == 0 else []


def _of_kind(engine: Engine, flat: torch.Tensor, kind: str) -> torch.Tensor:
    held: torch.Tensor = flat.detach() if kind == "weights" else _optimizer(engine).state[flat][kind]
    return held.reshape(-1)


def _places(engine: Engine) -> dict[str, Place]:
    if not isinstance(engine, DeepSpeedEngine):
        trained = enumerate(engine.trained.items())
        return {name: Place(group, 0, p.numel(), tuple(p.shape), in_every_row=False) for group, (name, p) in trained}
    if engine.stage == 3:
        return {name: _place_in_shards(engine.zero, parameter) for name, parameter in engine.trained.items()}
    names = {id(parameter): name for name, parameter in engine.trained.items()}
    return {
        names[id(parameter)]: Place(group, start, parameter.numel(), tuple(parameter.shape), in_every_row=False)
        for group, parameters in enumerate(engine.zero.round_robin_bit16_groups)
        for parameter, start in zip(parameters, engine.zero.round_robin_bit16_offsets[group], strict=True)
    }


def _place_in_shards(zero: Any, parameter: Any) -> Place:
    group, start, length = zero.grad_position[zero.get_param_id(parameter)]
    return Place(group, int(start), int(length), tuple(parameter.ds_shape), in_every_row=True)

"""What ZeRO-3 sends in a training step, counted for any number of ranks in one CPU process.

Real DeepSpeed, bitsandbytes and PEFT modules inside our engine, on torch's fake process group, which answers every collective at
once. Gathered weights are copies of this rank's shard: counts and bytes mean something here, values don't, time doesn't.

The model is Llama-3.1-70B made small: 8 layers for 80, and each DeepSpeed setting that counts elements shrunk like a layer.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any

import torch
import torch.distributed as c10d

from hybrid_scale.config import RunConfig, validate
from hybrid_scale.model.load import load_embedder
from hybrid_scale.model.tiny import write_model
from hybrid_scale.train import engine as engine_module
from tests.ranks import ROOT, run_ranks

LAYERS, HIDDEN, HEADS = 8, 256, 8
LAYER_ELEMENTS = (2 * HIDDEN * HIDDEN + 2 * HIDDEN * HIDDEN // 2 + 3 * HIDDEN * 3 * HIDDEN) // 4
"""A layer's 4-bit weights, four to an element of the stored type: q, o; k and v of half the heads; an MLP of width 3 x HIDDEN."""
LAYER_ELEMENTS_70B = (2 * 8192 * 8192 + 2 * 8192 * 1024 + 3 * 8192 * 28672) // 4
SHRINK = LAYER_ELEMENTS / LAYER_ELEMENTS_70B
VOCABULARY = round(128256 * 8192 * SHRINK / HIDDEN)
LORA_RANK = 1
"""Keeps every adapter below the shrunk persistence threshold and every 4-bit weight above it, as rank 16 does at 70B."""
ELEMENT_COUNTS = (
    *("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold"),
    *("stage3_max_live_parameters", "stage3_max_reuse_distance"),
)
PHASES = ("embed", "forward", "backward", "step", "evaluate")
SCHEDULES = ("direct", "direct, 2 graphs", "two_pass", "kept")


@dataclass(frozen=True)
class Case:
    """A fake world and an engine in it."""

    world: int
    shard_group: int | None = None
    """GPUs that share one copy of the weights (hpZ); None: all."""
    checkpointing: bool = True
    own_records: bool = True
    """False: DeepSpeed alone, without our `ShardedPasses`."""
    schedules: tuple[str, ...] = SCHEDULES
    steps: int = 3
    """Of each schedule, in a row."""


@dataclass
class Phase:
    """The traffic of one pass (or of one optimiser step) on this rank."""

    name: str
    gathers: int = 0
    weights: float = 0.0
    """Bytes gathered, in units of all 4-bit weights of the model."""
    embeddings: float = 0.0
    """... of the embedding table."""
    adapters: float = 0.0
    """... of all adapters."""
    reduced: float = 0.0
    """Bytes of gradients handed to reduce-scatter, in units of all adapters."""
    groups: dict[int, int] = field(default_factory=dict)
    """Bytes gathered by the size of the process group."""
    live: float = 0.0
    """Most 4-bit weights whole (or on their way) on this rank when a gather starts, in units of all of them. As DeepSpeed
    counts: without checkpointing, bitsandbytes keeps what DeepSpeed lets go until the backward pass."""


Step = list[Phase]


class Calls:
    """Records collectives by phase; installed over the functions of torch.distributed before DeepSpeed takes them."""

    def __init__(self) -> None:
        self.made: list[tuple[str, int, int, torch.dtype]] = []
        self.live: Callable[[], int] = lambda: 0
        self.most_live = 0
        for name, (position, key) in {
            "all_gather_into_tensor": (0, "output_tensor"),
            "reduce_scatter_tensor": (1, "input"),
            "all_reduce": (0, "tensor"),
            "all_gather": (0, "tensor_list"),
            "broadcast": (0, "tensor"),
        }.items():
            self._wrap(name, position, key)

    def _wrap(self, name: str, position: int, key: str) -> None:
        original = getattr(c10d, name)

        @wraps(original)
        def counted(*args: Any, **options: Any) -> Any:
            given = args[position] if len(args) > position else options[key]
            tensors = given if isinstance(given, list) else [given]
            size = sum(t.numel() * t.element_size() for t in tensors)
            world = c10d.get_world_size(options.get("group"))
            self.made.append((name, size, world, tensors[0].dtype))
            if name == "all_gather_into_tensor":
                self.most_live = max(self.most_live, self.live())
                shard = args[1] if len(args) > 1 else options["input_tensor"]
                given.view(world, -1).copy_(shard.detach().clone().view(1, -1))
            return original(*args, **options)

        setattr(c10d, name, counted)


def deepspeed_file(folder: Path) -> Path:
    """ds_configs/zero_auto.json with its element counts shrunk to this model."""
    tree: dict[str, Any] = json.loads((ROOT / "ds_configs" / "zero_auto.json").read_text())
    zero = tree["zero_optimization"]
    zero.update({key: round(zero[key] * SHRINK) for key in ELEMENT_COUNTS}, overlap_comm=False)
    path = folder / "traffic.json"
    path.write_text(json.dumps(tree))
    return path


def run_config(case: Case, folder: Path) -> RunConfig:
    model = {"base": str(folder / "model"), "quantization": "nf4", "lora": {"rank": LORA_RANK}}
    training = {"engine": "deepspeed", "deepspeed": str(deepspeed_file(folder)), "shard_group": case.shard_group or case.world}
    return validate(
        RunConfig,
        {
            "run": {"directory": str(folder / "run")},
            "data": {"train": "none"},
            "model": {**model, "gradient_checkpointing": case.checkpointing},
            "training": {**training, "max_steps": 1},
        },
        "traffic",
    )


def micro_batch(texts: int, tokens: int) -> dict[str, torch.Tensor]:
    """Packed texts of equal length."""
    return {"input_ids": torch.randint(VOCABULARY, (1, texts * tokens)), "lengths": torch.full((texts,), tokens)}


class Meter:
    """An engine in a fake world, and the phases of its steps."""

    def __init__(self, case: Case, folder: Path):
        from torch.testing._internal.distributed.fake_pg import FakeStore

        self.calls = Calls()
        c10d.init_process_group("fake", rank=0, world_size=case.world, store=FakeStore())
        write_model(folder / "model", VOCABULARY, HIDDEN, LAYERS, HEADS)
        config = run_config(case, folder)
        self.embedder = load_embedder(config.model, 0)
        named = dict(self.embedder.named_parameters())
        bases = {name: p for name, p in named.items() if name.endswith("base_layer.weight")}
        self.weights = sum(p.numel() * p.element_size() for p in bases.values())
        self.adapters = sum(p.numel() * p.element_size() for p in named.values() if p.requires_grad)
        (self.embedding,) = (p.numel() * p.element_size() for name, p in named.items() if "embed_tokens" in name)
        if not case.own_records:
            engine_module.ShardedPasses = lambda zero: None  # type: ignore[assignment,misc]
        self.engine = engine_module.make_engine(config, engine_module.make_accelerator(config, folder), self.embedder)
        self.calls.live = lambda: sum(
            p.ds_numel * p.element_size()
            for p in bases.values()
            if p.ds_status.name != "NOT_AVAILABLE"  # type: ignore[attr-defined]
        )
        self.phases: list[Phase] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start, self.calls.most_live = len(self.calls.made), 0
        yield
        calls = self.calls.made[start:]
        gathers = [(size, world, dtype) for kind, size, world, dtype in calls if kind.startswith("all_gather")]
        groups: Counter[int] = Counter()
        for size, world, _ in gathers:
            groups[world] += size
        stored = [size for size, _, dtype in gathers if dtype == torch.bfloat16]
        tables = stored.count(self.embedding)  # never part of a larger gather: the table exceeds max_live_parameters
        self.phases.append(
            Phase(
                name,
                gathers=len(gathers),
                weights=(sum(stored) - tables * self.embedding) / self.weights,
                embeddings=float(tables),
                adapters=sum(size for size, _, dtype in gathers if dtype == torch.float32) / self.adapters,
                reduced=sum(size for kind, size, _, _ in calls if kind == "reduce_scatter_tensor") / self.adapters,
                groups=dict(groups),
                live=self.calls.most_live / self.weights,
            )
        )

    def embed(self, batches: list[dict[str, torch.Tensor]], name: str = "embed") -> None:
        with torch.no_grad():
            for batch in batches:
                with self.phase(name):
                    self.engine.embed(batch)

    def forward(self, batches: list[dict[str, torch.Tensor]]) -> list[torch.Tensor]:
        embedded = []
        for batch in batches:
            with self.phase("forward"):
                embedded.append(self.engine.embed(batch))
        return embedded

    def backward(self, embedded: list[torch.Tensor], last: bool) -> None:
        for number, vectors in enumerate(embedded, 1):
            with self.phase("backward"):
                self.engine.backward(vectors.sum(), last and number == len(embedded))

    def second_pass(self, batches: list[dict[str, torch.Tensor]]) -> None:
        for number, batch in enumerate(batches, 1):
            self.backward(self.forward([batch]), last=number == len(batches))

    def take(self, schedule: str) -> Step:
        """One optimiser step of a schedule, then one pass of an evaluation."""
        self.phases = []
        small, large = micro_batch(2, 12), micro_batch(5, 12)
        match schedule:
            case "direct":
                self.backward(self.forward([small]), last=True)
            case "direct, 2 graphs":
                self.backward(self.forward([small] * 2), last=True)
            case "two_pass":
                self.embed([large] * 2)
                self.second_pass([small] * 2)
            case "kept":
                self.embed([large])
                self.backward(self.forward([small] * 2), last=False)
                self.second_pass([small])
        with self.phase("step"):
            self.engine.step(1e-3)
        self.embedder.eval()
        self.embed([large], "evaluate")
        self.embedder.train()
        return self.phases


def count_here(case: Case, folder: str) -> dict[str, list[Step]]:
    """Each schedule for some steps in a row on one engine, in this process."""
    meter = Meter(case, Path(folder))
    return {schedule: [meter.take(schedule) for _ in range(case.steps)] for schedule in case.schedules}


def count(case: Case, folder: Path) -> dict[str, list[Step]]:
    """The same in a process of its own that takes itself for rank 0 of `case.world`."""
    environment = {"WORLD_SIZE": str(case.world), "LOCAL_WORLD_SIZE": str(min(case.world, 8))}
    return run_ranks(count_here, 1, case, str(folder), environment=environment)[0]


def total(step: Step, name: str | None = None) -> Phase:
    """The sum over a step's passes of one name, or over all that belong to training; `live` is their largest."""
    chosen = [p for p in step if (p.name == name if name else p.name != "evaluate")]
    groups: Counter[int] = Counter()
    for phase in chosen:
        groups.update(phase.groups)
    return Phase(
        name or "all",
        gathers=sum(p.gathers for p in chosen),
        weights=sum(p.weights for p in chosen),
        embeddings=sum(p.embeddings for p in chosen),
        adapters=sum(p.adapters for p in chosen),
        reduced=sum(p.reduced for p in chosen),
        groups=dict(groups),
        live=max((p.live for p in chosen), default=0.0),
    )

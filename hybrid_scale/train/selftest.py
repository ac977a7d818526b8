"""Do the ranks of a cluster compute what they must? Collectives, network, 4-bit weights, attention and one step under ZeRO-3.

Needs no data and no model: a tiny random decoder and made-up texts. Each finding compares with numbers worked out apart: whole
numbers for collectives, the CPU's kernels for 4 bits and attention, a replica on each rank for the step. Changes nothing.
"""

import json
import socket
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers.utils import is_flash_attn_2_available

from hybrid_scale import dist, gpu, versions
from hybrid_scale.config import ModelSettings, RunConfig, validate
from hybrid_scale.data.partition import Budget, Plan, partition
from hybrid_scale.errors import RunError
from hybrid_scale.model.embedder import Embedder
from hybrid_scale.model.load import load_embedder
from hybrid_scale.model.nf4 import round_trip
from hybrid_scale.model.tiny import write_model
from hybrid_scale.train.engine import Engine, PlainEngine, make_accelerator, make_engine, read_deepspeed_config
from hybrid_scale.train.gradcache import Share, forward_backward
from hybrid_scale.train.loss import Targets

ZERO3 = Path(__file__).resolve().parent.parent.parent / "ds_configs" / "zero3.json"
VOCABULARY = 100
TYPES = (torch.float32, torch.bfloat16, torch.uint8, torch.int64)
"""What ranks send each other: embeddings, weights, quantisation state, counts."""


@dataclass(frozen=True)
class Finding:
    """What one rank found."""

    what: str
    good: bool
    said: str


def report() -> str:
    """All checks on all ranks, for a person. Collective. Raises RunError that lists what is wrong."""
    untried = versions.check(versions.TRIED)
    with tempfile.TemporaryDirectory() as name:
        _tiny_model(Path(name) / "model")
        mine = [collectives(), side_group(), network(), four_bits(), *attention(Path(name)), zero3_step(Path(name))]
    ranks = dist.gather_objects((socket.gethostname(), gpu.label(), mine))
    lines = [f"warning: {warning}" for warning in untried]
    lines += [f"rank {rank} ({host}): {label}" for rank, (host, label, _) in enumerate(ranks)]
    faults = []
    for number, finding in enumerate(mine):
        of_ranks = [findings[number] for _, _, findings in ranks]
        bad = [f"rank {rank}: {found.what}: {found.said}" for rank, found in enumerate(of_ranks) if not found.good]
        faults += bad
        lines.append(f"{'WRONG' if bad else 'good '} {finding.what}: {of_ranks[0].said}")
    if faults:
        raise RunError("\n".join([*lines, f"{len(faults)} checks failed:", *faults]))
    return "\n".join(lines)


def _tiny_model(folder: Path) -> None:
    """Rank 0's random decoder, in a folder of this rank: transformers writes on one rank, and nodes share no /tmp."""

    def made() -> dict[str, bytes]:
        with tempfile.TemporaryDirectory() as name:
            write_model(Path(name), VOCABULARY, hidden=128, layers=2, heads=4)
            return {path.name: path.read_bytes() for path in Path(name).iterdir()}

    folder.mkdir()
    for name, content in dist.first_rank_does(made).items():
        (folder / name).write_bytes(content)


# -------------------------------------------------------------------------------------------------------------- the network


def collectives() -> Finding:
    """Every collective that training uses, on whole numbers whose result is known."""
    world, rank, device = dist.world_size(), dist.rank(), dist.device()
    wrong = []
    for dtype in TYPES:
        joined = torch.arange(world, device=device).repeat_interleave(2)[:, None].to(dtype)
        if not torch.equal(dist.join_rows(joined[2 * rank : 2 * rank + 2], 2), joined):
            wrong.append(f"all-gather of {dtype}")
        if not torch.equal(dist.sum_rows(joined), joined[2 * rank : 2 * rank + 2] * world):
            wrong.append(f"reduce-scatter of {dtype}")
        if not torch.equal(dist.broadcast_(torch.full_like(joined, rank), world - 1), torch.full_like(joined, world - 1)):
            wrong.append(f"broadcast of {dtype}")
    if dist.max_int(rank) != world - 1 or dist.flags(rank == 0) != [True] + [False] * (world - 1):
        wrong.append("all-reduce")
    if dist.gather_objects(rank) != list(range(world)):
        wrong.append("all-gather of objects")
    return Finding("collectives", not wrong, ", ".join(wrong) or f"{world} ranks over {dist.backend()}")


def side_group() -> Finding:
    """The group of checkpoints: gloo, host memory."""
    rows = dist.SideGroup().gather(torch.tensor([dist.rank()]))
    good = rows is None or rows.flatten().tolist() == list(range(dist.world_size()))
    return Finding("checkpoint group", good, "gloo, beside the training" if good else f"rank 0 got {rows}")


def network() -> Finding:
    """Bytes a second that a rank receives in an all-gather; no limit is set, as nobody knows yours."""
    each, repeats = (2**26 if gpu.present() else 2**20), 5
    row = torch.zeros(each // 4, 1, device=dist.device())
    dist.join_rows(row, len(row))
    gpu.synchronize()
    started = time.monotonic()
    for _ in range(repeats):
        dist.join_rows(row, len(row))
    gpu.synchronize()
    rate = repeats * each * (dist.world_size() - 1) / (time.monotonic() - started)
    return Finding("network", True, f"{rate / 1e9:.1f} GB/s received a rank, {each / 2**20:.0f} MiB from each of the others")


# -------------------------------------------------------------------------------------------------------------- the kernels


def four_bits() -> Finding:
    """NF4 of random weights and back, here and on the CPU. Kernels may break a tie differently; no more than that."""
    weights = torch.randn(2**18, generator=torch.Generator().manual_seed(0)).bfloat16()
    here, there = round_trip(weights.to(dist.device())).cpu(), round_trip(weights)
    differing = float((here != there).float().mean())
    return Finding("4-bit weights", differing < 1e-3, f"{differing:.1e} of them differ from the CPU's")


def attention(folder: Path) -> list[Finding]:
    """Texts end to end on this device, against padded ones on the CPU in float32: cosine of the embeddings."""
    lengths = torch.tensor([17, 5, 64, 33, 2])
    ids = torch.randint(1, VOCABULARY, (int(lengths.sum()),), generator=torch.Generator().manual_seed(1))
    padded = torch.nn.utils.rnn.pad_sequence(list(ids.split(lengths.tolist())), batch_first=True)
    mask = (torch.arange(padded.shape[1]) < lengths[:, None]).long()
    with torch.no_grad():
        expected = _embedder(folder, "sdpa", "float32")(input_ids=padded, attention_mask=mask)
    ways = [("packed", "float32", 1e-5), ("packed", "bfloat16", 1e-2)]
    if gpu.present() and is_flash_attn_2_available():
        ways.append(("flash_attention_2", "bfloat16", 1e-2))
    findings = []
    for implementation, dtype, tolerance in ways:
        embedder = _embedder(folder, implementation, dtype).to(dist.device())
        with torch.no_grad():
            found = embedder(input_ids=ids[None].to(dist.device()), lengths=lengths).cpu()
        off = float(1 - (found * expected).sum(1).min())
        said = f"embeddings within {off:.1e} of padded ones (1 - cosine)"
        findings.append(Finding(f"attention, {implementation}, {dtype}", off < tolerance, said))
    return findings


def _embedder(folder: Path, implementation: str, dtype: str) -> Embedder:
    """The tiny model; its adapter does nothing yet."""
    tree = {"base": str(folder / "model"), "attention_implementation": implementation, "dtype": dtype, "lora": {"rank": 1}}
    return load_embedder(validate(ModelSettings, tree, "selftest"), seed=0).eval()


# ----------------------------------------------------------------------------------------------------------------- the step


def zero3_step(folder: Path) -> Finding:
    """One step of QLoRA under ZeRO-3, cached gradients and kept graphs mixed, against the same with a replica a rank."""
    what = "a step of QLoRA under ZeRO-3"
    if not dist.launched():
        return Finding(what, True, "left out: start this with accelerate launch")
    config = _run(folder)
    shards = read_deepspeed_config(config) if dist.world_size() > 1 else None
    embedders = [load_embedder(config.model, 0, shards=way) for way in (None, shards)]
    for embedder in embedders:  # an adapter that does something: as it starts, half of its gradients are zero
        for parameter in embedder.parameters():
            if parameter.requires_grad:
                parameter.data += torch.linspace(-0.1, 0.1, parameter.numel(), device=parameter.device).view_as(parameter)
    engines = [PlainEngine(embedders[0], config.optimizer), make_engine(config, make_accelerator(config, folder), embedders[1])]
    (loss, norm), (sharded_loss, sharded_norm) = (_step(engine, config) for engine in engines)
    off = max(abs(sharded_loss / loss - 1), abs(sharded_norm / norm - 1))
    said = f"loss {sharded_loss:.5f}, gradient norm {sharded_norm:.4f}, within {off:.1e} of a replica's"
    return Finding(what, off < 1e-3, said)


def _run(folder: Path) -> RunConfig:
    """NF4 + LoRA in float32; nothing small enough to stay whole on each rank."""
    zero = json.loads(ZERO3.read_text(encoding="utf-8"))
    zero["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    (folder / "zero3.json").write_text(json.dumps(zero), encoding="utf-8")
    tree = {
        "run": {"name": "selftest", "directory": str(folder / "run")},
        "data": {"train": str(folder)},
        "model": {"base": str(folder / "model"), "quantization": "nf4", "dtype": "float32", "lora": {"rank": 4}},
        "optimizer": {"learning_rate": 1e-3, "max_gradient_norm": 0.0},
        "training": {"deepspeed": str(folder / "zero3.json"), "max_steps": 1},
    }
    return validate(RunConfig, tree, "selftest")


def _step(engine: Engine, config: RunConfig) -> tuple[float, float]:
    pairs = 8 * dist.world_size()
    generator = torch.Generator().manual_seed(2)
    lengths = torch.randint(2, 48, (2 * pairs,), generator=generator)
    texts = [torch.randint(1, VOCABULARY, (int(length),), generator=generator) for length in lengths]
    plan = partition(lengths.numpy(), dist.world_size(), Budget(micro_batch=128, kept=128, embedding=256))
    loss = forward_backward(engine, _share(plan, texts).to(dist.device()), plan, _targets(pairs), config.loss)
    return loss, engine.step(config.optimizer.learning_rate)


def _share(plan: Plan, texts: list[torch.Tensor]) -> Share:
    def batch(numbers: list[int]) -> dict[str, torch.Tensor]:
        held = [texts[number] for number in numbers] or [torch.tensor([0])]
        return {"input_ids": torch.cat(held)[None], "lengths": torch.tensor([len(text) for text in held])}

    mine = [numbers.tolist() for numbers in plan.micro_batches[dist.rank()]]
    joined = [[text for number in rounds for text in mine[number]] for rounds in plan.embedding_batches]
    counts, joined_counts = [len(numbers) for numbers in mine], [len(numbers) for numbers in joined]
    return Share([batch(numbers) for numbers in mine], counts, [batch(numbers) for numbers in joined], joined_counts)


def _targets(pairs: int) -> Targets:
    """Text n is the query, text pairs + n the passage of row n; all in one pool."""
    numbers = torch.arange(pairs, device=dist.device())
    hard = torch.zeros(pairs, dtype=torch.bool, device=dist.device())
    return Targets([0, pairs], [0, pairs], numbers, numbers, numbers, numbers + pairs, numbers, hard)

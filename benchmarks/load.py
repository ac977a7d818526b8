"""Memory and time of loading a QLoRA base on the ranks of a ZeRO-3 run: transformers' load, ours from bfloat16, ours from 4 bits.

    python benchmarks/load.py [--gigabytes 0.5] [--ranks 2 4] [--json OUT.json]
    python benchmarks/load.py --shapes          # bytes a rank of Llama-3-70B and Qwen2.5-72B, from the code that lays them out

A random Llama (2,048 wide, no pretrained weights) as a bfloat16 checkpoint of four files or more in a temporary folder on disk.
Each load runs on W gloo processes of one thread, forked from a server that has imported the libraries. Memory: anonymous
resident memory (RssAnon, sampled every 2 ms) above that just before the load; glibc returns freed blocks above 256 KiB at once.
`share` is what a rank must hold afterwards: its part of the packed and the other weights, and the quantisation state, which
bitsandbytes keeps whole. Peaks of `prepare` include DeepSpeed's own buffers. Adapters are of rank 1 on one projection.
"""

import argparse
import json
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import _environment  # noqa: F401 (before the heavy libraries)

os.environ.update({"MALLOC_MMAP_THRESHOLD_": "262144", "MALLOC_TRIM_THRESHOLD_": "262144"})  # read by glibc of the server
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

import torch
from _ranks import machine, run_ranks
from safetensors.torch import save_file
from transformers import AutoConfig, LlamaConfig, Qwen2Config

from hybrid_scale import dist
from hybrid_scale.config import RunConfig, validate
from hybrid_scale.model import nf4, quantize, skeleton, stream, weight_files

RESULTS = Path(__file__).parent / "results" / "load.json"
ZERO3 = Path(__file__).parent.parent / "ds_configs" / "zero3.json"
SHAPE = {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 16, "num_key_value_heads": 4}
VOCABULARY = 16_000
FILES = 4
MB = 1e6
ALLOWANCE_MB = 300
"""Goal of the streamed load: share + the largest layer in bfloat16 + this."""
SYSTEMS = {"stock": "transformers", "streamed": "ours, from bfloat16", "written": "ours, from 4 bits"}


# ------------------------------------------------------------------------------------------------------------ checkpoint


def write_checkpoint(folder: Path, gigabytes: float) -> LlamaConfig:
    """A random causal Llama of about that size, layer by layer; its head, which no embedding needs, counts."""
    hidden, inner = SHAPE["hidden_size"], SHAPE["intermediate_size"]
    narrow = hidden * SHAPE["num_key_value_heads"] // SHAPE["num_attention_heads"]
    sizes = {
        **{f"self_attn.{n}_proj": (rows, hidden) for n, rows in {"q": hidden, "k": narrow, "v": narrow, "o": hidden}.items()},
        **{"mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner)},
    }
    of_layer = 2 * sum(rows * columns for rows, columns in sizes.values())
    layers = max(FILES, round((gigabytes * 1e9 - 2 * 2 * VOCABULARY * hidden) / of_layer))
    config = LlamaConfig(**SHAPE, num_hidden_layers=layers, vocab_size=VOCABULARY, architectures=["LlamaForCausalLM"])
    config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    where: dict[str, str] = {}
    for file in range(FILES):
        held = {}
        for layer in range(file * layers // FILES, (file + 1) * layers // FILES):
            for name, size in sizes.items():
                held[f"model.layers.{layer}.{name}.weight"] = _random(size, generator)
            for name in ("input_layernorm", "post_attention_layernorm"):
                held[f"model.layers.{layer}.{name}.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
        if file == 0:
            held["model.embed_tokens.weight"] = _random((VOCABULARY, hidden), generator)
        if file == FILES - 1:
            held["model.norm.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
            held["lm_head.weight"] = _random((VOCABULARY, hidden), generator)
        name = f"model-{file + 1:05d}-of-{FILES:05d}.safetensors"
        save_file(held, folder / name, metadata={"format": "pt"})
        where.update(dict.fromkeys(held, name))
    (folder / weight_files.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return config


def _random(shape: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float32).mul_(0.02).to(torch.bfloat16)


# ------------------------------------------------------------------------------------------------------------- measuring


class Peak:
    """Largest RssAnon of this process while it runs, MB."""

    def __init__(self) -> None:
        self.highest, self.running = 0.0, True
        self.file = os.open("/proc/self/status", os.O_RDONLY)
        self.thread = threading.Thread(target=self._watch, daemon=True)

    def now(self) -> float:
        text = os.pread(self.file, 4096, 0)
        return int(text[text.index(b"RssAnon:") + 8 :].split(None, 1)[0]) * 1024 / MB

    def _watch(self) -> None:
        while self.running:
            self.highest = max(self.highest, self.now())
            time.sleep(0.002)


@contextmanager
def measured(report: dict[str, float], key: str, base: float) -> Iterator[None]:
    """Peak and final memory above `base`, seconds and CPU-seconds of what runs inside."""
    peak = Peak()
    peak.thread.start()
    wall, cpu = time.monotonic(), time.process_time()
    yield
    report[f"{key}_s"], report[f"{key}_cpu_s"] = time.monotonic() - wall, time.process_time() - cpu
    peak.running = False
    peak.thread.join()
    after = peak.now()
    report[f"{key}_peak_mb"], report[f"{key}_after_mb"] = max(peak.highest, after) - base, after - base


def load_on_this_rank(tree: str, streamed: bool) -> dict[str, float]:
    """One load and the engine around it. Imports are over before the first figure is taken."""
    import deepspeed
    import deepspeed.runtime.zero.muon.muon_optimizer  # by DeepSpeed's engine: half a second

    from hybrid_scale.model.load import load_embedder
    from hybrid_scale.train.engine import make_accelerator, make_engine, read_deepspeed_config

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    config = RunConfig.model_validate_json(tree)
    dist.start()
    shards = read_deepspeed_config(config) if streamed else None
    report: dict[str, float] = {}
    base = Peak().now()
    dist.barrier()
    with measured(report, "load", base):
        embedder = load_embedder(config.model, 0, shards=shards)
    dist.barrier()
    accelerator = make_accelerator(config, Path(config.run.directory))
    with measured(report, "prepare", base):
        make_engine(config, accelerator, embedder)
    return report


def run_config(base: Path, folder: Path) -> str:
    tree: dict[str, Any] = {
        "run": {"directory": str(folder / "run")},
        "data": {"train": "none"},
        "model": {"base": str(base), "quantization": "nf4", "lora": {"rank": 1, "targets": ["q_proj"]}},
        "training": {"max_steps": 1, "deepspeed": str(ZERO3)},
    }
    return validate(RunConfig, tree, "benchmark").model_dump_json()


def measure(folder: Path, config: LlamaConfig, worlds: list[int]) -> list[dict[str, Any]]:
    rows = []
    slots = nf4.slots_of(skeleton.make_skeleton(config, torch.bfloat16, "sdpa", four_bit=True))
    for world in worlds:
        share = stream.share_bytes(slots, torch.bfloat16, world)
        ideal = sum(share[key] for key in ("4-bit weights", "other weights", "quantisation state")) / MB
        for system in SYSTEMS:
            base = folder / ("nf4" if system == "written" else "model")
            ranks = run_ranks(load_on_this_rank, world, run_config(base, folder), system != "stock")
            worst = {key: max(rank[key] for rank in ranks) for key in ranks[0]}
            worst["load_cpu_s"] = sum(rank["load_cpu_s"] for rank in ranks) / world
            rows.append({"system": system, "ranks": world, "share_mb": ideal, **worst})
            show_row(rows[-1])
    return rows


HEAD = ("load", "ranks", "share", "peak", "peak/share", "after", "prepare peak", "after", "seconds", "CPU-s a rank")


def show_row(row: dict[str, Any]) -> None:
    values = [row["share_mb"], row["load_peak_mb"], row["load_peak_mb"] / row["share_mb"], row["load_after_mb"]]
    values += [row["prepare_peak_mb"], row["prepare_after_mb"], row["load_s"], row["load_cpu_s"]]
    digits = (0, 0, 2, 0, 0, 0, 1, 1)
    cells = "".join(f"{value:>14.{n}f}" for value, n in zip(values, digits, strict=True))
    print(f"{SYSTEMS[row['system']]:>20}{row['ranks']:>7}{cells}", flush=True)


def goals(rows: list[dict[str, Any]], largest_layer_mb: float) -> list[dict[str, Any]]:
    """What was aimed at, and whether it is met."""
    found = {(row["system"], row["ranks"]): row for row in rows}
    worlds = sorted({row["ranks"] for row in rows})
    lines = []
    for world in worlds:
        streamed, written = found["streamed", world], found["written", world]
        limit = streamed["share_mb"] + largest_layer_mb + ALLOWANCE_MB
        lines.append(("streamed peak, MB", world, streamed["load_peak_mb"], limit, True))
        lines.append(("written peak / share", world, written["load_peak_mb"] / written["share_mb"], 1.1, True))
    last = worlds[-1]
    faster = found["stock", last]["load_s"] / found["streamed", last]["load_s"]
    lines.append(("stock seconds / streamed", last, faster, 2.0, False))
    return [
        {"goal": name, "ranks": world, "found": value, "limit": limit, "met": value <= limit if below else value >= limit}
        for name, world, value, limit, below in lines
    ]


# ---------------------------------------------------------------------------------------------------------------- shapes


LARGE = {
    "Llama-3-70B": LlamaConfig(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=128256,
    ),
    "Qwen2.5-72B": Qwen2Config(
        hidden_size=8192,
        intermediate_size=29568,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=152064,
    ),
}


WIDTHS = (10, 10, 10, 10, 12, 17)


def shapes(worlds: list[int]) -> list[dict[str, Any]]:
    """Bytes a rank of large models, from the layout that a load follows."""
    rows = []
    heads = ("4-bit", "others", "state", "share", "in passing", "whole in 4 bits")
    print(f"{'GB a rank':>14}{'ranks':>7}" + "".join(f"{head:>{width}}" for head, width in zip(heads, WIDTHS, strict=True)))
    for name, config in LARGE.items():
        slots = nf4.slots_of(skeleton.make_skeleton(config, torch.bfloat16, "sdpa", four_bit=True))
        one = stream.share_bytes(slots, torch.bfloat16, 1)
        one.pop("largest weight in passing")
        for world in worlds:
            share = stream.share_bytes(slots, torch.bfloat16, world)
            passing = share.pop("largest weight in passing")
            row = {**share, "share": sum(share.values()), "in passing": passing, "whole": sum(one.values())}
            cells = "".join(f"{value / 1e9:>{width}.2f}" for value, width in zip(row.values(), WIDTHS, strict=True))
            print(f"{name:>14}{world:>7}{cells}")
            rows.append({"model": name, "ranks": world, **row})
    return rows


# -------------------------------------------------------------------------------------------------------------------- main


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=0.5, help="size of the bfloat16 checkpoint")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--shapes", action="store_true", help="only lay out large models on 8, 16 and 64 ranks")
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--folder", type=Path, help="where the temporary checkpoint is made; default: the system's")
    given = parser.parse_args()
    results = json.loads(given.json.read_text()) if given.json.exists() else {}
    if given.shapes:
        results["shapes"] = shapes([8, 16, 64])
    else:
        results["loads"] = loads(given)
    given.json.parent.mkdir(parents=True, exist_ok=True)
    given.json.write_text(json.dumps(results, indent=1) + "\n")


def loads(given: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        folder = Path(name)
        write_checkpoint(folder / "model", given.gigabytes)
        config = AutoConfig.from_pretrained(folder / "model")
        started, cpu = time.monotonic(), time.process_time()
        torch.set_num_threads(1)
        quantize.quantize(str(folder / "model"), folder / "nf4", "bfloat16")
        once = {"seconds": time.monotonic() - started, "cpu_s": time.process_time() - cpu}
        size = sum(path.stat().st_size for path in (folder / "model").glob("*.safetensors")) / 1e9
        print(f"{size:.2f} GB in bfloat16, {config.num_hidden_layers} layers; written in 4 bits in {once['seconds']:.1f} s")
        print(f"{HEAD[0]:>20}{HEAD[1]:>7}" + "".join(f"{head:>14}" for head in HEAD[2:]) + "   (MB; largest of the ranks)")
        rows = measure(folder, config, given.ranks)
    largest = 2 * config.hidden_size * max(config.intermediate_size, config.vocab_size) / MB
    met = goals(rows, largest)
    for line in met:
        verdict = "met" if line["met"] else "MISSED"
        print(f"{line['goal']:>28} on {line['ranks']} ranks: {line['found']:.2f}, goal {line['limit']:.2f}: {verdict}")
    return {"machine": machine(), "gigabytes": size, "quantise_once": once, "rows": rows, "goals": met}


if __name__ == "__main__":
    main()

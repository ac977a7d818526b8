"""One loss curve on 1, 2 and 4 ranks: the same 50 steps with other micro-batches, schedules and ZeRO stages each time.

    python benchmarks/invariance.py [--steps 50] [--json FILE] [--picture FILE]

Demo data and a tiny random decoder (made in a temporary folder), through the door that users take: accelerate launch
launch/train.py. Prints the largest difference of the losses to one process, keeps the curves, draws them.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
PRECISIONS = {
    "float32": {"model.dtype": "float32"},
    "NF4 + bfloat16": {"model.dtype": "bfloat16", "model.quantization": "nf4"},
    "bfloat16": {"model.dtype": "bfloat16"},
}
WAYS = {
    "1 rank, plain, one micro-batch": (1, {"training.engine": "plain", "training.max_tokens_per_micro_batch": 100_000}),
    "2 ranks, ZeRO-3, two passes": (
        2,
        {
            "training.deepspeed": "ds_configs/zero3.json",
            "training.max_tokens_per_micro_batch": 512,
            "training.passes": "two_pass",
        },
    ),
    "4 ranks, ZeRO-2, some graphs kept": (
        4,
        {
            "training.deepspeed": "ds_configs/zero2.json",
            "training.max_tokens_per_micro_batch": 256,
            "training.max_kept_tokens": 512,
        },
    ),
}
COMMON = {
    **{"data.max_query_tokens": 32, "data.max_passage_tokens": 64, "sampler.global_batch": 64, "sampler.pool_rows": 16},
    **{"loss.temperature": 0.05, "optimizer.learning_rate": 3e-3, "optimizer.warmup_steps": 5},
    **{"model.gradient_checkpointing": True, "model.pooling": "mean", "model.lora.rank": 8},
}
COLOURS, WIDTHS = ("#0068a8", "#c24f00", "#007a5c"), (6.0, 3.2, 1.2)


def call(*command: str) -> None:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr}")


def train(folder: Path, name: str, world: int, settings: dict[str, object]) -> list[dict[str, Any]]:
    """A run's records, one a step."""
    config = folder / "config.yaml"
    config.write_text(f"data: {{train: {folder / 'data'}}}\nmodel: {{base: {folder / 'model'}}}\ntraining: {{max_steps: 1}}\n")
    given = {**COMMON, **settings, "run.directory": str(folder / name), "run.name": "invariance"}
    overrides = [f"{key}={value}" for key, value in given.items()]
    launcher = ["--num_machines", "1", "--num_processes", str(world), "--mixed_precision", "no", "--dynamo_backend", "no"]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--use_deepspeed", "--main_process_port", "0", *launcher]
    if world == 1:
        command = [sys.executable]
    call(*command, "launch/train.py", str(config), *overrides)
    return [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]


def draw(curves: dict[str, dict[str, list[float]]], path: Path) -> None:
    """Curves over one another, and below them how far they are from one process."""
    mpl.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "invariance", "axes.grid": True, "grid.alpha": 0.3}
    figure = Figure(figsize=(4.2 * len(curves), 5.4))
    axes = figure.subplots(2, len(curves), sharex=True, height_ratios=(2, 1))
    for column, (precision, ways) in enumerate(curves.items()):
        first = next(iter(ways.values()))
        for (way, losses), colour, width in zip(ways.items(), COLOURS, WIDTHS, strict=True):
            steps = range(1, len(losses) + 1)
            axes[0, column].plot(steps, losses, color=colour, linewidth=width, label=way)
            if losses is not first:
                apart = [max(abs(a - b), 1e-9) for a, b in zip(losses, first, strict=True)]
                axes[1, column].semilogy(steps, apart, color=colour, linewidth=1.2)
        axes[0, column].set_title(precision)
        axes[1, column].set_ylim(1e-9, 1.0)
        axes[1, column].set_xlabel("optimiser step")
    axes[0, 0].set_ylabel("loss")
    axes[0, 0].legend(frameon=False)
    axes[1, 0].set_ylabel("difference to 1 rank")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks/results/invariance.json")
    parser.add_argument("--picture", type=Path, default=ROOT / "benchmarks/results/invariance.svg")
    given = parser.parse_args()
    curves: dict[str, dict[str, list[float]]] = {}
    rows = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        call(
            sys.executable,
            "launch/prepare.py",
            "demo",
            "--split",
            "train",
            "--languages",
            "de,en,zh",
            "--out",
            str(folder / "data"),
        )
        size = ["--layers", "2", "--hidden", "64", "--vocabulary", "2000"]
        call(sys.executable, "launch/tiny_model.py", str(folder / "data"), *size, "--out", str(folder / "model"))
        for precision, model in PRECISIONS.items():
            curves[precision] = {}
            for way, (world, cut) in WAYS.items():
                settings = {**model, **cut, "training.max_steps": given.steps}
                records = train(folder, f"{precision}-{world}".replace(" ", ""), world, settings)
                losses = [float(record["loss"]) for record in records]
                curves[precision][way] = losses
                first = next(iter(curves[precision].values()))
                micro_batches = sorted({int(record["micro_batches"]) for record in records})
                schedules = sorted({str(record["schedule"]) for record in records})
                apart = max(abs(a - b) for a, b in zip(losses, first, strict=True))
                facts = {"precision": precision, "way": way, "micro_batches_a_rank": micro_batches, "schedules": schedules}
                rows.append({**facts, "first_loss": losses[0], "last_loss": losses[-1], "largest_difference": apart})
                cut_into = f"micro-batches {micro_batches}, {'/'.join(schedules)}"
                moved = f"loss {losses[0]:.4f} -> {losses[-1]:.4f}, largest difference {apart:.1e}"
                print(f"{precision:15} {way:34} {cut_into}: {moved}", flush=True)
    given.json.parent.mkdir(parents=True, exist_ok=True)
    given.json.write_text(json.dumps({"runs": rows, "losses": curves}, indent=1) + "\n")
    draw(curves, given.picture)
    print(given.json, given.picture)


if __name__ == "__main__":
    main()

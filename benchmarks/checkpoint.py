"""What a checkpoint costs the training: the share of its time for which a step waits, and what the write behind takes from steps.

    python benchmarks/checkpoint.py [--json benchmarks/results/checkpoint.json]

A random decoder in NF4 with LoRA under ZeRO-3 on two CPU processes of one thread, a checkpoint every few steps; adapters of three
sizes. A checkpoint's time is that from the call of `save` to COMPLETE durable on disk; `waited` is the longer of the two ranks'
waits until `save` returned. `stall`: of steps behind which a checkpoint was written, the median's excess over the median of the
others (the ranks have no core to spare here, so the write takes its CPU time from them). Goal: waited / time < .05.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # inputs are shared with tests/train

import _environment  # noqa: F401
from _ranks import machine, run_ranks

from hybrid_scale import dist
from hybrid_scale.checkpoints import complete
from hybrid_scale.config import RunConfig
from hybrid_scale.model.tiny import write_model, write_tokenizer
from hybrid_scale.runs import RunDirectory
from hybrid_scale.train import checkpoint
from hybrid_scale.train.run import Keeper, train
from tests.data.synthetic import parallel
from tests.train.setup import make_config, zero

RANKS = (16, 128, 512)
"""LoRA ranks: checkpoints of about 4, 30 and 120 MB at this decoder's size."""
STEPS, EVERY = 25, 6


def on_this_rank(tree: str) -> tuple[list[dict[str, float]], list[dict[str, Any]]]:
    """Train; what each checkpoint took on this rank, and the logged steps."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # the trainer's progress
    dist.start()
    kept: list[checkpoint.Checkpoints] = []
    setting = Keeper.__setattr__

    def remember(self: Keeper, name: str, value: Any) -> None:
        setting(self, name, value)
        if isinstance(value, checkpoint.Checkpoints):
            kept.append(value)

    Keeper.__setattr__ = remember  # type: ignore[method-assign, assignment]
    config = RunConfig.model_validate_json(tree)
    train(config, lambda *_: None)
    return kept[0].written, RunDirectory(config.run.directory).metrics()


def write_inputs(folder: Path) -> None:
    pairs = parallel(folder / "train", groups=60)
    tokenizer = write_tokenizer(pairs.queries.column("text") + pairs.passages.column("text"), folder / "model", vocabulary=400)
    write_model(folder / "model", len(tokenizer), hidden=256, layers=4, heads=4)


def measure(folder: Path, lora_rank: int) -> dict[str, Any]:
    training = {
        **{"engine": "deepspeed", "deepspeed": zero(3, folder), "max_steps": STEPS, "max_tokens_per_micro_batch": 4096},
        **{"save_every_steps": EVERY, "keep_checkpoints": 1},
    }
    model = {"quantization": "nf4", "lora": {"rank": lora_rank}}
    config = make_config(folder, run={"directory": str(folder / f"run{lora_rank}")}, training=training, model=model)
    results = run_ranks(on_this_rank, 2, config.model_dump_json())
    run = RunDirectory(config.run.directory)
    mib = sum(path.stat().st_size for path in complete(run)[-1].rglob("*") if path.is_file()) / 2**20
    saves = [
        {"step": first["step"], "waited": round(max(first["waited"], second["waited"]), 5), "seconds": round(first["seconds"], 4)}
        for first, second in zip(results[0][0], results[1][0], strict=True)
    ]
    return {"lora_rank": lora_rank, "mib": round(mib, 1), "saves": saves, **_summary(saves, results[0][1])}


def _summary(saves: list[dict[str, float]], steps: list[dict[str, Any]]) -> dict[str, float]:
    behind = {int(save["step"]) + 1 for save in saves}
    inside = [step["seconds"] for step in steps if step["step"] in behind]
    others = [step["seconds"] for step in steps if step["step"] not in behind and step["step"] > 2]
    shares = [save["waited"] / save["seconds"] for save in saves]
    return {
        "waited": round(statistics.median(save["waited"] for save in saves), 5),
        "seconds": round(statistics.median(save["seconds"] for save in saves), 4),
        "share_waited": round(sum(save["waited"] for save in saves) / sum(save["seconds"] for save in saves), 4),
        "largest_share": round(max(shares), 4),
        "step": round(statistics.median(others), 4),
        "stall": round(statistics.median(inside) - statistics.median(others), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the results here")
    chosen = parser.parse_args()
    columns = ("lora_rank", "mib", "waited", "seconds", "share_waited", "largest_share", "step", "stall")
    print("".join(f"{name:>14}" for name in columns), flush=True)
    rows = []
    with tempfile.TemporaryDirectory() as place:
        write_inputs(Path(place))
        for rank in RANKS:
            rows.append(measure(Path(place), rank))
            print("".join(f"{rows[-1][name]:>14}" for name in columns), flush=True)
    if chosen.json:
        chosen.json.parent.mkdir(parents=True, exist_ok=True)
        chosen.json.write_text(json.dumps({"machine": machine(), "steps": STEPS, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

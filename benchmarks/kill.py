"""Kill a training run over and over: every restart must go on from the last whole checkpoint, to the end of an undisturbed run.

    python benchmarks/kill.py [--events 50] [--worlds 4] [--seed 0] [--json benchmarks/results/kill.json]

A tiny random decoder in NF4 with LoRA (dropout on) under ZeRO-3 on two CPU processes, a checkpoint every second step. Events in
random order: SIGKILL of one rank, of all, of all while a checkpoint is being written, SIGTERM, SIGSTOP, a full disk, a file of
the newest checkpoint truncated or with one bit flipped. Each run suffers several and is then finished; every loss of every start
and the adapter must be bit for bit those of the undisturbed run. A second campaign changes the number of ranks at each restart;
losses must agree to 5e-5. The full disk is a tmpfs where mounting is permitted, else a limit on file sizes.
"""

import argparse
import collections
import json
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the campaign is shared with tests/train/test_kill.py

import _environment  # noqa: F401
import numpy as np
from _ranks import machine
from safetensors.numpy import load_file

from hybrid_scale.checkpoints import folder_name
from hybrid_scale.config import RunConfig
from hybrid_scale.runs import RunDirectory
from tests.train.kills import Campaign, losses, small_disk
from tests.train.setup import make_config, write_inputs, zero

STEPS = 30
KINDS = ("kill one", "kill all", "kill in a write", "terminate", "full", "truncate", "flip", "freeze")
WORLDS = (1, 4, 2)


def config_of(folder: Path, place: Path, dropout: float, timeout: float = 20.0) -> RunConfig:
    training = {
        **{"engine": "deepspeed", "deepspeed": zero(3, folder), "max_steps": STEPS, "max_tokens_per_micro_batch": 512},
        **{"save_every_steps": 2, "keep_checkpoints": 3, "rank_timeout_seconds": timeout},
    }
    model = {"quantization": "nf4", "lora": {"rank": 4, "dropout": dropout}}
    return make_config(folder, run={"directory": str(place)}, training=training, model=model)


def adapter(run: RunDirectory) -> dict[str, np.ndarray]:
    return load_file(run.checkpoints / folder_name(STEPS) / "adapter" / "adapter_model.safetensors")


def same_end(run: RunDirectory, whole: RunDirectory) -> bool:
    ours, theirs = adapter(run), adapter(whole)
    return losses(run) == losses(whole) and all(np.array_equal(ours[name], weight) for name, weight in theirs.items())


def equal_worlds(folder: Path, events: int, chance: random.Random) -> dict[str, Any]:
    """Runs on two ranks until `events` events have hit them."""
    whole = Campaign(config_of(folder, folder / "whole", dropout=0.1), chance)
    whole.finish()
    bag: list[str] = []
    done: list[dict[str, Any]] = []
    runs, starts, how = 0, 0, ""
    while len(done) < events:
        place = folder / f"run{runs}"
        with small_disk(place / "checkpoints") as resize:
            how = "tmpfs" if resize else "limit on file sizes"
            campaign = Campaign(config_of(folder, place, dropout=0.1), chance, resize=resize)
            while len(done) + len(campaign.events) < events:
                bag = bag or chance.sample(KINDS, len(KINDS))  # every kind equally often
                if not campaign.random_event(bag.pop()):
                    break
                print(json.dumps(campaign.events[-1]), flush=True)
            campaign.finish()
            assert same_end(campaign.run, whole.run), f"{place}: another end than the undisturbed run"
        done += campaign.events
        runs, starts = runs + 1, starts + campaign.starts
        print(f"run {runs}: {len(campaign.events)} events, then the same end bit for bit; {len(done)} events so far", flush=True)
    kinds = collections.Counter(event["kind"] for event in done)
    torn = sum(event["torn_writes"] > 0 for event in done)
    return {
        **{"events": len(done), "kinds": dict(kinds), "runs": runs, "starts": starts, "full_disk_is_a": how},
        **{"kills_within_a_write": torn, "runs_with_another_end": 0, "list": done},
    }


def other_worlds(folder: Path, events: int, chance: random.Random) -> dict[str, Any]:
    """One run, killed and started again on 1, 4, 2, ... ranks; the largest difference of its losses to two ranks throughout."""
    whole = Campaign(config_of(folder, folder / "straight", dropout=0.0), chance)
    whole.finish()
    campaign = Campaign(config_of(folder, folder / "worlds", dropout=0.0), chance)
    worlds = [2]
    campaign.event("kill all", 2)
    while len(worlds) < events and campaign.expected() <= STEPS - 6:
        worlds.append(WORLDS[(len(worlds) - 1) % len(WORLDS)])
        campaign.event(chance.choice(["kill all", "terminate", "flip"]), worlds[-1])
    worlds.append(WORLDS[(len(worlds) - 1) % len(WORLDS)])
    campaign.finish(worlds[-1])
    expected, found = losses(whole.run), {record["step"]: record["loss"] for record in campaign.run.metrics()}
    assert list(found) == list(expected)
    worst = max(abs(found[step] - expected[step]) for step in expected)
    assert worst <= 5e-5, worst
    return {"ranks": worlds, "events": len(campaign.events), "largest_difference_of_losses": worst}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=50, help="events at two ranks (default 50); 0 leaves the campaign out")
    parser.add_argument("--worlds", type=int, default=4, help="events of the campaign over other worlds (default 4); 0: none")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="also write the results here")
    chosen = parser.parse_args()
    started, results = time.monotonic(), {"machine": machine(), "seed": chosen.seed}
    with tempfile.TemporaryDirectory() as place:
        folder = write_inputs(Path(place) / "inputs")
        if chosen.worlds:
            results["other_worlds"] = other_worlds(folder, chosen.worlds, random.Random(chosen.seed))
            print("other worlds", json.dumps(results["other_worlds"]), flush=True)
        if chosen.events:
            results["equal_worlds"] = equal_worlds(folder, chosen.events, random.Random(chosen.seed))
    results["seconds"] = round(time.monotonic() - started)
    print(json.dumps({key: value for key, value in results["equal_worlds"].items() if key != "list"} if chosen.events else {}))
    if chosen.json:
        chosen.json.parent.mkdir(parents=True, exist_ok=True)
        chosen.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Signals at every stage of a run with a step of 60 s: each must end in time, with nothing lost, and go on bit for bit.

    python benchmarks/stops.py [--json benchmarks/results/stops.json] [--folder DIR]

Under `accelerate launch` on two CPU ranks (ZeRO-3, NF4, LoRA with dropout) SIGTERM, Ctrl-C (SIGINT to the foreground process
group) and SIGHUP come while the model is loaded, within a step, during an evaluation (60 s each, on one rank, for which the other
waits in a collective) and while a checkpoint is written; once and twice in a row. Each run must end within the 30 s after which
torch's launcher kills, without a traceback of ours, with a whole checkpoint of the last finished step and a status.json that
says so; the next start must end with the losses, weights, Adam's moments, random states and scores of an undisturbed run.
A row that stands in the JSON file is not repeated: start again to go on.
"""

import argparse
import itertools
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the rows are shared with tests/train/test_stops.py

import _environment  # noqa: F401
from _ranks import machine

from hybrid_scale.runs import RunDirectory, read_json, write_json
from tests.train.stops import LAUNCHER_SECONDS, PLACES, SIGNALS, config_of, go_on, same, stop_once, write_all

ROWS = [(place, name, times) for times, name, place in itertools.product((1, 2), SIGNALS, PLACES)]


def row(folder: Path, place: str, name: str, times: int) -> dict[str, Any]:
    """AssertionError unless all that the module says holds."""
    directory = folder / f"{place}-{name}-{times}"
    for old in (directory, Path(f"{directory}-logs")):
        shutil.rmtree(old, ignore_errors=True)
    config = config_of(folder, directory, place)
    found = stop_once(config, place, name, times)
    go_on(config)
    same(RunDirectory(directory), RunDirectory(folder / "whole"))
    return {key: found[key] for key in ("place", "signal", "times", "seconds")} | {"step": found["status"]["step"]}


def table(rows: list[dict[str, Any]]) -> str:
    """Seconds from the (first) signal to the launcher's end."""
    seconds = {(r["place"], r["signal"], r["times"]): r["seconds"] for r in rows}
    lines = ["| signal | " + " | ".join(PLACES) + " |", "|---|" + "---|" * len(PLACES)]
    for times, name in itertools.product((1, 2), SIGNALS):
        cells = [f"{seconds[place, name, times]:.1f} s" if (place, name, times) in seconds else "" for place in PLACES]
        lines.append(f"| {name}{' twice' if times == 2 else ''} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/stops.json"))
    parser.add_argument("--folder", type=Path, help="for inputs and runs; kept (default: a temporary one)")
    chosen = parser.parse_args()
    results = read_json(chosen.json) if chosen.json.exists() else {"machine": machine(), "limit": LAUNCHER_SECONDS, "rows": []}
    done = {(r["place"], r["signal"], r["times"]) for r in results["rows"]}
    with tempfile.TemporaryDirectory() as place:
        folder = chosen.folder or Path(place)
        if not (folder / "model").exists():
            write_all(folder)
        whole = config_of(folder, folder / "whole")
        if RunDirectory(folder / "whole").status()["status"] != "done":
            go_on(whole, 1)
        for one in [one for one in ROWS if one not in done]:
            results["rows"].append(row(folder, *one))
            write_json(chosen.json, results)
            print(json.dumps(results["rows"][-1]), flush=True)
    print(table(results["rows"]))


if __name__ == "__main__":
    main()

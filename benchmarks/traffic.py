"""What ZeRO-3 gathers in a step, counted on fake worlds, and what that is at Llama-3.1-70B's size.

    python benchmarks/traffic.py [--steps 3] [--json PATH]

One process a table, no network: counts and bytes, no times; the last step of each schedule is shown.
  passes          without gradients + forward + backward
  weights a pass  4-bit weights gathered in one pass of each kind, in units of all of them; `adapters`: the same over the step
  live            most 4-bit weights whole on a rank at once
  70B GB          what a rank gathers in the step; `outside`: of it in process groups larger than a node of 8
  reduced         gradients of adapters that it hands out, GB at 70B

"DeepSpeed alone" runs without our `ShardedPasses`. It keeps up to 4.7 layers from one pass to the next, of 8 here and of 80
there: its bytes look a third smaller than they are at 70B. Its gathers and `live` are what to compare.
"""

import argparse
import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.train.traffic import PHASES, SCHEDULES, Case, Phase, Step, count, total

NODE = 8
GB_70B = {"weights": 68.451 * 0.5, "embeddings": 128256 * 8192 * 2 / 1e9, "adapters": 0.2071 * 4}
"""4-bit weights, embedding table in bfloat16, adapters of rank 16 in float32."""
CASES = {
    "8 ranks": Case(8),
    "8 ranks, no checkpointing": Case(8, checkpointing=False),
    "64 ranks": Case(64),
    "64 ranks in groups of 8": Case(64, shard_group=8),
    "8 ranks, DeepSpeed alone": Case(8, own_records=False),
    "8 ranks, no checkpointing, DeepSpeed alone": Case(8, checkpointing=False, own_records=False),
    "64 ranks in groups of 8, DeepSpeed alone": Case(64, shard_group=8, own_records=False),
}


def at_70b(phase: Phase) -> float:
    return sum(getattr(phase, key) * size for key, size in GB_70B.items())


def outside_share(phase: Phase) -> float:
    """Share of the gathered bytes that crosses nodes."""
    return sum(size for world, size in phase.groups.items() if world > NODE) / sum(phase.groups.values())


def row(schedule: str, step: Step) -> dict[str, Any]:
    whole = total(step)
    by_phase = {name: asdict(total(step, name)) for name in PHASES}
    passes = {name: sum(p.name == name for p in step) for name in ("embed", "forward", "backward")}
    counted = {"schedule": schedule, "passes": passes, "gathers": whole.gathers, "phases": by_phase}
    counted |= {"adapters": whole.adapters, "live": whole.live}
    # The table and the adapters weigh more in the small model than at 70B: the share that crosses nodes is taken part by part.
    outside = sum(at_70b(phase) * outside_share(phase) for phase in step if phase.name != "evaluate" and phase.groups)
    return {**counted, "gb_70b": at_70b(whole), "gb_70b_outside": outside, "gb_70b_reduced": whole.reduced * GB_70B["adapters"]}


COLUMNS = ("schedule", "passes", "gathers", "weights a pass", "adapters", "live", "70B GB", "outside", "reduced")
WIDTHS = (18, 9, 9, 17, 10, 7, 9, 9, 9)


def show(name: str, rows: list[dict[str, Any]]) -> None:
    print(f"\n{name}")
    lines = [list(COLUMNS)]
    for entry in rows:
        passes = entry["passes"]
        each = [f"{entry['phases'][kind]['weights'] / number:.2f}" if number else "-" for kind, number in passes.items()]
        numbers = [f"{entry[key]:.2f}" for key in ("adapters", "live")]
        numbers += [f"{entry[key]:.1f}" for key in ("gb_70b", "gb_70b_outside", "gb_70b_reduced")]
        shown = "+".join(str(number) for number in passes.values())
        lines.append([entry["schedule"], shown, str(entry["gathers"]), " ".join(each), *numbers])
    for first, *rest in lines:
        print(f"  {first:<{WIDTHS[0]}}" + "".join(f"{cell:>{width}}" for cell, width in zip(rest, WIDTHS[1:], strict=True)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3, help="steps of each schedule; the last is shown")
    parser.add_argument("--json", type=Path, help="write all numbers there")
    given = parser.parse_args()
    results = {}
    for name, case in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            chosen = Case(case.world, case.shard_group, case.checkpointing, case.own_records, SCHEDULES, given.steps)
            counted = count(chosen, Path(folder))
        results[name] = [row(schedule, steps[-1]) for schedule, steps in counted.items()]
        show(name, results[name])
    if given.json:
        given.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()

"""Does a published run repeat? One run of a study's archive, trained and scored again, against what the archive says.

    python benchmarks/repeat.py docs/studies/gemma-270m/runs.tar.xz 6-layers.mono.seed-0 --out runs/repeated

The run's own config is started anew in OUT, on as many processes as its manifest says; base and data must lie where the config
says (docs/studies/gemma-270m/prepare.sh). Then each logged step's loss and gradient norm and each metric of each evaluation are
compared as they are printed (`%.6g` of the loss, four decimals of a metric). Equality to the last digit is promised on the same
kind of CPU alone: another one adds in another order. Exit code 0: all equal; 1: something differs, and what.
"""

import argparse
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

import _environment  # noqa: F401

from hybrid_scale.runs import RunDirectory, read_json
from hybrid_scale.study.grid import PlannedRun
from hybrid_scale.study.jobs.local import accelerate_command, environment
from hybrid_scale.study.settings import LaunchSettings, Resources

TRAIN = Path(__file__).resolve().parent.parent / "launch/train.py"
CURVE = ("loss", "gradient_norm")


def compared(before: RunDirectory, after: RunDirectory) -> Iterator[tuple[str, str, str]]:
    """(what, then, now) of each number that both runs must share, as printed; "nothing" where one lacks it."""
    logged = [{record["step"]: record for record in run.metrics()} for run in (before, after)]
    for step in sorted(logged[0].keys() | logged[1].keys()):
        for name in CURVE:
            then, now = (_printed(records.get(step, {}).get(name), "%.6g") for records in logged)
            yield f"step {step} {name}", then, now
    for file in sorted(before.evaluations.glob("*.json")):
        again = after.evaluations / file.name
        scores = [read_json(path)["metrics"] if path.exists() else {} for path in (file, again)]
        for metric in scores[0].keys() | scores[1].keys():
            then, now = (_printed(found.get(metric), "%.4f") for found in scores)
            yield f"{file.stem} {metric}", then, now


def _printed(value: float | None, form: str) -> str:
    return "nothing" if value is None else form % value


def started_again(before: RunDirectory, out: Path) -> RunDirectory:
    """The run trained and scored anew in `out`. Raises SystemExit: it failed."""
    after = RunDirectory(out)
    config = before.config()
    config = config.model_copy(update={"run": config.run.model_copy(update={"directory": str(out)})})
    after.create(config)
    processes = int(read_json(before.manifest_file)["world_size"])
    planned = PlannedRun(out.name, config.sampler.arm, config.run.seed, out, config, Resources(), None, None)
    command = accelerate_command(LaunchSettings(processes=processes), TRAIN)(planned)
    if subprocess.run(command, env=environment(processes), check=False).returncode:
        raise SystemExit(f"the training failed; its messages stand above ({out})")
    return after


def main(archive: Path, run: str, out: Path) -> int:
    with tempfile.TemporaryDirectory() as place:
        with tarfile.open(archive) as file:
            file.extractall(place, filter="data")
        before = RunDirectory(Path(place) / "runs" / run)
        if not before.config_file.exists():
            known = ", ".join(sorted(path.name for path in (Path(place) / "runs").iterdir()))
            raise SystemExit(f"{archive} holds no run '{run}'. It holds: {known}.")
        rows = list(compared(before, started_again(before, out)))
    wrong = [f"{what}: {then} then, {now} now" for what, then, now in rows if then != now]
    print("\n".join(wrong[:20]) or f"all {len(rows)} numbers are equal to the last printed digit")
    print(f"{run}: {len(rows) - len(wrong)} of {len(rows)} numbers equal")
    return 1 if wrong or not rows else 0


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("archive", type=Path)
    arguments.add_argument("run")
    arguments.add_argument("--out", type=Path, default=Path("runs/repeated"))
    given = arguments.parse_args()
    sys.exit(main(given.archive, given.run, given.out))

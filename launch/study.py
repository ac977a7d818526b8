"""Expand, run, watch and report a study.

    python launch/study.py expand STUDY.yaml [key=value ...]     the runs and the checks; starts nothing
    python launch/study.py run    STUDY.yaml [key=value ...]     run what isn't done on this machine, then report
    python launch/study.py status STUDY.yaml [key=value ...]     one line a run
    python launch/study.py report STUDY.yaml [key=value ...]     tables and report.html from what is there

A key is one of the study (study.directory=..., launch.processes=2) or of its runs (training.max_steps=3).
Exit code: 0 well, 1 a run isn't done, 2 a mistake in the request.
"""

import argparse
import sys
from pathlib import Path

from hybrid_scale.errors import HybridScaleError
from hybrid_scale.runs import RunDirectory
from hybrid_scale.study.grid import Plan, plan_study
from hybrid_scale.study.local import Progress, accelerate_command, run_study


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["expand", "run", "status", "report"])
    parser.add_argument("study", type=Path, metavar="STUDY.yaml")
    parser.add_argument("settings", nargs="*", metavar="key=value")
    arguments = parser.parse_args()
    try:
        return ACTIONS[arguments.action](plan_study(arguments.study, arguments.settings))
    except HybridScaleError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def expand(plan: Plan) -> int:
    for run in plan.runs:
        print(f"{run.id}  ->  {run.directory}")
    print("\n".join(plan.checks))
    return 0


def run(plan: Plan) -> int:
    unfinished = run_study(plan, accelerate_command(plan.config.launch, Path(__file__).with_name("train.py")))
    for left in unfinished:
        print(f"not done: {left.id}, see {left.directory / 'train.log'}", file=sys.stderr)
    report(plan)
    return 1 if unfinished else 0


def status(plan: Plan) -> int:
    width = max(len(run.id) for run in plan.runs)
    for run in plan.runs:
        facts = RunDirectory(run.directory).status()
        reason = f"  {facts['reason']}" if facts.get("reason") else ""
        print(f"{run.id:{width}}  {facts['status']:9}  {Progress(run).text()}{reason}")
    return 0


def report(plan: Plan) -> int:
    from hybrid_scale.study.report import report as write_report  # pandas and matplotlib: a second that `status` needn't wait

    print(write_report(plan))
    return 0


ACTIONS = {"expand": expand, "run": run, "status": status, "report": report}


if __name__ == "__main__":
    sys.exit(main())

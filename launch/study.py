"""Expand, submit, run, watch and report a study.

    python launch/study.py expand   STUDY.yaml [key=value ...]                   the runs and the checks; starts nothing
    python launch/study.py submit   STUDY.yaml [key=value ...] [--site SITE.yaml]    Slurm jobs of what was never started
    python launch/study.py resubmit STUDY.yaml [key=value ...] --failed [--site SITE.yaml]    the same, and of what failed,
                                                                 is lost, was cancelled, or stopped with a checkpoint
    python launch/study.py cancel   STUDY.yaml [key=value ...]                   cancel the study's jobs; results stay
    python launch/study.py status   STUDY.yaml [key=value ...]                   one line a run
    python launch/study.py run      STUDY.yaml [key=value ...]                   run what isn't done on this machine, then
                                                                 report (`submit --local` is the same)
    python launch/study.py report   STUDY.yaml [key=value ...]                   tables and report.html from what is there
    python launch/study.py archive  STUDY.yaml OUT.tar.xz [key=value ...]        all that `report` reads of the ended runs, in
                                                                 one small file without texts and weights; unpacked into
                                                                 the study's directory, report and run go on from it

Of each run: training, then its evaluation on the sets of `evaluate`; when all have ended, however they ended, the report. A key
is one of the study (study.directory=..., launch.processes=2, resources.nodes=4) or of its runs (training.max_steps=3). Commands
may be repeated at any time: nothing is started twice. Needs no torch, but for `run`.
Exit code: 0 well, 1 a run isn't done (run) or failed (status), 2 a mistake in the request, or Slurm refuses, 3 the site's
`max_jobs_in_queue` left runs for a later `submit`.
"""

import argparse
import os
import sys
from collections import Counter
from pathlib import Path

from hybrid_scale.command_line import read_arguments
from hybrid_scale.errors import ConfigError, HybridScaleError, RunError, describe
from hybrid_scale.runs import RunDirectory
from hybrid_scale.study.evaluation import settle
from hybrid_scale.study.grid import Plan, plan_study
from hybrid_scale.study.jobs.local import Progress, accelerate_command, evaluate_command, run_study
from hybrid_scale.study.jobs.queue import COLLECT, View, cancel, known, look, submit
from hybrid_scale.study.jobs.site import load_site
from hybrid_scale.study.jobs.slurm import SlurmError
from hybrid_scale.study.jobs.state import TO_START_AGAIN
from hybrid_scale.study.pilot import chosen_lines, read_chosen
from hybrid_scale.study.settings import Site

GO_ON = 3
"""Exit code where the site's `max_jobs_in_queue` left runs: until python launch/study.py submit ...; do sleep 600; done"""
PLANS = ("expand", "submit", "resubmit", "cancel", "status", "run", "report", "archive")
SETTLE = "settle"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=(*PLANS, SETTLE), metavar="ACTION", help=", ".join(PLANS))
    chosen = parser.parse_args(sys.argv[1:2])
    return read_arguments(_parser_of(chosen.action), sys.argv[2:], argparse.Namespace(action=chosen.action))


def _parser_of(action: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"{Path(sys.argv[0]).name} {action}")
    if action == SETTLE:
        parser.description = "(for slurm/evaluate.sbatch) take in a finished evaluation"
        parser.add_argument("run", type=Path)
        parser.add_argument("data")
        parser.add_argument("code", type=int)
        return parser
    parser.add_argument("study", type=Path, metavar="STUDY.yaml")
    if action == "archive":
        parser.add_argument("out", type=Path, metavar="OUT.tar.xz")
    parser.add_argument("settings", nargs="*", metavar="key=value")
    if action in ("submit", "resubmit"):
        site = "the cluster's settings (default: `site` of the study)"
        parser.add_argument("--site", type=Path, metavar="SITE.yaml", help=site)
    if action in ("submit", "run"):
        parser.add_argument("--local", action="store_true", help="on this machine, one run after another")
    if action == "resubmit":
        parser.add_argument("--failed", action="store_true", required=True, help="what failed, is lost, cancelled or stopped")
    return parser


def main() -> int:
    given = arguments()
    try:
        if given.action == SETTLE:
            log = f"the log of job {os.environ.get('SLURM_JOB_ID', '?')}"
            return 0 if settle(RunDirectory(given.run), given.data, given.code, log) else 1
        return act(given, plan_study(given.study, given.settings))
    except HybridScaleError as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:  # a full or read-only file system, no right to write
        print(f"{error.filename or 'a file could not be written'}: {error.strerror or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def act(given: argparse.Namespace, plan: Plan) -> int:
    match given.action:
        case "expand":
            return expand(plan)
        case "run":
            return run(plan)
        case "submit" if given.local:
            return run(plan)
        case "submit":
            return send(plan, site_of(plan, given.site), again=False)
        case "resubmit":
            return send(plan, site_of(plan, given.site), again=True)
        case "cancel":
            cancel(plan)
            return 0
        case "status":
            return status(plan)
        case "archive":
            return archive(plan, given.out)
    return report(plan)


def expand(plan: Plan) -> int:
    for planned in plan.runs:
        print(f"{planned.id}  ->  {planned.directory}")
    print("\n".join([*plan.checks, *([plan.pending] if plan.pending else [])]))
    return 0


def refuse_before_the_pilot(plan: Plan) -> None:
    """Raises ConfigError where the study takes values from a pilot that has chosen none yet."""
    if plan.pending:
        raise ConfigError(plan.pending)


def site_of(plan: Plan, path: Path | None) -> Site:
    if path is not None:
        return load_site(path)
    if plan.config.site is None:
        rule, remedy = (
            "a cluster's settings are needed",
            "Give --site SITE.yaml, or a section `site`; {} asks for nothing special.",
        )
        raise ConfigError(describe(f"{plan.source}: site", None, rule, remedy))
    return plan.config.site


def send(plan: Plan, site: Site, again: bool) -> int:
    refuse_before_the_pilot(plan)
    print("\n".join(plan.checks))
    submitted = submit(plan, site, again)
    ended = Counter(view.train.word for view in submitted.before if view.train.word in TO_START_AGAIN)
    ended.update(view.evaluate.word for view in submitted.before if view.evaluate and view.evaluate.word in TO_START_AGAIN)
    if ended and not again:
        found = ", ".join(f"{count} {word}" for word, count in ended.items())
        print(f"left as they are: {found}; to start them again: launch/study.py resubmit {plan.source} --failed")
    return GO_ON if submitted.left else 0


def run(plan: Plan) -> int:
    refuse_before_the_pilot(plan)
    here = Path(__file__)
    train = accelerate_command(plan.config.launch, here.with_name("train.py"))
    score = evaluate_command(plan.config.launch, here.with_name("evaluate.py"))
    unfinished = run_study(plan, train, evaluate=score)
    for left in unfinished:
        print(f"not done: {left.id}, see {left.directory / 'train.log'}", file=sys.stderr)
    report(plan)
    return 1 if unfinished else 0


def status(plan: Plan) -> int:
    try:
        found = known(plan, must_answer=False)
    except SlurmError as error:
        print(f"{error}\nBelow is what the run directories say; of their jobs nothing is known.", file=sys.stderr)
        for planned in plan.runs:
            print(f"{planned.id}  {RunDirectory(planned.directory).status()['status']}")
        return 2
    views = look(found)
    width = max(len(view.run.id) for view in views)
    for view in views:
        print(f"{view.run.id:{width}}  {line(view)}")
    words = Counter(view.train.word for view in views)
    print(f"{len(views)} runs: {', '.join(f'{count} {word}' for word, count in words.items())}")
    collecting = found.find(COLLECT, "collect")
    if collecting:
        print(f"report: job {collecting.id}, {collecting.state.lower()}")
    failed = {"failed", "lost", "blocked", "broken"}
    return 1 if any({view.train.word, view.evaluate.word if view.evaluate else ""} & failed for view in views) else 0


def line(view: View) -> str:
    job = f"  job {view.train.job.id}" if view.train.job and view.train.job.alive else ""
    detail = f"  {view.train.detail}" if view.train.detail else ""
    text = f"{view.train.word:9}  {progress(view)}{job}{detail}"
    if view.evaluate is None or (view.evaluate.word == "planned" and view.train.word == "planned"):
        return text.rstrip()
    scored = f"{view.evaluate.word}, {len(view.left)} sets left" if view.left else "done"
    return f"{text}  | evaluation {scored}" + (f": {view.evaluate.detail}" if view.evaluate.detail else "")


def progress(view: View) -> str:
    if view.train.word in ("planned", "broken"):
        return ""
    try:
        return Progress(view.run).text()
    except RunError as error:
        return str(error)


def report(plan: Plan) -> int:
    from hybrid_scale.study.report.page import (
        report as write_report,  # pandas and matplotlib: a second that `status` needn't wait
    )

    print(write_report(plan))
    if plan.config.choose:
        chosen = read_chosen(plan.directory)
        print("\n".join(chosen_lines(chosen)) if chosen else "nothing is chosen yet: an arm of a model has no finished run")
    return 0


def archive(plan: Plan, path: Path) -> int:
    from hybrid_scale.study.results.archive import write_archive  # pandas and pyarrow, as above

    runs = write_archive(plan, path)
    print(f"{path}: {len(runs)} of {len(plan.runs)} runs, {path.stat().st_size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())

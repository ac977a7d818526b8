"""A study's runs as Slurm jobs: submit, look, cancel, submit again what failed.

Nothing is started twice. A job's name says study, run and kind: Slurm is asked for it before each sbatch, so a job counts though
the process that submitted it died before it noted the id; the study's lock outlives that process until its sbatch has ended; and
every job is a `singleton`: Slurm itself never runs two of one name at once. Knows no torch.
"""

import hashlib
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hybrid_scale.config import dump_config
from hybrid_scale.errors import RunError, describe
from hybrid_scale.runs import RunDirectory, write_text
from hybrid_scale.study.evaluation import failures, forget_failures, missing
from hybrid_scale.study.grid import Plan, PlannedRun
from hybrid_scale.study.jobs import slurm
from hybrid_scale.study.jobs.journal import Journal, only_one
from hybrid_scale.study.jobs.site import Kind, dependency, environment, sbatch_options
from hybrid_scale.study.jobs.slurm import Job, SlurmError
from hybrid_scale.study.jobs.state import TO_START_AGAIN, State, evaluation, read_status, training
from hybrid_scale.study.settings import Resources, Site

SCRIPTS: dict[Kind, str] = {kind: f"slurm/{kind}.sbatch" for kind in ("train", "evaluate", "collect")}
COLLECT = "study"
"""Stands for the run in the name of the job that collects."""
Say = Callable[[str], None]


@dataclass(frozen=True)
class View:
    """One run as it is: its training, and what is scored after it (None: nothing)."""

    run: PlannedRun
    train: State
    evaluate: State | None
    left: tuple[str, ...]
    """Sets of the study's `evaluate` without a result."""


@dataclass(frozen=True)
class Submitted:
    """What a submission found, and how many runs it left for a later one because the site's queue would be full."""

    before: list[View]
    left: int


@dataclass
class Known:
    """The study's jobs: what Slurm says now, and the ids noted before."""

    plan: Plan
    jobs: list[Job]
    noted: dict[tuple[str, str], str]
    names: dict[str, list[Job]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for job in self.jobs:
            self.names.setdefault(job.name, []).append(job)

    def find(self, run: str, kind: Kind) -> Job | None:
        """The job of this run and kind that is alive, else the latest that Slurm still knows."""
        name, noted = job_name(self.plan, run, kind), self.noted.get((run, kind))
        # By the id alone where the study is seen under another path: its names end otherwise.
        by_id = [job for job in self.jobs if job.id == noted and job.name.partition("@")[0] == name.partition("@")[0]]
        found = {job.id: job for job in [*self.names.get(name, []), *by_id]}
        return max(found.values(), key=lambda job: (job.alive, len(job.id), job.id), default=None)


def job_name(plan: Plan, run: str, kind: Kind) -> str:
    """Unique to study directory, run and kind, and the same whenever it is asked for."""
    digest = hashlib.sha256(str(plan.directory.resolve()).encode()).hexdigest()[:8]
    return f"{run}.{kind}@{digest}"


def known(plan: Plan, must_answer: bool) -> Known:
    """The study's jobs. Raises SlurmError where Slurm doesn't answer, unless nothing was ever submitted and none must."""
    noted = Journal(plan.directory).latest()
    if not (must_answer or noted) and not shutil.which("squeue"):
        return Known(plan, [], noted)
    try:
        return Known(plan, slurm.jobs(), noted)
    except SlurmError:
        if must_answer or noted:
            raise
        return Known(plan, [], noted)


def look(found: Known) -> list[View]:
    """Every run of the plan as it is; a file that can't be read makes its run `broken`, with the reason."""
    return [_view(found, run) for run in found.plan.runs]


def _view(found: Known, run: PlannedRun) -> View:
    directory, sets = RunDirectory(run.directory), found.plan.config.evaluate
    left = tuple(missing(directory, sets))
    try:
        train = training(read_status(directory), found.find(run.id, "train"), found.noted.get((run.id, "train")))
        job, noted = found.find(run.id, "evaluate"), found.noted.get((run.id, "evaluate"))
        scored = evaluation(len(left), failures(directory), job, noted, train) if sets else None
    except (RunError, OSError) as error:  # OSError: a stale handle, a network file system that is away
        return View(run, State("broken", str(error)), None, left)
    return View(run, train, scored, left)


def refuse_if_submitted(plan: Plan) -> None:
    """Raises RunError where a job of this study is alive: what runs here would be started twice."""
    try:
        alive = _alive(known(plan, must_answer=False))
    except SlurmError as error:
        rule = f"this study was submitted, and what became of its jobs can't be asked ({error})"
        remedy = "Run it where Slurm answers; if none of its jobs can be alive, delete the file."
        raise RunError(describe(str(Journal(plan.directory).path), "jobs", rule, remedy)) from None
    if alive:
        rule = "jobs of this study are in Slurm's queue"
        raise RunError(describe(str(plan.directory), ", ".join(alive), rule, "Wait for them, or `cancel` the study."))


def submit(plan: Plan, site: Site, again: bool = False, say: Say = print) -> Submitted:
    """Submit what was never started, and what failed, is lost, was cancelled or stopped if `again`.

    Raises RunError before the first sbatch: a run directory doesn't fit, Slurm doesn't answer, another submission is going
    on, somebody else submitted it. A refusal of sbatch ends the submission; what was submitted before it stays, and a later
    call goes on from there.
    """
    _refuse_elsewhere()
    strangers = sorted(site.models.keys() - {run.model for run in plan.runs})
    if strangers:
        say(f"The site's `models` names {', '.join(strangers)}, which this study doesn't have: nothing is asked for by that.")
    with only_one(plan.directory) as lock:
        found = known(plan, must_answer=True)
        views = look(found)
        _refuse_broken(views)
        _refuse_another_users(plan, views)
        for run in plan.runs:
            RunDirectory(run.directory).create(run.config, continuing=True)
        submission = Submission(plan, site, found, lock, say)
        submission.adopt()
        for view in views:
            submission.start(view, again)
        submission.collect()
    if submission.left:
        limit = f"the site's max_jobs_in_queue is {site.max_jobs_in_queue}"
        say(f"{submission.left} runs are left: {limit}. Submit again as jobs end.")
    return Submitted(views, submission.left)


def cancel(plan: Plan, say: Say = print) -> int:
    """Cancel every job of this study that is alive; how many there were. Checkpoints and results stay."""
    with only_one(plan.directory):
        alive = _alive(known(plan, must_answer=True))
        slurm.cancel(alive)
    say(f"cancelled {len(alive)} jobs" + (f": {' '.join(alive)}" if alive else ""))
    return len(alive)


def _alive(found: Known) -> list[str]:
    """Ids of the jobs that are alive, those first that wait for others."""
    kinds: list[tuple[str, Kind]] = [(COLLECT, "collect")]
    kinds += [(run.id, kind) for kind in ("evaluate", "train") for run in found.plan.runs]
    jobs = [found.find(run, kind) for run, kind in kinds]
    return [job.id for job in jobs if job and job.alive]


def _refuse_elsewhere() -> None:
    lacking = [script for script in (*SCRIPTS.values(), "launch/train.py") if not Path(script).is_file()]
    if lacking:
        remedy = "Submit from the checkout: jobs run in the directory they are submitted from."
        raise RunError(describe(str(Path.cwd()), f"no {lacking[0]}", "not a checkout of hybrid_scale", remedy))


def _refuse_broken(views: Sequence[View]) -> None:
    broken = [view.train.detail for view in views if view.train.word == "broken"]
    if broken:
        raise RunError("\n".join(broken))


def _refuse_another_users(plan: Plan, views: Sequence[View]) -> None:
    """squeue may show a user's own jobs alone: those of another one would look as if they were gone."""
    theirs = {run: user for run, user in Journal(plan.directory).users().items() if user != os.getuid()}
    open_ = [view.run.id for view in views if view.train.word != "done" and view.train.job is None and view.run.id in theirs]
    if open_:
        rule = f"user {theirs[open_[0]]} submitted it, and whether the job is alive isn't shown to another user"
        remedy = f"Have that user submit; if none of the jobs can be alive, delete {Journal(plan.directory).path}."
        raise RunError(describe(open_[0], "no job", rule, remedy))


def _restore(file: Path, before: bytes | None) -> None:
    if before is None:
        file.unlink()
    else:
        write_text(file, before.decode("utf-8"))


class Submission:
    """One call of `submit`, under the study's lock."""

    def __init__(self, plan: Plan, site: Site, found: Known, lock: int, say: Say):
        self.plan, self.site, self.found, self.lock, self.say = plan, site, found, lock, say
        self.journal = Journal(plan.directory)
        self.started = self.left = 0
        self.room = self._room()

    def _room(self) -> float:
        """How many jobs more may be in the queue, besides the one that collects."""
        if self.site.max_jobs_in_queue is None:
            return float("inf")
        collecting = self.found.find(COLLECT, "collect")
        replaced = collecting is not None and collecting.waits
        return self.site.max_jobs_in_queue - sum(job.alive for job in self.found.jobs) - (0 if replaced else 1)

    def adopt(self) -> None:
        """Note jobs that are in Slurm but not in the journal: their submission died in between."""
        for run in self.plan.runs:
            for kind in ("train", "evaluate"):
                job = self.found.find(run.id, kind)
                if job and self.found.noted.get((run.id, kind)) != job.id:
                    self.journal.add(run.id, kind, job.id)
                    self.say(f"{run.id}: found {kind} job {job.id} ({job.state.lower()}), which no submission had noted")

    def start(self, view: View, again: bool) -> None:
        """Submit what `view` lacks: its training, its evaluation, both or nothing; all of it or, in a full queue, nothing."""
        train = view.train.job.id if view.train.job and view.train.job.alive else None
        fresh = view.train.word == "planned" or (again and view.train.word in TO_START_AGAIN)
        score = self._to_evaluate(view, fresh, again) and (fresh or train is not None or view.train.word == "done")
        if fresh + score > self.room:
            self.left += 1
            return
        self.room -= fresh + score
        if fresh:
            if train:  # it waits for ever
                slurm.cancel([train])
            train = self._train(view.run)
        if score:
            if view.evaluate and view.evaluate.job and view.evaluate.job.alive:
                slurm.cancel([view.evaluate.job.id])  # it waits for the training that has failed
            self._evaluate(view, train)

    def _to_evaluate(self, view: View, fresh: bool, again: bool) -> bool:
        if view.evaluate is None or not view.left:
            return False
        return fresh or view.evaluate.word == "planned" or (again and view.evaluate.word in TO_START_AGAIN)

    def _train(self, run: PlannedRun) -> str:
        directory = RunDirectory(run.directory)
        config = self.plan.directory / "configs" / f"{run.id}.yaml"
        write_text(config, dump_config(run.config))
        before = directory.status_file.read_bytes() if directory.status_file.exists() else None
        directory.set_status("queued")  # before sbatch: the job may speak at once
        ours = directory.status_file.read_bytes()
        try:
            return self._submit(run.id, "train", [str(config)], run, run.resources, "afterok", [])
        except SlurmError:
            if directory.status_file.read_bytes() == ours:  # an sbatch that timed out may have made a job, which speaks by now
                _restore(directory.status_file, before)
            raise

    def _evaluate(self, view: View, train: str | None) -> None:
        forget_failures(RunDirectory(view.run.directory))
        after = [train] if train else []
        self._submit(
            view.run.id, "evaluate", [str(view.run.directory), *view.left], view.run, view.run.resources, "afterok", after
        )

    def collect(self) -> None:
        """One job that reports when all others have ended, however they ended; in place of one that waits for fewer."""
        now = Known(self.plan, slurm.jobs(), self.journal.latest())
        alive, waiting = _alive(now), now.find(COLLECT, "collect")
        if waiting and waiting.alive:
            if not self.started:
                return
            alive.remove(waiting.id)
            if waiting.waits:
                slurm.cancel([waiting.id])
        if alive:
            arguments = [self.plan.source, *self.plan.settings]
            self._submit(COLLECT, "collect", arguments, None, Resources(), "afterany", alive)

    def _submit(
        self,
        name: str,
        kind: Kind,
        arguments: Sequence[str],
        run: PlannedRun | None,
        resources: Resources,
        after: str,
        jobs: Sequence[str],
    ) -> str:
        home = run.directory if run else self.plan.directory
        options = [
            f"--job-name={job_name(self.plan, name, kind)}",
            f"--output={home / f'slurm-{kind}-%j.log'}",
            dependency(after, jobs),
            *(["--kill-on-invalid-dep=yes"] if jobs else []),
            *sbatch_options(self.site, kind, resources, run.model if run else None),
        ]
        env = environment(self.site, resources) | ({"HS_RUN_DIRECTORY": str(run.directory)} if run else {})
        try:
            job = slurm.submit(SCRIPTS[kind], arguments, options, env, self.lock)
        except SlurmError as error:
            left = f"{self.started} jobs were submitted before it. Submit again to go on: nothing starts twice."
            raise SlurmError(f"{name}: {kind}: {error}\n{left}") from None
        self.journal.add(name, kind, job)
        self.started += 1
        self.say(f"{name}: {kind} is job {job}" + (f", {after} {' '.join(jobs)}" if jobs and run else ""))
        return job

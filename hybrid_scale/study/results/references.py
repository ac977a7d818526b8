"""What stands beside a study's arms without being trained by it: the untrained bases, and the baselines that
launch/baselines.py has written into BASELINES of the study's directory; and which sets are in-domain for its
training data.

A result of another version of a set doesn't count, and is told. Knows no HTML.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from hybrid_scale.errors import HybridScaleError
from hybrid_scale.protocols import BEIR as PROTOCOL
from hybrid_scale.runs import RunDirectory, read_json
from hybrid_scale.study.family import BEIR
from hybrid_scale.study.grid import Plan
from hybrid_scale.study.results.beir import BeirMean
from hybrid_scale.study.results.collect import Collected
from hybrid_scale.study.results.evaluations import protocol_stated
from hybrid_scale.study.results.scores import arms, tasks, untrained

BASELINES = "baselines"
"""Folder in a study's directory: NAME/eval/SET.json, as `launch/baselines.py --out STUDY/baselines` writes it."""
UNTRAINED = "untrained base"


@dataclass(frozen=True)
class Reference:
    """Something that the study didn't train: untrained base, BM25, a published encoder, language-mean subtraction."""

    name: str
    scores: Mapping[tuple[str, str], float]
    """(set, metric) -> score."""
    group: str | None = None
    """Whose arms it stands with; None: with all."""
    trained: bool = False
    """Whether it is a trained arm after a correction: shown beside the arms, which needn't beat it."""


Results = Mapping[str, Sequence[Mapping[str, Any]]]
"""Set -> the evaluations of the study's finished models on it."""


def references(plan: Plan, collected: Collected, results: Results) -> tuple[list[Reference], list[str]]:
    """The untrained bases in the order of their groups, then the baselines by name; and what of them doesn't count,
    with the reason."""
    start = {task: untrained(collected, task) for task in tasks(collected)}
    groups = dict.fromkeys(group for by_group in start.values() for group in by_group)
    found = [
        Reference(
            UNTRAINED,
            {(task, key): score.mean for task, by_group in start.items() for key, score in by_group.get(group, {}).items()},
            group,
        )
        for group in groups
    ]
    found += [_with_mean(each, collected.beir) for each in _without_means(plan, collected)]
    faults: list[str] = []
    known = {
        task: _Set(
            {str(content["fingerprint"]) for content in contents if content.get("fingerprint")},
            arms(collected, task)[0].protocol,
        )
        for task, contents in results.items()
    }
    for home in sorted((plan.directory / BASELINES).glob("*/eval")):
        reference = _with_mean(_baseline(home, known, faults), collected.beir)
        if reference.scores:
            found.append(reference)
    return found, faults


def _without_means(plan: Plan, collected: Collected) -> Iterator[Reference]:
    """The untrained bases, then the finished arms, with the mean of each language subtracted from the same vectors
    (`evaluation.subtract_language_means`): means over the runs that say so."""
    rows, values = collected.runs.set_index("run"), collected.values
    doubted = values[values["doubt"].notna()]
    doubts = set(zip(doubted["run"], doubted["task"], doubted["final"], strict=True))
    sums: dict[tuple[str, str, bool], dict[tuple[str, str], list[float]]] = {}
    for run in plan.runs:
        row = rows.loc[run.id]
        for task in tasks(collected):
            for trained, step in ((False, 0), (True, None)):
                if (trained and row["status"] != "done") or (run.id, task, trained) in doubts:
                    continue
                metrics = _moved(RunDirectory(run.directory).evaluation_file(task, step))
                place = sums.setdefault((str(row["group"]), str(row["arm"]) if trained else UNTRAINED, trained), {})
                for key, value in metrics.items():
                    place.setdefault((task, key), []).append(value)
    for group, name, trained in sorted(sums, key=lambda place: place[2]):
        scores = {key: fmean(values) for key, values in sums[group, name, trained].items()}
        if scores:
            yield Reference(f"{name}, language means subtracted", scores, group, trained)


def _moved(file: Path) -> dict[str, float]:
    """Metrics of an evaluation with means subtracted; empty where it has none, or can't be read (`collect` tells it)."""
    try:
        content = read_json(file) if file.exists() else {}
        metrics = content["without_language_means"]["metrics"] if "without_language_means" in content else {}
        return {str(key): float(value) for key, value in metrics.items() if value is not None}
    except (HybridScaleError, KeyError, TypeError, ValueError, AttributeError):
        return {}


@dataclass(frozen=True)
class _Set:
    """What a baseline's result of a set must agree with."""

    fingerprints: set[str]
    protocol: str
    """Empty where no result of the study counts."""


def _baseline(home: Path, known: Mapping[str, _Set], faults: list[str]) -> Reference:
    """One baseline on the sets that the study has scored; `faults` gets what doesn't count."""
    name, scores = home.parent.name, dict[tuple[str, str], float]()
    for file in sorted(home.glob("*.json")):
        try:
            content = read_json(file)
            task, metrics, print_ = content["task"], content["metrics"], content.get("fingerprint")
            numbers = {(task, key): float(value) for key, value in metrics.items() if value is not None}
            name = str(content["baseline"]["name"])
            protocol, doubt = protocol_stated(content, f"{BASELINES}/{home.parent.name}: {file.name}")
        except (HybridScaleError, KeyError, TypeError, ValueError, AttributeError) as error:
            faults.append(f"{BASELINES}/{home.parent.name}: {file.name} isn't a result of launch/baselines.py ({error})")
            continue
        if task not in known:
            continue
        ours = known[task]
        if print_ and ours.fingerprints and print_ not in ours.fingerprints:
            faults.append(f"{BASELINES}/{home.parent.name}: {file.name} is of another version of {task} and doesn't count")
        elif doubt or (ours.protocol and protocol != ours.protocol):
            other = f"{BASELINES}/{home.parent.name}: {file.name} was scored by another protocol than {task} and doesn't count"
            faults.append(doubt or other)
        else:
            scores |= numbers
    return Reference(name, scores)


def _with_mean(reference: Reference, mean: BeirMean | None) -> Reference:
    """With its mean over the same sets of BEIR as the study's, where it has them all."""
    scores = dict(reference.scores)
    for key in PROTOCOL.headline if mean else ():
        of = [reference.scores.get((task, key)) for task in mean.tasks.values()] if mean else []
        known = [score for score in of if score is not None]
        if len(known) == len(of):
            scores[BEIR, key] = fmean(known)
    return replace(reference, scores=scores)


def in_domain(results: Results) -> dict[str, tuple[str, ...]]:
    """Set -> the sources in the training data that make it in-domain, for each set of which a run's evaluation says so."""
    found: dict[str, tuple[str, ...]] = {}
    for task, contents in results.items():
        for content in contents:
            said = content.get("in_domain")
            if isinstance(said, dict) and said.get("verdict"):
                found.setdefault(task, tuple(map(str, said.get("sources") or ())))
    return found


def final_results(plan: Plan, collected: Collected) -> Results:
    """Every readable evaluation of the study's finished models, each file read once."""
    return {task: list(_evaluations(plan, task)) for task in tasks(collected)}


def _evaluations(plan: Plan, task: str) -> Iterator[dict[str, Any]]:
    """The readable evaluations of the set's finished models; what is wrong with the others was told by `collect`."""
    for run in plan.runs:
        file = RunDirectory(run.directory).evaluation_file(task)
        try:
            content = read_json(file) if file.exists() else None
        except HybridScaleError:
            continue
        if isinstance(content, dict):
            yield content

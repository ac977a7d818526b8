"""Study files and run directories made up for tests, without training."""

import json
import math
import random
from pathlib import Path
from typing import Any

import yaml

from hybrid_scale.runs import RunDirectory, write_json
from hybrid_scale.study.grid import Plan, PlannedRun, plan_study

BASE: dict[str, Any] = {
    "data": {"train": "data/pairs", "evaluate": ["data/xquad_r"]},
    "sampler": {"global_batch": 64},
    "model": {"base": "Qwen/Qwen3-0.6B", "dtype": "float32"},
    "training": {"max_steps": 20, "evaluate_every_steps": 10},
}
ARMS = ("mono", "cross", "hybrid", "mixed")
SCORES = {
    "mono": {"mono_map": 0.7918, "cross_map": 0.6737, "multi_map": 0.5479, "mono_r@1": 0.71, "rank_distance": 410.2},
    "cross": {"mono_map": 0.7554, "cross_map": 0.6997, "multi_map": 0.5934, "mono_r@1": 0.67, "rank_distance": 295.4},
    "hybrid": {"mono_map": 0.7977, "cross_map": 0.7053, "multi_map": 0.5927, "mono_r@1": 0.72, "rank_distance": 286.6},
    "mixed": {"mono_map": 0.7401, "cross_map": 0.5105, "multi_map": 0.2310, "mono_r@1": 0.66, "rank_distance": 702.8},
}
"""Like the published XLM-R results on XQuAD-R (2408.10536); `mixed` is invented."""


def study_tree(directory: Path, **changes: Any) -> dict[str, Any]:
    tree = {
        "study": {"name": "ladder", "directory": str(directory)},
        "base": BASE,
        "arms": [{"name": arm, "set": {"sampler.arm": arm}} for arm in ARMS],
        "seeds": [0, 1],
    }
    return {**tree, **changes}


def write_study(folder: Path, **changes: Any) -> Path:
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(study_tree(folder / "out", **changes)), encoding="utf-8")
    return path


def fabricated(folder: Path, scores: dict[str, dict[str, float]] = SCORES, **changes: Any) -> Plan:
    """A plan whose runs of the arms in `scores` are done and evaluated."""
    plan = plan_study(write_study(folder, **changes))
    for run in plan.runs:
        if run.arm in scores:
            finish(run, scores[run.arm])
    return plan


def start(run: PlannedRun, steps: int) -> RunDirectory:
    """A run that has logged `steps` steps."""
    directory = RunDirectory(run.directory)
    directory.create(run.config)
    write_json(directory.manifest_file, {"commit": "0123abc", "world_size": 2, "versions": {"torch": "2.13.0"}, "host": run.id})
    chance = random.Random(run.id)
    for step in range(1, steps + 1):
        loss = 0.6 + 3 * math.exp(-4 * step / run.config.training.max_steps) + chance.gauss(0, 0.05)
        directory.append_metrics({"step": step, "loss": loss, "learning_rate": 1e-4, "seconds": 1.5, "peak_gib": 2.25})
    return directory


def finish(run: PlannedRun, scores: dict[str, float], task: str = "xquad_r") -> None:
    """Make `run` done, with small differences between seeds and evaluations on the way."""
    steps = run.config.training.max_steps
    directory = start(run, steps)
    for step in (0, steps // 2, None):
        share = (steps if step is None else step) / steps
        shown = {key: value * (0.4 + 0.6 * math.sqrt(share)) for key, value in scores.items()} if share < 1 else scores
        noisy = {key: value * (1 + 0.002 * (run.seed % 3) * (share > 0)) for key, value in shown.items()}
        write_json(directory.evaluation_file(task, step), evaluation(task, steps if step is None else step, noisy))
    directory.set_status("done")


def evaluation(task: str, step: int, scores: dict[str, float]) -> dict[str, Any]:
    languages = ["ar", "de", "el", "en", "es", "hi", "ru", "th", "tr", "vi", "zh"]
    mono, cross = scores.get("mono_map", 0.5), scores.get("cross_map", 0.4)
    drop = {language: 0.012 * abs(languages.index(language) - 3) for language in languages}
    maps = [[round((mono if x == y else cross) - (drop[x] + drop[y]) / 2, 4) for y in languages] for x in languages]
    own = min(0.9, 0.2 + (mono - cross) * 3)
    top = [[round(own if x == y else (1 - own) / 10, 4) for y in languages] for x in languages]
    return {
        "task": task,
        "step": step,
        "queries": 13090,
        "passages": 13014,
        "languages": languages,
        "metrics": scores,
        "by_language": {"mono_map": {language: maps[n][n] for n, language in enumerate(languages)}},
        "map_matrix": {"query_languages": languages, "passage_languages": languages, "values": maps},
        "top1_language_matrix": {"query_languages": languages, "passage_languages": languages, "values": top},
    }


def lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]

"""Study files and run directories made up for tests, without training."""

import json
import math
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import yaml
from pyarrow import parquet

from hybrid_scale.runs import RunDirectory, write_json
from hybrid_scale.study.grid import Plan, PlannedRun, plan_study
from hybrid_scale.study.results.collect import Collected, collect
from hybrid_scale.study.results.comparisons import Comparison, compare
from hybrid_scale.study.results.primary import Claim, claims, sorted_out

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


def start(run: PlannedRun, steps: int, seconds: float = 1.5, peak: float = 2.25) -> RunDirectory:
    """A run that has logged `steps` steps."""
    directory = RunDirectory(run.directory)
    directory.create(run.config)
    write_json(directory.manifest_file, {"commit": "0123abc", "world_size": 2, "versions": {"torch": "2.13.0"}, "host": run.id})
    chance = random.Random(run.id)
    for step in range(1, steps + 1):
        loss = 0.6 + 3 * math.exp(-4 * step / run.config.training.max_steps) + chance.gauss(0, 0.05)
        directory.append_metrics({"step": step, "loss": loss, "learning_rate": 1e-4, "seconds": seconds, "peak_gib": peak})
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


# ------------------------------------------------------------------------------------- several sizes, with single queries

FAMILY = ("0.5B", "1.5B", "3B", "7B", "14B", "32B", "72B")
LANGUAGES = ("ar", "de", "en")
DEVICE = "NVIDIA H100 80GB HBM3"


def scaled(
    folder: Path,
    models: Sequence[str] = FAMILY,
    seeds: Sequence[int] = (0, 1, 2),
    questions: int = 40,
    device: str = DEVICE,
    **changes: Any,
) -> Plan:
    """A finished study over sizes of Qwen2.5: mono, cross, hybrid; the last is better by .03 in cross mAP at every size."""
    axis = [{"name": name, "set": {"model.base": f"Qwen/Qwen2.5-{name}"}, "resources": {"gpus_per_node": 8}} for name in models]
    arms = [{"name": arm, "set": {"sampler.arm": arm}} for arm in ("mono", "cross", "hybrid")]
    plan = plan_study(write_study(folder, models=axis, arms=arms, seeds=list(seeds), **changes))
    for run in plan.runs:
        finish_scaled(run, float((run.model or "1B").rstrip("B")), questions, device)
    return plan


def finish_scaled(run: PlannedRun, billions: float, questions: int, device: str = DEVICE, task: str = "xquad_r") -> None:
    """Make `run` done; its error falls as billions^-.2, its single queries share the difficulty of their question."""
    steps = run.config.training.max_steps
    directory = start(run, steps, seconds=0.5 + 0.4 * billions, peak=1.0 + 0.9 * billions)
    about = {"world_size": 8, "device": device, "host": run.id, "versions": {"torch": "2.13.0"}}
    write_json(directory.manifest_file, about)
    gain = {"mono": (0.02, 0.0, 0.0), "cross": (0.0, 0.03, 0.04), "hybrid": (0.02, 0.06, 0.05)}[run.arm]
    table = single_queries(questions, billions, gain, run.seed)
    save_queries(directory, task, table)
    content = evaluation(task, steps, means_of(table)) | {"fingerprint": "f00d", "languages": list(LANGUAGES)}
    write_json(directory.evaluation_file(task), content)
    directory.set_status("done")


def single_queries(questions: int, billions: float, gain: tuple[float, float, float], seed: int) -> pd.DataFrame:
    """A table as launch/evaluate.py writes it. `gain`: what mono, cross and multi values get above the size's level."""
    hard = np.random.default_rng(7).normal(0, 0.05, questions)
    chance = np.random.default_rng(1000 * seed + int(10 * billions) + int(1e4 * sum(gain)))
    rows: list[dict[str, Any]] = []
    for question in range(questions):
        for language in LANGUAGES:
            for pool in ("union", *LANGUAGES):
                kind = 2 if pool == "union" else 0 if pool == language else 1
                level = 1 - (0.25, 0.35, 0.45)[kind] * billions**-0.2 + gain[kind] + hard[question] + 0.004 * (seed % 3)
                value = float(np.clip(level + chance.normal(0, 0.02), 0.01, 1))
                rows.append(
                    {"query": f"{question}-{language}", "query_lang": language, "group": str(question), "pool": pool}
                    | {"relevant": 3 if pool == "union" else 1, "map": value, "r@1": float(value > 0.7)}
                    | {"recall@10": value, "ndcg@10": value, "recall@100": 1.0, "mrr@10": value}
                    | {"rank_distance": 300 * (1 - value) if pool == "union" else None}
                )
    return pd.DataFrame(rows)


# ----------------------------------------------------------------------------------------- 7 sizes, 6 arms, a known truth

SIX = (*({"name": arm, "set": {"sampler.arm": arm}} for arm in ("mono", "cross", "hybrid", "mixed")),)
"""With three alphas they are six arms."""
ALPHAS = (0.25, 0.5, 0.75)
TRUE_GAINS: dict[tuple[str, str, str], tuple[float, float]] = {
    ("xquad_r", "mono_map", "mono"): (0.0, 0.0),
    ("xquad_r", "mono_map", "cross"): (0.04, 0.0),
    ("xquad_r", "cross_map", "mono"): (0.05, 0.05),
    ("xquad_r", "cross_map", "cross"): (0.0, 0.0),
    ("xquad_r", "multi_map", "mono"): (0.06, 0.06),
    ("xquad_r", "multi_map", "cross"): (0.0, 0.0),
    ("nq", "ndcg@10", "mono"): (-0.03, -0.03),
    ("nq", "ndcg@10", "cross"): (0.04, 0.0),
}
"""(set, metric, rival) -> what hybrid-0.5 is better by up to 7B and at 72B; in between it runs with log10(parameters)."""
TRUE_LEVELS = {"mono_map": 0.75, "cross_map": 0.7, "multi_map": 0.65, "ndcg@10": 0.6}
"""Of hybrid-0.5 from 3B on; below it falls by 0.1 for each tenth of the parameters, as published families flatten near 2B."""


def true_gain(name: str, metric: str, rival: str, billions: float) -> float:
    small, large = TRUE_GAINS[name, metric, rival]
    share = float(np.clip(math.log10(billions / 7) / math.log10(72 / 7), 0, 1))
    return small + share * (large - small)


def true_level(name: str, metric: str, arm: str, billions: float) -> float:
    """The expectation of `metric` of `arm` on the set `name`."""
    hybrid = TRUE_LEVELS[metric] - 0.1 * max(0.0, math.log10(3 / billions))
    if arm in ("mono", "cross"):
        return hybrid - true_gain(name, metric, arm, billions)
    return hybrid - {"hybrid-0.25": 0.002, "hybrid-0.5": 0.0, "hybrid-0.75": 0.002, "mixed": 0.1}[arm]


def known_truth(
    folder: Path, seeds: Sequence[int] = (0, 1, 2), questions: int = 120, seed_sd: float = 0.0005, **changes: Any
) -> Plan:
    """A finished study of 7 sizes x 6 arms x `seeds` on XQuAD-R and NQ whose truth is TRUE_GAINS: an effect at 7B that
    vanishes at 72B, some that stay, some that are null. Takes seconds. `seed_sd`: of one arm's score between seeds."""
    axis = [
        {"name": name.lower(), "set": {"model.base": f"Qwen/Qwen2.5-{name}"}, "resources": {"gpus_per_node": 8}}
        for name in FAMILY
    ]
    study = {"name": "truth", "directory": str(folder / "out"), "contrast": ["7b", "72b"]}
    parts = {"models": axis, "arms": list(SIX), "alpha": list(ALPHAS), "seeds": list(seeds), "evaluate": ["data/nq"]}
    parts["overrides"] = {"training.max_steps": 3}
    plan = plan_study(write_study(folder, **{"study": study, **parts, **changes}))
    sets = {"xquad_r": Blank.of(LANGUAGES, questions), "nq": Blank.of(("en",), questions)}
    for number, run in enumerate(plan.runs):
        billions, steps = float((run.model or "").rstrip("b")), run.config.training.max_steps
        directory = start(run, steps, seconds=0.5 + 0.4 * billions, peak=1.0 + 0.9 * billions)
        about = {"world_size": 8, "device": DEVICE, "host": run.id, "versions": {"torch": "2.13.0"}}
        write_json(directory.manifest_file, about)
        chance = np.random.default_rng(number)
        for name, blank in sets.items():
            table, scores = blank.filled(name, run.arm, billions, seed_sd, chance)
            save_queries(directory, name, table)
            content = evaluation(name, steps, scores) | {"fingerprint": "f00d", "languages": list(blank.languages)}
            content |= {"queries": questions * len(blank.languages), "passages": 1200 * len(blank.languages)}
            if len(blank.languages) == 1:
                content |= {"by_language": {}, "map_matrix": None, "top1_language_matrix": None}
            write_json(directory.evaluation_file(name), content)
        directory.set_status("done")
    return plan


@dataclass(frozen=True)
class Known:
    """A plan with what its runs say."""

    plan: Plan
    collected: Collected
    claims: list[Claim]
    comparisons: list[Comparison]

    @classmethod
    def of(cls, plan: Plan) -> "Known":
        collected = collect(plan)
        compared = compare(collected, {run.id: run.directory for run in plan.runs}, plan.family)
        found = claims(plan.family, collected, compared)
        return cls(plan, collected, found, sorted_out(compared, found))


@dataclass(frozen=True)
class Blank:
    """The rows of a table of single queries without their values: one block of `questions` rows for each of `cells`."""

    languages: tuple[str, ...]
    questions: int
    cells: tuple[tuple[str, str], ...]
    """(query language, pool)"""
    columns: pd.DataFrame
    hard: np.ndarray
    """[questions] how hard they are for every arm."""

    @classmethod
    def of(cls, languages: Sequence[str], questions: int) -> "Blank":
        pools = ("union", *languages) if len(languages) > 1 else ("union",)
        cells = tuple((language, pool) for language in languages for pool in pools)
        numbers = np.arange(questions).astype(str)
        columns = {
            "query": np.concatenate([np.char.add(numbers, f"-{language}") for language, _ in cells]),
            "query_lang": np.repeat([language for language, _ in cells], questions),
            "group": np.tile(numbers, len(cells)),
            "pool": np.repeat([pool for _, pool in cells], questions),
            "relevant": np.repeat([len(languages) if pool == "union" else 1 for _, pool in cells], questions),
        }
        hard = np.random.default_rng(11).normal(0, 0.08, questions)
        return cls(tuple(languages), questions, cells, pd.DataFrame(columns), hard - hard.mean())

    def metric(self, cell: tuple[str, str]) -> str:
        language, pool = cell
        if len(self.languages) == 1:
            return "ndcg@10"
        return "multi_map" if pool == "union" else "mono_map" if pool == language else "cross_map"

    def filled(
        self, name: str, arm: str, billions: float, seed_sd: float, chance: np.random.Generator
    ) -> tuple[pd.DataFrame, dict[str, float]]:
        """The table of one run around `true_level`, and its means."""
        shift = {metric: chance.normal(0, seed_sd) for metric in TRUE_LEVELS}
        kinds = [self.metric(cell) for cell in self.cells]
        levels = np.array([true_level(name, kind, arm, billions) + shift[kind] for kind in kinds])[:, None]
        of_question = self.hard + chance.normal(0, 0.006, self.questions)
        values = np.clip(levels + of_question + chance.normal(0, 0.015, (len(kinds), self.questions)), 0.001, 1)
        table = self.columns.assign(**dict.fromkeys(("map", "ndcg@10", "recall@10", "mrr@10"), values.ravel()))
        table["r@1"] = (table["map"] > 0.7).astype(float)
        table["recall@100"] = np.clip(table["map"] + 0.2, 0, 1)
        if len(self.languages) == 1:
            return table, {key: float(table[key].mean()) for key in ("ndcg@10", "recall@100")}
        union = table["pool"] == "union"
        table["rank_distance"] = (300 * (1 - table["map"])).where(union)
        of_kind = {kind: [n for n, other in enumerate(kinds) if other == kind] for kind in dict.fromkeys(kinds)}
        means = {kind: float(values[rows].mean()) for kind, rows in of_kind.items()}
        own = values[of_kind["mono_map"]]
        return table, means | {"mono_r@1": float((own > 0.7).mean()), "rank_distance": 300 * (1 - means["multi_map"])}


def save_queries(directory: RunDirectory, task: str, table: pd.DataFrame, fingerprint: str = "f00d") -> Path:
    path = directory.evaluation_file(task).with_suffix(".parquet")
    path.parent.mkdir(exist_ok=True)
    parquet.write_table(pa.Table.from_pandas(table).replace_schema_metadata({"task": task, "fingerprint": fingerprint}), path)
    return path


def means_of(table: pd.DataFrame) -> dict[str, float]:
    """The measures by loops, as their definitions read."""

    def mean(column: str, chosen: Callable[[str, str], bool]) -> float:
        cells: dict[tuple[str, str], list[float]] = {}
        for language, pool, value in zip(table["query_lang"], table["pool"], table[column], strict=True):
            if chosen(language, pool):
                cells.setdefault((language, pool), []).append(value)
        return statistics.fmean(statistics.fmean(values) for values in cells.values())

    own, other, union = (lambda x, p: p == x), (lambda x, p: p not in (x, "union")), (lambda x, p: p == "union")
    return {
        **{"mono_map": mean("map", own), "cross_map": mean("map", other), "multi_map": mean("map", union)},
        **{"mono_r@1": mean("r@1", own), "rank_distance": mean("rank_distance", union)},
    }


def lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]

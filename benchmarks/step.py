"""CPU-seconds and memory of one training step: sentence-transformers, bounds without any framework, and ours.

    python benchmarks/step.py [--case A B C] [--systems NAME ...] [--rounds N] [--steps N] [--json OUT.json]
    python benchmarks/step.py --case B --model models/gemma3-270m --data data/train      # a real decoder on real text

Two gloo processes of one thread. Every system sees the same rows in the same order from the same weights and must report
the same loss. CPU-seconds are those of a whole process, mean of the ranks, median of all timed steps; systems take turns, so
that a busy machine burdens all alike. The first step of the first round is measured for memory (_ranks.give_back_freed_memory).
The bounds get their tokens for nothing; all others make them in each step.

A  random Llama (256 wide, 4 layers), LoRA r=8, float32, global batch of 64 pairs, texts of 8 to 256 tokens
B  a decoder and prepared pairs of yours, bfloat16, global batch of 16 pairs, texts of up to 512 tokens
C  A with a global batch of 512

Not in any table here: Tevatron and GritLM. Their packages on PyPI are years older than what their users run.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import _environment  # noqa: F401 (before the heavy libraries)
from _inputs import Batch, batches, copy_with_end_token, link_data, write_random_model, write_random_pairs
from _ranks import machine, run_ranks
from _systems import Job, Measured, measure

from hybrid_scale.config import RunConfig, validate
from hybrid_scale.train.batches import open_training_data

WORLD = 2
MICRO_BATCH = 512
ALL = 10_000_000
RESULTS = Path(__file__).parent / "results" / "step.json"
ZERO3 = Path(__file__).parent.parent / "ds_configs" / "zero3.json"
Sections = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class System:
    """A row of the table. `memory_grows` with the batch: too large for an ordinary machine in case C."""

    label: str
    kind: str
    options: dict[str, Any] = field(default_factory=dict)
    sections: Sections = field(default_factory=dict)
    cases: str = "ABC"
    memory_grows: bool = False


def ours(label: str, cases: str = "ABC", memory_grows: bool = False, model: Any = None, **training: Any) -> System:
    sections = {"training": training, "model": model or {}}
    return System(f"ours: {label}", "ours", sections=sections, cases=cases, memory_grows=memory_grows)


DIRECT = {"passes": "direct", "max_kept_tokens": ALL}
TWO_PASS = {"passes": "two_pass"}
LORA = {"rank": 8, "alpha": 16.0}
LORA32 = {**LORA, "compute": "float32"}
SYSTEMS: dict[str, System] = {
    "st": System("sentence-transformers MNRL + gather", "peer", memory_grows=True),
    "st-cached": System("sentence-transformers cached MNRL + gather, mini-batch 8", "peer", {"mini_batch_size": 8}),
    "st-cached-4": System("  the same, mini-batch 4", "peer", {"mini_batch_size": 4}, cases=""),
    "st-cached-tokens": System("  the same, mini_batch_num_tokens 512", "peer", {"mini_batch_num_tokens": 512}, cases=""),
    "bound-direct": System("bound, direct", "bound", {"passes": 1, "tokens": MICRO_BATCH}, memory_grows=True),
    "bound-two-pass": System("bound, two-pass", "bound", {"passes": 2, "tokens": MICRO_BATCH}),
    "direct": ours("packed, direct", memory_grows=True, **DIRECT),
    "kept": ours("packed, graphs of 2,048 tokens kept", "AB", max_kept_tokens=4 * MICRO_BATCH),
    "kept-1024": ours("packed, graphs of 1,024 tokens kept", "B", max_kept_tokens=2 * MICRO_BATCH),
    "two-pass": ours("packed, two-pass", **TWO_PASS),
    "direct-lora32": ours("packed, direct, LoRA products in float32 as in peft", "B", model={"lora": LORA32}, **DIRECT),
    "padded-direct": ours("padded, direct", "A", model={"attention_implementation": "sdpa"}, **DIRECT),
    "padded-two-pass": ours("padded, two-pass", "A", model={"attention_implementation": "sdpa"}, **TWO_PASS),
    "checkpointed": ours("packed, direct, gradient checkpointing", "A", model={"gradient_checkpointing": True}, **DIRECT),
    "zero3": ours("packed, direct, DeepSpeed ZeRO-3", "A", engine="deepspeed", deepspeed=str(ZERO3), **DIRECT),
}


@dataclass(frozen=True)
class Case:
    """Inputs of one table. `tolerance`: relative difference of the first losses that rounding alone explains (bfloat16: 1.2 and
    2.6 % between systems, texts of 512 tokens, temperature .02)."""

    name: str
    title: str
    global_batch: int
    rounds: int
    steps: int
    tolerance: float
    sections: Sections


def cases(given: argparse.Namespace) -> dict[str, Case]:
    random = {"data": {"max_query_tokens": 256, "max_passage_tokens": 256}, "model": {"dtype": "float32"}}
    one_pool = {"arm": "mixed", "composition": "scheduled"}
    real: Sections = {
        "data": {"max_query_tokens": given.longest, "max_passage_tokens": given.longest},
        "model": {"dtype": "bfloat16"},
    }
    title = "random Llama 256 x 4, float32, LoRA r=8, global batch"
    name = given.model.name if given.model else "no model"
    return {
        "A": Case("A", f"{title} 64", 64, 2, 2, 1e-4, {**random, "sampler": {"global_batch": 64, **one_pool}}),
        "B": Case(
            "B",
            f"{name}, bfloat16, LoRA r=8, global batch {given.pairs}, texts cut at {given.longest} tokens",
            *(given.pairs, 1, 2, 3e-2),
            {**real, "sampler": {"global_batch": given.pairs, **one_pool}},
        ),
        "C": Case("C", f"{title} 512", 512, 1, 1, 1e-4, {**random, "sampler": {"global_batch": 512, **one_pool}}),
    }


# ------------------------------------------------------------------------------------------------------------- one case


def run_config(folder: Path, *sections: Sections) -> RunConfig:
    """The settings that all systems share, with those of a case and a system on top."""
    tree: Sections = {
        "run": {"directory": str(folder / "run"), "seed": 1},
        "data": {"train": str(folder / "data")},
        "model": {
            "base": str(folder / "model"),
            "query_prompt": "",
            "passage_prompt": "",
            "lora": LORA,
            "gradient_checkpointing": False,
        },
        "loss": {"temperature": 0.02},
        "optimizer": {"learning_rate": 1e-4, "schedule": "constant"},
        "training": {
            "engine": "plain",
            "max_steps": 100,
            "max_tokens_per_micro_batch": MICRO_BATCH,
            "max_tokens_per_embedding_batch": MICRO_BATCH,
        },
    }
    for group in sections:
        for name, values in group.items():
            tree[name] = {**tree.get(name, {}), **values}
    return validate(RunConfig, tree, "benchmark")


def write_inputs(folder: Path, case: Case, given: argparse.Namespace) -> None:
    if case.name == "B":
        copy_with_end_token(given.model, folder / "model")
        link_data(given.data, folder / "data")
    else:
        write_random_model(folder / "model")
        write_random_pairs(folder / "data", case.global_batch * (case.steps + 2))


def run_case(case: Case, names: list[str], given: argparse.Namespace) -> dict[str, list[list[Measured]]]:
    """For each system and round, what the ranks measured."""
    results: dict[str, list[list[Measured]]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_inputs(folder, case, given)
        shared = run_config(folder, case.sections)
        rows: list[Batch] = batches(open_training_data(shared, WORLD), case.steps + 1)
        for turn in range(case.rounds):
            for name in names:
                system = SYSTEMS[name]
                config = run_config(folder, case.sections, system.sections)
                print(f"  round {turn + 1}/{case.rounds}: {system.label.strip()}", end="", flush=True)
                job = Job(system.kind, config, rows, case.steps, memory=turn == 0, options=system.options)
                results[name].append(run_ranks(measure, WORLD, job))
                print(f"  {' '.join(f'{s:.2f}' for s in cpu_of_steps(results[name][-1:]))}", flush=True)
    return results


def by_step(ranks: list[Measured]) -> list[tuple[float, ...]]:
    """CPU-seconds of each timed step, of all ranks."""
    return list(zip(*(rank.cpu for rank in ranks), strict=True))


def cpu_of_steps(rounds: Iterable[list[Measured]]) -> list[float]:
    """CPU-seconds of every timed step, mean of the ranks."""
    return [statistics.mean(step) for ranks in rounds for step in by_step(ranks)]


def losses(ranks: list[Measured]) -> list[float]:
    return [statistics.mean(step) for step in zip(*(rank.losses for rank in ranks), strict=True)]


def summary(rounds: list[list[Measured]], case: Case) -> dict[str, Any]:
    """One system in numbers."""
    cpu = cpu_of_steps(rounds)
    by_number = [cpu[step :: case.steps] for step in range(case.steps)]
    every = [rank for ranks in rounds for rank in ranks]
    real = sum(ranks[0].tokens["real"] for ranks in rounds) * WORLD
    tokens = {kind: sum(rank.tokens[kind] for rank in every) / real for kind in ("gradient", "plain")}
    phases = {name: [phase[name] for rank in every for phase in rank.phases] for name in every[0].phases[0]}
    return {
        "cpu_s": statistics.median(cpu),
        "cpu_s_undisturbed": statistics.mean(min(samples) for samples in by_number),
        "cpu_s_slowest_rank": statistics.median(max(step) for ranks in rounds for step in by_step(ranks)),
        "cpu_s_samples": [round(seconds, 4) for seconds in cpu],
        "wall_s": statistics.median(wall for rank in every for wall in rank.wall),
        "pairs_per_cpu_s": case.global_batch / (WORLD * statistics.median(cpu)),
        "training_mib": max(rank.training_mib for rank in rounds[0]),
        "resident_mib": statistics.median(max(rank.resident_mib for rank in ranks) for ranks in rounds),
        "model_mib": statistics.median(rank.model_mib for rank in every),
        "executed_per_real_token": round(tokens["gradient"], 4),
        "embedded_without_graph_per_real_token": round(tokens["plain"], 4),
        "phases_cpu_s": {name: statistics.median(seconds) for name, seconds in phases.items()},
        "losses": losses(rounds[0]),
    }


def loss_differences(systems: Mapping[str, Mapping[str, Any]]) -> dict[str, list[float]]:
    """By system: relative difference of each step's loss to the first system's."""
    first = next(iter(systems.values()))["losses"]
    return {name: [abs(a / b - 1.0) for a, b in zip(found["losses"], first, strict=True)] for name, found in systems.items()}


# ---------------------------------------------------------------------------------------------------------------- goals


@dataclass(frozen=True)
class Goal:
    what: str
    value: float
    limit: float
    at_least: bool

    @property
    def met(self) -> bool:
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def __str__(self) -> str:
        sign = ">=" if self.at_least else "<="
        return f"  {'met   ' if self.met else 'MISSED'}  {self.what}: {self.value:.3g}, goal {sign} {self.limit:.3g}"


def goals(systems: Mapping[str, Mapping[str, Any]]) -> list[Goal]:
    """Those whose systems were measured."""

    def ratio(a: str, b: str, key: str = "cpu_s") -> float | None:
        return systems[a][key] / systems[b][key] if a in systems and b in systems else None

    found: list[tuple[str, float | None, float, bool]] = [
        ("direct is faster than MNRL + gather, times", ratio("st", "direct"), 2.2, True),
        *_faster_than_cached(systems),
        ("direct takes of the direct bound's time", ratio("direct", "bound-direct"), 1.05, False),
        ("direct, LoRA as in the bound, takes of the direct bound's time", ratio("direct-lora32", "bound-direct"), 1.05, False),
        ("two-pass takes of the two-pass bound's time", ratio("two-pass", "bound-two-pass"), 1.05, False),
        ("two-pass needs of the cached MNRL's memory", ratio("two-pass", "st-cached", "training_mib"), 1 / 3, False),
    ]
    for name in ("direct", "two-pass"):
        if name in systems:
            phases = systems[name]["phases_cpu_s"]
            share = (phases["plan"] + phases["tokens"]) / systems[name]["cpu_s"]
            parts = f"sampling and plan {phases['plan'] * 1e3:.2f} ms, tokens {phases['tokens'] * 1e3:.2f} ms"
            found.append((f"{name}: preparing a step, share of it ({parts})", share, 0.01, False))
    return [Goal(what, value, limit, at_least) for what, value, limit, at_least in found if value is not None]


def _faster_than_cached(systems: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, float | None, float, bool]]:
    """Our fastest that needs no more memory than the cached loss."""
    if "st-cached" not in systems:
        return []
    peer = systems["st-cached"]
    schedules = [name for name in ("direct", "kept", "kept-1024", "two-pass") if name in systems]
    able = [name for name in schedules if systems[name]["training_mib"] <= peer["training_mib"]]
    if not able:
        return []
    best = min(able, key=lambda name: systems[name]["cpu_s"])
    return [(f"{best} is faster than cached MNRL in no more memory, times", peer["cpu_s"] / systems[best]["cpu_s"], 1.8, True)]


# --------------------------------------------------------------------------------------------------------------- printing


def table(systems: Mapping[str, Mapping[str, Any]]) -> str:
    lines = [
        f"  {'':58} {'CPU-s':>7} {'least':>7} {'pairs /':>8} {'memory':>7} {'resid.':>7} {'tokens':>7} {'1st':>6}",
        f"  {'per step and rank':58} {'median':>7} {'':7} {'CPU-s':>8} {'MiB':>7} {'MiB':>7} {'x real':>7} {'pass':>6}",
    ]
    for name, s in systems.items():
        lines.append(
            f"  {SYSTEMS[name].label:58} {s['cpu_s']:7.3f} {s['cpu_s_undisturbed']:7.3f} {s['pairs_per_cpu_s']:8.2f}"
            f" {s['training_mib']:7.0f} {s['resident_mib']:7.0f}"
            f" {s['executed_per_real_token']:7.3f} {s['embedded_without_graph_per_real_token']:6.2f}"
        )
    return "\n".join(lines)


LEGEND = """  least: of each step's rounds, then the mean of steps. memory: on top of model and optimizer, freed blocks returned
  at once; resid.: resident on top under the usual allocator. tokens: executed with gradient per real token; 1st pass: without."""


def selected(case: Case, given: argparse.Namespace) -> tuple[list[str], list[str]]:
    """Names to run, and those left out because they need too much memory."""
    if given.systems:
        return [name for name in SYSTEMS if name in given.systems], []
    known = [name for name, system in SYSTEMS.items() if case.name in system.cases]
    large = [name for name in known if SYSTEMS[name].memory_grows and case.name == "C"]
    return [name for name in known if name not in large], large


def report(case: Case, given: argparse.Namespace, before: Mapping[str, Any]) -> dict[str, Any]:
    """Run a case and print it; what goes into the JSON."""
    print(f"\nCase {case.name}: {case.title}, {WORLD} processes x 1 thread", flush=True)
    names, large = selected(case, given)
    results = run_case(case, names, given)
    systems = {name: summary(rounds, case) for name, rounds in results.items()}
    differences = loss_differences(systems)
    print(table(systems))
    for name in large:
        seen = before.get("A", {"systems": {}})["systems"].get(name)
        about = f"about {8 * seen['training_mib'] / 1024:.0f} GiB a rank (8 times case A)" if seen else "8 times case A's memory"
        print(f"  {SYSTEMS[name].label:58} not run: needs {about}; --systems {name} runs it")
    loss = next(iter(systems.values()))["losses"][0]
    first, worst = (max(each[0] for each in differences.values()), max(max(each) for each in differences.values()))
    print(LEGEND)
    print(f"  loss of step 1: {loss:.4f}; largest relative difference between systems: {first:.1e}, all steps: {worst:.1e}")
    met = goals(systems)
    print(*met, sep="\n")
    return {
        "title": case.title,
        "machine": machine(),
        "global_batch": case.global_batch,
        "systems": systems,
        "loss_difference_of_step_1": first,
        "loss_difference": worst,
        "same_step": first <= case.tolerance,
        "goals": [{"what": g.what, "value": g.value, "limit": g.limit, "at_least": g.at_least, "met": g.met} for g in met],
        "not_run": large,
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="+", choices=["A", "B", "C"], default=["A", "B", "C"])
    parser.add_argument("--systems", nargs="+", choices=list(SYSTEMS), help="instead of the case's own")
    parser.add_argument("--rounds", type=int, help="fresh starts of each system")
    parser.add_argument("--steps", type=int, help="timed steps of each start")
    parser.add_argument("--model", type=Path, help="case B: folder of a decoder")
    parser.add_argument("--data", type=Path, help="case B: prepared pairs")
    parser.add_argument("--pairs", type=int, default=16, help="case B: global batch (the uncached loss needs .6 GiB a pair)")
    parser.add_argument("--longest", type=int, default=512, help="case B: tokens at which texts are cut")
    parser.add_argument("--json", type=Path, default=RESULTS)
    return parser.parse_args()


def main() -> None:
    given = arguments()
    done: dict[str, Any] = {}
    for name, case in cases(given).items():
        if name not in given.case:
            continue
        if name == "B" and not (given.model and given.data):
            print("\nCase B: not run: needs --model and --data")
            continue
        changed = {key: getattr(given, key) for key in ("rounds", "steps") if getattr(given, key)}
        done[name] = report(Case(**{**vars(case), **changed}), given, done)
        keep(given.json, done)
    print("\nTevatron, GritLM: in none of these tables (their PyPI packages are years old).")
    different = [name for name, result in done.items() if not result["same_step"]]
    if different:
        raise SystemExit(f"the systems of case {', '.join(different)} don't start at one loss: not the same step")


def keep(path: Path, done: Mapping[str, Any]) -> None:
    """The cases measured now, and what the file says of others."""
    path.parent.mkdir(parents=True, exist_ok=True)
    before = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**before, **done}, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()

"""Plans of many runs: their sum, the problems among them, and both as text for a terminal or as plain values for JSON.

Each run comes with its own cluster. Runs that differ in nothing that costs time or memory are planned once. No torch, no pandas.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from hybrid_scale.config import RunConfig
from hybrid_scale.errors import HybridScaleError
from hybrid_scale.planning.forecast import RunPlan, Texts, gib
from hybrid_scale.planning.hardware import Cluster
from hybrid_scale.planning.planner import best_run, nearest_fit, plan_run

COSTLESS = {
    "run": True,
    "optimizer": True,
    "evaluation": True,
    "sampler": {"arm", "alpha", "composition", "draws", "window_steps", "mono_block_rows", "language_weights", "power"},
}
"""Settings that change neither memory nor time of training."""


@dataclass(frozen=True)
class StudyEstimate:
    """Runs by id, each planned on its cluster."""

    plans: dict[str, RunPlan]

    @property
    def gpu_hours(self) -> float:
        return sum(plan.gpu_hours for plan in self.plans.values())

    @property
    def cost(self) -> float | None:
        """None where the clusters have no price."""
        costs = [plan.cost for plan in self.plans.values()]
        return None if None in costs else sum(cost for cost in costs if cost is not None)

    @property
    def problems(self) -> dict[str, str]:
        """Run id -> why it doesn't fit, for those that don't."""
        return {name: plan.problem for name, plan in self.plans.items() if plan.problem}

    @cached_property
    def kinds(self) -> list[tuple[list[str], RunPlan]]:
        """Runs of one plan together, in the order of their first."""
        groups: dict[int, list[str]] = defaultdict(list)
        for name, plan in self.plans.items():
            groups[id(plan)].append(name)
        return [(names, self.plans[names[0]]) for names in groups.values()]


def estimate(runs: Iterable[tuple[str, RunConfig, Cluster]], texts: Texts | None = None, best: bool = False) -> StudyEstimate:
    """Plan every run as configured, or with `best` the fastest settings that fit (as configured where none does).

    Raises what `plan_run` raises, the run's id in front.
    """
    seen: dict[tuple[str, Cluster], RunPlan] = {}
    plans = {}
    for name, config, cluster in runs:
        key = (config.model_dump_json(exclude=COSTLESS), cluster)  # type: ignore[arg-type]
        if key not in seen:
            try:
                chosen = best_run(config, cluster, texts) if best else None
                seen[key] = chosen or plan_run(config, cluster, texts)
            except HybridScaleError as error:
                raise type(error)(f"{name}: {error}") from None
        plans[name] = seen[key]
    return StudyEstimate(plans)


# ------------------------------------------------------------------------------------------------------------------- text


def study_text(study: StudyEstimate) -> str:
    """A line a kind of run, the sum, the memory of each model line by line, and what doesn't fit."""
    head = (
        "first of them",
        "runs",
        "model",
        "GPUs",
        "memory a GPU",
        "ZeRO",
        "schedule",
        "s a step",
        "hours",
        "GPU-hours",
        "cost",
    )
    rows = [head, *(_row(names, plan) for names, plan in study.kinds)]
    rows.append(("all", str(len(study.plans)), *[""] * 7, f"{study.gpu_hours:,.1f}", _money(study.cost)))
    parts = [_aligned(rows), "", memory_table([(_title(plan), plan) for plan in _one_a_model(study)])]
    parts += [f"\n{names[0]} ({len(names)} runs): {_problem(plan)}" for names, plan in study.kinds if not plan.fits]
    notes = dict.fromkeys(note for _, plan in study.kinds for note in plan.notes)
    parts += ["", *(f"note: {note}" for note in notes)]
    return "\n".join(parts)


def _row(names: list[str], plan: RunPlan) -> tuple[str, ...]:
    memory = f"{gib(plan.memory)} of {gib(plan.limit)}" + ("" if plan.fits else ", too much")
    zero = f"{plan.stage}, group {plan.group}" if plan.stage == 3 else str(plan.stage)
    schedule = f"{plan.schedule}, {plan.rounds}"
    model = plan.architecture.name.rpartition("/")[2]
    times = (f"{plan.seconds.total:.2f}", f"{plan.hours:.1f}", f"{plan.gpu_hours * len(names):,.1f}")
    cost = _money(None if plan.cost is None else plan.cost * len(names))
    return (names[0], str(len(names)), model, str(plan.cluster.world), memory, zero, schedule, *times, cost)


def _one_a_model(study: StudyEstimate) -> list[RunPlan]:
    return list({(plan.architecture.name, plan.cluster): plan for _, plan in study.kinds}.values())


def _title(plan: RunPlan) -> str:
    return f"{plan.architecture.name.rpartition('/')[2]}, {plan.cluster.world} x {plan.cluster.gpu.name}"


def memory_table(plans: Sequence[tuple[str, RunPlan]]) -> str:
    """GiB of one GPU by line, a column a plan."""
    fullest = sorted((plan.lines for _, plan in plans), key=len, reverse=True)
    names = list(dict.fromkeys(name for lines in fullest for name in lines))
    rows = [("memory of a GPU, GiB", *(title for title, _ in plans))]
    rows += [(name, *(_gib(plan.lines.get(name)) for _, plan in plans)) for name in names]
    rows.append(("total", *(_gib(plan.memory) for _, plan in plans)))
    rows.append(("usable", *(_gib(plan.limit) for _, plan in plans)))
    return _aligned(rows)


def run_text(name: str, plan: RunPlan, best: RunPlan | None = None) -> str:
    """One run for a person; `best` (from `planner.best_run`) is shown where it is faster or the run doesn't fit."""
    counts, seconds, work = plan.counts, plan.seconds, plan.work
    quantised = f"{counts.quantised / 1e9:.2f} B of them in 4 bits, " if counts.quantised else ""
    weights = f"{counts.total / 1e9:.2f} B weights, {quantised}{counts.trained / 1e6:,.1f} M trained"
    cost = "" if plan.cost is None else f", cost {_money(plan.cost)}"
    zero = f"ZeRO-{plan.stage}" + (f", weights shared by {plan.group}" if plan.stage == 3 else "")
    of_step = f"{seconds.compute:.2f} computing, {seconds.gather:.2f} gathering beside it, {seconds.exchange:.2f} exchanging"
    tokens = f"{plan.tokens:,.0f} tokens a rank and step, {plan.rounds} micro-batches, graphs of {plan.kept} kept"
    bytes_ = f"{seconds.node_bytes / 1e9:,.1f} GB into a GPU, {seconds.between_bytes / 1e9:,.1f} GB into a node from others"
    lines = {
        "model": f"{plan.architecture.name}: {weights}",
        "cluster": str(plan.cluster),
        "sharding": zero + (", a second copy inside each group (hpZ)" if plan.hpz else ""),
        "schedule": f"{plan.schedule}: {tokens}",
        "work a rank and step": f"{work.flops / 1e12:,.1f} TFLOP; {bytes_}",
        "seconds a step": f"{seconds.total:.2f}: {of_step}",
        "training alone": f"{plan.config.training.max_steps:,} steps, {plan.hours:,.1f} h, {plan.gpu_hours:,.1f} GPU-hours{cost}",
    }
    text = [f"{name}", *(f"  {key:<22}{value}" for key, value in lines.items()), "", memory_table([("", plan)])]
    text += [] if plan.fits else ["", str(plan.problem) if best else _problem(plan)]
    if best is not None and (not plan.fits or best.seconds.total < plan.seconds.total * 0.98):
        gain = "" if not plan.fits else f", {plan.seconds.total / best.seconds.total:.2f} times faster"
        text += ["", f"fastest settings that fit: {best.seconds.total:.2f} s a step{gain}, {gib(best.memory)} ({best.schedule})"]
        text += [f"  {' '.join(best.settings())}"]
    return "\n".join([*text, "", *(f"note: {note}" for note in plan.notes)])


def _problem(plan: RunPlan) -> str:
    found = nearest_fit(plan.config, plan.cluster, plan.texts)
    if found is None:
        return f"{plan.problem}; no change that was tried lets it fit"
    change, fitting = found
    return f"{plan.problem}; it fits with {change}: {' '.join(fitting.settings())} ({gib(fitting.memory)})"


def _money(cost: float | None) -> str:
    return "" if cost is None else f"{cost:,.0f}"


def _gib(size: float | None) -> str:
    return "" if size is None else f"{size / 2**30:.2f}"


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    """Columns two spaces apart, the first to the left, the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))]).rstrip()
        for row in rows
    )


# ------------------------------------------------------------------------------------------------------------------- JSON


def as_values(plan: RunPlan) -> dict[str, Any]:
    """One plan as plain values: bytes, seconds, counts."""
    seconds, counts = plan.seconds, plan.counts
    return {
        "model": plan.architecture.name,
        "gpu": plan.cluster.gpu.name,
        "nodes": plan.cluster.nodes,
        "gpus_per_node": plan.cluster.gpus_per_node,
        "interconnect": plan.cluster.interconnect.name,
        "parameters": {"quantised": counts.quantised, "frozen": counts.frozen, "trained": counts.trained},
        "memory_bytes": plan.lines,
        "total_bytes": plan.memory,
        "usable_bytes": plan.limit,
        "fits": plan.fits,
        "problem": plan.problem,
        "zero_stage": plan.stage,
        "shard_group": plan.group,
        "hpz": plan.hpz,
        "schedule": plan.schedule,
        "micro_batches": plan.rounds,
        "kept_micro_batches": plan.kept,
        "tokens_a_rank_and_step": plan.tokens,
        "flops_a_rank_and_step": plan.work.flops,
        "bytes_into_a_gpu": seconds.node_bytes,
        "bytes_into_a_node": seconds.between_bytes,
        "seconds": {"compute": seconds.compute, "gather": seconds.gather, "exchange": seconds.exchange, "step": seconds.total},
        "steps": plan.config.training.max_steps,
        "hours": plan.hours,
        "gpu_hours": plan.gpu_hours,
        "cost": plan.cost,
        "settings": plan.settings(),
        "notes": list(plan.notes),
    }

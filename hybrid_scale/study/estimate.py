"""Plans of many runs: their sum, the problems among them, and both as text for a terminal or as plain values for JSON.

Each run comes with its own cluster. Runs that differ in nothing that costs time or memory are planned once. No torch, no pandas.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from hybrid_scale.config import RunConfig
from hybrid_scale.errors import HybridScaleError
from hybrid_scale.planning.forecast import RunPlan, Texts, gib
from hybrid_scale.planning.hardware import Cluster
from hybrid_scale.planning.planner import best_run, nearest_fit, plan_run
from hybrid_scale.planning.table import facts, host_table, memory_table, seconds, table, weights

COSTLESS = {
    "run": True,
    "optimizer": True,
    "evaluation": True,
    "sampler": {"arm", "alpha", "composition", "draws", "window_steps", "pool_rows", "language_weights", "power"},
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


def study_text(study: StudyEstimate, markdown: bool = False) -> str:
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
    parts = [table(rows, markdown), "", memory_table([(_title(plan), plan) for plan in _one_a_model(study)], markdown)]
    parts += [f"\n{names[0]} ({len(names)} runs): {_problem(plan)}" for names, plan in study.kinds if not plan.fits]
    notes = dict.fromkeys(note for _, plan in study.kinds for note in plan.notes)
    return "\n".join([*parts, "", *_notes(notes, markdown)])


def _row(names: list[str], plan: RunPlan) -> tuple[str, ...]:
    memory = f"{gib(plan.memory)} of {gib(plan.limit)}" + ("" if plan.fits else ", too much")
    zero = f"{plan.stage}, group {plan.group}" if plan.stage == 3 else str(plan.stage)
    schedule = f"{plan.schedule}, {plan.rounds}"
    model = plan.architecture.name.rpartition("/")[2]
    times = (seconds(plan.seconds.total), f"{plan.hours:.1f}", f"{plan.gpu_hours * len(names):,.1f}")
    cost = _money(None if plan.cost is None else plan.cost * len(names))
    return (names[0], str(len(names)), model, str(plan.cluster.world), memory, zero, schedule, *times, cost)


def _one_a_model(study: StudyEstimate) -> list[RunPlan]:
    return list({(plan.architecture.name, plan.cluster): plan for _, plan in study.kinds}.values())


def _title(plan: RunPlan) -> str:
    return f"{plan.architecture.name.rpartition('/')[2]}, {plan.cluster.world} x {plan.cluster.gpu.name}"


def run_text(name: str, plan: RunPlan, best: RunPlan | None = None, markdown: bool = False) -> str:
    """One run for a person; `best` (from `planner.best_run`) is shown where it is faster or the run doesn't fit."""
    parts = [f"### {name}\n" if markdown else name, facts(_facts(plan), markdown), "", memory_table([("", plan)], markdown)]
    parts += ["", host_table(plan, markdown)] if plan.host else []
    parts += [] if plan.fits else ["", str(plan.problem) if best else _problem(plan)]
    if best is not None and (not plan.fits or best.seconds.total < plan.seconds.total * 0.98):
        gain = "" if not plan.fits else f", {plan.seconds.total / best.seconds.total:.2f} times faster"
        parts += [
            "",
            f"fastest settings that fit: {seconds(best.seconds.total)} s a step{gain}, {gib(best.memory)} ({best.schedule})",
        ]
        parts += [f"  {' '.join(best.settings())}"]
    return "\n".join([*parts, "", *_notes(plan.notes, markdown)])


def _facts(plan: RunPlan) -> dict[str, str]:
    """What a run is, does in a step and takes, in a person's words."""
    counts, took, work, training = plan.counts, plan.seconds, plan.work, plan.config.training
    sampler = plan.config.sampler
    quantised = f"{weights(counts.quantised)} of them in 4 bits, " if counts.quantised else ""
    sharding = f"ZeRO-{plan.stage}" if plan.stage else "none: a replica a GPU"
    sharding += f", weights shared by {plan.group}" if plan.stage == 3 else ""
    kept = training.max_kept_tokens or training.max_tokens_per_micro_batch
    chosen = f"; {', '.join(plan.planned)}: chosen here, as the trainer will" if plan.planned else ""
    several = plan.cluster.nodes > 1
    moved = f"{took.node_bytes / 1e9:,.1f} GB into a GPU" + (
        f", {took.between_bytes / 1e9:,.1f} GB into a node from others" if several else ""
    )
    moved += f", {took.host_bytes / 1e9:,.1f} GB over PCIe" if took.host_bytes else ""
    of_step = (
        f"{seconds(took.compute)} computing, {seconds(took.gather)} gathering beside it, {seconds(took.exchange)} exchanging"
    )
    of_step += f", {seconds(took.host)} waiting for host memory" if took.host else ""
    rounds = f"{plan.rounds} micro-batch{'es' if plan.rounds > 1 else ''}"
    cost = "" if plan.cost is None else f", cost {_money(plan.cost)}"
    return {
        "model": f"{plan.architecture.name}: {weights(counts.total)} weights, {quantised}{weights(counts.trained)} trained",
        "global batch": f"{sampler.global_batch:,} rows in {sampler.pools_per_batch} pools of {sampler.pool_rows}:"
        f" {plan.config.negatives_a_row:,} negatives a row",
        "cluster": str(plan.cluster),
        "memory of a GPU": f"{gib(plan.memory)} of {gib(plan.limit)} usable" + ("" if plan.fits else ": does not fit"),
        "sharding": sharding + (", a second copy inside each group (hpZ)" if plan.hpz else ""),
        "tokens at once": f"{training.max_tokens_per_micro_batch:,} a micro-batch, graphs of {kept:,} kept,"
        f" {training.max_tokens_per_embedding_batch:,} without gradients{chosen}",
        "schedule": f"{plan.schedule}: {plan.tokens:,.0f} tokens a rank and step, {rounds}, graphs of {plan.kept} kept",
        "work a rank and step": f"{_tera(work.flops)} TFLOP; {moved}",
        "seconds a step": f"{seconds(took.total)}: {of_step}",
        "training alone": f"{training.max_steps:,} steps, {plan.hours:,.2g} h, {plan.gpu_hours:,.1f} GPU-hours{cost}"
        if plan.hours < 1
        else f"{training.max_steps:,} steps, {plan.hours:,.1f} h, {plan.gpu_hours:,.1f} GPU-hours{cost}",
    }


def _tera(operations: float) -> str:
    return f"{operations / 1e12:,.1f}" if operations >= 1e12 else f"{operations / 1e12:.2g}"


def _notes(notes: Iterable[str], markdown: bool) -> list[str]:
    return [f"{'* ' if markdown else 'note: '}{note}" for note in notes]


def _problem(plan: RunPlan) -> str:
    found = nearest_fit(plan.config, plan.cluster, plan.texts)
    if found is None:
        return f"{plan.problem}; nothing that was tried lets it fit: other settings, 4-bit weights, more nodes, larger GPUs"
    change, fitting = found
    return f"{plan.problem}; it fits with {change}: {' '.join(fitting.settings())} ({gib(fitting.memory)})"


def _money(cost: float | None) -> str:
    return "" if cost is None else f"{cost:,.0f}"


# ------------------------------------------------------------------------------------------------------------------- JSON


def as_values(plan: RunPlan) -> dict[str, Any]:
    """One plan as plain values: bytes, seconds, counts."""
    took, counts = plan.seconds, plan.counts
    return {
        "model": plan.architecture.name,
        "gpu": plan.cluster.gpu.name,
        "nodes": plan.cluster.nodes,
        "gpus_per_node": plan.cluster.gpus_per_node,
        "interconnect": plan.cluster.interconnect.name,
        "parameters": {"quantised": counts.quantised, "frozen": counts.frozen, "trained": counts.trained},
        "memory_bytes": plan.lines,
        "total_bytes": plan.memory,
        "host_bytes_a_node": plan.host,
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
        "bytes_into_a_gpu": took.node_bytes,
        "bytes_into_a_node": took.between_bytes,
        "seconds": {
            **{"compute": took.compute, "gather": took.gather, "exchange": took.exchange, "host": took.host},
            "step": took.total,
        },
        "steps": plan.config.training.max_steps,
        "hours": plan.hours,
        "gpu_hours": plan.gpu_hours,
        "cost": plan.cost,
        "settings": plan.settings(),
        "notes": list(plan.notes),
    }

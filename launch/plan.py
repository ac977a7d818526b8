"""Plan a run or a whole study on a cluster: memory line by line, schedule, time, GPU-hours, cost. Starts nothing, needs no torch.

    python launch/plan.py RUN.yaml   --gpu h100 --nodes 1,2,8 [section.key=value ...]
    python launch/plan.py STUDY.yaml --gpu a100-80 --nodes 2 --price 1.8 [key=value ...]

Several --nodes plan each; without --nodes a study's runs get the nodes and ranks of its own `resources`. Text lengths come from
the prepared data's length tables; where there are none, from --query-tokens and --passage-tokens, or else every text is as long
as its limit. What a config leaves to the planner (`auto`) is chosen as the trainer will choose it on these GPUs. --best replaces
the config's shard group, micro-batches, kept tokens and checkpointing by the fastest that fit.
Exit code: 0 all fits, 1 something doesn't, 2 a mistake in the request.
"""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybrid_scale.command_line import read_arguments
from hybrid_scale.config import RunConfig, load_config, read_yaml
from hybrid_scale.errors import ConfigError, HybridScaleError, describe
from hybrid_scale.planning.forecast import Texts, text_lengths
from hybrid_scale.planning.hardware import GPUS, INTERCONNECTS, Cluster, make_cluster
from hybrid_scale.planning.planner import best_run
from hybrid_scale.planning.table import memory_table
from hybrid_scale.study.estimate import StudyEstimate, as_values, estimate, run_text, study_text
from hybrid_scale.study.grid import Plan, negatives_text, plan_study


def main() -> int:
    arguments = parse()
    try:
        runs, pilot = read_runs(arguments.config, arguments.settings)
        texts = given_texts(arguments, runs)
        plans, pilots = (
            [
                estimate(((run.id, run.config, cluster(arguments, run, nodes)) for run in asked), texts, arguments.best)
                for nodes in node_counts(arguments.nodes)
            ]
            for asked in (runs, pilot)
        )
    except HybridScaleError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(
        json.dumps([values(plan, runs) | pilot_values(of_pilot) for plan, of_pilot in zip(plans, pilots, strict=True)], indent=1)
        if arguments.json
        else "\n".join([text(plans, runs, arguments.best, arguments.markdown), *pilot_lines(plans, pilots)])
    )
    return 1 if any(plan.problems for plan in (*plans, *pilots)) else 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, metavar="CONFIG.yaml", help="a run or a study")
    parser.add_argument("settings", nargs="*", metavar="key=value")
    parser.add_argument("--gpu", default="h100", help=f"one of {', '.join(GPUS)} (default: h100)")
    parser.add_argument("--gpu-memory", type=float, metavar="GIB", help="of a GPU that isn't in the table, or has less")
    parser.add_argument("--nodes", metavar="N[,N...]", help="nodes of a run (default: 1, or a study's own)")
    parser.add_argument("--gpus-per-node", type=int, help="default: 8, or without --nodes a study's own")
    parser.add_argument("--interconnect", default="ib-ndr", help=f"one of {', '.join(INTERCONNECTS)} (default: ib-ndr)")
    parser.add_argument("--ports", type=int, help="interconnect ports of a node (default: one a GPU; edr, 100, 25, 10: one)")
    parser.add_argument("--price", type=float, help="of a GPU-hour; no price is built in")
    parser.add_argument("--query-tokens", type=float, help="mean tokens of a query, prompt included")
    parser.add_argument("--passage-tokens", type=float, help="mean tokens of a passage")
    parser.add_argument("--best", action="store_true", help="the fastest settings that fit instead of the config's")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="bytes, seconds and settings as values")
    form.add_argument("--markdown", action="store_true", help="the same tables for a paper's appendix")
    return read_arguments(parser)


@dataclass(frozen=True)
class Asked:
    """A run, and the machines that its study gives it; 0: nothing is said."""

    id: str
    config: RunConfig
    nodes: int = 0
    gpus_per_node: int = 0
    negatives: str = ""
    """Of a study: the negatives a row of all its arms."""


def node_counts(text: str | None) -> list[int | None]:
    if text is None:
        return [None]
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(describe("--nodes", text, "must be a number, or numbers with commas between")) from None


def cluster(arguments: argparse.Namespace, run: Asked, nodes: int | None) -> Cluster:
    own = nodes is None  # the study's own machines, where it names some
    gpus = arguments.gpus_per_node if arguments.gpus_per_node is not None else (own and run.gpus_per_node) or 8
    nodes = nodes if nodes is not None else run.nodes or 1
    return make_cluster(
        arguments.gpu, nodes, gpus, arguments.interconnect, arguments.ports, arguments.price, arguments.gpu_memory
    )


def read_runs(path: Path, settings: list[str]) -> tuple[list[Asked], list[Asked]]:
    """The run of a run config, or the runs of a study file; and the runs of the study's pilot, where it has one."""
    tree = read_yaml(path)
    if not {"study", "model", "training"} & tree.keys():
        rule = "neither a run (data, model, training) nor a study (study)"
        raise ConfigError(describe(str(path), list(tree), rule, "See launch/configs/."))
    if "study" in tree:
        study = plan_study(path, settings)
        return of_study(study), of_study(study.pilot) if study.pilot else []
    config = load_config(path, settings)
    return [Asked(config.run.name, config)], []


def of_study(plan: Plan) -> list[Asked]:
    negatives = negatives_text(plan.runs)
    return [Asked(run.id, run.config, run.resources.nodes, run.resources.ranks_per_node, negatives) for run in plan.runs]


def given_texts(arguments: argparse.Namespace, runs: list[Asked]) -> Texts | None:
    """Lengths of the command line; None: each run looks at its own data."""
    if arguments.query_tokens is None and arguments.passage_tokens is None:
        return None
    return text_lengths(runs[0].config, arguments.query_tokens, arguments.passage_tokens)


def text(plans: list[StudyEstimate], runs: list[Asked], best: bool, markdown: bool) -> str:
    if len(plans[0].plans) > 1:
        return "\n\n\n".join([*(study_text(plan, markdown) for plan in plans), f"negatives a row: {runs[0].negatives}"])
    (name,) = plans[0].plans
    each = [plan.plans[name] for plan in plans]
    others = [None if best else best_run(plan.config, plan.cluster, plan.texts) for plan in each]
    parts = [run_text(name, plan, other, markdown) for plan, other in zip(each, others, strict=True)]
    if len(each) > 1:
        parts.append(memory_table([(f"{plan.cluster.world} GPUs", plan) for plan in each], markdown))
    return "\n\n".join(parts)


def pilot_lines(plans: list[StudyEstimate], pilots: list[StudyEstimate]) -> list[str]:
    """What the pilot adds, for each number of nodes asked for; nothing where there is none."""
    lines = []
    for plan, pilot in zip(plans, pilots, strict=True):
        if pilot.plans:
            hours = f"{pilot.gpu_hours:,.1f} GPU-hours more, {plan.gpu_hours + pilot.gpu_hours:,.1f} in all"
            lines.append(f"pilot, run first: {len(pilot.plans)} runs, {hours}")
            lines += [f"{name} (pilot): {problem}" for name, problem in pilot.problems.items()]
    return lines


def pilot_values(pilot: StudyEstimate) -> dict[str, Any]:
    if not pilot.plans:
        return {}
    return {"pilot": {"runs": len(pilot.plans), "gpu_hours": pilot.gpu_hours, "cost": pilot.cost, "problems": pilot.problems}}


def values(plan: StudyEstimate, asked: list[Asked]) -> dict[str, Any]:
    negatives = {run.id: run.config.negatives_a_row for run in asked}
    runs = {name: {**as_values(run), "negatives_a_row": negatives[name]} for name, run in plan.plans.items()}
    return {"runs": runs, "gpu_hours": plan.gpu_hours, "cost": plan.cost, "problems": plan.problems}


if __name__ == "__main__":
    sys.exit(main())

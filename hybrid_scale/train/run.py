"""A config -> a trained run directory: opens the data, builds the engine, resumes, trains, and keeps the status true.

Knows no metric: what evaluates a model is handed in by the door.
"""

import math
import platform
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hybrid_scale import dist, gpu
from hybrid_scale.config import RunConfig, dump_config
from hybrid_scale.data.prepared import Pairs
from hybrid_scale.data.sampler import HybridSampler
from hybrid_scale.data.text import TextEncoder, length_table, load_text_encoder
from hybrid_scale.errors import ConfigError, describe
from hybrid_scale.model.load import DTYPES, count_parameters, load_embedder
from hybrid_scale.model.shape import read_shape
from hybrid_scale.planning.costs import MemoryNeed, ParameterCounts, memory_need, static_bytes
from hybrid_scale.planning.forecast import RunPlan, Texts, mean_tokens
from hybrid_scale.planning.hardware import Cluster, Gpu, of_device
from hybrid_scale.planning.planner import as_planned, explain, for_manifest, resolve
from hybrid_scale.planning.zero import read_zero
from hybrid_scale.runs import RunDirectory, read_json, write_json
from hybrid_scale.train import checkpoint, resume
from hybrid_scale.train.checkpoint import Checkpoints
from hybrid_scale.train.engine import (
    Engine,
    PlainEngine,
    make_accelerator,
    make_engine,
    read_deepspeed_config,
    shard_group,
    zero_stage,
)
from hybrid_scale.train.failure import names_of
from hybrid_scale.train.gradcache import NotFinite, forward_backward
from hybrid_scale.train.guard import GradientGuard
from hybrid_scale.train.loop import Trainer, TrainingData, build_share, plan_step
from hybrid_scale.train.loss import Targets
from hybrid_scale.train.stop import StopRequest, deadline
from hybrid_scale.train.watch import Watch

GPUS_PER_NODE = 8
"""Assumed by `--dry-run`, which can't ask a launcher."""
PACKAGES = ("torch", "deepspeed", "accelerate", "transformers", "peft", "bitsandbytes")
Evaluate = Callable[[RunConfig, RunDirectory, TextEncoder, Engine, int | None], None]


def open_training_data(config: RunConfig, world: int) -> TrainingData:
    """Everything a batch needs, checked. Raises ConfigError or DataError before any model is loaded."""
    if config.sampler.global_batch < world:
        raise ConfigError(
            describe(
                "sampler.global_batch",
                config.sampler.global_batch,
                f"{world} ranks need at least a row each",
                "Use fewer ranks or a larger batch.",
            )
        )
    pairs = Pairs(config.data.train)
    encoder = load_text_encoder(config)

    # Rank 0 first: it writes the index and the length tables, and proves that every pool can be filled.
    deals = dist.first_rank_does(lambda: _open(config, pairs, encoder).sampler.deals)
    return _open(config, pairs, encoder, deals)


def _open(config: RunConfig, pairs: Pairs, encoder: TextEncoder, deals: dict[str, int] | None = None) -> TrainingData:
    return TrainingData(
        pairs,
        HybridSampler(pairs, config.sampler, config.run.seed, deals),
        encoder,
        length_table(pairs.directory, "queries", pairs.queries, "query", encoder),
        length_table(pairs.directory, "passages", pairs.passages, "passage", encoder),
        read_shape(config.model),
    )


def train(config: RunConfig, evaluate: Evaluate) -> bool:
    """Train to the end (True) or to an agreed stop (False). The run directory says which, and why if it failed."""
    if config.training.engine == "deepspeed" and not dist.launched():
        rule = "DeepSpeed needs a launcher, even for one process"
        remedy = "Use `accelerate launch --use_deepspeed ... launch/train.py`, or training.engine=plain."
        raise ConfigError(describe("training.engine", "deepspeed", rule, remedy))
    run = RunDirectory(config.run.directory)
    stop = StopRequest(deadline(config.training))
    dist.first_rank_does(lambda: run.create(config, continuing=True))
    stop.install()
    keeper = Keeper(run)
    watch = Watch(config.training.rank_timeout_seconds, keeper.end)
    watch.start()
    try:
        done = _train(config, run, evaluate, stop, watch, keeper)
    except BaseException as error:
        lost = watch.explain(error)
        if lost is None:
            watch.stop()
        keeper.end(f"{type(error).__name__}: {error}" if lost is None else f"RankLost: {lost}", lost is None or watch.writes())
        if lost is None:
            raise
        raise lost from error
    watch.stop()
    dist.barrier()  # the store that watches read may end with rank 0
    if dist.rank() == 0:
        facts = {} if done else {"reason": stop.reason() or "another rank was asked to stop"}
        run.set_status("done" if done else "preempted", step=_finished(run), **facts)
    return done


class Keeper:
    """Leaves the run directory in order when the run ends early: a checkpoint being written is finished, the status says why."""

    def __init__(self, run: RunDirectory):
        self.run = run
        self.checkpoints: Checkpoints | None = None

    def end(self, reason: str, writes: bool) -> None:
        if self.checkpoints is not None:
            self.checkpoints.close()
        if writes:
            with suppress(FileNotFoundError):  # where nobody can tell who lives, several ranks write the same
                self.run.set_status("failed", reason=reason)


def _finished(run: RunDirectory) -> int:
    metrics = run.metrics()
    return int(metrics[-1]["step"]) if metrics else 0


def _train(config: RunConfig, run: RunDirectory, evaluate: Evaluate, stop: StopRequest, watch: Watch, keeper: Keeper) -> bool:
    started = time.monotonic()
    if dist.rank() == 0:
        run.set_status("running", world_size=dist.world_size())
    data = open_training_data(config, dist.world_size())
    asked, machines = config, seen_gpu(config)
    plan = dist.first_rank_does(lambda: plan_budgets(config, data, machines, dist.world_size(), dist.local_world_size()))
    config = plan.config if plan else config
    group = dist.first_rank_does(lambda: choose_shard_group(config, data, dist.world_size(), dist.local_world_size()))
    dist.first_rank_does(
        lambda: say("\n".join([*([explain(plan)] if plan else []), describe_run(config, data, dist.world_size(), group)]))
    )
    facts = resume.facts_of(asked, data.pairs.fingerprint)
    resumed = checkpoint.resume_point(run)
    first_step = resume.check(resumed, asked, facts) if resumed else 0
    forced = resume.forced(resumed, asked, facts) if resumed else []
    dist.first_rank_does(lambda: run.adopt(asked))
    torch.manual_seed(config.run.seed + dist.rank())
    # Before Accelerate: a ZeRO-3 launch makes transformers load into shards, which trained weights can't be put into.
    sharded = zero_stage(config, group) == 3 and dist.world_size() > 1
    shards = read_deepspeed_config(config, group) if sharded else None
    embedder = load_embedder(config.model, config.run.seed, resumed / "adapter" if resumed else None, shards)
    accelerator = make_accelerator(config, run.path, group)
    engine = make_engine(config, accelerator, embedder)
    if resumed:
        resume.load_optimizer(resumed, engine)
        say(f"continuing after step {first_step} from {resumed}")
    if forced:
        say("\n  ".join([f"warning: training.resume_despite: the run goes on after step {first_step} over", *forced]))
    if dist.rank() == 0:
        despite = forced_before(run) + ([{"after_step": first_step, "differences": forced}] if forced else [])
        chosen = {"planned": for_manifest(plan)} if plan else {}
        write_json(run.manifest_file, manifest(asked, data) | chosen | ({"resumed_despite": despite} if despite else {}))
    accelerator.init_trackers(config.run.name, {"config": dump_config(config)})

    def evaluate_now(step: int | None) -> None:
        embedder.eval()  # no dropout
        evaluate(config, run, data.encoder, engine, step)
        embedder.train()

    checkpoints = keeper.checkpoints = Checkpoints(run, engine, embedder, facts, config)
    trainer = Trainer(
        config,
        run,
        data,
        engine,
        evaluate=evaluate_now,
        checkpoints=checkpoints,
        save_weights=lambda folder: checkpoint.save_weights(folder, engine, embedder),
        track=lambda values, step: accelerator.log(values, step=step),
        stop=stop,
        watch=watch,
    )
    if config.evaluation.before_training and first_step == 0:
        evaluate_now(0)
    done = trainer.train(first_step)
    if done:
        watch.at(config.training.max_steps, "evaluation")
        evaluate_now(None)
        checkpoints.judge(config.training.max_steps, None)
        say(f"done in {time.monotonic() - started:.0f} s: {run.path}")
    accelerator.end_training()
    return done


def say(text: str) -> None:
    if dist.rank() == 0:
        print(text, file=sys.stderr, flush=True)


def manifest(config: RunConfig, data: TrainingData) -> dict[str, Any]:
    """Where and on what this run was started."""
    return {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "host": socket.gethostname(),
        "world_size": dist.world_size(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
        "data": {"directory": config.data.train, "fingerprint": data.pairs.fingerprint},
        "batches": data.sampler.describe(),
    }


def forced_before(run: RunDirectory) -> list[dict[str, Any]]:
    """What earlier starts of this run went on over, by `training.resume_despite`."""
    return list(read_json(run.manifest_file).get("resumed_despite", [])) if run.manifest_file.is_file() else []


def choose_shard_group(config: RunConfig, data: TrainingData, world: int, gpus_per_node: int) -> int | None:
    """Ranks that share one copy of the weights, where the config leaves it open; None: the DeepSpeed JSON says."""

    def need() -> MemoryNeed:
        return memory_need(config, count_parameters(config.model), data.shape, world, read_zero(config))

    return shard_group(config, need, world, gpus_per_node)


def seen_gpu(config: RunConfig) -> Gpu | None:
    """The smallest GPU of all ranks, as its driver reports it; None: nothing is left to the planner. Collective.

    Raises ConfigError where a rank has no GPU and the config states no memory.
    """
    training = config.training
    if not training.planned:
        return None
    stated, held = training.gpu_memory_gib, gpu.total_bytes()
    name = torch.cuda.get_device_name() if gpu.present() else "processor"
    found = dist.gather_objects((name, held if stated is None else stated * 2**30))
    if any(memory is None for _, memory in found):
        rule = f"training.{training.planned[0]}: auto needs a GPU's memory and there is no GPU here"
        remedy = "State the memory of the GPUs that will train (on CPUs: of a rank), or a number of tokens."
        raise ConfigError(describe("training.gpu_memory_gib", None, rule, remedy))
    return of_device(*min(found, key=lambda one: float(one[1])))


def plan_budgets(config: RunConfig, data: TrainingData, seen: Gpu | None, world: int, gpus_per_node: int) -> RunPlan | None:
    """The planner's choice of the token budgets that the config leaves open; None: it leaves none. Raises ConfigError: no fit."""
    if seen is None:
        return None
    node = math.gcd(world, gpus_per_node)
    limits = config.data.max_query_tokens, config.data.max_passage_tokens
    query, passage = map(mean_tokens, (data.query_lengths, data.passage_lengths), limits)
    cluster, texts = Cluster(seen, world // node, node), Texts(query, passage, f"measured: {config.data.train}")
    return resolve(config, cluster, texts, data.shape, count_parameters(config.model))


def describe_run(config: RunConfig, data: TrainingData, world: int, group: int | None) -> str:
    """The derived numbers of a run, for a person: batches, micro-batches, parameters, bytes."""
    first = [plan_step(data, config, world, step) for step in range(min(5, config.training.max_steps))]
    counts: ParameterCounts = count_parameters(config.model)
    stage = zero_stage(config, group, world)
    size = static_bytes(counts, DTYPES[config.model.dtype].itemsize, world, stage, group)
    real = sum(step.plan.real_tokens for step in first)
    described = data.sampler.describe()
    lines = {
        **{key: value for key, value in described.items() if not isinstance(value, dict)},
        **{f"{name} pool": value for name, value in described["pools"].items()},  # type: ignore[attr-defined]
        "steps per epoch": described["steps per epoch of each stream"],
        "ranks, ZeRO stage, ranks that share a copy": f"{world}, {stage}, {group or (world if stage == 3 else 1)}",
        "micro-batches a rank and schedule, first steps": [f"{step.plan.rounds} {step.plan.schedule}" for step in first],
        "tokens a step (real), first steps": round(real / len(first)),
        "padding, first steps": f"{1 - real / sum(step.plan.padded_tokens for step in first):.1%}",
        "lock-step efficiency, first steps": f"{real / sum(step.plan.lockstep_tokens for step in first):.1%}",
        "tokens embedded twice, first steps": f"{sum(s.plan.recomputed_tokens for s in first) / real:.1%}",
        "texts cut to the limit": _cut_share(config, data),
        "parameters": f"{counts.total:,} ({counts.quantised:,} in 4 bits), {counts.trained:,} trained",
        **{f"bytes a rank: {name}": f"{value:,.0f}" for name, value in size.items()},
    }
    return "\n".join(f"  {key:<48} {value}" for key, value in lines.items())


def _cut_share(config: RunConfig, data: TrainingData) -> str:
    cut = {
        "queries": float(np.mean(data.query_lengths == config.data.max_query_tokens)),
        "passages": float(np.mean(data.passage_lengths == config.data.max_passage_tokens)),
    }
    return ", ".join(f"{name} {share:.1%}" for name, share in cut.items())


def replay(config: RunConfig, folder: Path) -> str:
    """Compute a failed step again from its `failures/step_N` folder, on this process alone; nothing is updated.

    Returns what is not finite: texts, or else trained tensors. Raises RunError for a folder that holds no failure.
    """
    facts = read_json(folder / "batch.json")
    before = RunDirectory(folder.parent.parent).manifest_file
    config = as_planned(config, read_json(before) if before.is_file() else {})
    data = open_training_data(config, 1)
    engine = PlainEngine(load_embedder(config.model, config.run.seed, folder / "adapter"), config.optimizer)
    step = plan_step(data, config, 1, facts["step"])
    guard = GradientGuard(engine.trained)
    targets = Targets.of(step.batch, dist.device())
    title = f"step {facts['step'] + 1}, found on {facts['world_size']} ranks: {facts['what']} not finite on {facts['ranks']}"
    try:
        loss = forward_backward(engine, build_share(data, step, 0).to(dist.device()), step.plan, targets, config.loss)
    except NotFinite as error:
        names = names_of(data.pairs, step.batch, list(error.texts))
        return "\n".join([title, f"again, on one process: embeddings of {len(names)} texts are not finite:", *names])
    if bad := guard.not_finite():
        return "\n".join([title, f"again, on one process: loss {loss}; gradients not finite:", *bad[0]])
    suspects = "The weights and the batch are sound: suspect a device, or what differs between this process and the ranks."
    return f"{title}\nagain, on one process: everything is finite, loss {loss:.6g}. {suspects}"


def dry_run(config: RunConfig, world: int) -> str:
    """Resolved config and derived numbers; opens the data, loads no weights."""
    data = open_training_data(config, world)
    plan = plan_budgets(config, data, seen_gpu(config), world, min(world, GPUS_PER_NODE))
    config = plan.config if plan else config
    group = choose_shard_group(config, data, world, min(world, GPUS_PER_NODE))
    return "\n".join([dump_config(config), *([explain(plan)] if plan else []), describe_run(config, data, world, group)])

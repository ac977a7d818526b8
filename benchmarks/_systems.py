"""One training step of each system on this rank, all from the same weights and the same rows.

peers    sentence-transformers' own losses and model under DDP, driven by a plain loop (their Trainer took 2 to 7 % more)
bounds   transformers + peft, sorted padded micro-batches, one all-reduce: what a step costs without any framework
ours     the way of train/loop.py: plan_step, build_share, forward_backward, engine.step
"""

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as c10d
from _inputs import Batch
from _ranks import give_back_freed_memory, keep_freed_memory, peak_mib, reset_peak, resident_mib
from torch import nn

from hybrid_scale import dist
from hybrid_scale.config import RunConfig

Phases = dict[str, float]


@dataclass(frozen=True)
class Job:
    """What a system is run on. `options` are those of the system."""

    system: str
    config: RunConfig
    batches: Sequence[Batch]
    timed: int
    memory: bool = True
    """Whether the first step is measured for memory, at twice its time."""
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class Measured:
    """What one rank used."""

    losses: list[float] = field(default_factory=list)
    """Of every step, the first one included."""
    cpu: list[float] = field(default_factory=list)
    """CPU-seconds of each timed step, all threads of the process."""
    wall: list[float] = field(default_factory=list)
    phases: list[Phases] = field(default_factory=list)
    tokens: dict[str, int] = field(default_factory=dict)
    """Of the timed steps: `gradient` and `plain` (forward without autograd) executed, `real` in this rank's equal share."""
    model_mib: float = 0.0
    """Resident when model and optimizer stand."""
    training_mib: float | None = None
    """Most that the first step needs on top, every freed block returned to the system at once. None: not measured."""
    resident_mib: float = 0.0
    """Most that is resident on top in the timed steps, with what the allocator holds back."""


class System(Protocol):
    backbone: nn.Module

    def step(self, number: int) -> tuple[float, Phases]:
        """Loss and CPU-seconds by phase. The loss may be this rank's share: the mean over ranks is the batch's."""
        ...

    def tokenize(self, texts: list[str]) -> list[list[int]]:
        """Token ids as the model sees them."""
        ...


def measure(job: Job) -> Measured:
    """The first step warms up and may be measured for memory, the others are for time. Collective."""
    dist.start()
    system = MAKERS[job.system](job)
    tokens = count_tokens(system.backbone)
    gc.collect()
    base = resident_mib()
    result = Measured(model_mib=base, tokens=tokens)
    reset_peak()
    if job.memory:
        give_back_freed_memory()
    result.losses.append(system.step(0)[0])
    if job.memory:
        result.training_mib = peak_mib() - base
    keep_freed_memory()
    tokens.update(dict.fromkeys(tokens, 0))
    reset_peak()
    for number in range(1, job.timed + 1):
        _timed_step(system, number, result)
    result.resident_mib = peak_mib() - base
    if dist.rank() == 0:
        texts = [side for batch in job.batches[1 : job.timed + 1] for side in batch]
        tokens["real"] = sum(len(ids) for side in texts for ids in system.tokenize(side)) // dist.world_size()
    dist.barrier()
    return result


def _timed_step(system: System, number: int, result: Measured) -> None:
    dist.barrier()
    wall, cpu = time.monotonic(), time.process_time()
    loss, phases = system.step(number)
    result.cpu.append(time.process_time() - cpu)
    result.wall.append(time.monotonic() - wall)
    result.phases.append(phases)
    result.losses.append(loss)


def count_tokens(backbone: nn.Module) -> dict[str, int]:
    """Tokens looked up in the word embedding from now on: `gradient` with autograd on, `plain` without."""
    counted = {"gradient": 0, "plain": 0}

    def count(module: nn.Module, given: tuple[torch.Tensor, ...]) -> None:
        counted["gradient" if torch.is_grad_enabled() else "plain"] += given[0].numel()

    next(module for module in backbone.modules() if isinstance(module, nn.Embedding)).register_forward_pre_hook(count)
    return counted


class Clock:
    """CPU-seconds of this process by phase."""

    def __init__(self) -> None:
        self.phases: Phases = {}
        self._last = time.process_time()

    def lap(self, name: str) -> None:
        now = time.process_time()
        self.phases[name] = self.phases.get(name, 0.0) + now - self._last
        self._last = now


# ----------------------------------------------------------------------------------------------- what all but ours share


def adapted(backbone: nn.Module, config: RunConfig) -> nn.Module:
    """`backbone` frozen, with the LoRA weights that model/load.py draws for the same seed."""
    from peft import LoraConfig, get_peft_model

    lora = config.model.lora
    assert lora is not None
    backbone.requires_grad_(False)
    torch.manual_seed(config.run.seed)
    settings = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, lora_dropout=0.0, target_modules="all-linear")  # type: ignore[arg-type]
    return get_peft_model(backbone, settings)  # type: ignore[arg-type]


def model_options(config: RunConfig) -> dict[str, Any]:
    return {"dtype": getattr(torch, config.model.dtype), "attn_implementation": "sdpa"}


class Update:
    """Clip and AdamW with the run's settings."""

    def __init__(self, module: nn.Module, config: RunConfig):
        settings = config.optimizer
        self.trained = [p for p in module.parameters() if p.requires_grad]
        self.clip = settings.max_gradient_norm
        self.optimizer = torch.optim.AdamW(self.trained, lr=settings.learning_rate, weight_decay=settings.weight_decay)

    def __call__(self) -> None:
        nn.utils.clip_grad_norm_(self.trained, self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()


def my_rows(batch: Batch) -> Batch:
    """This rank's rows: an equal, contiguous part, as a distributed sampler deals them."""
    each = len(batch[0]) // dist.world_size()
    part = slice(dist.rank() * each, (dist.rank() + 1) * each)
    return batch[0][part], batch[1][part]


# ----------------------------------------------------------------------------------------------------------------- peers


class SentenceTransformers:
    """MultipleNegativesRankingLoss, or the cached one where `mini_batch` (texts) or `mini_batch_tokens` is given."""

    def __init__(self, job: Job):
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

        config = job.config
        self.batches = job.batches
        options = model_options(config)
        transformer = Transformer(config.model.base, model_kwargs=options, max_seq_length=config.data.max_passage_tokens)
        transformer.model = adapted(transformer.model, config)
        pooling = Pooling(transformer.get_embedding_dimension(), pooling_mode="lasttoken")
        self.model = SentenceTransformer(modules=[transformer, pooling, Normalize()], device="cpu").train()
        self.backbone = transformer.model
        self.loss = self._loss(1.0 / config.loss.temperature, job.options)
        self.update = Update(self.model, config)

    def _loss(self, scale: float, options: dict[str, Any]) -> nn.Module:
        from sentence_transformers.sentence_transformer import losses

        wrapped = nn.parallel.DistributedDataParallel(self.model)
        if not options:
            loss: Any = losses.MultipleNegativesRankingLoss(self.model, scale=scale, gather_across_devices=True)
        else:
            loss = losses.CachedMultipleNegativesRankingLoss(self.model, scale=scale, gather_across_devices=True, **options)
            loss.loss.model = wrapped
        loss.model = wrapped  # as their Trainer does
        return loss

    def tokenize(self, texts: list[str]) -> list[list[int]]:
        mask = self.model.preprocess(texts)["attention_mask"]
        return [[1] * int(row.sum()) for row in mask]

    def step(self, number: int) -> tuple[float, Phases]:
        clock = Clock()
        features = [self.model.preprocess(texts) for texts in my_rows(self.batches[number])]
        clock.lap("tokens")
        loss = self.loss(features, None)
        loss.backward()
        clock.lap("gradient")
        self.update()
        clock.lap("update")
        return float(loss.detach()), clock.phases


# ---------------------------------------------------------------------------------------------------------------- bounds


class Bound:
    """Sorted padded micro-batches of this rank's texts; `passes` 1 keeps their graphs, 2 embeds twice. Tokens made beforehand."""

    def __init__(self, job: Job):
        from transformers import AutoModel, AutoTokenizer

        config = job.config
        self.longest = config.data.max_passage_tokens
        self.temperature = config.loss.temperature
        self.passes, self.budget = job.options["passes"], job.options["tokens"]
        self.tokenizer = AutoTokenizer.from_pretrained(config.model.base)
        self.backbone = adapted(AutoModel.from_pretrained(config.model.base, **model_options(config)), config).train()
        self.update = Update(self.backbone, config)
        self.prepared = [self._prepare(my_rows(batch)) for batch in job.batches]

    def tokenize(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts, truncation=True, max_length=self.longest)["input_ids"]

    def _prepare(self, batch: Batch) -> tuple[list[np.ndarray], list[dict[str, torch.Tensor]]]:
        """Text numbers (queries, then passages) and padded tensors of each micro-batch."""
        rows = [ids for side in batch for ids in self.tokenize(side)]
        order = sorted(range(len(rows)), key=lambda text: -len(rows[text]))
        runs: list[list[int]] = []
        for text in order:
            if not runs or (len(runs[-1]) + 1) * len(rows[runs[-1][0]]) > self.budget:
                runs.append([])
            runs[-1].append(text)
        return [np.array(run) for run in runs], [self._collate([rows[text] for text in run]) for run in runs]

    def _collate(self, rows: list[list[int]]) -> dict[str, torch.Tensor]:
        ids = torch.zeros(len(rows), len(rows[0]), dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
            mask[i, : len(row)] = 1
        return {"input_ids": ids, "attention_mask": mask}

    def _embed(self, micro_batch: dict[str, torch.Tensor]) -> torch.Tensor:
        hidden = self.backbone(**micro_batch, use_cache=False).last_hidden_state
        last = micro_batch["attention_mask"].sum(dim=1) - 1
        return nn.functional.normalize(hidden[torch.arange(len(hidden)), last].float(), dim=-1)

    def step(self, number: int) -> tuple[float, Phases]:
        clock = Clock()
        texts, micro_batches = self.prepared[number]
        with torch.set_grad_enabled(self.passes == 1):
            embedded = [self._embed(micro_batch) for micro_batch in micro_batches]
        loss, gradient = self._loss(torch.cat([part.detach() for part in embedded]), np.concatenate(texts))
        for number_, micro_batch in enumerate(micro_batches):
            again = embedded[number_] if self.passes == 1 else self._embed(micro_batch)
            again.backward(gradient[texts[number_]])
        self._average()
        clock.lap("gradient")
        self.update()
        clock.lap("update")
        return loss, clock.phases

    def _loss(self, mine: torch.Tensor, texts: np.ndarray) -> tuple[float, torch.Tensor]:
        """Cross entropy of the whole batch on every rank, and the gradient of this rank's texts in text order."""
        ordered = torch.empty_like(mine)
        ordered[torch.from_numpy(texts)] = mine
        parts = [torch.empty_like(ordered) for _ in range(dist.world_size())]
        c10d.all_gather(parts, ordered)
        whole = torch.stack(parts).requires_grad_()  # [W, 2 b, D]
        each = whole.shape[1] // 2
        queries, passages = (side.flatten(0, 1) for side in (whole[:, :each], whole[:, each:]))
        loss = nn.functional.cross_entropy(queries @ passages.T / self.temperature, torch.arange(len(queries)))
        loss.backward()
        assert whole.grad is not None
        return float(loss.detach()), whole.grad[dist.rank()]

    def _average(self) -> None:
        """Sum over ranks of the gradients, in one message. The loss is already divided by the whole batch."""
        flat = torch.cat([p.grad.flatten() for p in self.update.trained if p.grad is not None])
        c10d.all_reduce(flat)
        for p, part in zip(self.update.trained, flat.split([p.numel() for p in self.update.trained]), strict=True):
            p.grad = part.view_as(p)


# ------------------------------------------------------------------------------------------------------------------ ours


class Ours:
    """The steps of train/loop.py, without its files and its thread that prepares the next step: all work is counted."""

    def __init__(self, job: Job):
        from hybrid_scale.model.load import load_embedder
        from hybrid_scale.train.batches import open_training_data
        from hybrid_scale.train.engine import make_accelerator, make_engine
        from hybrid_scale.train.guard import GradientGuard

        self.config = job.config
        self.data = open_training_data(job.config, dist.world_size())
        embedder = load_embedder(job.config.model, job.config.run.seed)
        self.backbone = embedder.backbone
        accelerator = make_accelerator(job.config, Path(job.config.run.directory))
        self.engine: Any = make_engine(job.config, accelerator, embedder)
        self.guard = GradientGuard(self.engine.trained)
        self.plan: Any = None

    def tokenize(self, texts: list[str]) -> list[list[int]]:
        return self.data.encoder.encode("passage", texts)

    def step(self, number: int) -> tuple[float, Phases]:
        from hybrid_scale.train.batches import build_share, plan_step
        from hybrid_scale.train.gradcache import forward_backward
        from hybrid_scale.train.loss import Targets

        clock = Clock()
        step = plan_step(self.data, self.config, dist.world_size(), number)
        clock.lap("plan")
        share = build_share(self.data, step, dist.rank()).to(dist.device())
        clock.lap("tokens")
        targets = Targets.of(step.batch, dist.device())
        loss = forward_backward(self.engine, share, step.plan, targets, self.config.loss)
        assert not self.guard.not_finite()
        clock.lap("gradient")
        self.engine.step(self.config.optimizer.learning_rate)
        clock.lap("update")
        self.plan = step.plan
        return loss, clock.phases


MAKERS: dict[str, Callable[[Job], System]] = {"peer": SentenceTransformers, "bound": Bound, "ours": Ours}

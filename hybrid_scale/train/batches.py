"""What each step will do: its global batch, who embeds what of it, and the tokens; one step ahead of the training.

The same on every rank without communication, but for opening the data. Knows no weights.
"""

import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from hybrid_scale import dist
from hybrid_scale.config import RunConfig
from hybrid_scale.data.partition import LENGTH_TOKENS, Budget, Plan, partition
from hybrid_scale.data.prepared import Pairs
from hybrid_scale.data.sampler import GlobalBatch, HybridSampler
from hybrid_scale.data.text import TextEncoder, length_table, load_text_encoder
from hybrid_scale.errors import ConfigError, describe
from hybrid_scale.model.shape import read_shape
from hybrid_scale.planning.architecture import Architecture
from hybrid_scale.planning.speed import attention_flops
from hybrid_scale.train.gradcache import MicroBatch, Share


@dataclass(frozen=True)
class TrainingData:
    """Pairs, their sampler, the token lengths of their texts, and the shape of the model that reads them."""

    pairs: Pairs
    sampler: HybridSampler
    encoder: TextEncoder
    query_lengths: np.ndarray
    passage_lengths: np.ndarray
    shape: Architecture


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


@dataclass(frozen=True)
class Step:
    """A global batch, and who embeds what of it."""

    batch: GlobalBatch
    plan: Plan


def budget(config: RunConfig, shape: Architecture) -> Budget:
    """What one rank may execute at once."""
    training, lora = config.training, config.model.lora
    random = shape.dropout or (lora is not None and lora.dropout > 0)
    kept = training.max_kept_tokens or training.max_tokens_per_micro_batch
    return Budget(
        micro_batch=training.max_tokens_per_micro_batch,
        kept=0 if training.passes == "two_pass" else kept,
        # A pass that draws random numbers (dropout) is replayed micro-batch by micro-batch.
        embedding=None if random else training.max_tokens_per_embedding_batch,
        packed=config.model.packed,
        quadratic=attention_flops(shape, 1, config.model.attention == "causal") / (2 * shape.linear),
        length_tokens=LENGTH_TOKENS if config.model.attention_implementation == "packed" else 0.0,
    )


def plan_step(data: TrainingData, config: RunConfig, world: int, step: int) -> Step:
    """What step `step` will do on `world` ranks. No communication: the same answer everywhere."""
    batch = data.sampler.batch(step)
    lengths = np.concatenate([data.query_lengths[batch.queries], data.passage_lengths[batch.passages]]).astype(np.int64)
    limits = budget(config, data.shape)
    plan = partition(lengths, world, limits)
    if config.training.passes == "direct" and plan.schedule != "direct":
        tokens = int(plan.executed.max(axis=0).sum())
        rule = f"step {step} needs the graphs of {tokens} tokens at once, {limits.kept} are allowed"
        raise ConfigError(describe("training.passes", "direct", rule, "Use auto, or raise training.max_kept_tokens."))
    return Step(batch, plan)


def real_tokens(data: TrainingData, step: int) -> int:
    """Tokens of the texts of step `step`, on however many ranks: those of its record (`real_tokens`), without a plan."""
    batch = data.sampler.batch(step)
    return int(data.query_lengths[batch.queries].sum() + data.passage_lengths[batch.passages].sum())


def build_share(data: TrainingData, step: Step, rank: int) -> Share:
    """Tokens of the texts that `rank` embeds, on the CPU. A micro-batch without texts gets a dummy of one token."""
    plan = step.plan
    texts = plan.micro_batches[rank]
    flat = np.concatenate(texts)
    encoded = dict(zip(flat.tolist(), _encode(data, step.batch, flat), strict=True))

    def collate(numbers: np.ndarray) -> MicroBatch:
        return data.encoder.collate([encoded[n] for n in numbers.tolist()] or [[data.encoder.end]])

    micro_batches = [collate(numbers) for numbers in texts]
    joined = [np.concatenate(texts[rounds.start : rounds.stop]) for rounds in plan.embedding_batches]
    alone = [len(rounds) == 1 for rounds in plan.embedding_batches]
    return Share(
        micro_batches,
        [len(numbers) for numbers in texts],
        [
            micro_batches[rounds.start] if one else collate(numbers)
            for rounds, one, numbers in zip(plan.embedding_batches, alone, joined, strict=True)
        ],
        [len(numbers) for numbers in joined],
    )


def _encode(data: TrainingData, batch: GlobalBatch, texts: np.ndarray) -> list[list[int]]:
    """Token ids of texts given by number, queries before passages in number."""
    queries = len(batch.queries)
    is_query = texts < queries
    of_query = data.pairs.queries.column("text", batch.queries[texts[is_query]])
    of_passage = data.pairs.passages.column("text", batch.passages[texts[~is_query] - queries])
    encoded = {
        True: iter(data.encoder.encode("query", of_query) if of_query else []),
        False: iter(data.encoder.encode("passage", of_passage) if of_passage else []),
    }
    return [next(encoded[bool(query)]) for query in is_query]


class Ahead:
    """Plans and tokenises the next step in a thread while the current one computes. No communication happens there."""

    def __init__(self, data: TrainingData, config: RunConfig, world: int, rank: int):
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="next-step")
        self.make = lambda number: self._make(data, config, world, rank, number)
        self.pending: tuple[int, Future[tuple[Step, Share, float]]] | None = None

    def get(self, number: int, last: int) -> tuple[Step, Share, float]:
        """Step `number`, its share and the seconds they took; starts on the following one up to `last`."""
        if self.pending is None or self.pending[0] != number:
            self.pending = (number, self.pool.submit(self.make, number))
        made = self.pending[1].result()
        self.pending = (number + 1, self.pool.submit(self.make, number + 1)) if number < last else None
        return made

    @staticmethod
    def _make(data: TrainingData, config: RunConfig, world: int, rank: int, number: int) -> tuple[Step, Share, float]:
        started = time.monotonic()
        step = plan_step(data, config, world, number)
        share = build_share(data, step, rank)
        return step, share, time.monotonic() - started

"""Texts of a retrieval set -> each rank's shard of unit vectors. Knows no metric and no engine: `embed` is handed in."""

import sys
import time
from collections.abc import Callable

import numpy as np
import torch

from hybrid_scale import dist
from hybrid_scale.data.partition import Budget, partition
from hybrid_scale.data.records import RetrievalSet, TextTable
from hybrid_scale.data.text import Role, TextEncoder, length_table

Embed = Callable[[dict[str, torch.Tensor]], torch.Tensor]
PROGRESS_SECONDS = 10.0


def encode_share(
    texts: TextTable, role: Role, lengths: np.ndarray, encoder: TextEncoder, embed: Embed, max_tokens: int
) -> tuple[np.ndarray, np.ndarray]:
    """This rank's texts (numbers int64 [n]) and their vectors (float32 [n, D]).

    All ranks call `embed` equally often (ZeRO-3 forwards are collective); a rank without texts left embeds a dummy.
    """
    plan = partition(lengths.astype(np.int64), dist.world_size(), Budget(max_tokens, packed=encoder.packed))
    mine = plan.micro_batches[dist.rank()]
    vectors: list[np.ndarray] = []
    started = said = time.monotonic()
    for number, batch in enumerate(mine):
        rows = encoder.encode(role, texts.column("text", batch)) if len(batch) else [[encoder.end]]
        with torch.no_grad():
            batch_tokens = encoder.collate(rows)
            embedded = embed({name: t if name == "lengths" else t.to(dist.device()) for name, t in batch_tokens.items()})
        vectors.append(embedded[: len(batch)].float().cpu().numpy())
        now = time.monotonic()
        if dist.rank() == 0 and now - said > PROGRESS_SECONDS:
            said = now
            _say(role, number + 1, len(mine), sum(map(len, vectors)) * dist.world_size(), now - started)
    return np.concatenate(mine), np.concatenate(vectors)


def _say(role: Role, done: int, total: int, texts: int, elapsed: float) -> None:
    what = "queries" if role == "query" else "passages"
    left = elapsed / done * (total - done)
    line = f"encoding {what}: {done}/{total} micro-batches  {texts / elapsed:.0f} texts/s  left {left:.0f} s"
    print(line, file=sys.stderr, flush=True)


def encode_queries(task: RetrievalSet, encoder: TextEncoder, embed: Embed, max_tokens: int) -> np.ndarray:
    """Vectors of all queries, float32 [Q, D], on every rank."""
    lengths = prepare_lengths(task, "queries", task.queries, "query", encoder)
    numbers, vectors = encode_share(task.queries, "query", lengths, encoder, embed, max_tokens)
    whole = np.empty((len(task.queries), vectors.shape[1]), np.float32)
    whole[np.concatenate(dist.gather_arrays(numbers))] = np.concatenate(dist.gather_arrays(vectors))
    return whole


def encode_corpus(task: RetrievalSet, encoder: TextEncoder, embed: Embed, max_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """This rank's shard of the corpus: passage numbers int64 [n] and vectors float32 [n, D]."""
    lengths = prepare_lengths(task, "corpus", task.corpus, "passage", encoder)
    return encode_share(task.corpus, "passage", lengths, encoder, embed, max_tokens)


def prepare_lengths(task: RetrievalSet, name: str, table: TextTable, role: Role, encoder: TextEncoder) -> np.ndarray:
    """The length table, computed by rank 0 where it doesn't exist yet."""
    dist.first_rank_does(lambda: length_table(task.directory, name, table, role, encoder)[:0].tolist())
    return length_table(task.directory, name, table, role, encoder)

"""Texts of a retrieval set -> unit vectors, by two ways. Knows no metric and no engine: `embed` is handed in.

To a store on disk: every rank has a whole model and takes the next part that nobody has taken, so ranks may differ in speed
and a killed run goes on where it was. In lock-step, block after block: for models whose forward is collective (ZeRO-3, in
training).
"""

import hashlib
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hybrid_scale import dist
from hybrid_scale.data.partition import Budget, partition
from hybrid_scale.data.prepared import RetrievalSet, TextTable
from hybrid_scale.data.text import CHUNK, Role, TextEncoder, length_table, role_digest
from hybrid_scale.errors import DataError, describe
from hybrid_scale.retrieval.store import Store, make_store, open_store, refuse_difference, rows_of_parts

Embed = Callable[[dict[str, torch.Tensor]], torch.Tensor]
PROGRESS_SECONDS = 10.0
NO_MORE = 2**40
"""Added to the tally of taken parts, it leaves none to take."""
TABLES: dict[Role, str] = {"query": "queries", "passage": "corpus"}
KINDS: dict[Role, str] = {"query": "queries", "passage": "passages"}


# -------------------------------------------------------------------------------------------------------------- to a store


@dataclass(frozen=True)
class Encoding:
    """How texts become stored vectors."""

    model: dict[str, Any]
    """Names the weights and how they are used: a JSON object, compared with the store's."""
    encoder: TextEncoder
    embed: Embed
    max_tokens: int
    """Of a micro-batch, padding included."""
    dtype: str = "float16"
    """Of the stored vectors, a key of store.STORED."""

    def identity(self, task: RetrievalSet, role: Role) -> dict[str, Any]:
        """All that the vectors depend on."""
        return {
            **{"model": self.model, "role": role, "prompt": self.encoder.prompts[role], "normalised": True},
            **{"max_tokens": self.encoder.max_tokens[role], "tokens": role_digest(self.encoder, role), "dtype": self.dtype},
            "texts": texts_digest(task, role),
        }


def encode_stored(task: RetrievalSet, role: Role, directory: Path, encoding: Encoding) -> Store:
    """Vectors of all queries or passages in `directory`; finished parts are kept. All ranks call it and get the store.

    `encoding.embed` isn't called where all parts are there, nor before the folder was found to be theirs. A damaged part is
    encoded again with a warning. Raises DataError on every rank: the folder holds vectors of another model, prompt, type or
    text; NaN or infinity in a vector (with the ids); too little room on the disk.
    """
    texts = task.queries if role == "query" else task.corpus
    identity = dist.first_rank_does(lambda: encoding.identity(task, role))
    dimensions = dist.first_rank_does(lambda: _known_dimensions(directory, identity))
    if dimensions is None:
        dimensions = _launch([[encoding.encoder.end]], encoding).shape[1]
    dist.first_rank_does(lambda: _begin(directory, identity, len(texts), dimensions))
    store = open_store(directory)
    parts = missing_parts(store)
    rows = sum(end - first for first, end in map(store.span, parts))
    progress = Progress(KINDS[role], rows, len(texts) - rows)
    taken = dist.Tally()

    def work() -> None:
        try:
            while (turn := taken.add(1)) <= len(parts):
                part = parts[turn - 1]
                vectors, at_limit = _encode_part(texts, role, store, part, encoding, progress)
                store.write(part, vectors, lambda row: f"id {texts.column('id', np.array([row]))[0]!r}", at_limit=at_limit)
        except BaseException:
            taken.add(NO_MORE)
            raise

    dist.together(work)
    progress.end()
    return store


def _known_dimensions(directory: Path, identity: dict[str, Any]) -> int | None:
    """Of the store in the folder, None where there is none. Raises DataError: it is of another identity."""
    if not (directory / "manifest.json").is_file():
        return None
    store = open_store(directory)
    refuse_difference(str(directory), store.identity, identity)
    return store.dimensions


def _begin(directory: Path, identity: dict[str, Any], rows: int, dimensions: int) -> None:
    """Make or accept the store; see that the disk holds what is still to be written."""
    store = make_store(directory, identity, rows, dimensions, rows_of_parts(rows, dist.world_size()))
    spans = [store.span(part) for part in range(store.parts) if not store.finished(part)]
    needed, free = sum(end - first for first, end in spans) * store.row_bytes, shutil.disk_usage(directory).free
    if needed > free:
        rule = f"{needed / 2**30:.1f} GiB of embeddings are still to be written"
        raise DataError(describe(f"{directory}: room on the disk", f"{free / 2**30:.1f} GiB", rule, "Choose another folder."))


def _encode_part(
    texts: TextTable, role: Role, store: Store, part: int, encoding: Encoding, progress: "Progress"
) -> tuple[np.ndarray, int]:
    """float32 [n, D] of the rows of a part, sorted by length into micro-batches; how many of them are as long as may be."""
    flat, ends = _tokens(texts, role, store.span(part), encoding.encoder)
    starts = np.concatenate([[0], ends[:-1]])
    plan = partition(ends - starts, 1, Budget(encoding.max_tokens, packed=encoding.encoder.packed))
    vectors = np.empty((len(ends), store.dimensions), np.float32)
    waiting: list[tuple[np.ndarray, torch.Tensor]] = []
    for batch in [*plan.micro_batches[0], np.empty(0, np.int64)]:
        launched = [(batch, _launch([flat[starts[i] : ends[i]].tolist() for i in batch], encoding))] if len(batch) else []
        for numbers, result in waiting:  # fetched while the device is busy with the next micro-batch
            if tuple(result.shape) != (len(numbers), store.dimensions):
                rule = f"{len(numbers)} vectors of {store.dimensions} dimensions were expected"
                raise DataError(describe("embeddings", tuple(result.shape), rule, "Has the model changed meanwhile?"))
            vectors[numbers] = result.float().cpu().numpy()
            progress.add(len(numbers))
        waiting = launched
    return vectors, int((ends - starts == encoding.encoder.max_tokens[role]).sum())


def _tokens(texts: TextTable, role: Role, span: tuple[int, int], encoder: TextEncoder) -> tuple[np.ndarray, np.ndarray]:
    """Token ids of the rows end to end (int32), and where each row's end (int64 [n])."""
    column = texts.table.column("text")
    flat, lengths = [], []
    for at in range(span[0], span[1], CHUNK):
        rows = encoder.encode(role, column.slice(at, min(CHUNK, span[1] - at)).to_pylist())
        lengths += [len(row) for row in rows]
        flat += [np.array(row, np.int32) for row in rows]
    return np.concatenate(flat), np.cumsum(np.array(lengths, np.int64))


def _launch(rows: list[list[int]], encoding: Encoding) -> torch.Tensor:
    with torch.no_grad():
        tokens = encoding.encoder.collate(rows)
        return encoding.embed({name: t if name == "lengths" else t.to(dist.device()) for name, t in tokens.items()})


def missing_parts(store: Store) -> list[int]:
    """Parts that are to be encoded: without a record, or damaged (rank 0 says how). Each rank reads its share. Collective."""

    def look() -> list[tuple[int, str | None]]:
        mine = range(dist.rank(), store.parts, dist.world_size())
        found = [(part, store.damage(part) if store.finished(part) else None) for part in mine]
        return [(part, reason) for part, reason in found if reason is not None or not store.finished(part)]

    parts = sorted(pair for pairs in dist.gather_objects(dist.together(look)) for pair in pairs)
    if dist.rank() == 0:
        for part, reason in parts:
            if reason is not None:
                print(f"warning: {reason}; part {part} is encoded again", file=sys.stderr, flush=True)
    return [part for part, _ in parts]


def texts_digest(task: RetrievalSet, role: Role) -> str:
    """SHA-256 of the file of texts and ids."""
    with open(task.directory / f"{TABLES[role]}.arrow", "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Progress:
    """What all ranks together have done, on rank 0's terminal every ten seconds. Made by all ranks."""

    def __init__(self, kind: str, total: int, kept: int):
        self.kind, self.total, self.kept = kind, total, kept
        self.done = dist.Tally()
        self.started = self.said = time.monotonic()
        self.told = -1

    def add(self, texts: int) -> None:
        done = self.done.add(texts)
        if dist.rank() == 0 and time.monotonic() - self.said > PROGRESS_SECONDS:
            self._say(done)

    def end(self) -> None:
        """A last line, where there were others that didn't say all."""
        if dist.rank() == 0 and self.said > self.started and self.told < self.total:
            self._say(self.done.add(0))

    def _say(self, done: int) -> None:
        self.said, self.told = time.monotonic(), done
        rate = done / (self.said - self.started)
        left = (self.total - done) / rate if rate else float("inf")
        kept = f" ({self.kept} were there)" if self.kept else ""
        line = (
            f"encoding {self.kind}: {done}/{self.total}{kept}  {rate:.{0 if rate >= 10 else 1}f} {self.kind}/s  left {left:.0f} s"
        )
        print(line, file=sys.stderr, flush=True)


# -------------------------------------------------------------------------------------------------------------- in lock-step


def encode_share(
    texts: TextTable, role: Role, lengths: np.ndarray, encoder: TextEncoder, embed: Embed, max_tokens: int
) -> tuple[np.ndarray, Iterator[np.ndarray]]:
    """This rank's texts (numbers int64 [n]), and their vectors as they are made: float32 [m, D], together [n, D].

    All ranks call `embed` equally often (ZeRO-3 forwards are collective), so all must exhaust the vectors; a rank without texts
    left embeds a dummy and gets [0, D].
    """
    plan = partition(lengths.astype(np.int64), dist.world_size(), Budget(max_tokens, packed=encoder.packed))
    mine = plan.micro_batches[dist.rank()]

    def vectors() -> Iterator[np.ndarray]:
        texts_done, started = 0, time.monotonic()
        said = started
        for number, batch in enumerate(mine):
            rows = encoder.encode(role, texts.column("text", batch)) if len(batch) else [[encoder.end]]
            with torch.no_grad():
                tokens = encoder.collate(rows)
                embedded = embed({name: t if name == "lengths" else t.to(dist.device()) for name, t in tokens.items()})
            yield embedded[: len(batch)].float().cpu().numpy()
            texts_done, now = texts_done + len(batch), time.monotonic()
            if dist.rank() == 0 and now - said > PROGRESS_SECONDS:
                said = now
                _say(role, number + 1, len(mine), texts_done * dist.world_size(), now - started)

    return np.concatenate(mine), vectors()


def _say(role: Role, done: int, total: int, texts: int, elapsed: float) -> None:
    left = elapsed / done * (total - done)
    line = f"encoding {KINDS[role]}: {done}/{total} micro-batches  {texts / elapsed:.0f} texts/s  left {left:.0f} s"
    print(line, file=sys.stderr, flush=True)


def encode_queries(task: RetrievalSet, encoder: TextEncoder, embed: Embed, max_tokens: int) -> np.ndarray:
    """Vectors of all queries, float32 [Q, D], on every rank."""
    lengths = prepare_lengths(task, "queries", task.queries, "query", encoder)
    numbers, blocks = encode_share(task.queries, "query", lengths, encoder, embed, max_tokens)
    vectors = np.concatenate(list(blocks))
    whole = np.empty((len(task.queries), vectors.shape[1]), np.float32)
    whole[np.concatenate(dist.gather_arrays(numbers))] = np.concatenate(dist.gather_arrays(vectors))
    return whole


def encode_corpus(
    task: RetrievalSet, encoder: TextEncoder, embed: Embed, max_tokens: int
) -> tuple[np.ndarray, Iterator[np.ndarray]]:
    """This rank's passages: numbers int64 [n], and their vectors as they are made (see `encode_share`)."""
    lengths = prepare_lengths(task, "corpus", task.corpus, "passage", encoder)
    return encode_share(task.corpus, "passage", lengths, encoder, embed, max_tokens)


def prepare_lengths(task: RetrievalSet, name: str, table: TextTable, role: Role, encoder: TextEncoder) -> np.ndarray:
    """The length table, computed by rank 0 where it doesn't exist yet."""
    dist.first_rank_does(lambda: length_table(task.directory, name, table, role, encoder)[:0].tolist())
    return length_table(task.directory, name, table, role, encoder)

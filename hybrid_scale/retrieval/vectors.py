"""Open the vectors of a retrieval set: a store that we encoded, or two given matrices and the ids of their rows.

    DIR/corpus/  DIR/queries/               stores (store.py)
    DIR/corpus.npy   DIR/corpus_ids.txt     float16 or float32 [passages, dimensions], one id a line
    DIR/queries.npy  DIR/queries_ids.txt    the same for queries

Given rows may be in any order; ids must be those of the retrieval set, each once. Scores are inner products of the vectors as
they stand, or cosines: inner products of the vectors at unit length. The corpus stays on disk (matrices are
memory-mapped, stores read in blocks where they exceed the memory given), and each rank opens an equal slice of its rows.
Knows no model and no measure.
"""

from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hybrid_scale import dist
from hybrid_scale.data.prepared import RetrievalSet, TextTable
from hybrid_scale.data.text import Role
from hybrid_scale.errors import DataError, describe
from hybrid_scale.retrieval.encode import texts_digest
from hybrid_scale.retrieval.index import Shard, Vectors
from hybrid_scale.retrieval.store import Store, open_store, refuse_difference
from hybrid_scale.retrieval.stored import StoredVectors

Similarity = Literal["inner_product", "cosine"]
SHOWN_IDS = 3
LENGTHS_OF = 4096
"""Passages whose lengths are looked at."""
UNIT = 0.01
"""Lengths that differ from 1 by no more are those of unit vectors, rounded."""


class UnitRows:
    """The rows of a matrix float16 or float32 [n, D] at unit length, float32, made when they are asked for; zeros stay zeros."""

    def __init__(self, rows: Vectors):
        self.rows = rows
        self.shape: tuple[int, ...] = rows.shape
        self.ndim, self.dtype = 2, np.dtype(np.float32)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Any) -> np.ndarray:
        return at_unit_length(np.asarray(self.rows[rows]))


def at_unit_length(rows: np.ndarray) -> np.ndarray:
    """float32, each row of [..., D] divided by its length, which is summed in float64."""
    wide = rows.astype(np.float64)
    length = np.sqrt((wide**2).sum(-1, keepdims=True))
    return np.divide(wide, length, out=np.zeros_like(wide), where=length > 0).astype(np.float32)


def passage_lengths(directory: Path | str) -> tuple[float, float] | None:
    """Shortest and longest of the first given passages' vectors; None where all have unit length, or the folder holds stores."""
    path = Path(directory) / "corpus.npy"
    if not path.is_file():
        return None
    lengths = np.linalg.norm(_open_matrix(path)[:LENGTHS_OF].astype(np.float64), axis=1)
    least, most = float(lengths.min(initial=np.inf)), float(lengths.max(initial=0))
    return None if 1 - UNIT <= least <= most <= 1 + UNIT or least > most else (least, most)


def similarity_note(similarity: Similarity, lengths: tuple[float, float] | None) -> str:
    """What scores are, for a person, with a word where the passages' lengths decide too."""
    kind = similarity.replace("_", " ")
    if lengths is None:
        return f"{kind} (given vectors of unit length)"
    given = f"given vectors of lengths {lengths[0]:.3g} to {lengths[1]:.3g}"
    return f"{kind} ({given}; --similarity cosine leaves these out)" if similarity == "inner_product" else f"{kind} ({given})"


def open_embeddings(
    directory: Path | str, task: RetrievalSet, memory_gib: float = 4.0, similarity: Similarity = "inner_product"
) -> tuple[np.ndarray, Shard]:
    """Query vectors float32 [Q, D] in the task's order, and this rank's shard of the corpus; `cosine`: both at unit length.

    Raises DataError (on every rank): a file is missing or not an array, rows and ids differ in number, ids that the task
    doesn't know or that are missing, an id twice, NaN or infinity, queries and corpus of different dimensions; a store of
    other texts, or a part of it that is missing or damaged.
    """
    directory = Path(directory)
    if (directory / "corpus" / "manifest.json").is_file():
        queries, corpus = (dist.together(lambda kind=kind: open_store(directory / kind)) for kind in ("queries", "corpus"))
        query_vectors, shard = open_stored(queries, corpus, task, memory_gib)
    else:
        query_vectors, shard = dist.together(lambda: _open(directory, task))
    if similarity == "cosine":
        rows = UnitRows(shard.vectors)
        whole = dist.together(lambda: Shard(shard.numbers, rows, shard.name, block_bytes=shard.block_bytes))
        return at_unit_length(query_vectors), whole
    return query_vectors, shard


def open_stored(
    queries: Store, corpus: Store, task: RetrievalSet, memory_gib: float = 4.0, checked: bool = False
) -> tuple[np.ndarray, Shard]:
    """As `open_embeddings`, from stores. `memory_gib`: up to this size a rank's shard is held in memory.

    `checked`: the parts are known to be whole (encode.encode_stored saw to it); else each rank reads its share of them first.
    """
    dist.first_rank_does(lambda: _refuse_other_texts(queries, corpus, task))
    if not checked:
        dist.together(lambda: _check_share(queries, corpus))

    def read() -> tuple[np.ndarray, Shard]:
        whole = np.asarray(StoredVectors(queries, 0, queries.rows, float("inf"))[:], np.float32)
        first, end = (corpus.rows * part // dist.world_size() for part in (dist.rank(), dist.rank() + 1))
        vectors = StoredVectors(corpus, first, end, memory_gib * 2**30)
        name = lambda row: f"passage {task.corpus.column('id', np.array([first + row]))[0]!r}"  # noqa: E731
        return whole, Shard(np.arange(first, end), vectors, name, vectors.largest_norm(), vectors.block_bytes)

    return dist.together(read)


def _check_share(*stores: Store) -> None:
    for store in stores:
        store.check(range(dist.rank(), store.parts, dist.world_size()))


def _refuse_other_texts(queries: Store, corpus: Store, task: RetrievalSet) -> None:
    roles: list[tuple[Role, Store]] = [("query", queries), ("passage", corpus)]
    for role, store in roles:
        refuse_difference(str(store.directory), {"texts": store.identity["texts"]}, {"texts": texts_digest(task, role)})


def _open(directory: Path, task: RetrievalSet) -> tuple[np.ndarray, Shard]:
    queries, query_ids, query_numbers = _rows(directory, "queries", task.queries, task.name)
    corpus, corpus_ids, corpus_numbers = _rows(directory, "corpus", task.corpus, task.name)
    if queries.shape[1] != corpus.shape[1]:
        found = f"{queries.shape[1]} and {corpus.shape[1]}"
        raise DataError(describe(f"{directory}: dimensions of queries and corpus", found, "both come from one model"))
    ordered = np.empty(queries.shape, np.float32)
    ordered[query_numbers] = queries
    _check_finite(queries, directory / "queries.npy", query_ids)
    first, end = (len(corpus) * part // dist.world_size() for part in (dist.rank(), dist.rank() + 1))
    name = lambda row: f"{directory / 'corpus.npy'}: row {first + row} (id {corpus_ids[first + row].as_py()!r})"  # noqa: E731
    return ordered, Shard(corpus_numbers[first:end], corpus[first:end], name)


def _rows(directory: Path, kind: str, table: TextTable, task: str) -> tuple[np.ndarray, pa.Array, np.ndarray]:
    """The matrix of a kind, the ids of its rows, and the number of each row in the task."""
    vectors = _open_matrix(directory / f"{kind}.npy")
    ids = read_ids(directory / f"{kind}_ids.txt")
    if len(vectors) != len(ids):
        found = f"{len(vectors)} rows and {len(ids)} ids"
        raise DataError(describe(f"{directory}: {kind}.npy and {kind}_ids.txt", found, "every row has one id"))
    return vectors, ids, _match(ids, table.table.column("id"), f"{directory / f'{kind}_ids.txt'}", task)


def _open_matrix(path: Path) -> np.ndarray:
    if not path.is_file():
        raise DataError(describe(str(path), "no such file", "embeddings are corpus.npy and queries.npy with their ids"))
    try:
        vectors = np.load(path, mmap_mode="r")
    except (ValueError, EOFError, OSError) as error:
        rule = "not a whole NumPy array of numbers"
        raise DataError(describe(str(path), str(error).rstrip("."), rule, "Save it again with numpy.save.")) from None
    if not isinstance(vectors, np.ndarray):
        raise DataError(describe(str(path), "several arrays (.npz)", "one array is needed", "Save it with numpy.save."))
    if vectors.ndim != 2 or vectors.shape[1] < 1 or vectors.dtype not in (np.float16, np.float32):
        rule = "float16 or float32 with shape [rows, dimensions]"
        raise DataError(describe(str(path), f"{vectors.dtype} {vectors.shape}", rule, "Save it with astype(numpy.float32)."))
    return vectors


def read_ids(path: Path) -> pa.Array:
    """The lines of a UTF-8 file as text, without one Python object a line: corpora have tens of millions.

    A byte order mark and carriage returns at the ends of lines are no part of ids.
    """
    if not path.is_file():
        raise DataError(describe(str(path), "no such file", "the ids of the rows, one a line, are needed"))
    raw = path.read_bytes().removeprefix(b"\xef\xbb\xbf").replace(b"\r\n", b"\n")
    data = np.frombuffer(raw if raw.endswith(b"\n") or not raw else raw + b"\n", np.uint8)
    ends = np.flatnonzero(data == ord("\n"))
    offsets = np.concatenate([[0], ends - np.arange(len(ends))]).astype(np.int64)  # as if the newlines were gone
    text = np.delete(data, ends)
    ids = pa.LargeStringArray.from_buffers(len(ends), pa.py_buffer(offsets), pa.py_buffer(text))
    try:
        ids.validate(full=True)
    except pa.ArrowInvalid as error:
        raise DataError(describe(str(path), str(error), "a text file must be UTF-8", "Convert it.")) from None
    return ids


def _match(ids: pa.Array, known: pa.ChunkedArray, where: str, task: str) -> np.ndarray:
    """Position of each id among the known ones; together they are all of those."""
    numbers = pc.index_in(ids, value_set=known)
    unknown = ids.filter(pc.is_null(numbers))
    if len(unknown):
        line = 1 + pc.index(pc.is_null(numbers), True).as_py()
        rule, remedy = f"{len(unknown)} ids that '{task}' doesn't hold", "Are these the vectors of this set?"
        raise DataError(describe(f"{where}:{line}", _some(unknown), rule, remedy))
    if len(pc.unique(ids)) != len(ids):
        counts = pc.value_counts(ids)
        twice = counts.field("values").filter(pc.greater(counts.field("counts"), 1))
        raise DataError(describe(where, _some(twice), f"{len(twice)} ids with more than one row", "Keep one row an id."))
    missing = known.filter(pc.invert(pc.is_in(known, value_set=ids)))
    if len(missing):
        raise DataError(describe(where, _some(missing), f"{len(missing)} ids of '{task}' have no row", "Encode them as well."))
    return numbers.to_numpy(zero_copy_only=False).astype(np.int64)


def _some(ids: pa.Array | pa.ChunkedArray) -> str:
    shown = ", ".join(ids.slice(0, SHOWN_IDS).to_pylist())
    return shown + (", ..." if len(ids) > SHOWN_IDS else "")


def _check_finite(vectors: np.ndarray, path: Path, ids: pa.Array) -> None:
    bad = np.argwhere(~np.isfinite(vectors))
    if len(bad):
        row, column = (int(value) for value in bad[0])
        where = f"{path}: row {row} (id {ids[row].as_py()!r}), dimension {column}"
        raise DataError(describe(where, float(vectors[row, column]), "vectors are finite"))

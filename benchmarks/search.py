"""Exact search of stored fp16 passages on W ranks from disk against faiss.IndexFlatIP in one process, on the same vectors.

    python benchmarks/search.py [--passages 200000] [--dimensions 1024] [--queries 1000] [--ranks 4] [--json OUT.json]
    python benchmarks/search.py --passages 1500000 --budget-gib 0.5       # the scale run: shards larger than their budget

Vectors: clustered (topics of 1,000 passages around random centres, unit length), one passage in a hundred a copy of another;
queries near centres. They are written as a store (hybrid_scale/retrieval/store.py) in a temporary folder on disk. Ours: W gloo
processes of one thread, each with an equal share of the rows, read in blocks when it exceeds `--budget-gib` (default: 0.6 of the
share); k = 100, certified. Theirs: one process of `--threads` threads (default: as many as our ranks have cores to run on), all
vectors as float32 in IndexFlatIP; adding them isn't counted. Both read from the page cache or the disk as it comes.
Time: CPU-seconds of all threads and seconds by the clock. Memory: peak resident set (all of it, libraries too), and its growth
above what was resident before any vector was opened. Agreement: same scores within float32 rounding, and the same ids where the
neighbouring scores differ by more than that (faiss knows no order among ties).
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import _environment  # noqa: F401 (before the heavy libraries)
import _ranks
import numpy as np
from _ranks import available_gib, machine, reset_peak, run_ranks

from hybrid_scale import dist
from hybrid_scale.errors import HybridScaleError
from hybrid_scale.retrieval.index import Shard, search
from hybrid_scale.retrieval.store import make_store, open_store
from hybrid_scale.retrieval.stored import StoredVectors

_ranks.PRELOAD[:] = ["hybrid_scale.retrieval.index", "hybrid_scale.retrieval.stored"]  # no library that search doesn't need
CLUSTER, COPIES, PART = 1000, 100, 16_384
GOALS = {"time_ratio": 1.3, "memory_ratio": 1 / 3}


# --------------------------------------------------------------------------------------------------------------- vectors


def centres(passages: int, dimensions: int) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((max(1, passages // CLUSTER), dimensions)).astype(np.float32)


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def write_vectors(folder: Path, passages: int, dimensions: int) -> None:
    store = make_store(folder, {"what": "benchmark", "dtype": "float16"}, passages, dimensions, PART)
    middle = centres(passages, dimensions)
    for part in range(store.parts):
        first, end = store.span(part)
        rng = np.random.default_rng(1000 + part)
        vectors = rng.standard_normal((end - first, dimensions), np.float32) + middle[rng.integers(0, len(middle), end - first)]
        copied = rng.integers(0, end - first, (2, (end - first) // COPIES))
        vectors[copied[0]] = vectors[copied[1]]
        store.write(part, unit(vectors), str)


def make_queries(passages: int, dimensions: int, queries: int) -> np.ndarray:
    rng = np.random.default_rng(2)
    middle = centres(passages, dimensions)
    return unit(rng.standard_normal((queries, dimensions), np.float32) + middle[rng.integers(0, len(middle), queries)])


# ------------------------------------------------------------------------------------------------------------- measuring


def resident_mib() -> dict[str, float]:
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(lines[key].split()[0]) / 1024 for name, key in (("now", "VmRSS"), ("peak", "VmHWM"))}


def timed(before: dict[str, float], started: float, used: float) -> dict[str, float]:
    after = resident_mib()
    return {
        "wall_s": time.monotonic() - started,
        "cpu_s": time.process_time() - used,
        "peak_mib": after["peak"],
        "grown_mib": after["peak"] - before["now"],
    }


def ours(folder: str, queries: np.ndarray, k: int, budget_gib: float, out: str) -> dict[str, Any]:
    dist.start()
    search(queries[:2], Shard(np.array([dist.rank()]), np.ones((1, queries.shape[1]), np.float16)), 1)  # libraries wake up
    dist.barrier()
    reset_peak()
    before, started, used = resident_mib(), time.monotonic(), time.process_time()
    store = open_store(Path(folder))
    first, end = (store.rows * part // dist.world_size() for part in (dist.rank(), dist.rank() + 1))
    store.check(range(dist.rank(), store.parts, dist.world_size()))
    checked = time.process_time() - used
    vectors = StoredVectors(store, first, end, budget_gib * 2**30)
    shard = Shard(np.arange(first, end), vectors, None, vectors.largest_norm(), vectors.block_bytes)
    scores, numbers = search(queries, shard, k)
    result = timed(before, started, used)
    if dist.rank() == 0:
        np.savez(out, scores=scores, numbers=numbers)
    return {**result, "check_cpu_s": checked, "shard_mib": len(vectors) * store.row_bytes / 2**20, "in_memory": vectors.in_memory}


def theirs(folder: str, queries: np.ndarray, k: int, threads: int, out: str) -> dict[str, Any]:
    import faiss

    faiss.omp_set_num_threads(threads)
    faiss.cvar.distance_compute_blas_threshold = 1
    store = open_store(Path(folder))
    before, started, used = resident_mib(), time.monotonic(), time.process_time()
    index = faiss.IndexFlatIP(store.dimensions)
    vectors = StoredVectors(store, 0, store.rows, 0.0)
    _reserve(index, store.rows * store.dimensions)
    for first in range(0, store.rows, PART):
        index.add(vectors[first : first + PART].astype(np.float32))
    loading = timed(before, started, used)
    started, used = time.monotonic(), time.process_time()
    scores, numbers = index.search(queries, k)
    result = timed(before, started, used)
    np.savez(out, scores=scores, numbers=numbers)
    return {**result, "load_cpu_s": loading["cpu_s"], "load_wall_s": loading["wall_s"]}


def _reserve(index: Any, values: int) -> None:
    """Room for all vectors at once: growing by doubling would hold them twice for a moment."""
    index.codes.resize(4 * values)
    index.codes.resize(0)


# ------------------------------------------------------------------------------------------------------------------- run


def disagreements(mine: Path, other: Path, slack: float) -> dict[str, int]:
    """Scores further apart than `slack`, and ids that differ though no neighbouring score is within it."""
    a, b = np.load(mine), np.load(other)
    gaps = np.abs(np.diff(a["scores"].astype(float), axis=1))
    edge = np.full((len(gaps), 1), np.inf)
    last = np.zeros((len(gaps), 1))  # the passage behind the last one isn't known: it may tie
    alone = np.minimum(np.hstack([edge, gaps]), np.hstack([gaps, last])) > 2 * slack
    return {
        "scores": int((np.abs(a["scores"].astype(float) - b["scores"]) > slack).sum()),
        "ids_apart_from_ties": int(((a["numbers"] != b["numbers"]) & alone).sum()),
        "ids_among_ties": int(((a["numbers"] != b["numbers"]) & ~alone).sum()),
        "results": int(a["numbers"].size),
    }


def run(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    bytes_needed = 2 * given.passages * given.dimensions
    if shutil.disk_usage(folder).free < 1.2 * bytes_needed:
        raise HybridScaleError(f"{bytes_needed / 1e9:.1f} GB of vectors don't fit in {folder}.")
    if available_gib() * 2**30 < 2.5 * bytes_needed:
        raise HybridScaleError(f"IndexFlatIP needs {2 * bytes_needed / 1e9:.1f} GB of memory. Lower --passages.")
    started = time.monotonic()
    write_vectors(folder / "store", given.passages, given.dimensions)
    print(f"{given.passages} x {given.dimensions} fp16 written in {time.monotonic() - started:.0f} s", flush=True)
    queries = make_queries(given.passages, given.dimensions, given.queries)
    share_gib = bytes_needed / given.ranks / 2**30
    budget = given.budget_gib or 0.6 * share_gib
    files = {name: folder / f"{name}.npz" for name in ("ours", "one", "theirs")}
    ranks = run_ranks(ours, given.ranks, str(folder / "store"), queries, given.k, budget, str(files["ours"]))
    print("ours:", json.dumps(ranks[0]), flush=True)
    flat = run_ranks(theirs, 1, str(folder / "store"), queries, given.k, given.threads, str(files["theirs"]))[0]
    print("faiss:", json.dumps(flat), flush=True)
    slack = given.dimensions * 2.0**-24 * 1.1
    return {
        "passages": given.passages,
        "dimensions": given.dimensions,
        "queries": given.queries,
        "k": given.k,
        "ranks": ranks,
        "budget_gib_per_rank": budget,
        "faiss": flat,
        "faiss_threads": given.threads,
        "disagreements": disagreements(files["ours"], files["theirs"], slack),
        **ratios(ranks, flat),
        "goals": GOALS,
        "machine": machine(),
    }


def ratios(ranks: list[dict[str, Any]], flat: dict[str, Any]) -> dict[str, float]:
    return {
        "cpu_ratio": sum(rank["cpu_s"] for rank in ranks) / flat["cpu_s"],
        "cpu_ratio_without_checksums": sum(rank["cpu_s"] - rank["check_cpu_s"] for rank in ranks) / flat["cpu_s"],
        "cpu_ratio_with_their_loading": sum(rank["cpu_s"] for rank in ranks) / (flat["cpu_s"] + flat["load_cpu_s"]),
        "wall_ratio": max(rank["wall_s"] for rank in ranks) / flat["wall_s"],
        "memory_ratio_per_rank": max(rank["peak_mib"] for rank in ranks) / flat["peak_mib"],
        "memory_ratio_all_ranks": sum(rank["peak_mib"] for rank in ranks) / flat["peak_mib"],
        "grown_ratio_all_ranks": sum(rank["grown_mib"] for rank in ranks) / flat["grown_mib"],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passages", type=int, default=200_000)
    parser.add_argument("--dimensions", type=int, default=1024)
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--k", type=int, default=100)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--threads", type=int, help="of faiss in one process (default: ranks, at most the cores)")
    parser.add_argument("--budget-gib", type=float)
    parser.add_argument("--folder", type=Path, help="where the vectors are written for the time (default: the system's)")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    given.threads = given.threads or min(given.ranks, os.cpu_count() or 1)
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        try:
            result = run(given, Path(folder))
        except HybridScaleError as error:
            print(error, file=sys.stderr)
            return 2
    print(json.dumps({key: value for key, value in result.items() if key not in ("ranks", "faiss", "machine")}, indent=1))
    if given.json:
        given.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

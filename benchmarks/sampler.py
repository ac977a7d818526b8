"""Memory and speed of the sampler on many pairs, against the permutation a conventional sampler keeps.

    python benchmarks/sampler.py [--rows 20000000] [--languages 10] [--json OUT.json]

Writes synthetic, fully parallel pairs (arrays only, no texts) into a temporary folder, builds the index once, then opens the
sampler in a fresh process, as every rank but the first does, and draws global batches of 1,024 rows.
"""

import argparse
import json
import multiprocessing
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa

from hybrid_scale.config import SamplerSettings
from hybrid_scale.data.prepared import FORMAT, Pairs
from hybrid_scale.data.sampler import HybridSampler

BATCHES = 300
SETTINGS = SamplerSettings(arm="hybrid", global_batch=1024, pool_rows=128)


def write(folder: Path, rows: int, languages: int) -> None:
    """Group g has one row in each language; every row is its own passage."""
    number = np.arange(rows)
    group, lang = number // languages, (number % languages).astype(np.int16)
    arrays = {"query": number, "group": group, "passage": number, "query_lang": lang, "passage_lang": lang}
    arrays |= {"cross_only": np.zeros(rows, bool), "family": group, "passage_family": group}
    arrays |= {"negative_offsets": np.zeros(rows + 1, np.int64), "negatives": np.empty(0, np.int64)}
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    for name in ("queries", "passages"):
        table = pa.table({"id": [""], "text": [""]})
        with pa.OSFile(str(folder / f"{name}.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
    names = [f"x-l{i}" for i in range(languages)]
    facts = {"format": FORMAT, "kind": "pairs", "languages": names, "fingerprint": f"{rows} {languages}"}
    (folder / "manifest.json").write_text(json.dumps(facts))


def anonymous_mib() -> float:
    """Memory of this process that no file backs (mapped files are shared by the ranks of a node)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) / 1024


def draw(folder: Path, deals: dict[str, int], queue: "multiprocessing.Queue[dict[str, float]]") -> None:
    before = anonymous_mib()
    start = time.perf_counter()
    sampler = HybridSampler(Pairs(folder), SETTINGS, 0, deals)
    opened = time.perf_counter()
    sampler.batch(0)
    first = time.perf_counter()
    for step in range(1, BATCHES):
        sampler.batch(step)
    drawn = time.perf_counter()
    sampler.batch(200_000)
    result = {"open_s": opened - start, "first_s": first - opened, "batches_per_s": (BATCHES - 1) / (drawn - first)}
    result |= {"jump_s": time.perf_counter() - drawn, "mib": anonymous_mib() - before}
    queue.put(result)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000_000)
    parser.add_argument("--languages", type=int, default=10)
    parser.add_argument("--json", type=Path, help="also write the results here")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write(folder, given.rows, given.languages)
        start = time.perf_counter()
        deals = HybridSampler(Pairs(folder), SETTINGS, 0).deals
        build = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        queue: multiprocessing.Queue[dict[str, float]] = multiprocessing.get_context("spawn").Queue()
        process = multiprocessing.get_context("spawn").Process(target=draw, args=(folder, deals, queue))
        process.start()
        result = queue.get()
        process.join()
    permutation = given.rows * 8 / 2**20
    cross = given.rows * (given.languages - 1)
    print(f"{given.rows:,} rows, {cross:,} ordered cross pairs, batches of {SETTINGS.global_batch} rows, {SETTINGS.arm}")
    print(f"  first rank, once: index and proof {build:.1f} s, peak {peak:.1f} GiB")
    print(f"  any rank: open {result['open_s'] * 1e3:.0f} ms, first batch {result['first_s'] * 1e3:.0f} ms")
    print(f"  {result['batches_per_s']:.0f} batches/s; step 200,000 from cold {result['jump_s']:.2f} s")
    print(f"  memory of its own {result['mib']:.0f} MiB = {result['mib'] / permutation:.3f} of one int64 permutation of the rows")
    if given.json:
        facts = {"rows": given.rows, "cross_pairs": cross, "index_and_proof_s": build, "index_peak_gib": peak, **result}
        given.json.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()

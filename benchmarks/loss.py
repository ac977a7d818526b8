"""Memory and speed of the contrastive loss with gradient, against the whole score matrix under autograd, and what a
bfloat16 exchange of embeddings changes.

    python benchmarks/loss.py [--rows 16384] [--columns 16384] [--dimension 1024] [--max-logits 16777216] [--json OUT.json]
    python benchmarks/loss.py --rows 65536 --columns 65536        # 26 TFLOP: 343 CPU-seconds on one core of an AMD EPYC

One pool; row i's positive is column i. Every case runs in a process of its own. Its peak is the highest resident memory
above that just before the call, so above embeddings [rows + columns, dimension] and targets, the returned gradient included.
Texts lie in random order in the buffer, as after an exchange between ranks. GFLOP/s: 6 x rows x columns x dimension
operations by CPU-seconds; masks and softmax take time but don't count as work.
"""

import argparse
import json
import multiprocessing
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy, normalize

from hybrid_scale.config import LossSettings
from hybrid_scale.train.loss import Targets, contrastive_loss

TEMPERATURE = 0.02
POSITIVE_COSINE = 0.2
"""Of a query and its passage; other pairs are at 0 +- 1 / sqrt(dimension), so the loss at t = .02 is neither 0 nor log C."""
EXCHANGE_TEMPERATURES = (0.02, 0.05)
RATIOS = ("peak_mib", "cpu_s", "loss", "gradient_norm")
ERRORS = {
    "gradient_relative_error": "error of gradient",
    "gradient_norm_ratio": "ratio of norms",
    "gradient_cosine": "cosine of gradients",
}
MIB = 2**20

Result = dict[str, float]
Loss = Callable[[torch.Tensor, Targets, int], tuple[torch.Tensor, torch.Tensor]]
"""(embeddings, targets, max_logits) -> (loss, gradient)."""


def status(key: str) -> int:
    """Bytes of a line of this process's status: VmRSS is memory now, VmHWM the highest since its program began."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(key)).split()[1])


def inputs(rows: int, columns: int, dimension: int) -> tuple[torch.Tensor, Targets]:
    """Unit vectors in one buffer in random order, and one pool in which every row has its own family.

    Filled 1,024 texts at a time: the peak of a process must be the loss's, not that of its inputs.
    """
    torch.manual_seed(0)
    order = torch.randperm(rows + columns)
    row_text, column_text = order[:rows], order[rows:]
    embeddings = torch.empty(rows + columns, dimension)
    for at in range(0, columns, 1024):
        passages = normalize(torch.randn(min(1024, columns - at), dimension), dim=1)
        embeddings[column_text[at : at + 1024]] = passages
        noise = normalize(torch.randn(len(passages), dimension), dim=1)
        queries = POSITIVE_COSINE * passages + (1 - POSITIVE_COSINE**2) ** 0.5 * noise
        embeddings[row_text[at : at + 1024]] = normalize(queries, dim=1)[: max(0, rows - at)]
    own, hard = torch.arange(rows), torch.arange(columns) >= rows
    return embeddings, Targets([0, rows], [0, columns], row_text, own, own, column_text, torch.arange(columns), hard)


def tiled(embeddings: torch.Tensor, targets: Targets, max_logits: int) -> tuple[torch.Tensor, torch.Tensor]:
    settings = LossSettings(temperature=TEMPERATURE, max_logits=max_logits)
    return contrastive_loss(embeddings, targets, range(targets.row_offsets[-1]), settings)


def untiled(embeddings: torch.Tensor, targets: Targets, max_logits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What is usually written; `max_logits` bounds nothing here."""
    leaf = embeddings.requires_grad_()
    queries, passages = leaf[targets.row_text], leaf[targets.column_text]
    loss = cross_entropy(queries @ passages.T / TEMPERATURE, targets.row_column)
    loss.backward()
    assert leaf.grad is not None
    return loss.detach(), leaf.grad


def measure(of: Loss, rows: int, columns: int, dimension: int, max_logits: int) -> Result:
    """Peak and time of one call, after one on a small pool that loads what torch loads lazily."""
    torch.set_num_threads(1)
    of(*inputs(64, 64, dimension), max_logits)
    embeddings, targets = inputs(rows, columns, dimension)
    resident, wall, cpu = status("VmRSS"), time.perf_counter(), time.process_time()
    loss, gradient = of(embeddings, targets, max_logits)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    peak = status("VmHWM") - resident
    result = {"rows": rows, "columns": columns, "dimension": dimension, "loss": float(loss), "gradient_norm": norm(gradient)}
    result |= {"inputs_mib": embeddings.nbytes / MIB, "peak_mib": peak / MIB, "cpu_s": cpu, "wall_s": wall}
    return result | {"gflops": 6e-9 * rows * columns * dimension / cpu}


def exchange(rows: int, columns: int, dimension: int, max_logits: int, temperature: float) -> Result:
    """Change of loss and gradient when float32 embeddings are rounded to bfloat16."""
    torch.set_num_threads(1)
    embeddings, targets = inputs(rows, columns, dimension)
    settings = LossSettings(temperature=temperature, max_logits=max_logits)
    loss, exact = contrastive_loss(embeddings, targets, range(rows), settings)
    rounded_loss, rounded = contrastive_loss(embeddings.bfloat16(), targets, range(rows), settings)
    both = norm(exact) * norm(rounded)
    return {
        "temperature": temperature,
        "loss": float(loss),
        "loss_relative_error": float((rounded_loss - loss).abs() / loss),
        "gradient_relative_error": norm(rounded - exact) / norm(exact),
        "gradient_norm_ratio": norm(rounded) / norm(exact),
        "gradient_cosine": float((rounded.double() * exact.double()).sum()) / both,
    }


def norm(gradient: torch.Tensor) -> float:
    """Summed in float64: float32 is off by 5e-4 over 8 million numbers."""
    return float(torch.linalg.vector_norm(gradient, dtype=torch.float64))


def alone(function: Callable[..., Result], *arguments: object) -> Result:
    """`function(*arguments)` in a fresh process; its errors are raised here."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=16384)
    parser.add_argument("--columns", type=int, default=16384, help="at least --rows; the rest are hard negatives")
    parser.add_argument("--dimension", type=int, default=1024)
    parser.add_argument("--max-logits", type=int, default=LossSettings().max_logits)
    parser.add_argument("--untiled-rows", type=int, default=8192, help="rows and columns of the comparison with autograd")
    parser.add_argument("--exchange-rows", type=int, default=4096, help="rows and columns of the bfloat16 comparison")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    if given.columns < given.rows:
        parser.error(f"--columns: found {given.columns}; every row needs a column of its own. Give at least {given.rows}.")
    return given


def main() -> None:
    given = arguments()
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # glibc of the children: every tensor freed is memory returned
    os.environ["OMP_NUM_THREADS"] = "1"
    same = (given.untiled_rows, given.untiled_rows, given.dimension, given.max_logits)
    cases = {
        "tiled": alone(measure, tiled, given.rows, given.columns, given.dimension, given.max_logits),
        "tiled, same size": alone(measure, tiled, *same),
        "untiled autograd": alone(measure, untiled, *same),
    }
    ratios = {key: cases["tiled, same size"][key] / cases["untiled autograd"][key] for key in RATIOS}
    square = (given.exchange_rows, given.exchange_rows, given.dimension, given.max_logits)
    rounding = [alone(exchange, *square, temperature) for temperature in EXCHANGE_TEMPERATURES]
    show(given, cases, ratios, rounding)
    if given.json:
        facts = {"torch": torch.__version__, "max_logits": given.max_logits, "exchange_rows": given.exchange_rows}
        facts |= {"temperature": TEMPERATURE, "positive_cosine": POSITIVE_COSINE}
        facts |= {"cases": cases, "tiled_by_untiled": ratios, "bfloat16": rounding}
        given.json.write_text(json.dumps(facts, indent=2) + "\n")


def show(given: argparse.Namespace, cases: dict[str, Result], ratios: Result, rounding: list[Result]) -> None:
    heads = ("inputs MiB", "peak MiB", "CPU s", "wall s", "GFLOP/s", "loss", "|gradient|")
    keys = ("inputs_mib", "peak_mib", "cpu_s", "wall_s", "gflops", "loss", "gradient_norm")
    digits = (0, 0, 1, 1, 1, 5, 6)
    print(f"loss with gradient, float32, one thread, t = {TEMPERATURE}, max_logits = {given.max_logits:,}")
    print(f"{'':18}{'rows x columns x d':>24}" + "".join(f"{head:>12}" for head in heads))
    for name, case in cases.items():
        shape = f"{case['rows']:,} x {case['columns']:,} x {case['dimension']:,}"
        print(f"{name:18}{shape:>24}" + "".join(f"{case[key]:>12.{n}f}" for key, n in zip(keys, digits, strict=True)))
    print(f"{'tiled / untiled':42}" + "".join(f"{ratios[key]:>12.4f}" if key in ratios else " " * 12 for key in keys))
    print(f"embeddings rounded to bfloat16 against float32, {given.exchange_rows:,} x {given.exchange_rows:,}")
    print(f"{'t':>6}{'loss':>10}" + "".join(f"{head:>24}" for head in ("error of loss", *ERRORS.values())))
    for line in rounding:
        errors = "".join(f"{line[key]:>24.{n}}" for key, n in zip(ERRORS, ("1e", "6f", "8f"), strict=True))
        print(f"{line['temperature']:>6.2f}{line['loss']:>10.5f}{line['loss_relative_error']:>24.1e}{errors}")


if __name__ == "__main__":
    main()

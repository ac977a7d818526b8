"""Published training times, and what our formulas say of the same runs. Used by tests and benchmarks/plan.py.

Models of 7B and more, on GPUs of our table, weights resident. Left out: GPUs that aren't in it (A5000, 3090, RTX 6000 Ada), and
rows that imply more than 85 % of the GPU's peak rate (torchtune's LoRA on 4090 and A6000).
"""

from dataclasses import dataclass

from hybrid_scale.planning.architecture import KNOWN, Architecture
from hybrid_scale.planning.hardware import Cluster, find_gpu
from hybrid_scale.planning.speed import Calibration, Work, attention_flops, step_flops, step_seconds
from tests.planning.published_peaks import ANSWER, LENGTHS, QWEN, QWEN_7B, QWEN_14B, QWEN_72B, TUNE


@dataclass(frozen=True)
class Timing:
    """One published training speed."""

    title: str
    model: Architecture
    gpu: str
    measured: float
    """Seconds for `micro_batches` micro-batches on each GPU."""
    source: str
    tokens: int
    """Of a micro-batch."""
    micro_batches: float
    length: int
    world: int = 1
    sharded: bool = False
    quantised: bool = False
    rank: int = 64

    @property
    def cluster(self) -> Cluster:
        return Cluster(find_gpu(self.gpu), 1, self.world)


def predicted_seconds(row: Timing, calibration: Calibration) -> float:
    """Seconds, by the functions that plan our own runs. The head multiplies too; each micro-batch gathers weights twice."""
    a = row.model
    linear = a.linear + a.embedding
    attention = attention_flops(a, row.length, causal=True)
    tokens = row.tokens * row.micro_batches
    weights = a.linear * (0.5 if row.quantised else 2) + 2 * (a.total - a.linear)
    work = Work(
        flops=step_flops(linear, a.lora(row.rank), attention, tokens),
        dequantised=3 * row.micro_batches * a.linear if row.quantised else 0,
        gathered=2 * row.micro_batches * weights if row.sharded else 0,
        group=row.world if row.sharded else 1,
    )
    return step_seconds(work, row.cluster, calibration).total


SAMPLES = 1024
"""Texts of 2048 tokens in answer.ai's runs."""


def _answer(model: str, gpu: str, world: int, batch: int, seconds: float, sharded: bool = True, quantised: bool = True) -> Timing:
    kind = f"{'QLoRA' if quantised else 'LoRA'} {'FSDP' if sharded else 'DDP'}"
    title = f"{model} {kind}, {world} x {gpu}, {batch} x 2048"
    steps = SAMPLES / world / batch
    return Timing(title, KNOWN[model], gpu, seconds, ANSWER, batch * 2048, steps, 2048, world, sharded, quantised)


TIMINGS = (
    *(
        Timing(f"{a.name} LoRA, A100-80, 1 x {n}", a, "a100-80", s, QWEN, n, 8, n)
        for a, seconds in ((QWEN_7B, (1.2, 1.5, 2.8, 5.2, 10.1, 21.3)), (QWEN_14B, (1.6, 2.4, 4.4, 8.4, 17.0, 36.0)))
        for n, s in zip(LENGTHS, seconds, strict=True)
    ),
    *(
        Timing(f"Qwen-72B LoRA ZeRO-3, 4 x A100-80, 1 x {n}", QWEN_72B, "a100-80", s, QWEN, n, 8, n, 4, True)
        for n, s in zip(LENGTHS, (17.6, 20.5, 29.4, 45.7, 83.4, 161.5), strict=True)
    ),
    _answer("llama-2-70b", "a100-40", 2, 1, 3277),
    _answer("llama-2-70b", "a100-40", 4, 4, 1266),
    _answer("llama-2-70b", "a100-40", 8, 4, 672),
    _answer("llama-2-70b", "h100", 4, 8, 667),
    _answer("llama-2-7b", "4090", 2, 4, 437, sharded=False, quantised=False),
    _answer("llama-2-7b", "4090", 2, 6, 481, quantised=False),
    _answer("llama-2-7b", "4090", 2, 8, 450, sharded=False),
    _answer("llama-2-7b", "4090", 2, 10, 466),
    Timing(
        *("llama-3.1-70b LoRA FSDP2, 8 x a100-80, 2 x 2048", KNOWN["llama-3.1-70b"], "a100-80", 8 * 4096 / 3497, TUNE),
        *(4096, 1, 2048, 8, True, False, 16),
    ),
    Timing(
        *("llama-3.1-8b QLoRA, 4090, 2 x 2048", KNOWN["llama-3.1-8b"], "4090", 4096 / 2413, TUNE),
        *(4096, 1, 2048, 1, False, True, 8),
    ),
)
FIRST_HALF, SECOND_HALF = TIMINGS[0::2], TIMINGS[1::2]
"""Every other row, in the order of the sources' tables."""


def calibrate(rows: tuple[Timing, ...]) -> Calibration:
    """The utilisations and the link's share (to .005 and .02) with the least mean error; ties by the median."""
    found: dict[str, float] = {}
    link = 0.4
    for _ in range(3):
        for generation in sorted({row.cluster.gpu.generation for row in rows}):
            own = tuple(row for row in rows if row.cluster.gpu.generation == generation)
            options = [Calibration({**found, generation: step / 200}, link=link) for step in range(40, 190)]
            found[generation] = min(options, key=lambda c: _error(own, c)).utilisation[generation]
        links = [Calibration(found, link=step / 50) for step in range(5, 51)]
        sharded = tuple(row for row in rows if row.sharded)
        link = min(links, key=lambda c: _error(sharded, c)).link
    return Calibration(found, link=link)


def relative_error(row: Timing, calibration: Calibration) -> float:
    return predicted_seconds(row, calibration) / row.measured - 1


def _error(rows: tuple[Timing, ...], calibration: Calibration) -> tuple[float, float]:
    errors = sorted(abs(relative_error(row, calibration)) for row in rows)
    return sum(errors) / len(errors), errors[len(errors) // 2]

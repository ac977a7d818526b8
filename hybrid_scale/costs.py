"""Formulas: bytes of weights, adapters and optimiser states. No torch; parameter counts come in from outside.

Sources: QLoRA (2305.14314) for the 4-bit layout; ZeRO (1910.02054) for what is shared out.
"""

from dataclasses import dataclass

NF4_BYTES = 0.5
NF4_STATE_BYTES = 1 / 64 + 4 / (64 * 256)
"""Quantisation state of a 4-bit weight, double quantisation: one byte a block of 64, one float32 a 256 blocks.
bitsandbytes keeps it whole on every rank, ZeRO-3 doesn't share it out."""
ADAM_BYTES = 4 + 4
"""First and second moment of a trained weight, float32."""
GRADIENT_BYTES = 4
MASTER_BYTES = 4


@dataclass(frozen=True)
class ParameterCounts:
    """Weights of a model: those stored in 4 bits, those frozen in full, those trained (float32)."""

    quantised: int
    frozen: int
    trained: int

    @property
    def total(self) -> int:
        return self.quantised + self.frozen + self.trained


def static_bytes(counts: ParameterCounts, dtype_bytes: int, world: int, zero_stage: int) -> dict[str, float]:
    """Bytes on one rank before any activation, by line. `world` ranks share what their ZeRO stage shares (0: none)."""
    weights = world if zero_stage == 3 else 1
    gradients = world if zero_stage >= 2 else 1
    states = world if zero_stage >= 1 else 1
    return {
        "4-bit weights": counts.quantised * NF4_BYTES / weights,
        "quantisation state (replicated)": counts.quantised * NF4_STATE_BYTES,
        "frozen weights": counts.frozen * dtype_bytes / weights,
        "trained weights": counts.trained * MASTER_BYTES * (1 / weights + (1 / states if zero_stage else 0)),
        "gradients": counts.trained * GRADIENT_BYTES / gradients,
        "Adam moments": counts.trained * ADAM_BYTES / states,
    }

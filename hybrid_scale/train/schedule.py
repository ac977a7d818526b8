"""Learning rate as a function of the step."""

import math

from hybrid_scale.config import OptimizerSettings


def learning_rate(step: int, settings: OptimizerSettings, max_steps: int) -> float:
    """Rate of optimiser step `step` (0-based): linear warm-up, then the schedule, which ends at 0 after `max_steps`."""
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    done = (step - settings.warmup_steps) / max(1, max_steps - settings.warmup_steps)
    factor = {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1.0 + math.cos(math.pi * done))}
    return settings.learning_rate * factor[settings.schedule]

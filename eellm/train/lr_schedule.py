"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math

from eellm.config.schema import LrScheduleConfig


def learning_rate(config: LrScheduleConfig, peak: float, step: int, max_steps: int) -> float:
    """Rate of the optimizer step `step` (0-based): linear warm-up from 0 to `peak`, then the decay down to `min_ratio` of it."""
    if step < config.warmup_steps:
        return peak * (step + 1) / config.warmup_steps
    lowest = peak * config.min_ratio
    if config.kind == "constant":
        return peak
    if config.kind == "inverse_sqrt":
        warmup = max(1, config.warmup_steps)
        return max(lowest, peak * math.sqrt(warmup / (step + 1)))
    decay_steps = config.decay_steps or max_steps
    progress = min(1.0, (step - config.warmup_steps) / max(1, decay_steps - config.warmup_steps))
    share = (1 + math.cos(math.pi * progress)) / 2 if config.kind == "cosine" else 1 - progress
    return lowest + share * (peak - lowest)

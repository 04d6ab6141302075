"""Weights of the exit losses as pure functions of the step: nothing to save, nothing to get wrong on resume."""

from __future__ import annotations

import math

from eellm.config.schema import LossWeightsConfig
from eellm.model.spec import per_exit


def exit_weights(config: LossWeightsConfig, step: int, num_exits: int) -> list[float]:
    """Weights of the exits, shallow to deep, for the optimizer step `step` (0-based).

    `warmup` and `cooldown` go from `initial` to `values` in `steps` steps, linearly or along half a cosine (EE-LLM's
    schedule, arXiv 2312.04916 section 3.1.3); `rotating` gives one exit its value for `steps` steps at a time
    (LayerSkip's rotational curriculum, arXiv 2404.16710); `token_confidence` scales the values per token in the loss.
    """
    values = per_exit(config.values, num_exits)
    if config.kind == "rotating" and num_exits:
        turn = step // max(1, config.steps) % num_exits
        return [value if index == turn else 0.0 for index, value in enumerate(values)]
    if config.kind in ("warmup", "cooldown") and step < config.steps:
        progress = step / config.steps
        share = progress if config.shape == "linear" else (1 - math.cos(math.pi * progress)) / 2
        initial = per_exit(config.initial, num_exits)
        return [start + share * (target - start) for start, target in zip(initial, values, strict=True)]
    return values

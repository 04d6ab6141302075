"""Is there memory for the keys and values that decoding was asked to keep?"""

from __future__ import annotations

import torch

from eellm.decoding.model.segments import InferenceModel
from eellm.errors import ConfigError, Problem


def free_bytes(device: torch.device) -> int:
    """Memory that an allocation on the device may take; what torch keeps for reuse counts as free."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    import psutil

    return psutil.virtual_memory().available


def check_fits(model: InferenceModel, max_tokens: int, sequences: int) -> None:
    """Raises ConfigError where the cache of `sequences` of `max_tokens` each is larger than what is free on this rank."""
    needed = len(model.cached_layers) * model.cache_shape(max_tokens, sequences).layer_bytes
    free = free_bytes(torch.device(model.device))
    if needed <= free:
        return
    size = f"{sequences} sequences of {max_tokens} tokens" if sequences > 1 else f"{max_tokens} tokens"
    reason = f"keys and values of {size} need {needed / 1e6:.0f} MB a rank, {free / 1e6:.0f} MB are free"
    fitting = int(sequences * free / needed)
    if fitting:
        raise ConfigError([Problem("decoding.max_batch", sequences, reason, f"decoding.max_batch={fitting} or less")])
    fewer = int(max_tokens * sequences * free / needed)
    fix = f"decoding.max_batch=1 with at most {fewer} tokens, prompt included: shorter prompts or decoding.max_new_tokens"
    raise ConfigError([Problem("decoding.max_tokens", max_tokens, reason, fix)])

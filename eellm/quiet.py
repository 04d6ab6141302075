"""Silences what the libraries below us say about things that are decided here; their errors and our own words remain."""

from __future__ import annotations

import logging
import warnings

_LOGGERS = {"megatron": logging.WARNING, "lightning.pytorch": logging.ERROR, "lightning.fabric": logging.ERROR}
_LOGGERS |= {"lm_eval": logging.ERROR, "huggingface_hub": logging.ERROR}

_WARNINGS = (
    r".*Transformer Engine and Apex are not installed.*",
    r".*Apex is not installed.*",
    r".*full scope is deprecated.*",  # mcore's own default for CUDA graphs
    r".*`load_state_dict` is deprecated.*",  # mcore's use of torch.distributed.checkpoint
    r".*torch.distributed is disabled, unavailable or uninitialized.*",  # a checkpoint read or written by one process
    r".*torch.jit.script.*is deprecated.*",
    r".*imports from `dynamic_context.py`.*",
    r".*TypedStorage is deprecated.*",
)


def quiet_dependencies() -> None:
    """Call before megatron-core and Lightning are used; importing them is what most of the warnings come from."""
    for name, level in _LOGGERS.items():
        logging.getLogger(name).setLevel(level)
    for message in _WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    warnings.filterwarnings("ignore", module="lightning")

"""Rules on optimizer and learning rate."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from eellm.config.schema import LrScheduleConfig, OptimizerConfig
from eellm.errors import Problem

Problems = Iterator[Problem]


def optimizer_options_fit(optimizer: OptimizerConfig) -> Problems:
    if optimizer.distributed and optimizer.name == "sgd":
        yield Problem("optimizer.distributed", True, "only adam's states can be split", "optimizer=adam_distributed")
    gather = "optimizer.overlap_param_gather"
    if optimizer.overlap_param_gather and not optimizer.distributed:
        yield Problem(gather, True, "there is nothing to gather unless states are split", "optimizer.distributed=true")
    if optimizer.overlap_param_gather and not optimizer.overlap_grad_reduce:
        yield Problem(gather, True, "needs overlapped reduction too", "optimizer.overlap_grad_reduce=true")


def warmup_ends_before_the_decay(lr_schedule: LrScheduleConfig) -> Problems:
    warmup, decay = lr_schedule.warmup_steps, lr_schedule.decay_steps
    if decay is not None and warmup >= decay:
        reason = f"the decay ends before the warm-up does (lr_schedule.decay_steps={decay})"
        yield Problem("lr_schedule.warmup_steps", warmup, reason, f"choose less than {decay}")


RULES: list[Callable[..., Problems]] = [
    optimizer_options_fit,
    warmup_ends_before_the_decay,
]

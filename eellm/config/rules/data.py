"""Rules on the text that is read and how it is split."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from eellm.config.schema import DataConfig, TaskConfig, TrainerConfig
from eellm.errors import Problem

Problems = Iterator[Problem]


def corpus_can_be_read(data: DataConfig) -> Problems:
    if data.source == "stdlib":
        return
    if data.path is None:
        yield Problem("data.path", None, f"data.source={data.source} reads a file or folder", "data.path=<file or folder>")
    elif not Path(data.path).expanduser().exists():
        yield Problem("data.path", data.path, "there is no such file or folder", "give the path of a file or folder")


def split_has_both_parts(data: DataConfig, trainer: TrainerConfig, task: TaskConfig) -> Problems:
    fix = "data.split=[0.95,0.05]"
    if len(data.split) != 2:
        yield Problem("data.split", data.split, "not two shares: training and validation", fix)
    elif data.split[0] <= 0 and task.name != "evaluate":
        yield Problem("data.split", data.split, "nothing is left to train on", fix)
    elif data.split[1] <= 0 and (task.name != "train" or trainer.val_every):
        yield Problem("data.split", data.split, "nothing is held out for validation", f"{fix}, or trainer.val_every=0")


def ramp_up_reaches_the_batch_size(data: DataConfig) -> Problems:
    ramp, final = data.ramp_up, data.global_batch_size
    if ramp is None:
        return
    if ramp.start >= final:
        reason = f"not below data.global_batch_size={final}, which the ramp leads up to"
        yield Problem("data.ramp_up.start", ramp.start, reason, "choose less, or data.ramp_up=null")
    elif (final - ramp.start) % ramp.increment:
        reason = f"does not lead from {ramp.start} to data.global_batch_size={final} in whole increments"
        yield Problem("data.ramp_up.increment", ramp.increment, reason, f"choose a divisor of {final - ramp.start}")


RULES: list[Callable[..., Problems]] = [corpus_can_be_read, split_has_both_parts, ramp_up_reaches_the_batch_size]

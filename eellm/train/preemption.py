"""A run that is asked to end writes a checkpoint at the end of its step, and then ends."""

from __future__ import annotations

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector

from eellm.preemption import Preempted, requested
from eellm.train.after_step import AfterStep
from eellm.train.checkpoints import Checkpoints


class Preemption(AfterStep):
    """Raises Preempted, on all ranks, once a checkpoint of the steps taken so far is whole."""

    def __init__(self, checkpoints: Checkpoints):
        self._checkpoints = checkpoints

    def after_step(self, trainer: Trainer) -> None:
        number = agreed_request(trainer.strategy.root_device)
        if number:
            self._checkpoints.save(trainer, wait=True)
            raise Preempted(number)


def raise_where_requested(device: torch.device) -> None:
    """Raise Preempted on all ranks where any of them has been asked to end."""
    number = agreed_request(device)
    if number:
        raise Preempted(number)


def agreed_request(device: torch.device) -> int:
    """The signal that any rank has received, the same on all ranks; 0 = none. Launchers may tell only some of them."""
    number = torch.tensor([requested()], device=device)
    if dist.get_world_size() > 1:
        dist.all_reduce(number, op=dist.ReduceOp.MAX)
    return int(number)


class NoSignalHandlers(_SignalConnector):
    """Lightning's own handler of SIGTERM broadcasts while the step's collectives are under way; eellm.preemption's stays."""

    def register_signal_handlers(self) -> None:
        self.received_sigterm = False

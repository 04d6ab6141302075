"""Times of work that a device does on its own: a clock says nothing before the device has come to the end."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


def wait_for(device: torch.device) -> None:
    """Return when the device has done all it was given; on the CPU that is so."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_on(device: torch.device, clock: Callable[[], float] = time.perf_counter) -> float:
    """What the clock says when the device has done all it was given."""
    wait_for(device)
    return clock()

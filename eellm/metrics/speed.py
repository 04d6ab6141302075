"""Tokens per second, FLOP/s, step time and peak memory of the process that asks."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from eellm.metrics.names import STEP_TIME, TFLOPS, TOKENS_PER_SECOND

GB = 1e9


class Speedometer:
    """Times laps of optimizer steps, without what happens inside `paused`.

    `flops_per_token` comes from `eellm.metrics.flops`, `synchronise` waits for the device, so that queued work is not
    left out.
    """

    def __init__(
        self,
        flops_per_token: float,
        world_size: int,
        synchronise: Callable[[], object] = lambda: None,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self._flops_per_token = flops_per_token
        self._world_size = world_size
        self._synchronise = synchronise
        self._clock = clock
        self._start = clock()
        self._paused = False
        self._steps = self._tokens = 0

    def restart(self) -> None:
        """Begin a lap here."""
        self._synchronise()
        self._start = self._clock()
        self._steps = self._tokens = 0

    def step(self, tokens: int) -> None:
        """Count an optimizer step; `tokens` are those of all processes."""
        self._steps += 1
        self._tokens += tokens

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave validation, checkpoints and the like out of the lap; a pause within a pause counts once."""
        if self._paused:
            yield
            return
        self._synchronise()
        self._paused, began = True, self._clock()
        try:
            yield
        finally:
            self._synchronise()
            self._paused = False
            self._start += self._clock() - began

    def lap(self) -> dict[str, float]:
        """Metrics of the optimizer steps since the last lap, at least one; begins the next lap."""
        begin, steps, tokens = self._start, self._steps, self._tokens
        self.restart()
        seconds = max(self._start - begin, 1e-9)
        tokens_per_second = tokens / seconds
        return {
            STEP_TIME: seconds / steps,
            TOKENS_PER_SECOND: tokens_per_second,
            TFLOPS: tokens_per_second * self._flops_per_token / self._world_size / 1e12,
        }


def peak_memory_gb(device: str) -> float:
    """Peak memory in 10^9 bytes: torch's CUDA allocations on `cuda`, else the resident set of the process."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.max_memory_allocated() / GB
    return peak_resident_bytes() / GB


def peak_resident_bytes() -> int:
    """Largest resident set that this process has had."""
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset
    # getrusage would do on Linux too, but there a child starts with its parent's peak, even across exec.
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

"""What the sections of the GPU script share: how much to do, times, tables."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Scale:
    """How much to do: `layers` and `width` of the model, tokens to decode, tokens of whole sequences, repetitions."""

    layers: int
    width: int
    tokens: int
    sequence: int
    repeats: int


SCALES = {"cuda": Scale(24, 1024, 128, 4096, 5), "cpu": Scale(4, 64, 8, 64, 2)}


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row in (header, *rows):
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def seconds(device: torch.device, work: Callable[[], object], repeats: int) -> float:
    """Median over repetitions, after one that warms up."""
    times = []
    for _ in range(repeats + 1):
        started = now(device)
        work()
        times.append(now(device) - started)
    return statistics.median(times[1:])

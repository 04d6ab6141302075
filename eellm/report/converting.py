"""What task=convert says: what it reads and writes, and what became of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from eellm.model.spec import ModelSpec, parameters

Shown = Callable[[ModelSpec], None]


@contextmanager
def shown_conversion(source: str, target: Path, format_: str) -> Iterator[Shown]:
    """Call what is given with the model, once it is done."""
    console, started = Console(highlight=False, markup=False), time.monotonic()

    def done(spec: ModelSpec) -> None:
        size = f"{parameters(spec) / 1e6:,.1f}M weights, {spec.num_layers} layers"
        exits = f", {', '.join(exit_.name for exit_ in spec.exits)}" if spec.exits else ""
        say = f"{target}: {size}{exits}, in {time.monotonic() - started:.1f} s"
        console.print(say, soft_wrap=True)
        if format_ == "eellm":
            console.print(f"use it as checkpoint={target}", soft_wrap=True)

    console.print(f"converting {source}", soft_wrap=True)
    yield done

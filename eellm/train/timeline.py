"""Records when the actions of a run's last step happened on every rank; `debug.timeline=true`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch.distributed as dist
from lightning.pytorch import Callback, Trainer

from eellm.data.cache import write_atomically
from eellm.engine.executor import ProgramEngine


class TimelineRecorder(Callback):
    """Writes `path`: of each pipeline rank of the first replica, [action, begin, end, parts] in seconds of the machine's clock;
    parts are [name, seconds]."""

    def __init__(self, path: Path):
        self._path = path
        self._events: list[tuple[str, float, float, tuple[tuple[str, float], ...]]] = []

    def on_train_batch_start(self, trainer: Trainer, module: Any, *_: Any) -> None:  # type: ignore[override]
        if trainer.global_step == trainer.max_steps - 1:
            assert isinstance(module.engine, ProgramEngine), "checked with the config"
            module.engine.recorder = lambda done: self._events.append((str(done.action), done.begin, done.end, done.parts))

    def on_train_batch_end(self, trainer: Trainer, module: Any, *_: Any) -> None:  # type: ignore[override]
        if not isinstance(module.engine, ProgramEngine) or module.engine.recorder is None:
            return
        module.engine.recorder = None
        layout = module.groups.layout
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, self._events)
        if module.groups.is_main:
            ranks = [gathered[layout.rank(0, 0, pp_rank)] for pp_rank in range(layout.pp)]
            write_atomically(self._path, json.dumps({"microbatches": layout.num_microbatches, "ranks": ranks}) + "\n")

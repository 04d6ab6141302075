"""When checkpoints are written, and how many are kept."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Checkpoint

from eellm.config.schema import TrainerConfig
from eellm.mcore.checkpoint_writer import CheckpointWriter
from eellm.rundir import step_name, step_of, steps_in
from eellm.train.after_step import AfterStep
from eellm.train.module import EarlyExitModule


class Checkpoints(AfterStep, Checkpoint):
    """Every `checkpoint_every` steps and at the end. All ranks take part in every call."""

    def __init__(self, folder: Path, options: TrainerConfig):
        self._folder, self._every = folder, options.checkpoint_every
        self._saved: int | None = None
        self.writer = CheckpointWriter(options.checkpoint_async, lambda path: keep_newest(path, options.keep_checkpoints))

    def save(self, trainer: Trainer, wait: bool = False) -> None:
        """A checkpoint of the steps taken so far, unless there is one already; `wait` until it has its name."""
        step = trainer.global_step
        module = trainer.lightning_module
        assert isinstance(module, EarlyExitModule)
        with module.speed.paused():
            if step != self._saved:
                trainer.save_checkpoint(self._folder / step_name(step))
                self._saved = step
            self.writer.finish(wait)

    def on_train_start(self, trainer: Trainer, module: Any) -> None:
        if trainer.global_step > 0:  # what it was resumed from
            self._saved = trainer.global_step

    def after_step(self, trainer: Trainer) -> None:
        self.writer.finish(wait=False)
        if self._every and trainer.global_step % self._every == 0:
            self.save(trainer)

    def on_train_end(self, trainer: Trainer, module: Any) -> None:
        self.save(trainer, wait=True)


def keep_newest(newest: Path, count: int) -> None:
    """Remove what is more than `count` checkpoints beside `newest`, now that it is whole.

    A run resumed from an earlier step leaves checkpoints of a future that will not be; they go too.
    """
    steps = steps_in(newest.parent)
    future = [path for path in steps if step_of(path) > step_of(newest)]
    past = [path for path in steps if path not in future]
    for path in [*future, *past[:-count]]:
        shutil.rmtree(path)

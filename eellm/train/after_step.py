"""The moment between two steps, for callbacks."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, Trainer


class AfterStep(Callback):
    """Calls `after_step` once a step is over, and with it the validation that follows it, if one does.

    A checkpoint written then never stands for a step whose validation is still to come, and would be lost on resuming.
    """

    def after_step(self, trainer: Trainer) -> None:
        raise NotImplementedError

    def on_train_batch_end(self, trainer: Trainer, module: Any, *_: Any) -> None:  # type: ignore[override]
        if not validation_follows(trainer):
            self.after_step(trainer)

    def on_validation_end(self, trainer: Trainer, module: Any) -> None:
        self.after_step(trainer)


def validation_follows(trainer: Trainer) -> bool:
    every = trainer.val_check_interval
    return bool(trainer.limit_val_batches) and bool(every) and trainer.global_step % int(every) == 0

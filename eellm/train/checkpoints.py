"""When checkpoints are written and how many are kept."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from eellm.config.schema import TrainerConfig
from eellm.train.module import EarlyExitModule


def checkpoint_name(step: int) -> str:
    return f"step_{step:07d}"


class Checkpoints(ModelCheckpoint):
    """Every `checkpoint_every` steps and at the end, the newest `keep_checkpoints` of them."""

    FILE_EXTENSION = ""

    def __init__(self, folder: Path, trainer: TrainerConfig):
        super().__init__(
            dirpath=folder,
            filename="step_{step:07d}",
            auto_insert_metric_name=False,
            monitor="step",
            mode="max",
            save_top_k=trainer.keep_checkpoints,
            every_n_train_steps=trainer.checkpoint_every or trainer.max_steps,
            enable_version_counter=False,
        )
        self.folder, self.keep = folder, trainer.keep_checkpoints

    def on_train_end(self, trainer: Trainer, module: EarlyExitModule) -> None:  # type: ignore[override]
        super().on_train_end(trainer, module)
        last = self.folder / checkpoint_name(trainer.global_step)
        if not last.exists():
            trainer.save_checkpoint(last)
            for stale in sorted(self.folder.glob("step_*"))[: -self.keep]:
                trainer.strategy.remove_checkpoint(stale)

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        module = trainer.lightning_module
        assert isinstance(module, EarlyExitModule)
        with module.speed.paused():
            super()._save_checkpoint(trainer, filepath)

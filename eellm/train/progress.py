"""What a training run shows: a bar with the losses of all heads on a terminal, lines elsewhere."""

from __future__ import annotations

import sys
import time

from lightning.pytorch import Callback, Trainer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from eellm.metrics import names
from eellm.train.module import EarlyExitModule


class ProgressDisplay(Callback):
    """`mode` is the config's trainer.progress; only the main rank shows anything."""

    def __init__(self, mode: str, heads: list[str], max_steps: int):
        terminal = sys.stdout.isatty()
        self.mode = ("bar" if terminal else "lines") if mode == "auto" else mode
        self.heads, self.max_steps = heads, max_steps
        self.console = Console(highlight=False)
        self.progress: Progress | None = None
        self.printed, self.started = -1, 0.0

    def on_train_start(self, trainer: Trainer, module: EarlyExitModule) -> None:  # type: ignore[override]
        self.started, self.printed = time.monotonic(), trainer.global_step
        self.first_step = trainer.global_step
        if self.mode == "bar":
            columns = (TextColumn("train"), BarColumn(bar_width=14), MofNCompleteColumn(), TextColumn("{task.description}"))
            self.progress = Progress(*columns, TimeRemainingColumn(compact=True), console=self.console)
            self.task = self.progress.add_task("", total=self.max_steps, completed=trainer.global_step)
            self.progress.start()

    def on_train_batch_end(self, trainer: Trainer, module: EarlyExitModule, *_: object) -> None:  # type: ignore[override]
        if self.progress is not None:
            self.progress.update(self.task, completed=trainer.global_step, description=self._losses(module))
        due = max(1, self.max_steps // 20)
        if self.mode == "lines" and (trainer.global_step - self.printed >= due or trainer.global_step == self.max_steps):
            self.printed = trainer.global_step
            step = f"{trainer.global_step:>{len(str(self.max_steps))}}/{self.max_steps}"
            self.console.print(f"step {step}  {self._line(trainer, module)}", soft_wrap=True)

    def _losses(self, module: EarlyExitModule) -> str:
        """Loss of every head, shallow to deep: `02 5.31  04 5.12  final 5.02`."""
        shown = [(head.removeprefix("exit_"), module.latest.get(names.train_loss(head))) for head in self.heads]
        return "  ".join(f"{name} {loss:.3f}" for name, loss in shown if loss is not None)

    def _line(self, trainer: Trainer, module: EarlyExitModule) -> str:
        validation = module.latest.get(names.val_loss(names.FINAL))
        held_out = "" if validation is None else f"  held out {validation:.3f}"
        speed = module.latest.get(names.TOKENS_PER_SECOND, 0.0)
        done = trainer.global_step - self.first_step
        left = (time.monotonic() - self.started) / max(1, done) * (self.max_steps - trainer.global_step)
        return f"loss {self._losses(module)}{held_out}  {speed:,.0f} tokens/s  {left:.0f} s left"

    def on_exception(self, trainer: Trainer, module: EarlyExitModule, exception: BaseException) -> None:  # type: ignore[override]
        self.on_train_end(trainer, module)

    def on_train_end(self, trainer: Trainer, module: EarlyExitModule) -> None:  # type: ignore[override]
        if self.progress is not None:
            self.progress.stop()
            self.progress = None

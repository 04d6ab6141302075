"""`task=generate` with a stage that fails while the pipeline decodes; `logger.wandb.project` says how and on which rank."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

from eellm.decoding.pipeline.messages import Kind, Message
from eellm.decoding.pipeline.stage import PipelineStage
from eellm.tasks import generate
from eellm.tasks.context import TaskContext

STEPS = 5
"""Messages after the prompts' one that pass before the stage fails."""


def run(context: TaskContext) -> dict[str, float]:
    how, _, rank = context.config.logger.wandb.project.partition("_on_")
    fails = int(os.environ["RANK"]) == int(rank)
    with mock.patch.object(PipelineStage, "take", failing(how, context.run_dir / "failing")) if fails else nullcontext():
        return generate.run(context)


def failing(how: str, moment: Path) -> Callable[..., Any]:
    """`PipelineStage.take` that ends badly after some steps, and leaves a file when it does."""
    take, taken = PipelineStage.take, []

    def take_or_fail(stage: PipelineStage, message: Message, *queues: Any) -> Any:
        taken.append(message.kind)
        if taken.count(Kind.step) > STEPS:
            moment.touch()
            if how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise KeyError("a bug")
        return take(stage, message, *queues)

    return take_or_fail

"""Runs on a spawned rank: a small model trained on real text, in a run directory as the command line leaves it."""

from __future__ import annotations

from pathlib import Path

import torch

from eellm.config.compose import compose, to_yaml
from eellm.config.fingerprint import weights_fingerprint
from eellm.metrics.recorder import Recorder
from eellm.quiet import quiet_dependencies
from eellm.rundir import RunDirectory
from eellm.tasks import train
from eellm.tasks.before_ranks import prepare
from eellm.tasks.context import TaskContext
from tests.train.fitting import BASE

TRAINING = [
    "data.split=[0.5,0.5]",
    "data.micro_batch_size=64",
    "data.global_batch_size=64",
    "trainer.max_steps=90",
    "trainer.val_every=0",
]
TRAINING += ["trainer.checkpoint_every=0", "optimizer.lr=0.01", "loss_weights.values=0.02"]
LARGER_BATCHES = ["data.micro_batch_size=32", "data.global_batch_size=64"]
"""For passes over the text that was held out."""


def train_run(rank: int, folder: str) -> str:
    """The run directory; it has one checkpoint, the last, and half of the text is held out."""
    quiet_dependencies()
    config = compose([*BASE, *TRAINING, f"data.cache_dir={Path(folder) / 'cache'}"])
    run = RunDirectory.create(Path(folder) / "trained", to_yaml(config), [], weights_fingerprint(config))
    context = TaskContext(config, run.path)
    prepare(context)
    train.train(context, Recorder([]), torch.device("cpu"))
    return str(run.path)

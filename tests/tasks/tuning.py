"""Runs on forked ranks: tasks that train and tune, in a run directory of their own, without the command line around them."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist

from eellm.config.compose import to_yaml
from eellm.config.fingerprint import weights_fingerprint
from eellm.mcore.groups import init_groups
from eellm.metrics.recorder import Recorder, open_recorder
from eellm.model.spec import build_layout, tied_stages
from eellm.quiet import quiet_dependencies
from eellm.rundir import RunDirectory
from eellm.tasks import train, tune
from eellm.tasks.before_ranks import prepare
from eellm.tasks.context import TaskContext
from eellm.train.fit import fit
from tests.train.fitting import BASE, MODULES
from tests.workers import composed

TEXT = [
    *("data=text", f"data.path={MODULES}", "data.pattern=**/*.py", "data.split=[0.8,0.2]"),
    *("data.sequence_length=32", "data.micro_batch_size=2", "data.global_batch_size=8"),
]
TUNING = [
    *("task=tune", *TEXT, "evaluation.batches=2", "optimizer.lr=1e-2", "lr_schedule.warmup_steps=2"),
    *("trainer.max_steps=6", "trainer.val_every=3", "trainer.val_batches=2", "trainer.log_every=1", "trainer.checkpoint_every=4"),
    *("trainer.keep_checkpoints=2", "trainer.progress=none"),
]


def run_task(rank: int, overrides: list[str], run_dir: str) -> dict[str, float]:
    """One run of task=train or task=tune; returns its final metrics."""
    context, recorder = opened(rank, overrides, run_dir)
    work = tune.tune if context.config.task.name == "tune" else train.train
    return work(context, recorder, torch.device("cpu"))


def parameters_built(rank: int, overrides: list[str], run_dir: str) -> list[str]:
    """Names of what a run of task=tune builds on a rank, and has tuned."""
    context, recorder = opened(rank, overrides, run_dir)
    job = tune.tuning_job(context, tune.checkpoint_folder(context.config))
    layout = build_layout(context.config)
    groups = init_groups(layout, torch.device("cpu"), tied_stages(job.spec, job.plan))
    return [name for stage in fit(job, groups, recorder).chunks.stages for name, _ in stage.named_parameters()]


def opened(rank: int, overrides: list[str], run_dir: str) -> tuple[TaskContext, Recorder]:
    quiet_dependencies()
    config = composed([*overrides, f"data.cache_dir={Path(run_dir).parent / 'cache'}"])
    config = config.model_copy(update={"parallel": config.parallel.model_copy(update={"dp": config.parallel.dp or 1})})
    context = TaskContext(config, Path(run_dir))
    if rank == 0:
        if config.resume is None:
            RunDirectory.create(Path(run_dir), to_yaml(config), overrides, weights_fingerprint(config))
        prepare(context)
    dist.barrier()
    return context, open_recorder(config, Path(run_dir), rank == 0, train.resume_step(context))


def source_run(rank: int, run_dir: str) -> dict[str, float]:
    """A model of 4 layers with exits after 1 (own norm), 2 (MLP) and 3 (own matrix), trained for a few steps."""
    exits = ["exits.head=[norm,mlp,norm]", "trainer.max_steps=20", "trainer.val_every=0", "trainer.checkpoint_every=0"]
    return run_task(rank, [*BASE, *exits], run_dir)

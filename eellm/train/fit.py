"""Training on the ranks that are here: module, strategy, callbacks, Lightning's trainer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.profilers import PyTorchProfiler
from rich.console import Console

from eellm.config.schema import Config
from eellm.data.corpus import Corpus
from eellm.mcore.groups import Groups
from eellm.metrics.recorder import Recorder
from eellm.model.spec import ModelSpec, StageSpec
from eellm.preemption import deferred
from eellm.quiet import quiet_dependencies
from eellm.rundir import RunDirectory
from eellm.train.checkpoints import Checkpoints
from eellm.train.module import EarlyExitModule
from eellm.train.preemption import NoSignalHandlers, Preemption, raise_where_requested
from eellm.train.progress import ProgressDisplay
from eellm.train.strategy import MegatronStrategy
from eellm.train.timeline import TimelineRecorder
from eellm.train.tuning import TuningModule
from eellm.train.warm_start import warm_start


@dataclass(frozen=True)
class TrainingJob:
    """What is trained, and where its results go.

    `resume_from` and `start_from` are checkpoint folders: of the run itself, to go on with; of another, for its weights.
    With `exits_only` the backbone is frozen, and checkpoints hold what is not.
    """

    config: Config
    spec: ModelSpec
    plan: list[StageSpec]
    corpus: Corpus
    run_dir: Path
    resume_from: Path | None = None
    start_from: Path | None = None
    exits_only: bool = False


def fit(job: TrainingJob, groups: Groups, recorder: Recorder, extra_callbacks: Sequence[Callback] = ()) -> EarlyExitModule:
    """Train to trainer.max_steps; returns the module, whose `latest` holds the last metrics. All ranks call this.

    Raises Preempted, with a checkpoint written, where a signal has asked any of them to end.
    """
    config = job.config
    quiet_dependencies()  # Lightning sets the levels of its loggers when it is imported
    module = (TuningModule if job.exits_only else EarlyExitModule)(config, job.spec, job.plan, groups, job.corpus, recorder)
    if job.start_from is not None:
        others = "left as they are" if job.exits_only else "dropped"
        started = warm_start(job.start_from, module.chunks.stages, module.spec, others)
        module.megatron_optimizer.reload_parameters()
        if groups.is_main:
            Console(highlight=False).print(str(started), soft_wrap=True)
    run = RunDirectory(job.run_dir)
    checkpoints = Checkpoints(run.tuning if job.exits_only else run.checkpoints, config.trainer)
    callbacks = [*extra_callbacks, checkpoints, Preemption(checkpoints)]
    if groups.is_main and config.trainer.progress != "none":
        callbacks.append(ProgressDisplay(config.trainer.progress, job.spec.heads, config.trainer.max_steps))
    if config.debug.timeline:
        callbacks.append(TimelineRecorder(run.timeline))
    trainer = Trainer(
        strategy=MegatronStrategy(groups, checkpoints.writer),
        accelerator="gpu" if groups.device.type == "cuda" else "cpu",
        devices=groups.layout.world_size if groups.device.type == "cpu" else "auto",
        max_steps=config.trainer.max_steps,
        val_check_interval=config.trainer.val_every or None,
        check_val_every_n_epoch=None,
        limit_val_batches=config.trainer.val_batches if config.trainer.val_every else 0,
        num_sanity_val_steps=0,
        callbacks=callbacks,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        inference_mode=False,
        detect_anomaly=config.debug.detect_anomaly,
        profiler=PyTorchProfiler(dirpath=job.run_dir, filename="profile") if config.debug.profile else None,
        default_root_dir=job.run_dir,
    )
    trainer._signal_connector = NoSignalHandlers(trainer)
    with deferred():
        trainer.fit(module, ckpt_path=None if job.resume_from is None else str(job.resume_from), weights_only=False)
        raise_where_requested(groups.device)  # since the last step
    return module

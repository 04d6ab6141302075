"""`task=train`: train a model from scratch or from another run's weights, or continue a run."""

from __future__ import annotations

from pathlib import Path

import torch

from eellm.data.corpus import Corpus
from eellm.metrics.names import STEP, TIME
from eellm.metrics.recorder import Recorder
from eellm.metrics.rows import read_rows, rows_until
from eellm.plan.iteration import chosen_schedule
from eellm.rundir import step_of, whole_checkpoint
from eellm.tasks.context import TaskContext
from eellm.tasks.session import Plan, groups_of, is_main_rank, process_group, recording
from eellm.tasks.source import checkpoint_folder
from eellm.train.fit import TrainingJob, fit


def run(context: TaskContext) -> dict[str, float]:
    with recording(context, resume_step(context)) as (recorder, final):
        with process_group(context.config) as device:
            final |= train(context, recorder, device)
        if context.config.debug.timeline and is_main_rank():
            from eellm.report.gantt_page import draw_recorded

            page, image = draw_recorded(context.run.timeline, chosen_schedule(context.config))
            recorder.html("timeline", page.read_text(encoding="utf-8"))
            recorder.image("timeline", image)
    return final


def resume_checkpoint(context: TaskContext) -> Path | None:
    return None if context.config.resume is None else whole_checkpoint("resume", context.config.resume)[1]


def resume_step(context: TaskContext) -> int | None:
    """Step of the checkpoint that a resumed run begins with."""
    checkpoint = resume_checkpoint(context)
    return None if checkpoint is None else step_of(checkpoint)


def train(context: TaskContext, recorder: Recorder, device: torch.device) -> dict[str, float]:
    """Train on the ranks of the process group; returns the last value of every metric, equal on all ranks."""
    config, corpus = context.config, Corpus.load(context.run.corpus)
    plan = Plan.of(config, corpus.vocab_size)
    resumed = resume_checkpoint(context)
    start = checkpoint_folder(config) if resumed is None and config.checkpoint is not None else None
    job = TrainingJob(config, plan.spec, plan.stages, corpus, context.run_dir, resumed, start)
    with groups_of(plan, device, config.seed) as groups:
        return recorded_before(context) | fit(job, groups, recorder).latest


def recorded_before(context: TaskContext) -> dict[str, float]:
    """The last values that a resumed run has on record: it may have been interrupted when little or nothing was left to do."""
    values: dict[str, float] = {}
    for row in rows_until(read_rows(context.run.metrics), resume_step(context)) if context.config.resume else []:
        values |= row
    return {name: value for name, value in values.items() if name not in (STEP, TIME)}

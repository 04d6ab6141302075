"""`task=tune`: EE-Tuning (arXiv 2402.00518). Exits learn on a frozen model, of which only what lies below the deepest of them is
built; what comes out is the whole model with its exits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from eellm.data.batches import loader, validation_batches
from eellm.data.corpus import Corpus
from eellm.engine.chunks import ChunkOptions, Chunks, build_chunks
from eellm.engine.megatron import MegatronEngine
from eellm.evaluation.exits import EvaluationOptions, evaluate
from eellm.mcore.checkpoint import from_main_rank, load_stages
from eellm.metrics.recorder import Recorder
from eellm.model.objective import ObjectiveOptions
from eellm.rundir import RunDirectory, step_name
from eellm.tasks import train
from eellm.tasks.context import TaskContext
from eellm.tasks.session import Plan, groups_of, is_main_rank, process_group, recording
from eellm.tasks.source import checkpoint_folder
from eellm.train.fit import TrainingJob, fit
from eellm.train.merging import merge_tuned
from eellm.train.warm_start import warm_start


def run(context: TaskContext) -> dict[str, float]:
    with process_group(context.config) as device, recording(context, train.resume_step(context)) as (recorder, final):
        final |= tune(context, recorder, device)
    if is_main_rank():
        from eellm.report.terminal import print_tuning

        print_tuning(context.run_dir)
    return final


def tune(context: TaskContext, recorder: Recorder, device: torch.device) -> dict[str, float]:
    """Tune on the ranks of the process group; returns the last value of every metric, equal on all ranks."""
    config, source = context.config, checkpoint_folder(context.config)
    if config.tuning.evaluate and config.resume is None:
        evaluate_untuned(context, source, recorder, device)
    metrics = tune_exits(context, source, recorder, device)
    merged = context.run.checkpoints / step_name(config.trainer.max_steps)
    from_main_rank(lambda: merge(context.run, source, merged))
    if config.tuning.evaluate:
        metrics |= evaluate_tuned(context, merged, recorder, device)
    return metrics


def tune_exits(context: TaskContext, source: Path, recorder: Recorder, device: torch.device) -> dict[str, float]:
    job = tuning_job(context, source)
    with groups_of(Plan.of_tuning(job.config, job.corpus.vocab_size), device, job.config.seed) as groups:
        return train.recorded_before(context) | fit(job, groups, recorder).latest


def tuning_job(context: TaskContext, source: Path) -> TrainingJob:
    config, corpus = context.config, Corpus.load(context.run.corpus)
    plan, resumed = Plan.of_tuning(config, corpus.vocab_size), train.resume_checkpoint(context)
    return TrainingJob(config, plan.spec, plan.stages, corpus, context.run_dir, resumed, source, exits_only=True)


def merge(run: RunDirectory, source: Path, target: Path) -> None:
    run.note_backbone(merge_tuned(source, run.resumable_steps()[-1], target))


def evaluate_untuned(context: TaskContext, source: Path, recorder: Recorder, device: torch.device) -> None:
    """Every exit before it has learned anything, beside the final head: exits_untuned.csv."""

    def load(chunks: Chunks) -> None:
        warm_start(source, chunks.stages, chunks.spec)

    evaluate_whole(context, "exits_untuned", load, recorder, device)


def evaluate_tuned(context: TaskContext, merged: Path, recorder: Recorder, device: torch.device) -> dict[str, float]:
    """The model that came out, read back: exits.csv and its scalars."""
    return evaluate_whole(context, "exits", lambda chunks: load_stages(merged, chunks.stages), recorder, device)


def evaluate_whole(
    context: TaskContext, table: str, load: Callable[[Chunks], None], recorder: Recorder, device: torch.device
) -> dict[str, float]:
    """Every head of the whole model on held-out text; all ranks together."""
    config, corpus = context.config, Corpus.load(context.run.corpus)
    plan = Plan.around_tuning(config, corpus.vocab_size)
    with groups_of(plan, device, config.seed) as groups:
        chunks = build_chunks(plan.spec, plan.stages, groups, ChunkOptions(config.precision.dtype, config.seed, trainable=False))
        load(chunks)
        engine = MegatronEngine(chunks, ObjectiveOptions(chunk=config.trainer.loss_chunk))
        batches = loader(config, validation_batches(config, corpus, plan.layout, groups.dp_rank, config.evaluation.batches))
        result = evaluate(engine, batches, plan.spec, groups, EvaluationOptions.of(config))
    recorder.table(table, result.exits)
    return result.scalars()

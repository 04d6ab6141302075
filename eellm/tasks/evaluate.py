"""`task=evaluate`: quality of every exit on held-out text, and the trade-off at every threshold, from one pass; then modes
of decoding side by side. With `evaluation=lm_eval`: tasks of lm-evaluation-harness in these modes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

import torch

from eellm.config.schema import Config
from eellm.data.batch import GlobalBatch
from eellm.data.batches import loader, validation_batches
from eellm.data.corpus import Corpus
from eellm.engine.megatron import MegatronEngine
from eellm.engine.protocol import Engine
from eellm.evaluation.exits import EvaluationOptions, evaluate
from eellm.mcore.groups import Groups
from eellm.metrics.recorder import Recorder
from eellm.model.objective import ObjectiveOptions
from eellm.model.spec import ModelSpec
from eellm.tasks.comparison import best_faithful, compared_modes, decodes_together, decoding_config
from eellm.tasks.context import TaskContext
from eellm.tasks.reporting import report
from eellm.tasks.session import Plan, groups_of, is_main_rank, process_group, recording
from eellm.tasks.trained import load_trained

Options = TypeVar("Options")
Measured = TypeVar("Measured")


def run(context: TaskContext) -> dict[str, float]:
    config, decode = context.config, decoding_part(context.config)
    with recording(context) as (recorder, final):
        with process_group(config) as device:
            if config.evaluation.name == "exits":
                final |= evaluate_exits(context, recorder, device)
            if decode is not None and decodes_together(config):
                final |= decode(context, recorder, device)
        if decode is not None and not decodes_together(config) and is_main_rank():
            with process_group(config, alone=True) as device:
                final |= decode(context, recorder, device)
        if is_main_rank():
            report(context, recorder)
    return final


def decoding_part(config: Config) -> Callable[[TaskContext, Recorder, torch.device], dict[str, float]] | None:
    """What needs a decoder, and so the whole model on one stage; None where nothing does."""
    if config.evaluation.name == "lm_eval":
        from eellm.tasks.harness import evaluate_tasks

        return evaluate_tasks
    return compare_modes if config.evaluation.compared_modes(config.decoding.mode) else None


def evaluate_exits(context: TaskContext, recorder: Recorder, device: torch.device) -> dict[str, float]:
    """Evaluate the checkpoint's heads on the run's held-out text; writes the tables, returns the scalars."""
    result = on_held_out_text(context, device, context.config.evaluation.batches, evaluate, EvaluationOptions.of(context.config))
    recorder.table("exits", result.exits)
    recorder.table("trade_off", result.trade_off)
    recorder.table("reliability", result.reliability)
    return result.scalars()


def compare_modes(context: TaskContext, recorder: Recorder, device: torch.device) -> dict[str, float]:
    """Decode held-out prompts; writes speed_quality.csv, returns the scalars of its best row, on later stages none."""
    config, corpus = decoding_config(context.config), Corpus.load(context.run.corpus)
    plan = Plan.of(config, corpus.vocab_size)
    with groups_of(plan, device, config.seed) as groups:
        rows = compared_modes(config, load_trained(config, plan, groups).stages[0], groups, corpus)
    if not rows:
        return {}
    recorder.table("speed_quality", rows)
    return best_faithful(rows)


def on_held_out_text(
    context: TaskContext,
    device: torch.device,
    num_batches: int,
    measure: Callable[[Engine, Iterable[GlobalBatch], ModelSpec, Groups, Options], Measured],
    options: Options,
) -> Measured:
    """What `measure` makes of the checkpoint's model and at most so many held-out batches, on all ranks together."""
    config, corpus = context.config, Corpus.load(context.run.corpus)
    plan = Plan.of(config, corpus.vocab_size)
    with groups_of(plan, device, config.seed) as groups:
        engine = MegatronEngine(load_trained(config, plan, groups), ObjectiveOptions(chunk=config.trainer.loss_chunk))
        batches = loader(config, validation_batches(config, corpus, plan.layout, groups.dp_rank, num_batches))
        return measure(engine, batches, plan.spec, groups, options)

"""`task=evaluate`: quality of every exit on held-out text, and the trade-off at every threshold, from one pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

import torch

from eellm.data.batch import GlobalBatch
from eellm.data.batches import loader, validation_batches
from eellm.data.corpus import Corpus, prepare_corpus
from eellm.engine.megatron import MegatronEngine
from eellm.engine.protocol import Engine
from eellm.evaluation.exits import EvaluationOptions, evaluate
from eellm.mcore.groups import Groups
from eellm.metrics.recorder import Recorder
from eellm.model.objective import ObjectiveOptions
from eellm.model.spec import ModelSpec
from eellm.tasks.context import TaskContext
from eellm.tasks.session import Plan, groups_of, is_main_rank, process_group, recording
from eellm.tasks.trained import load_trained, with_trained_tokenizer

Options = TypeVar("Options")
Measured = TypeVar("Measured")


def prepare(context: TaskContext) -> None:
    prepare_corpus(with_trained_tokenizer(context.config)).save(context.run.corpus)


def run(context: TaskContext) -> dict[str, float]:
    with process_group(context.config) as device, recording(context) as (recorder, final):
        final |= evaluate_exits(context, recorder, device)
    if is_main_rank():
        from eellm.report.html import build_report
        from eellm.report.terminal import print_report

        build_report(context.run_dir)
        print_report(context.run_dir)
    return final


def evaluate_exits(context: TaskContext, recorder: Recorder, device: torch.device) -> dict[str, float]:
    """Evaluate the checkpoint's heads on the run's held-out text; writes the tables, returns the scalars."""
    result = on_held_out_text(context, device, context.config.evaluation.batches, evaluate, EvaluationOptions.of(context.config))
    recorder.table("exits", result.exits)
    recorder.table("trade_off", result.trade_off)
    recorder.table("reliability", result.reliability)
    return result.scalars()


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

"""`task=evaluate`: quality of every exit on held-out text, and the trade-off at every threshold, from one pass."""

from __future__ import annotations

import torch

from eellm.data.batches import loader, validation_batches
from eellm.data.corpus import Corpus, prepare_corpus
from eellm.engine.megatron import MegatronEngine
from eellm.evaluation.exits import EvaluationOptions, evaluate
from eellm.metrics.recorder import Recorder
from eellm.model.objective import ObjectiveOptions
from eellm.tasks.context import TaskContext
from eellm.tasks.session import Plan, groups_of, is_main_rank, process_group, recording
from eellm.tasks.trained import load_trained, with_trained_tokenizer


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
    config, corpus = context.config, Corpus.load(context.run.corpus)
    plan = Plan.of(config, corpus.vocab_size)
    with groups_of(plan, device, config.seed) as groups:
        engine = MegatronEngine(load_trained(config, plan, groups), ObjectiveOptions(chunk=config.trainer.loss_chunk))
        batches = loader(config, validation_batches(config, corpus, plan.layout, groups.dp_rank, config.evaluation.batches))
        result = evaluate(engine, batches, plan.spec, groups, EvaluationOptions.of(config))
    recorder.table("exits", result.exits)
    recorder.table("trade_off", result.trade_off)
    recorder.table("reliability", result.reliability)
    return result.scalars()

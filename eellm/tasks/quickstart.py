"""`python run.py`: train a small early-exit model, evaluate its exits, decode with them, and show all of it."""

from __future__ import annotations

import torch

from eellm.config.schema import Config
from eellm.data.corpus import Corpus
from eellm.metrics.recorder import Recorder
from eellm.metrics.tables import TableRow
from eellm.tasks import train as train_task
from eellm.tasks.comparison import best_faithful, compared_modes, on_one_rank
from eellm.tasks.context import TaskContext
from eellm.tasks.evaluate import evaluate_exits
from eellm.tasks.generate import continue_prompts, write_generations
from eellm.tasks.reporting import report
from eellm.tasks.session import Plan, groups_of, is_main_rank, process_group, recording
from eellm.tasks.trained import load_trained

SAMPLE_AGREEMENT = 0.9


def run(context: TaskContext) -> dict[str, float]:
    trained = TaskContext(context.config.model_copy(update={"checkpoint": str(context.run_dir)}), context.run_dir)
    with recording(context) as (recorder, final):
        with process_group(context.config) as device:
            final |= train_task.train(context, recorder, device)
            final |= evaluate_exits(trained, recorder, device)
        if is_main_rank():
            with process_group(context.config, alone=True) as device:
                final |= decode(trained, recorder, device)
            report(context, recorder)
    return final


def decode(context: TaskContext, recorder: Recorder, device: torch.device) -> dict[str, float]:
    """Speed against quality on held-out prompts, and the samples; the model fits one rank here."""
    config, corpus = on_one_rank(context.config), Corpus.load(context.run.corpus)
    alone = TaskContext(config, context.run_dir)
    plan = Plan.of(config, corpus.vocab_size)
    with groups_of(plan, device, config.seed) as groups:
        stage = load_trained(config, plan, groups).stages[0]
        rows = compared_modes(config, stage, groups, corpus)
        exiting = with_policy(alone, {"threshold": sample_threshold(rows, config)})
        full = with_policy(alone, {"kind": "never"})
        write_generations(alone, [*continue_prompts(exiting, stage), *continue_prompts(full, stage)])
    recorder.table("speed_quality", rows)
    return best_faithful(rows)


def with_policy(context: TaskContext, changes: dict[str, object]) -> TaskContext:
    policy = context.config.exit_policy.model_copy(update=changes)
    return TaskContext(context.config.model_copy(update={"exit_policy": policy}), context.run_dir)


def sample_threshold(rows: list[TableRow], config: Config) -> object:
    """The lowest threshold measured that keeps most of full depth's tokens: a model this small is rarely sure of itself."""
    faithful = [row["threshold"] for row in rows[1:] if float(str(row["agreement"])) >= SAMPLE_AGREEMENT]
    return min(faithful, key=lambda threshold: float(str(threshold)), default=config.exit_policy.threshold)

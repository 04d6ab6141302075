"""`task=evaluate evaluation=lm_eval`: tasks of lm-evaluation-harness at full depth, and by every mode at every threshold."""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from itertools import chain
from typing import Any

import torch

from eellm.benchmark.speed_quality import speed_against_quality
from eellm.config.schema import Config
from eellm.data.tokenizer import Tokenizer
from eellm.decoding.setting import Setting, swept
from eellm.harness.catalogue import Catalogue, load_catalogue
from eellm.harness.kept_scores import KeptScores
from eellm.harness.model import HarnessModel
from eellm.harness.scores import WindowScorer
from eellm.harness.table import table_rows
from eellm.metrics import names
from eellm.metrics.recorder import Recorder
from eellm.metrics.tables import TableRow
from eellm.model.stage import Stage
from eellm.tasks.comparison import NUM_PROMPTS, PROMPT_TOKENS, best_faithful, decoding_config
from eellm.tasks.context import TaskContext
from eellm.tasks.session import Plan, groups_of
from eellm.tasks.source import trained_tokenizer
from eellm.tasks.trained import load_trained


def evaluate_tasks(context: TaskContext, recorder: Recorder, device: torch.device) -> dict[str, float]:
    """Answer the tasks' requests in all settings; writes lm_eval.csv and speed_quality.csv, returns the scalars.

    All tensor-parallel ranks do the same, and the main one records.
    """
    config = decoding_config(context.config)
    catalogue, tokenizer = load_catalogue(config.evaluation), trained_tokenizer(config)
    plan = Plan.of(config, tokenizer.vocab_size)
    with groups_of(plan, device, config.seed) as groups:
        stage = load_trained(config, plan, groups).stages[0]
        settings = settings_of(config, stage)
        models = models_of(config, stage, settings, tokenizer)
        first = answered(config, catalogue, models[0])
        speeds = speed_against_quality(stage, groups, prompts_of(models[0]), settings, greedy(config).decoding)
        recorder.table("speed_quality", speeds)
        rows: list[TableRow] = []
        results = chain([first], (answered(config, catalogue, model) for model in models[1:]))
        for setting, model, result, speed in zip(settings, models, results, speeds, strict=True):
            rows += table_rows(setting, result, model.usage, catalogue.members, speed)
            recorder.table("lm_eval", rows)  # after every setting: it may be long until the last
    return best_faithful(speeds) | full_depth_scores(rows)


def settings_of(config: Config, stage: Stage) -> list[Setting]:
    """Full depth first."""
    evaluation = config.evaluation
    modes = evaluation.compared_modes(config.decoding.mode)
    return swept(modes, config.decoding, config.exit_policy, evaluation.thresholds, stage.spec)


def greedy(config: Config) -> Config:
    return config.model_copy(update={"decoding": config.decoding.model_copy(update={"temperature": 0.0})})


def models_of(config: Config, stage: Stage, settings: list[Setting], tokenizer: Tokenizer) -> list[HarnessModel]:
    """One a setting, with common scores."""
    active = next((setting.policy.active for setting in settings if setting.policy.active), ())
    scorer = WindowScorer(stage, active, config.evaluation.batch_size, config.trainer.loss_chunk)
    scores = KeptScores(scorer, stage.spec.max_positions)
    return [HarnessModel(scores, setting, tokenizer, config.decoding, config.seed) for setting in settings]


def answered(config: Config, catalogue: Catalogue, model: HarnessModel) -> dict[str, Any]:
    """The harness's results for one setting."""
    with _silent(), model.decoding_on_demand():
        return catalogue.evaluate(model, config.evaluation)


def prompts_of(model: HarnessModel) -> list[list[int]]:
    """Ends of a few of the contexts that were met, spread over the tasks."""
    met = [context for kept in model.contexts.values() for context in kept]
    count = min(NUM_PROMPTS, len(met))
    return [met[index * len(met) // count][-PROMPT_TOKENS:] for index in range(count)]


def full_depth_scores(rows: list[TableRow]) -> dict[str, float]:
    return {
        names.harness(str(row["task"]), str(row["metric"]), str(row["filter"])): float(str(row["score"]))
        for row in rows
        if row["decoding"] == "full"
    }


@contextmanager
def _silent() -> Iterator[None]:
    """The harness prints, logs and draws bars; its bootstrap starts a process for every core, which ranks do not survive."""
    os.environ["DISABLE_MULTIPROC"] = "1"
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        yield

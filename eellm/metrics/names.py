"""Every metric key in one table: its unit, how values of ranks become one, and which way is better.

Keys are written through the formatters below and read through `describe` and `head_series`, so a renamed
metric breaks a test instead of leaving a chart empty.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Reduction = Literal["token_mean", "same", "max", "sum"]
Direction = Literal["lower", "higher", "none"]

STEP = "step"
"""Optimizer steps done, the x axis of everything."""
TIME = "time"
"""Seconds since the epoch when the row was written."""
FINAL = "final"
"""Name of the model's own output head."""
HEAD_PATTERN = r"exit_\d{2,}|final"


@dataclass(frozen=True)
class Metric:
    """One family of keys. `{head}` in the pattern stands for `exit_06` or `final`, `{stage}` for a stage number, `{figure}`
    for a row of benchmark.csv, `{schedule}` for a schedule variant, `{score}` for a task of lm-evaluation-harness and its metric.

    `reduction` says how the ranks' numbers become the one that is written: `token_mean` = sum over all
    tokens divided by their global count, `same` = equal on all ranks already, `max` and `sum` over ranks.
    """

    pattern: str
    unit: str
    reduction: Reduction
    direction: Direction
    description: str

    def matches(self, key: str) -> bool:
        pattern = re.escape(self.pattern)
        for name, values in {
            "head": f"(?:{HEAD_PATTERN})",
            "stage": r"\d+",
            "figure": r"\w+/\w+",
            "schedule": r"\w+",
            "score": r"[^/]+(?:/[^/]+)+",
        }.items():
            pattern = pattern.replace(rf"\{{{name}\}}", values)
        return re.fullmatch(pattern, key) is not None


TRAIN_LOSS = "train/loss/{head}"
TRAIN_LOSS_TOTAL = "train/loss/total"
TRAIN_WEIGHT = "train/weight/{head}"
GRAD_NORM = "train/grad_norm"
LEARNING_RATE = "train/lr"
BATCH_SIZE = "train/batch_size"
TOKENS_PER_SECOND = "train/tokens_per_second"
TFLOPS = "train/tflops"
STEP_TIME = "train/step_time"
MEMORY_GB = "train/memory_gb/stage_{stage}"
LOSS_SCALE = "train/loss_scale"
NONFINITE_STEPS = "train/nonfinite_steps"
VAL_LOSS = "val/loss/{head}"
EVAL_LOSS = "eval/loss/{head}"
EVAL_PERPLEXITY = "eval/perplexity/{head}"
EVAL_ACCURACY = "eval/accuracy/{head}"
EVAL_AGREEMENT = "eval/agreement/{head}"
EVAL_CALIBRATION = "eval/calibration_error/{head}"
GENERATE_TOKENS_PER_SECOND = "generate/tokens_per_second"
GENERATE_SPEEDUP = "generate/speedup"
GENERATE_AGREEMENT = "generate/agreement"
GENERATE_MEAN_LAYERS = "generate/mean_layers"
GENERATE_ACCEPTANCE_RATE = "generate/acceptance_rate"
GENERATE_MEAN_ACCEPTED_LENGTH = "generate/mean_accepted_length"
BENCHMARK = "benchmark/{figure}"
HARNESS = "lm_eval/{score}"
CALIBRATE_RISK = "calibrate/risk"
CALIBRATE_MEAN_LAYERS = "calibrate/mean_layers"
PLAN_SECONDS = "plan/{schedule}/seconds"
PLAN_BUBBLE = "plan/{schedule}/bubble"
PLAN_EXITS_COST = "plan/{schedule}/exits_cost"
PLAN_PEAK_GIB = "plan/peak_gib"
SERVE_TOKENS = "serve/tokens"
SERVE_MEAN_LAYERS = "serve/mean_layers"

METRICS: tuple[Metric, ...] = (
    Metric(TRAIN_LOSS, "nats/token", "token_mean", "lower", "Cross-entropy of a head on the step's batch"),
    Metric(TRAIN_LOSS_TOTAL, "nats/token", "token_mean", "lower", "Weighted sum of all heads' losses, what is minimised"),
    Metric(TRAIN_WEIGHT, "1", "same", "none", "Weight of a head in the total loss at this step"),
    Metric(GRAD_NORM, "1", "same", "none", "Global gradient norm before clipping"),
    Metric(LEARNING_RATE, "1", "same", "none", "Learning rate of the step"),
    Metric(BATCH_SIZE, "sequences", "same", "none", "Sequences of the step over all processes"),
    Metric(TOKENS_PER_SECOND, "tokens/s", "same", "higher", "Training tokens per second over all processes"),
    Metric(TFLOPS, "TFLOP/s", "same", "higher", "Model FLOPs per second and process, exits counted, recomputation not"),
    Metric(STEP_TIME, "s", "same", "lower", "Seconds per optimizer step, validation and checkpoints left out"),
    Metric(MEMORY_GB, "GB", "max", "lower", "Peak memory of a pipeline stage: CUDA allocations, else the process"),
    Metric(LOSS_SCALE, "1", "same", "none", "Dynamic loss scale of fp16"),
    Metric(NONFINITE_STEPS, "steps", "same", "lower", "Steps so far that were skipped because a loss or gradient was not finite"),
    Metric(VAL_LOSS, "nats/token", "token_mean", "lower", "Cross-entropy of a head on held-out text during training"),
    Metric(EVAL_LOSS, "nats/token", "token_mean", "lower", "Cross-entropy of a head on held-out text"),
    Metric(EVAL_PERPLEXITY, "1", "token_mean", "lower", "exp of the head's loss"),
    Metric(EVAL_ACCURACY, "share", "token_mean", "higher", "Share of tokens whose most probable prediction is right"),
    Metric(EVAL_AGREEMENT, "share", "token_mean", "higher", "Share of tokens where a head and the final head predict the same"),
    Metric(EVAL_CALIBRATION, "share", "token_mean", "lower", "Expected calibration error of a head's confidence"),
    Metric(GENERATE_TOKENS_PER_SECOND, "tokens/s", "same", "higher", "Generated tokens per second"),
    Metric(GENERATE_SPEEDUP, "1", "same", "higher", "Tokens per second relative to full depth"),
    Metric(GENERATE_AGREEMENT, "share", "same", "higher", "Share of generated tokens equal to full depth's"),
    Metric(GENERATE_MEAN_LAYERS, "layers", "same", "lower", "Mean layers a generated token passed before it was emitted"),
    Metric(GENERATE_ACCEPTANCE_RATE, "share", "same", "higher", "Share of tokens drafted by exits that the full model accepted"),
    Metric(GENERATE_MEAN_ACCEPTED_LENGTH, "tokens", "same", "higher", "Drafted tokens accepted per verifying pass of a sequence"),
    Metric(BENCHMARK, "as in benchmark.csv", "same", "none", "A figure of task=benchmark, e.g. benchmark/time/ratio"),
    Metric(
        HARNESS, "as the harness", "same", "none", "A task's metric at full depth, e.g. lm_eval/boolq/acc; lm_eval.csv has all"
    ),
    Metric(CALIBRATE_RISK, "share", "same", "none", "Risk measured at the threshold certified, a mean over sequences"),
    Metric(CALIBRATE_MEAN_LAYERS, "layers", "same", "lower", "Mean layers of held-out tokens at the threshold certified"),
    Metric(PLAN_SECONDS, "s", "same", "lower", "Predicted seconds of an optimizer step"),
    Metric(PLAN_BUBBLE, "share", "same", "lower", "Predicted share of the devices' time in the pipeline that is idle"),
    Metric(PLAN_EXITS_COST, "share", "same", "lower", "Predicted time of a step with exits over that without them, minus 1"),
    Metric(PLAN_PEAK_GIB, "GiB", "max", "lower", "Predicted peak memory of the fullest device"),
    Metric(SERVE_TOKENS, "tokens", "same", "none", "Tokens that a server has generated"),
    Metric(SERVE_MEAN_LAYERS, "layers", "same", "lower", "Mean layers a token of a server passed before it was emitted"),
)


def describe(key: str) -> Metric:
    """The entry of a key; KeyError for a key that is not in the table. The most specific pattern wins."""
    found = [metric for metric in METRICS if metric.matches(key)]
    if not found:
        raise KeyError(f"unknown metric {key!r}: add it to eellm/metrics/names.py")
    return found[0]


def train_loss(head: str) -> str:
    return TRAIN_LOSS.format(head=head)


def train_weight(head: str) -> str:
    return TRAIN_WEIGHT.format(head=head)


def val_loss(head: str) -> str:
    return VAL_LOSS.format(head=head)


def memory_gb(stage: int) -> str:
    """Key of a pipeline stage's peak memory; `stage` counts pipeline ranks from 0."""
    return MEMORY_GB.format(stage=stage)


def evaluation(column: str, head: str) -> str:
    """Key of one cell of exits.csv, e.g. `eval/agreement/exit_04`."""
    return f"eval/{column}/{head}"


def harness(task: str, metric: str, filter_: str) -> str:
    """Key of a task's score, e.g. `lm_eval/boolq/acc`; a filter of its own is a further part."""
    parts = (task, metric) if filter_ == "none" else (task, metric, filter_)
    return HARNESS.format(score="/".join(part.replace("/", "_") for part in parts))


def share_column(head: str) -> str:
    """Column of a head's share of the tokens in trade_off.csv and speed_quality.csv."""
    return f"share_{head}"


def depth(head: str) -> tuple[int, int]:
    """Sort key: exits by layer, the final head last."""
    return (1, 0) if head == FINAL else (0, int(head.removeprefix("exit_")))


def heads_in(pattern: str, keys: Iterable[str]) -> list[str]:
    """Heads that a pattern such as VAL_LOSS has among some keys, in order of depth."""
    compiled = re.compile(re.escape(pattern).replace(r"\{head\}", f"({HEAD_PATTERN})"))
    found = {match.group(1) for match in map(compiled.fullmatch, keys) if match}
    return sorted(found, key=depth)

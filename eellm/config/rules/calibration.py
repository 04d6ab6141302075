"""Rules on calibrating exit thresholds, and on decoding with calibrated ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise

from eellm.calibration.result import read_calibration, trained_model
from eellm.config.request import Request, typed_value
from eellm.config.rules.model import exit_layers
from eellm.config.schema import (
    CalibrationConfig,
    ExitPolicyConfig,
    ExitsConfig,
    ModelConfig,
    PrecisionConfig,
    TaskConfig,
)
from eellm.errors import CheckpointError, Problem
from eellm.model.spec import per_exit

Problems = Iterator[Problem]


def policy_can_be_calibrated(task: TaskConfig, exit_policy: ExitPolicyConfig) -> Problems:
    if task.name == "calibrate" and exit_policy.kind != "max_probability":
        reason = "the pass over held-out text keeps no more of an exit's output than its largest probability"
        yield Problem("exit_policy.kind", exit_policy.kind, reason, "exit_policy=max_probability")


def thresholds_fall(
    task: TaskConfig, model: ModelConfig, exits: ExitsConfig, exit_policy: ExitPolicyConfig, calibration: CalibrationConfig
) -> Problems:
    if task.name != "calibrate":
        return
    layers = exit_layers(model, exits)
    active = layers if exit_policy.active is None else exit_policy.active
    given = calibration.thresholds
    if not active:
        yield Problem("exits.layers", layers, "the model has no exit to calibrate", "train one with exits")
    if not given:
        yield Problem("calibration.thresholds", [], "there is nothing to test", "calibration.thresholds=[1.0,0.9,0.8]")
    for threshold in given:
        if isinstance(threshold, list) and len(threshold) != len(active):
            reason = f"a list of {len(threshold)} for {len(active)} active exits"
            yield Problem("calibration.thresholds", threshold, reason, f"give {len(active)} entries, or one number for all")
            return
    for before, after in pairwise(given):
        a, b = per_exit(before, len(active)), per_exit(after, len(active))
        if a == b or any(later > earlier for earlier, later in zip(a, b, strict=True)):
            reason = f"{after} is not below {before}: they are tested from the most careful one downwards"
            yield Problem("calibration.thresholds", given, reason, "order them from large to small, each once")
            return


def calibration_is_of_this_model(
    task: TaskConfig, exit_policy: ExitPolicyConfig, checkpoint: str | None, precision: PrecisionConfig
) -> Problems:
    given = exit_policy.calibration
    if given is None or task.name not in ("generate", "serve") or checkpoint is None:
        return
    try:
        calibration = read_calibration(given)
        model = trained_model(checkpoint, precision.dtype)
    except CheckpointError as error:
        yield Problem("exit_policy.calibration", given, str(error), "python run.py task=calibrate checkpoint=" + checkpoint)
        return
    if not calibration.model.is_same(model):
        reason = f"made for {calibration.model}, but checkpoint is {model}"
        yield Problem("exit_policy.calibration", given, reason, "python run.py task=calibrate checkpoint=" + checkpoint)


def calibration_sets_the_policy(exit_policy: ExitPolicyConfig, request: Request) -> Problems:
    if exit_policy.calibration is None:
        return
    for override in request.parsed:
        if override.key in ("exit_policy.threshold", "exit_policy.active"):
            reason = "comes from exit_policy.calibration"
            yield Problem(override.key, typed_value(override), reason, "leave one of the two out")


RULES: list[Callable[..., Problems]] = [
    policy_can_be_calibrated,
    thresholds_fall,
    calibration_is_of_this_model,
    calibration_sets_the_policy,
]

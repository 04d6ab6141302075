"""Policies against cases worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from eellm.config.schema import ExitPolicyConfig
from eellm.decoding.policy import Policy, build_policy
from eellm.errors import ConfigError
from eellm.model.spec import ExitSpec
from eellm.model.statistics import HeadStatistics
from tests.decoding.models import spec

NAMES = ("prediction", "probability", "second_probability", "entropy", "log_normaliser")


def seen(**values: list[float]) -> HeadStatistics:
    length = len(next(iter(values.values())))
    return HeadStatistics(**{name: torch.tensor(values.get(name, [0.0] * length)) for name in NAMES})


def config(kind: str, threshold: float | list[float] = 0.5, **changes: object) -> ExitPolicyConfig:
    values = {"kind": kind, "threshold": threshold, "layer": None, "active": None, "min_new_tokens": 0, "calibration": None}
    return ExitPolicyConfig(**(values | changes))


def test_max_probability() -> None:
    at = seen(probability=[0.49, 0.5, 0.9, 1.0])
    assert Policy("max_probability", (2, 4), (0.5, 0.95), 100).decide([at]).tolist() == [False, True, True, True]
    assert Policy("max_probability", (2, 4), (0.5, 0.95), 100).decide([at, at]).tolist() == [False, False, False, True]


def test_margin() -> None:
    at = seen(probability=[0.6, 0.6, 0.4], second_probability=[0.35, 0.2, 0.0])
    assert Policy("margin", (2,), (0.4,), 100).decide([at]).tolist() == [False, True, True]


def test_entropy_is_a_share_of_its_maximum() -> None:
    at = seen(entropy=[0.0, 0.29 * math.log(50), 0.31 * math.log(50), math.log(50)])
    assert Policy("entropy", (2,), (0.3,), 50).decide([at]).tolist() == [True, True, False, False]


def test_patience_counts_exits_in_a_row() -> None:
    first, second, third = seen(prediction=[1, 1, 1, 1]), seen(prediction=[1, 2, 1, 2]), seen(prediction=[1, 2, 2, 1])
    patient = Policy("patience", (1, 2, 3), (2.0, 2.0, 3.0), 100)
    assert patient.decide([first]).tolist() == [False] * 4
    assert patient.decide([first, second]).tolist() == [True, False, True, False]
    assert patient.decide([first, second, third]).tolist() == [True, False, False, False]
    assert Policy("patience", (1,), (1.0,), 100).decide([first]).tolist() == [True] * 4


def test_building() -> None:
    exits = spec(exits=(ExitSpec(1), ExitSpec(2), ExitSpec(4)))
    assert build_policy(config("max_probability"), exits) == Policy("max_probability", (1, 2, 4), (0.5, 0.5, 0.5), 61)
    chosen = build_policy(config("margin", [0.1, 0.2], active=[2, 4], min_new_tokens=7), exits)
    assert chosen == Policy("margin", (2, 4), (0.1, 0.2), 61, 7)
    assert chosen.threshold == [0.1, 0.2]
    assert build_policy(config("fixed_layer", layer=2), exits).active == (2,)
    never = build_policy(config("never", 1.0), exits)
    assert never.active == ()
    assert never.threshold is None
    assert build_policy(config("entropy", 0.3), exits).threshold == 0.3


@pytest.mark.parametrize(
    ("wrong", "paths"),
    [
        (config("fixed_layer", layer=3), ["exit_policy.layer"]),
        (config("fixed_layer"), ["exit_policy.layer"]),
        (config("margin", [0.1, 0.2]), ["exit_policy.threshold"]),
        (config("margin", [0.1], active=[2, 3]), ["exit_policy.active", "exit_policy.threshold"]),
        (config("margin", 0.1, active=[2, 2]), ["exit_policy.active"]),
        (config("patience", 0), ["exit_policy.threshold"]),
    ],
)
def test_what_does_not_fit_the_model_is_refused(wrong: ExitPolicyConfig, paths: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        build_policy(wrong, spec(exits=(ExitSpec(1), ExitSpec(2), ExitSpec(4))))
    assert [problem.path for problem in caught.value.problems] == paths

"""Weight schedules by hand; being functions of the step, they cannot depend on where a run was resumed."""

from __future__ import annotations

import pytest

from eellm.config.schema import LossWeightsConfig
from eellm.model.loss_weights import exit_weights


def weights(step: int, **changes) -> list[float]:
    values = {"kind": "constant", "values": [0.2, 0.4], "initial": 0.0, "steps": 10, "shape": "linear", "final": 1.0}
    return exit_weights(LossWeightsConfig(**(values | changes)), step, 2)


def test_constant() -> None:
    assert weights(0) == weights(1000) == [0.2, 0.4]
    assert weights(3, values=0.5) == [0.5, 0.5]


def test_linear_warmup_and_cooldown() -> None:
    assert weights(0, kind="warmup") == [0.0, 0.0]
    assert weights(5, kind="warmup") == pytest.approx([0.1, 0.2])
    assert weights(10, kind="warmup") == weights(99, kind="warmup") == [0.2, 0.4]
    assert weights(5, kind="cooldown", initial=[1.0, 2.0], values=0.0) == pytest.approx([0.5, 1.0])


def test_cosine_starts_and_ends_flat() -> None:
    curve = [weights(step, kind="warmup", shape="cosine", values=1.0)[0] for step in range(11)]
    assert curve[0] == 0.0
    assert curve[5] == pytest.approx(0.5)
    assert curve[10] == 1.0
    assert curve[1] - curve[0] < 0.03 < curve[5] - curve[4]
    assert curve == sorted(curve)


def test_rotating_gives_each_exit_its_turn() -> None:
    turns = [weights(step, kind="rotating", steps=2) for step in range(6)]
    assert turns == [[0.2, 0.0], [0.2, 0.0], [0.0, 0.4], [0.0, 0.4], [0.2, 0.0], [0.2, 0.0]]


def test_no_exits() -> None:
    config = LossWeightsConfig(kind="rotating", values=1.0, initial=0.0, steps=1, shape="linear", final=1.0)
    assert exit_weights(config, 5, 0) == []

"""The learning rate by hand."""

from __future__ import annotations

import pytest

from eellm.config.schema import LrScheduleConfig
from eellm.train.lr_schedule import learning_rate


def rate(step: int, kind: str = "cosine", **changes) -> float:
    values = {"kind": kind, "warmup_steps": 10, "decay_steps": None, "min_ratio": 0.1}
    return learning_rate(LrScheduleConfig(**(values | changes)), 1.0, step, 110)


@pytest.mark.parametrize("kind", ["cosine", "linear", "inverse_sqrt", "constant"])
def test_linear_warmup_reaches_the_peak(kind: str) -> None:
    assert [rate(step, kind) for step in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])


def test_decays() -> None:
    assert rate(60) == pytest.approx(0.55)
    assert rate(110) == pytest.approx(0.1)
    assert rate(500) == pytest.approx(0.1)
    assert rate(60, "linear") == pytest.approx(0.55)
    assert rate(35, "linear") == pytest.approx(0.775)
    assert rate(39, "inverse_sqrt") == pytest.approx(0.5)
    assert rate(10**6, "inverse_sqrt") == pytest.approx(0.1)
    assert rate(109, "constant") == 1.0


def test_decay_steps_end_the_decay_before_the_run() -> None:
    assert rate(50, decay_steps=50) == pytest.approx(0.1)


def test_no_warmup() -> None:
    assert rate(0, warmup_steps=0) == pytest.approx(1.0)

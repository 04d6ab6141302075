"""When bubble filling helps: the variance of a first stage's gradient falls exactly if Var(e) + 2 Cov(e, later) > 0."""

from __future__ import annotations

import numpy as np
import pytest

from eellm.schedule.bubble_filling import fill
from eellm.schedule.weights import Filled


def variance_ratio(correlation: float, spread: float, draws: int = 200_000) -> tuple[float, float]:
    """(variance of the estimate with part 1 over that without, from draws; Var(e) + 2 Cov(e, later)).

    `later` are gradients of the later losses, `e` those of the first stage's exit, `spread` their standard deviation.
    """
    filling = fill(4, 10, {0}, part_two=0)
    weights, random = Filled(filling, [1.0] * 10), np.random.default_rng(5)
    later = random.standard_normal((draws, 10))
    own = random.standard_normal((draws, 10))
    e = spread * (correlation * later + np.sqrt(1 - correlation**2) * own)
    ordinary = filling.ordinary
    received = weights.final() * np.prod([weights.received(stage, 0) for stage in range(3)])
    estimate = (received * later[:, :ordinary]).sum(1) / 10
    estimate += sum(weights.exit(0, index) * e[:, index] for index in range(10)) / 10
    plain = (later + e)[:, :ordinary].mean(1)
    assert estimate.mean() == pytest.approx(0.0, abs=0.01)
    return estimate.var() / plain.var(), spread**2 + 2 * spread * correlation


@pytest.mark.parametrize(("correlation", "spread"), [(0.5, 1.0), (0.0, 1.0), (-0.4, 1.0), (-0.6, 1.0), (-0.3, 0.4), (-0.1, 0.4)])
def test_the_sign_of_the_change(correlation: float, spread: float) -> None:
    ratio, condition = variance_ratio(correlation, spread)
    assert (ratio < 1) == (condition > 0), (ratio, condition)
    assert abs(ratio - 1) > 0.005, "too close to tell"


def test_what_a_calculation_gives() -> None:
    """With one part-1 microbatch per four ordinary ones: (N=8, n=2) Var e = 1: 1 - 0.2 (1 + 2 rho) / (2 + 2 rho)."""
    for correlation in (0.5, -0.6):
        ratio, _ = variance_ratio(correlation, 1.0)
        assert ratio == pytest.approx(1 - 0.2 * (1 + 2 * correlation) / (2 + 2 * correlation), abs=0.01)

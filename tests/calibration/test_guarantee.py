"""The promise itself: over many random splits, the held-back risk exceeds epsilon no more often than delta allows."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from eellm.calibration.bounds import fixed_sequence
from eellm.calibration.certify import p_values_of
from tests import workers
from tests.calibration.recorded import losses_of_run
from tests.calibration.trained import LARGER_BATCHES, train_run

SPLITS, DELTA = 200, 0.1
ALLOWED = DELTA + 2 * math.sqrt(DELTA * (1 - DELTA) / SPLITS)
Choice = Callable[[np.ndarray, float], int]


def certified(losses: np.ndarray, epsilon: float) -> int:
    return fixed_sequence(p_values_of(losses, epsilon), DELTA)


def measured(losses: np.ndarray, epsilon: float) -> int:
    """What one would do without statistics: go down as long as the sample's own risk is within the bound."""
    return fixed_sequence(losses.mean(0).tolist(), epsilon)


def splits(losses: np.ndarray, epsilon: float, size: int, choose: Choice) -> tuple[float, float]:
    """(share of splits whose held-back part has a higher risk than epsilon, share that let any token exit)."""
    generator = np.random.default_rng(7)
    broken = exits = 0
    for _ in range(SPLITS):
        order = generator.permutation(len(losses))
        count = choose(losses[order[:size]], epsilon)
        exits += count > 0
        broken += count > 0 and losses[order[size:], count - 1].mean() > epsilon
    return broken / SPLITS, exits / SPLITS


@pytest.fixture(scope="module")
def synthetic() -> np.ndarray:
    """[20000, 60]: texts differ much in how hard they are; a lower threshold costs every token a little more."""
    generator = np.random.default_rng(3)
    hard = generator.beta(0.5, 2.0, size=(20_000, 1))
    return generator.binomial(64, hard * np.linspace(0, 1, 60) ** 2) / 64


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    """[over 1500, 40] of a small model trained on real text."""
    folder = str(tmp_path_factory.mktemp("trained"))
    (run,) = workers.run(1, train_run, folder)
    thresholds = ",".join(f"{threshold:.4f}" for threshold in np.geomspace(0.95, 0.05, 40))
    overrides = ["task=calibrate", f"checkpoint={run}", "calibration.batches=1000", f"calibration.thresholds=[{thresholds}]"]
    (losses,) = workers.run(1, losses_of_run, [*overrides, *LARGER_BATCHES], f"{folder}/calibrate")
    return losses


@pytest.mark.parametrize("epsilon", [0.05, 0.1])
def test_the_bound_holds_on_synthetic_losses(synthetic: np.ndarray, epsilon: float) -> None:
    broken, exits = splits(synthetic, epsilon, 300, certified)
    assert broken <= ALLOWED
    assert exits > 0.9


@pytest.mark.parametrize("epsilon", [0.05, 0.1])
def test_the_check_can_fail(synthetic: np.ndarray, epsilon: float) -> None:
    """Thresholds taken by the sample's own risk break the bound far too often."""
    broken, _ = splits(synthetic, epsilon, 300, measured)
    assert broken > 2 * ALLOWED


@pytest.mark.slow
@pytest.mark.parametrize("epsilon", [0.05, 0.1])
def test_the_bound_holds_on_a_trained_model(trained: np.ndarray, epsilon: float) -> None:
    assert len(trained) > 1500
    broken, exits = splits(trained, epsilon, 300, certified)
    assert broken <= ALLOWED
    assert exits > 0.9

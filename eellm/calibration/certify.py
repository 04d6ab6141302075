"""From losses to thresholds: which of them are certified, in the order of the config's list."""

from __future__ import annotations

import math

import numpy as np

from eellm.calibration.bounds import fixed_sequence, hoeffding_bentkus
from eellm.calibration.losses import SequenceLosses
from eellm.calibration.result import ThresholdTest
from eellm.config.schema import CalibrationConfig
from eellm.model.spec import ModelSpec


def certify(sample: SequenceLosses, config: CalibrationConfig, spec: ModelSpec) -> list[ThresholdTest]:
    """Test the config's thresholds in turn, behind `never`, whose risk is 0 by definition."""
    p_values = p_values_of(sample.losses, config.epsilon)
    certified = fixed_sequence(p_values, config.delta)
    layers = np.array([*spec.exit_layers, spec.num_layers])
    rows = [
        ThresholdTest(None, 0.0, 0.0, True, spec.num_layers, 1.0, {head: float(head == spec.heads[-1]) for head in spec.heads})
    ]
    for number, (threshold, chosen) in enumerate(zip(config.thresholds, sample.chosen, strict=True)):
        shares = chosen / chosen.sum()
        mean_layers = float(shares @ layers)
        rows.append(
            ThresholdTest(
                threshold=threshold,
                risk=float(sample.losses[:, number].mean()),
                p_value=p_values[number],
                certified=number < certified,
                mean_layers=mean_layers,
                speedup=spec.num_layers / mean_layers,
                shares=dict(zip(spec.heads, shares.tolist(), strict=True)),
            )
        )
    return rows


def p_values_of(losses: np.ndarray, epsilon: float) -> list[float]:
    """Of losses [sequences, thresholds], one per threshold."""
    # exactly rounded sums: neither the layout's order of the sequences nor rounding moves the step in the binomial tail
    return [hoeffding_bentkus(math.fsum(column), len(column), epsilon) for column in losses.T]

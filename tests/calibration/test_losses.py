"""Losses of every sequence on every layout equal those computed token by token from the plain model's logits."""

from __future__ import annotations

import functools

import numpy as np
import pandas as pd
import pytest
import torch

from eellm.calibration.losses import LossOptions, threshold_grid
from eellm.model.spec import ExitSpec, ModelSpec
from tests import workers
from tests.calibration.recorded import losses_on_rank
from tests.engine.layouts import tiny_spec
from tests.evaluation import slowly
from tests.evaluation.layouts import Case, global_batches, whole_parameters

exits = (ExitSpec(1, "mlp", temperature=1.7), ExitSpec(2), ExitSpec(3, "block"))
four = tiny_spec(vocab_size=7, padded_vocab_size=8, init_std=0.25, exits=exits)
eight = tiny_spec(vocab_size=7, padded_vocab_size=8, init_std=0.25, num_layers=8, exits=(ExitSpec(2), ExitSpec(6, "block")))
GIVEN = [0.9, 0.55, 0.4, 0.25, 0.0]

CASES = {
    "single": Case(four),
    "dp2": Case(four, {"dp": 2}),
    "tp2": Case(four, {"tp": 2}),
    "pp2_vp2": Case(four, {"pp": 2, "vp": 2}),
    "tp2_pp2": Case(eight, {"tp": 2, "pp": 2}),
    "pp2_dp2": Case(eight, {"pp": 2, "dp": 2}),
}


@functools.cache
def table_of(spec: ModelSpec) -> pd.DataFrame:
    (parameters,) = workers.run(1, whole_parameters, spec)
    table = slowly.token_table(spec, parameters, global_batches(spec))
    table["sequence"] = [token[:3] for token in table.token]
    return table


def expected(spec: ModelSpec, risk: str, grid: list[dict[int, float]]) -> tuple[np.ndarray, np.ndarray]:
    """Losses [N, T], sorted, and mean layers [T]: token by token through its heads, then the mean of every sequence."""
    losses, layers = [], []
    for thresholds in grid:
        left, passed = [], []
        for _, tokens in table_of(spec).groupby("token", sort=False):
            rows = list(tokens.itertuples())
            here = next((row for row in rows[:-1] if row.confidence >= thresholds.get(row.layer, 2.0)), rows[-1])
            full = rows[-1]
            lost = here.prediction != full.prediction if risk == "disagreement" else full.right and not here.right
            left.append((full.sequence, float(lost)))
            passed.append(here.layer)
        losses.append(pd.DataFrame(left).groupby(0)[1].mean())
        layers.append(np.mean(passed))
    return ordered(np.stack(losses, axis=1)), np.array(layers)


def ordered(losses: np.ndarray) -> np.ndarray:
    """Layouts read the sequences in different orders."""
    return np.array(sorted(losses.round(9).tolist()))


@pytest.mark.parametrize("risk", ["disagreement", "accuracy_loss"])
@pytest.mark.parametrize("name", CASES)
def test_losses_equal_the_oracle_on_every_rank(name: str, risk: str) -> None:
    case = CASES[name]
    grid = threshold_grid(GIVEN, case.spec.exit_layers, case.spec.exit_layers)
    results = workers.run(case.parallel.world_size, losses_on_rank, case, LossOptions(risk, grid, chunk=5))
    wanted, layers = expected(case.spec, risk, [dict.fromkeys(case.spec.exit_layers, value) for value in GIVEN])
    assert len(set(wanted.flatten())) > 5
    assert len(set(layers)) == len(GIVEN)
    assert len(wanted) == 14, "two sequences of 16 are masked and do not count"
    for result in results:
        assert np.array_equal(ordered(result.losses), wanted)
        shares = result.chosen / result.chosen.sum(1, keepdims=True)
        assert shares @ [*case.spec.exit_layers, case.spec.num_layers] == pytest.approx(layers)


def test_one_threshold_per_active_exit() -> None:
    given = [[0.6, 0.5], [0.3, 0.5], [0.3, 0.0]]
    grid = threshold_grid(given, [1, 3], [1, 2, 3])
    assert grid.tolist() == [[pytest.approx(first), torch.inf, pytest.approx(last)] for first, last in given]
    (result,) = workers.run(1, losses_on_rank, CASES["single"], LossOptions("disagreement", grid))
    wanted, layers = expected(four, "disagreement", [{1: first, 3: last} for first, last in given])
    assert np.array_equal(ordered(result.losses), wanted)
    assert (result.chosen[:, 1] == 0).all(), "the exit in between is never asked"
    assert len(set(layers)) == 3


def test_the_accuracy_lost_is_never_more_than_the_loss_that_is_named_after_it() -> None:
    grid = threshold_grid(GIVEN, four.exit_layers, four.exit_layers)
    lost, differs = (
        workers.run(1, losses_on_rank, CASES["single"], LossOptions(risk, grid))[0].losses
        for risk in ("accuracy_loss", "disagreement")
    )
    assert (lost <= differs).all()
    table = table_of(four)
    right = {head: tokens.groupby("sequence").right.mean() for head, tokens in table.groupby("head")}
    drop = (right["final"] - right["exit_01"]).to_numpy()
    assert drop.mean() <= lost[:, -1].mean()
    assert (drop < 0).any(), "some sequence gains, which must not make up for another's loss"

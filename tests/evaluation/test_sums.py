"""Sums, bins and the choice of exits on cases that can be checked by hand; no process group."""

from __future__ import annotations

import math

import pytest
import torch

from eellm.errors import DataError
from eellm.evaluation.exits import Evaluation, tabulate
from eellm.evaluation.sums import Sums, bin_of, first_confident
from eellm.model.spec import ExitSpec
from eellm.model.statistics import LabelScores
from tests.engine.layouts import tiny_spec

spec = tiny_spec(exits=(ExitSpec(1), ExitSpec(3)))
CPU = torch.device("cpu")


def evaluation(confidence: list, prediction: list, loss: list, labels: list, thresholds: tuple = (), bins: int = 2) -> Evaluation:
    """Of heads exit_01, exit_03 and final; added in two parts."""
    sums = Sums.zeros(3, len(thresholds), bins, CPU)
    scores = [torch.tensor(values) for values in (loss, prediction, confidence)]
    for part in (slice(0, 1), slice(1, None)):
        sums.add(LabelScores(*(values[:, part] for values in scores)), torch.tensor(labels)[part], torch.tensor(thresholds))
    return tabulate(sums, spec, thresholds)


def two_tokens(thresholds: tuple = ()) -> Evaluation:
    return evaluation(
        confidence=[[0.5, 0.9], [0.75, 0.25], [0.625, 1.0]],
        prediction=[[4, 5], [4, 7], [4, 7]],
        loss=[[1.0, 2.0], [0.5, 1.5], [0.25, 0.75]],
        labels=[4, 6],
        thresholds=thresholds,
    )


def test_a_token_leaves_at_the_first_exit_that_reaches_the_threshold_and_equality_reaches_it() -> None:
    confidence = torch.tensor([[0.5, 0.25, 0.0], [0.75, 0.5, 0.25]])
    chosen = first_confident(confidence, torch.tensor([0.0, 0.25, 0.5, 0.75, 0.76]))
    assert chosen.tolist() == [[0, 0, 0], [0, 0, 1], [0, 1, 2], [1, 2, 2], [2, 2, 2]]


def test_an_undefined_confidence_never_leaves_early() -> None:
    assert first_confident(torch.tensor([[math.nan]]), torch.tensor([0.0])).tolist() == [[1]]
    assert 0 <= bin_of(torch.tensor([math.nan]), 4).item() < 4


def test_without_exits_every_token_reaches_the_final_head() -> None:
    assert first_confident(torch.empty(0, 2), torch.tensor([0.5])).tolist() == [[0, 0]]


def test_a_bin_holds_its_upper_edge() -> None:
    confidence = torch.tensor([0.001, 0.25, 0.2501, 0.5, 0.75, 0.7501, 1.0])
    assert bin_of(confidence, 4).tolist() == [0, 0, 1, 1, 2, 3, 3]
    assert bin_of(confidence, 1).tolist() == [0] * 7


def test_columns_of_two_tokens() -> None:
    first, second, final = two_tokens().exits
    assert (first["head"], first["layer"], final["head"], final["layer"]) == ("exit_01", 1, "final", 4)
    assert [row["loss"] for row in (first, second, final)] == [1.5, 1.0, 0.5]
    assert first["perplexity"] == pytest.approx(math.exp(1.5))
    assert [row["accuracy"] for row in (first, second, final)] == [0.5, 0.5, 0.5]
    assert [row["agreement"] for row in (first, second, final)] == [0.5, 1.0, 1.0]
    # exit_01 has a right token in (0, 0.5] and a wrong one in (0.5, 1]; exit_03 the other way round; final both above
    assert first["calibration_error"] == pytest.approx(0.5 * abs(1 - 0.5) + 0.5 * abs(0 - 0.9))
    assert second["calibration_error"] == pytest.approx(0.5 * abs(0 - 0.25) + 0.5 * abs(1 - 0.75))
    assert final["calibration_error"] == pytest.approx(abs(0.5 - 0.8125))


def test_reliability_leaves_an_empty_bin_without_ratios() -> None:
    rows = two_tokens().reliability
    assert rows[4] == {"head": "final", "bin": 0, "count": 0, "confidence": None, "accuracy": None}
    assert rows[5] == {"head": "final", "bin": 1, "count": 2, "confidence": 0.8125, "accuracy": 0.5}


def test_trade_off_of_two_tokens() -> None:
    everything, half, never = two_tokens(thresholds=(0.0, 0.75, 1.5)).trade_off
    assert everything == {
        "threshold": 0.0,
        "accuracy": 0.5,
        "loss": 1.5,
        "agreement": 0.5,
        "mean_layers": 1.0,
        "share_exit_01": 1.0,
        "share_exit_03": 0.0,
        "share_final": 0.0,
    }
    # the first token leaves at exit_03 with exactly 0.75, the second at exit_01
    assert (half["loss"], half["mean_layers"], half["agreement"]) == (1.25, 2.0, 0.5)
    assert (half["share_exit_01"], half["share_exit_03"], half["share_final"]) == (0.5, 0.5, 0.0)
    assert (never["loss"], never["mean_layers"], never["agreement"], never["share_final"]) == (0.5, 4.0, 1.0, 1.0)


def test_a_perfectly_calibrated_head_has_no_error() -> None:
    confidence, labels = [[0.75] * 4] * 3, [1, 1, 1, 0]
    result = evaluation(confidence, [[1] * 4] * 3, [[0.0] * 4] * 3, labels, bins=15)
    assert [row["calibration_error"] for row in result.exits] == [0.0] * 3


def test_a_loss_too_large_for_its_perplexity_is_infinite() -> None:
    result = evaluation([[0.5, 0.5]] * 3, [[1, 1]] * 3, [[1000.0, 1000.0]] * 3, [0, 0])
    assert result.exits[0]["perplexity"] == math.inf


def test_no_counted_token_is_an_error() -> None:
    with pytest.raises(DataError, match="no unmasked token"):
        tabulate(Sums.zeros(3, 0, 2, CPU), spec, ())

import math

import pytest

from eellm.analysis import exit_shares, exit_table, load_runs, reliability, run_table
from tests.analysis.run_folders import write_run

QUALITY = {"perplexity": 55.0, "accuracy": 0.2, "agreement": 0.6, "calibration_error": 0.01}


def test_a_row_a_run_and_head(tmp_path):
    """Evaluated runs by their table, trained ones by their last validation."""
    exits = [{"head": head, "layer": layer, "loss": 4.0, **QUALITY} for head, layer in (("exit_02", 2), ("final", 8))]
    write_run(tmp_path / "a", {"seed": 1}, {"val/loss/final": 3.0, "val/loss/exit_04": 4.5})
    write_run(tmp_path / "b", {"seed": 2}, {"val/loss/final": 9.0}, tables={"exits": exits})
    write_run(tmp_path / "c", {"seed": 3})
    frame = exit_table(load_runs(tmp_path))
    assert frame[["seed", "head", "layer", "loss", "measured"]].values.tolist() == [
        [1, "exit_04", 4, 4.5, "validation"],
        [1, "final", 8, 3.0, "validation"],
        [2, "exit_02", 2, 4.0, "evaluation"],
        [2, "final", 8, 4.0, "evaluation"],
    ]
    assert frame["perplexity"].tolist() == [math.exp(4.5), math.exp(3.0), 55.0, 55.0]
    assert frame["accuracy"].tolist()[2:] == [0.2, 0.2]


def test_a_run_that_diverged_costs_nothing(tmp_path):
    write_run(tmp_path / "a", {}, {"val/loss/final": 1e4})
    assert exit_table(load_runs(tmp_path))["perplexity"].item() > 1e300


def test_the_final_head_has_its_own_run_s_layers(tmp_path):
    for layers in (4, 8):
        write_run(tmp_path / str(layers), {"model.num_layers": layers}, {"val/loss/final": 3.0})
    assert exit_table(load_runs(tmp_path))["layer"].tolist() == [4, 8]


def test_bins_without_tokens_are_left_out(tmp_path):
    bins = [
        {"head": "final", "confidence": 0.5, "accuracy": 0.4, "count": 10},
        {"head": "final", "confidence": None, "accuracy": None, "count": 0},
    ]
    write_run(tmp_path / "a", tables={"reliability": bins})
    write_run(tmp_path / "b")
    assert reliability(load_runs(tmp_path))[["confidence", "accuracy", "count"]].values.tolist() == [[0.5, 0.4, 10]]


def test_shares_by_head(tmp_path):
    """Runs with other exits have no share of the heads that they lack."""
    write_run(
        tmp_path / "a",
        {"seed": 1},
        tables={"trade_off": [{"threshold": 0.5, "share_exit_10": 0.25, "share_exit_04": 0.5, "share_final": 0.25}]},
    )
    write_run(tmp_path / "b", {"seed": 2}, tables={"trade_off": [{"threshold": 0.5, "share_exit_04": 0.75, "share_final": 0.25}]})
    frame = exit_shares(run_table(load_runs(tmp_path), "trade_off"))
    first = [[1, 0.5, "exit_04", 0.5], [1, 0.5, "exit_10", 0.25], [1, 0.5, "final", 0.25]]
    second = [[2, 0.5, "exit_04", 0.75], [2, 0.5, "final", 0.25]]
    assert frame[["seed", "threshold", "head", "share"]].values.tolist() == [*first, *second]
    assert frame.groupby("seed")["share"].sum().tolist() == pytest.approx([1.0, 1.0])

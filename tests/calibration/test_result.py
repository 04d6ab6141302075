"""calibration.json, the verdict in words, and decoding with it: for the model that was calibrated, and for no other."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from eellm.calibration.certify import certify
from eellm.calibration.losses import SequenceLosses
from eellm.calibration.result import Calibration, HeldOutText, TrainedModel, calibrated, read_calibration, trained_model
from eellm.calibration.table import calibration_rows, calibration_table, verdict
from eellm.config.compose import compose
from eellm.errors import CheckpointError, ConfigError
from eellm.model.spec import ExitSpec
from tests.engine.layouts import tiny_spec

SPEC = tiny_spec(exits=(ExitSpec(1), ExitSpec(3)))
TEXT = HeldOutText("text", [0.9, 0.1], 64, "ignore")
MODEL = TrainedModel("somewhere", "abcdef", 2, "fp32")


def calibration(risks: list[float], sequences: int = 400, model: TrainedModel = MODEL) -> Calibration:
    """Thresholds 0.9, 0.8, ... at which every sequence loses the same, and half of the tokens leave at each exit."""
    given = [round(0.9 - number / 10, 1) for number in range(len(risks))]
    options = compose().calibration.model_copy(update={"thresholds": given, "epsilon": 0.05, "delta": 0.1})
    sample = SequenceLosses(np.tile(risks, (sequences, 1)), np.tile([500.0, 500.0, 0.0], (len(risks), 1)))
    tests = certify(sample, options, SPEC)
    return Calibration(options.risk, 0.05, 0.1, SPEC.exit_layers, sequences, 1000, tests, model, TEXT)


def printed(found: Calibration) -> str:
    console = Console(width=100, file=io.StringIO())
    console.print(calibration_table(found))
    console.print(verdict(found))
    return console.file.getvalue()


def test_the_last_threshold_before_the_first_failure_is_chosen() -> None:
    found = calibration([0.0, 0.01, 0.02, 0.2, 0.0])
    assert [test.threshold for test in found.tests] == [None, 0.9, 0.8, 0.7, 0.6, 0.5]
    assert [test.certified for test in found.tests] == [True] * 4 + [False] * 2
    assert found.tests[5].p_value < 0.1, "small, but behind one that failed"
    assert found.chosen.threshold == 0.7
    assert (found.chosen.risk, found.chosen.mean_layers, found.chosen.speedup) == (pytest.approx(0.02), 2.0, 2.0)
    assert found.chosen.shares == {"exit_01": 0.5, "exit_03": 0.5, "final": 0.0}
    assert "at threshold 0.7" in " ".join(printed(found).split())


def test_with_too_few_sequences_the_answer_is_never_and_says_how_many_it_takes() -> None:
    found = calibration([0.0, 0.0], sequences=44)
    assert found.chosen.threshold is None
    assert (found.chosen.mean_layers, found.chosen.shares["final"]) == (4, 1.0)
    text = " ".join(printed(found).split())
    assert "No threshold can be certified" in text
    assert "45 sequences would certify it, and 44 were read" in text
    assert calibration([0.0, 0.0], sequences=45).chosen.threshold == 0.8


def test_a_risk_above_the_bound_is_not_blamed_on_the_number_of_sequences() -> None:
    text = " ".join(printed(calibration([0.3])).split())
    assert "the risk measured, 30.00%, is itself above the bound" in text
    assert "would certify" not in text


def test_the_table_fits_and_the_rows_hold_it_all() -> None:
    found = calibration([0.0, 0.01, 0.2])
    assert max(map(len, printed(found).splitlines())) <= 100
    first, *_, last = calibration_rows(found)
    assert (first["threshold"], first["certified"], first["mean_layers"]) == ("never", True, 4)
    assert (last["threshold"], last["certified"], last["risk"]) == (0.7, False, pytest.approx(0.2))
    assert last["share_exit_01"] == 0.5


def test_a_file_says_what_was_saved(tmp_path: Path) -> None:
    for found in (calibration([0.0, 0.2]), calibration([0.3])):
        found.save(tmp_path / "calibration.json")
        assert read_calibration(str(tmp_path)) == read_calibration(str(tmp_path / "calibration.json")) == found
        chosen = json.loads((tmp_path / "calibration.json").read_text())["chosen"]
        assert chosen["threshold"] == found.chosen.threshold


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"tests": [{}]}'])
def test_other_files_are_no_calibrations(text: str, tmp_path: Path) -> None:
    (tmp_path / "calibration.json").write_text(text)
    with pytest.raises(CheckpointError, match="is not what task=calibrate writes"):
        read_calibration(str(tmp_path))


@pytest.fixture
def trained(saved_run: Path) -> Path:
    (saved_run / "status.json").write_text('{"fingerprint": "abcdef"}')
    return saved_run


def generate(run: Path, given: Path, *overrides: str) -> list[str]:
    return ["task=generate", f"checkpoint={run}", f"exit_policy.calibration={given}", *overrides]


def test_decoding_takes_thresholds_and_exits_from_the_file(trained: Path, tmp_path: Path) -> None:
    model = trained_model(str(trained), "fp32")
    assert (model.fingerprint, model.step) == ("abcdef", 2)
    found = replace(calibration([0.0, 0.0, 0.3], model=model), active=[3])
    found.save(tmp_path / "calibration.json")
    policy = calibrated(compose(generate(trained, tmp_path)).exit_policy)
    assert (policy.kind, policy.threshold, policy.active) == ("max_probability", 0.8, [3])
    calibration([0.3], model=model).save(tmp_path / "calibration.json")
    assert calibrated(compose(generate(trained, tmp_path)).exit_policy).kind == "never"
    untouched = compose().exit_policy
    assert calibrated(untouched) is untouched


@pytest.mark.parametrize("change", [{"fingerprint": "012345"}, {"step": 4}, {"dtype": "bf16"}])
def test_another_models_calibration_is_refused_and_both_are_named(change: dict, trained: Path, tmp_path: Path) -> None:
    model = trained_model(str(trained), "fp32")
    other = replace(model, run="outputs/other", **change)
    calibration([0.0], model=other).save(tmp_path / "calibration.json")
    with pytest.raises(ConfigError) as raised:
        compose(generate(trained, tmp_path))
    (problem,) = raised.value.problems
    assert problem.path == "exit_policy.calibration"
    assert str(model) in problem.reason
    assert str(other) in problem.reason


def test_the_same_model_elsewhere_is_the_same(trained: Path, tmp_path: Path) -> None:
    calibration([0.0], model=replace(trained_model(str(trained), "fp32"), run="moved")).save(tmp_path / "calibration.json")
    compose(generate(trained, tmp_path))


def test_what_cannot_be_checked_is_refused(saved_run: Path, tmp_path: Path) -> None:
    for missing in (tmp_path / "nowhere.json", saved_run):
        with pytest.raises(ConfigError, match=r"exit_policy\.calibration"):
            compose(generate(saved_run, missing))
    calibration([0.0]).save(tmp_path / "calibration.json")
    with pytest.raises(ConfigError, match="names no fingerprint"):
        compose(generate(saved_run, tmp_path))


def test_a_calibration_goes_with_no_threshold_of_ones_own(trained: Path, tmp_path: Path) -> None:
    calibration([0.0], model=trained_model(str(trained), "fp32")).save(tmp_path / "calibration.json")
    with pytest.raises(ConfigError) as raised:
        compose(generate(trained, tmp_path, "exit_policy.threshold=0.5", "exit_policy.active=[1]"))
    assert {problem.path for problem in raised.value.problems} == {"exit_policy.threshold", "exit_policy.active"}

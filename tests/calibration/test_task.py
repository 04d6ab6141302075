"""`task=calibrate` through the command line, and decoding with what it wrote."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from eellm.calibration.result import read_calibration
from eellm.config.compose import compose
from eellm.errors import ConfigError
from tests import workers
from tests.calibration.recorded import generations
from tests.calibration.trained import LARGER_BATCHES, train_run
from tests.command_line import run_py


@pytest.mark.slow
def test_calibrate_then_generate(tmp_path: Path) -> None:
    (run,) = workers.run(1, train_run, str(tmp_path))
    calibrated = tmp_path / "calibrate"
    options = ["exit_policy.active=[2,3]", "calibration.batches=5", "calibration.thresholds=[0.9,[0.5,0.3],0.0]"]
    where = [f"checkpoint={run}", f"hydra.run.dir={calibrated}", "parallel=pp2"]
    result = run_py("task=calibrate", "calibration.epsilon=0.9", *options, *where, *LARGER_BATCHES, ranks=2)
    found = read_calibration(str(calibrated))
    assert (found.sequences, found.tokens, found.active) == (320, 320 * 32, [2, 3])
    assert found.model.fingerprint == json.loads((Path(run) / "status.json").read_text())["fingerprint"]
    assert found.model.step == 90
    assert found.chosen.threshold == 0.0, "nine tenths may differ"
    assert found.chosen.mean_layers == 2, "all leave at the first active exit"
    with (calibrated / "calibration.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["threshold"] for row in rows] == ["never", "0.9", "0.5 0.3", "0.0"]
    assert [row["certified"] for row in rows] == ["True"] * 4
    assert "p-value" in result.stdout
    assert max(map(len, result.stdout.splitlines()[:-1])) <= 100
    assert str(calibrated) in result.stdout.splitlines()[-1]
    decode = ["task=generate", f"exit_policy.calibration={calibrated}", "decoding.max_new_tokens=5"]
    (texts,) = workers.run(1, generations, [*decode, f"checkpoint={run}"], str(tmp_path / "generate"))
    for text in texts:  # the first token comes with the prompt, at full depth
        assert [token.exit_layer for token in text.tokens] == [4] + [2] * (len(text.tokens) - 1)
    with pytest.raises(ConfigError, match=r"step 90 in fp32 .* step 90 in bf16"):
        compose([*decode, f"checkpoint={run}", "precision=bf16"])

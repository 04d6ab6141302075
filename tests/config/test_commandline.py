"""Which arguments are values and which choose options."""

from __future__ import annotations

import pytest

from eellm.config.commandline import as_typed, forced


@pytest.mark.parametrize(
    "value",
    ["model.num_layers=4", "seed=3", "exits.layers=[1,2]", "unknown.key=1", "sede=1", 'decoding.prompts=["a=b"]', "name="],
)
def test_values_are_forced(value: str) -> None:
    assert forced([value]) == [f"++{value}"]
    assert as_typed(forced([value])[0]) == value


@pytest.mark.parametrize(
    "argument",
    ["model=tiny", "experiment=eellm_7b", "hydra/launcher=joblib", "hydra.run.dir=x", "++seed=1", "+a.b=1", "~optimizer.lr", "-m"]
    + ["--multirun", "--cfg", "job", "--config-dir", "/some/dir=x", "--help", "override/me@here=x"],
)
def test_everything_else_stays(argument: str) -> None:
    assert forced([argument]) == [argument]

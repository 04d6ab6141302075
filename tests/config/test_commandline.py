"""Which arguments are values and which choose options."""

from __future__ import annotations

import re

import pytest
from hydra.errors import MissingConfigException

from eellm.config.commandline import as_typed, explained, forced


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


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("hydra/sweeper/optuna", r"hydra/sweeper=optuna: .*\n    fix: install Hydra's plugin: pip install 'eellm\[sweeps\]'"),
        ("hydra/launcher/submitit_slurm", r"pip install 'eellm\[slurm\]'"),
        ("hydra/launcher/jolib", "choose one of basic, .*did you mean hydra/launcher=joblib"),
    ],
)
def test_a_missing_plugin_names_its_extra(option: str, words: str) -> None:
    error = MissingConfigException("missing", missing_cfg_file=option, options=["basic", "joblib"])
    assert re.search(words, str(explained(error)))

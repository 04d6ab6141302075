"""The suite's quick way to compose gives what Hydra gives, values and errors."""

from __future__ import annotations

import pytest
from hydra import initialize_config_dir
from omegaconf import OmegaConf

from eellm.config.commandline import CONF, composing_errors, forced
from tests import composing

COMMANDS = [
    [],
    ["task=train", "optimizer.lr=0.5", "exits.layers=[1,2]", "name=abc"],
    ["study=loss_weights", "seed=3", "loss_weights=warmup", "loss_weights.values=[0.1,0.2]"],
    ["experiment=pp2_laptop", "model.num_layers=12", "model.num_layers=6"],
    ["task=generate", "decoding.prompts=['a, b']", "decoding.stop=null", "decoding.unknown.deep=1"],
    ["task=train", "+exits.extra=1", "++model.rotary_scaling={kind: linear, factor: 2}"],
    ["task=train", "~exits.layers"],
    ["task=train", "exits={layers: [2]}"],
]
WRONG = [["exits.layers=[1,2"], ["optimizer.lr=0.1,0.2"], ["model=tinny"], ["task=train", "seed=${nowhere}"]]


def outcome(compose, overrides: list[str]) -> object:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        try:
            return OmegaConf.to_container(compose("config", forced(overrides)), resolve=True)
        except composing_errors() as error:
            return type(error), str(error)


@pytest.mark.parametrize("overrides", [*COMMANDS, *WRONG], ids=" ".join)
def test_it_gives_what_hydra_gives(overrides: list[str]) -> None:
    first = outcome(composing.compose, overrides)
    assert outcome(composing.compose, overrides) == first == outcome(composing.hydra_alone, overrides)
    assert isinstance(first, tuple) == (overrides in WRONG)


def test_what_one_test_sets_does_not_reach_the_next() -> None:
    plain = outcome(composing.compose, ["task=train"])
    outcome(composing.compose, ["task=train", "optimizer.lr=7"])
    assert outcome(composing.compose, ["task=train"]) == plain

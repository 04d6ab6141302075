"""The sweep that wandb leads: each of the commands that its agent would run composes."""

from __future__ import annotations

from itertools import zip_longest
from pathlib import Path
from typing import Any

import pytest
import yaml
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

from eellm.config.compose import compose
from eellm.metrics.names import describe

SWEEP = yaml.safe_load((Path(__file__).resolve().parents[2] / "experiments" / "wandb_sweep" / "sweep.yaml").read_text())


def command(values: dict[str, Any]) -> list[str]:
    """What the agent runs for these values: macros replaced as `wandb agent` does it."""
    macros = create_sweep_command_args({"args": {key: {"value": value} for key, value in values.items()}})
    macros |= {"env": ["/usr/bin/env"], "interpreter": ["python"]}
    words: list[str] = []
    for word in create_sweep_command(list(SWEEP["command"])):
        words += macros[word[2:-1]] if word.startswith("${") else [word]
    return words


def rounds() -> list[dict[str, Any]]:
    """Sets of values in which every value that the sweep offers occurs, and both ends of each range."""
    offered = {
        key: parameter.get("values") or [parameter["min"], parameter["max"]] for key, parameter in SWEEP["parameters"].items()
    }
    columns = zip_longest(*offered.values())
    return [
        {key: offered[key][-1] if value is None else value for key, value in zip(offered, row, strict=True)} for row in columns
    ]


@pytest.mark.parametrize("values", rounds(), ids=str)
def test_every_command_composes_and_carries_its_values(values: dict[str, Any]) -> None:
    start, interpreter, program, *overrides = command(values)
    assert (start, interpreter, program) == ("/usr/bin/env", "python", "run.py")
    config = compose(overrides)
    got = config.flat()
    for key, value in values.items():
        if key != "loss_weights":
            assert got[key] == (yaml.safe_load(value) if isinstance(value, str) else value), key
    assert config.loss_weights.kind == values["loss_weights"]
    assert config.logger.wandb.mode == "online"


def test_what_it_optimises_is_a_metric_of_a_run() -> None:
    assert describe(SWEEP["metric"]["name"]).direction == "lower"
    assert SWEEP["metric"]["goal"] == "minimize"

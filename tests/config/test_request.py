"""What a run reads is what may be typed for it."""

from __future__ import annotations

import pytest

from eellm.config.compose import compose
from eellm.config.request import Request, groups_from_checkpoint, read_values, unread_overrides, unread_with_the_choice
from eellm.config.schema import Config


@pytest.mark.parametrize(
    "overrides", [["task=train", "parallel=pp2"], ["task=generate"], ["task=plan"], ["task=train", "loss_weights=warmup"]]
)
def test_values_that_a_run_reads_are_those_that_may_be_typed(overrides: list[str]) -> None:
    config = compose(overrides)
    groups = {name: getattr(config, name) for name in Config.model_fields}
    read = read_values(config)
    for key, value in config.flat().items():
        group = key.partition(".")[0]
        if group in ("logger", *groups_from_checkpoint(config.task.name)):
            continue
        request = Request((f"{key}={value}",))
        refused = [*unread_overrides(config.task.name, request), *unread_with_the_choice(groups, request)]
        assert (key in read) == (not refused), key
        assert key not in read or read[key] == value


def test_what_a_checkpoint_brings_is_read_and_where_metrics_go_is_not() -> None:
    read = read_values(compose(["task=generate", "logger=wandb_offline"]))
    assert "model.num_layers" in read
    assert "exits.layers" in read
    assert not any(key.startswith(("logger", "trainer", "serve", "optimizer")) for key in read)

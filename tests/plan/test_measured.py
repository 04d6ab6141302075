"""The measured device profile: what was timed is what is planned, balanced and filled by; anything else is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from eellm.config.compose import compose
from eellm.config.schema import Config
from eellm.errors import ConfigError
from eellm.model.spec import build_layout, build_spec
from eellm.plan.case import Case
from eellm.plan.iteration import iterate, with_ratio
from eellm.plan.times import stages_of
from tests.plan.profiles import EMBEDDING, EXIT, FINAL, LAYER, RUN, VOCAB, profile_in


def measured(folder: Path, *overrides: str) -> Config:
    return compose([*overrides, "device_profile=measured", profile_in(folder)])


def test_a_step_is_made_of_what_was_timed(tmp_path: Path) -> None:
    """One stage: all microbatches after each other."""
    case = Case.of(measured(tmp_path, "task=plan", *RUN[1:], "exits.layers=[2,4]"), VOCAB)
    assert iterate(case, "one_f_one_b").timeline.time == 4 * (8 * sum(LAYER) + sum(EMBEDDING) + 2 * sum(EXIT) + sum(FINAL))


def test_stages_are_balanced_by_it(tmp_path: Path) -> None:
    """Of all splits the one whose slowest stage is lightest; the exit weighs more than a layer."""
    config = measured(tmp_path, *RUN, "parallel.pp=2", "parallel.layers_per_stage=balance", "exits.layers=[6]")
    spec = build_spec(config, VOCAB)
    stages = stages_of(config, spec, build_layout(config), "balance")
    loads = [
        sum(LAYER) * stage.num_layers
        + sum(EMBEDDING) * stage.has_embedding
        + sum(EXIT) * len(stage.exits)
        + sum(FINAL) * stage.has_final_head
        for stage in stages
    ]
    splits = [(count, 8 - count) for count in range(1, 8)]
    slowest = [max(3 * a + 0.75 + 3.5 * (a >= 6), 3 * b + 2.75 + 3.5 * (a < 6)) for a, b in splits]
    assert max(loads) == min(slowest)


def test_bubbles_are_filled_by_its_ratio(tmp_path: Path) -> None:
    """Deferred exits count as backward: r = (8 x 2 + .5 + 3.5) / (8 + .25), of which three bubbles hold 2 microbatches."""
    overrides = ("schedule=bubble_filling", "schedule.backward_forward_ratio=null", "parallel.pp=4", "exits.layers=[2]")
    config = measured(tmp_path, *RUN[:-1], "data.global_batch_size=64", *overrides)
    assert with_ratio(config, VOCAB).backward_forward_ratio == pytest.approx(20 / 8.25)
    with pytest.raises(ConfigError, match=r"global_batch_size=16: makes 4 microbatches, of which 4 would fill bubbles"):
        measured(tmp_path, *RUN, *overrides)
    given = compose([*RUN[:-1], "schedule=bubble_filling", "parallel.pp=4", "data.global_batch_size=64"])
    assert with_ratio(given, VOCAB).backward_forward_ratio == 2.0


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["data.micro_batch_size=2"], r"device_profile.path.*timed with micro_batch=4, not micro_batch=2"),
        (["exits.head=mlp"], r"device_profile.path.*no time of a head `mlp`, only of: final, norm"),
    ],
)
def test_what_was_not_timed_is_refused(overrides: list[str], words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        measured(tmp_path, "task=plan", *RUN[1:], *overrides)


def test_where_there_is_no_profile(tmp_path: Path) -> None:
    for override in ((), (f"device_profile.path={tmp_path / 'none'}",)):
        with pytest.raises(ConfigError, match=r"device_profile.path.*task=benchmark benchmark=planner"):
            compose(["task=plan", "device_profile=measured", *override])
    with pytest.raises(ConfigError, match=r"device_profile=h100.*task=train reads it where something is left to it"):
        compose(["task=train", "device_profile=h100"])

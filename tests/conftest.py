"""Fixtures for all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import hydra
import pytest

from eellm.config.compose import compose, to_yaml
from eellm.manifest import write_manifest
from tests import composing

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True, scope="session")
def options_are_composed_once() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hydra, "compose", composing.compose)
        yield


@pytest.fixture(autouse=True)
def same_environment() -> Iterator[None]:
    """Ranks are told their place through the environment: none of it may reach the next test."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def saved_run(tmp_path: Path) -> Path:
    """A run directory as training leaves it, as far as configs are concerned: exits after 1 and 3 of 4 layers."""
    overrides = ("model.num_layers=4", "exits.layers=[1,3]", "data.sequence_length=64", "tokenizer.vocab_size=512")
    return save_run(tmp_path / "outputs" / "train" / "default" / "2026-01-31_12-00-00", *overrides)


def save_run(run: Path, *overrides: str) -> Path:
    """As `saved_run`, of any model."""
    (run / "checkpoints" / "step_0000002").mkdir(parents=True)
    write_manifest(run / "checkpoints" / "step_0000002")
    (run / "config.yaml").write_text(_saved_yaml(*overrides))
    return run


@cache
def _saved_yaml(*overrides: str) -> str:
    return to_yaml(compose(["task=train", *overrides]))

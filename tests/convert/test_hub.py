"""A name that is no path is one of the hub: what it gives is what a folder of the same files gives."""

from __future__ import annotations

import fnmatch
import shutil
from pathlib import Path

import pytest
import torch

from eellm.errors import ConversionError
from eellm.mcore.whole_tensors import read_checkpoint
from tests.convert.conversions import imported
from tests.convert.hugging_face import save


def test_a_name_is_fetched_file_by_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save("qwen2", tmp_path / "there")
    asked: list[tuple[str, list[str]]] = []

    def snapshot_download(name: str, allow_patterns: list[str]) -> str:
        """The hub's: a folder of those files that a pattern names."""
        asked.append((name, allow_patterns))
        here = tmp_path / "cache"
        here.mkdir(exist_ok=True)
        for file in (tmp_path / "there").iterdir():
            if any(fnmatch.fnmatch(file.name, pattern) for pattern in allow_patterns):
                shutil.copy(file, here / file.name)
        return str(here)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    imported("somebody/qwen", tmp_path / "by_name")
    imported(tmp_path / "there", tmp_path / "by_path")
    by_name, by_path = (read_checkpoint(tmp_path / run / "checkpoints" / "step_0000000") for run in ("by_name", "by_path"))
    assert set(by_name) == set(by_path)
    assert all(torch.equal(by_name[name].read(), tensor.read()) for name, tensor in by_path.items())
    assert {name for name, _ in asked} == {"somebody/qwen"}
    assert asked[0][1] == ["config.json"], "the shape is known before any weight is fetched"


def test_a_hub_that_cannot_be_reached_is_an_error_with_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot_download(name: str, allow_patterns: list[str]) -> str:
        raise OSError("no route to host")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(ConversionError, match=r"somebody/qwen.*hub.*no route to host"):
        imported("somebody/qwen", tmp_path / "run")
    assert not (tmp_path / "run").exists()

"""Checkpoints that are not what they should be, and writes that fail: one message on every rank, nothing lost."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from eellm.config.compose import compose
from eellm.manifest import MANIFEST, write_manifest
from eellm.rundir import RunDirectory, step_name
from eellm.train.checkpoints import keep_newest
from tests import workers
from tests.train.fitting import train
from tests.train.saved_states import interrupted_write, refusal, save_initial, whole_tensors

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def saved(folder: Path) -> Path:
    target = folder / "runs" / "checkpoints" / "step_0000001"
    workers.run(1, save_initial, [], str(folder / "cache"), str(target))
    return target


def said(saved: Path, folder: Path, overrides: list[str]) -> str:
    """What both ranks of a pipeline say."""
    answers = set(workers.run(2, refusal, ["parallel=pp2", *overrides], str(folder / "cache"), str(saved)))
    assert len(answers) == 1, answers
    return answers.pop()


def test_another_model(saved: Path, folder: Path) -> None:
    exits = ["exits.head=norm", "exits.tie_output=true"]
    assert said(saved, folder, []) == "loaded"
    for overrides, words in (
        (["model.num_layers=6"], "is of another model: looked for layers.5."),
        (
            ["model.num_layers=2", "exits.layers=[1]", "exits.head=embedding", "exits.tie_output=true"],
            "it also has heads.exit_02.",
        ),
        (["exits.layers=[1,3]", *exits], "is of another model: looked for heads.exit_01.norm.weight"),
        (["model.ffn_hidden_size=192"], "tensors differ in shape: "),
        (["optimizer=sgd"], "looked for optimizer.state.momentum_buffer."),
    ):
        assert words in said(saved, folder, overrides), overrides


def test_a_broken_file_that_the_manifest_does_not_show(saved: Path, folder: Path) -> None:
    """Sizes are right: only reading finds out."""
    for name in (".metadata", "__0_0.distcp"):
        copy = folder / "copies" / f"step_{name.strip('._')}"
        shutil.copytree(saved, copy)
        size = (copy / name).stat().st_size
        (copy / name).write_bytes(bytes(size))
        assert said(copy, folder, []).startswith(f"cannot load the checkpoint {copy}: "), name
    (copy / name).write_bytes(b"")
    assert f"{copy / name} has 0 bytes instead of {size}" in said(copy, folder, [])
    (copy / MANIFEST).unlink()
    assert "not a whole checkpoint of eellm" in said(copy, folder, [])


def test_a_killed_background_write_leaves_nothing_under_the_checkpoints_name(saved: Path, folder: Path) -> None:
    target = folder / "killed" / "checkpoints" / "step_0000003"
    (target.parent / "step_0000002.partial").mkdir(parents=True)
    (target.parent / "step_0000001").mkdir()
    [(told, while_writing)] = workers.run(1, interrupted_write, [], str(folder / "cache"), str(target))
    assert while_writing == ["step_0000001", "step_0000003.partial"], "stale ones are cleaned, whole ones stay"
    assert told.startswith(f"cannot write {target}.partial: ")
    assert sorted(path.name for path in target.parent.iterdir()) == ["step_0000001"]


def test_written_in_the_background_it_holds_the_steps_own_values(saved: Path, folder: Path) -> None:
    """Training goes on while a checkpoint is written: what is in it must be of its step."""
    runs = {}
    for name, overrides in {"sync": [], "async": ["trainer.checkpoint_async=true"]}.items():
        run = folder / name
        every = ["trainer.checkpoint_every=1", "trainer.max_steps=3", "trainer.keep_checkpoints=2", "trainer.val_every=0"]
        result = workers.run(2, train, ["parallel=pp2", *every, *overrides], str(run))[0]
        assert result["checkpoints"] == ["step_0000002", "step_0000003"]
        runs[name] = [whole_tensors(run / "checkpoints" / step, folder) for step in result["checkpoints"]]
    for expected, actual in zip(*runs.values(), strict=True):
        assert set(expected) == set(actual)
        assert all(torch.equal(expected[name], actual[name]) for name in expected)
    assert not torch.equal(runs["sync"][0]["layers.1.mlp.linear_fc1.weight"], runs["sync"][1]["layers.1.mlp.linear_fc1.weight"])


def test_retention_keeps_the_newest_and_drops_an_abandoned_future(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    for step in (1, 2, 3, 4, 9):
        (run.checkpoints / step_name(step)).mkdir(parents=True)
        write_manifest(run.checkpoints / step_name(step))
    keep_newest(run.checkpoints / step_name(4), 2)
    assert [path.name for path in run.steps()] == [step_name(3), step_name(4)]


def test_the_option_is_off_unless_asked_for() -> None:
    assert not compose().trainer.checkpoint_async


def test_the_manifest_lists_every_file(saved: Path) -> None:
    files = {path.name: path.stat().st_size for path in saved.iterdir() if path.name != MANIFEST}
    assert json.loads((saved / MANIFEST).read_text())["files"] == files
    assert {"metadata.json", ".metadata", "__0_0.distcp"} <= set(files)

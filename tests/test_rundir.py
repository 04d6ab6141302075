"""The run directory: made once, found again, resumed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from eellm.config.compose import compose, from_yaml
from eellm.errors import CheckpointError
from eellm.manifest import MANIFEST, write_manifest
from eellm.resume import open_run
from eellm.rundir import RunDirectory, locate, step_name, unfinished, whole_checkpoint


def checkpoint(run: RunDirectory, step: int) -> Path:
    """As small as a whole checkpoint can be."""
    folder = run.checkpoints / step_name(step)
    folder.mkdir(parents=True)
    (folder / "__0_0.distcp").write_bytes(b"weights")
    write_manifest(folder)
    return folder


def new(path: Path, fingerprint: str = "f", state: str = "failed", steps: tuple[int, ...] = ()) -> RunDirectory:
    run = RunDirectory.create(path, "name: x\n", ["seed=1"], fingerprint)
    for step in steps:
        checkpoint(run, step)
    run.write_status(state)  # type: ignore[arg-type]
    return run


def test_a_new_run_says_what_it_is(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "a", "name: x\n", ["seed=1", "exits.layers=[1,2]"], "f1")
    assert run.config.read_text() == "name: x\n"
    assert run.overrides.read_text() == "seed=1\nexits.layers=[1,2]\n"
    status = run.status()
    assert (status["state"], status["error"], status["fingerprint"]) == ("running", None, "f1")
    run.write_status("failed", "out of memory")
    assert run.status()["error"] == "out of memory"
    assert run.status()["started"] == status["started"]


def test_two_runs_never_share_a_directory(tmp_path: Path) -> None:
    assert [new(tmp_path / "a").path.name for _ in range(3)] == ["a", "a_2", "a_3"]


def test_checkpoints_in_order_without_the_unfinished(tmp_path: Path) -> None:
    run = new(tmp_path / "a", steps=(200, 1000, 12345678))
    (run.checkpoints / "step_0002000.tmp").mkdir()
    assert [path.name for path in run.steps()] == ["step_0000200", "step_0001000", "step_12345678"]
    assert RunDirectory(tmp_path / "b").steps() == []


@pytest.mark.parametrize(
    ("below", "step"), [("", "step_0000400"), ("checkpoints", "step_0000400"), ("checkpoints/step_0000200", "step_0000200")]
)
def test_locate(tmp_path: Path, below: str, step: str) -> None:
    made = new(tmp_path / "a", steps=(200, 400))
    run, found = locate(str(made.path / below))
    assert run == made
    assert found == made.checkpoints / step


def test_locate_says_what_it_looked_for_and_found(tmp_path: Path) -> None:
    (tmp_path / "something").mkdir()
    with pytest.raises(CheckpointError, match=r"looked for .*config\.yaml, found something"):
        locate(str(tmp_path))
    with pytest.raises(CheckpointError, match="no such directory"):
        locate(str(tmp_path / "nowhere"))
    assert locate(str(new(tmp_path / "fresh").path))[1] is None


def test_unfinished_is_the_newest_that_can_go_on(tmp_path: Path) -> None:
    new(tmp_path / "0", steps=(1,))
    expected = new(tmp_path / "1", steps=(1,))
    new(tmp_path / "2", steps=(1,), state="done")
    new(tmp_path / "3", steps=(1,), fingerprint="other")
    new(tmp_path / "4")
    assert unfinished(tmp_path, "f") == (expected, f"5 runs in {tmp_path} (1 of other values, 1 done, 1 without a checkpoint)")
    assert unfinished(tmp_path, "unheard of") == (None, f"5 runs in {tmp_path} (5 of other values)")


def test_resume_auto_starts_fresh_and_then_continues(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    config = compose(["task=train", "resume=auto"])
    first_config, first = open_run(config, tmp_path / "1", ["task=train", "resume=auto"])
    assert first_config.resume is None
    assert capsys.readouterr().out == (
        f"resume=auto: looked for an unfinished run of these values among 0 runs in {tmp_path}: starting a new run\n"
    )
    first.write_status("preempted", "interrupted")
    checkpoint(first, 1)
    longer = compose(["task=train", "resume=auto", "trainer.val_every=9"])
    again_config, again = open_run(longer, tmp_path / "2", ["task=train", "resume=auto", "trainer.val_every=9"])
    assert again == first
    assert capsys.readouterr().out.endswith(f"among 1 runs in {tmp_path}: going on with {first.path}\n")
    assert again_config.resume == str(first.path)
    assert not (tmp_path / "2").exists()
    assert from_yaml(again.config.read_text()).trainer.val_every == 9
    assert again.overrides.read_text().splitlines()[-1] == "trainer.val_every=9"
    _, other = open_run(compose(["task=train", "resume=auto", "seed=5"]), tmp_path / "3", [])
    assert other.path.name == "3"


def test_resuming_needs_a_checkpoint(saved_run: Path, tmp_path: Path) -> None:
    config = compose(["task=train", f"resume={saved_run}"])
    opened, run = open_run(config, tmp_path / "new", [])
    assert (opened.resume, run.path) == (str(saved_run), saved_run)
    shutil.rmtree(saved_run / "checkpoints" / "step_0000002")
    with pytest.raises(CheckpointError, match=r"no checkpoint: looked for .*step_.*, found nothing"):
        open_run(config, tmp_path / "new", [])


BROKEN = {
    "cut": (lambda step: (step / "__0_0.distcp").write_bytes(b"weig"), "__0_0.distcp has 4 bytes instead of 7"),
    "empty": (lambda step: (step / "__0_0.distcp").write_bytes(b""), "__0_0.distcp has 0 bytes instead of 7"),
    "lost": (lambda step: (step / "__0_0.distcp").unlink(), "looked for .*__0_0.distcp, found eellm.json"),
    "manifest": (lambda step: (step / MANIFEST).write_text('{"form'), "eellm.json cannot be read"),
    "foreign": (lambda step: (step / MANIFEST).unlink(), "not a whole checkpoint of eellm: looked for .*eellm.json, found __0_0"),
    "format": (
        lambda step: (step / MANIFEST).write_text(json.dumps({"format": 99, "files": {}})),
        "says format 99; .* reads format",
    ),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_checkpoint_is_refused_and_the_whole_one_before_it_named(how: str, tmp_path: Path) -> None:
    run = new(tmp_path / "a", steps=(100, 200, 300, 400))
    damage, words = BROKEN[how]
    older, *_, newest = run.steps()
    damage(newest)
    damage(run.steps()[-2])
    shutil.rmtree(older)
    with pytest.raises(
        CheckpointError, match=rf"resume={run.path}: .*{words}.* before it: resume={run.checkpoints}/step_0000200$"
    ):
        whole_checkpoint("resume", str(run.path))
    assert whole_checkpoint("resume", f"{run.checkpoints}/step_0000200")[1].name == "step_0000200"
    damage(run.checkpoints / "step_0000200")
    with pytest.raises(CheckpointError, match="No older checkpoint is whole"):
        whole_checkpoint("checkpoint", str(run.path))


def test_a_file_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "model.pt").write_bytes(b"PK")
    with pytest.raises(CheckpointError, match=r"model\.pt: it is a file\. Give a run directory"):
        whole_checkpoint("checkpoint", str(tmp_path / "model.pt"))


def test_resume_auto_passes_over_folders_that_are_no_runs(tmp_path: Path) -> None:
    expected = new(tmp_path / "run", steps=(1,))
    for name, status in (("cut", '{"state": "run'), ("other", "[]")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "status.json").write_text(status)
    assert unfinished(tmp_path, "f")[0] == expected

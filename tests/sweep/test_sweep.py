"""Sweeps: a folder a job by fingerprint, what is done is skipped, what failed is run again, nothing stops the others."""

from __future__ import annotations

import multiprocessing
import shutil
import threading
import time
from pathlib import Path

import pytest
import yaml

from eellm.config.compose import compose, from_yaml
from eellm.config.fingerprint import run_fingerprint
from eellm.config.schema import Config
from eellm.errors import RankFailure
from eellm.rundir import RunDirectory
from eellm.sweep import ledger
from eellm.sweep.job import run_unless_done, sole_writer
from tests.sweep.sweeps import SMALL, Sweeps, last_lines, parabola, parabola_at
from tests.test_rundir import checkpoint


@pytest.fixture
def sweeps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Sweeps:
    return Sweeps(monkeypatch, tmp_path, parabola)


def rates(configs: list[Config]) -> list[float]:
    return [config.optimizer.lr for config in configs]


def test_a_sweep_has_a_folder_for_each_config_and_skips_what_is_done(sweeps: Sweeps, capsys: pytest.CaptureFixture) -> None:
    assert sweeps(*SMALL, "optimizer.lr=0.1") == 0
    fingerprint = run_fingerprint(compose(["task=train", "optimizer.lr=0.1"]))
    assert {name: opened.final_scalars() for name, opened in sweeps.runs().items()} == {fingerprint: parabola_at(0.1)}
    assert last_lines(capsys.readouterr().out) == "1 job in multirun/s: 1 done\n"
    assert sweeps(*SMALL, "optimizer.lr=0.1,0.2", "logger=csv") == 0
    assert rates(sweeps.seen) == [0.2]
    assert last_lines(capsys.readouterr().out) == "2 jobs in multirun/s: 1 done, 1 skipped (done before)\n"
    assert len(sweeps.runs()) == 2
    assert not list((sweeps.folder / "multirun" / "s").glob(".sweep_*"))


def test_failures_stop_nobody_and_are_summed_up(sweeps: Sweeps, capsys: pytest.CaptureFixture) -> None:
    """One whose config is refused, one whose rank was killed, one with a bug, each in a batch of its own."""

    def task(config: Config, opened: RunDirectory) -> dict[str, float]:
        if config.optimizer.lr == 0.2:
            raise RankFailure("rank 1 ended without a report (killed by SIGKILL); out of memory is the usual reason")
        if config.optimizer.lr == 0.3:
            raise KeyError("a bug")
        return parabola(config, opened)

    sweeps.task = task
    assert sweeps(*SMALL, "optimizer.lr=-1,0.2,0.3,0.4", "hydra.sweeper.max_batch_size=1") == 1
    assert sweeps.states() == ["done", "failed", "failed"]
    failed = next(path for path, opened in sweeps.runs().items() if "SIGKILL" in str(opened.status()["error"]))
    written = capsys.readouterr()
    assert written.err.count("SIGKILL") == 1
    assert "Traceback" in written.err  # of the bug
    said = last_lines(written.out).splitlines()
    assert max(map(len, said)) <= 100
    assert said[0] == "4 jobs in multirun/s: 1 done, 3 failed"
    assert said[1] == "  job 0, refused: optimizer.lr=-1"
    assert said[2].startswith("    1 problem in the configuration: optimizer.lr=-1")
    assert f"  job 1, multirun/s/{failed}: optimizer.lr=0.2" in said
    assert "    rank 1 ended without a report (killed by SIGKILL); out of memory is the usual reason" in said
    assert "    KeyError: 'a bug'" in said
    sweeps.task = parabola
    assert sweeps(*SMALL, "optimizer.lr=0.2,0.4") == 0
    assert rates(sweeps.seen) == [0.2]


def test_what_is_typed_replaces_a_studys_parameter(sweeps: Sweeps) -> None:
    assert sweeps("study=loss_weights", "loss_weights.values=0.25", "seed=3") == 0
    assert [(config.loss_weights.values, config.seed) for config in sweeps.seen] == [(0.25, 3)]


def test_resume_is_no_business_of_a_sweeps_command(sweeps: Sweeps, capsys: pytest.CaptureFixture) -> None:
    assert sweeps(*SMALL, "resume=outputs/train/s/some") == 1
    assert "every job of a sweep has a folder of its own" in capsys.readouterr().err


def test_what_has_a_checkpoint_goes_on_and_what_has_none_begins_anew(sweeps: Sweeps) -> None:
    config, opened = compose(["task=train", "resume=auto"]), RunDirectory(sweeps.folder / "run")

    def again() -> str | None:
        """What the task is told to resume from."""
        assert run_unless_done(config, opened, ["task=train"]) == (parabola(config, opened), "done")
        return sweeps.seen[-1].resume

    assert again() is None
    assert run_unless_done(config, opened, ["task=train"]) == (parabola(config, opened), "skipped")
    opened.write_status("running")  # and then it was killed
    opened.metrics.write_text("stale\n")
    assert again() is None
    assert not opened.metrics.exists()
    opened.write_status("preempted", "interrupted (SIGUSR1)")
    opened.metrics.write_text("of the steps so far\n")
    whole, cut = checkpoint(opened, 1), checkpoint(opened, 2)
    (cut / "__0_0.distcp").write_bytes(b"cut")
    assert again() == str(whole)
    assert opened.metrics.exists()
    assert from_yaml(opened.config.read_text()).resume is None
    assert opened.overrides.read_text() == "task=train\n"
    opened.final_metrics.write_text('{"cut')  # done, but without a result
    assert again() == str(whole)


def changed(config: Config, key: str, value: object) -> Config:
    """Another value of a dotted key."""
    dump = node = config.model_dump()
    *groups, name = key.split(".")
    for group in groups:
        node = node[group]
    assert node[name] != value
    node[name] = value
    return Config.model_validate(dump)


def test_the_runs_fingerprint_follows_what_changes_a_result_and_nothing_else() -> None:
    config = compose(["task=train"])
    result = {
        "seed": 2,
        "parallel.pp": 2,
        "device": "cpu",
        "data.micro_batch_size": 1,
        "decoding.mode": "full",
        "debug.overfit": True,
    }
    for key, value in result.items():
        assert run_fingerprint(changed(config, key, value)) != run_fingerprint(config), key
    none = {"name": "other", "study": {"name": "x"}, "logger.wandb.mode": "offline", "objective": ["a", "b"], "resume": "auto"}
    none |= {"data.cache_dir": "elsewhere", "data.num_workers": 1, "debug.timeline": True, "debug.profile": True}
    none |= {"trainer.progress": "none", "trainer.checkpoint_every": 7, "trainer.keep_checkpoints": 9}
    for key, value in none.items():
        assert run_fingerprint(changed(config, key, value)) == run_fingerprint(config), key


def test_the_model_that_comes_along_is_the_same_wherever_it_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = run_fingerprint(compose(["task=evaluate", "checkpoint=reference"]))
    elsewhere = tmp_path / "run"
    shutil.copytree(Path(compose(["task=evaluate"]).checkpoint or ""), elsewhere)
    copied = compose(["task=evaluate", f"checkpoint={elsewhere}"])
    assert run_fingerprint(copied) != here
    monkeypatch.setattr("eellm.config.fingerprint.reference_run", lambda: elsewhere)
    assert run_fingerprint(copied) == here


def hold(path: Path, held: multiprocessing.synchronize.Event, let_go: multiprocessing.synchronize.Event) -> None:
    with sole_writer(RunDirectory(path)):
        held.set()
        let_go.wait(20)


def test_two_jobs_of_the_same_values_take_turns(sweeps: Sweeps, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """The second waits for the first, and takes its result; a process that dies lets go."""
    config, opened = compose(["task=train"]), RunDirectory(tmp_path / "run")
    context = multiprocessing.get_context("spawn")
    held, let_go = context.Event(), context.Event()
    other = context.Process(target=hold, args=(opened.path, held, let_go))
    other.start()
    assert held.wait(20)
    results: list[tuple] = []
    waits = [threading.Thread(target=lambda: results.append(run_unless_done(config, opened, []))) for _ in range(2)]
    for thread in waits:
        thread.start()
    time.sleep(0.3)
    assert results == []
    other.kill()
    for thread in waits:
        thread.join(20)
    other.join()
    assert sorted(state for _, state in results) == ["done", "skipped"]
    assert results[0][0] == results[1][0]
    assert f"process {other.pid} on" in capsys.readouterr().out


def test_a_job_that_was_killed_with_its_process_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    book = ledger.Ledger()
    book.folder = tmp_path / "multirun" / "s" / ".sweep"
    book.note(ledger.Entry(0, ["seed=1", "task=train"], "done", str(tmp_path / "multirun" / "s" / "a")))
    book.note(ledger.Entry(1, ["seed=2", "task=train"], folder=str(tmp_path / "multirun" / "s" / "b")))
    said = ledger.summary(book.close(), tmp_path / "multirun" / "s")
    assert said.splitlines()[:2] == [
        "2 jobs in multirun/s: 1 done, 1 without an end (killed, or still running elsewhere)",
        "  job 1, multirun/s/b: seed=2",
    ]
    assert not book.folder.exists()


def test_optuna_finds_the_front_of_two_objectives_and_skips_its_trials_too(sweeps: Sweeps, capsys: pytest.CaptureFixture) -> None:
    """The best loss is not the best speed. One trial fails, and is the only one that is run when the search is repeated."""
    failing: list[float] = []

    def task(config: Config, opened: RunDirectory) -> dict[str, float]:
        if len(sweeps.seen) == 2:
            failing.append(config.optimizer.lr)
            raise KeyError("a bug")
        return parabola(config, opened)

    sweeps.task = task
    command = (*SMALL, "hydra/sweeper=speed_quality", "objective=[val/loss/final,speed]", "optimizer.lr=interval(0.05,0.9)")
    command = (*command, "hydra.sweeper.n_trials=4", "hydra.sweeper.max_failure_rate=1")
    assert sweeps(*command) == 1
    assert "4 jobs in multirun/s: 3 done, 1 failed" in capsys.readouterr().out
    points = [opened.final_scalars() or {} for opened in sweeps.runs().values() if opened.status()["state"] == "done"]
    front = [
        one["speed"]
        for one in points
        if not any(other["speed"] > one["speed"] and other["val/loss/final"] < one["val/loss/final"] for other in points)
    ]
    results = yaml.safe_load((sweeps.folder / "multirun" / "s" / "optimization_results.yaml").read_text())
    assert sorted(solution["values"][1] for solution in results["solutions"]) == sorted(front)
    sweeps.task = parabola
    assert sweeps(*command) == 0
    assert rates(sweeps.seen) == failing


def test_a_search_is_told_what_it_lacks(sweeps: Sweeps, capsys: pytest.CaptureFixture) -> None:
    search = (*SMALL, "hydra/sweeper=speed_quality", "hydra.sweeper.n_trials=1", "optimizer.lr=0.1")
    assert sweeps(*search) == 1
    assert "the sweeper has 2 directions, for 1 metrics" in capsys.readouterr().err
    assert sweeps(*search, "objective=[val/loss/final,quality]") == 1
    assert "objective=quality: task=train has no such metric. It has: speed, val/loss/final" in capsys.readouterr().err

import logging
import math

import pytest

from eellm.metrics.recorder import open_recorder
from eellm.metrics.rows import read_rows
from eellm.metrics.wandb_sink import WandbSink, has_credentials
from tests.metrics.example_config import example_config
from tests.metrics.wandb_file import read_offline_run

wandb = pytest.importorskip("wandb")
OFFLINE = {"logger.wandb.mode": "offline"}


@pytest.fixture(autouse=True)
def no_credentials(monkeypatch, tmp_path):
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))


def test_an_offline_run_reads_back(tmp_path):
    config = example_config(OFFLINE)
    recorder = open_recorder(config, tmp_path, True)
    for step in (10, 20):
        recorder.log(step, {"train/loss/exit_02": 3.0 / step, "train/loss/final": 2.0 / step, "train/grad_norm": math.nan})
    recorder.log(20, {"val/loss/exit_02": 3.5, "val/loss/final": 3.25})
    recorder.table("speed_quality", [{"threshold": 0.8, "speedup": 1.25, "accuracy": None}, {"threshold": 0.9, "speedup": 1.0}])
    recorder.html("report", "<h1>report</h1>")
    recorder.close({"val/loss/final": 3.25}, "done")

    run = read_offline_run(tmp_path)
    steps = [row for row in run.history if "train/loss/final" in row]
    assert [(row["step"], row["train/loss/exit_02"], row["train/loss/final"]) for row in steps] == [
        (10, 0.3, 0.2),
        (20, 0.15, 0.1),
    ]
    assert all(math.isnan(row["train/grad_norm"]) for row in steps)
    assert [row["val/loss/exit_02"] for row in run.history if "val/loss/exit_02" in row] == [3.5]
    flat = config.flat()
    assert {key: value for key, value in run.config.items() if not key.startswith("_wandb")} == flat
    assert flat["model.num_layers"] == 8
    assert flat["logger.wandb.mode"] == "offline"
    assert (run.run.run_group, run.run.job_type, list(run.run.tags), run.run.project) == (
        "example",
        "quickstart",
        ["test"],
        "eellm",
    )
    table = run.table("tables/speed_quality")
    assert table["columns"] == ["threshold", "speedup", "accuracy"]
    assert table["data"] == [[0.8, 1.25, None], [0.9, 1.0, None]]
    assert (run.summary["val/loss/final"], run.summary["status"], run.exit_code) == (3.25, "done", 0)
    page = next((run.folder / "files" / "media" / "html").rglob("*.html"))
    assert page.read_text() == "<h1>report</h1>"
    defined = {metric.name or metric.glob_name: metric for metric in run.metrics}
    assert defined["*"].step_metric == "step"
    assert "step" in defined


def test_all_heads_are_on_one_chart(tmp_path):
    recorder = open_recorder(example_config(OFFLINE), tmp_path, True)
    for step in (1, 2):
        recorder.log(step, {"val/loss/exit_02": 4.0 - step, "val/loss/final": 3.0 - step})
    recorder.close({}, "done")
    table = read_offline_run(tmp_path).table("charts/val_loss_table")
    points = {tuple(row) for row in table["data"]}
    assert points == {(1, "exit_02", 3.0), (2, "exit_02", 2.0), (1, "final", 2.0), (2, "final", 1.0)}


def test_a_reopened_directory_is_the_same_wandb_run(tmp_path):
    seen = []
    for step in (1, 2):
        recorder = open_recorder(example_config(OFFLINE), tmp_path, True)
        recorder.log(step, {"train/lr": 0.1})
        recorder.close({}, "failed")
        seen.append(read_offline_run(tmp_path))
    assert seen[0].run.run_id == seen[1].run.run_id == (tmp_path / "wandb" / "run_id.txt").read_text().strip()
    assert seen[0].exit_code == 1
    assert seen[0].summary["status"] == "failed"


def test_a_study_is_the_group_unless_one_is_named(tmp_path):
    for name, overrides, group in (("a", {"study": {"name": "s"}}, "s"), ("b", {"logger.wandb.group": "g"}, "g")):
        (tmp_path / name).mkdir()
        open_recorder(example_config({**OFFLINE, **overrides}), tmp_path / name, True).close({}, "done")
        assert read_offline_run(tmp_path / name).run.run_group == group


def test_online_without_a_key_warns_and_goes_offline_without_asking(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("wandb asked for something"))
    assert not has_credentials()
    with caplog.at_level(logging.WARNING):
        recorder = open_recorder(example_config({"logger.wandb.mode": "online"}), tmp_path, True)
    recorder.log(1, {"train/lr": 0.5})
    recorder.close({}, "done")
    assert "no API key" in caplog.text
    assert [row["train/lr"] for row in read_offline_run(tmp_path).history if "train/lr" in row] == [0.5]


def test_credentials_are_found_in_the_environment_and_in_netrc(tmp_path, monkeypatch):
    host = wandb.setup().settings.base_url.split("//")[1].split("/")[0]
    netrc = tmp_path / "netrc"
    netrc.write_text("machine elsewhere.example login user password abc\n")
    monkeypatch.setenv("NETRC", str(netrc))
    assert not has_credentials()
    netrc.write_text(f"machine {host} login user password {'a' * 40}\n")
    assert has_credentials()
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    assert has_credentials()


class Refusing:
    """A wandb run of which every use raises."""

    def __getattr__(self, name):
        raise RuntimeError("the service is gone")


def test_a_failing_wandb_is_reported_once_and_stops_nothing(tmp_path, monkeypatch, caplog):
    recorder = open_recorder(example_config(OFFLINE), tmp_path, True)
    sink = next(sink for sink in recorder._sinks if isinstance(sink, WandbSink))
    sink._run.finish()
    sink._run = Refusing()
    with caplog.at_level(logging.WARNING):
        for step in range(3):
            recorder.log(step, {"train/lr": 0.1})
        recorder.table("exits", [{"head": "final"}])
        recorder.html("report", "<p>")
        recorder.close({"train/lr": 0.1}, "done")
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [0, 1, 2]
    assert sum("wandb failed" in record.message for record in caplog.records) == 1


def test_a_wandb_that_cannot_start_stops_nothing(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(wandb, "init", lambda **_: (_ for _ in ()).throw(OSError("no space left")))
    with caplog.at_level(logging.WARNING):
        recorder = open_recorder(example_config(OFFLINE), tmp_path, True)
        recorder.log(1, {"train/lr": 0.1})
        recorder.close({}, "done")
    assert "no space left" in caplog.text
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1]


def test_an_unreachable_server_falls_back_to_offline(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    real = wandb.init

    def unreachable(**options):
        if options["mode"] == "online":
            raise wandb.errors.CommError("no network")
        return real(**options)

    monkeypatch.setattr(wandb, "init", unreachable)
    recorder = open_recorder(example_config({"logger.wandb.mode": "online"}), tmp_path, True)
    recorder.log(1, {"train/lr": 0.5})
    recorder.close({}, "done")
    assert "no network" in caplog.text
    assert [row["train/lr"] for row in read_offline_run(tmp_path).history if "train/lr" in row] == [0.5]

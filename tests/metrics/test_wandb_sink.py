import base64
import logging
import math

import pytest

from eellm.config.request import read_values
from eellm.metrics.recorder import open_recorder
from eellm.metrics.rows import read_rows
from eellm.metrics.wandb_sink import SCATTERS, WandbSink, _thinned, has_credentials
from tests.metrics.example_config import example_config
from tests.metrics.wandb_file import read_offline_run, records

wandb = pytest.importorskip("wandb")
OFFLINE = {"logger.wandb.mode": "offline"}
TYPED = ["study=s", "loss_weights.values=0.5", "exits.layers=[2,4]", "logger=wandb_offline", "seed=3"]
PAGE = b"<b>token</b>"
PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg=="  # one black dot
)


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
    assert {key: value for key, value in run.config.items() if not key.startswith("_wandb")} == read_values(config)
    assert run.config["model.num_layers"] == 8
    assert not any(isinstance(value, dict) for key, value in run.config.items() if not key.startswith("_wandb"))
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


def test_a_log_that_is_still_being_written_reads_up_to_what_is_whole(shown):
    data = next(shown.folder.glob("run-*.wandb")).read_bytes()
    whole = list(records(data))
    lengths = [len(list(records(data[:end]))) for end in range(0, len(data), 7)]
    assert lengths == sorted(lengths)
    assert lengths[0] == 0 < len(whole)
    for end in range(0, len(data), 997):
        read = list(records(data[:end]))
        assert read == whole[: len(read)]
    damaged = data[:-1] + bytes([data[-1] ^ 1])
    assert list(records(damaged)) == whole[:-1]


def test_all_heads_are_on_one_chart(tmp_path):
    recorder = open_recorder(example_config(OFFLINE), tmp_path, True)
    for step in (1, 2):
        recorder.log(step, {"val/loss/exit_02": 4.0 - step, "val/loss/final": 3.0 - step})
    recorder.close({}, "done")
    table = read_offline_run(tmp_path).table("charts/val_loss_table")
    points = {tuple(row) for row in table["data"]}
    assert points == {(1, "exit_02", 3.0), (2, "exit_02", 2.0), (1, "final", 2.0), (2, "final", 1.0)}


def test_a_continued_runs_chart_begins_with_what_is_on_record(tmp_path):
    for step in (1, 2):
        recorder = open_recorder(example_config(OFFLINE), tmp_path, True)
        recorder.log(step, {"train/loss/final": 4.0 - step})
        recorder.close({}, "done")
    table = read_offline_run(tmp_path).table("charts/train_loss_table")
    assert table["data"] == [[1, "final", 3.0], [2, "final", 2.0]]


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """A run of a study with tables, a picture and a page, read back."""
    run_dir = tmp_path_factory.mktemp("shown")
    (run_dir / "overrides.txt").write_text("".join(f"{override}\n" for override in TYPED))
    (run_dir / "gantt.png").write_bytes(PIXEL)
    recorder = open_recorder(example_config({**OFFLINE, "study": {"name": "s"}}), run_dir, True)
    for name, (x, y) in SCATTERS.items():
        recorder.table(name, [{"threshold": 0.5, x: 1.0, y: 2.0}, {"threshold": 0.9, x: 3.0, y: None}])
    recorder.image("gantt", run_dir / "gantt.png")
    recorder.html("samples", PAGE.decode())
    recorder.close({}, "done")
    return read_offline_run(run_dir)


@pytest.mark.parametrize(("name", "x", "y"), [(name, *columns) for name, columns in SCATTERS.items()])
def test_a_table_is_drawn_as_a_scatter_plot(shown, name, x, y):
    assert shown.table(f"tables/{name}")["data"] == [[0.5, 1, 2], [0.9, 3, None]]
    assert shown.table(f"charts/{name}_table")["data"] == [[0.5, 1, 2]]
    chart = shown.config[f"_wandb.visualize.charts/{name}"]["panel_config"]
    assert (chart["panelDefId"], chart["fieldSettings"]) == ("wandb/scatter/v0", {"x": x, "y": y})


@pytest.mark.parametrize(
    ("name", "kind", "content"), [("images/gantt", "image-file", PIXEL), ("pages/samples", "html-file", PAGE)]
)
def test_pictures_and_pages_are_uploaded_as_they_are(shown, name, kind, content):
    row = next(row for row in shown.history if f"{name}.path" in row)
    assert row[f"{name}._type"] == kind
    assert (shown.folder / "files" / row[f"{name}.path"]).read_bytes() == content


def test_a_run_is_called_by_what_sets_it_apart(shown):
    assert shown.run.run_group == "s"
    assert shown.run.display_name == "example loss_weights.values=0.5 exits.layers=[2,4] seed=3"
    command, folder = shown.run.notes.splitlines()
    assert command == "python run.py study=s loss_weights.values=0.5 'exits.layers=[2,4]' logger=wandb_offline seed=3"
    assert folder == str(shown.folder.parents[1])


def test_long_curves_are_thinned_and_keep_their_end():
    assert _thinned(list(range(999))) == list(range(999))
    assert _thinned(list(range(1, 2502))) == list(range(2, 2502, 3))


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


def test_a_named_group_stands_before_the_study(tmp_path):
    run_dir = tmp_path / "2026-01-31_12-00-00"
    run_dir.mkdir()
    overrides = {"study": {"name": "s"}, "logger.wandb.group": "g"}
    open_recorder(example_config({**OFFLINE, **overrides}), run_dir, True).close({}, "done")
    run = read_offline_run(run_dir).run
    assert (run.run_group, run.display_name) == ("g", "example 2026-01-31_12-00-00")


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

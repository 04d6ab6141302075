import json
from pathlib import Path

import pandas as pd
import pytest
import wandb

from eellm.analysis import exit_table, load_runs, metric_history, settings_of, speed_quality, token_table
from eellm.errors import RunError

PROJECT = "wandb://us/exits"


class StoredFile:
    def __init__(self, name, content):
        self.name, self.content = name, content

    def download(self, root):
        path = Path(root) / self.name
        path.parent.mkdir(parents=True)
        path.write_text(self.content)
        return path.open()


class StoredRun:
    """What wandb's Api gives of a run, as the sink has logged it: config dotted, tables as files of columns and data."""

    def __init__(self, id_, config, summary, state="finished"):
        self.id, self.config, self.summary_metrics, self.state = id_, config, summary, state
        self.created_at = "2026-09-21T13:46:40Z"

    def scan_history(self):
        yield {"_step": 0, "_timestamp": 100.0, "step": 10, "val/loss/final": 4.0, "train/lr": "NaN"}
        yield {"_step": 1, "_timestamp": 105.0, "step": 20, "val/loss/final": 3.5}
        yield {"_step": 2, "_timestamp": 106.0, "tables/exits": {"_type": "table-file"}, "step": None}

    def file(self, path):
        data = [["full", None, 1.0], ["catch_up", 0.5, 1.25]]
        return StoredFile(path, json.dumps({"columns": ["decoding", "threshold", "speedup"], "data": data}))


@pytest.fixture
def api(monkeypatch):
    """Stands in for wandb's servers: paths must be asked for as they are written there."""
    table = {"_type": "table-file", "path": "media/table/tables/speed_quality_0_a.table.json"}
    summary = {
        "status": "done",
        "_runtime": 60,
        "_timestamp": 1.0,
        "step": 20,
        "val/loss/final": 3.5,
        "charts/val_loss": {"_type": "x"},
    }
    runs = {
        "aa": StoredRun(
            "aa", {"name": "a", "seed": 1, "exits.layers": [2, 4], "_wandb": {}}, {**summary, "tables/speed_quality": table}
        ),
        "bb": StoredRun("bb", {"name": "b", "seed": 2, "exits.layers": [2, 4]}, {"val/loss/final": "Infinity"}, "crashed"),
    }

    class Api:
        def runs(self, path, per_page, lazy):
            if path == "us/absent":
                raise ValueError("Could not find project absent")
            assert not lazy, "settings and metrics are wanted of all runs, so not one request each"
            return iter(runs.values()) if path == "us/exits" else iter([])

        def run(self, path):
            entity, project, id_ = path.split("/")
            assert (entity, project) == ("us", "exits")
            return runs[id_]

    monkeypatch.setattr(wandb, "Api", Api)
    return runs


def test_a_project_reads_like_a_folder(api):
    runs = load_runs(PROJECT)
    assert runs["run"].tolist() == [f"{PROJECT}/aa", f"{PROJECT}/bb"]
    assert runs["status"].tolist() == ["done", "failed"]
    assert runs["seconds"].tolist()[0] == 60.0
    assert runs["started"][0] == pd.Timestamp("2026-09-21T13:46:40Z")
    assert settings_of(runs) == ["seed"]
    assert runs.attrs == {"shared": {"exits.layers": "[2,4]"}, "broken": []}
    assert [column for column in runs if "/" in column] == ["val/loss/final"]
    assert runs["val/loss/final"].tolist() == [3.5, float("inf")]


def test_what_runs_have_logged_is_fetched(api):
    runs = load_runs(PROJECT)
    history = metric_history(runs[runs["seed"] == 1], "val/*")
    assert history[["step", "seconds", "value"]].values.tolist() == [[10, 0.0, 4.0], [20, 5.0, 3.5]]
    table = speed_quality(runs)
    assert table[["seed", "decoding", "speedup"]].values.tolist() == [[1, "full", 1.0], [1, "catch_up", 1.25]]
    assert exit_table(runs)["loss"].tolist() == [3.5, float("inf")]
    assert len(token_table(runs)) == 0


def test_a_run_that_cannot_be_read_is_reported(api):
    api["bb"].created_at = "yesterday"
    runs = load_runs(PROJECT)
    assert runs["run"].tolist() == [f"{PROJECT}/aa"]
    ((path, reason),) = runs.attrs["broken"]
    assert path == f"{PROJECT}/bb"
    assert "yesterday" in reason


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("created_at", None, "created_at is None"),
        ("config", None, "config is None"),
        ("summary_metrics", "?", "summary is '?'"),
        ("summary_metrics", {"_runtime": "long"}, "_runtime is 'long'"),
    ],
)
def test_a_run_of_another_shape_is_reported(api, name, value, reason):
    setattr(api["bb"], name, value)
    runs = load_runs(PROJECT)
    assert runs["run"].tolist() == [f"{PROJECT}/aa"]
    ((path, said),) = runs.attrs["broken"]
    assert path == f"{PROJECT}/bb"
    assert reason in said


def test_our_own_errors_are_not_taken_for_broken_runs(api, monkeypatch):
    def mistaken(*_):
        raise TypeError("ours")

    monkeypatch.setattr("eellm.analysis.wandb_project.flatten", mistaken)
    with pytest.raises(TypeError, match="ours"):
        load_runs(PROJECT)


def test_what_cannot_be_fetched_costs_its_run_only(api, monkeypatch):
    runs = load_runs(PROJECT)

    def unreachable(*_):
        raise wandb.errors.CommError("connection refused")

    monkeypatch.setattr(api["bb"], "scan_history", unreachable)
    history = metric_history(runs)
    assert set(history["run"]) == {f"{PROJECT}/aa"}
    ((path, reason),) = history.attrs["broken"]
    assert path == f"{PROJECT}/bb"
    assert "connection refused" in reason
    monkeypatch.setattr(api["aa"], "file", unreachable)
    assert [path for path, _ in speed_quality(runs).attrs["broken"]] == [f"{PROJECT}/aa"]


@pytest.mark.parametrize("row", [{"step": "one", "_timestamp": 1.0}, {"step": 1}])
def test_a_history_of_another_shape_is_reported(api, monkeypatch, row):
    runs = load_runs(PROJECT)
    monkeypatch.setattr(api["aa"], "scan_history", lambda: [row])
    assert [path for path, _ in metric_history(runs).attrs["broken"]] == [f"{PROJECT}/aa"]


@pytest.mark.parametrize("content", ["[]", '{"columns": ["a"]}', '{"columns": ["a"], "data": [[1, 2]]}', '{"columns": ["a"], '])
def test_a_table_of_another_shape_is_reported(api, monkeypatch, content):
    runs = load_runs(PROJECT)
    monkeypatch.setattr(api["aa"], "file", lambda path: StoredFile(path, content))
    assert [path for path, _ in speed_quality(runs).attrs["broken"]] == [f"{PROJECT}/aa"]


def test_what_is_no_project_is_an_error(api, monkeypatch):
    for source, message in {
        "wandb://us": "give a project as wandb://entity/project",
        "wandb://us/absent": "Could not find project",
        "wandb://us/empty": "the project has no runs",
    }.items():
        with pytest.raises(RunError, match=message):
            load_runs(source)

    def without_key():
        raise wandb.errors.UsageError("No API key configured")

    monkeypatch.setattr(wandb, "Api", without_key)
    with pytest.raises(RunError, match="No API key configured"):
        load_runs(PROJECT)

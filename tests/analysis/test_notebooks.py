"""Notebooks are kept without outputs, say what makes their data, and run from beginning to end on small runs."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from eellm.config.compose import compose, to_yaml
from eellm.plan.outcome import plan
from tests.analysis.example_study import write_example_study
from tests.conf_files import RUN, first_of_each_sweep, overrides_of

FOLDER = Path(__file__).resolve().parents[2] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
TOPICS = ["01_quickstart_tour", "02_exit_quality", "03_speed_quality", "04_schedules_and_planning", "05_compare_sweeps_wandb"]


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three weights and three seeds; the newest run has failed."""
    folder = write_example_study(tmp_path_factory.mktemp("study") / "runs")
    status = json.loads((folder / "failed" / "status.json").read_text())
    (folder / "failed" / "status.json").write_text(json.dumps({**status, "started": status["started"] + 100}))
    return folder


@pytest.fixture(scope="module")
def plans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What task=plan leaves of two layouts."""
    folder = tmp_path_factory.mktemp("plans")
    for name, layout in (("pp4", "parallel=pp4"), ("pp2_vp2", "parallel=pp2_vp2")):
        config = compose(["task=plan", f"name={name}", layout, "data.global_batch_size=16", "plan.gpus=4"])
        outcome, run = plan(config, 1024), folder / name
        run.mkdir()
        (run / "config.yaml").write_text(to_yaml(config))
        (run / "status.json").write_text(json.dumps({"state": "done", "error": None, "started": 1.0, "updated": 2.0}))
        (run / "metrics.json").write_text(json.dumps(outcome.metrics()))
        (run / "plan.json").write_text(json.dumps(outcome.json()))
    return folder


def executed(name: str, runs: Path) -> list[Any]:
    """The outputs of all cells; raises where a cell does."""
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", 4)
    client = NotebookClient(notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": str(FOLDER)}})
    paths = os.pathsep.join(filter(None, (str(FOLDER.parent), os.environ.get("PYTHONPATH"))))
    client.execute(env={**os.environ, "EELLM_RUNS": str(runs), "PYTHONPATH": paths})
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert [output["text"] for output in outputs if output.get("name") == "stderr"] == []
    return outputs


def text_of(outputs: list[Any]) -> str:
    return "\n".join(output.get("text") or output.get("data", {}).get("text/plain", "") for output in outputs)


def figures_in(outputs: list[Any]) -> int:
    return sum("image/png" in output.get("data", {}) for output in outputs)


def test_all_are_there() -> None:
    assert [path.stem for path in NOTEBOOKS] == TOPICS
    linked = {name for path in NOTEBOOKS for name in re.findall(r"\]\((\w+)\.ipynb\)", path.read_text())}
    assert linked <= set(TOPICS)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_stripped(path: Path) -> None:
    notebook = nbformat.read(path, 4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell for cell in code if cell.outputs or cell.execution_count is not None] == []
    assert {"execution", "collapsed", "widgets"} & {key for cell in code for key in cell.metadata} == set()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_begins_with_its_question_and_the_commands_of_its_data(path: Path, saved_run: Path) -> None:
    first, parameters = nbformat.read(path, 4).cells[:2]
    assert re.match(r"# .*\?\n", first.source)
    assert 'os.environ.get("EELLM_RUNS"' in parameters.source
    (block,) = re.findall(r"```bash\n(.*?)```", first.source, re.DOTALL)
    for line in block.splitlines():
        overrides = overrides_of(line.removeprefix("python ").replace("run.py", RUN, 1).replace("$RUN", str(saved_run)))
        compose(first_of_each_sweep(overrides))


def test_the_tour_shows_the_newest_run_that_is_done(study: Path) -> None:
    outputs = executed("01_quickstart_tour", study)
    assert re.search(r"The fastest of \d settings at which tokens left early: \d\.\d\d times", text_of(outputs))
    assert figures_in(outputs) == 3


def test_exit_quality(study: Path) -> None:
    outputs = executed("02_exit_quality", study)
    assert "3 of 9 runs: the newest, and those that differ from it in their seed alone" in text_of(outputs)
    assert re.search(r"Largest gain: [+-]\d", text_of(outputs))
    assert figures_in(outputs) == 4


def test_speed_quality(study: Path) -> None:
    outputs = executed("03_speed_quality", study)
    assert "3 of 9 runs: those of the newest one's model" in text_of(outputs)
    assert re.search(r"The most faithful setting that pays: catch_up at .*\n\d\.\d\d ± \d\.\d\d times", text_of(outputs))
    assert figures_in(outputs) == 3
    assert any("srcdoc" in output.get("data", {}).get("text/html", "") for output in outputs)


def test_schedules_and_planning(plans: Path) -> None:
    outputs = executed("04_schedules_and_planning", plans)
    assert "pp4: fastest is" in text_of(outputs)
    assert "A step takes 36 units without exits" in text_of(outputs)
    assert figures_in(outputs) == 2


def test_a_sweep_is_compared_and_what_failed_is_named(study: Path) -> None:
    outputs = executed("05_compare_sweeps_wandb", study)
    text = text_of(outputs)
    assert "unreadable:" in text
    assert "metrics.json is not JSON" in text
    assert "NonFiniteError" in text
    assert "Best mean: loss_weights.values=0.1" in text
    assert figures_in(outputs) == 3


def test_a_sweep_over_two_settings_is_compared_by_both(study: Path, tmp_path: Path) -> None:
    for run in study.glob("weight_*"):
        copied = tmp_path / "runs" / f"{run.name}_b"
        shutil.copytree(run, tmp_path / "runs" / run.name)
        shutil.copytree(run, copied)
        config = json.loads((copied / "config.yaml").read_text())
        (copied / "config.yaml").write_text(json.dumps({**config, "optimizer": {**config["optimizer"], "lr": 0.5}}))
    outputs = executed("05_compare_sweeps_wandb", tmp_path / "runs")
    text = text_of(outputs)
    assert re.search(r"18 runs, compared by (loss_weights.values, optimizer.lr|optimizer.lr, loss_weights.values)", text)
    assert "Not told apart from it: ['" in text, "the same losses twice"

"""Notebooks are kept without outputs, say what makes their data, and run from beginning to end on small runs."""

from __future__ import annotations

import json
import os
import re
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
    return write_example_study(tmp_path_factory.mktemp("study") / "runs")


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


def test_the_tour_says_whether_leaving_early_pays(study: Path) -> None:
    outputs = executed("01_quickstart_tour", study)
    assert re.search(r"Early exit (pays|does not pay) here: at best \d\.\d\d times", text_of(outputs))
    assert figures_in(outputs) == 3


def test_exit_quality(study: Path) -> None:
    outputs = executed("02_exit_quality", study)
    assert re.search(r"Largest gain: [+-]\d", text_of(outputs))
    assert figures_in(outputs) == 4


def test_speed_quality(study: Path) -> None:
    outputs = executed("03_speed_quality", study)
    assert "The most faithful setting that pays: catch_up at" in text_of(outputs)
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
